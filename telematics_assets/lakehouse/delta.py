"""Delta tables in local folders and object stores: read by delta-rs, written by ourselves.

Belongs here: opening, creating, appending, reading the log, durability, and who may commit behind whom.
Does not belong here: data files (`data_files.py`), the actions of an entry (`log.py`), the place itself (`stores.py`),
what the rows mean, checkpoints, Dagster.

Not by delta-rs' writer: it gathers rows by their number and holds whole files, which took gibibytes of long records.
A commit is the log entry behind the snapshot that the handle has read, or behind entries of others that were looked at
one by one: an append goes behind appends of other applications, an overwrite behind nothing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import ColumnProperties, CommitProperties, DeltaTable, Transaction, WriterProperties
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from telematics_assets.catalog import BATCH_ID, SOURCE_FILE, SOURCE_FILE_MODIFIED_AT, TableName, is_name
from telematics_assets.errors import (
    BasisMovedError,
    CommitConflictError,
    SchemaError,
    TableError,
    TableMovedError,
    TableUnsupportedError,
    VolumeUnavailableError,
)
from telematics_assets.lakehouse import log, merging, upkeep
from telematics_assets.lakehouse.base import POSITIONS_INFO, REWRITTEN_INFO, Commit, Merged
from telematics_assets.lakehouse.counts import brought
from telematics_assets.lakehouse.data_files import (
    DICTIONARY_BYTES,
    GROUP_ROWS,
    GROUP_VALUES,
    PLAIN_COLUMNS,
    write_data_files,
)
from telematics_assets.lakehouse.rewriting import Rewriting
from telematics_assets.lakehouse.statistics import listed_columns
from telematics_assets.lakehouse.stores import LocalStore, ObjectTableStore, TableStore
from telematics_assets.lakehouse.types import STATISTICS_PROPERTY, has_true_statistics, storable, wider
from telematics_assets.volumes.local import sync_folder, translate

#: Size at which a new data file of the same commit is begun.
TARGET_FILE_BYTES = 128 << 20
#: A log checkpoint is written at every so many versions, unless the table's property says otherwise.
CHECKPOINT_INTERVAL = 100
#: How many versions of other writers an append may find before it gives up.
_COMMIT_TRIES = 100
#: How many entries of the log are looked through for a position before delta-rs is asked.
_NEWEST_ENTRIES = 4

_OWN_KEYS = {
    "timestamp",
    "operation",
    "operationParameters",
    "operationMetrics",
    "readVersion",
    "isBlindAppend",
    "engineInfo",
    "clientVersion",
}


class DeltaLakehouse:
    """Delta tables below one place, at `<root>/<catalog>/<schema>/<table>`."""

    def __init__(self, root: Path | str) -> None:
        """Use a place; nothing is written yet.

        Args:
            root: A local folder as a `Path`, an object store as its URL (see `volumes.objects.open_store`).
        """
        self._store: TableStore = LocalStore(root) if isinstance(root, Path) else ObjectTableStore(root)

    @property
    def uri(self) -> str:
        """The folder's absolute path, or the URL."""
        return self._store.uri

    def tables(self, catalog: str, schema: str) -> Sequence[TableName]:
        """See `Lakehouse.tables`."""
        return [TableName(catalog, schema, name) for name in self._store.names(f"{catalog}/{schema}") if is_name(name)]

    def open(self, name: TableName) -> DeltaLakeTable | None:
        """See `Lakehouse.open`."""
        path = self._store.at(name.location)
        if self._store.is_empty(path):
            return None
        try:
            return self._table(name, path, DeltaTable(path, storage_options=self._store.options))
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            if explained := self._store.explain(error, path):
                raise explained from error
            if isinstance(error, OSError):
                raise translate(error, path) from error
            raise TableError(
                f"{name} at {path} can't be opened: {_line(error)}. Restore its _delta_log, move the folder away, "
                "or drop it for good with its stream's `telematics reset STREAM --drop-table`."
            ) from error

    def drop(self, name: TableName) -> None:
        """See `Lakehouse.drop`."""
        self._store.drop(self._store.at(name.location))

    def create(self, name: TableName, schema: pa.Schema, comment: str, properties: Mapping[str, str]) -> DeltaLakeTable:
        """See `Lakehouse.create`."""
        path = self._store.at(name.location)
        try:
            self._store.make_room(path)
            handle = DeltaTable.create(
                path,
                schema,
                mode="error",
                name=name.table,
                description=comment,
                configuration=dict(properties),
                raise_if_key_not_exists=False,
                # With retries, the one that comes second commits its own identity as version 1.
                commit_properties=CommitProperties(max_commit_retries=0),
                storage_options=self._store.options,
            )
        except OSError as error:
            raise self._store.explain(error, path) or translate(error, path) from error
        except DeltaError as error:
            table = self.open(name)
            if table is None:
                failed = TableError(f"{name} can't be created at {path}: {_line(error)}.")
                raise self._store.explain(error, path) or failed from error
            return table
        table = self._table(name, path, handle)
        table.make_durable(Commit(0, "CREATE TABLE"))
        if not self._store.durable:
            top = os.path.dirname(self.uri)
            while path != top:
                path = os.path.dirname(path)
                sync_folder(path)
        return table

    def _table(self, name: TableName, path: str, handle: DeltaTable) -> DeltaLakeTable:
        """The handle that this kind of lakehouse gives."""
        return DeltaLakeTable(name, path, handle, self._store)


class DeltaLakeTable:
    """One open handle on a Delta table. See `lakehouse.base.Table`."""

    def __init__(self, name: TableName, path: str, handle: DeltaTable, store: TableStore) -> None:
        self._name = name
        self._path = path
        self._handle = handle
        self._store = store
        #: Positions that the newest entries of a version's log say.
        self._newest: Mapping[str, int] = {}
        self._newest_of = -1

    @property
    def name(self) -> TableName:
        """Full name."""
        return self._name

    @property
    def uri(self) -> str:
        """The table's folder or URL."""
        return self._path

    @property
    def id(self) -> str:
        """The Delta table id."""
        return str(self._handle.metadata().id)

    @property
    def version(self) -> int:
        """Delta version of this snapshot."""
        return self._handle.version()

    @property
    def schema(self) -> pa.Schema:
        """Columns with their comments."""
        return pa.schema(self._handle.schema())

    @property
    def comment(self) -> str | None:
        """The table's comment."""
        return self._handle.metadata().description

    @property
    def properties(self) -> Mapping[str, str]:
        """Table properties."""
        return {key: value for key, value in self._handle.metadata().configuration.items() if value is not None}

    def position(self, app_id: str) -> int | None:
        """See `Table.position`.

        delta-rs goes through the whole log for each application. Mostly one of the newest entries says it; entries
        never change, and the newest that says something is what counts.
        """
        version = self.version
        if self._newest_of != version:
            self._newest, self._newest_of = self._newest_positions(version), version
        if (position := self._newest.get(app_id)) is not None:
            return position
        with self._asking():
            return self._handle.transaction_version(app_id)

    def _newest_positions(self, version: int) -> Mapping[str, int]:
        """What the newest entries say of positions: back to one that says something, if that is not far."""
        for each in range(version, max(version - _NEWEST_ENTRIES, -1), -1):
            try:
                if found := self._commit(each).transactions:
                    return found
            except TableMovedError:
                # The entry has expired: a checkpoint stands for it.
                break
        return {}

    def commits(self, after: int, *, held: bool = False) -> Sequence[Commit]:
        """See `Table.commits`."""
        found: list[Commit] = []
        # Newest first: expired entries go from the other end.
        for version in range(self.version, after, -1):
            try:
                found.append(self._commit(version))
            except TableMovedError:
                if held:
                    break
                raise
        return found[::-1]

    def append(
        self,
        schema: pa.Schema,
        batches: Iterable[pa.RecordBatch],
        app_id: str,
        version: int,
        info: Mapping[str, str],
        also: Mapping[str, int] | None = None,
    ) -> Commit:
        """See `Table.append`."""
        self._refuse_casts(self.schema, schema)
        if not set(schema.names) <= set(self.schema.names):
            # The property may name a column that was dropped and comes back with another type.
            self._keep_statistics_true(schema)
        return self._write(schema, batches, {app_id: version, **(also or {})}, info, overwrite=False)

    def merge(
        self,
        rows: pa.Table,
        gone: pa.Table,
        key: Sequence[str],
        positions: Mapping[str, int],
        info: Mapping[str, str],
        unseen: Sequence[str] = (),
    ) -> Merged:
        """See `Table.merge`."""
        mine = self.schema
        self._refuse_casts(mine, rows.schema)
        self._refuse_casts(mine, gone.schema)
        before = self.version
        if not set(rows.schema.names) <= set(mine.names) and self._keep_statistics_true(rows.schema):
            before = self.version
        if not rows.num_rows and not gone.num_rows:
            return Merged(self._positioned(rows.schema, positions, info), 0, 0, 0)
        changes = merging.Changes(rows, gone, tuple(key), tuple(unseen))
        adds = pa.table(self._handle.get_add_actions(flatten=True))
        ranges = None
        rewrites = merging.are_long(rows) or merging.has_long_rows(adds) or len(mine) > merging.WIDE_COLUMNS
        rewrites = rewrites or self._lacks_feature(rows.schema)
        if rewrites or sum(adds["size_bytes"].to_pylist()) > merging.HELD_BYTES:
            found = self._found(changes)
            spread = merging.spread(found, changes, adds)
            ranges = spread.ranges
            if rewrites or spread.held > merging.HELD_BYTES:
                return self._rewritten(changes, merging.touched(found, adds), positions, info)
        with self._merging():
            metrics = merging.merge(
                self._handle, changes, mine, _as_next(positions, info), _writer_properties(len(mine)), ranges
            )
        counts = [int(metrics[f"num_target_rows_{what}"]) for what in ("inserted", "updated", "deleted")]
        if self.version == before:
            # Where nothing changes, delta-rs commits nothing, positions neither.
            return Merged(self._positioned(rows.schema, positions, info), 0, 0, 0)
        return Merged(self._verified(positions, before), *counts)

    def _lacks_feature(self, schema: pa.Schema) -> bool:
        """Whether columns to add need a feature of the table that others want to be allowed by hand first."""
        if set(schema.names) <= set(self.schema.names):
            return False
        return any("protocol" in action for action in log.schema_change(self._handle, schema, replace=False))

    def _found(self, changes: merging.Changes) -> pl.DataFrame:
        with self._asking():
            rows = self._store.scan(self._handle, self._path, merging.FILE)
            return self._store.collect(merging.find(rows, changes))

    def _rewritten(
        self,
        changes: merging.Changes,
        files: Sequence[Mapping[str, Any]],
        positions: Mapping[str, int],
        info: Mapping[str, str],
    ) -> Merged:
        """The merge by ourselves: files with changed rows are written anew."""
        log.refuse_features(self._handle, self._name, replaces=True)
        log.refuse_what_rows_must_obey(self._handle, self._name, replaces=False)
        mine = self.schema
        schema = pa.schema([*mine, *(_stored(changes.rows.schema.field(name)) for name in changes.added(mine))])
        feed = self.properties.get("delta.enableChangeDataFeed", "").lower() == "true"

        def read(file: Mapping[str, Any]) -> Iterator[pa.RecordBatch]:
            return upkeep.file_rows(self._name, self._path, self._store, file, schema)

        with self._writing(()):
            rewriting = Rewriting(changes, mine, schema)
            removed = rewriting.look(files, read)
            inserted = rewriting.inserted.num_rows
            if not removed and not inserted:
                return Merged(self._positioned(changes.rows.schema, positions, info), 0, 0, 0)
            if removed:
                self._refuse_removals()
            self._refuse_missing(schema, rewriting.rows)
            listed = listed_columns(schema, self.properties)
            adds, fed = rewriting.write(self._store, self._path, read, listed, TARGET_FILE_BYTES, feed=feed)
            now = time.time_ns() // 1_000_000
            told = log.commit_info("MERGE", self.version, now, operationParameters={}, isBlindAppend=False, **info)
            actions = [told, *log.schema_change(self._handle, schema, replace=False)]
            actions += log.removals(removed, now, data_change=True)
            actions += [{"add": add} for add in adds] + [{"cdc": file} for file in fed]
            actions += log.transactions(positions)
            log.require(self._store, self._handle, self._name, self._path)
            if not log.publish(self._store, self._path, self.version + 1, actions):
                raise _conflict(self._name, f"version {self.version + 1} is theirs")
            before = self.version
            self._advance(before + 1)
        return Merged(self._verified(positions, before), inserted, rewriting.updated, rewriting.deleted)

    def _verified(self, positions: Mapping[str, int], before: int) -> Commit:
        commit = self._commit(self.version)
        if commit.transactions != positions or self.version != before + 1:
            raise TableError(
                f"{self._name} version {self.version} is not the merge that was just made: {commit.transactions} "
                f"instead of {dict(positions)}. Keep the table and its _delta_log as they are and report this."
            )
        return commit

    def _positioned(self, schema: pa.Schema, positions: Mapping[str, int], info: Mapping[str, str]) -> Commit:
        return self._write(schema, (), positions, info, overwrite=False, as_next=True)

    @contextmanager
    def _merging(self) -> Iterator[None]:
        try:
            yield
        except CommitFailedError as error:
            if "append-only" in str(error):
                raise TableUnsupportedError(
                    f"{self._name} has the property delta.appendOnly, so its rows can't be replaced. Set it to false."
                ) from error
            raise _conflict(self._name, _line(error)) from error
        except (DeltaError, OSError) as error:
            raise self._store.explain(error, self._path) or _write_error(self._name, error) from error

    def overwrite(
        self,
        schema: pa.Schema,
        batches: Iterable[pa.RecordBatch],
        positions: Mapping[str, int],
        info: Mapping[str, str],
    ) -> Commit:
        """See `Table.overwrite`."""
        self._refuse_casts(pa.schema([]), schema)
        if self._keep_statistics_true(schema):
            raise BasisMovedError(
                f"{self._name} had to lose statistics that its new types would make false, so it is at version "
                f"{self.version} now. Its rows are as they were; run again."
            )
        return self._write(schema, batches, positions, info, overwrite=True)

    def widen(
        self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], app_id: str, version: int, info: Mapping[str, str]
    ) -> Commit:
        """See `Table.widen`."""
        self._refuse_widening()
        # delta-rs has no type widening, which would leave old files as they are; other readers have none either.
        self._refuse_casts(self.schema, schema, widened=True)
        self._keep_statistics_true(schema)
        here = self.count()
        with self._asking():
            rows = self._store.scan(self._handle, self._path)
        info = {**info, REWRITTEN_INFO: str(here)}
        anew = self._anew(rows, schema, here)
        return self._write(schema, batches, {app_id: version}, info, anew, overwrite=True)

    def _keep_statistics_true(self, schema: pa.Schema, *, there: bool = False) -> bool:
        """Take columns out of the property for statistics whose statistics would be false; say if there were any.

        An overwrite can't change properties, so it is a commit before it; a crash in between leaves a table that only
        has fewer statistics. Writing none is not enough: deltalake's Arrow dataset skips files whose named columns have
        no bounds.

        Args:
            schema: Columns of the rows that come.
            there: Whether columns that it lacks are taken out, too: Spark writes no table whose property names one.
        """
        named = self.properties.get(STATISTICS_PROPERTY, "").split(",")
        false = {field.name for field in schema if not has_true_statistics(field)}
        if there:
            false |= self._lost_statistics(schema)
        kept = [name for name in named if name not in false]
        if len(kept) == len(named):
            return False
        before = self.version
        self.set_property(STATISTICS_PROPERTY, ",".join(kept))
        if self.version != before + 1:
            raise CommitConflictError(
                f"Another writer committed to {self._name} version {before + 1} first, which is not verified yet. "
                "No rows were changed; run again."
            )
        return True

    def _lost_statistics(self, schema: pa.Schema) -> set[str]:
        """Names in the property for statistics that no column has."""
        names = set(schema.names)
        named = self.properties.get(STATISTICS_PROPERTY, "").split(",")
        return {name for name in named if name and name.strip().partition(".")[0].strip("`") not in names}

    def _anew(self, rows: pl.LazyFrame, schema: pa.Schema, expected: int) -> Iterator[pa.RecordBatch]:
        """The rows that are there, in the schema's types; every cast is exact or fails."""
        mine = self.schema
        there = set(mine.names)
        before = pa.schema([mine.field(field.name) for field in schema if field.name in there])
        count = 0
        for part in self._store.stream(rows.select(before.names)):
            table = part.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(before)
            count += table.num_rows
            columns = [table[f.name].cast(f.type) if f.name in there else pa.nulls(len(table), f.type) for f in schema]
            yield from pa.table(columns, schema=schema).to_batches()
        if count != expected:
            raise TableError(
                f"{self._name} has {expected} rows by its log, but {count} were read to write them anew. Nothing was "
                "changed. Keep the table as it is and report this."
            )

    def _write(
        self,
        schema: pa.Schema,
        batches: Iterable[pa.RecordBatch],
        positions: Mapping[str, int],
        info: Mapping[str, str],
        anew: Iterable[pa.RecordBatch] = (),
        *,
        overwrite: bool,
        as_next: bool = False,
    ) -> Commit:
        log.refuse_features(self._handle, self._name, replaces=overwrite)
        log.refuse_what_rows_must_obey(self._handle, self._name, replaces=overwrite)
        if overwrite:
            self._refuse_removals()
        mine = pa.schema([]) if overwrite else self.schema
        there = set(mine.names)
        stored = pa.schema([mine.field(f.name) if f.name in there else _stored(f) for f in schema])
        rows = 0
        of_the_rows: list[OSError] = []

        def checked() -> Iterator[pa.RecordBatch]:
            nonlocal rows
            try:
                for batch in batches:
                    self._refuse_missing(stored, batch)
                    rows += batch.num_rows
                    yield batch
                yield from anew
            except OSError as error:
                of_the_rows.append(error)
                raise

        with self._writing(of_the_rows):
            # Also of columns that these rows lack: readers take a bound that is missing for one that nothing fulfils.
            whole = pa.schema([*mine, *(field for field in stored if field.name not in mine.names)])
            listed = listed_columns(whole, self.properties)
            adds = write_data_files(self._store, self._path, stored, checked(), listed, TARGET_FILE_BYTES)
            version = self._commit_files(
                stored, adds, positions, info, overwrite=overwrite, as_next=overwrite or as_next
            )
            self._advance(version)
        commit = self._commit(version)
        if commit.rows != rows or commit.transactions != positions:
            raise TableError(
                f"{self._name} version {commit.version} holds {commit.rows} rows of {rows} that were written. "
                "Keep the table and its _delta_log as they are and report this."
            )
        return commit

    def _advance(self, version: int) -> None:
        """Let the handle be the snapshot of a version that was just committed."""
        self._handle.update_incremental()
        if self.version != version:
            # Another writer was behind it already; this handle is the snapshot of its own commit.
            self._handle.load_as_version(version)
        if (version + 1) % self._checkpoint_interval() == 0:
            self._create_checkpoint()
            if self.properties.get("delta.enableExpiredLogCleanup", "").lower() != "false":
                self._handle.cleanup_metadata()

    def _refuse_missing(self, stored: pa.Schema, rows: pa.RecordBatch | pa.Table) -> None:
        for field, column in zip(stored, rows.columns, strict=True):
            if not field.nullable and column.null_count:
                raise TableUnsupportedError(
                    f"Column {field.name!r} of {self._name} is NOT NULL, and there are rows without a value for it. "
                    "Drop that rule: bronze keeps all records."
                )

    @contextmanager
    def _writing(self, passed: Sequence[OSError]) -> Iterator[None]:
        """What the place, or delta-rs, has to do with an error; some are none of its business."""
        try:
            yield
        except (DeltaError, OSError) as error:
            if error in passed:
                raise
            raise self._store.explain(error, self._path) or _write_error(self._name, error) from error

    def _refuse_widening(self) -> None:
        if self.properties.get("delta.appendOnly", "").lower() == "true":
            raise TableUnsupportedError(
                f"{self._name} has the property delta.appendOnly, so its rows can't be written anew with wider types. "
                "Unset it, or use schema_evolution_mode='addNewColumns', which rescues what does not fit."
            )

    def _refuse_removals(self) -> None:
        if self.properties.get("delta.appendOnly", "").lower() == "true":
            raise TableUnsupportedError(
                f"{self._name} has the property delta.appendOnly, so its rows can't be replaced. Set it to false."
            )

    def _checkpoint_interval(self) -> int:
        given = self.properties.get("delta.checkpointInterval", "")
        return int(given) if given.isdecimal() and int(given) else CHECKPOINT_INTERVAL

    def _commit_files(
        self,
        schema: pa.Schema,
        adds: Sequence[Mapping[str, Any]],
        positions: Mapping[str, int],
        info: Mapping[str, str],
        *,
        overwrite: bool,
        as_next: bool,
    ) -> int:
        """Bring files into the table by one log entry; which version it is."""
        now = time.time_ns() // 1_000_000
        basis = version = self.version
        told = log.commit_info(
            "WRITE",
            basis,
            now,
            operationParameters={"mode": "Overwrite" if overwrite else "Append", "partitionBy": "[]"},
            isBlindAppend=not overwrite,
            **info,
        )
        actions = [told, *log.schema_change(self._handle, schema, replace=overwrite)]
        if overwrite:
            files = pa.table(self._handle.get_add_actions()).select(["path", "size_bytes"]).to_pylist()
            actions += log.removals(files, now, data_change=True)
        actions += [{"add": add} for add in adds]
        actions += log.transactions(positions)
        log.require(self._store, self._handle, self._name, self._path)
        while not log.publish(self._store, self._path, version + 1, actions):
            version += 1
            if as_next or version - basis > _COMMIT_TRIES:
                raise _conflict(self._name, f"version {version} is theirs")
            self._refuse_overtaken(version, positions)
        return version + 1

    def _refuse_overtaken(self, version: int, positions: Mapping[str, int]) -> None:
        """Raise if another writer's version leaves no room for an append behind it."""
        theirs = self._commit(version)
        changed = [key for action in self._actions(version) for key in ("metaData", "protocol") if key in action]
        shared = set(theirs.transactions) & set(positions)
        if shared or changed or theirs.removes_data:
            what = "the same application" if shared else "a change of the table" if changed else "a removal of rows"
            raise _conflict(self._name, f"version {version} is {what}")

    def set_property(self, key: str, value: str) -> None:
        """See `Table.set_property`."""
        if key == STATISTICS_PROPERTY or not key.startswith("delta."):
            self._set_plain_property(key, value)
            return
        try:
            # Others may need a feature of the table, which delta-rs knows.
            self._handle.alter.set_table_properties({key: value}, raise_if_not_exists=False)
        except CommitFailedError as error:
            raise _conflict(self._name, _line(error)) from error
        except (DeltaError, OSError) as error:
            raise self._store.explain(error, self._path) or _write_error(self._name, error) from error
        # A log entry on disk behind one that is not would be a table that nobody can open.
        self.make_durable(Commit(self.version, "SET TBLPROPERTIES"))

    def _set_plain_property(self, key: str, value: str) -> None:
        """Not by delta-rs: to a table with features it adds the one for variants, which other readers don't have."""
        log.refuse_features(self._handle, self._name, replaces=False)
        version = self.version
        told = log.commit_info(
            "SET TBLPROPERTIES",
            version,
            time.time_ns() // 1_000_000,
            operationParameters={"properties": json.dumps({key: value})},
        )
        with self._writing(()):
            log.require(self._store, self._handle, self._name, self._path)
            actions = [told, log.property_change(self._handle, key, value)]
            if not log.publish(self._store, self._path, version + 1, actions):
                raise _conflict(self._name, f"version {version + 1} is theirs")
            self._handle.update_incremental()
            if self.version != version + 1:
                self._handle.load_as_version(version + 1)

    def sources(self) -> pa.Table:
        """See `Table.sources`."""
        with self._asking():
            by_file = self._store.scan(self._handle, self._path).group_by(SOURCE_FILE)
            frame = by_file.agg(
                pl.col(SOURCE_FILE_MODIFIED_AT).max(), pl.len().cast(pl.Int64).alias("rows"), pl.col(BATCH_ID).max()
            )
            return self._store.collect(frame).to_arrow(compat_level=pl.CompatLevel.oldest())

    def brought(self, batch_id: int, marks: Sequence[str]) -> pa.Table:
        """See `Table.brought`."""
        with self._asking():
            # Others may be many, and need not be readable.
            files = self._files_of(batch_id)
            rows = self._store.scan(self._handle, self._path, files=files).filter(pl.col(BATCH_ID) == batch_id)
            counts = brought(rows, self.schema.names, marks)
            return self._store.collect(counts).to_arrow(compat_level=pl.CompatLevel.oldest())

    def _files_of(self, batch_id: int) -> list[str]:
        """Data files that may hold rows of a batch, by their statistics."""
        adds = pa.table(self._handle.get_add_actions(flatten=True))
        least, most = f"min.{BATCH_ID}", f"max.{BATCH_ID}"
        if {least, most} <= set(adds.column_names):
            inside = pc.and_kleene(pc.less_equal(adds[least], batch_id), pc.greater_equal(adds[most], batch_id))
            adds = adds.filter(pc.fill_null(inside, True))
        paths: list[str] = adds["path"].to_pylist()
        return paths

    def make_durable(self, commit: Commit) -> None:
        """See `Table.make_durable`."""
        if self._store.durable:
            return
        try:
            self._sync(commit)
        except OSError as error:
            raise VolumeUnavailableError(
                f"{self._name} version {commit.version} could not be synced to disk: {error}. It is committed; "
                "run again."
            ) from error

    def _sync(self, commit: Commit) -> None:
        folders = {self._path, os.path.join(self._path, "_delta_log")}
        for kind, add in self._adds(commit.version):
            path = os.path.join(self._path, unquote(add["path"]))
            if _sync_file(path) and os.path.getsize(path) == add["size"]:
                folders.add(os.path.dirname(path))
            elif not self._deleted_since(kind, add["path"], commit.version):
                raise TableMovedError(
                    f"{self._name} version {commit.version} names the data file {path}, which is missing or cut short. "
                    "Restore the file, or start the stream anew (telematics reset)."
                )
        _sync_file(self._log_path(commit.version))
        for folder in folders:
            sync_folder(folder)

    def _adds(self, version: int) -> list[tuple[str, dict[str, Any]]]:
        return [(kind, action[kind]) for action in self._actions(version) for kind in ("add", "cdc") if kind in action]

    def _deleted_since(self, kind: str, path: str, version: int) -> bool:
        """Whether VACUUM may have deleted a file that this version added.

        A data file only after a later version took it out, as compaction does; of a change data file no entry says so.
        """
        later = [action for v in range(version + 1, self.version + 1) for action in self._actions(v)]
        if kind == "cdc":
            return any(action.get("commitInfo", {}).get("operation", "").startswith("VACUUM") for action in later)
        return any(action.get("remove", {}).get("path") == path for action in later)

    def compact(self) -> bool:
        """See `Table.compact`."""
        before = self.version
        with self._keeping():
            upkeep.compact(self._handle, self._name, self._path, self._store, TARGET_FILE_BYTES)
        # A crash must not leave rows in files that are not on disk yet, when VACUUM takes the old ones away.
        for version in range(before + 1, self.version + 1):
            self.make_durable(Commit(version, "OPTIMIZE"))
        return self.version > before

    def vacuum(self) -> tuple[int, int]:
        """See `Table.vacuum`."""
        before = self.version
        with self._keeping():
            removed = upkeep.vacuum(self._handle, self.properties)
        # VACUUM counts the bytes in the log, but only says the names of the files.
        since = [action for version in range(before + 1, self.version + 1) for action in self._actions(version)]
        metrics = [action["commitInfo"].get("operationMetrics", {}) for action in since if "commitInfo" in action]
        return removed, sum(int(metric.get("sizeOfDataToDelete", 0)) for metric in metrics)

    def trim_log(self) -> int:
        """See `Table.trim_log`."""
        with self._keeping():
            self._create_checkpoint()
            before = self._store.log_entries(self._path)
            self._handle.cleanup_metadata()
            return max(before - self._store.log_entries(self._path), 0)

    def _create_checkpoint(self) -> None:
        """Write a checkpoint of the log, safely there before the entries that it stands for may go."""
        self._handle.create_checkpoint()
        if not self._store.durable:
            folder = os.path.join(self._path, "_delta_log")
            for name in (f"{self.version:020d}.checkpoint.parquet", "_last_checkpoint"):
                _sync_file(os.path.join(folder, name))
            sync_folder(folder)

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Maintenance: its conflicts and failures by their names."""
        if "deletionVectors" in (self._handle.protocol().reader_features or ()):
            raise TableUnsupportedError(
                f"{self._name} has deletion vectors, which this engine can't maintain. Drop that table feature, or "
                "maintain it with the engine that made them."
            )
        try:
            yield
        except CommitFailedError as error:
            raise _conflict(self._name, _line(error)) from error
        except (DeltaError, OSError) as error:
            raise self._store.explain(error, self._path) or _write_error(self._name, error) from error

    def count(self) -> int:
        """See `Table.count`."""
        with self._asking():
            return int(self._handle.count())

    def size(self) -> tuple[int, int]:
        """See `Table.size`."""
        with self._asking():
            sizes = pa.table(self._handle.get_add_actions(flatten=True)).column("size_bytes")
        return len(sizes), sum(sizes.to_pylist())

    def read(
        self, columns: Sequence[str] | None = None, limit: int | None = None, since_batch: int | None = None
    ) -> pa.Table:
        """See `Table.read`."""
        names = self.schema.names
        there = set(names)
        wanted = names if columns is None else [name for name in columns if name in there]
        with self._asking():
            return self._store.rows(self._handle, self._path, wanted, limit, since_batch)

    def stream(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """See `Table.stream`."""
        mine = self.schema
        wanted = pa.schema([mine.field(name) for name in columns])
        with self._asking():
            adds = pa.table(self._handle.get_add_actions(flatten=True))
            if merging.has_long_rows(adds):
                # Polars holds several row groups for each of its threads: 2 GiB of rows that take 1 MB.
                for file in adds.select(["path"]).to_pylist():
                    for batch in upkeep.file_rows(self._name, self._path, self._store, file, wanted, others=True):
                        yield pa.Table.from_batches([batch])
                return
            rows = self._store.scan(self._handle, self._path).select(wanted.names)
            for part in self._store.stream(rows):
                yield part.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(wanted)

    def out_of_range(
        self, column: str, minimum: float | None, maximum: float | None, since_batch: int
    ) -> tuple[int, int, str | None]:
        """See `Table.out_of_range`."""
        value = pl.col(column)
        number = value.cast(pl.Float64, strict=False)
        outside = number.is_null() | number.is_nan()
        if minimum is not None:
            outside |= number < minimum
        if maximum is not None:
            outside |= number > maximum
        with self._asking():
            scanned = self._store.scan(self._handle, self._path)
            rows = scanned.filter((pl.col(BATCH_ID) >= since_batch) & value.is_not_null())
            result = self._store.collect(
                rows.select(
                    checked=pl.len(),
                    outside=outside.sum(),
                    example=value.filter(outside).first().cast(pl.String),
                )
            )
        checked, count, example = result.row(0)
        return int(checked), int(count or 0), example

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """What a handle does not know yet it reads from the log, and rows from the data files."""
        try:
            yield
        except (DeltaError, OSError, pl.exceptions.PolarsError, pa.ArrowException) as error:
            if explained := self._store.explain(error, self._path):
                raise explained from error
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) and error.errno:
                raise translate(error, self._path) from error
            raise TableError(
                f"{self._name} at {self._path} can't be read: {_line(error)}. Files of it may be missing or damaged: "
                "restore them from a copy, or start the stream anew (telematics reset)."
            ) from error

    def _refuse_casts(self, mine: pa.Schema, schema: pa.Schema, *, widened: bool = False) -> None:
        for field in schema:
            index = mine.get_field_index(field.name)
            stored = mine.field(index).type if index >= 0 else storable(field.type)
            if widened and stored is not None and wider(stored, field.type) == field.type:
                continue
            if stored is None or not _same_storage(field.type, stored):
                raise SchemaError(
                    f"Column {field.name!r} of {self._name} is {stored or 'no type'}, the rows have {field.type}. "
                    "Delta would cast it silently; convert it first or rescue it."
                )

    def _commit(self, version: int) -> Commit:
        operation, info = "", {}
        transactions: dict[str, int] = {}
        rows = files = size = 0
        removes = False
        for action in self._actions(version):
            if "commitInfo" in action:
                entry = action["commitInfo"]
                operation = str(entry.get("operation", ""))
                info = {key: str(value) for key, value in entry.items() if key not in _OWN_KEYS}
                info |= _texts(entry.get("userMetadata"))
            elif "txn" in action:
                transactions[action["txn"]["appId"]] = int(action["txn"]["version"])
            elif "add" in action and action["add"].get("dataChange", True):
                files += 1
                size += int(action["add"]["size"])
                rows += int(json.loads(action["add"].get("stats") or "{}").get("numRecords", 0))
            elif "remove" in action and action["remove"].get("dataChange", True):
                removes = True
        transactions |= _numbers(info.get(POSITIONS_INFO))
        rewritten = int(info[REWRITTEN_INFO]) if info.get(REWRITTEN_INFO, "").isdecimal() else None
        removes = removes or operation.upper() in ("RESTORE", "TRUNCATE")
        return Commit(version, operation, info, transactions, rows - (rewritten or 0), files, size, removes, rewritten)

    def _actions(self, version: int) -> list[dict[str, Any]]:
        path = self._log_path(version)
        try:
            return [json.loads(line) for line in self._store.read_log(path).split(b"\n") if line.strip()]
        except FileNotFoundError:
            raise TableMovedError(
                f"The log of {self._name} no longer holds version {version} ({path}), so it can't be proven "
                "that nobody "
                "changed the rows since. Restore the log entry, or start the stream anew (telematics reset)."
            ) from None
        except OSError as error:
            raise translate(error, path) from error
        except ValueError as error:
            raise TableError(f"The log entry {path} is not readable: {error}. Restore it from a copy.") from error

    def _log_path(self, version: int) -> str:
        return log.entry_path(self._path, version)


def _stored(field: Any) -> Any:
    return field.with_type(storable(field.type))


def _numbers(positions: str | None) -> dict[str, int]:
    return {} if positions is None else {app: int(position) for app, position in json.loads(positions).items()}


def _texts(user_metadata: object) -> dict[str, str]:
    """The texts that a writer put into the one place that Spark has for them; others' remarks are none."""
    try:
        found = json.loads(user_metadata) if isinstance(user_metadata, str) else None
    except ValueError:
        return {}
    return {key: str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _writer_properties(columns: int) -> WriterProperties:
    return WriterProperties(
        compression="SNAPPY",
        max_row_group_size=min(GROUP_ROWS, GROUP_VALUES // max(columns, 1)),
        dictionary_page_size_limit=DICTIONARY_BYTES,
        default_column_properties=(
            ColumnProperties(dictionary_enabled=False, statistics_enabled="CHUNK") if columns > PLAIN_COLUMNS else None
        ),
    )


def _as_next(positions: Mapping[str, int], info: Mapping[str, str]) -> CommitProperties:
    return CommitProperties(
        custom_metadata=dict(info),
        app_transactions=[Transaction(app, position) for app, position in positions.items()],
        # Rows that came in between were not looked at: it is the next version or none.
        max_commit_retries=0,
    )


def _same_storage(given: pa.DataType, stored: pa.DataType) -> bool:
    texts = (pa.string(), pa.large_string(), pa.string_view())
    return given == stored or (given in texts and stored in texts)


def _sync_file(path: str) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return True


def _conflict(name: TableName, what: str) -> CommitConflictError:
    return CommitConflictError(
        f"Another writer committed to {name} first: {what}. Nothing of this commit is in the table; run again."
    )


def _write_error(name: TableName, error: Exception) -> Exception:
    text = _line(error)
    lowered = text.lower()
    if "permission denied" in lowered or "read-only" in lowered:
        return TableError(f"{name} can't be written: {text}. Check the permissions of the loader's user.")
    if "validation check" in lowered:
        return TableUnsupportedError(f"{name} can't be written: {text}. Drop its constraint: bronze keeps all records.")
    if "feature" in lowered or "unsupported" in lowered:
        return TableUnsupportedError(f"{name} can't be written: {text}. Drop the table feature, or use another engine.")
    return VolumeUnavailableError(f"{name} could not be written: {text}. It may go through later.")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
