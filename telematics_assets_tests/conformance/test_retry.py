"""Reading skipped files again on request: what is read, what is left alone and why, and that nothing is doubled."""

from __future__ import annotations

import pytest

from telematics_assets.catalog import FileStream
from telematics_assets.engines.base import IngestReport, IngestRequest
from telematics_assets.errors import DbfsDisabledError, UnknownNameError, VolumeError
from telematics_assets_tests.conformance.platforms import LOCATION, CheckpointPlatform, Platform
from telematics_assets_tests.conformance.samples import parquet, parquet_stream

STREAM = parquet_stream()
BROKEN = b"PAR1 broken PAR1"


def retry(platform: Platform, *paths: str, stream: FileStream = STREAM) -> IngestReport:
    return platform.engine.ingest(stream, IngestRequest(retry_files=paths))


def values(platform: Platform) -> list[int]:
    return [row["n"] for row in platform.rows(STREAM, "n")]


@pytest.fixture
def skipped(platform: Platform) -> Platform:
    """A platform with one sound and two broken files, loaded."""
    platform.volume_put("parquet/a.parquet", parquet(n=[1]), 10**9)
    for name in ("b", "sub/c"):
        platform.volume_put(f"parquet/{name}.parquet", BROKEN, 10**9)
    platform.engine.ingest(STREAM)
    return platform


@pytest.mark.parametrize(
    "path", ["b.parquet", "parquet/b.parquet", f"{LOCATION}/parquet/b.parquet", f"{LOCATION}/b.parquet"]
)
def test_a_file_may_be_named_in_several_ways(skipped: Platform, path: str) -> None:
    report = retry(skipped, path)
    (file,) = report.retried
    assert (file.path, file.before, file.after) == ("parquet/b.parquet", "SKIPPED_CORRUPTED", "SKIPPED_CORRUPTED")
    assert file.reason
    assert report.operation == "retry"
    assert [(batch.batch_id, batch.rows) for batch in report.batches] == [(1, 0)]
    assert file.batch_id == 1


def test_only_the_files_asked_for_are_read_again(skipped: Platform) -> None:
    skipped.volume_put("parquet/new.parquet", parquet(n=[9]))
    (batch,) = retry(skipped, "sub/c.parquet", "parquet/sub/c.parquet").batches
    assert [file.path for file in batch.skipped] == ["parquet/sub/c.parquet"]
    assert skipped.states(STREAM)["new.parquet"] == "DISCOVERED"
    assert skipped.engine.ingest(STREAM).rows == 1


def test_a_file_that_was_mended_with_its_old_size_and_time_is_loaded_once(
    checkpoint_platform: CheckpointPlatform,
) -> None:
    platform = checkpoint_platform
    sound = parquet(n=[2])
    platform.volume_put("parquet/b.parquet", sound[:-4] + b"XXXX", 10**9)
    platform.engine.ingest(STREAM)
    assert platform.states(STREAM) == {"b.parquet": "SKIPPED_CORRUPTED"}
    platform.volume_put("parquet/b.parquet", sound, 10**9)
    assert platform.engine.ingest(STREAM).batches == ()
    (file,) = retry(platform, "b.parquet").retried
    assert (file.before, file.after, file.reason, file.batch_id) == ("SKIPPED_CORRUPTED", "INGESTED", None, 1)
    (file,) = retry(platform, "b.parquet").retried
    assert (file.before, file.after) == ("INGESTED", "INGESTED")
    assert values(platform) == [2]
    assert platform.restart().ingest(STREAM).batches == ()
    assert all(b.expected_rows == b.added_rows for b in platform.engine.balance(STREAM, 0))


def test_what_needs_no_retry_is_left_alone_and_told_why(platform: Platform) -> None:
    stream = parquet_stream(include_existing_files=False)
    platform.volume_put("parquet/old.parquet", parquet(n=[0]), 10**9)
    platform.engine.ingest(stream)
    for name in ("a", "b"):
        platform.volume_put(f"parquet/{name}.parquet", parquet(n=[1]), 10**9)
    platform.engine.ingest(stream)
    platform.volume_put("parquet/b.parquet", parquet(n=[2, 3]), 2 * 10**9)
    platform.volume_put("parquet/new.parquet", parquet(n=[4]), 10**9)
    report = retry(platform, "a.parquet", "b.parquet", "new.parquet", "old.parquet", stream=stream)
    assert report.batches == ()
    assert [(file.before, file.after) for file in report.retried] == [
        ("INGESTED", "INGESTED"),
        ("CHANGED", "CHANGED"),
        ("DISCOVERED", "DISCOVERED"),
        ("SKIPPED_EXISTING", "SKIPPED_EXISTING"),
    ]
    told = [file.reason or "" for file in report.retried]
    for text, words in zip(
        told, ("in the table already", "allow_overwrites", "telematics load", "backfill"), strict=True
    ):
        assert words in text


def test_a_missing_file_is_loaded_once_it_is_back(checkpoint_platform: CheckpointPlatform) -> None:
    platform = checkpoint_platform
    platform.volume_put("parquet/a.parquet", parquet(n=[1]), 10**9)
    platform.engine.ingest(STREAM)
    platform.volume_put("parquet/b.parquet", parquet(n=[2]), 10**9)
    platform.meddle("parquet/b.parquet", "open", lambda: platform.remove("parquet/b.parquet"))
    platform.engine.ingest(STREAM)
    platform.restart()
    (file,) = retry(platform, "b.parquet").retried
    assert (file.before, file.after, file.reason) == ("SKIPPED_MISSING", "SKIPPED_MISSING", "it is still missing")
    platform.volume_put("parquet/b.parquet", parquet(n=[2]), 10**9)
    # A file that is back is pending: an ordinary load takes it, and so does a retry.
    report = retry(platform, "b.parquet")
    assert report.rows + platform.engine.ingest(STREAM).rows == 1
    assert values(platform) == [1, 2]


def test_an_unknown_file_is_named_and_nothing_is_done(skipped: Platform) -> None:
    with pytest.raises(UnknownNameError, match=r"'nope\.parquet'.*Nothing was done.*telematics files readings"):
        retry(skipped, "b.parquet", "nope.parquet")
    assert skipped.engine.ingest(STREAM).batches == ()
    for path, error in (
        (f"{LOCATION}/../x", VolumeError),
        ("/elsewhere/a", VolumeError),
        ("dbfs:/a", DbfsDisabledError),
    ):
        with pytest.raises(error):
            retry(skipped, path)


def test_a_pending_plan_is_finished_first(checkpoint_platform: CheckpointPlatform) -> None:
    platform = checkpoint_platform
    for name in ("a", "b"):
        platform.volume_put(f"parquet/{name}.parquet", BROKEN, 10**9)
    platform.engine.ingest(STREAM)
    platform.volume_put("parquet/new.parquet", parquet(n=[3]), 10**9)
    before = platform.checkpoint(STREAM)
    platform.engine.ingest(STREAM)
    commit = max(name for name in platform.checkpoint(STREAM) if name.startswith("commits/"))
    assert commit not in before
    platform.volume.delete(f"_checkpoints/{STREAM.name}/{commit}")
    report = platform.restart().ingest(STREAM, IngestRequest(retry_files=("a.parquet",)))
    assert [(batch.recovered, batch.rows, len(batch.skipped)) for batch in report.batches] == [
        (True, 1, 0),
        (False, 0, 1),
    ]
    assert values(platform) == [3]
