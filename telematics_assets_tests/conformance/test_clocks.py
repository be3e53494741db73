"""A wall clock that is set back: files, batches and tables go on in their own order.

For engines that share our checkpoint.
"""

from __future__ import annotations

import time

import pytest

from telematics_assets_tests.conformance.platforms import CheckpointPlatform
from telematics_assets_tests.conformance.samples import json_stream, lines

STREAM = json_stream("n", max_files_per_trigger=1)
DAY_NS = 86_400_000_000_000


class Clock:
    """A wall clock that somebody sets."""

    def __init__(self) -> None:
        self.set_by = 0

    def now_ns(self) -> int:
        return time.time_ns() + self.set_by


@pytest.fixture
def clock(checkpoint_platform: CheckpointPlatform) -> Clock:
    """The clock of every engine that is made from here on."""
    clock = Clock()
    checkpoint_platform.clock = clock.now_ns
    return clock


def test_a_clock_that_goes_back_between_loads_loses_and_doubles_nothing(
    checkpoint_platform: CheckpointPlatform, clock: Clock
) -> None:
    platform = checkpoint_platform
    for number, days in enumerate((0, -3650, 2, -1)):
        clock.set_by = days * DAY_NS
        platform.volume_put(f"json/{number}.json", lines(f'{{"n":"{number}"}}'), clock.now_ns() - 60_000_000_000)
        assert platform.restart(settle_seconds=0.05, incomplete_seconds=60).ingest(STREAM).rows == 1
    rows = platform.rows(STREAM, "n", "_batch_id", "_ingested_at")
    assert [(row["n"], row["_batch_id"]) for row in rows] == [(str(number), number) for number in range(4)]
    assert rows[1]["_ingested_at"] < rows[3]["_ingested_at"] < rows[0]["_ingested_at"] < rows[2]["_ingested_at"]
    assert platform.restart().ingest(STREAM).batches == ()
    assert set(platform.states(STREAM).values()) == {"INGESTED"}
    assert all(book.expected_rows == book.added_rows for book in platform.engine.balance(STREAM, 0))


def test_a_clock_that_goes_back_while_a_young_file_settles_makes_it_a_file_from_the_future(
    checkpoint_platform: CheckpointPlatform, clock: Clock
) -> None:
    platform = checkpoint_platform
    engine = platform.restart(settle_seconds=0.1, incomplete_seconds=60)
    platform.volume_put("json/0.json", lines('{"n":"0"}'), clock.now_ns())
    assert engine.look(STREAM).waiting == 1
    clock.set_by = -365 * DAY_NS
    assert engine.ingest(STREAM).rows == 1
    assert engine.look(STREAM).changed == 0


def test_a_clock_that_goes_back_between_plan_and_commit_changes_nothing(
    checkpoint_platform: CheckpointPlatform, clock: Clock
) -> None:
    platform = checkpoint_platform
    for number in range(3):
        platform.volume_put(f"json/{number}.json", lines(f'{{"n":"{number}"}}'), number)

    def die() -> None:
        clock.set_by = -20 * 365 * DAY_NS
        raise KeyboardInterrupt

    platform.meddle("json/1.json", "read", die)
    with pytest.raises(KeyboardInterrupt):
        platform.engine.ingest(STREAM)
    assert platform.restart().ingest(STREAM).rows == 2
    assert [row["n"] for row in platform.rows(STREAM, "n")] == ["0", "1", "2"]
    # The same path with an older time is another version, not an older one.
    platform.volume_put("json/2.json", lines('{"n":"9"}'), 1)
    assert platform.engine.ingest(STREAM).files_changed == 1
