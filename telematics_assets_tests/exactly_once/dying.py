"""Death inside one process: a Volume whose process dies before the nth thing that it publishes or deletes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

from telematics_assets.volumes.base import FileEntry, Listing, Volume, read_if_unchanged
from telematics_assets_tests.exactly_once.test_kills import Killed


class Death:
    """Comes after a number of things were done, and stays."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self) -> None:
        """Do one more thing, or die."""
        self.left -= 1
        if self.left < 0:
            raise Killed


class DyingVolume:
    """Another Volume, as a process sees it that dies."""

    def __init__(self, volume: Volume, death: Death) -> None:
        self._volume = volume
        self._death = death
        self.location = volume.location
        self.uri = volume.uri

    def read_unchanged(self, files: Sequence[FileEntry]) -> list[bytes | None]:
        return [read_if_unchanged(self, file) for file in files]

    def create(self, path: str, data: bytes) -> bool:
        self._death()
        return self._volume.create(path, data)

    def delete(self, path: str) -> None:
        self._death()
        self._volume.delete(path)

    def remove(self, file: FileEntry) -> bool:
        self._death()
        return self._volume.remove(file)

    def upload(self, path: str, source: BinaryIO, *, modified_ns: int | None = None) -> bool:
        return self._volume.upload(path, source, modified_ns=modified_ns)

    @contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        with self._volume.open(path) as source:
            yield source

    def scan(self, folder: str, from_path: str = "") -> Listing:
        return self._volume.scan(folder, from_path)

    def names(self, folder: str) -> list[str]:
        return self._volume.names(folder)

    def stat(self, path: str) -> FileEntry | None:
        return self._volume.stat(path)

    def read(self, path: str) -> bytes:
        return self._volume.read(path)
