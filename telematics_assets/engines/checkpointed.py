"""What engines share whose progress is in our checkpoint files: everything but how rows are written.

Belongs here: the answers of the engine protocol, by a Volume, a lakehouse and the loaders over them.
Does not belong here: how rows come into tables (the engines), the protocol of a batch (`autoloader/loader.py`), reading
files (`autoloader/reading.py`), Dagster.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from telematics_assets.autoloader.loader import BatchWriter, StreamLoader
from telematics_assets.autoloader.reading import first_schema
from telematics_assets.catalog import (
    CORRUPT_RECORD,
    Column,
    FileStream,
    Names,
    ReplicatedTable,
    TableName,
)
from telematics_assets.engines.base import (
    BatchBalance,
    ColumnState,
    Duplicates,
    FileRecord,
    FileState,
    Finding,
    IngestReport,
    IngestRequest,
    MaintenanceReport,
    PendingFiles,
    Progress,
    ProgressListener,
    Reconciliation,
    RepeatedKeys,
    ReplicateReport,
    ReplicateRequest,
    SourceDrift,
    SourcePosition,
    SourceStatus,
    TableState,
    Violations,
)
from telematics_assets.errors import (
    MissingExtraError,
    SettingsError,
    TableNotFoundError,
    TelematicsError,
)
from telematics_assets.lakehouse.base import Lakehouse, Table
from telematics_assets.lakehouse.types import STATISTICS_PROPERTY, delta_type, statistics_columns
from telematics_assets.microbatch.connection import NOT_CONFIGURED, Supabase
from telematics_assets.settings import Settings
from telematics_assets.volumes.base import FileEntry, Volume
from telematics_assets.volumes.local import LocalVolume

if TYPE_CHECKING:
    from telematics_assets.microbatch.replicate import Replicator
    from telematics_assets.microbatch.session import Connection

#: Data columns with statistics in the log, as many as Delta's own default: with all, 1,200 columns took 25 s to open.
STATISTICS_COLUMNS = 32


def open_volume(settings: Settings) -> Volume:
    """The landing Volume of a deployment.

    Raises:
        MissingExtraError: If the home is a URL and obstore is not installed.
        VolumeError: If the home is a URL and the environment lacks what its store needs.
    """
    location = settings.names.volume_location
    if isinstance(settings.home, Path):
        return LocalVolume(settings.home / location.lstrip("/"), location)
    from telematics_assets.volumes.objects import ObjectVolume

    return ObjectVolume(f"{settings.home}{location}", location)


def tables_root(settings: Settings) -> Path | str:
    """Where a deployment's tables are: a folder, or the URL of one in an object store."""
    return settings.home / "tables" if isinstance(settings.home, Path) else f"{settings.home}/tables"


def options_of(settings: Settings) -> dict[str, Any]:
    """What `CheckpointEngine` takes from a deployment beyond its Volume, tables and names."""
    return {
        "settle_seconds": settings.settle_seconds,
        "incomplete_seconds": settings.incomplete_seconds,
        "supabase": settings.supabase,
        "supabase_problem": settings.supabase_problem,
        "hash_key": settings.hash_key,
    }


class CheckpointEngine(ABC):
    """Executes the engine protocol over a Volume and a lakehouse. See `engines.base.Engine`."""

    name: str

    def __init__(
        self,
        volume: Volume,
        lakehouse: Lakehouse,
        names: Names,
        *,
        settle_seconds: float = 1.0,
        incomplete_seconds: float = 300.0,
        on_step: Callable[[str], None] | None = None,
        clock: Callable[[], int] = time.time_ns,
        supabase: Supabase | None = None,
        supabase_problem: str | None = None,
        hash_key: str | None = None,
    ) -> None:
        """Tie the engine to a Volume and a lakehouse.

        Args:
            volume: The landing Volume.
            lakehouse: The tables.
            names: Catalog, schemas and Volume name.
            settle_seconds: Settle time of young files, seconds.
            incomplete_seconds: How long a file without its end may still be growing, seconds.
            on_step: Called at every step of a batch (`autoloader.loader.STEPS`) and of `clean_source`
                (`autoloader.cleaning.CLEANING_STEPS`), and of a replication (`microbatch.replicate.STEPS`).
            clock: Wall clock of commits and of `clean_source`, nanoseconds.
            supabase: The database to replicate, if there is one.
            supabase_problem: What is wrong with its settings, if anything.
            hash_key: The key of hashed columns.
        """
        self._volume = volume
        self._lakehouse = lakehouse
        self._names = names
        self._settle = settle_seconds
        self._incomplete = incomplete_seconds
        self._on_step = on_step
        self._clock = clock
        self._supabase = supabase
        self._supabase_problem = supabase_problem
        self._hash_key = hash_key
        self._loaders: dict[str, tuple[FileStream, StreamLoader]] = {}
        self._sessions = _Sessions()
        self._lock = threading.Lock()

    @property
    def names(self) -> Names:
        """See `Engine.names`."""
        return self._names

    @property
    def volume(self) -> Volume:
        """The landing Volume."""
        return self._volume

    def ingest(
        self, stream: FileStream, request: IngestRequest | None = None, progress: ProgressListener | None = None
    ) -> IngestReport:
        """See `Engine.ingest`."""
        return self._loader(stream).ingest(request, progress)

    def look(self, stream: FileStream) -> PendingFiles:
        """See `Engine.look`."""
        return self._loader(stream).look()

    def files(self, stream: FileStream, state: FileState | None = None) -> Sequence[FileRecord]:
        """See `Engine.files`."""
        return self._loader(stream).files(state)

    def file_table(self, stream: FileStream, state: FileState | None = None, limit: int | None = None) -> pa.Table:
        """See `Engine.file_table`."""
        return self._loader(stream).file_table(state, limit)

    def tables(self) -> Sequence[TableState]:
        """See `Engine.tables`."""
        names = self._lakehouse.tables(self._names.catalog, self._names.bronze_schema)
        return [state for name in names if (state := self.state(name)) is not None]

    def state(self, table: TableName) -> TableState | None:
        """See `Engine.state`."""
        handle = self._lakehouse.open(table)
        if handle is None:
            return None
        files, size = handle.size()
        columns = tuple(ColumnState(f.name, delta_type(f.type), _comment(f)) for f in handle.schema)
        return TableState(str(table), handle.uri, handle.version, handle.count(), files, size, columns, handle.comment)

    def read(
        self,
        table: TableName,
        columns: Sequence[str] | None = None,
        limit: int | None = None,
        since_batch: int | None = None,
    ) -> pa.Table:
        """See `Engine.read`."""
        return self._table(table).read(columns, limit, since_batch)

    def balance(self, stream: FileStream, since_batch: int) -> Sequence[BatchBalance]:
        """See `Engine.balance`."""
        return self._loader(stream).balance(since_batch)

    def violations(self, table: TableName, columns: Sequence[Column], since_batch: int) -> Sequence[Violations]:
        """See `Engine.violations`."""
        handle = self._table(table)
        there = set(handle.schema.names)
        return [
            Violations(c.name, *handle.out_of_range(c.name, c.minimum, c.maximum, since_batch))
            for c in columns
            if c.name in there and (c.minimum is not None or c.maximum is not None)
        ]

    def duplicates(self, stream: FileStream, since_batch: int) -> Duplicates:
        """See `Engine.duplicates`."""
        return self._loader(stream).duplicates(since_batch)

    def reset(self, stream: FileStream, *, rebuild: bool = False, drop_table: bool = False) -> str:
        """Make checkpoint and table agree again. See `StreamLoader.reset`."""
        return self._loader(stream).reset(rebuild=rebuild, drop_table=drop_table)

    def maintain(
        self, stream: FileStream | ReplicatedTable, progress: ProgressListener | None = None
    ) -> MaintenanceReport:
        """See `Engine.maintain`."""
        if isinstance(stream, ReplicatedTable):
            from telematics_assets.microbatch.upkeep import maintain

            return maintain(stream, self._names.bronze(stream.target), self._lakehouse, progress or _ignored)
        return self._loader(stream).maintain(progress)

    def replicate(
        self, table: ReplicatedTable, request: ReplicateRequest | None = None, progress: ProgressListener | None = None
    ) -> ReplicateReport:
        """See `Engine.replicate`."""
        with self._replicator(table) as replicator:
            return replicator.replicate(request, progress)

    def reconcile(self, table: ReplicatedTable) -> Reconciliation:
        """See `Engine.reconcile`."""
        with self._replicator(table) as replicator:
            return replicator.reconcile()

    @contextmanager
    def _replicator(self, table: ReplicatedTable) -> Iterator[Replicator]:
        with self._asked() as connection:
            from telematics_assets.microbatch.replicate import Replicator

            yield Replicator(
                table,
                self._names.bronze(table.target),
                self._lakehouse,
                connection,
                hash_key=self._hash_key,
                on_step=self._on_step,
            )

    @contextmanager
    def source_session(self) -> Iterator[None]:
        """See `Engine.source_session`."""
        sessions = self._sessions
        if sessions.held:
            yield
            return
        sessions.held = True
        try:
            yield
        finally:
            connection, sessions.held, sessions.connection = sessions.connection, False, None
            if connection is not None:
                connection.close()

    @contextmanager
    def _asked(self) -> Iterator[Connection]:
        supabase = self._source()
        from telematics_assets.microbatch.session import Connection

        with self.source_session():
            self._sessions.connection = self._sessions.connection or Connection(supabase)
            yield self._sessions.connection

    def source_status(self) -> SourceStatus:
        """See `Engine.source_status`."""
        if self._supabase is None and self._supabase_problem is None:
            return SourceStatus("not configured", f"No Supabase database is configured. {NOT_CONFIGURED}")
        try:
            with self._asked() as connection:
                from telematics_assets.microbatch.questions import status

                return status(connection)
        except (SettingsError, MissingExtraError) as error:
            return SourceStatus("refused", str(error))

    def source_positions(self, tables: Sequence[ReplicatedTable]) -> Sequence[SourcePosition]:
        """See `Engine.source_positions`."""
        with self._asked() as connection:
            from telematics_assets.microbatch.questions import positions

            return positions(connection, tables, lambda table: self._lakehouse.open(self._names.bronze(table.target)))

    def source_drift(self, tables: Sequence[ReplicatedTable]) -> Sequence[SourceDrift]:
        """See `Engine.source_drift`."""
        with self._asked() as connection:
            from telematics_assets.microbatch.questions import drifts

            return drifts(
                connection, tables, lambda table: self._lakehouse.open(self._names.bronze(table.target)), self._hash_key
            )

    def repeated_keys(self, table: ReplicatedTable) -> RepeatedKeys | None:
        """See `Engine.repeated_keys`."""
        bronze = self._lakehouse.open(self._names.bronze(table.target))
        if bronze is None:
            return None
        from telematics_assets.lakehouse.repeated import repeated

        with self._asked() as connection:
            from telematics_assets.microbatch.questions import key_columns

            key = key_columns(connection, table, self._hash_key)
        keys, examples = repeated(bronze, key)
        return RepeatedKeys(key, bronze.count(), keys, examples)

    def doctor(self, streams: Sequence[FileStream] = ()) -> Sequence[Finding]:
        """See `Engine.doctor`."""
        catalog, schema = self._names.catalog, self._names.bronze_schema
        findings = [
            _place_finding("Volume", self._volume.uri, lambda: self._volume.names("_checkpoints")),
            _place_finding("Tables", self._lakehouse.uri, lambda: self._lakehouse.tables(catalog, schema)),
        ]
        for stream in streams:
            subject = f"stream {stream.name}"
            try:
                self._loader(stream).check()
                pending = self.look(stream)
            except TelematicsError as error:
                fix = "Do what the message says, then run doctor again."
                findings.append(Finding("error", subject, str(error), fix))
                continue
            text = f"{pending.known} files known, {pending.files} to load, {pending.waiting} still being written"
            findings.append(Finding("ok", subject, text))
        return findings

    def _source(self) -> Supabase:
        if self._supabase_problem is not None:
            raise SettingsError(self._supabase_problem)
        if self._supabase is None:
            raise SettingsError(f"No Supabase database is configured. {NOT_CONFIGURED}")
        if importlib.util.find_spec("adbc_driver_postgresql") is None:
            raise MissingExtraError("Replicating a Supabase database", "supabase")
        return self._supabase

    def _table(self, name: TableName) -> Table:
        table = self._lakehouse.open(name)
        if table is None:
            there = ", ".join(t.table for t in self._lakehouse.tables(name.catalog, name.schema)) or "none yet"
            raise TableNotFoundError(
                f"There is no table {name}. Tables of {name.catalog}.{name.schema}: {there}. Load a stream to make one."
            )
        return table

    def _loader(self, stream: FileStream) -> StreamLoader:
        with self._lock:
            known = self._loaders.get(stream.name)
            if known is not None and known[0] == stream:
                return known[1]
            loader = StreamLoader(
                stream,
                self._names.bronze(stream.table),
                self._volume,
                self._lakehouse,
                self._writer(),
                settle_seconds=self._settle,
                incomplete_seconds=self._incomplete,
                on_step=self._on_step,
                clock=self._clock,
            )
            self._loaders[stream.name] = (stream, loader)
            return loader

    @abstractmethod
    def _writer(self) -> BatchWriter:
        """How this engine writes the rows of a plan's files."""


class _Sessions(threading.local):
    """Of each thread: whether it keeps a connection to the source, and which, once something was asked."""

    held = False
    connection: Connection | None = None


def create_table(
    volume: Volume,
    lakehouse: Lakehouse,
    stream: FileStream,
    name: TableName,
    files: tuple[FileEntry, ...],
    properties: dict[str, str],
) -> Table:
    """See `autoloader.loader.BatchWriter.create_table`."""
    schema = first_schema(volume, stream, files)
    # Text of any length would stand in the log as smallest and largest value.
    lines = {stream.options.rescued_data_column, stream.options.raw_record_column, CORRUPT_RECORD}
    own = [column for column in schema if column.name in stream.own_columns and column.name not in lines]
    data = [column for column in schema if column.name not in stream.own_columns]
    statistics = statistics_columns([*data[:STATISTICS_COLUMNS], *own])
    return lakehouse.create(name, schema, stream.contract.comment, {**properties, STATISTICS_PROPERTY: statistics})


def _ignored(progress: Progress) -> None:
    pass


def _comment(column: pa.Field) -> str | None:
    return (column.metadata or {}).get(b"comment", b"").decode() or None


def _place_finding(subject: str, uri: str, list_it: Callable[[], object]) -> Finding:
    if "://" not in uri:
        return _folder_finding(subject, uri)
    try:
        list_it()
    except TelematicsError as error:
        return Finding("error", subject, str(error), "Do what the message says, then run doctor again.")
    return Finding("ok", subject, f"{uri} answers")


def _folder_finding(subject: str, uri: str) -> Finding:
    folder = uri
    while not os.path.exists(folder) and os.path.dirname(folder) != folder:
        folder = os.path.dirname(folder)
    if not os.access(folder, os.W_OK):
        return Finding("error", subject, f"{uri} can't be written.", f"Give this user write access to {folder}.")
    free = shutil.disk_usage(folder).free / 1e9
    if free < 1:
        return Finding("warning", subject, f"{uri}: {free:.1f} GB free.", "Free some disk space.")
    return Finding("ok", subject, f"{uri} ({free:.0f} GB free)")
