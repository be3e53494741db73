"""A pooler or a network that says nothing more, and never says goodbye: a batch must not wait for ever.

Belongs here: finding the socket of a connection that is being opened, and ending it when an answer does not come.
Does not belong here: a network that is down, which the keep-alive of the connection notices (`connection.py`); what
is asked (`session.py`), Dagster.

The driver waits without a limit and can't be interrupted, nor does it tell its socket. So the socket is found among
those of this process, and shut down from another thread: the driver then sees a connection that is closed.
"""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_OPENING = threading.Lock()
_OPENING_SECONDS = 60.0
_FILES = "/dev/fd"

#: Both ends of a connection.
_Ends = tuple[object, object]


class Watch:
    """Watches over one connection."""

    def __init__(self, port: int, seconds: float, is_at_it: Callable[[], bool] | None = None) -> None:
        """Watch over nothing yet.

        Args:
            port: Where the other side listens.
            seconds: How long an answer may take.
            is_at_it: Asked when it takes longer: whether the other side still works on it. Nobody does, if None.
        """
        self._port = port
        self._seconds = seconds
        self._is_at_it = is_at_it
        self._mine: frozenset[_Ends] | None = None
        self._others: frozenset[_Ends] = frozenset()
        #: Whether the connection was ended.
        self.fired = False

    @contextmanager
    def opening(self) -> Iterator[None]:
        """The connection is opened in this block, and no other one that is watched."""
        with _OPENING:
            self._mine, self._others, self.fired = None, self._sockets(), False
            # Nothing takes long there; and whoever asks must open a connection, too.
            with self._guarded(min(self._seconds, _OPENING_SECONDS), None):
                yield
            self._mine = self._sockets() - self._others

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """An answer is waited for in this block."""
        with self._guarded(self._seconds, self._is_at_it):
            yield

    @contextmanager
    def _guarded(self, seconds: float, is_at_it: Callable[[], bool] | None) -> Iterator[None]:
        over = threading.Event()
        guard = threading.Thread(target=self._guard, args=[over, seconds, is_at_it], name="silence", daemon=True)
        guard.start()
        try:
            yield
        finally:
            over.set()

    def _guard(self, over: threading.Event, seconds: float, is_at_it: Callable[[], bool] | None) -> None:
        while not over.wait(seconds):
            if is_at_it is None or not is_at_it():
                break
        if not over.is_set():
            self.fired = True
            self._sockets(self._shut)

    def _sockets(self, found: Callable[[socket.socket], None] | None = None) -> frozenset[_Ends]:
        """Connections of this process to the port; each of ours is handed to a function."""
        ends: set[_Ends] = set()
        if not os.path.isdir(_FILES):
            return frozenset()
        for name in os.listdir(_FILES):
            with suppress(OSError):
                if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                    continue
                with socket.socket(fileno=os.dup(int(name))) as each:
                    there = each.getpeername()
                    if each.family not in (socket.AF_INET, socket.AF_INET6) or there[1] != self._port:
                        continue
                    both = (each.getsockname(), there)
                    ends.add(both)
                    if found and (both not in self._others if self._mine is None else both in self._mine):
                        found(each)
        return frozenset(ends)

    @staticmethod
    def _shut(each: socket.socket) -> None:
        each.shutdown(socket.SHUT_RDWR)
