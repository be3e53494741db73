"""A Volume in memory, for tests and notebooks.

Belongs here: the store protocol over a dict. Does not belong here: anything a real store can't do.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import polars as pl

from telematics_assets.errors import FileMissingError
from telematics_assets.volumes.base import FileEntry, Listing, check_path, read_if_unchanged


@dataclass(frozen=True, slots=True)
class _Stored:
    data: bytes
    modified_ns: int
    etag: str


class MemoryVolume:
    """A Volume that keeps its files in memory. Safe to use from several threads."""

    def __init__(self, location: str = "/Volumes/workspace/00_landing/telematics") -> None:
        """Make an empty Volume.

        Args:
            location: The Volume's name as a path.
        """
        self.location = location
        self._files: dict[str, _Stored] = {}
        self._lock = threading.Lock()
        self._etags = 0

    @property
    def uri(self) -> str:
        """`memory:` and the location."""
        return f"memory:{self.location}"

    def put(self, path: str, data: bytes, *, modified_ns: int | None = None) -> None:
        """Write a file the way an outside process would: an existing one is replaced.

        Args:
            path: Where.
            data: Its content.
            modified_ns: Modification time; one minute ago if None, so that nobody waits for it to settle.
        """
        check_path(path)
        when = time.time_ns() - 60_000_000_000 if modified_ns is None else modified_ns
        with self._lock:
            self._files[path] = self._stored(data, when)

    def scan(self, folder: str, from_path: str = "") -> Listing:
        """See `Volume.scan`."""
        start = len(check_path(folder)) + 1
        with self._lock:
            found = [
                (path, len(file.data), file.modified_ns, file.etag)
                for path, file in self._files.items()
                if path.startswith(f"{folder}/")
                and path >= from_path
                and not any(p[0] in "_." for p in path[start:].split("/"))
            ]
        schema = {"path": pl.String, "size": pl.Int64, "modified_ns": pl.Int64, "etag": pl.String}
        return Listing(pl.DataFrame(found, schema=schema, orient="row"))

    def names(self, folder: str) -> list[str]:
        """See `Volume.names`."""
        prefix = f"{check_path(folder)}/"
        with self._lock:
            return sorted(p[len(prefix) :] for p in self._files if p.startswith(prefix) and "/" not in p[len(prefix) :])

    def stat(self, path: str) -> FileEntry | None:
        """See `Volume.stat`."""
        with self._lock:
            file = self._files.get(check_path(path))
        return None if file is None else FileEntry(path, len(file.data), file.modified_ns, file.etag)

    @contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        """See `Volume.open`."""
        yield io.BytesIO(self.read(path))

    def read(self, path: str) -> bytes:
        """See `Volume.read`."""
        with self._lock:
            file = self._files.get(check_path(path))
        if file is None:
            raise FileMissingError(f"{path} does not exist. List the folder to see what is there.")
        return file.data

    def read_unchanged(self, files: Sequence[FileEntry]) -> list[bytes | None]:
        """See `Volume.read_unchanged`."""
        return [read_if_unchanged(self, file) for file in files]

    def create(self, path: str, data: bytes) -> bool:
        """See `Volume.create`."""
        return self._publish(path, data, time.time_ns())

    def upload(self, path: str, source: BinaryIO, *, modified_ns: int | None = None) -> bool:
        """See `Volume.upload`."""
        return self._publish(path, source.read(), time.time_ns() if modified_ns is None else modified_ns)

    def delete(self, path: str) -> None:
        """See `Volume.delete`."""
        with self._lock:
            self._files.pop(check_path(path), None)

    def remove(self, file: FileEntry) -> bool:
        """See `Volume.remove`."""
        with self._lock:
            there = self._files.get(check_path(file.path))
            if there is None or (len(there.data), there.modified_ns, there.etag) != (
                file.size,
                file.modified_ns,
                file.etag,
            ):
                return False
            del self._files[file.path]
            return True

    def _publish(self, path: str, data: bytes, modified_ns: int) -> bool:
        check_path(path)
        with self._lock:
            if path in self._files:
                return False
            self._files[path] = self._stored(data, modified_ns)
            return True

    def _stored(self, data: bytes, modified_ns: int) -> _Stored:
        self._etags += 1
        return _Stored(data, modified_ns, str(self._etags))
