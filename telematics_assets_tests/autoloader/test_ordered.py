"""Work ahead of its turn: what another thread took comes in order, within its room, and errors wait their turn."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from threading import Thread

import pytest

from telematics_assets.autoloader import ordered
from telematics_assets.autoloader.ordered import Begun, in_order


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


@pytest.mark.parametrize(
    ("size", "ahead"), [(ordered.AHEAD_BYTES // 8, 2), (ordered.AHEAD_BYTES // 3, 1), (ordered.AHEAD_BYTES, 1)]
)
def test_large_parts_are_not_taken_further_ahead_than_they_may_be_large_together(size: int, ahead: int) -> None:
    taken = []

    def parts() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    done = 0
    for number in in_order(lambda part: part, parts(), lambda _: size):
        assert number == done
        done += 1
        assert (len(taken) - done) * size <= ordered.AHEAD_BYTES + size
        assert len(taken) - done >= min(ahead, 20 - done)
    assert done == 20
