"""The exactly-once promise in an object store: loads that die at any step, and two loaders at once."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress

import obstore
import pyarrow as pa
import pytest

from telematics_assets.autoloader.loader import STEPS
from telematics_assets.autoloader.refresh import REFRESH_STEPS
from telematics_assets.catalog import FileStream, Names, TableContract
from telematics_assets.engines.base import IngestRequest
from telematics_assets.errors import TransientError
from telematics_assets.testing import parquet_bytes
from telematics_assets.volumes.objects import open_store
from telematics_assets_tests.exactly_once.test_kills import (
    FIRST_TIME,
    Killed,
    elsewhere,
    kill,
    load_under_kills,
    start_process,
    stop_at,
)
from telematics_assets_tests.stores import servers
from telematics_assets_tests.stores.books import LOCATION, STREAM, books, engine_of, land
from telematics_assets_tests.turns import each_nth, in_turn

REFRESH = IngestRequest(full_refresh=True)


def assert_exactly_once(place: str, rows: int) -> None:
    """The books balance, and the states say the same."""
    landed, loaded = books(place)
    assert loaded == landed
    assert len(landed) == rows
    engine = engine_of(place)
    assert {record.state for record in engine.files(STREAM)} == {"INGESTED"}
    assert all(b.expected_rows == b.added_rows for b in engine.balance(STREAM, 0))
    assert engine.ingest(STREAM).batches == ()


def load(place: str, on_step: Callable[[str], None] | None = None) -> bool:
    """Load once; whether it died."""
    try:
        engine_of(place, on_step=on_step).ingest(STREAM)
    except Killed:
        return True
    return False


@pytest.mark.parametrize(("step", "occurrence"), in_turn(STEPS, [1, 2]))
def test_a_load_that_dies_at_any_step_is_finished_by_the_next(step: str, occurrence: int) -> None:
    place = servers.azure()
    land(place, 0)
    assert load(place, stop_at(step, occurrence, kill)) or (step in FIRST_TIME and occurrence == 2)
    land(place, 1)
    load(place)
    assert_exactly_once(place, 60)


@pytest.mark.parametrize("step", each_nth(STEPS, 2, first=1))
def test_another_loader_at_any_step_wins_and_this_one_stops_cleanly(step: str) -> None:
    place = servers.azure()
    land(place, 0)
    with suppress(TransientError):
        load(place, stop_at(step, 1, lambda: elsewhere(lambda: load(place))))
    load(place)
    assert_exactly_once(place, 30)


@pytest.mark.parametrize(("step", "store"), in_turn(REFRESH_STEPS, sorted(servers.PLACES)))
def test_a_full_refresh_that_dies_at_any_step_came_to_pass_or_never_was(store: str, step: str) -> None:
    place = servers.PLACES[store]()
    land(place, 0)
    load(place)
    land(place, 1)
    with pytest.raises(Killed):
        engine_of(place, on_step=stop_at(step, 1, kill)).ingest(STREAM, REFRESH)
    load(place)
    assert_exactly_once(place, 60)


def test_on_s3_a_load_that_dies_at_one_step_after_the_other_is_finished_by_the_next(soak_factor: int) -> None:
    place = servers.s3()
    steps = STEPS if soak_factor > 1 else STEPS[1::2]
    for wave, step in enumerate(steps):
        land(place, wave)
        load(place, stop_at(step, 1, kill))
    load(place)
    assert_exactly_once(place, 30 * len(steps))


@pytest.mark.parametrize("step", ["reading", "results_published", "table_committed"])
def test_a_widening_that_dies_is_finished_by_the_next(step: str) -> None:
    place = servers.s3()
    wide = {"schema_evolution_mode": "addNewColumnsWithTypeWidening"}
    stream = FileStream("w", "parquet", "parquet", "w", TableContract("Rows."), wide)  # type: ignore[arg-type]
    store = open_store(place)

    def land_parquet(name: str, values: pa.Array) -> None:
        obstore.put(
            store,
            f"{LOCATION[1:]}/parquet/{name}",
            parquet_bytes({"n": values, "m": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int8()))}),
        )

    land_parquet("a", pa.array([1], pa.int32()))
    engine_of(place).ingest(stream)
    land_parquet("b", pa.array([2**40]))
    with pytest.raises(Killed):
        engine_of(place, on_step=stop_at(step, 1, kill)).ingest(stream)
    engine = engine_of(place)
    engine.ingest(stream)
    assert sorted(engine.read(Names().bronze("w"), ["n"])["n"].to_pylist()) == [1, 2**40]
    assert all(b.expected_rows == b.added_rows for b in engine.balance(stream, 0))
    assert engine_of(place).ingest(stream).batches == ()


def start(place: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a loader as a process; the environment tells it how to reach the store."""
    return start_process("telematics_assets_tests.stores.loader_process", place, *arguments)


@pytest.mark.soak
def test_processes_killed_at_one_step_after_the_other_lose_and_double_nothing() -> None:
    place = servers.azure()
    for wave, step in enumerate(STEPS):
        land(place, wave)
        with start(place, step, "1") as process:
            process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL or (step in FIRST_TIME and wave > STEPS.index(step))
    load(place)
    assert_exactly_once(place, 30 * len(STEPS))


def test_processes_killed_at_random_moments_lose_and_double_nothing(soak_factor: int) -> None:
    place = servers.azure()
    waves = load_under_kills(
        2 if soak_factor == 1 else 4 * soak_factor, lambda wave: land(place, wave), lambda: start(place)
    )
    assert_exactly_once(place, 30 * waves)


def test_processes_that_load_at_the_same_time_lose_and_double_nothing(soak_factor: int) -> None:
    place = servers.azure()
    for wave in range(soak_factor):
        land(place, wave)
        processes = [start(place) for _ in range(3)]
        for process in processes:
            with process:
                process.communicate(timeout=300)
        assert [process.returncode for process in processes].count(0) >= 1
    load(place)
    assert_exactly_once(place, 30 * soak_factor)
