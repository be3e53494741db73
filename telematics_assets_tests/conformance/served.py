"""A test's Volume within reach of Spark's tasks.

Belongs here: how a Volume whose behaviour lives in the test's process is read from another process.
Does not belong here: the behaviours themselves; they stand with their cases.

Tasks run in Python workers. A Volume that breaks something, or counts, must be one object: it stays in the test's
process, and what tasks are given asks it over a loopback socket.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, BinaryIO, cast
from weakref import WeakValueDictionary

from telematics_assets.volumes.base import FileEntry, Listing, Volume

_numbers = itertools.count()
_served: WeakValueDictionary[int, Served] = WeakValueDictionary()


class Served:
    """Another Volume: itself in this process, reached from here in every other."""

    def __init__(self, volume: Volume) -> None:
        """Serve a Volume as long as this object lives."""
        self.volume = volume
        self.location, self.uri = volume.location, volume.uri
        self.scan, self.names, self.stat = volume.scan, volume.names, volume.stat
        self.open, self.read, self.read_unchanged = volume.open, volume.read, volume.read_unchanged
        self.create, self.upload = volume.create, volume.upload
        self.delete, self.remove = volume.delete, volume.remove
        self.ended: BaseException | None = None
        self._number = next(_numbers)
        _served[self._number] = self

    def __reduce__(self) -> tuple[type[_Afar], tuple[object, ...]]:
        """What is sent to tasks; a process that has ended meanwhile sends nothing more."""
        if self.ended is not None:
            raise self.ended
        return _Afar, (*_server(), self._number, self.location, self.uri)


@functools.cache
def _server() -> tuple[Any, bytes]:
    """Where all Volumes of this process are served, and the key to it."""
    key = os.urandom(32)
    listener = Listener(("127.0.0.1", 0), backlog=16, authkey=key)

    def accept() -> None:
        while True:
            with suppress(OSError, EOFError):
                connection = listener.accept()
                threading.Thread(target=_serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener.address, key


def _serve(connection: Connection) -> None:
    """Answer one question about a Volume, or all about one open file."""
    opened: list[BinaryIO] = []
    with suppress(EOFError, OSError), connection, ExitStack() as stack:
        while True:
            number, method, arguments = connection.recv()
            served = _served[number]
            answer: Any = None
            try:
                if method == "open":
                    opened.append(stack.enter_context(served.open(*arguments)))
                elif method == "close":
                    stack.close()
                else:
                    answer = getattr(opened[0] if opened else served, method)(*arguments)
                connection.send((True, answer))
            except Exception as error:  # noqa: BLE001 - it is the task's
                connection.send((False, error))
            except BaseException as error:  # noqa: BLE001 - it is the driver's
                # It ends the process that a case speaks of: tasks fail, and so does the driver's next word to Spark.
                served.ended = error
                connection.send((False, RuntimeError("the driver has ended")))


class _Afar:
    """The Volume, as a task sees it."""

    def __init__(self, address: Any, key: bytes, number: int, location: str, uri: str) -> None:
        self._address, self._key, self._number = address, key, number
        self.location, self.uri = location, uri

    def scan(self, folder: str, from_path: str = "") -> Listing:
        return cast(Listing, self._ask("scan", folder, from_path))

    def names(self, folder: str) -> list[str]:
        return cast(list[str], self._ask("names", folder))

    def stat(self, path: str) -> FileEntry | None:
        return cast(FileEntry | None, self._ask("stat", path))

    def read(self, path: str) -> bytes:
        return cast(bytes, self._ask("read", path))

    def read_unchanged(self, files: Sequence[FileEntry]) -> list[bytes | None]:
        return cast("list[bytes | None]", self._ask("read_unchanged", list(files)))

    @contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        with self._asking() as ask:
            ask("open", path)
            source = _Source(ask)
            yield cast(BinaryIO, source)
            source.closed = True
            ask("close")

    def _ask(self, method: str, *arguments: object) -> Any:
        with self._asking() as ask:
            return ask(method, *arguments)

    @contextmanager
    def _asking(self) -> Iterator[Callable[..., Any]]:
        with Client(self._address, authkey=self._key) as connection:

            def ask(method: str, *arguments: object) -> Any:
                connection.send((self._number, method, arguments))
                went_well, answer = connection.recv()
                if went_well:
                    return answer
                raise answer

            yield ask


class _Source:
    """An open file of it."""

    closed = False

    def __init__(self, ask: Callable[..., Any]) -> None:
        self._ask = ask

    def read(self, size: int = -1) -> bytes:
        return cast(bytes, self._ask("read", size))

    def seek(self, offset: int, whence: int = 0) -> int:
        return cast(int, self._ask("seek", offset, whence))

    def tell(self) -> int:
        return cast(int, self._ask("tell"))
