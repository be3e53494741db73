"""The embedded engine: our loader, pyarrow and polars to read, delta-rs to write. No JVM, no account.

Belongs here: how a plan's files become one Delta commit in this process, and the answers about tables.
Does not belong here: the protocol of a batch (`autoloader/loader.py`), formats (`autoloader/`), other engines, Dagster.

A batch streams: files are read one after another in chunks, and the writer pulls them, so that memory holds a few
chunks
however large the batch is. A file that turns out unreadable, changed or wider than the table after some of its rows
were passed on ends the attempt before anything is committed; the next attempt knows better.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from telematics_assets.autoloader.checkpoint import FileResult, Plan, Result
from telematics_assets.autoloader.chunks import Chunk
from telematics_assets.autoloader.formats import Columns, file_columns, read_file, sample_file
from telematics_assets.autoloader.inference import Sample
from telematics_assets.autoloader.loader import ATTEMPT_INFO, DIGEST_INFO, StreamLoader
from telematics_assets.autoloader.ordered import ahead
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
    TableState,
    Violations,
)
from telematics_assets.errors import (
    FileMissingError,
    SchemaError,
    TableNotFoundError,
    TelematicsError,
    UnreadableFileError,
    VolumeError,
)
from telematics_assets.lakehouse.base import Commit, Lakehouse, Table
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.lakehouse.types import STATISTICS_PROPERTY, delta_type, statistics_columns
from telematics_assets.settings import Settings
from telematics_assets.volumes.base import FileEntry, Volume
from telematics_assets.volumes.local import LocalVolume

#: Rows of one file are held back until the file is proven unchanged, up to this many bytes; beyond, they are passed on.
HOLD_BYTES = 64 << 20
#: JSON keys for the first schema are taken from this many files; later keys evolve the table.
SAMPLE_FILES = 64
#: Data columns with statistics in the log, as many as Delta's own default: with all, 1,200 columns took 25 s to open.
STATISTICS_COLUMNS = 32

#: Batches are put together until they have this many rows.
GATHER_ROWS = 32_768
#: Rows of a batch at most.
BATCH_ROWS = 65_536
#: Batches that are read while the writer is busy.
BATCHES_AHEAD = 2

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
    ) -> None:
        """Tie the engine to a Volume and a lakehouse.

        Args:
            volume: The landing Volume.
            lakehouse: The tables.
            names: Catalog, schemas and Volume name.
            settle_seconds: Settle time of young files, seconds.
            incomplete_seconds: How long a file without its end may still be growing, seconds.
            on_step: Called at every step of a batch (`autoloader.loader.STEPS`) and of `clean_source`
                (`autoloader.cleaning.CLEANING_STEPS`).
            clock: Wall clock of commits and of `clean_source`, nanoseconds.
        """
        self._volume = volume
        self._lakehouse = lakehouse
        self._names = names
        self._settle = settle_seconds
        self._incomplete = incomplete_seconds
        self._on_step = on_step
        self._clock = clock
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

    def maintain(self, stream: FileStream, progress: ProgressListener | None = None) -> MaintenanceReport:
        """See `Engine.maintain`."""
        return self._loader(stream).maintain(progress)

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
        for file in files[:SAMPLE_FILES] if stream.format == "json" and not options.infer_column_types else files:
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
                return commit(schema, ahead(_gathered(rows, schema), BATCHES_AHEAD))
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
        self._wider = False

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        results: list[FileResult] = []
        rows = 0
        total = len(self._plan.files)
        for number, file in enumerate(self._plan.files, 1):
            verdict = self._known.verdicts.get(file.path)
            if verdict is None:
                result = yield from self._file(file)
            else:
                result = verdict
            results.append(result)
            rows += result.rows
            self._on_step("file_read")
            self._progress(Progress("read", file.path, number, total, rows))
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

    def _file(self, file: FileEntry) -> Generator[pa.RecordBatch, None, FileResult]:
        held: list[Chunk] = []
        held_bytes = rows = rescued = corrupt = 0
        passed_on = False
        verdict = self._verdict(file)
        if verdict is None:
            try:
                with self._volume.open(file.path) as source:
                    for chunk in self._read(source, file):
                        rows += chunk.table.num_rows
                        rescued += chunk.rescued_rows
                        corrupt += chunk.corrupt_rows
                        if self._wider:
                            # The attempt begins again with more columns; only names are still to be learnt.
                            if self._stream.format != "json":
                                break
                            continue
                        held.append(chunk)
                        held_bytes += chunk.table.nbytes
                        if held_bytes > HOLD_BYTES:
                            for ready in held:
                                yield from self._batches(ready, file)
                            held, held_bytes, passed_on = [], 0, True
            except SchemaError:
                # A file that changed meanwhile may have shown columns that it does not have.
                verdict = self._verdict(file)
                if verdict is None:
                    raise
            except UnreadableFileError as error:
                verdict = self._verdict(file) or FileResult(file.path, "SKIPPED_CORRUPTED", str(error))
            except FileMissingError:
                gone = FileResult(file.path, "SKIPPED_MISSING", "it vanished while it was read")
                verdict = self._verdict(file) or gone
            except VolumeError as error:
                verdict = self._verdict(file) or FileResult(file.path, "DENIED", str(error))
            else:
                verdict = self._verdict(file)
        if verdict is not None:
            if passed_on:
                self._known.verdicts[file.path] = verdict
                raise _RestartError
            return verdict
        if not self._wider:
            for ready in held:
                yield from self._batches(ready, file)
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

    def _read(self, source: BinaryIO, file: FileEntry) -> Iterator[Chunk]:
        return read_file(
            source,
            self._stream,
            self._target,
            f"{self._volume.location}/{file.path}",
            on_columns=lambda found: self._learn(file, found),
            path=file.path,
        )

    def _learn(self, file: FileEntry, found: Columns) -> None:
        schema = evolved(self._table, self._known.new_fields)
        fields = resolve(self._stream, schema, found, file.path)
        if fields:
            self._known.new_fields += fields
            self._wider = True

    def _batches(self, chunk: Chunk, file: FileEntry) -> Iterator[pa.RecordBatch]:
        modified = datetime.fromtimestamp(file.modified_ns // 1_000_000_000, UTC).replace(
            microsecond=file.modified_ns // 1000 % 1_000_000
        )
        path = f"{self._volume.location}/{file.path}"
        # A chunk of tiny records has millions of rows, and each gets the path.
        for start in range(0, chunk.table.num_rows, BATCH_ROWS):
            table = chunk.table.slice(start, BATCH_ROWS)
            count = table.num_rows
            columns = dict(zip(table.schema.names, table.columns, strict=True))
            columns[SOURCE_FILE] = _repeated(path, count)
            columns[SOURCE_FILE_MODIFIED_AT] = pa.repeat(pa.scalar(modified, _TIMESTAMP), count)
            columns[BATCH_ID] = pa.repeat(pa.scalar(self._plan.batch_id, pa.int64()), count)
            columns[INGESTED_AT] = pa.repeat(pa.scalar(self._ingested_at, _TIMESTAMP), count)
            whole = pa.table([columns[name] for name in self._schema.names], schema=self._schema)
            yield from whole.to_batches()


def _repeated(text: str, count: int) -> pa.Array:
    """One text in every row. `pa.repeat` appends it row by row, which took a third of the time of a load."""
    data = text.encode()
    offsets = np.arange(count + 1, dtype=np.int32) * np.int32(len(data))
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(data * count))


def _gathered(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Generator[pa.RecordBatch, None, None]:
    """Small batches put together: the writer pays per batch, and thousands of small files make thousands of them."""
    held: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        held.append(batch)
        rows += batch.num_rows
        if rows >= GATHER_ROWS:
            yield from pa.Table.from_batches(held, schema).combine_chunks().to_batches()
            held, rows = [], 0
    if held:
        yield from pa.Table.from_batches(held, schema).combine_chunks().to_batches()


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
