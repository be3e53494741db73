"""Maintenance and `clean_source` in object stores: the same promises as on a disk."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import obstore
import pytest

from telematics_assets.autoloader.cleaning import CLEANING_STEPS
from telematics_assets.volumes.base import FileEntry
from telematics_assets.volumes.objects import ObjectVolume, open_store
from telematics_assets_tests.exactly_once.test_kills import Killed
from telematics_assets_tests.stores import servers
from telematics_assets_tests.stores.books import LOCATION, STREAM, books, engine_of, land

MOVER = STREAM.with_options(
    clean_source="MOVE", clean_source_retention_duration="0 days", clean_source_move_destination="_archive/s"
)


def keys(place: str, folder: str) -> set[str]:
    """Names of the objects below a folder of the Volume."""
    root = f"{LOCATION[1:]}/{folder}/"
    return {entry["path"].partition(root)[2] for entry in open_store(place).list(f"{LOCATION[1:]}/{folder}").collect()}


def age() -> None:
    """The store's times are whole seconds, and may be those of the second that has begun."""
    time.sleep(1.1)


@pytest.mark.parametrize("store", ["azure", pytest.param("s3", marks=pytest.mark.soak)])
def test_tables_ledgers_and_landing_folders_are_kept_small(store: str) -> None:
    place = servers.PLACES[store]()
    for wave in range(3):
        land(place, wave)
        engine_of(place).ingest(STREAM)
    landed, loaded = books(place)
    age()
    report = engine_of(place).maintain(MOVER)
    assert report.notes == ()
    assert (report.files_before > 1, report.files_after) == (True, 1)
    assert report.ledger_parts_after == 1
    assert report.sources_moved == 18
    assert keys(place, "json") == set()
    assert len(keys(place, "_archive/s")) == 18
    assert books(place)[1] == loaded == landed
    land(place, 7)
    assert engine_of(place).ingest(STREAM).rows == 30
    assert all(b.expected_rows == b.added_rows for b in engine_of(place).balance(STREAM, 0))


@pytest.mark.parametrize("step", CLEANING_STEPS)
def test_a_move_that_dies_at_any_step_is_finished_by_the_next(step: str) -> None:
    place = servers.azure()
    land(place, 0, files=2)
    engine_of(place).ingest(STREAM)
    age()

    def die(passed: str) -> None:
        if passed == step:
            raise Killed

    with pytest.raises(Killed):
        engine_of(place, on_step=die).ingest(MOVER)
    engine_of(place).ingest(MOVER)
    assert keys(place, "json") == set()
    assert keys(place, "_archive/s") == {"w0-0.json", "w0-1.json"}
    assert all("moved to" in (file.reason or "") for file in engine_of(place).files(MOVER))


def test_two_that_compact_at_once_and_a_load_beside_them_double_nothing() -> None:
    place = servers.azure()
    for wave in range(2):
        land(place, wave)
        engine_of(place).ingest(STREAM)
    land(place, 2)
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(engine_of(place).maintain, STREAM) for _ in range(2)]
        jobs.append(pool.submit(engine_of(place).ingest, STREAM))  # type: ignore[arg-type]
        for job in jobs:
            job.result()
    landed, loaded = books(place)
    assert loaded == landed
    assert engine_of(place).ingest(STREAM).batches == ()


@pytest.mark.parametrize("store", servers.PLACES)
def test_only_the_version_that_is_meant_is_removed(store: str) -> None:
    place = servers.PLACES[store]()
    volume = ObjectVolume(f"{place}{LOCATION}", LOCATION)
    volume.create("json/a.json", b"one")
    first = volume.stat("json/a.json")
    assert first is not None
    obstore.put(open_store(place), f"{LOCATION[1:]}/json/a.json", b"two")
    assert not volume.remove(first)
    second = volume.stat("json/a.json")
    assert second is not None
    assert volume.remove(second)
    assert volume.stat("json/a.json") is None
    assert not volume.remove(FileEntry("json/none.json", 1, 1, None))
