"""A checkpoint that was damaged, lost, restored from an older copy, or written by a newer version.

For engines that share our checkpoint. Whatever happened to it, a load stops by name before it could double or skip a
file, nothing is changed, and each way out that the message gives leads on.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import polars as pl
import pytest

from telematics_assets.autoloader.checkpoint import FORMAT
from telematics_assets.catalog import FileStream
from telematics_assets.engines.base import IngestReport
from telematics_assets.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointRolledBackError,
    CheckpointTooNewError,
    OptionError,
    TableMovedError,
)
from telematics_assets_tests.conformance.platforms import CheckpointPlatform
from telematics_assets_tests.conformance.samples import json_stream, lines

#: Enough batches for the ledger to have a merged segment and some single results behind it.
BATCHES = 10
STREAM = json_stream("n", max_files_per_trigger=1)
Fault = Callable[[dict[str, bytes]], dict[str, bytes]]


def land(platform: CheckpointPlatform, number: int) -> None:
    """Land one more file."""
    platform.volume_put(f"json/{number:02}.json", lines(f'{{"n":"{number:02}"}}'), number)


def load(platform: CheckpointPlatform, batches: int = BATCHES) -> None:
    """Load that many files, one per batch."""
    for number in range(batches):
        land(platform, number)
    platform.engine.ingest(STREAM)


def values(platform: CheckpointPlatform) -> list[str]:
    """The table's records."""
    return [row["n"] for row in platform.rows(STREAM, "n")]


def numbers(count: int) -> list[str]:
    """The records of the first files."""
    return [f"{number:02}" for number in range(count)]


def without(*names: str) -> Fault:
    """Lose some files."""
    return lambda copy: {name: data for name, data in copy.items() if not name.startswith(names)}


def truncated(prefix: str) -> Fault:
    """Cut the newest of some files."""

    def cut(copy: dict[str, bytes]) -> dict[str, bytes]:
        name = max(name for name in copy if name.startswith(prefix))
        return {**copy, name: copy[name][: len(copy[name]) // 2]}

    return cut


def outcome(platform: CheckpointPlatform) -> IngestReport | CheckpointError:
    """What a fresh process says to a load."""
    try:
        return platform.restart().ingest(STREAM)
    except CheckpointError as error:
        return error


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:-7], lambda data: b"\x00" * len(data), lambda data: b"{}"],
    ids=["emptied", "cut", "zeroed", "replaced"],
)
def test_a_damaged_file_is_named_or_of_no_importance_and_nothing_is_loaded_twice(
    checkpoint_platform: CheckpointPlatform, damage: Callable[[bytes], bytes]
) -> None:
    platform = checkpoint_platform
    load(platform)
    copy = platform.checkpoint(STREAM)
    assert {name.split("/")[0] for name in copy} == {"metadata", "offsets", "results", "commits", "ledger"}
    named = set()
    for name, data in copy.items():
        platform.put_checkpoint(STREAM, {**copy, name: damage(data)})
        found = outcome(platform)
        if isinstance(found, IngestReport):
            assert found.batches == ()
            continue
        assert isinstance(found, CheckpointCorruptError)
        assert all(text in str(found) for text in (name, "--rebuild", "--drop-table"))
        named.add(name.split("/")[0])
        with pytest.raises(CheckpointCorruptError):
            platform.engine.look(STREAM)
    assert named == {"metadata", "offsets", "results", "commits", "ledger"}
    platform.put_checkpoint(STREAM, copy)
    assert platform.restart().ingest(STREAM).batches == ()
    assert values(platform) == numbers(BATCHES)


def test_a_missing_file_is_named_or_of_no_importance_and_nothing_is_loaded_twice(
    checkpoint_platform: CheckpointPlatform,
) -> None:
    platform = checkpoint_platform
    load(platform)
    copy = platform.checkpoint(STREAM)
    for name in copy:
        platform.put_checkpoint(STREAM, without(name)(copy))
        found = outcome(platform)
        if isinstance(found, IngestReport):
            assert all(batch.recovered for batch in found.batches)
        else:
            assert "telematics reset" in str(found)
        assert values(platform) == numbers(BATCHES)


def test_a_damaged_pending_plan_is_named(checkpoint_platform: CheckpointPlatform) -> None:
    platform = checkpoint_platform
    load(platform, 2)
    land(platform, 2)

    def die() -> None:
        raise KeyboardInterrupt

    platform.meddle("json/02.json", "open", die)
    with pytest.raises(KeyboardInterrupt):
        platform.engine.ingest(STREAM)
    platform.put_checkpoint(STREAM, truncated("offsets/")(platform.checkpoint(STREAM)))
    with pytest.raises(CheckpointCorruptError, match=r"offsets/0+2"):
        platform.restart().ingest(STREAM)
    platform.engine.reset(STREAM, rebuild=True)
    assert platform.engine.ingest(STREAM).rows == 1
    assert values(platform) == numbers(3)


FAULTS: dict[str, tuple[Fault, type[CheckpointError], int]] = {
    "metadata cut": (truncated("metadata/"), CheckpointCorruptError, BATCHES),
    "commit cut": (truncated("commits/"), CheckpointCorruptError, BATCHES),
    "result cut": (truncated("results/"), CheckpointCorruptError, BATCHES),
    "ledger cut": (truncated("ledger/"), CheckpointCorruptError, BATCHES),
    "commits lost": (without("commits/"), CheckpointCorruptError, BATCHES),
    "ledger lost": (without("ledger/"), CheckpointCorruptError, BATCHES),
    "results lost": (without("results/"), CheckpointCorruptError, BATCHES),
    "metadata lost": (without("metadata/"), CheckpointRolledBackError, BATCHES),
    "all lost": (without(""), CheckpointRolledBackError, BATCHES),
    "all lost early": (without(""), CheckpointRolledBackError, 1),
    "commits lost early": (without("commits/"), CheckpointRolledBackError, 3),
}


@pytest.mark.parametrize(
    ("fault", "way_out"),
    [
        *((fault, "rebuild") for fault in FAULTS),
        ("metadata cut", "drop_table"),
        ("ledger cut", "drop_table"),
        ("all lost", "drop_table"),
    ],
)
def test_both_ways_out_of_a_damaged_or_lost_checkpoint_lead_on(
    checkpoint_platform: CheckpointPlatform, fault: str, way_out: str
) -> None:
    platform = checkpoint_platform
    damage, error, batches = FAULTS[fault]
    load(platform, batches)
    platform.put_checkpoint(STREAM, damage(platform.checkpoint(STREAM)))
    land(platform, batches)
    with pytest.raises(error, match=r"--rebuild.*--drop-table"):
        platform.restart().ingest(STREAM)
    assert values(platform) == numbers(batches)
    platform.engine.reset(STREAM, **{way_out: True})
    expected = 1 if way_out == "rebuild" else batches + 1
    assert platform.restart().ingest(STREAM).rows == expected
    assert values(platform) == numbers(batches + 1)
    assert set(platform.states(STREAM).values()) == {"INGESTED"}
    assert all(b.expected_rows == b.added_rows for b in platform.engine.balance(STREAM, 0))
    land(platform, batches + 1)
    assert platform.restart().ingest(STREAM).rows == 1
    assert platform.engine.ingest(STREAM).batches == ()


@pytest.mark.parametrize(("then", "now"), [(1, 2), (1, 3), (6, 9), (9, 10)])
@pytest.mark.parametrize("way_out", ["rebuild", "drop_table"])
def test_a_checkpoint_restored_from_an_older_copy_is_seen(
    checkpoint_platform: CheckpointPlatform, then: int, now: int, way_out: str
) -> None:
    platform = checkpoint_platform
    load(platform, then)
    copy = platform.checkpoint(STREAM)
    load(platform, now)
    platform.put_checkpoint(STREAM, copy)
    land(platform, now)
    with pytest.raises(CheckpointRolledBackError, match=r"older copy.*--rebuild.*--drop-table"):
        platform.restart().ingest(STREAM)
    assert values(platform) == numbers(now)
    platform.engine.reset(STREAM, **{way_out: True})
    assert platform.restart().ingest(STREAM).rows == (1 if way_out == "rebuild" else now + 1)
    assert values(platform) == numbers(now + 1)


def test_a_copy_that_was_made_during_a_batch_finishes_that_batch_only_if_it_is_the_last(
    checkpoint_platform: CheckpointPlatform,
) -> None:
    platform = checkpoint_platform
    load(platform, 1)
    land(platform, 1)
    copies: list[dict[str, bytes]] = []
    platform.meddle("json/01.json", "close", lambda: copies.append(platform.checkpoint(STREAM)))
    platform.engine.ingest(STREAM)
    whole = platform.checkpoint(STREAM)
    # The plan is in the copy, the result of the attempt that counted is not: some engines publish it before they read.
    planned = {name: data for name, data in copies[0].items() if not name.startswith(f"results/{1:020}")}
    assert f"offsets/{1:020}" in planned
    platform.put_checkpoint(STREAM, planned)
    with pytest.raises(CheckpointCorruptError, match=r"its result is lost.*--rebuild"):
        platform.restart().ingest(STREAM)
    # With the result, the batch is finished from what the table says.
    platform.put_checkpoint(STREAM, without(f"commits/{1:020}")(whole))
    report = platform.restart().ingest(STREAM)
    assert [(b.batch_id, b.rows, b.recovered) for b in report.batches] == [(1, 1, True)]
    assert values(platform) == numbers(2)
    land(platform, 2)
    platform.engine.ingest(STREAM)
    platform.put_checkpoint(STREAM, without(f"commits/{1:020}")(whole))
    with pytest.raises(CheckpointRolledBackError):
        platform.restart().ingest(STREAM)
    assert values(platform) == numbers(3)


def test_a_batch_that_another_plan_committed_is_not_taken_for_the_pending_one(
    checkpoint_platform: CheckpointPlatform,
) -> None:
    platform = checkpoint_platform
    load(platform, 1)
    land(platform, 1)
    platform.engine.ingest(STREAM)
    theirs = platform.checkpoint(STREAM)
    # A copy in which another process had planned the same batch and was killed.
    offset = f"offsets/{1:020}"
    other_plan = json.dumps({**json.loads(theirs[offset]), "planner": "another"}).encode()
    platform.put_checkpoint(STREAM, {**without(f"commits/{1:020}")(theirs), offset: other_plan})
    with pytest.raises(CheckpointRolledBackError, match=r"--rebuild.*--drop-table"):
        platform.restart().ingest(STREAM)
    assert values(platform) == numbers(2)


@pytest.mark.parametrize("part", ["metadata", "results", "commits", "ledger"])
def test_a_checkpoint_of_a_newer_version_is_left_alone(checkpoint_platform: CheckpointPlatform, part: str) -> None:
    platform = checkpoint_platform
    load(platform)
    copy = platform.checkpoint(STREAM)
    name = max(name for name in copy if name.startswith(part))
    newer = dict(copy)
    if part == "ledger":
        buffer = io.BytesIO()
        pl.read_parquet(copy[name]).write_parquet(buffer, metadata={"telematics.format": str(FORMAT + 1)})
        newer[name] = buffer.getvalue()
    else:
        newer[name] = json.dumps({**json.loads(copy[name]), "format": FORMAT + 1, "more": True}).encode()
    platform.put_checkpoint(STREAM, newer)
    land(platform, BATCHES)
    with pytest.raises(CheckpointTooNewError, match=rf"format {FORMAT + 1}.*Upgrade"):
        platform.restart().ingest(STREAM)
    assert platform.checkpoint(STREAM) == newer
    platform.put_checkpoint(STREAM, copy)
    assert platform.restart().ingest(STREAM).rows == 1


def test_a_checkpoint_of_another_table_is_refused(checkpoint_platform: CheckpointPlatform) -> None:
    platform = checkpoint_platform
    load(platform, 2)
    other = FileStream("others", "json", "json", "others", STREAM.contract, STREAM.options)
    platform.engine.ingest(other)
    platform.put_checkpoint(STREAM, platform.checkpoint(other))
    with pytest.raises(TableMovedError, match=r"belongs to another checkpoint.*--rebuild"):
        platform.restart().ingest(STREAM)
    platform.engine.reset(STREAM, rebuild=True)
    assert platform.engine.ingest(STREAM).batches == ()
    assert platform.restart().ingest(other).batches == ()


def test_the_doctor_says_what_a_load_would_say(checkpoint_platform: CheckpointPlatform) -> None:
    platform = checkpoint_platform
    load(platform, 2)
    platform.put_checkpoint(STREAM, {})
    (finding,) = [f for f in platform.restart().doctor([STREAM]) if f.subject == "stream events"]
    assert finding.level == "error"
    assert "--rebuild" in finding.message
    assert platform.checkpoint(STREAM) == {}


def test_a_reset_asks_what_to_do_with_the_rows(checkpoint_platform: CheckpointPlatform) -> None:
    platform = checkpoint_platform
    load(platform, 2)
    with pytest.raises(OptionError, match=r"2 rows.*--rebuild.*--drop-table"):
        platform.engine.reset(STREAM)
    with pytest.raises(OptionError, match="exclude each other"):
        platform.engine.reset(STREAM, rebuild=True, drop_table=True)
    assert platform.engine.ingest(STREAM).batches == ()


def test_a_rebuilt_ledger_knows_changed_files_and_tries_unreadable_ones_again(
    checkpoint_platform: CheckpointPlatform,
) -> None:
    platform = checkpoint_platform
    for number in range(3):
        platform.volume_put(
            f"json/{number:02}.json", lines(f'{{"n":"{number:02}"}}'), 1_700_000_000_123_456_789 + number
        )
    platform.volume_put("json/empty.json", b"")
    platform.engine.ingest(STREAM)
    platform.put_checkpoint(STREAM, {})
    platform.restart().reset(STREAM, rebuild=True)
    platform.volume_put("json/01.json", lines('{"n":"new"}'))
    report = platform.engine.ingest(STREAM)
    assert (report.rows, report.files_skipped, report.files_changed) == (0, 1, 1)
    assert platform.states(STREAM) == {
        "00.json": "INGESTED",
        "01.json": "CHANGED",
        "02.json": "INGESTED",
        "empty.json": "SKIPPED_CORRUPTED",
    }
    assert values(platform) == numbers(3)


def test_a_stream_can_be_rebuilt_and_started_anew_again_and_again(checkpoint_platform: CheckpointPlatform) -> None:
    platform = checkpoint_platform
    count = 0
    for way_out in ("rebuild", "rebuild", "drop_table", "rebuild", "drop_table"):
        for _ in range(3):
            land(platform, count)
            count += 1
        platform.engine.ingest(STREAM)
        platform.engine.reset(STREAM, **{way_out: True})
        platform.restart().ingest(STREAM)
        assert values(platform) == numbers(count)
