"""How a short run spares what only the soak needs.

Belongs here: how variations of a test take turns. Does not belong here: test cases.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings

#: Of all items of a test that bear it, a short run takes one; which one, goes round from test to test.
SPARINGLY = pytest.mark.sparingly


def examples(number: int) -> int:
    """Examples of a property that needs more than others: so many in a short run, the profile's in the soak."""
    return max(number, settings().max_examples)


def in_turn(ones: Sequence[object], others: Sequence[object]) -> list[object]:
    """Each of the ones with each of the others; a short run takes the others in turn, the soak takes all."""
    return [
        pytest.param(one, other, marks=() if number % len(others) == place else pytest.mark.soak)
        for number, one in enumerate(ones)
        for place, other in enumerate(others)
    ]


def each_nth(ones: Sequence[object], nth: int, first: int = 0) -> list[object]:
    """All of them in the soak, each nth in a short run."""
    return [
        pytest.param(one, marks=() if number % nth == first else pytest.mark.soak) for number, one in enumerate(ones)
    ]
