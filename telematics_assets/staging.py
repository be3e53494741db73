"""Sample files into the landing Volume, checked first.

Belongs here: what a file must be to be staged for a stream, and putting it there without replacing anything.
Does not belong here: reading files into tables (`autoloader/`), the stores (`volumes/`), Dagster.

What is staged loads without loss or rescue: a file that the loader would take only in part is refused by name, and
nothing of it is uploaded.
"""

from __future__ import annotations

import io
import os
import stat as stat_module
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from telematics_assets.autoloader.chunks import Chunk
from telematics_assets.autoloader.codecs import unpacked
from telematics_assets.autoloader.formats import Columns, file_columns, read_file
from telematics_assets.autoloader.json_nested import object_members
from telematics_assets.autoloader.parquet import parquet_schema
from telematics_assets.autoloader.partitions import first_difference, partition_problem, partition_values
from telematics_assets.autoloader.schema import declared_fields
from telematics_assets.autoloader.spans import is_string
from telematics_assets.catalog import CORRUPT_RECORD
from telematics_assets.errors import (
    FileChangedError,
    SourceUnavailableError,
    StagingError,
    UnknownNameError,
    UnreadableFileError,
    VolumeError,
)
from telematics_assets.lakehouse.ddl import holdable
from telematics_assets.lakehouse.types import delta_type, fits, storable, wider
from telematics_assets.remote import Limits, RemoteFile, RemoteProblem, Source, is_url, open_source
from telematics_assets.remote_faults import shown
from telematics_assets.volumes.base import refuse_dbfs

if TYPE_CHECKING:
    from telematics_assets.catalog import FileStream
    from telematics_assets.volumes.base import Volume

_COMPARED_BYTES = 1 << 20
_SHOWN = 120


@dataclass(frozen=True, slots=True)
class StagedFile:
    """A file that is in the Volume now.

    Attributes:
        source: Where it came from; a URL without its credentials.
        path: Path relative to the Volume.
        size: Bytes.
        already_there: Whether the same content was there before; nothing was uploaded then.
    """

    source: str
    path: str
    size: int
    already_there: bool


@dataclass(frozen=True, slots=True)
class RefusedFile:
    """A file of which nothing was uploaded.

    Attributes:
        source: Where it is; a URL without its credentials.
        reason: Why, in one line.
        transient: Whether the same file may go through later.
    """

    source: str
    reason: str
    transient: bool = False


@dataclass(frozen=True, slots=True)
class StageReport:
    """What `stage` did.

    Attributes:
        stream: Name of the stream.
        staged: Files that are in the Volume now.
        refused: Files that are not.
    """

    stream: str
    staged: tuple[StagedFile, ...]
    refused: tuple[RefusedFile, ...]


def stage(
    sources: Sequence[Path | str],
    stream: FileStream,
    volume: Volume,
    *,
    limits: Limits | None = None,
    progress: Callable[[str], None] | None = None,
) -> StageReport:
    """Upload files that match a stream's contract into its folder of the Volume.

    A file keeps its name, and below a source folder its path; hidden names below a folder are passed over. Doing the
    same again changes nothing. One file's failure doesn't stop the others.

    Args:
        sources: Files and folders: local paths, and URLs of any kind that fsspec knows.
        stream: What the files are for.
        volume: Where they go.
        limits: How much is read of a URL's server, and how long it is waited for.
        progress: Called with each file's name before it is looked at.

    Raises:
        UnknownNameError: If a local source does not exist, or a URL is of no known kind. Nothing was uploaded.
        DbfsDisabledError: If a source is on DBFS. Nothing was uploaded.
        MissingExtraError: If a URL needs a library that is not installed. Nothing was uploaded.
        TransientError: If the Volume did not answer. What was staged before stays; doing it again goes on from there.
    """
    opened = [_opened(source, limits or Limits()) for source in sources]
    staged: list[StagedFile] = []
    refused: list[RefusedFile] = []
    for found in (found for source in opened for found in _found(source)):
        if progress:
            progress(found.name)
        try:
            staged.append(_staged(found, f"{stream.folder}/{found.relative}", stream, volume))
        except (StagingError, UnreadableFileError, VolumeError, FileChangedError, SourceUnavailableError) as error:
            refused.append(RefusedFile(found.name, " ".join(str(error).split()), error.transient))
        except OSError as error:
            refused.append(RefusedFile(found.name, f"it can't be read: {error.strerror or error}"))
    return StageReport(stream.name, tuple(staged), tuple(refused))


@dataclass(frozen=True, slots=True)
class _Found:
    """A file to stage: what it is called, its path relative to its source, and how it is opened."""

    name: str
    relative: str
    open: Callable[[], AbstractContextManager[IO[bytes]]]


def _opened(source: Path | str, limits: Limits) -> Path | Source:
    """What a source is, before anything is uploaded or asked for over a network."""
    if isinstance(source, str) and is_url(source):
        if source.partition("://")[0].lower() not in ("file", "local") or "::" in source:
            return open_source(source, limits)
        parts = urlsplit(source)
        if parts.netloc not in ("", "localhost"):
            raise UnknownNameError(f"{shown(source)!r} is on another machine. Give file:///… with a path on this one.")
        source = url2pathname(parts.path)
    path = Path(source)
    refuse_dbfs(str(path))
    if not path.exists():
        raise UnknownNameError(f"There is no file or folder {_shown(path)!r}. Give a path on this machine, or a URL.")
    return path


def _found(source: Path | Source) -> Iterator[_Found]:
    """Every file of a source."""
    if not isinstance(source, Path):
        for found in source.files():
            yield _fetched(found)
    elif source.is_dir():
        for folder, folders, names in os.walk(source):
            folders[:] = sorted(name for name in folders if name[0] not in "_.")
            for name in sorted(names):
                if name[0] not in "_.":
                    path = Path(folder, name)
                    yield _local(path, path.relative_to(source))
    else:
        yield _local(source, Path(source.name))


def _local(path: Path, relative: Path) -> _Found:
    def opened() -> IO[bytes]:
        if _shown(relative) != str(relative):
            raise StagingError("its name is not UTF-8; rename it")
        # Before it is opened: a pipe would wait for its writer for ever.
        if not stat_module.S_ISREG(path.stat().st_mode):
            raise StagingError("it is no regular file")
        return path.open("rb")

    return _Found(_shown(path), _shown(relative), opened)


def _fetched(found: RemoteFile | RemoteProblem) -> _Found:
    """A file behind a URL, which is fetched whole when it is opened: readers seek, and ask twice."""

    @contextmanager
    def opened() -> Iterator[IO[bytes]]:
        if isinstance(found, RemoteProblem):
            raise found.error
        # It has no name, so that it is gone with this process, however that ends.
        with tempfile.TemporaryFile() as file:
            found.fetch(file)
            file.seek(0)
            yield file

    return _Found(found.name, found.relative if isinstance(found, RemoteFile) else "", opened)


def _staged(found: _Found, target: str, stream: FileStream, volume: Volume) -> StagedFile:
    if found.relative.rpartition("/")[2].startswith(("_", ".")):
        raise StagingError("names that start with '_' or '.' are not data; rename it")
    with found.open() as file:
        source = _Steady(file)
        problem = _folder_problem(stream, target) or _PROBLEMS[stream.format](source, stream, target)
        if problem:
            raise StagingError(problem)
        size = os.fstat(file.fileno()).st_size
        source.seek(0)
        new = volume.stat(target) is None and volume.upload(target, cast(BinaryIO, source))
        if not new:
            source.seek(0)
            if not _same_content(cast(BinaryIO, source), target, volume):
                raise StagingError(
                    f"{target} exists with other content; rename the file, or delete the one in the Volume"
                )
    return StagedFile(found.name, target, size, not new)


class _Steady(io.RawIOBase):
    """A file that must not change between its check and the end of its upload."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._before = self._signature()

    def close(self) -> None:
        """Leave the file open: whoever opened it closes it, and readers around this one close what they read."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        # After every piece, so that also the last one is known to be old before the store publishes it.
        if self._signature() != self._before:
            raise FileChangedError("it changed while it was being staged; stage it again when its writer is done")
        return len(data)

    def _signature(self) -> tuple[int, int]:
        info = os.fstat(self._file.fileno())
        return info.st_size, info.st_mtime_ns


def _folder_problem(stream: FileStream, target: str) -> str | None:
    """What is wrong with the folders that a file goes to, or None."""
    types = {column.name: column.type for column in declared_fields(stream, {}).values()}
    return partition_problem(stream, target, types)


def _parquet_problem(source: _Steady, stream: FileStream, target: str) -> str | None:
    """Why a Parquet file does not match, by its footer, or None."""
    schema = parquet_schema(cast(BinaryIO, source))
    names = set(schema.names)
    present = {c.name for c in stream.contract.columns if c.name in names}
    problem = _columns_problem(stream, present, schema.names, target)
    if problem:
        return problem
    held = {field.name: kind for field in schema if (kind := storable(field.type)) is not None}
    folders = partition_values(stream, target)
    for column in declared_fields(stream, held).values():
        if column.name in names and column.name not in folders:
            given = schema.field(column.name).type
            widens = stream.options.schema_evolution_mode == "addNewColumnsWithTypeWidening"
            if not fits(given, column.type) and not (widens and wider(column.type, given)):
                return f"column {column.name!r} is {given} in the file, and the stream says {delta_type(column.type)}"
    return None


def _json_problem(source: _Steady, stream: FileStream, target: str) -> str | None:
    """Why a JSON file does not match, by all its lines, or None."""
    contract = [column.name for column in stream.contract.columns]
    rows = 0
    valued: set[str] = set()
    folders = partition_values(stream, target)
    keys: dict[str, None] = {}

    def remember(columns: Columns) -> None:
        keys.update(dict.fromkeys(name for name, _ in columns))

    chunks = read_file(cast(BinaryIO, source), stream, _target(stream, []), "", on_columns=remember)
    for chunk in chunks:
        if chunk.corrupt_rows:
            corrupt = chunk.table[CORRUPT_RECORD]
            row = corrupt.is_valid().index(True).as_py()
            if stream.options.multi_line:
                return f"element {rows + row + 1} is no JSON object: {_start(corrupt[row].as_py())}"
            return _bad_line(source, rows + row)
        if contradicted := first_difference(folders, chunk.table):
            return _contradiction(contradicted)
        problem = _misfit(chunk, stream, rows)
        if problem:
            return problem
        rows += chunk.table.num_rows
        valued.update(name for name in contract if chunk.table[name].null_count < chunk.table.num_rows)
    if not rows:
        return "it has no records"
    return _columns_problem(stream, valued, list(keys), target)


def _csv_problem(source: _Steady, stream: FileStream, target: str) -> str | None:
    """Why a delimited file does not match, by its columns and all its records, or None."""
    names = [name for name, _ in file_columns(cast(BinaryIO, source), stream)]
    if not names:
        return "it has no records"
    contract = [column.name for column in stream.contract.columns]
    problem = _columns_problem(stream, {name for name in contract if name in names}, names, target)
    if problem:
        return problem
    source.seek(0)
    rows = 0
    for chunk in read_file(cast(BinaryIO, source), stream, _target(stream, names), ""):
        problem = _misfit(chunk, stream, rows)
        if problem:
            return problem
        for column, says in (
            (CORRUPT_RECORD, "can't be read"),
            (stream.options.rescued_data_column, "has more fields than the file has columns"),
        ):
            found = chunk.table[column]
            if found.null_count < len(found):
                row = found.is_valid().index(True).as_py()
                return f"record {rows + row + 1} {says}: {_start(found[row].as_py())}"
        if contradicted := first_difference(partition_values(stream, target), chunk.table):
            return _contradiction(contradicted)
        rows += chunk.table.num_rows
    return None if rows else "it has no records"


def _contradiction(column: str) -> str:
    return (
        f"column {column!r} has values that differ from the folder {column}=… it goes to; move it, or drop the column"
    )


def _target(stream: FileStream, names: Sequence[str]) -> pa.Schema:
    """What the stream declares, then these columns as text, then the columns for what does not fit."""
    declared = declared_fields(stream, {})
    others = [name for name in (*names, CORRUPT_RECORD, stream.options.rescued_data_column) if name not in declared]
    return pa.schema([*declared.values(), *(pa.field(name, pa.string()) for name in others)])


def _misfit(chunk: Chunk, stream: FileStream, before: int) -> str | None:
    """Which value of a typed column its type can't hold, or None.

    Args:
        chunk: Some records.
        stream: What they are for.
        before: How many records came before them.
    """
    typed = [field.name for field in chunk.table.schema if not is_string(field.type)]
    rescued = chunk.table[stream.options.rescued_data_column].combine_chunks()
    if not typed or not chunk.rescued_rows:
        return None
    rows = np.flatnonzero(rescued.is_valid())
    members = object_members(rescued.drop_null())
    found = np.flatnonzero(pc.is_in(members.keys, pa.array(typed)))
    if not len(found):
        return None
    name, value = members.keys[found[0]].as_py(), members.values[found[0]].as_py()
    kind = delta_type(chunk.table.schema.field(name).type)
    record = before + rows[members.owners[found[0]]] + 1
    return f"record {record} has {_start(value)} in column {name!r}, and {kind} can't hold it exactly"


_PROBLEMS = {"parquet": _parquet_problem, "json": _json_problem, "csv": _csv_problem}


def _columns_problem(stream: FileStream, present: set[str], names: Sequence[str], target: str) -> str | None:
    """What is wrong with a file's columns, or None.

    Args:
        stream: What the file is for.
        present: Columns of the contract that the file has.
        names: Columns that the file has; those of the contract may be left out.
        target: Where the file goes; its folders name columns too.
    """
    declared = declared_fields(stream, {})
    folders = set(partition_values(stream, target))
    lowered = {name.lower(): name for name in declared}
    own = {name.lower() for name in stream.own_columns}
    for name in names:
        if name in declared:
            continue
        if name.lower() in lowered:
            return f"column {name!r} differs from the contract's {lowered[name.lower()]!r} by case only; rename it"
        if name.lower() in own:
            return f"column {name!r} is a name of the loader's own; rename it"
        if stream.options.schema_evolution_mode == "rescue":
            return (
                f"column {name!r} is not in the contract, and the stream adds no columns (schema_evolution_mode=rescue)"
            )
        if not holdable(name):
            return f"column {name!r} has a name that a Delta table can't hold; rename it"
    missing = [c.name for c in stream.contract.columns if c.required and c.name not in present | folders]
    if missing:
        return f"required columns are missing: {', '.join(missing)}"
    if not present and {c.name for c in stream.contract.columns} - folders:
        return "it has none of the contract's columns"
    return None


def _bad_line(source: _Steady, row: int) -> str:
    """Name the line of a row; blank lines are no rows."""
    source.seek(0)
    for number, line in enumerate(_lines(unpacked(cast(BinaryIO, source))), 1):
        if line.strip(b" \t\r\n"):
            if row == 0:
                text = line.rstrip(b"\r").decode(errors="backslashreplace")
                return f"line {number} is no JSON object: {_start(text)}"
            row -= 1
    return "it has a corrupt record"


def _lines(opened: BinaryIO) -> Iterator[bytes]:
    left = b""
    while piece := opened.read(_COMPARED_BYTES):
        *whole, left = (left + piece).split(b"\n")
        yield from whole
    yield left


def _start(text: str) -> str:
    return f"{text[:_SHOWN]}{'…' if len(text) > _SHOWN else ''}"


def _same_content(source: BinaryIO, target: str, volume: Volume) -> bool:
    with volume.open(target) as there:
        while True:
            ours, theirs = source.read(_COMPARED_BYTES), there.read(_COMPARED_BYTES)
            if ours != theirs:
                return False
            if not ours:
                return True


def _shown(path: Path) -> str:
    """A path as text; bytes that are not UTF-8 are shown by their numbers."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
