"""Tables and an engine in memory.

Belongs here: the lakehouse protocol over Python objects, with Delta's promises (snapshots, conflicts, one commit),
and builders.
Does not belong here: any rule of loading; `MemoryEngine` runs the embedded engine's own code.
"""

from __future__ import annotations

import gzip
import io
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from telematics_assets.catalog import (
    BATCH_ID,
    SOURCE_FILE,
    SOURCE_FILE_MODIFIED_AT,
    Names,
    ReplicatedTable,
    TableName,
)
from telematics_assets.engines.base import (
    ProgressListener,
    Reconciliation,
    RepeatedKeys,
    ReplicateReport,
    ReplicateRequest,
    SourceDrift,
    SourcePosition,
    SourceStatus,
)
from telematics_assets.engines.embedded import EmbeddedEngine
from telematics_assets.errors import CommitConflictError
from telematics_assets.lakehouse.base import REWRITTEN_INFO, Commit, Merged
from telematics_assets.lakehouse.counts import brought
from telematics_assets.microbatch.connection import Supabase
from telematics_assets.testing.source import MemorySource
from telematics_assets.volumes.memory import MemoryVolume


@dataclass
class _Store:
    """The shared state behind all handles on one table."""

    id: str
    comment: str
    schemas: list[pa.Schema]
    properties: list[dict[str, str]]
    commits: list[Commit]
    parts: list[pa.Table | None] = field(default_factory=list)
    overwrites: list[int] = field(default_factory=list)


class MemoryTable:
    """One open handle on a table in memory: a snapshot, as Delta's is."""

    def __init__(self, name: TableName, store: _Store, lock: threading.Lock) -> None:
        """Open the newest version."""
        self._name = name
        self._store = store
        self._lock = lock
        self._version = len(store.commits) - 1

    @property
    def name(self) -> TableName:
        """Full name."""
        return self._name

    @property
    def uri(self) -> str:
        """`memory:` and the name."""
        return f"memory:{self._name}"

    @property
    def id(self) -> str:
        """Identity."""
        return self._store.id

    @property
    def version(self) -> int:
        """Version of this snapshot."""
        return self._version

    @property
    def schema(self) -> pa.Schema:
        """Columns."""
        return self._store.schemas[self._version]

    @property
    def comment(self) -> str | None:
        """The table's comment."""
        return self._store.comment

    @property
    def properties(self) -> Mapping[str, str]:
        """Table properties."""
        return self._store.properties[self._version]

    def position(self, app_id: str) -> int | None:
        """See `Table.position`."""
        found = [c.transactions[app_id] for c in self._store.commits[: self._version + 1] if app_id in c.transactions]
        return found[-1] if found else None

    def commits(self, after: int, *, held: bool = False) -> Sequence[Commit]:
        """See `Table.commits`."""
        return self._store.commits[after + 1 : self._version + 1]

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
        part = pa.Table.from_batches(batches, schema)
        with self._lock:
            since = self._store.commits[self._version + 1 :]
            taken = any(app_id in c.transactions or c.removes_data for c in since)
            if taken or self._store.schemas[-1] != self.schema:
                raise CommitConflictError(f"Another writer committed to {self._name} first; run again.")
            number = len(self._store.commits)
            rows = part.num_rows
            positions = {app_id: version, **(also or {})}
            commit = Commit(number, "WRITE", dict(info), positions, rows, int(rows > 0), part.nbytes)
            self._add(commit, part, schema=schema)
            self._version = number
        return commit

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
        names = rows.schema.names
        schema = pa.schema([*self.schema, *(field for field in rows.schema if field.name not in self.schema.names)])
        compared = [name for name in names if name not in unseen]
        there = {_identity(row, key): row for row in self._rows().to_pylist()}
        taken = [_identity(row, key) for row in gone.to_pylist()]
        deleted = sum(there.pop(each, None) is not None for each in taken)
        inserted = updated = 0
        for row in rows.to_pylist():
            identity = _identity(row, key)
            old = there.get(identity)
            # As text, so that NaN is NaN and 0.0 is not -0.0.
            if old is not None and repr([old.get(name) for name in compared]) == repr([row[n] for n in compared]):
                continue
            inserted, updated = inserted + (old is None), updated + (old is not None)
            there[identity] = row
        after = pa.Table.from_pylist(list(there.values()), schema)
        changes = bool(inserted or updated or deleted)
        commit = self._as_next(schema, after.to_batches(), positions, info, merges=changes)
        return Merged(commit, inserted, updated, deleted)

    def overwrite(
        self,
        schema: pa.Schema,
        batches: Iterable[pa.RecordBatch],
        positions: Mapping[str, int],
        info: Mapping[str, str],
    ) -> Commit:
        """See `Table.overwrite`."""
        return self._as_next(schema, batches, positions, info)

    def widen(
        self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], app_id: str, version: int, info: Mapping[str, str]
    ) -> Commit:
        """See `Table.widen`."""
        # Rows that are there get the newest types when they are read.
        return self._as_next(schema, batches, {app_id: version}, info, rewritten=self.count())

    def _as_next(
        self,
        schema: pa.Schema,
        batches: Iterable[pa.RecordBatch],
        positions: Mapping[str, int],
        info: Mapping[str, str],
        rewritten: int | None = None,
        *,
        merges: bool = True,
    ) -> Commit:
        part = pa.Table.from_batches(batches, schema)
        with self._lock:
            number = self._version + 1
            if len(self._store.commits) != number:
                raise CommitConflictError(f"Another writer committed to {self._name} first; run again.")
            removes = self.count() > 0 and merges
            if rewritten is None:
                self._store.overwrites.append(number)
            else:
                info = {**info, REWRITTEN_INFO: str(rewritten)}
            rows = part.num_rows
            commit = Commit(
                number, "WRITE", dict(info), dict(positions), rows, int(rows > 0), part.nbytes, removes, rewritten
            )
            self._add(commit, part, schema=schema)
            self._version = number
        return commit

    def set_property(self, key: str, value: str) -> None:
        """See `Table.set_property`."""
        with self._lock:
            commit = Commit(len(self._store.commits), "SET TBLPROPERTIES")
            self._add(commit, None, properties={**self._store.properties[-1], key: value})
            self._version = commit.version

    def delete_all(self) -> None:
        """Remove all rows the way somebody else would (`DELETE FROM`)."""
        with self._lock:
            commit = Commit(len(self._store.commits), "DELETE", removes_data=True)
            self._store.parts[:] = [None] * len(self._store.parts)
            self._add(commit, None)
            self._version = commit.version

    def sources(self) -> pa.Table:
        """See `Table.sources`."""
        by_file = pl.DataFrame(self._rows()).group_by(SOURCE_FILE)
        frame = by_file.agg(
            pl.col(SOURCE_FILE_MODIFIED_AT).max(), pl.len().cast(pl.Int64).alias("rows"), pl.col(BATCH_ID).max()
        )
        return frame.to_arrow(compat_level=pl.CompatLevel.oldest())

    def brought(self, batch_id: int, marks: Sequence[str]) -> pa.Table:
        """See `Table.brought`."""
        rows = pl.DataFrame(self._rows()).lazy().filter(pl.col(BATCH_ID) == batch_id)
        return brought(rows, self.schema.names, marks).collect().to_arrow(compat_level=pl.CompatLevel.oldest())

    def make_durable(self, commit: Commit) -> None:
        """Nothing to do: memory is as durable as it gets."""

    def compact(self) -> bool:
        """See `Table.compact`. Memory has no files."""
        return False

    def vacuum(self) -> tuple[int, int]:
        """See `Table.vacuum`."""
        return 0, 0

    def trim_log(self) -> int:
        """See `Table.trim_log`."""
        return 0

    def count(self) -> int:
        """See `Table.count`."""
        return sum(part.num_rows for part in self._parts())

    def size(self) -> tuple[int, int]:
        """See `Table.size`."""
        parts = [part for part in self._parts() if part.num_rows]
        return len(parts), sum(part.nbytes for part in parts)

    def read(
        self, columns: Sequence[str] | None = None, limit: int | None = None, since_batch: int | None = None
    ) -> pa.Table:
        """See `Table.read`."""
        rows = self._rows()
        if since_batch is not None:
            rows = rows.filter(pc.greater_equal(rows[BATCH_ID], since_batch))
        if limit is not None:
            rows = rows.slice(0, limit)
        names = rows.schema.names
        return rows.select(names if columns is None else [name for name in columns if name in names])

    def stream(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """See `Table.stream`."""
        yield self._rows().select(list(columns))

    def out_of_range(
        self, column: str, minimum: float | None, maximum: float | None, since_batch: int
    ) -> tuple[int, int, str | None]:
        """See `Table.out_of_range`."""
        values = pl.DataFrame(self.read([column], since_batch=since_batch)).to_series().drop_nulls()
        numbers = values.cast(pl.Float64, strict=False)
        inside = numbers.is_not_null() & numbers.is_not_nan()
        if minimum is not None:
            inside &= (numbers >= minimum).fill_null(False)
        if maximum is not None:
            inside &= (numbers <= maximum).fill_null(False)
        bad = values.filter(~inside)
        return len(values), len(bad), None if bad.is_empty() else str(bad[0])

    def _add(
        self,
        commit: Commit,
        part: pa.Table | None,
        schema: pa.Schema | None = None,
        properties: dict[str, str] | None = None,
    ) -> None:
        self._store.schemas.append(self._store.schemas[-1] if schema is None else schema)
        self._store.properties.append(self._store.properties[-1] if properties is None else properties)
        self._store.parts.append(part)
        self._store.commits.append(commit)

    def _parts(self) -> list[pa.Table]:
        first = max((version for version in self._store.overwrites if version <= self._version), default=0)
        return [part for part in self._store.parts[first : self._version + 1] if part is not None]

    def _rows(self) -> pa.Table:
        newest_first = [part.cast(_narrowed(self.schema, part)) for part in reversed(self._parts())]
        if not newest_first:
            return self.schema.empty_table()
        widened = pa.concat_tables(newest_first, promote_options="default")
        return widened.select(self.schema.names).cast(self.schema)


class MemoryLakehouse:
    """All tables, in memory. Safe to use from several threads."""

    uri = "memory:"

    def __init__(self) -> None:
        """Make an empty lakehouse."""
        self._stores: dict[TableName, _Store] = {}
        self._lock = threading.Lock()

    def tables(self, catalog: str, schema: str) -> Sequence[TableName]:
        """See `Lakehouse.tables`."""
        return sorted(name for name in self._stores if (name.catalog, name.schema) == (catalog, schema))

    def open(self, name: TableName) -> MemoryTable | None:
        """See `Lakehouse.open`."""
        store = self._stores.get(name)
        return None if store is None else MemoryTable(name, store, self._lock)

    def drop(self, name: TableName) -> None:
        """See `Lakehouse.drop`."""
        self._stores.pop(name, None)

    def create(self, name: TableName, schema: pa.Schema, comment: str, properties: Mapping[str, str]) -> MemoryTable:
        """See `Lakehouse.create`."""
        fresh = _Store(uuid.uuid4().hex, comment, [schema], [dict(properties)], [Commit(0, "CREATE TABLE")], [None])
        return MemoryTable(name, self._stores.setdefault(name, fresh), self._lock)


class MemoryEngine(EmbeddedEngine):
    """The embedded engine over a Volume and tables in memory.

    Attributes:
        volume: Its `MemoryVolume`; `volume.put(path, data)` lands a file.
        lakehouse: Its `MemoryLakehouse`.
        source: Its `MemorySource`; `source.put("public.policies", rows)` makes a table to replicate. None unless given.
    """

    def __init__(
        self,
        names: Names | None = None,
        *,
        settle_seconds: float = 0.0,
        incomplete_seconds: float = 0.0,
        on_step: Callable[[str], None] | None = None,
        clock: Callable[[], int] = time.time_ns,
        supabase: Supabase | None = None,
        source: MemorySource | None = None,
    ) -> None:
        """Make an empty engine; files are taken at once, complete or not, unless the seconds say otherwise."""
        self.source = source
        names = names or Names()
        self.lakehouse = MemoryLakehouse()
        self._memory = MemoryVolume(names.volume_location)
        super().__init__(
            self._memory,
            self.lakehouse,
            names,
            settle_seconds=settle_seconds,
            incomplete_seconds=incomplete_seconds,
            on_step=on_step,
            clock=clock,
            supabase=supabase,
        )

    @property
    def volume(self) -> MemoryVolume:
        """The landing Volume."""
        return self._memory

    def source_status(self) -> SourceStatus:
        """See `Engine.source_status`."""
        return super().source_status() if self.source is None else self.source.status

    def source_positions(self, tables: Sequence[ReplicatedTable]) -> Sequence[SourcePosition]:
        """See `Engine.source_positions`."""
        if self.source is None:
            return super().source_positions(tables)
        return self.source.positions(tables, self.names, self.lakehouse)

    def source_drift(self, tables: Sequence[ReplicatedTable]) -> Sequence[SourceDrift]:
        """See `Engine.source_drift`."""
        return super().source_drift(tables) if self.source is None else self.source.drift(tables)

    def replicate(
        self, table: ReplicatedTable, request: ReplicateRequest | None = None, progress: ProgressListener | None = None
    ) -> ReplicateReport:
        """See `Engine.replicate`."""
        if self.source is None:
            return super().replicate(table, request, progress)
        return self.source.replicate(table, request or ReplicateRequest(), self.names, self.lakehouse)

    def reconcile(self, table: ReplicatedTable) -> Reconciliation:
        """See `Engine.reconcile`."""
        if self.source is None:
            return super().reconcile(table)
        return self.source.reconcile(table, self._table(self.names.bronze(table.target)))

    def repeated_keys(self, table: ReplicatedTable) -> RepeatedKeys | None:
        """See `Engine.repeated_keys`."""
        if self.source is None:
            return super().repeated_keys(table)
        bronze = self.lakehouse.open(self.names.bronze(table.target))
        return None if bronze is None else self.source.repeated_keys(table, bronze)


def parquet_bytes(columns: Mapping[str, Any] | pa.Table) -> bytes:
    """A Parquet file's content from columns.

    Args:
        columns: Column name to values, or an Arrow table.
    """
    buffer = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(dict(columns)), buffer)
    return buffer.getvalue()


def json_bytes(records: Iterable[Mapping[str, Any] | str | bytes], *, compressed: bool = False) -> bytes:
    """A file of one JSON object per line.

    Args:
        records: Objects, or lines as they shall stand in the file.
        compressed: Whether to gzip it.
    """
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in records]
    data = b"".join(line + b"\n" for line in lines)
    return gzip.compress(data, mtime=0) if compressed else data


def _identity(row: Mapping[str, Any], key: Sequence[str]) -> tuple[Any, ...]:
    # In Python no NaN equals another one; in tables, as in PostgreSQL, all are one key.
    return tuple("NaN" if row[name] != row[name] else row[name] for name in key)


def _narrowed(schema: pa.Schema, part: pa.Table) -> pa.Schema:
    return pa.schema([schema.field(name) for name in part.schema.names])
