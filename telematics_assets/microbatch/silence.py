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
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_OPENING = threading.Lock()
_OPENING_SECONDS = 60.0
#: How often the time is looked at while an answer may take so long.
_LOOKS = 10
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
        #: None while it is being opened.
        self._mine: frozenset[_Ends] | None = frozenset()
        self._others: frozenset[_Ends] = frozenset()
        #: Since when an answer is waited for, by the monotonic clock.
        self._since: float | None = None
        self._closed = threading.Event()
        #: Whether the connection was ended.
        self.fired = False

    @contextmanager
    def opening(self) -> Iterator[None]:
        """The connection is opened in this block, and no other one that is watched; `close` ends the watch."""
        with _OPENING:
            # In this order: `cut` may be called meanwhile, and must spare the others.
            self._others, self._mine, self.fired = self._sockets(), None, False
            # Nothing takes long there; and whoever asks must open a connection, too.
            opened = self._guarded(min(self._seconds, _OPENING_SECONDS), None)
            try:
                with self.waiting():
                    yield
            finally:
                opened.set()
            self._mine = self._sockets() - self._others
        self._closed = self._guarded(self._seconds, self._is_at_it)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """An answer is waited for in this block."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def cut(self) -> None:
        """End the connection at once: whoever waits for an answer, in another thread, gets an error."""
        self._sockets(self._shut)

    def close(self) -> None:
        """The connection is closed."""
        self._closed.set()

    def _guarded(self, seconds: float, is_at_it: Callable[[], bool] | None) -> threading.Event:
        """Start to guard; until the event is set."""
        over = threading.Event()
        # One thread for all questions: one for each would take longer than most answers.
        threading.Thread(target=self._guard, args=[over, seconds, is_at_it], name="silence", daemon=True).start()
        return over

    def _guard(self, over: threading.Event, seconds: float, is_at_it: Callable[[], bool] | None) -> None:
        asked: float | None = None
        while not over.wait(seconds / _LOOKS):
            since = self._since
            if since is None or time.monotonic() - max(since, asked or since) < seconds:
                continue
            if is_at_it is not None and is_at_it():
                asked = time.monotonic()
            elif self._since == since and not over.is_set():
                self.fired = True
                self._sockets(self._shut)
                return

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
