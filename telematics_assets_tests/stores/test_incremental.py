"""Incremental listing in object stores: the store itself begins behind the bound."""

from __future__ import annotations

import pytest

from telematics_assets.autoloader.checkpoint import Checkpoint
from telematics_assets.autoloader.loader import StreamLoader
from telematics_assets.catalog import FileStream, TableContract
from telematics_assets.testing.memory import MemoryLakehouse
from telematics_assets.volumes.base import as_files
from telematics_assets.volumes.objects import ObjectVolume
from telematics_assets_tests.autoloader.test_incremental import TABLE, Writer
from telematics_assets_tests.stores import servers
from telematics_assets_tests.stores.books import LOCATION
from telematics_assets_tests.stores.proxy import proxied

STREAM = FileStream("things", "json", "in", "things", TableContract("."), {"use_incremental_listing": "true"})  # type: ignore[arg-type]


@pytest.mark.parametrize("store", sorted(servers.PLACES))
def test_new_files_come_at_once_and_late_ones_when_the_folder_is_listed_whole(store: str) -> None:
    volume, lakehouse = ObjectVolume(servers.PLACES[store](), LOCATION), MemoryLakehouse()
    ahead = 0

    def process() -> StreamLoader:
        writer = Writer(volume, lakehouse)
        return StreamLoader(
            STREAM,
            TABLE,
            volume,
            lakehouse,
            writer,
            settle_seconds=0,
            incomplete_seconds=0,
            clock=lambda: 1_700_000_000_000_000_000 + ahead,
            recent_files=4,
        )

    for day in range(1, 7):
        for name in ("a", "b"):
            volume.create(f"in/date=2026-11-{day:02}/{name}", b"x")
    sensor = process()
    assert process().ingest().files_ingested == 12
    record = Checkpoint(volume, STREAM.name).whole_listing()
    assert record is not None
    version = sensor.look().data_version
    assert sensor.look().data_version == version
    volume.create("in/date=2026-11-06/c", b"x")
    volume.create("in/date=2026-11-01/late", b"x")
    assert (sensor.look().files, process().ingest().files_ingested) == (1, 1)
    ahead = 3600 * 1_000_000_000
    assert process().ingest().files_ingested == 1
    assert lakehouse.open(TABLE).count() == 14  # type: ignore[union-attr]


def test_s3_is_asked_to_begin_behind_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    place = servers.s3()
    with proxied(servers.port_of("s3")) as proxy:
        for name, value in servers.s3_environment(proxy.port).items():
            monkeypatch.setenv(name, value)
        asked: list[str] = []
        proxy.choose = lambda method, path: asked.append(path)
        volume = ObjectVolume(place, LOCATION)
        for name in ("a/1", "b/1", "c/1"):
            volume.create(f"in/{name}", b"x")
        asked.clear()
        assert [file.path for file in as_files(volume.scan("in", "in/b/").files)] == ["in/b/1", "in/c/1"]
        (listing,) = asked
        assert "start-after=" in listing
