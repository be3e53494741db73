"""Where a case runs: an engine, and a Volume into which an outside process lands files.

Belongs here: what the cases may know of an engine, and one platform per engine.
Does not belong here: cases. They use a platform's public methods and the `Engine` protocol, nothing else, so that a new
engine runs all of them by one more platform.

Three levels: every engine is a `Platform`; an engine that keeps its progress in our checkpoint files is a
`CheckpointPlatform`; one whose tables are Delta tables in a local folder is a `DeltaPlatform`.
"""

from __future__ import annotations

import os
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from telematics_assets.catalog import FileStream, Names
from telematics_assets.engines.base import Engine, FileState
from telematics_assets.engines.checkpointed import CheckpointEngine
from telematics_assets.engines.embedded import EmbeddedEngine
from telematics_assets.lakehouse.base import Lakehouse
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.testing import MemoryEngine
from telematics_assets.volumes.base import FileEntry, Listing, Volume, read_if_unchanged
from telematics_assets.volumes.local import LocalVolume

#: The landing Volume's name as a path, the same on every platform.
LOCATION = Names().volume_location
MINUTE_NS = 60_000_000_000

#: Moments of reading a file: before it is opened, after its first bytes were read, after it was closed.
Moment = Literal["open", "read", "close"]


class Platform(ABC):
    """An engine over an empty landing Volume."""

    def __init__(self) -> None:
        """Start an engine that takes every file at once, young or incomplete."""
        self.engine: Engine = self.new_engine()

    @abstractmethod
    def new_engine(self, *, settle_seconds: float = 0.0, incomplete_seconds: float = 0.0) -> Engine:
        """An engine as a fresh process has it, over the same storage."""

    @abstractmethod
    def volume_put(self, path: str, data: bytes, modified_ns: int | None = None) -> None:
        """Write a file as an outside process does, in one step; one that is there is replaced.

        Args:
            path: Relative to the Volume.
            data: Its content.
            modified_ns: Modification time, nanoseconds since the epoch; a minute ago if None.
        """

    @abstractmethod
    def remove(self, path: str) -> None:
        """Delete a file as an outside process does."""

    def restart(self, *, settle_seconds: float = 0.0, incomplete_seconds: float = 0.0) -> Engine:
        """Go on with a fresh process."""
        self.engine = self.new_engine(settle_seconds=settle_seconds, incomplete_seconds=incomplete_seconds)
        return self.engine

    def rows(self, stream: FileStream, *columns: str) -> list[dict[str, Any]]:
        """The table's rows as Python values: only these columns (all if none), sorted by the first, nulls first."""
        name = self.engine.names.bronze(stream.table)
        found: list[dict[str, Any]] = self.engine.read(name, columns or None).to_pylist()
        if not columns:
            return found
        assert all(list(row) == list(columns) for row in found), "a column is not in the table"
        return sorted(found, key=lambda row: (row[columns[0]] is not None, row[columns[0]]))

    def columns(self, stream: FileStream) -> dict[str, str]:
        """The table's data columns with their types, in order; the loader's own are left out."""
        state = self.engine.state(self.engine.names.bronze(stream.table))
        assert state is not None, "there is no table"
        return {c.name: c.type for c in state.columns if c.name not in stream.own_columns}

    def states(self, stream: FileStream) -> dict[str, FileState]:
        """Every file's state by its path below the stream's folder."""
        return {file.path.removeprefix(f"{stream.folder}/"): file.state for file in self.engine.files(stream)}

    def reason(self, stream: FileStream, name: str) -> str:
        """Why a file is in its state."""
        (file,) = [file for file in self.engine.files(stream) if file.path == f"{stream.folder}/{name}"]
        assert file.reason is not None
        return file.reason


class CheckpointPlatform(Platform):
    """A platform whose engine keeps its progress in our checkpoint files, and reads through our Volumes."""

    #: Where a case breaks off at one moment after the other, a short run takes every so many-th.
    stride = 1
    #: The wall clock of engines that are made from here on, nanoseconds since the epoch.
    clock: Callable[[], int] = staticmethod(time.time_ns)

    @property
    @abstractmethod
    def volume(self) -> Volume:
        """The landing Volume."""

    @property
    @abstractmethod
    def lakehouse(self) -> Lakehouse:
        """The tables."""

    def new_engine(self, *, settle_seconds: float = 0.0, incomplete_seconds: float = 0.0) -> CheckpointEngine:
        """See `Platform.new_engine`."""
        return self.engine_over(settle_seconds=settle_seconds, incomplete_seconds=incomplete_seconds)

    def engine_over(self, volume: Volume | None = None, **options: Any) -> CheckpointEngine:
        """An engine as a fresh process has it, which takes every file at once unless the options say otherwise.

        Args:
            volume: Stands between the engine and the landing Volume.
            **options: See `CheckpointEngine`.
        """
        options = {"settle_seconds": 0.0, "incomplete_seconds": 0.0, "clock": self.clock, **options}
        return self._engine(volume or self.volume, options)

    def _engine(self, volume: Volume, options: dict[str, Any]) -> CheckpointEngine:
        return EmbeddedEngine(volume, self.lakehouse, Names(), **options)

    def engine_when(
        self,
        now_ns: Callable[[], int],
        on_step: Callable[[str], None] | None = None,
        volume: Volume | None = None,
    ) -> Engine:
        """An engine as a fresh process has it, with a clock of its own.

        Args:
            now_ns: The clock, nanoseconds since the epoch.
            on_step: Told every step; what it raises ends the process there.
            volume: Stands between the engine and the landing Volume.
        """
        return self.engine_over(volume, on_step=on_step, clock=now_ns)

    def checkpoint(self, stream: FileStream) -> dict[str, bytes]:
        """A copy of the stream's checkpoint: content by path below its folder."""
        root = f"_checkpoints/{stream.name}"
        parts = ("metadata", "offsets", "results", "commits", "ledger")
        names = [f"{part}/{name}" for part in parts for name in self.volume.names(f"{root}/{part}")]
        return {name: self.volume.read(f"{root}/{name}") for name in names}

    def put_checkpoint(self, stream: FileStream, copy: dict[str, bytes]) -> None:
        """Replace the stream's checkpoint by a copy."""
        root = f"_checkpoints/{stream.name}"
        for name in self.checkpoint(stream):
            self.volume.delete(f"{root}/{name}")
        for name, data in copy.items():
            assert self.volume.create(f"{root}/{name}", data)

    def meddle(self, path: str, moment: Moment, action: Callable[[], None], nth: int = 1) -> None:
        """Go on with a process during which something happens when a file is opened for the nth time."""
        self.engine = self.engine_over(_MeddledVolume(self.volume, path, moment, action, nth))


class MemoryPlatform(CheckpointPlatform):
    """The engine of `telematics_assets.testing`."""

    def __init__(self) -> None:
        """Start it."""
        self._memory = MemoryEngine()
        super().__init__()
        self.engine = self._memory

    @property
    def volume(self) -> Volume:
        """See `CheckpointPlatform.volume`."""
        return self._memory.volume

    @property
    def lakehouse(self) -> Lakehouse:
        """See `CheckpointPlatform.lakehouse`."""
        return self._memory.lakehouse

    def volume_put(self, path: str, data: bytes, modified_ns: int | None = None) -> None:
        """See `Platform.volume_put`."""
        self._memory.volume.put(path, data, modified_ns=modified_ns)

    def remove(self, path: str) -> None:
        """See `Platform.remove`."""
        self._memory.volume.delete(path)


class DeltaPlatform(CheckpointPlatform):
    """The embedded engine: a local folder as Volume, Delta tables beside it."""

    def __init__(self, home: Path) -> None:
        """Start it in an empty folder."""
        self.home = home
        self._root = home / LOCATION.lstrip("/")
        self._volume = LocalVolume(self._root, LOCATION)
        self._lakehouse = DeltaLakehouse(home / "tables")
        super().__init__()

    @property
    def volume(self) -> Volume:
        """See `CheckpointPlatform.volume`."""
        return self._volume

    @property
    def lakehouse(self) -> Lakehouse:
        """See `CheckpointPlatform.lakehouse`."""
        return self._lakehouse

    def volume_put(self, path: str, data: bytes, modified_ns: int | None = None) -> None:
        """See `Platform.volume_put`."""
        target = self._root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{uuid.uuid4().hex}")
        temporary.write_bytes(data)
        when = time.time_ns() - MINUTE_NS if modified_ns is None else modified_ns
        os.utime(temporary, ns=(when, when))
        temporary.rename(target)

    def remove(self, path: str) -> None:
        """See `Platform.remove`."""
        (self._root / path).unlink()

    def at(self, path: str) -> Path:
        """A path of the Volume on disk."""
        return self._root / path

    def table_path(self, stream: FileStream) -> Path:
        """The stream's Delta table on disk."""
        return self.home / "tables" / Names().bronze(stream.table).location


class _MeddledVolume:
    """A Volume in which something happens to one file while it is read, once."""

    def __init__(self, volume: Volume, path: str, moment: Moment, action: Callable[[], None], nth: int) -> None:
        self._volume = volume
        self._path = path
        self._moment = moment
        self._action = action
        self._left = nth
        self.location = volume.location
        self.uri = volume.uri

    @contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        if path != self._path:
            with self._volume.open(path) as source:
                yield source
            return
        self._left -= 1
        now = self._left == 0
        if now and self._moment == "open":
            self._action()
        with self._volume.open(path) as source:
            yield cast(BinaryIO, _MeddledSource(source, self._action)) if now and self._moment == "read" else source
        if now and self._moment == "close":
            self._action()

    def scan(self, folder: str, from_path: str = "") -> Listing:
        return self._volume.scan(folder, from_path)

    def names(self, folder: str) -> list[str]:
        return self._volume.names(folder)

    def stat(self, path: str) -> FileEntry | None:
        return self._volume.stat(path)

    def read(self, path: str) -> bytes:
        return self._volume.read(path)

    def read_unchanged(self, files: Sequence[FileEntry]) -> list[bytes | None]:
        return [read_if_unchanged(self, file) for file in files]

    def create(self, path: str, data: bytes) -> bool:
        return self._volume.create(path, data)

    def upload(self, path: str, source: BinaryIO, *, modified_ns: int | None = None) -> bool:
        return self._volume.upload(path, source, modified_ns=modified_ns)

    def delete(self, path: str) -> None:
        self._volume.delete(path)

    def remove(self, file: FileEntry) -> bool:
        return self._volume.remove(file)


class _MeddledSource:
    """An open file; the action comes after the first bytes of it were read."""

    closed = False

    def __init__(self, source: BinaryIO, action: Callable[[], None]) -> None:
        self._source = source
        self._action: Callable[[], None] | None = action

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(size)
        if self._action is not None:
            action, self._action = self._action, None
            action()
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._source.seek(offset, whence)

    def tell(self) -> int:
        return self._source.tell()


def _spark(home: Path) -> DeltaPlatform:
    # Only where it is asked for: it needs Spark.
    from telematics_assets_tests.conformance.spark import SparkPlatform

    return SparkPlatform(home)


DELTA_PLATFORMS: dict[str, Callable[[Path], DeltaPlatform]] = {"embedded": DeltaPlatform, "spark": _spark}
CHECKPOINT_PLATFORMS: dict[str, Callable[[Path], CheckpointPlatform]] = {
    **DELTA_PLATFORMS,
    "memory": lambda _: MemoryPlatform(),
}
#: Every platform by name; a later engine is one more entry.
PLATFORMS: dict[str, Callable[[Path], Platform]] = {**CHECKPOINT_PLATFORMS}
