"""Where Delta tables are kept: a local folder, or an object store.

Belongs here: what `delta.py` needs of the place itself: finding and dropping tables, reading log entries and rows,
writing files.
Does not belong here: what a Delta log says (`delta.py`), the landing Volume (`volumes/`).

A commit in an object store is the conditional put of the log entry, ours or delta-rs', durable once acknowledged.
"""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote

import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from telematics_assets.catalog import BATCH_ID
from telematics_assets.errors import TableUnsupportedError
from telematics_assets.volumes.local import LocalVolume, sync_folder, translate

if TYPE_CHECKING:
    from deltalake import DeltaTable


#: A log entry that no reader and no writer can handle.
_SHUT = b'{"protocol":{"minReaderVersion":99,"minWriterVersion":99}}\n'
#: Rows of a piece of a whole table, and its values: a wide table comes in pieces of fewer rows.
STREAM_ROWS = 65_536
STREAM_VALUES = 4 << 20


class TableStore(Protocol):
    """The place of a deployment's tables. `path` is where one table is, as `at` gives it."""

    @property
    def uri(self) -> str:
        """Where the tables are."""
        ...

    @property
    def options(self) -> dict[str, str] | None:
        """Storage options of delta-rs."""
        ...

    @property
    def durable(self) -> bool:
        """Whether what was written is safe without being synced."""
        ...

    def at(self, location: str) -> str:
        """Where the table of a relative location is."""
        ...

    def names(self, folder: str) -> Sequence[str]:
        """Names in a relative folder that have a Delta log, sorted."""
        ...

    def is_empty(self, path: str) -> bool:
        """Whether there is surely no table, without asking delta-rs."""
        ...

    def make_room(self, path: str) -> None:
        """Prepare for a new table."""
        ...

    def drop(self, path: str) -> None:
        """Remove a table; none there is no error."""
        ...

    def read_log(self, entry: str) -> bytes:
        """A log entry, by its full path.

        Raises:
            FileNotFoundError: If it is not there.
        """
        ...

    def log_entries(self, path: str) -> int:
        """How many files the log of a table has."""
        ...

    def publish(self, entry: str, data: bytes) -> bool:
        """Write a log entry, by its full path, if there is none; whether it is there by this call."""
        ...

    def write_file(self, path: str) -> AbstractContextManager[Any]:
        """A new file to write, by its full path: it is safely there once the block has ended without an error.

        What the block gets has `write` and `tell`.
        """
        ...

    def open_file(self, path: str) -> Any:
        """A data file to read, by its full path, as Arrow takes it; only what is asked for is read where possible.

        Raises:
            FileNotFoundError: If there is none.
        """
        ...

    def discard(self, path: str) -> None:
        """Remove a file that no log names, by its full path, if that is possible."""
        ...

    def rows(
        self, handle: DeltaTable, path: str, columns: Sequence[str], limit: int | None, since_batch: int | None
    ) -> pa.Table:
        """Rows of an open table, newest data files first; all if there is no limit."""
        ...

    def scan(
        self, handle: DeltaTable, path: str, file_column: str | None = None, files: Sequence[str] | None = None
    ) -> pl.LazyFrame:
        """All rows of an open table; columns that a data file lacks are null.

        Args:
            handle: The open table.
            path: Where it is.
            file_column: Name of a further column, which holds the path of the row's data file.
            files: The data files to read, as the log names them; all if None.
        """
        ...

    def collect(self, frame: pl.LazyFrame) -> pl.DataFrame:
        """The result of what `scan` gave."""
        ...

    def stream(self, frame: pl.LazyFrame) -> Iterator[pl.DataFrame]:
        """The result of what `scan` gave, piece by piece in bounded memory."""
        ...

    def explain(self, error: Exception, path: str) -> Exception | None:
        """What the place has to do with an error of delta-rs; None if it says nothing of it."""
        ...


class LocalStore:
    """Tables below a local folder."""

    options: dict[str, str] | None = None
    durable = False

    def __init__(self, root: Path) -> None:
        """Use a folder; it is created at the first write."""
        self._root = Path(os.path.abspath(root))

    @property
    def uri(self) -> str:
        """The folder's absolute path."""
        return str(self._root)

    def at(self, location: str) -> str:
        """See `TableStore.at`."""
        return str(self._root / location)

    def names(self, folder: str) -> Sequence[str]:
        """See `TableStore.names`."""
        path = self._root / folder
        if not path.is_dir():
            return []
        return sorted(p.name for p in path.iterdir() if (p / "_delta_log").is_dir())

    def is_empty(self, path: str) -> bool:
        """See `TableStore.is_empty`."""
        return not os.path.isdir(path)

    def make_room(self, path: str) -> None:
        """See `TableStore.make_room`."""
        os.makedirs(path, exist_ok=True)

    def drop(self, path: str) -> None:
        """See `TableStore.drop`."""
        # Out of sight in one step: a half deleted table is never seen.
        folder, table = os.path.split(path)
        hidden = f"{folder}/.{table}.{uuid.uuid4().hex}.dropped"
        try:
            os.rename(path, hidden)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise translate(error, path) from error
        else:
            sync_folder(folder)
        # One that died half-way left its own behind.
        for left in Path(folder).glob(f".{glob.escape(table)}.*.dropped"):
            shutil.rmtree(left, ignore_errors=True)

    def read_log(self, entry: str) -> bytes:
        """See `TableStore.read_log`."""
        with open(entry, "rb") as handle:
            return handle.read()

    def log_entries(self, path: str) -> int:
        """See `TableStore.log_entries`."""
        return len(os.listdir(os.path.join(path, "_delta_log")))

    def publish(self, entry: str, data: bytes) -> bool:
        """See `TableStore.publish`."""
        folder, _, name = entry.rpartition("/")
        return LocalVolume(Path(folder), folder).create(name, data)

    @contextmanager
    def write_file(self, path: str) -> Iterator[Any]:
        """See `TableStore.write_file`."""
        with pa.OSFile(path, "wb") as file:
            yield file
            file.flush()
            # A log entry on disk that names a file which is not there yet would be a table that nobody can read.
            os.fsync(file.fileno())
        sync_folder(os.path.dirname(path))

    def open_file(self, path: str) -> Any:
        """See `TableStore.open_file`."""
        return pa.OSFile(path)

    def discard(self, path: str) -> None:
        """See `TableStore.discard`."""
        with suppress(OSError):
            os.unlink(path)

    def rows(
        self, handle: DeltaTable, path: str, columns: Sequence[str], limit: int | None, since_batch: int | None
    ) -> pa.Table:
        """See `TableStore.rows`."""
        # Arrow's threads must not call back into Python (deltalake's own file system does): a process that ends soon
        # after a read then aborts, crashes or hangs.
        files = SubTreeFileSystem(path, LocalFileSystem())
        dataset = handle.to_pyarrow_dataset(filesystem=files)
        rows = None if since_batch is None else ds.field(BATCH_ID) >= since_batch
        if limit is None:
            return dataset.to_table(columns=columns, filter=rows)
        # Not `dataset.head`: it returns while its threads still read ahead, with the same end.
        parts: list[pa.Table] = []
        for fragment in dataset.get_fragments(filter=rows):
            for group in fragment.split_by_row_group(filter=rows, schema=dataset.schema):
                part = group.to_table(schema=dataset.schema, columns=columns, filter=rows).slice(0, limit)
                parts.append(part)
                limit -= part.num_rows
                if not limit:
                    return pa.concat_tables(parts)
        return pa.concat_tables(parts) if parts else dataset.schema.empty_table().select(columns)

    def scan(
        self, handle: DeltaTable, path: str, file_column: str | None = None, files: Sequence[str] | None = None
    ) -> pl.LazyFrame:
        """See `TableStore.scan`."""
        return scan(handle, path, None, file_column, files)

    def collect(self, frame: pl.LazyFrame) -> pl.DataFrame:
        """See `TableStore.collect`."""
        return frame.collect(engine="streaming")

    def stream(self, frame: pl.LazyFrame) -> Iterator[pl.DataFrame]:
        """See `TableStore.stream`."""
        return pieces(frame)

    def explain(self, error: Exception, path: str) -> Exception | None:
        """See `TableStore.explain`."""
        return None


class ObjectTableStore:
    """Tables below a URL of an object store. Credentials come from the environment, as the libraries read them."""

    durable = True

    def __init__(self, url: str) -> None:
        """Use a URL; nothing is sent yet.

        Args:
            url: See `volumes.objects.open_store`.

        Raises:
            MissingExtraError: If obstore is not installed.
            VolumeError: If the environment lacks what the store needs.
        """
        from telematics_assets.volumes import objects

        self._objects = objects
        self._url = url.rstrip("/")
        self._store = objects.open_store(self._url)
        self.options: dict[str, str] | None = objects.storage_options(self._url)

    @property
    def uri(self) -> str:
        """The URL."""
        return self._url

    def at(self, location: str) -> str:
        """See `TableStore.at`."""
        return f"{self._url}/{location}"

    def names(self, folder: str) -> Sequence[str]:
        """See `TableStore.names`."""
        with self._objects.translating(self.at(folder)):
            found = self._store.list_with_delimiter(folder)["common_prefixes"]
            # The first page tells whether there is a log at all.
            held = [path for path in found if any(self._store.list(f"{path}/_delta_log"))]
        return sorted(path.rpartition("/")[2] for path in held)

    def is_empty(self, path: str) -> bool:
        """See `TableStore.is_empty`."""
        return False

    def make_room(self, path: str) -> None:
        """See `TableStore.make_room`."""

    def drop(self, path: str) -> None:
        """See `TableStore.drop`."""
        key = self._key(path)
        with self._objects.translating(path):
            # Nothing can be renamed in one step. A log that lost its newest entries is an older table, whose data files
            # may be gone; one that lost its oldest may still open without their rows. So its end goes last, and says
            # that no reader and no writer can handle the table.
            end = self._seal(f"{key}/_delta_log")
            self._delete([o["path"] for o in self._store.list(key).collect() if o["path"] != end])
            if end is not None:
                self._delete([end])

    def read_log(self, entry: str) -> bytes:
        """See `TableStore.read_log`."""
        try:
            return bytes(self._store.get(self._key(entry)).bytes())
        except FileNotFoundError:
            raise
        except self._objects.STORE_ERRORS as error:
            raise self._objects.translate(error, entry) from error

    def log_entries(self, path: str) -> int:
        """See `TableStore.log_entries`."""
        with self._objects.translating(path):
            return len(self._store.list(f"{self._key(path)}/_delta_log").collect())

    def publish(self, entry: str, data: bytes) -> bool:
        """See `TableStore.publish`."""
        return self._objects.ObjectVolume(self._url, self._url).create(self._key(entry), data)

    @contextmanager
    def write_file(self, path: str) -> Iterator[Any]:
        """See `TableStore.write_file`. It passes through a local temporary file: a put has all of it or nothing."""
        with tempfile.TemporaryFile() as whole:
            yield whole
            whole.seek(0)
            self._objects.ObjectVolume(self._url, self._url).upload(self._key(path), whole)

    def open_file(self, path: str) -> Any:
        """See `TableStore.open_file`."""
        return pa.BufferReader(self.read_log(path))

    def discard(self, path: str) -> None:
        """See `TableStore.discard`."""
        with suppress(FileNotFoundError, *self._objects.STORE_ERRORS):
            self._store.delete(self._key(path))

    def rows(
        self, handle: DeltaTable, path: str, columns: Sequence[str], limit: int | None, since_batch: int | None
    ) -> pa.Table:
        """See `TableStore.rows`."""
        schema = pa.schema([pa.schema(handle.schema()).field(name) for name in columns])
        frame = self.scan(handle, path)
        if since_batch is not None:
            frame = frame.filter(pl.col(BATCH_ID) >= since_batch)
        frame = frame.select(columns)
        found = self.collect(frame if limit is None else frame.head(limit))
        return found.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(schema)

    def scan(
        self, handle: DeltaTable, path: str, file_column: str | None = None, files: Sequence[str] | None = None
    ) -> pl.LazyFrame:
        """See `TableStore.scan`."""
        return scan(handle, path, self._objects.polars_options(), file_column, files)

    def collect(self, frame: pl.LazyFrame) -> pl.DataFrame:
        """See `TableStore.collect`."""
        with self._objects.translating(self._url):
            return frame.collect(engine="streaming")

    def stream(self, frame: pl.LazyFrame) -> Iterator[pl.DataFrame]:
        """See `TableStore.stream`."""
        with self._objects.translating(self._url):
            yield from pieces(frame)

    def explain(self, error: Exception, path: str) -> Exception | None:
        """See `TableStore.explain`."""
        return self._objects.translate(error, path) if self._objects.is_of_a_store(error) else None

    def _key(self, path: str) -> str:
        return path.removeprefix(f"{self._url}/")

    def _seal(self, log: str) -> str | None:
        """End a log by an entry that shuts everybody out; its path, or None if there is no log."""
        from obstore import exceptions

        while numbers := [
            int(name[0])
            for o in self._store.list(log).collect()
            if (name := o["path"].rpartition("/")[2].split("."))[0].isdigit()
        ]:
            end = f"{log}/{max(numbers) + 1:020d}.json"
            try:
                self._store.put(end, _SHUT, mode="create")
            except exceptions.AlreadyExistsError:
                # A loader committed in between.
                continue
            return end
        return None

    def _delete(self, keys: list[str]) -> None:
        try:
            self._store.delete(keys)
        except FileNotFoundError:
            # Another drop was faster with one of them.
            for key in keys:
                if self._store.list(key).collect():
                    raise


def scan(
    handle: DeltaTable,
    path: str,
    options: dict[str, Any] | None,
    file_column: str | None = None,
    files: Sequence[str] | None = None,
) -> pl.LazyFrame:
    """All rows of an open table, by polars; see `TableStore.scan`."""
    if "deletionVectors" in (handle.protocol().reader_features or ()):
        raise TableUnsupportedError(
            f"The table at {path} has deletion vectors, which this engine can't read. Drop that table feature."
        )
    # Not `pl.scan_delta`: it takes a path's URL for the path, and finds nothing behind a blank or an umlaut.
    schema = pl.DataFrame(pa.schema(handle.schema()).empty_table()).schema
    paths = pa.table(handle.get_add_actions()).column("path").to_pylist() if files is None else files
    if not paths:
        return pl.LazyFrame(schema={**schema, **({file_column: pl.String} if file_column else {})})
    return pl.scan_parquet(
        [f"{path}/{unquote(name)}" for name in paths],
        schema=schema,
        missing_columns="insert",
        # Spark's merges leave an empty column for the change data feed in them.
        extra_columns="ignore",
        glob=False,
        hive_partitioning=False,
        include_file_paths=file_column,
        storage_options=options,
        credential_provider=None,
    )


def pieces(frame: pl.LazyFrame) -> Iterator[pl.DataFrame]:
    """The result of what `scan` gave, piece by piece; see `TableStore.stream`."""
    rows = min(STREAM_ROWS, max(1, STREAM_VALUES // len(frame.collect_schema())))
    return iter(frame.collect_batches(chunk_size=rows, lazy=True, engine="streaming"))
