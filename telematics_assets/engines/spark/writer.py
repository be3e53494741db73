"""How Spark writes the rows of a plan's files: its tasks read them, its Delta writer appends them.

Belongs here: the passes of an attempt, what is learnt between them, and the tables that they go into.
Does not belong here: what tasks do (`tasks.py`), commits (`tables.py`), the order of steps (`autoloader/loader.py`).

One pass is one Spark job: as many tasks as there are cores read parts of the plan and hand their rows to the writer.
A pass that meets a bad file or a new column fails before it commits; then all files are looked through by another job,
and the next pass knows of all of them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING

import pyarrow as pa

from telematics_assets.autoloader.checkpoint import ATTEMPT_INFO, DIGEST_INFO, FileResult, Plan, Result
from telematics_assets.autoloader.counting import UNCOUNTED
from telematics_assets.autoloader.reading import Attempt, first_schema
from telematics_assets.autoloader.schema import changes, evolved, lost_own_fields, resolve, widens
from telematics_assets.catalog import FileStream, TableName
from telematics_assets.engines.base import Progress, ProgressListener
from telematics_assets.engines.checkpointed import create_table
from telematics_assets.engines.spark.tables import (
    PassFailedError,
    SparkLakehouse,
    SparkTable,
    parallelism,
    spark_errors,
    spark_schema,
)
from telematics_assets.engines.spark.tasks import LOOK_SCHEMA, Look, Pass, dealt
from telematics_assets.errors import SchemaError
from telematics_assets.lakehouse.base import Commit, Table
from telematics_assets.lakehouse.types import delta_type
from telematics_assets.volumes.base import FileEntry, Volume

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

#: How one pass is committed: columns, rows, if there can be any, and texts of the commit info.
_Commits = Callable[["SparkTable", pa.Schema, "DataFrame | None", dict[str, str]], Commit]


class SparkWriter:
    """Lets Spark read a plan's files and append their rows. See `autoloader.loader.BatchWriter`."""

    def __init__(
        self,
        volume: Volume,
        lakehouse: SparkLakehouse,
        session: Callable[[], SparkSession],
        clock: Callable[[], int],
    ) -> None:
        """Tie it to a Volume that executors can read, to tables that they can write, and to a session.

        Args:
            volume: The landing Volume.
            lakehouse: The tables.
            session: Gives the session.
            clock: The moment that rows name as theirs, nanoseconds since the epoch.
        """
        self._volume = volume
        self._lakehouse = lakehouse
        self._session = session
        self._clock = clock

    def create_table(
        self, stream: FileStream, name: TableName, files: tuple[FileEntry, ...], properties: dict[str, str]
    ) -> Table:
        """See `BatchWriter.create_table`."""
        return create_table(self._volume, self._lakehouse, stream, name, files, properties)

    def write(
        self,
        stream: FileStream,
        table: Table,
        plan: Plan,
        attempt: str,
        stream_id: str,
        publish: Callable[[Result], None],
        on_step: Callable[[str], None],
        progress: ProgressListener,
    ) -> Commit:
        """See `BatchWriter.write`."""

        def commit(mine: SparkTable, schema: pa.Schema, rows: DataFrame | None, info: dict[str, str]) -> Commit:
            if rows is None:
                return mine.append(schema, (), stream_id, plan.batch_id, info)
            write = mine.widen_frame if widens(mine.schema, schema) else mine.append_frame
            return write(schema, rows, stream_id, plan.batch_id, info)

        return self._written(stream, table, table.schema, plan, attempt, commit, publish, on_step, progress, stream_id)

    def rewrite(
        self,
        stream: FileStream,
        table: Table,
        plan: Plan,
        attempt: str,
        positions: dict[str, int],
        publish: Callable[[Result], None],
        on_step: Callable[[str], None],
        progress: ProgressListener,
    ) -> Commit:
        """See `RefreshWriter.rewrite`."""

        def commit(mine: SparkTable, schema: pa.Schema, rows: DataFrame | None, info: dict[str, str]) -> Commit:
            if rows is None:
                return mine.overwrite(schema, (), positions, info)
            return mine.overwrite_frame(schema, rows, positions, info)

        schema = first_schema(self._volume, stream, plan.files)
        return self._written(stream, table, schema, plan, attempt, commit, publish, on_step, progress, replaces=True)

    def _written(
        self,
        stream: FileStream,
        table: Table,
        base: pa.Schema,
        plan: Plan,
        attempt: str,
        commit: _Commits,
        publish: Callable[[Result], None],
        on_step: Callable[[str], None],
        progress: ProgressListener,
        app_id: str | None = None,
        *,
        replaces: bool = False,
    ) -> Commit:
        assert isinstance(table, SparkTable)
        known = Attempt(new_fields=lost_own_fields(stream, base))
        total = len(plan.files)
        now = self._clock()
        on_step("reading")
        # Handed to tasks: nobody hears of a single file before the commit.
        for _ in plan.files:
            on_step("file_read")
        for number in count(1):
            schema = evolved(base, known.new_fields)
            if not replaces:
                table.prepare(schema)
            reading = Pass(
                self._volume,
                stream,
                base,
                schema,
                plan.batch_id,
                now,
                dict(known.verdicts),
                tuple(known.new_fields),
                table.next_entry if replaces or widens(base, schema) else None,
                table.entry,
                app_id,
            )
            progress(Progress("read", f"Spark reads {total} files", 0, total))
            # The pass commits at its end: whoever finds its commit after a crash must find this.
            result = _result(plan, attempt if number == 1 else f"{attempt}-{number}", base, schema, known)
            publish(result)
            info = {ATTEMPT_INFO: result.attempt, DIGEST_INFO: plan.digest}
            try:
                rows = None
                if len(known.verdicts) < total or widens(base, schema):
                    rows = self._frame(plan.files).mapInArrow(reading.rows(), spark_schema(schema))
                done = commit(table, schema, rows, info)
            except PassFailedError as error:
                progress(Progress("read", f"Spark looks through {total} files for what stopped it", 0, total))
                if not self._learn(table.name, reading, plan.files, known):
                    raise error.cause from error
                continue
            return done
        raise AssertionError

    def _frame(self, files: Sequence[FileEntry]) -> DataFrame:
        """The plan in parts, one row for a task."""
        spark = self._session()
        return spark.createDataFrame(dealt(files, parallelism(spark)))

    def _learn(self, name: TableName, reading: Pass, files: Sequence[FileEntry], known: Attempt) -> bool:
        """Look through all files; whether that brought anything that the pass did not know."""
        try:
            with spark_errors(name):
                found = self._frame(files).mapInArrow(reading.looks(), spark_schema(LOOK_SCHEMA)).toArrow()
        except PassFailedError as error:
            raise error.cause from error
        looks: dict[str, Look] = {look.path: look for look in map(pickle.loads, found.column(0).to_pylist())}
        before = (len(known.verdicts), len(known.new_fields))
        # In the plan's order: of two types of a column, the first file's decides.
        for file in files:
            look = looks[file.path]
            for columns in look.columns:
                try:
                    schema = evolved(reading.table, known.new_fields)
                    known.new_fields += resolve(reading.stream, schema, columns, file.path)
                except SchemaError:
                    # A file that changed meanwhile may have shown columns that it does not have.
                    if look.verdict is None:
                        raise
                    break
            if look.verdict is not None:
                known.verdicts[file.path] = look.verdict
        return (len(known.verdicts), len(known.new_fields)) != before


def _result(plan: Plan, attempt: str, base: pa.Schema, schema: pa.Schema, known: Attempt) -> Result:
    files = (known.verdicts.get(file.path) or FileResult(file.path, "INGESTED", None, UNCOUNTED) for file in plan.files)
    types = tuple((field.name, delta_type(field.type)) for field in schema)
    return Result(plan.batch_id, attempt, tuple(files), changes(base, schema), types)
