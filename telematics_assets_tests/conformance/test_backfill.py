"""Back-fill: history that was left out is fetched piece by piece, and never what is in the table already."""

from __future__ import annotations

import pytest

from telematics_assets.engines.base import Backfill, IngestRequest
from telematics_assets.errors import DbfsDisabledError, OptionError, VolumeError
from telematics_assets_tests.conformance.platforms import LOCATION, CheckpointPlatform, Platform
from telematics_assets_tests.conformance.samples import json_stream, lines

STREAM = json_stream("n", include_existing_files=False, max_files_per_trigger=2)
DAY_NS = 86_400 * 10**9


def land(platform: Platform, path: str, day: int) -> None:
    """Land a file of one record, modified on a day of January 1970, at noon."""
    platform.volume_put(f"json/{path}", lines(f'{{"n":"{path}"}}'), (day - 1) * DAY_NS + DAY_NS // 2)


def backfill(platform: Platform, folder: str | None = None, after: str | None = None, before: str | None = None) -> int:
    """How many files a back-fill loads."""
    report = platform.engine.ingest(STREAM, IngestRequest(backfill=Backfill(folder, after, before)))
    assert report.operation == "backfill"
    assert all(batch.files_ingested <= 2 for batch in report.batches)
    return report.files_ingested


def values(platform: Platform) -> list[str]:
    return [row["n"] for row in platform.rows(STREAM, "n")]


@pytest.fixture
def left_out(platform: Platform) -> Platform:
    """A stream that began with six old files in its folder, and has loaded one since."""
    for number in range(1, 7):
        land(platform, f"{'odd' if number % 2 else 'even'}/{number}.json", number)
    platform.engine.ingest(STREAM)
    land(platform, "odd/7.json", 7)
    assert platform.engine.ingest(STREAM).rows == 1
    return platform


@pytest.mark.parametrize("folder", ["odd", "odd/", "json/odd", f"{LOCATION}/json/odd/"])
def test_a_folder_is_fetched_and_the_rest_stays_out(left_out: Platform, folder: str) -> None:
    assert backfill(left_out, folder) == 3
    assert values(left_out) == ["odd/1.json", "odd/3.json", "odd/5.json", "odd/7.json"]
    assert backfill(left_out, folder) == 0
    assert left_out.restart().ingest(STREAM).batches == ()
    assert left_out.states(STREAM)["even/2.json"] == "SKIPPED_EXISTING"
    assert backfill(left_out, "json") == 3
    assert len(values(left_out)) == 7


def test_a_folder_is_no_prefix_of_a_name(left_out: Platform) -> None:
    land(left_out, "oddity/8.json", 8)
    assert backfill(left_out, "odd") == 3
    assert backfill(left_out, "nope") == 0
    assert left_out.states(STREAM)["oddity/8.json"] == "DISCOVERED"


def test_a_time_range_is_open_at_both_ends(left_out: Platform) -> None:
    assert backfill(left_out, after="1970-01-02T12:00:00", before="1970-01-05T12:00:00Z") == 2
    assert values(left_out) == ["even/4.json", "odd/3.json", "odd/7.json"]
    assert backfill(left_out, after="1970-01-02") == 3
    assert backfill(left_out, before="1970-01-03") == 1
    assert len(values(left_out)) == 7


def test_folder_and_range_both_hold(left_out: Platform) -> None:
    assert backfill(left_out, "even", after="1970-01-03") == 2
    assert values(left_out) == ["even/4.json", "even/6.json", "odd/7.json"]


def test_new_files_there_are_taken_too_and_others_stay_pending(left_out: Platform) -> None:
    land(left_out, "even/8.json", 8)
    land(left_out, "odd/9.json", 9)
    assert backfill(left_out, "even") == 4
    assert left_out.states(STREAM)["odd/9.json"] == "DISCOVERED"
    assert left_out.engine.look(STREAM).files == 1


def test_the_number_of_files_can_be_limited(left_out: Platform) -> None:
    request = IngestRequest(max_files=1, backfill=Backfill("odd"))
    assert [left_out.engine.ingest(STREAM, request).rows for _ in range(4)] == [1, 1, 1, 0]


def test_the_first_load_of_a_stream_may_be_a_back_fill(platform: Platform) -> None:
    land(platform, "a/1.json", 1)
    land(platform, "b/2.json", 2)
    assert backfill(platform, "a") == 1
    assert platform.states(STREAM) == {"a/1.json": "INGESTED", "b/2.json": "SKIPPED_EXISTING"}


def test_the_stream_s_own_filters_still_hold(platform: Platform) -> None:
    stream = json_stream("n", include_existing_files=False, path_glob_filter="*.json", modified_after="1970-01-03")
    for number in range(1, 6):
        land(platform, f"{number}.json", number)
    land(platform, "6.txt", 6)
    platform.engine.ingest(stream)
    report = platform.engine.ingest(stream, IngestRequest(backfill=Backfill("json", None, "1970-01-05")))
    assert report.rows == 2


def test_a_file_that_changed_since_it_was_left_out_is_fetched_as_it_is_now(left_out: Platform) -> None:
    left_out.volume_put("json/odd/1.json", lines('{"n":"now"}'))
    assert backfill(left_out, "odd") == 3
    assert "now" in values(left_out)
    assert backfill(left_out, "odd") == 0


def test_what_changed_after_it_was_ingested_is_not_loaded_again(left_out: Platform) -> None:
    left_out.volume_put("json/odd/7.json", lines('{"n":"changed"}'))
    assert backfill(left_out, "odd") == 3
    assert left_out.states(STREAM)["odd/7.json"] == "CHANGED"


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (Backfill(), OptionError),
        (Backfill(modified_after="yesterday"), OptionError),
        (Backfill(modified_after="2026-01-02", modified_before="2026-01-01"), OptionError),
        (Backfill("../x"), VolumeError),
        (Backfill("/elsewhere"), VolumeError),
        (Backfill("dbfs:/x"), DbfsDisabledError),
    ],
)
def test_a_back_fill_of_nothing_or_of_nonsense_is_refused(
    left_out: Platform, asked: Backfill, error: type[Exception]
) -> None:
    with pytest.raises(error):
        left_out.engine.ingest(STREAM, IngestRequest(backfill=asked))


def test_a_pending_plan_is_finished_first_and_nothing_is_doubled(checkpoint_platform: CheckpointPlatform) -> None:
    platform = checkpoint_platform
    land(platform, "a/1.json", 1)
    platform.engine.ingest(STREAM)
    land(platform, "b/2.json", 2)
    platform.engine.ingest(STREAM)
    commit = max(name for name in platform.checkpoint(STREAM) if name.startswith("commits/"))
    platform.volume.delete(f"_checkpoints/{STREAM.name}/{commit}")
    report = platform.restart().ingest(STREAM, IngestRequest(backfill=Backfill("a")))
    assert [(batch.recovered, batch.rows) for batch in report.batches] == [(True, 1), (False, 1)]
    assert values(platform) == ["a/1.json", "b/2.json"]
