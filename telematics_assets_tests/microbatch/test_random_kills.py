"""SIGKILL at any moment, again and again, while others write and another replication races: nothing is lost or doubled.

Belongs here: kills that no step announces. Does not belong here: kills at each step (`test_kills.py`).
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from telematics_assets.catalog import Names, ReplicationMode
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.microbatch.connection import Supabase
from telematics_assets_tests.databases import Database
from telematics_assets_tests.microbatch.business import Business, books, replayed
from telematics_assets_tests.microbatch.endless_process import items
from telematics_assets_tests.microbatch.replicate_process import MODES, replicate
from telematics_assets_tests.microbatch.test_stress import prepare
from telematics_assets_tests.turns import each_nth

#: Replications that race for a table.
RACERS = 2
#: How long the first of them may live once it has begun, seconds: some die in the first snapshot.
LONGEST = 1.0


@pytest.mark.parametrize("mode", each_nth(MODES, len(MODES)))
def test_replications_that_are_killed_at_any_moment_lose_and_repeat_nothing(
    tmp_path: Path, database: Database, mode: ReplicationMode, soak_factor: int
) -> None:
    prepare(database.connect, database.role)
    moments = random.Random(mode)
    business = Business(database.connect, writers=3, slowest=0.3)
    # 100 kills over all modes in the soak.
    kills = 2 if soak_factor == 1 else 26
    with business.running():
        for _ in range(kills // RACERS):
            with racers(tmp_path, database.supabase, mode) as running:
                for each in moments.sample(running, RACERS):
                    time.sleep(moments.random() * LONGEST)
                    assert each.poll() is None, "it ended by itself, with an error that does not pass"
                    each.kill()

    table = items(mode)
    time.sleep(table.lag_seconds if mode == "updated_at" else 0)
    lakehouse = DeltaLakehouse(tmp_path / "tables")
    replicate(lakehouse, database.supabase, table)
    folder = tmp_path / "tables" / Names().bronze(table.target).location
    with database.connect() as connection:
        found = books(connection, folder)
    assert found.rows > 0
    late = {key for key, value in found.values.items() if business.written.durations.get(value, 0) > table.lag_seconds}
    assert found.stale <= (late if mode == "updated_at" else set()), found
    assert (found.missing, found.undeleted, found.doubled) == (frozenset(), frozenset(), 0)
    assert len(replayed(folder, ("id", "value", "note"))) == found.rows


@contextmanager
def racers(home: Path, supabase: Supabase, mode: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Replications that have begun; none of them is left behind."""
    command = [sys.executable, "-m", "telematics_assets_tests.microbatch.endless_process"]
    running = [
        subprocess.Popen([*command, str(home), json.dumps(asdict(supabase)), mode], stdout=subprocess.PIPE)
        for _ in range(RACERS)
    ]
    try:
        for each in running:
            assert each.stdout is not None
            assert each.stdout.readline() == b"ready\n"
        yield running
    finally:
        for each in running:
            each.kill()
            each.communicate()
