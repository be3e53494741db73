"""Work ahead of its turn: what another thread took comes in order, within its room, and errors wait their turn."""

from __future__ import annotations

from collections.abc import Generator
from threading import Thread

import pytest

from telematics_assets.autoloader.ordered import Begun


class BrokenError(Exception):
    pass


def numbers(count: int, closed: list[bool], *, broken: bool = False) -> Generator[int, None, None]:
    try:
        yield from range(count)
        if broken:
            raise BrokenError
    finally:
        closed.append(True)


def taken_elsewhere(begun: Begun[int], room: int) -> int:
    taken: list[int] = []
    thread = Thread(target=lambda: taken.append(begun.take(room, lambda _: 1)))
    thread.start()
    thread.join()
    return taken[0]


@pytest.mark.parametrize("room", [0, 1, 3, 5, 9])
def test_what_was_taken_elsewhere_comes_first_and_the_rest_after_it(room: int) -> None:
    begun = Begun(numbers(5, []))
    assert taken_elsewhere(begun, room) == min(room, 5)
    assert list(begun) == [0, 1, 2, 3, 4]


def test_an_error_is_raised_behind_the_parts_before_it() -> None:
    begun = Begun(numbers(2, [], broken=True))
    assert taken_elsewhere(begun, 9) == 2
    parts = iter(begun)
    assert [next(parts), next(parts)] == [0, 1]
    with pytest.raises(BrokenError):
        next(parts)


def test_what_nobody_wants_any_more_is_closed() -> None:
    closed: list[bool] = []
    begun = Begun(numbers(5, closed))
    taken_elsewhere(begun, 2)
    begun.close()
    assert closed == [True]
