"""Delta tables as Spark writes and reads them, at the same places and with the same logs as on every engine.

Belongs here: appends, overwrites and merges by Spark's Delta writer, proven by the log; rows by Spark's reader.
Does not belong here: which rows (`writer.py`), the log itself, creation and durability (`lakehouse/`), sessions.

Spark says less about a commit than the promise of exactly once needs: it skips a write whose recorded position is not
below the given one without a word, and appends behind whatever came in between. So the log is read after every commit:
it must hold ours, once, by our attempt, and nothing that took rows away before it. What must become the very next
version (an overwrite, a merge) has its tasks look for another writer's entry; they run within the transaction, and what
comes after they looked is a conflict that Delta itself sees.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from telematics_assets.catalog import TableName
from telematics_assets.engines.spark import merging
from telematics_assets.engines.spark.tasks import OVERTAKEN, SURPRISED, told
from telematics_assets.errors import (
    BasisMovedError,
    CommitConflictError,
    SparkError,
    TableError,
    TableMovedError,
    TableUnsupportedError,
    VolumeUnavailableError,
)
from telematics_assets.lakehouse import log
from telematics_assets.lakehouse.base import POSITIONS_INFO, REWRITTEN_INFO, Commit, Merged
from telematics_assets.lakehouse.delta import DeltaLakehouse, DeltaLakeTable
from telematics_assets.lakehouse.log import entry_path, refuse_features, refuse_what_rows_must_obey
from telematics_assets.lakehouse.merging import Changes

if TYPE_CHECKING:
    from deltalake import DeltaTable
    from pyspark.sql import DataFrame, SparkSession

    from telematics_assets.lakehouse.stores import TableStore

_CONFLICTS = ("DELTA_CONCURRENT", "Concurrent", "DELTA_METADATA_CHANGED", "MetadataChangedException", "ProtocolChanged")
#: Parts of a plan where nobody says how many cores there are.
_CONNECT_TASKS = 8
#: Text of the commit info by which a merge knows its own commit.
_MERGE_INFO = "telematics.merge"


class PassFailedError(Exception):
    """Raised when the tasks of a write failed; nothing was committed.

    Attributes:
        cause: What to tell if nobody learns anything from the files.
    """

    def __init__(self, cause: Exception) -> None:
        """Keep the cause."""
        super().__init__(str(cause))
        self.cause = cause


class SparkLakehouse(DeltaLakehouse):
    """Delta tables below one place, written and read by Spark."""

    def __init__(self, root: Path | str, session: Callable[[], SparkSession]) -> None:
        """Use a place.

        Args:
            root: See `DeltaLakehouse`.
            session: Gives the session; called at the first row that is written or read.
        """
        super().__init__(root)
        self._session = session

    def _table(self, name: TableName, path: str, handle: DeltaTable) -> SparkTable:
        return SparkTable(name, path, handle, self._store, self._session)


class SparkTable(DeltaLakeTable):
    """One open handle on a Delta table; rows go through Spark. See `lakehouse.base.Table`."""

    def __init__(
        self, name: TableName, path: str, handle: DeltaTable, store: TableStore, session: Callable[[], SparkSession]
    ) -> None:
        super().__init__(name, path, handle, store)
        self._session = session

    @property
    def next_entry(self) -> str:
        """The log entry of the version after this one, as a path; it is not there yet."""
        return entry_path(self._path, self.version + 1)

    @property
    def entry(self) -> str | None:
        """The log entry of this version, as a path; None where it is not a file that tasks see."""
        path = entry_path(self._path, self.version)
        return path if os.path.exists(path) else None

    # -- writing ---------------------------------------------------------------------------------------------------

    def prepare(self, schema: pa.Schema) -> None:
        """Make ready for rows of these columns; this handle may be at a later version then.

        Raises:
            CommitConflictError: If another writer committed meanwhile.
        """
        mine = self.schema
        same = set(schema.names) <= set(mine.names) and all(f.type == mine.field(f.name).type for f in schema)
        if not same or self._lost_statistics(schema):
            self._keep_statistics_true(schema, there=True)

    def append_frame(
        self, schema: pa.Schema, rows: DataFrame, app_id: str, version: int, info: Mapping[str, str]
    ) -> Commit:
        """Append rows, added columns and the application's new position in ONE commit.

        Args:
            schema: Columns of the rows: the table's and, behind them, columns to add.
            rows: The rows; their tasks may fail, then nothing is committed.
            app_id: The application.
            version: Its new position.
            info: Texts for the commit info; one of them is this attempt's own.

        Raises:
            PassFailedError: If the tasks failed.
            CommitConflictError: If another writer of the same application was first.
            TableMovedError: If somebody removed rows since the handle was opened; the rows were committed behind that.
        """
        self._refuse_casts(self.schema, schema)
        before = self.version
        options = {"mergeSchema": str(not set(schema.names) <= set(self.schema.names)).lower()}
        self._save(rows, "append", {app_id: version}, info, options)
        return self._proven(before, {app_id: version}, info)

    def overwrite_frame(
        self, schema: pa.Schema, rows: DataFrame, positions: Mapping[str, int], info: Mapping[str, str]
    ) -> Commit:
        """Replace all rows and the schema. See `Table.overwrite`.

        Args:
            schema: Columns of the rows, and the table's new ones.
            rows: The rows; their tasks must look for `next_entry`.
            positions: Applications with their new positions; the first is part of the same commit, the others follow.
            info: Texts for the commit info.

        Raises:
            PassFailedError: If the tasks failed.
        """
        self._refuse_casts(pa.schema([]), schema)
        if self._keep_statistics_true(schema, there=True):
            raise BasisMovedError(
                f"{self._name} had to lose statistics that its new columns lack or would make false, so it is at "
                f"version {self.version} now. Its rows are as they were; run again."
            )
        self._refuse_removals()
        return self._replaced(rows, positions, info)

    def widen_frame(
        self, schema: pa.Schema, rows: DataFrame, app_id: str, version: int, info: Mapping[str, str]
    ) -> Commit:
        """Append rows and widen columns by writing anew those that are there. See `Table.widen`."""
        self._refuse_widening()
        self._refuse_casts(self.schema, schema, widened=True)
        there = pa.schema([self.schema.field(field.name) for field in schema if field.name in self.schema.names])
        old = self._rows(version=self.version).select(*map(merging.quoted, there.names))
        anew = old.mapInArrow(_widening(there, schema), spark_schema(schema))
        info = {**info, REWRITTEN_INFO: str(self.count())}
        return self._replaced(anew.unionByName(rows), {app_id: version}, info)

    def merge(
        self,
        rows: pa.Table,
        gone: pa.Table,
        key: Sequence[str],
        positions: Mapping[str, int],
        info: Mapping[str, str],
        unseen: Sequence[str] = (),
    ) -> Merged:
        """See `Table.merge`.

        A conflict is not tried again here, whoever was first: rows and positions were read for the version that this
        handle shows, so that the caller begins anew with the next one. Rows that are appended by `append`, as those of
        a first snapshot are, do not come here: they are written by this process.
        """
        mine = self.schema
        self._refuse_casts(mine, rows.schema)
        self._refuse_casts(mine, gone.schema)
        # Spark would take them; the positions behind the merge must not fail where the merge did not.
        refuse_features(self._handle, self._name, replaces=True)
        refuse_what_rows_must_obey(self._handle, self._name, replaces=False)
        if not set(rows.schema.names) <= set(mine.names):
            self._keep_statistics_true(rows.schema)
        if not rows.num_rows and not gone.num_rows:
            return Merged(self._positioned(rows.schema, positions, info), 0, 0, 0)
        if self._lacks_feature(rows.schema):
            return super().merge(rows, gone, key, positions, info, unseen)
        before = self.version
        attempt = uuid.uuid4().hex
        told = {**info, POSITIONS_INFO: json.dumps(dict(positions)), _MERGE_INFO: attempt}
        changes = Changes(rows, gone, tuple(key), tuple(unseen))
        first = next(iter(positions.items()))
        try:
            with spark_errors(self._name):
                merging.merge(self._session(), self._path, changes, mine, first, told, self.next_entry)
        except PassFailedError as error:
            raise error.cause from error
        commit = self._own_merge(before, attempt)
        if commit is None:
            # Where nothing changes, Spark may commit nothing, positions neither.
            return Merged(self._positioned(rows.schema, positions, info), 0, 0, 0)
        (said,) = (action["commitInfo"] for action in self._actions(commit.version) if "commitInfo" in action)
        counts = [int(said["operationMetrics"][f"numTargetRows{what}"]) for what in ("Inserted", "Updated", "Deleted")]
        if len(positions) > 1:
            # A log entry on disk behind one that is not would be a table that nobody can open.
            self.make_durable(commit)
            # Whoever was faster has seen the positions that the merge noted, or leaves them to be found there.
            with suppress(CommitConflictError):
                commit = self._positioned(rows.schema, positions, info)
        return Merged(commit, *counts)

    def _own_merge(self, before: int, attempt: str) -> Commit | None:
        """The commit of the merge that was just made, which the handle then shows; None if there is none, nor others.

        Raises:
            CommitConflictError: If Spark left the merge out, because another writer was first.
        """
        self._handle.update_incremental()
        behind: list[Commit] = []
        for number in range(before + 1, self.version + 1):
            commit = self._commit(number)
            if commit.info.get(_MERGE_INFO) != attempt:
                behind.append(commit)
                continue
            for other in behind:
                # What only rearranges the table, or keeps its books, Delta lets pass.
                if other.removes_data or other.rows:
                    raise TableMovedError(
                        f"Rows of {self._name} were changed while rows were merged into it: version {other.version}, "
                        f"operation {other.operation}. Take a new snapshot, which mends every row "
                        "(telematics replicate --full)."
                    )
            if self.version != number:
                self._handle.load_as_version(number)
            return commit
        if behind:
            raise CommitConflictError(
                f"Another writer committed to {self._name} first: version {behind[0].version}, operation "
                f"{behind[0].operation}. Nothing of this commit is in the table; run again."
            )
        return None

    def _replaced(self, rows: DataFrame, positions: Mapping[str, int], info: Mapping[str, str]) -> Commit:
        before = self.version
        self._save(rows, "overwrite", positions, info, {"overwriteSchema": "true"})
        commit = self._proven(before, positions, info)
        if commit.version != before + 1:
            raise TableError(
                f"{self._name} version {commit.version} replaced rows of another writer's version {before + 1}. "
                f"RESTORE the table to version {commit.version - 1} and run again."
            )
        return commit

    def _save(
        self,
        rows: DataFrame,
        mode: str,
        positions: Mapping[str, int],
        info: Mapping[str, str],
        options: Mapping[str, str],
    ) -> None:
        log.refuse_what_rows_must_obey(self._handle, self._name, replaces=mode == "overwrite")
        # Spark would begin a table where there is none.
        log.require(self._store, self._handle, self._name, self._path)
        app_id, version = next(iter(positions.items()))
        if len(positions) > 1:
            info = {**info, POSITIONS_INFO: json.dumps(dict(positions))}
        writer = rows.write.format("delta").mode(mode).options(**options)
        writer = writer.option("txnAppId", app_id).option("txnVersion", version)
        with spark_errors(self._name):
            writer.option("userMetadata", json.dumps(dict(info))).save(self._path)

    def _proven(self, before: int, positions: Mapping[str, int], info: Mapping[str, str]) -> Commit:
        """The commit that was just made, as the log tells it; the handle becomes its snapshot."""
        app_id, version = next(iter(positions.items()))
        self._handle.update_incremental()
        behind: list[Commit] = []
        for number in range(before + 1, self.version + 1):
            commit = self._commit(number)
            if commit.transactions.get(app_id) == version:
                if any(commit.info.get(key) != text for key, text in info.items()):
                    raise CommitConflictError(
                        f"Another writer committed to {self._name} first: version {number} has the same position. "
                        "Spark left out what it was given; nothing of it is in the table."
                    )
                for other in behind:
                    if other.removes_data:
                        raise TableMovedError(
                            f"Rows of {self._name} were removed while rows were appended to it: version "
                            f"{other.version}, operation {other.operation}. Load again to be told what to do."
                        )
                if self.version != number:
                    self._handle.load_as_version(number)
                return commit
            behind.append(commit)
        raise TableError(
            f"Spark has written to {self._name}, but no log entry since version {before} holds position {version} of "
            f"{app_id}. Keep the table and its _delta_log as they are and report this."
        )

    # -- reading ---------------------------------------------------------------------------------------------------

    def _rows(self, version: int | None = None) -> DataFrame:
        reader = self._session().read.format("delta")
        return (reader if version is None else reader.option("versionAsOf", version)).load(self._path)


@contextmanager
def spark_errors(name: TableName) -> Iterator[None]:
    """Spark's errors by their names.

    Args:
        name: The table that is worked for.

    Raises:
        CommitConflictError: If another writer was first.
        PassFailedError: If looking through the files may tell more.
    """
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        text = str(error)
        if OVERTAKEN in text or any(conflict in text for conflict in _CONFLICTS):
            raise CommitConflictError(
                f"Another writer committed to {name} first. Nothing of this commit is in the table; run again."
            ) from error
        if (theirs := told(text)) is not None:
            raise theirs from error
        cause = explained(name, text)
        if SURPRISED in text or isinstance(cause, VolumeUnavailableError):
            raise PassFailedError(cause) from error
        raise cause from error


def spark_schema(schema: pa.Schema) -> Any:
    """Spark's struct type of Arrow columns: all nullable, comments kept."""
    from pyspark.sql.pandas.types import from_arrow_type
    from pyspark.sql.types import StructField, StructType

    fields = []
    for field in schema:
        comment = (field.metadata or {}).get(b"comment")
        metadata = {"comment": comment.decode()} if comment else {}
        fields.append(StructField(field.name, from_arrow_type(field.type), True, metadata))
    return StructType(fields)


def parallelism(spark: SparkSession) -> int:
    """How many tasks a small job gets."""
    given = spark.conf.get("spark.sql.leafNodeDefaultParallelism", None)
    if given is not None:
        return int(given)
    if not hasattr(spark, "_jsparkSession"):
        # A Connect server does not tell; a plan has no more parts than files.
        return _CONNECT_TASKS
    return int(spark.sparkContext.defaultParallelism)


def explained(name: TableName, text: str) -> Exception:
    """What an error of Spark means, by its text."""
    line = _line(text)
    lowered = text.lower()
    if missing := re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", text):
        return SparkError(
            f"Spark's executors run a Python that has no module {missing[1]}.",
            "Install pyarrow, polars and numpy there, in the versions of this machine, and name that interpreter: "
            "TELEMATICS_SPARK_CONF='spark.pyspark.python=/path/to/python'.",
        )
    if "permission denied" in lowered or "read-only file system" in lowered:
        return TableError(f"{name} can't be written: {line}. Check the permissions of Spark's user.")
    if "DELTA_CANNOT_MODIFY_APPEND_ONLY" in text:
        return TableUnsupportedError(
            f"{name} has the property delta.appendOnly, so its rows can't be replaced. Set it to false."
        )
    if any(word in text for word in ("DELTA_NOT_NULL_CONSTRAINT", "DELTA_VIOLATE_CONSTRAINT", "constraint violat")):
        return TableUnsupportedError(f"{name} can't be written: {line}. Drop its constraint: bronze keeps all records.")
    if "DELTA_UNSUPPORTED" in text or "FEATURE" in text:
        return TableUnsupportedError(f"{name} can't be used: {line}. Drop the table feature.")
    return VolumeUnavailableError(f"{name}: Spark failed: {line}. It may go through later.")


def _line(text: str) -> str:
    """The first sentence of Spark's pages."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Of an error in Python code the last line of its own trace says what it was.
    ends = [line for line in lines if ": " in line and line.split(":")[0].replace(".", "").isidentifier()]
    return (ends or lines or ["no message"])[0][:500]


def _widening(there: pa.Schema, schema: pa.Schema) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    names = set(there.names)
    plain = pa.schema([pa.field(field.name, field.type) for field in schema])

    def widened(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            columns = [
                batch.column(f.name).cast(f.type) if f.name in names else pa.nulls(batch.num_rows, f.type)
                for f in plain
            ]
            yield pa.RecordBatch.from_arrays(columns, schema=plain)

    return widened
