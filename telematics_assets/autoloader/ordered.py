"""Work on several pieces at a time, and ahead of who takes them.

Belongs here: threads under a generator that keeps order and bounds what waits.
Does not belong here: what the work is (`json_rows.py`, `delimited.py`), Dagster.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Generic, TypeVar

from telematics_assets.autoloader.chunks import RecordTooLongError

#: As many as this process may use: more would only pass the interpreter's lock around.
_WORKERS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
#: How large parts may be together whose results are not out yet. One of more than a quarter of it has long records,
#: which may take many times as much while they are worked on: it is worked on alone.
AHEAD_BYTES = 40 << 20

Part = TypeVar("Part")
Made = TypeVar("Made")


def in_order(
    work: Callable[[Part], Made], parts: Iterator[Part], size: Callable[[Part], int] = lambda part: 0
) -> Generator[Made, None, None]:
    """Do the work of several parts at a time and give the results in order; a lone part starts no thread.

    Args:
        work: What to do with a part; called from several threads.
        parts: Taken from the caller's thread, a few ahead.
        size: How large a part is, in bytes.

    Raises:
        RecordTooLongError: As `parts` raised it, once all results before it are out.
    """
    pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="reader")
    pending: deque[tuple[Future[Made], int]] = deque()

    def weight(part: Part) -> int:
        found = size(part)
        return found if found <= AHEAD_BYTES // 4 else AHEAD_BYTES

    held: list[Part] = []
    too_long: RecordTooLongError | None = None
    try:
        try:
            for part in parts:
                if held:
                    first = held.pop()
                    pending.append((pool.submit(work, first), weight(first)))
                room = AHEAD_BYTES - weight(part)
                while pending and (len(pending) > _WORKERS or sum(bytes_ for _, bytes_ in pending) > room):
                    yield pending.popleft()[0].result()
                held.append(part)
        except RecordTooLongError as error:
            too_long = error  # which record that is, is known when all before it are read
        last = [work(part) for part in held]
        while pending:
            yield pending.popleft()[0].result()
        yield from last
        if too_long is not None:
            raise too_long
    finally:
        pool.shutdown(cancel_futures=True)


class Begun(Generic[Part]):
    """A generator of which another thread may have taken the beginning."""

    def __init__(self, parts: Generator[Part, None, None]) -> None:
        """Take nothing yet."""
        self._parts = parts
        self._taken: deque[Part] = deque()
        self._error: BaseException | None = None

    def take(self, room: int, size: Callable[[Part], int]) -> int:
        """Take parts until there is no room for more.

        Args:
            room: How much those that are taken may be together; the last may exceed it.
            size: How much a part is.

        Returns:
            How much was taken.
        """
        taken = 0
        try:
            while taken < room and (part := next(self._parts, None)) is not None:
                self._taken.append(part)
                taken += size(part)
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever gets to it
            self._error = error
        return taken

    def __iter__(self) -> Iterator[Part]:
        """All parts in order; what was raised meanwhile is raised behind those before it."""
        while self._taken:
            yield self._taken.popleft()
        if self._error is not None:
            raise self._error
        yield from self._parts

    def close(self) -> None:
        """Close the generator."""
        self._parts.close()


@dataclass(frozen=True)
class _End:
    """The last thing in the queue: why there is no more."""

    error: BaseException | None = None


def ahead(parts: Generator[Part, None, None], depth: int) -> Generator[Part, None, None]:
    """Take parts in a thread of its own, so that they are made while earlier ones are used.

    Args:
        parts: Runs in that thread, and is closed there.
        depth: How many parts wait at most.

    Raises:
        BaseException: Whatever `parts` raised, once all parts before it are out.
    """
    waiting: Queue[Part | _End] = Queue(depth)
    stopped = Event()

    def offer(part: Part | _End) -> None:
        while not stopped.is_set():
            with suppress(Full):
                waiting.put(part, timeout=0.1)
                return

    def take() -> None:
        try:
            for part in parts:
                offer(part)
                if stopped.is_set():
                    parts.close()
                    return
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever takes the parts
            offer(_End(error))
        else:
            offer(_End())

    thread = Thread(target=take, name="read-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(part := waiting.get(), _End):
            yield part
        if part.error is not None:
            raise part.error
    finally:
        stopped.set()
        with suppress(Empty):
            waiting.get_nowait()
        thread.join()
