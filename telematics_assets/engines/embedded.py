"""The embedded engine: our loader, pyarrow and polars to read, pyarrow to write. No JVM, no account.

Belongs here: how a plan's files become one Delta commit in this process, and the answers about tables.
Does not belong here: the protocol of a batch (`autoloader/loader.py`), formats (`autoloader/`), other engines, Dagster.

A batch streams: files are read one after another in chunks, small ones some hundred at once, and the writer pulls them,
so that memory holds a few chunks however large the batch is. A file that turns out unreadable, changed or wider than
the table after some of its rows were passed on ends the attempt before anything is committed; the next attempt knows
better.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from telematics_assets.autoloader.allocator import keep_freed_memory_in_few_places
from telematics_assets.autoloader.checkpoint import FileResult, Plan, Result
from telematics_assets.autoloader.chunks import Chunk
from telematics_assets.autoloader.formats import (
    Columns,
    file_columns,
    read_file,
    reads_together,
    sample_file,
)
from telematics_assets.autoloader.inference import Sample
from telematics_assets.autoloader.loader import ATTEMPT_INFO, DIGEST_INFO, StreamLoader
from telematics_assets.autoloader.ordered import Begun, ahead, in_order
from telematics_assets.autoloader.parquet_together import Run, SmallFiles, first_of_each
from telematics_assets.autoloader.schema import (
    changes,
    evolved,
    lost_own_fields,
    reader_schema,
    resolve,
    table_schema,
)
from telematics_assets.catalog import (
    BATCH_ID,
    CORRUPT_RECORD,
    INGESTED_AT,
    SOURCE_FILE,
    SOURCE_FILE_MODIFIED_AT,
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
    FileMissingError,
    MissingExtraError,
    SchemaError,
    SettingsError,
    TableNotFoundError,
    TelematicsError,
    UnreadableFileError,
    VolumeError,
)
from telematics_assets.lakehouse.base import Commit, Lakehouse, Table
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.lakehouse.types import STATISTICS_PROPERTY, delta_type, statistics_columns
from telematics_assets.microbatch.connection import NOT_CONFIGURED, Supabase
from telematics_assets.settings import Settings
from telematics_assets.volumes.base import FileEntry, Volume
from telematics_assets.volumes.local import LocalVolume

if TYPE_CHECKING:
    from telematics_assets.microbatch.replicate import Replicator

#: Rows of one file are held back until the file is proven unchanged, up to this many bytes; beyond, they are passed on.
HOLD_BYTES = 32 << 20
#: JSON keys for the first schema are taken from this many files; later keys evolve the table.
SAMPLE_FILES = 64
#: Data columns with statistics in the log, as many as Delta's own default: with all, 1,200 columns took 25 s to open.
STATISTICS_COLUMNS = 32

#: A file up to this size is read in another thread, while those before it are passed on.
SMALL_BYTES = 1 << 20
#: So many small files that follow each other, and so many bytes of them, are given to a thread at once.
GROUP_FILES, GROUP_BYTES = 16, 1 << 20
#: The same for files that are read together, and how many are read one by one rather.
TOGETHER_FILES, TOGETHER_BYTES, TOGETHER_LEAST = 500, 8 << 20, 8
#: What a thread reads of them before their turn has come, in memory; the rest is read when it has.
AHEAD_BYTES = 8 << 20
#: Rows are put together until they are so many, or take so much memory: the writer pays per batch, holds a dozen of
#: them, and puts smaller ones together itself.
BATCH_ROWS = 8_192
GATHER_BYTES = 16 << 20
#: Batches that are read while the writer is busy.
BATCHES_AHEAD = 1

_TIMESTAMP = pa.timestamp("us", "UTC")


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


def open_engine(settings: Settings) -> EmbeddedEngine:
    """The embedded engine of a deployment."""
    return EmbeddedEngine(
        open_volume(settings),
        DeltaLakehouse(settings.home / "tables" if isinstance(settings.home, Path) else f"{settings.home}/tables"),
        settings.names,
        settle_seconds=settings.settle_seconds,
        incomplete_seconds=settings.incomplete_seconds,
        supabase=settings.supabase,
        supabase_problem=settings.supabase_problem,
        hash_key=settings.hash_key,
    )


class EmbeddedEngine:
    """Executes everything in this process. See `engines.base.Engine`."""

    name = "embedded"

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
        supabase = self._source()
        from telematics_assets.microbatch.replicate import Replicator
        from telematics_assets.microbatch.session import connected

        with connected(supabase) as connection:
            yield Replicator(
                table,
                self._names.bronze(table.target),
                self._lakehouse,
                connection,
                hash_key=self._hash_key,
                on_step=self._on_step,
            )

    def source_status(self) -> SourceStatus:
        """See `Engine.source_status`."""
        if self._supabase is None and self._supabase_problem is None:
            return SourceStatus("not configured", f"No Supabase database is configured. {NOT_CONFIGURED}")
        try:
            supabase = self._source()
        except (SettingsError, MissingExtraError) as error:
            return SourceStatus("refused", str(error))
        from telematics_assets.microbatch.questions import status

        return status(supabase)

    def source_positions(self, tables: Sequence[ReplicatedTable]) -> Sequence[SourcePosition]:
        """See `Engine.source_positions`."""
        supabase = self._source()
        from telematics_assets.microbatch.questions import positions

        return positions(supabase, tables, lambda table: self._lakehouse.open(self._names.bronze(table.target)))

    def source_drift(self, tables: Sequence[ReplicatedTable]) -> Sequence[SourceDrift]:
        """See `Engine.source_drift`."""
        supabase = self._source()
        from telematics_assets.microbatch.questions import drifts

        return drifts(
            supabase, tables, lambda table: self._lakehouse.open(self._names.bronze(table.target)), self._hash_key
        )

    def repeated_keys(self, table: ReplicatedTable) -> RepeatedKeys | None:
        """See `Engine.repeated_keys`."""
        bronze = self._lakehouse.open(self._names.bronze(table.target))
        if bronze is None:
            return None
        supabase = self._source()
        from telematics_assets.lakehouse.repeated import repeated
        from telematics_assets.microbatch.questions import key_columns

        key = key_columns(supabase, table, self._hash_key)
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
                _Writer(self._volume, self._lakehouse),
                settle_seconds=self._settle,
                incomplete_seconds=self._incomplete,
                on_step=self._on_step,
                clock=self._clock,
            )
            self._loaders[stream.name] = (stream, loader)
            return loader


def _ignored(progress: Progress) -> None:
    pass


class _RestartError(Exception):
    """Something was learnt after rows were passed on: the attempt must begin again."""


@dataclass
class _Attempt:
    """What is known of a plan's files across the passes of one attempt."""

    verdicts: dict[str, FileResult] = field(default_factory=dict)
    new_fields: list[pa.Field] = field(default_factory=list)


class _Writer:
    """Reads a plan's files in this process and appends their rows. See `autoloader.loader.BatchWriter`."""

    def __init__(self, volume: Volume, lakehouse: Lakehouse) -> None:
        keep_freed_memory_in_few_places()
        self._volume = volume
        self._lakehouse = lakehouse

    def create_table(
        self, stream: FileStream, name: TableName, files: tuple[FileEntry, ...], properties: dict[str, str]
    ) -> Table:
        """See `BatchWriter.create_table`."""
        schema = self._new_schema(stream, files)
        # Text of any length would stand in the log as smallest and largest value.
        lines = {stream.options.rescued_data_column, stream.options.raw_record_column, CORRUPT_RECORD}
        own = [column for column in schema if column.name in stream.own_columns and column.name not in lines]
        data = [column for column in schema if column.name not in stream.own_columns]
        statistics = statistics_columns([*data[:STATISTICS_COLUMNS], *own])
        properties = {**properties, STATISTICS_PROPERTY: statistics}
        return self._lakehouse.create(name, schema, stream.contract.comment, properties)

    def _columns(self, stream: FileStream, files: tuple[FileEntry, ...]) -> Columns:
        """The columns of the first files."""
        options = stream.options
        sample = Sample(options.schema_inference_sample_files, options.sample_bytes)
        found: list[tuple[str, pa.DataType | None]] = []
        if stream.format == "json" and not options.infer_column_types:
            files = files[:SAMPLE_FILES]
        for file in self._unlike(files) if reads_together(stream) else files:
            if sample.is_full:
                break
            try:
                with self._volume.open(file.path) as source:
                    if options.infer_column_types:
                        sample_file(sample, source, stream)
                    else:
                        found += file_columns(source, stream)
            except (UnreadableFileError, VolumeError):
                # The batch itself will say so, by name.
                continue
        return [*found, *sample.columns()]

    def _unlike(self, files: Sequence[FileEntry]) -> Iterator[FileEntry]:
        """The files without those that have the columns of an earlier one."""
        for group in _neighbours(files, TOGETHER_FILES, TOGETHER_BYTES):
            if len(group) < TOGETHER_LEAST:
                yield from group
            else:
                shown = first_of_each([content or b"" for content in self._volume.read_unchanged(group)])
                yield from (file for number, file in enumerate(group) if number in shown)

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
        info = {ATTEMPT_INFO: attempt, DIGEST_INFO: plan.digest}

        def commit(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Commit:
            widened = any(had for _, _, *had in changes(table.schema, schema))
            write = table.widen if widened else table.append
            return write(schema, batches, stream_id, plan.batch_id, info)

        return self._written(stream, table.schema, plan, attempt, commit, publish, on_step, progress)

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
        info = {ATTEMPT_INFO: attempt, DIGEST_INFO: plan.digest}

        def commit(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Commit:
            return table.overwrite(schema, batches, positions, info)

        schema = self._new_schema(stream, plan.files)
        return self._written(stream, schema, plan, attempt, commit, publish, on_step, progress)

    def _written(
        self,
        stream: FileStream,
        base: pa.Schema,
        plan: Plan,
        attempt: str,
        commit: Callable[[pa.Schema, Iterable[pa.RecordBatch]], Commit],
        publish: Callable[[Result], None],
        on_step: Callable[[str], None],
        progress: ProgressListener,
    ) -> Commit:
        """One attempt at a plan over a schema, to which its files may add columns."""
        known = _Attempt(new_fields=lost_own_fields(stream, base))
        on_step("reading")
        while True:
            schema = evolved(base, known.new_fields)
            rows = _Rows(self._volume, stream, base, schema, plan, attempt, known, publish, on_step, progress)
            try:
                return commit(schema, ahead(iter(rows), BATCHES_AHEAD))
            except _RestartError:
                continue

    def _new_schema(self, stream: FileStream, files: tuple[FileEntry, ...]) -> pa.Schema:
        """Columns of the contract and of the first files."""
        return table_schema(stream, resolve(stream, None, self._columns(stream, files)))


class _Rows:
    """The rows of a plan as one stream of record batches, ending with the publication of the result."""

    def __init__(
        self,
        volume: Volume,
        stream: FileStream,
        table: pa.Schema,
        schema: pa.Schema,
        plan: Plan,
        attempt: str,
        known: _Attempt,
        publish: Callable[[Result], None],
        on_step: Callable[[str], None],
        progress: ProgressListener,
    ) -> None:
        self._volume = volume
        self._stream = stream
        self._table = table
        self._schema = schema
        self._plan = plan
        self._attempt = attempt
        self._known = known
        self._publish = publish
        self._on_step = on_step
        self._progress = progress
        self._target = reader_schema(stream, schema)
        self._ingested_at = datetime.now(UTC)
        self._learnt: Columns = []
        self._wider = False

    def __iter__(self) -> Generator[pa.RecordBatch, None, None]:
        """Batches of a size that the writer likes, of one file or of many."""
        pieces: list[_Piece] = []
        rows = size = 0
        for piece in self._pieces():
            pieces.append(piece)
            rows += piece.chunk.table.num_rows
            size += piece.size
            if rows >= BATCH_ROWS or size >= GATHER_BYTES:
                yield from self._batches(pieces)
                pieces, rows, size = [], 0, 0
        if pieces:
            yield from self._batches(pieces)

    def _pieces(self) -> Iterator[_Piece]:
        results: list[FileResult] = []
        rows = 0
        total = len(self._plan.files)
        with closing(self._readings()) as readings:
            for reading in readings:
                if isinstance(reading, _Together):
                    found = yield from self._together(reading)
                else:
                    found = [(yield from self._read(reading))]
                for result in found:
                    results.append(result)
                    rows += result.rows
                    self._on_step("file_read")
                    self._progress(Progress("read", result.path, len(results), total, rows))
        if self._wider:
            raise _RestartError
        self._progress(Progress("commit", f"committing {rows} rows of batch {self._plan.batch_id}", total, total, rows))
        self._publish(
            Result(
                self._plan.batch_id,
                self._attempt,
                tuple(results),
                changes(self._table, self._schema),
                tuple((f.name, delta_type(f.type)) for f in self._schema),
            )
        )

    def _readings(self) -> Generator[_Alone | _Together, None, None]:
        """The plan's files in order, each with what it holds, or many at once with their rows."""
        if not reads_together(self._stream):
            yield from self._one_by_one(self._plan.files)
            return
        rescued_column = self._stream.options.rescued_data_column
        with closing(ahead(self._groups(), 1)) as groups:
            for files, small in groups:
                done = 0
                shown = [f"{self._volume.location}/{file.path}" for file in files]
                # Decoded here, so that the writer begins before the last of them.
                for run in small.runs(self._target, rescued_column=rescued_column, file_paths=shown):
                    yield from self._one_by_one(files[done : run.first])
                    done = run.first + len(run.rows)
                    yield _Together(files[run.first : done], run)
                yield from self._one_by_one(files[done:])

    def _groups(self) -> Generator[tuple[list[FileEntry], SmallFiles], None, None]:
        """The plan's files in order; those of a group that are alike can be read together."""
        others: list[FileEntry] = []
        for files in _neighbours(self._plan.files, TOGETHER_FILES, TOGETHER_BYTES):
            if not (small := self._small(files)):
                others += files
                continue
            if others:
                yield others, SmallFiles([])
                others = []
            yield files, small
        yield others, SmallFiles([])

    def _small(self, files: list[FileEntry]) -> SmallFiles:
        wanted = [file for file in files if file.path not in self._known.verdicts]
        if len(wanted) < TOGETHER_LEAST:
            return SmallFiles([])
        contents = dict(zip([file.path for file in wanted], self._volume.read_unchanged(wanted), strict=True))
        return SmallFiles([contents.get(file.path) or b"" for file in files])

    def _one_by_one(self, files: Sequence[FileEntry]) -> Iterator[_Alone]:
        """Files in order. Small ones are read in other threads by then."""
        for begun in in_order(self._begin, _neighbours(files, GROUP_FILES, GROUP_BYTES)):
            yield from begun

    def _begin(self, files: list[FileEntry]) -> list[_Alone]:
        begun = []
        room = AHEAD_BYTES
        for file in files:
            parts = Begun(self._parts(file))
            if file.size <= SMALL_BYTES and file.path not in self._known.verdicts:
                room -= parts.take(room, _held_bytes)
            begun.append(_Alone(file, parts))
        return begun

    def _read(self, reading: _Alone) -> Generator[_Piece, None, FileResult]:
        verdict = self._known.verdicts.get(reading.file.path)
        if verdict is not None:
            return verdict
        with closing(reading.parts):
            return (yield from self._file(reading.file, reading.parts))

    def _together(self, reading: _Together) -> Generator[_Piece, None, list[FileResult]]:
        files, run = reading.files, reading.run
        if self._learn(files[0], run.columns) is not None:
            # It changed since it was read, and has shown columns that it does not have.
            results = []
            for alone in self._one_by_one(files):
                results.append((yield from self._read(alone)))
            return results
        if not self._wider:
            yield _Piece(files, run.rows, Chunk(run.table), run.table.get_total_buffer_size())
        counts = zip(files, run.rows, run.rescued, strict=True)
        return [FileResult(file.path, "INGESTED", None, rows, rescued, 0) for file, rows, rescued in counts]

    def _parts(self, file: FileEntry) -> Generator[_Part, None, None]:
        """What reading a file brings: columns, rows, and at last what speaks against the file, if anything does."""
        verdict = self._verdict(file)
        if verdict is None:
            found: list[Columns] = []
            try:
                with self._volume.open(file.path) as source:
                    shown = f"{self._volume.location}/{file.path}"
                    for chunk in read_file(source, self._stream, self._target, shown, found.append, file.path):
                        yield from found
                        found.clear()
                        rows = chunk.table.num_rows
                        yield _Piece([file], [rows], chunk, chunk.table.get_total_buffer_size())
            except UnreadableFileError as error:
                verdict = FileResult(file.path, "SKIPPED_CORRUPTED", str(error))
            except FileMissingError:
                verdict = FileResult(file.path, "SKIPPED_MISSING", "it vanished while it was read")
            except VolumeError as error:
                verdict = FileResult(file.path, "DENIED", str(error))
            yield from found
            verdict = self._verdict(file) or verdict
        if verdict is not None:
            yield verdict

    def _file(self, file: FileEntry, parts: Iterable[_Part]) -> Generator[_Piece, None, FileResult]:
        held: list[_Piece] = []
        held_bytes = rows = rescued = corrupt = 0
        passed_on = False
        verdict = None
        for part in parts:
            if isinstance(part, FileResult):
                verdict = part
            elif not isinstance(part, _Piece):
                verdict = self._learn(file, part)
                if verdict is not None:
                    break
            elif self._wider:
                # The attempt begins again with more columns; only names are still to be learnt.
                if self._stream.format != "json":
                    break
            else:
                rows += part.chunk.table.num_rows
                rescued += part.chunk.rescued_rows
                corrupt += part.chunk.corrupt_rows
                held.append(part)
                held_bytes += part.size
                if held_bytes > HOLD_BYTES:
                    yield from held
                    held, held_bytes, passed_on = [], 0, True
        if verdict is not None:
            if passed_on:
                self._known.verdicts[file.path] = verdict
                raise _RestartError
            return verdict
        if not self._wider:
            yield from held
        return FileResult(file.path, "INGESTED", None, rows, rescued, corrupt)

    def _verdict(self, file: FileEntry) -> FileResult | None:
        """What size, modification time and ETag say against reading the file, or None."""
        now = self._volume.stat(file.path)
        if now is None:
            return FileResult(file.path, "SKIPPED_MISSING", "it vanished after it was planned")
        if (now.size, now.modified_ns) != (file.size, file.modified_ns) or now.etag != file.etag:
            return FileResult(file.path, "LEFT", "it changed after it was planned; it will be discovered again")
        if file.size == 0:
            return FileResult(file.path, "SKIPPED_CORRUPTED", "it has zero bytes")
        return None

    def _learn(self, file: FileEntry, found: Columns) -> FileResult | None:
        """Note columns that the table lacks, or say what speaks against the file that showed them."""
        if found == self._learnt:
            return None
        schema = evolved(self._table, self._known.new_fields)
        try:
            fields = resolve(self._stream, schema, found, file.path)
        except SchemaError:
            # A file that changed meanwhile may have shown columns that it does not have.
            verdict = self._verdict(file)
            if verdict is None:
                raise
            return verdict
        self._learnt = found
        if fields:
            self._known.new_fields += fields
            self._wider = True
        return None

    def _batches(self, pieces: list[_Piece]) -> Iterator[pa.RecordBatch]:
        tables = pa.concat_tables([piece.chunk.table for piece in pieces]).combine_chunks()
        files = [file for piece in pieces for file in piece.files]
        ends = np.cumsum([rows for piece in pieces for rows in piece.rows])
        for start in range(0, tables.num_rows, BATCH_ROWS):
            table = tables.slice(start, BATCH_ROWS)
            count = table.num_rows
            here = np.diff(np.clip(ends, start, start + count), prepend=start)
            inside = np.flatnonzero(here)
            here, theirs = here[inside], [files[number] for number in inside.tolist()]
            columns = dict(zip(table.schema.names, table.columns, strict=True))
            columns[SOURCE_FILE] = _repeated([f"{self._volume.location}/{file.path}" for file in theirs], here)
            modified = np.repeat(np.array([file.modified_ns // 1000 for file in theirs], np.int64), here)
            columns[SOURCE_FILE_MODIFIED_AT] = pa.Array.from_buffers(_TIMESTAMP, count, [None, pa.py_buffer(modified)])
            columns[BATCH_ID] = pa.repeat(pa.scalar(self._plan.batch_id, pa.int64()), count)
            columns[INGESTED_AT] = pa.repeat(pa.scalar(self._ingested_at, _TIMESTAMP), count)
            whole = pa.table([columns[name] for name in self._schema.names], schema=self._schema)
            yield from whole.to_batches()


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some rows of one file, or all of several, how many are whose, and how much memory they take."""

    files: Sequence[FileEntry]
    rows: Sequence[int]
    chunk: Chunk
    size: int


#: What reading a file brings: columns to learn, rows, or what speaks against the file.
_Part = Columns | _Piece | FileResult


@dataclass(frozen=True, slots=True)
class _Alone:
    """A file that is read by itself."""

    file: FileEntry
    parts: Begun[_Part]


@dataclass(frozen=True, slots=True)
class _Together:
    """Files that were read at once."""

    files: list[FileEntry]
    run: Run


def _held_bytes(part: _Part) -> int:
    return part.size if isinstance(part, _Piece) else 0


def _neighbours(files: Sequence[FileEntry], most: int, most_bytes: int) -> Iterator[list[FileEntry]]:
    """Small files that stand together, up to a number and a size, and larger ones alone."""
    group: list[FileEntry] = []
    size = 0
    for file in files:
        fits = len(group) < most and size + file.size <= most_bytes
        if group and not (fits and max(file.size, group[-1].size) <= SMALL_BYTES):
            yield group
            group, size = [], 0
        group.append(file)
        size += file.size
    if group:
        yield group


def _repeated(texts: list[str], counts: npt.NDArray[np.int64]) -> pa.Array:
    """Each text in so many rows. `pa.repeat` appends row by row, which took a third of the time of a load."""
    data = [text.encode() for text in texts]
    offsets = np.zeros(counts.sum() + 1, np.int32)
    np.cumsum(np.repeat([len(text) for text in data], counts), out=offsets[1:])
    joined = b"".join([text * count for text, count in zip(data, counts.tolist(), strict=True)])
    return pa.StringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(joined))


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
