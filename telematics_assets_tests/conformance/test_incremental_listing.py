"""Incremental listing as its users see it: new files come at once, late ones when the folder is listed whole."""

from __future__ import annotations

import time

from telematics_assets.engines.base import IngestRequest
from telematics_assets_tests.conformance.platforms import CheckpointPlatform, DeltaPlatform, Platform
from telematics_assets_tests.conformance.samples import json_stream, lines
from telematics_assets_tests.turns import SPARINGLY


def land_days(platform: Platform) -> int:
    """A month of files, in order of arrival."""
    names = [f"2026/11/{day:02}/{number:04}" for day in range(1, 31) for number in range(35)]
    for n, name in enumerate(names):
        platform.volume_put(f"json/{name}", lines(f'{{"n":{n}}}'), n + 1)
    return len(names)


def test_the_default_lists_the_whole_folder_and_leaves_no_record(checkpoint_platform: CheckpointPlatform) -> None:
    platform, stream = checkpoint_platform, json_stream("n")
    platform.volume_put("json/2026/11/02/a", lines('{"n":1}'))
    platform.engine.ingest(stream)
    platform.volume_put("json/2026/11/01/late", lines('{"n":2}'))
    assert (platform.engine.look(stream).files, platform.engine.look(stream).late) == (1, 0)
    assert platform.restart().ingest(stream).files_ingested == 1
    assert platform.volume.names(f"_checkpoints/{stream.name}/listings") == []


def test_new_files_come_at_once_and_late_ones_when_the_folder_is_listed_whole(platform: Platform) -> None:
    stream = json_stream("n", use_incremental_listing="auto")
    total = land_days(platform)
    assert platform.engine.ingest(stream).files_ingested == total
    whole = platform.engine.look(stream)
    assert platform.engine.look(stream) == whole
    assert platform.restart().look(stream) == whole

    platform.volume_put("json/2026/11/30/new", lines('{"n":"new"}'), 5_000)
    platform.volume_put("json/2026/11/01/late", lines('{"n":"late"}'), 5_001)
    pending = platform.engine.look(stream)
    assert (pending.files, pending.late, pending.known) == (1, 0, total)
    assert [b.files_ingested for b in platform.restart().ingest(stream).batches] == [1]
    # Nothing pending for whoever looks at a part; a sensor that begins anew sees everything, and its run is told.
    pending = platform.restart().look(stream)
    assert (pending.files, pending.late) == (1, 1)
    assert platform.restart().ingest(stream, IngestRequest(list_whole=True)).files_ingested == 1
    assert set(platform.states(stream).values()) == {"INGESTED"}
    values = [row["n"] for row in platform.rows(stream, "n")]
    assert sorted(values) == sorted([*map(str, range(total)), "new", "late"])


@SPARINGLY
def test_a_late_file_waits_no_longer_than_the_backfill_interval(platform: Platform) -> None:
    stream = json_stream("n", use_incremental_listing=True, backfill_interval="2 seconds")
    total = land_days(platform)
    platform.engine.ingest(stream)
    sensor = platform.engine
    sensor.look(stream)
    platform.volume_put("json/2026/11/01/late", lines('{"n":"late"}'), 5_000)
    time.sleep(2.1)
    pending = sensor.look(stream)
    assert (pending.files, pending.late, pending.known) == (1, 1, total)
    assert platform.restart().ingest(stream).files_ingested == 1


def test_a_ledger_made_from_table_rows_begins_with_a_whole_listing(delta_platform: DeltaPlatform) -> None:
    platform, stream = delta_platform, json_stream("n", use_incremental_listing=True)
    land_days(platform)
    platform.engine.ingest(stream)
    assert platform.volume.names(f"_checkpoints/{stream.name}/listings")
    platform.volume_put("json/2026/11/01/late", lines('{"n":"late"}'), 5_000)
    platform.engine.reset(stream, rebuild=True)
    assert platform.restart().ingest(stream).files_ingested == 1
