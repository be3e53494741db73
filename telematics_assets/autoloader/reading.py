"""The rows of a plan's files as one stream of record batches, whichever engine writes them.

Belongs here: reading files in order and ahead, what speaks against a file, the columns that files show, and those that
say where a row comes from.
Does not belong here: formats (`formats.py`), what is committed and when (`loader.py`), writing (the engines).

Files are read one after another in chunks, small ones some hundred at once, and the writer pulls them, so that memory
holds a few chunks however large the batch is. A file that turns out unreadable, changed or wider than the table after
some of its rows were passed on ends the pass before anything is committed; the next pass knows better.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

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
from telematics_assets.autoloader.ordered import Begun, ahead, in_order
from telematics_assets.autoloader.parquet_together import Run, SmallFiles, first_of_each
from telematics_assets.autoloader.schema import (
    changes,
    evolved,
    reader_schema,
    resolve,
    table_schema,
)
from telematics_assets.catalog import (
    BATCH_ID,
    INGESTED_AT,
    SOURCE_FILE,
    SOURCE_FILE_MODIFIED_AT,
    FileStream,
)
from telematics_assets.engines.base import Progress, ProgressListener
from telematics_assets.errors import (
    FileMissingError,
    SchemaError,
    UnreadableFileError,
    VolumeError,
)
from telematics_assets.lakehouse.types import delta_type
from telematics_assets.volumes.base import FileEntry, Volume

#: Rows of one file are held back until the file is proven unchanged, up to this many bytes; beyond, they are passed on.
HOLD_BYTES = 32 << 20
#: JSON keys for the first schema are taken from this many files; later keys evolve the table.
SAMPLE_FILES = 64
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

_TIMESTAMP = pa.timestamp("us", "UTC")


class RestartError(Exception):
    """Something was learnt after rows were passed on: the attempt must begin again."""


@dataclass
class Attempt:
    """What is known of a plan's files across the passes of one attempt."""

    verdicts: dict[str, FileResult] = field(default_factory=dict)
    new_fields: list[pa.Field] = field(default_factory=list)


def first_schema(volume: Volume, stream: FileStream, files: tuple[FileEntry, ...]) -> pa.Schema:
    """The schema of a new table: columns of the contract and of the first files."""
    return table_schema(stream, resolve(stream, None, _first_columns(volume, stream, files)))


def _first_columns(volume: Volume, stream: FileStream, files: tuple[FileEntry, ...]) -> Columns:
    """The columns of the first files."""
    options = stream.options
    sample = Sample(options.schema_inference_sample_files, options.sample_bytes)
    found: list[tuple[str, pa.DataType | None]] = []
    if stream.format == "json" and not options.infer_column_types:
        files = files[:SAMPLE_FILES]
    for file in _unlike(volume, files) if reads_together(stream) else files:
        if sample.is_full:
            break
        try:
            with volume.open(file.path) as source:
                if options.infer_column_types:
                    sample_file(sample, source, stream)
                else:
                    found += file_columns(source, stream)
        except (UnreadableFileError, VolumeError):
            # The batch itself will say so, by name.
            continue
    return [*found, *sample.columns()]


def _unlike(volume: Volume, files: Sequence[FileEntry]) -> Iterator[FileEntry]:
    """The files without those that have the columns of an earlier one."""
    for group in _neighbours(files, TOGETHER_FILES, TOGETHER_BYTES):
        if len(group) < TOGETHER_LEAST:
            yield from group
        else:
            shown = first_of_each([content or b"" for content in volume.read_unchanged(group)])
            yield from (file for number, file in enumerate(group) if number in shown)


class PlanRows:
    """The rows of a plan as one stream of record batches, ending with the publication of the result."""

    def __init__(
        self,
        volume: Volume,
        stream: FileStream,
        table: pa.Schema,
        schema: pa.Schema,
        plan: Plan,
        attempt: str,
        known: Attempt,
        publish: Callable[[Result], None],
        on_step: Callable[[str], None],
        progress: ProgressListener,
        ingested_ns: int,
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
        self._ingested_ns = ingested_ns
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
            raise RestartError
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
        return _file_parts(self._volume, self._stream, self._target, file)

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
                raise RestartError
            return verdict
        if not self._wider:
            yield from held
        return FileResult(file.path, "INGESTED", None, rows, rescued, corrupt)

    def _learn(self, file: FileEntry, found: Columns) -> FileResult | None:
        """Note columns that the table lacks, or say what speaks against the file that showed them."""
        if found == self._learnt:
            return None
        schema = evolved(self._table, self._known.new_fields)
        try:
            fields = resolve(self._stream, schema, found, file.path)
        except SchemaError:
            # A file that changed meanwhile may have shown columns that it does not have.
            verdict = _verdict(self._volume, file)
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
            columns[INGESTED_AT] = pa.repeat(pa.scalar(self._ingested_ns // 1000, _TIMESTAMP), count)
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


def looked_through(
    volume: Volume, stream: FileStream, schema: pa.Schema, file: FileEntry
) -> tuple[FileResult | None, list[Columns]]:
    """Read a file for what it shows, not for its rows.

    Args:
        volume: The landing Volume.
        stream: The stream.
        schema: Columns of the table.
        file: The file as it was planned.

    Returns:
        What speaks against it, or None, and the columns that it shows, as often as they change on the way.
    """
    verdict = None
    shown: list[Columns] = []
    with closing(_file_parts(volume, stream, reader_schema(stream, schema), file)) as parts:
        for part in parts:
            if isinstance(part, FileResult):
                verdict = part
            elif not isinstance(part, _Piece) and part not in shown[-1:]:
                shown.append(part)
    return verdict, shown


def _file_parts(volume: Volume, stream: FileStream, target: pa.Schema, file: FileEntry) -> Generator[_Part, None, None]:
    """What reading a file brings: columns, rows, and at last what speaks against the file, if anything does."""
    verdict = _verdict(volume, file)
    if verdict is None:
        found: list[Columns] = []
        try:
            with volume.open(file.path) as source:
                shown = f"{volume.location}/{file.path}"
                for chunk in read_file(source, stream, target, shown, found.append, file.path):
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
        verdict = _verdict(volume, file) or verdict
    if verdict is not None:
        yield verdict


def _verdict(volume: Volume, file: FileEntry) -> FileResult | None:
    """What size, modification time and ETag say against reading the file, or None."""
    now = volume.stat(file.path)
    if now is None:
        return FileResult(file.path, "SKIPPED_MISSING", "it vanished after it was planned")
    if (now.size, now.modified_ns) != (file.size, file.modified_ns) or now.etag != file.etag:
        return FileResult(file.path, "LEFT", "it changed after it was planned; it will be discovered again")
    if file.size == 0:
        return FileResult(file.path, "SKIPPED_CORRUPTED", "it has zero bytes")
    return None


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
