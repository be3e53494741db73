"""The exactly-once promise around full refreshes: killed at any step, at once with others, again and again."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import deltalake
import pytest

from telematics_assets.autoloader.loader import STEPS
from telematics_assets.autoloader.refresh import REFRESH_STEPS
from telematics_assets.catalog import Names
from telematics_assets.engines.base import IngestRequest
from telematics_assets.engines.embedded import EmbeddedEngine
from telematics_assets.errors import CommitConflictError, TransientError
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.volumes.local import LocalVolume
from telematics_assets_tests.exactly_once.dying import Death, DyingVolume
from telematics_assets_tests.exactly_once.loader_process import LOCATION, engine_of, stream_of
from telematics_assets_tests.exactly_once.test_kills import (
    Killed,
    assert_exactly_once,
    elsewhere,
    kill,
    land,
    start,
    stop_at,
)
from telematics_assets_tests.turns import in_turn

REFRESH = IngestRequest(full_refresh=True)
#: Steps behind the commit: the refresh came to pass, though nobody published it.
BEHIND = REFRESH_STEPS[REFRESH_STEPS.index("table_committed") :]


def dying_engine(home: Path, left: int) -> EmbeddedEngine:
    """An engine whose process dies before the nth thing that it publishes or deletes in the checkpoint."""
    volume = DyingVolume(LocalVolume(home / LOCATION.lstrip("/"), LOCATION), Death(left))
    return EmbeddedEngine(volume, DeltaLakehouse(home / "tables"), Names(), settle_seconds=0, incomplete_seconds=0)


def overwrites(home: Path, format: str) -> int:
    """How many refreshes the table's log holds."""
    table = deltalake.DeltaTable(str(home / "tables/workspace/01_bronze" / stream_of(format).table))
    return sum(entry.get("operationParameters", {}).get("mode") == "Overwrite" for entry in table.history())


def intents(home: Path, format: str) -> list[str]:
    """Intents in the checkpoint."""
    folder = home / LOCATION.lstrip("/") / "_checkpoints" / stream_of(format).name / "refreshes"
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


@pytest.mark.parametrize(("step", "format"), in_turn(REFRESH_STEPS, ["parquet", "json"]))
def test_a_refresh_that_dies_at_any_step_came_to_pass_or_never_was(tmp_path: Path, format: str, step: str) -> None:
    stream = stream_of(format)
    land(tmp_path, format, 0)
    engine_of(tmp_path).ingest(stream)
    land(tmp_path, format, 1)
    for round_ in range(2):
        with pytest.raises(Killed):
            engine_of(tmp_path, stop_at(step, 1, kill)).ingest(stream, REFRESH)
        # The second may die over what the first left behind.
        expected = 1 if step in ("identity_set", "made_durable") else round_ + 1
        assert overwrites(tmp_path, format) == (expected if step in BEHIND else 0)
    made = overwrites(tmp_path, format)
    looked = engine_of(tmp_path).look(stream)
    published = step == "refresh_published"
    assert looked.files == (0 if published else 8 if step in BEHIND else 4)
    report = engine_of(tmp_path).ingest(stream)
    assert [batch.recovered for batch in report.batches][:1] == ([] if published else [step in BEHIND])
    assert overwrites(tmp_path, format) == made
    assert_exactly_once(tmp_path, format)
    assert intents(tmp_path, format) == []
    engine_of(tmp_path).ingest(stream, REFRESH)
    land(tmp_path, format, 2)
    engine_of(tmp_path).ingest(stream)
    assert_exactly_once(tmp_path, format)


@pytest.mark.parametrize("again", [None, REFRESH])
def test_a_refresh_that_dies_before_any_thing_it_publishes_is_ended_by_the_next_call(
    tmp_path: Path, again: IngestRequest | None
) -> None:
    stream = stream_of("json")
    left = 0
    died = True
    while died:
        land(tmp_path, "json", left, files=1, rows=2)
        engine_of(tmp_path).ingest(stream)
        try:
            dying_engine(tmp_path, left).ingest(stream, REFRESH)
            died = False
        except Killed:
            left += 1
        engine_of(tmp_path).ingest(stream, again)
        assert_exactly_once(tmp_path, "json")
    # Intent, result, ledger, commit, generation, and the intent's end.
    assert left >= 6


@pytest.mark.parametrize(("step", "damage"), in_turn(REFRESH_STEPS, ["metadata", "commits", "ledger"]))
def test_a_refresh_that_dies_while_it_cures_damage_can_be_made_again(tmp_path: Path, step: str, damage: str) -> None:
    stream = stream_of("json")
    for wave in range(4):
        land(tmp_path, "json", wave, files=6)
        engine_of(tmp_path).ingest(stream)
    folder = tmp_path / LOCATION.lstrip("/") / "_checkpoints" / stream.name / damage
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(Killed):
        engine_of(tmp_path, stop_at(step, 1, kill)).ingest(stream, REFRESH)
    engine_of(tmp_path).ingest(stream, REFRESH if step not in BEHIND else None)
    assert_exactly_once(tmp_path, "json")


@pytest.mark.parametrize("step", [step for step in STEPS if step not in ("table_created", "metadata_published")])
def test_a_refresh_at_any_step_of_a_load_wins_or_waits_its_turn(tmp_path: Path, step: str) -> None:
    stream = stream_of("json")
    land(tmp_path, "json", 9)
    engine_of(tmp_path).ingest(stream)
    land(tmp_path, "json", 0)

    def refresh() -> None:
        engine_of(tmp_path).ingest(stream, REFRESH)

    with suppress(TransientError):
        engine_of(tmp_path, stop_at(step, 1, lambda: elsewhere(refresh))).ingest(stream)
    assert overwrites(tmp_path, "json") == 1
    engine_of(tmp_path).ingest(stream)
    assert_exactly_once(tmp_path, "json")


@pytest.mark.parametrize(("step", "other"), in_turn(REFRESH_STEPS, [None, REFRESH]))
def test_another_at_any_step_of_a_refresh_dies_or_ends_and_nothing_is_doubled(
    tmp_path: Path, step: str, other: IngestRequest | None
) -> None:
    stream = stream_of("json")
    land(tmp_path, "json", 0)
    engine_of(tmp_path).ingest(stream)
    for wave, dying in enumerate((None, "results_published", "table_committed"), 1):
        land(tmp_path, "json", wave)

        def meanwhile(dying: str | None = dying) -> None:
            with suppress(Killed):
                engine_of(tmp_path, stop_at(dying or "", 1, kill)).ingest(stream, other)

        with suppress(CommitConflictError):
            engine_of(tmp_path, stop_at(step, 1, lambda: elsewhere(meanwhile))).ingest(stream, REFRESH)
        engine_of(tmp_path).ingest(stream)
        assert_exactly_once(tmp_path, "json")


def test_a_process_killed_at_one_step_of_a_refresh_after_the_other_loses_and_doubles_nothing(
    tmp_path: Path, soak_factor: int
) -> None:
    land(tmp_path, "json", 99)
    engine_of(tmp_path).ingest(stream_of("json"))
    for wave, step in enumerate(REFRESH_STEPS if soak_factor > 1 else REFRESH_STEPS[::2]):
        land(tmp_path, "json", wave)
        with start(tmp_path, "json", "--full-refresh", step, "1") as process:
            process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL
    with start(tmp_path, "json") as process:
        process.communicate(timeout=300)
    assert process.returncode == 0
    assert_exactly_once(tmp_path, "json")


def test_processes_that_load_and_refresh_and_are_killed_lose_and_double_nothing(
    tmp_path: Path, soak_factor: int
) -> None:
    moments = random.Random(11)
    land(tmp_path, "json", 99)
    engine_of(tmp_path).ingest(stream_of("json"))
    for wave in range(2 if soak_factor == 1 else 3 * soak_factor):
        land(tmp_path, "json", wave, rows=100)
        processes = [start(tmp_path, "json", *arguments) for arguments in ([], ["--full-refresh"], ["--full-refresh"])]
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        time.sleep(moments.uniform(0, 0.3))
        moments.choice(processes).kill()
        for process in processes:
            with process:
                process.communicate(timeout=300)
    with start(tmp_path, "json") as process:
        process.communicate(timeout=300)
    assert process.returncode == 0
    assert_exactly_once(tmp_path, "json")


def test_loads_refreshes_and_deaths_in_any_order_lose_and_double_nothing(tmp_path: Path, soak_factor: int) -> None:
    chance = random.Random(5)
    stream = stream_of("json")
    land(tmp_path, "json", 999)

    def one(request: IngestRequest | None, step: str, occurrence: int) -> Callable[[], object]:
        return lambda: engine_of(tmp_path, stop_at(step, occurrence, kill)).ingest(stream, request)

    for wave in range(25 * soak_factor):
        if chance.random() < 0.5:
            land(tmp_path, "json", wave, files=chance.randint(1, 4))
        calls = [
            one(
                chance.choice([None, REFRESH]),
                chance.choice([*STEPS, *REFRESH_STEPS, "none"]),
                chance.randint(1, 3),
            )
            for _ in range(chance.choice([1, 1, 2]))
        ]
        with ThreadPoolExecutor(len(calls)) as pool:
            for future in [pool.submit(call) for call in calls]:
                with suppress(Killed, TransientError):
                    future.result()
    engine_of(tmp_path).ingest(stream)
    assert_exactly_once(tmp_path, "json")
