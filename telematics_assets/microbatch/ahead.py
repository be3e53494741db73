"""Reading one batch ahead: while one is made use of, the next is on its way.

Belongs here: the thread that pulls, and that it has ended when the block has.
Does not belong here: what is pulled (`session.py`), Dagster.

Never more than one batch is ahead, so that memory stays bounded; and nothing is pulled before the first is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

_Item = TypeVar("_Item")

#: How long a pull may go on that nobody waits for any more, seconds.
_PATIENCE_SECONDS = 0.2


@contextmanager
def one_ahead(pull: Callable[[], _Item | None], interrupt: Callable[[], None]) -> Iterator[Iterator[_Item]]:
    """Iterate over what is pulled in another thread; that has ended when the block ends.

    Args:
        pull: Gives the next item, or None after the last. Never called twice at once, nor after the last or a failure;
            what it raises, the iterator raises in its turn.
        interrupt: Makes a pull that waits fail soon. Called only where the block ends before the items do.
    """
    with ThreadPoolExecutor(1, "one-ahead") as thread:
        items = _Ahead(pull, thread)
        try:
            yield items
        finally:
            if items.pulling is not None and wait([items.pulling], _PATIENCE_SECONDS).not_done:
                interrupt()


class _Ahead(Iterator[_Item]):
    """Whoever takes an item has the next one pulled; it holds none that was taken."""

    def __init__(self, pull: Callable[[], _Item | None], thread: ThreadPoolExecutor) -> None:
        self._pull = pull
        self._thread = thread
        self.pulling: Future[_Item | None] | None = None

    def __next__(self) -> _Item:
        if self.pulling is None:
            self.pulling = self._thread.submit(self._pull)
        item = self.pulling.result()
        if item is None:
            raise StopIteration
        self.pulling = self._thread.submit(self._pull)
        return item
