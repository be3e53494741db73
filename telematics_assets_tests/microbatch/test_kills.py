"""A replication that is killed anywhere, or meets another one, loses nothing and repeats nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import polars as pl
import pytest

from telematics_assets.catalog import Names, ReplicationMode
from telematics_assets.errors import TransientError
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.microbatch.replicate import STEPS
from telematics_assets_tests.databases import Database
from telematics_assets_tests.exactly_once.test_kills import Killed, elsewhere, kill, stop_at
from telematics_assets_tests.microbatch.business import replayed
from telematics_assets_tests.microbatch.replicate_process import MODES, replicate, table_of
from telematics_assets_tests.turns import in_turn

AGAIN = tuple(step for step in STEPS if step != "table_created")


def change(database: Database, wave: int) -> None:
    """Change, add and delete some rows in every range of keys."""
    database.run(
        f"UPDATE policies SET name = 'wave {wave}', updated_at = clock_timestamp() WHERE id % 7 = {wave % 7}",
        f"DELETE FROM policies WHERE id % 13 = {wave % 13}",
        f"INSERT INTO policies SELECT {wave + 1} * 1000 + i, 'new' FROM generate_series(1, 10) i",
    )


def bronze(home: Path, mode: ReplicationMode) -> pl.DataFrame:
    """The bronze rows by id."""
    table = DeltaLakehouse(home / "tables").open(Names().bronze(table_of(mode).target))
    assert table is not None
    return pl.DataFrame(table.read(["id", "name"])).sort("id")


def assert_mirrored(home: Path, database: Database, mode: ReplicationMode) -> None:
    """Bronze is the source, row by row, and its change data feed leads to it."""
    with database.connect() as connection:
        rows = connection.execute("SELECT id, name FROM policies ORDER BY id").fetchall()
    found = bronze(home, mode)
    assert found.rows() == rows
    folder = home / "tables" / Names().bronze(table_of(mode).target).location
    assert replayed(folder, ("id", "name")) == rows


@pytest.mark.parametrize(("step", "mode"), in_turn(STEPS, MODES))
def test_a_snapshot_that_dies_at_any_step_is_finished_by_the_next(
    tmp_path: Path, policies: Database, mode: ReplicationMode, step: str
) -> None:
    assert_finished_by_the_next(tmp_path, policies, mode, step, 1)


@pytest.mark.parametrize(("step", "mode"), in_turn(AGAIN, MODES[1:] + MODES[:1]))
def test_a_snapshot_that_dies_when_it_comes_to_a_step_again_is_finished_by_the_next(
    tmp_path: Path, policies: Database, mode: ReplicationMode, step: str
) -> None:
    assert_finished_by_the_next(tmp_path, policies, mode, step, 2)


def assert_finished_by_the_next(
    home: Path, policies: Database, mode: ReplicationMode, step: str, occurrence: int
) -> None:
    """A first snapshot dies; what comes after it mirrors everything."""
    lakehouse = DeltaLakehouse(home / "tables")
    with pytest.raises(Killed):
        replicate(lakehouse, policies.supabase, table_of(mode), stop_at(step, occurrence, kill))
    for wave in (1, 2):
        change(policies, wave)
        replicate(lakehouse, policies.supabase, table_of(mode))
        assert_mirrored(home, policies, mode)


@pytest.mark.parametrize(("step", "mode"), in_turn(AGAIN, MODES))
def test_a_batch_and_a_full_snapshot_that_die_at_any_step_are_finished_by_the_next(
    tmp_path: Path, policies: Database, mode: ReplicationMode, step: str
) -> None:
    lakehouse = DeltaLakehouse(tmp_path / "tables")
    replicate(lakehouse, policies.supabase, table_of(mode))
    for wave, full in enumerate((False, True), 3):
        change(policies, wave)
        with pytest.raises(Killed):
            replicate(lakehouse, policies.supabase, table_of(mode), stop_at(step, 1, kill), full=full)
        rows = bronze(tmp_path, mode).height
        assert rows > 60, "readers never see an empty table"
        replicate(lakehouse, policies.supabase, table_of(mode))
        assert_mirrored(tmp_path, policies, mode)


@pytest.mark.parametrize(("step", "mode"), in_turn(AGAIN, MODES[2:] + MODES[:2]))
def test_another_replication_at_any_step_wins_and_this_one_stops_cleanly(
    tmp_path: Path, policies: Database, mode: ReplicationMode, step: str
) -> None:
    assert_another_wins(tmp_path, policies, mode, step, began=True)


@pytest.mark.parametrize(("step", "mode"), in_turn(STEPS, MODES[3:] + MODES[:3]))
def test_another_replication_at_any_step_of_a_first_snapshot_wins_and_this_one_stops_cleanly(
    tmp_path: Path, policies: Database, mode: ReplicationMode, step: str
) -> None:
    assert_another_wins(tmp_path, policies, mode, step, began=False)


def assert_another_wins(home: Path, policies: Database, mode: ReplicationMode, step: str, *, began: bool) -> None:
    """One replication meets another at a step; one of them yields, and nothing is lost or repeated."""
    lakehouse = DeltaLakehouse(home / "tables")
    table = table_of(mode)
    if began:
        replicate(lakehouse, policies.supabase, table)
        change(policies, 1)
    slow = stop_at(step, 1, lambda: elsewhere(lambda: replicate(lakehouse, policies.supabase, table)))
    report = replicate(lakehouse, policies.supabase, table, slow)
    if step in ("opened", "cut_taken", "reading", "extracted") and (began or step != "opened"):
        assert report.yielded
    replicate(lakehouse, policies.supabase, table)
    assert_mirrored(home, policies, mode)


def test_a_process_killed_at_one_step_after_the_other_loses_and_repeats_nothing(
    tmp_path: Path, policies: Database, soak_factor: int
) -> None:
    # A process needs a second to begin, and each of the steps is passed above without one.
    for wave, step in enumerate(STEPS if soak_factor > 1 else STEPS[1::3]):
        if wave:
            change(policies, wave)
        run = start(tmp_path, policies, "row_xid", step, "1")
        run.communicate(timeout=300)
        assert run.returncode == -signal.SIGKILL or step == "table_created"
    run = start(tmp_path, policies, "row_xid")
    run.communicate(timeout=300)
    assert run.returncode == 0
    assert_mirrored(tmp_path, policies, "row_xid")


def test_processes_that_replicate_at_the_same_time_lose_and_repeat_nothing(
    tmp_path: Path, policies: Database, soak_factor: int
) -> None:
    for wave in range(1 if soak_factor == 1 else 2 * soak_factor):
        change(policies, wave)
        runs = [start(tmp_path, policies, "row_xid") for _ in range(3)]
        for run in runs:
            run.communicate(timeout=300)
        assert [run.returncode for run in runs].count(0) >= 1
    with suppress(TransientError):
        replicate(DeltaLakehouse(tmp_path / "tables"), policies.supabase, table_of("row_xid"))
    assert_mirrored(tmp_path, policies, "row_xid")


def start(home: Path, database: Database, mode: str, *fate: str) -> subprocess.Popen[str]:
    """Start a replication as a process."""
    parameters = json.dumps(asdict(database.supabase))
    command = [sys.executable, "-m", "telematics_assets_tests.microbatch.replicate_process"]
    return subprocess.Popen([*command, str(home), parameters, mode, *fate], stdout=subprocess.PIPE, text=True)
