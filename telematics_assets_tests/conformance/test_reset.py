"""A reset that dies half-way: run again it ends right, and no load in between doubles anything."""

from __future__ import annotations

import pytest

from telematics_assets.engines.base import IngestRequest
from telematics_assets.errors import PermanentError
from telematics_assets_tests.conformance.platforms import CheckpointPlatform
from telematics_assets_tests.conformance.samples import json_stream, lines
from telematics_assets_tests.exactly_once.dying import Death, DyingVolume
from telematics_assets_tests.exactly_once.test_kills import Killed

STREAM = json_stream("n", max_files_per_trigger=1)
FILES = 4


@pytest.mark.parametrize("way", ["rebuild", "drop_table"])
@pytest.mark.parametrize("refreshed", [False, True])
def test_a_reset_that_dies_before_anything_it_does_in_the_checkpoint_can_be_run_again(
    checkpoint_platform: CheckpointPlatform, way: str, refreshed: bool, soak_factor: int
) -> None:
    platform = checkpoint_platform
    # A short run takes every second moment: the even ones of a stream, the odd ones of a refreshed stream.
    stride = 1 if soak_factor > 1 else 2
    for number in range(FILES):
        platform.volume_put(f"json/{number}.json", lines(f'{{"n":{number}}}'))
    everything = [str(number) for number in range(FILES)]
    refused, after = 0, int(refreshed) * (stride - 1)
    died = True
    while died:
        platform.restart().ingest(STREAM, IngestRequest(full_refresh=refreshed))
        volume = DyingVolume(platform.volume, Death(after))
        engine = platform.engine_over(volume)
        try:
            engine.reset(STREAM, **{way: True})
            died = False
        except Killed:
            after += stride
        try:
            platform.restart().ingest(STREAM)
            assert [row["n"] for row in platform.rows(STREAM, "n")] == everything
        except PermanentError as error:
            refused += "telematics reset" in str(error)
        platform.restart().reset(STREAM, **{way: True})
        platform.restart().ingest(STREAM)
        assert [row["n"] for row in platform.rows(STREAM, "n")] == everything
        assert set(platform.states(STREAM).values()) == {"INGESTED"}
        assert platform.restart().ingest(STREAM).batches == ()
    assert after > 2
    assert refused > 0


def test_what_was_left_out_is_never_loaded_because_a_reset_died(checkpoint_platform: CheckpointPlatform) -> None:
    platform = checkpoint_platform
    stream = json_stream("n", include_existing_files=False)
    platform.volume_put("json/old.json", lines('{"n":"old"}'))
    platform.engine.ingest(stream)
    after, died = 0, True
    while died:
        platform.volume_put(f"json/new {after}.json", lines('{"n":"new"}'))
        platform.restart().ingest(stream)
        volume = DyingVolume(platform.volume, Death(after))
        engine = platform.engine_over(volume)
        try:
            engine.reset(stream, drop_table=True)
            died = False
        except Killed:
            after += 1
        platform.restart().reset(stream, drop_table=True)
        assert platform.restart().ingest(stream).rows == 0
    assert after > 2
