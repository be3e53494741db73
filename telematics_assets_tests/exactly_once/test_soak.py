"""The whole house under a continuing feed and kills without end: every record is there once, with its values.

Belongs here: `dagster dev` with its sensors, a feed with drift and dirty records, loaders that race the sensors' runs,
and SIGKILLs at random moments. Does not belong here: kills at each step (`test_kills.py`).

It takes 10 minutes with `--soak`, or as long as `--soak-seconds` says; without, the same for a few seconds.
"""

from __future__ import annotations

import collections
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import dagster as dg
import deltalake
import pyarrow as pa
import pytest

from telematics_assets.assets.files import PROCESS_TAG
from telematics_assets.catalog import FILE_STREAMS, TELEMATICS, TELEMATICS_TEST, FileStream
from telematics_assets.engines.base import FileState
from telematics_assets.engines.embedded import open_engine
from telematics_assets.settings import load_settings
from telematics_assets_tests.exactly_once.reconciliation import LOCATION, Account, reconcile, unreadable_files
from telematics_assets_tests.test_dev import LIMIT_SECONDS, House

#: What the feed lands, files a minute for each stream.
FILES_PER_MINUTE = 60
#: Loaders beside the sensors' runs.
RACERS = 2


@dataclass
class Racer:
    """A `telematics load` that may be killed.

    Attributes:
        process: The process.
        killed_at: When it is killed, by the monotonic clock; None if it may end.
    """

    process: subprocess.Popen[str]
    killed_at: float | None


class Chaos:
    """What disturbs the house, and what came of it."""

    def __init__(self, house: House, output: IO[str]) -> None:
        self._house = house
        self._output = output
        self._moments = random.Random(11)
        self._racers: list[Racer] = []
        self._next_worker = time.monotonic() + self._moments.uniform(1, 6)
        self.loaders_killed = self.workers_killed = 0
        self.codes: collections.Counter[int] = collections.Counter()

    def command(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """Start `telematics …` on the house's home."""
        environment = {**os.environ, "TELEMATICS_HOME": str(self._house.home)}
        code = "from telematics_assets.cli import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments], env=environment, stderr=self._output, text=True, **options
        )

    def go_on(self) -> None:
        """Kill what is due, and start what is missing."""
        now = time.monotonic()
        for racer in self._racers:
            if racer.killed_at is not None and now > racer.killed_at:
                racer.process.kill()
        self._reap()
        while len(self._racers) < RACERS:
            process = self.command("load", "--json", stdout=subprocess.DEVNULL)
            killed_at = now + self._moments.uniform(0.8, 6) if self._moments.random() < 0.7 else None
            self._racers.append(Racer(process, killed_at))
        if now > self._next_worker and self._kill_a_worker():
            self._next_worker = now + self._moments.uniform(4, 20)

    def end(self) -> None:
        """Let the loaders that are left come to their end."""
        for racer in self._racers:
            racer.process.wait(300)
        self._reap()

    def stop(self) -> None:
        """Leave no process behind."""
        for racer in self._racers:
            racer.process.kill()
            racer.process.wait()

    def _reap(self) -> None:
        for racer in [racer for racer in self._racers if racer.process.poll() is not None]:
            self._racers.remove(racer)
            self.codes[racer.process.returncode] += 1
            self.loaders_killed += racer.process.returncode == -signal.SIGKILL

    def _kill_a_worker(self) -> bool:
        """SIGKILL the process of a run that loads at this moment, if there is one."""
        with dg.DagsterInstance.from_config(str(self._house.dagster_home)) as instance:
            running = list(instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])))
        self._moments.shuffle(running)
        for run in running:
            run_id, _, process = run.tags.get(PROCESS_TAG, "").partition(" ")
            if run_id == run.run_id:
                with suppress(ProcessLookupError):
                    os.kill(int(process.split("/")[1]), signal.SIGKILL)
                    self.workers_killed += 1
                    return True
        return False


@pytest.fixture
def house(tmp_path: Path, repository: Path) -> Iterator[House]:
    """A running `dagster dev` of a deployment of its own; nothing of it outlives the test."""
    # Paths of sockets must be short.
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as temporary:
        home = tmp_path / "house"
        home.mkdir()
        house = House(repository, home, Path(temporary))
        try:
            house.start()
            yield house
        finally:
            house.kill()


def test_a_feed_under_kills_and_races_becomes_rows_exactly_once(
    house: House, tmp_path: Path, soak_seconds: float
) -> None:
    with (tmp_path / "output.txt").open("w+") as output:
        chaos = Chaos(house, output)
        wave = ("--files", "4", "--rows", "600", "--drift", "--dirty")
        feed = chaos.command("simulate", "--feed", str(FILES_PER_MINUTE), *wave, "--json", stdout=subprocess.PIPE)
        try:
            house.wait_until(lambda: any(house.landing.rglob("points-*")), "the first file has landed")
            ends = time.monotonic() + soak_seconds
            # A busy machine is given time for a kill all the same.
            while time.monotonic() < ends or (not chaos.loaders_killed and time.monotonic() < ends + LIMIT_SECONDS):
                chaos.go_on()
                assert feed.poll() is None, "the feed ended by itself"
                time.sleep(0.05)
            chaos.end()
            house.wait_until(lambda: runs_by_status(house)["SUCCESS"] > 0, "a run has done what no racer took from it")
            feed.send_signal(signal.SIGINT)
            fed, _ = feed.communicate(timeout=300)
            house.wait_until(lambda: loaded_whole(house, chaos), "everything that landed is loaded", pause_seconds=0.5)
            skipped = {stream.name: states(house, stream, "SKIPPED_CORRUPTED") for stream in FILE_STREAMS}
        finally:
            feed.kill()
            feed.wait()
            chaos.stop()
        output.seek(0)
        said = output.read()[-5000:]
    runs = runs_by_status(house)
    accounts = {stream.name: reconcile(house.home, stream) for stream in FILE_STREAMS}
    summary = {stream["stream"]: stream for stream in json.loads(fed)["streams"]}
    sys.stdout.write(
        f"{soak_seconds:g} s: {chaos.workers_killed} run workers and {chaos.loaders_killed} loaders killed; "
        f"loaders ended {dict(chaos.codes)}; runs ended {dict(runs)}\n"
        + "".join(f"{name}: {account}\n" for name, account in accounts.items())
    )
    assert feed.returncode == 0
    assert set(chaos.codes) <= {0, 75, -signal.SIGKILL}, said
    assert chaos.loaders_killed
    for name, account in accounts.items():
        assert account.balanced, f"{name}: {account}"
        fed_counts = (summary[name]["files"], summary[name]["broken"], summary[name]["rows"])
        assert (account.files, account.unreadable, account.rows) == fed_counts
    assert accounts["telematics_test"].rows > 0
    for stream in FILE_STREAMS:
        assert skipped[stream.name] == unreadable_files(house.home, stream)
    if soak_seconds >= 300:
        assert chaos.workers_killed >= 10
        assert all(account.rescued for account in accounts.values())
        assert accounts["telematics_test"].corrupt


def runs_by_status(house: House) -> collections.Counter[str]:
    """How many runs of the house stand in each status."""
    with dg.DagsterInstance.from_config(str(house.dagster_home)) as instance:
        return collections.Counter(run.status.value for run in instance.get_runs())


def loaded_whole(house: House, chaos: Chaos) -> bool:
    """Load what is left; whether nothing was."""
    with chaos.command("load", "--json", stdout=subprocess.PIPE) as process:
        out, _ = process.communicate(timeout=300)
    assert process.returncode in (0, 75)
    nothing_left = not any(report["batches"] for report in json.loads(out))
    return (
        process.returncode == 0
        and nothing_left
        and not any(states(house, stream, "DISCOVERED") for stream in FILE_STREAMS)
    )


def states(house: House, stream: FileStream, state: FileState) -> set[str]:
    """The stream's files in a state."""
    return {file.path for file in open_engine(load_settings({"TELEMATICS_HOME": str(house.home)})).files(stream, state)}


# -- the reconciliation itself -----------------------------------------------------------------------------------------

LINES = (
    b'{"vehicle_id":"a","trip_id":null,"speed_kmh":1.10,"device": {"m": [1, 2]} ,"new":true}',
    b'{"vehicle_id":"\\u00e9","Speed_KMH":2}',
    b'{"vehicle_id":"b","vehicle_id":"c"}',
    b'{"vehicle_id":"\xff"}',
    b'{"vehicle_id":"d"} {}',
    b"{}",
)
ROWS: list[dict[str, Any]] = [
    {"vehicle_id": "a", "speed_kmh": "1.10", "device": '{"m": [1, 2]}', "new": "true"},
    {"vehicle_id": "é", "_rescued_data": f'{{"Speed_KMH":2,"_file_path":"{LOCATION}/json/a.json"}}'},
    {"_corrupt_record": LINES[2].decode()},
    {"_corrupt_record": "base64:eyJ2ZWhpY2xlX2lkIjoi/yJ9", "_raw_record": "base64:eyJ2ZWhpY2xlX2lkIjoi/yJ9"},
    {"_corrupt_record": LINES[4].decode()},
    {},
]


def account_of(home: Path, rows: list[dict[str, Any]]) -> Account:
    """The account of the lines, held against a table of some rows."""
    folder = home / LOCATION.lstrip("/") / "json"
    folder.mkdir(parents=True)
    (folder / "a.json").write_bytes(b"\n".join(LINES) + b"\n\n")
    (folder / "cut.json.gz").write_bytes(gzip.compress(LINES[0])[:-9])
    columns = ["vehicle_id", "trip_id", "speed_kmh", "device", "new", "_rescued_data", "_corrupt_record", "_raw_record"]
    schema = pa.schema([(name, pa.string()) for name in (*columns, "_source_file")])
    given = [{"_source_file": f"{LOCATION}/json/a.json", **row} for row in rows]
    deltalake.write_deltalake(
        str(home / "tables/workspace/01_bronze/telematics_test"), pa.Table.from_pylist(given, schema)
    )
    return reconcile(home, TELEMATICS_TEST)


def whole(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their lines."""
    return [{"_raw_record": line.decode(errors="replace"), **row} for line, row in zip(LINES, rows, strict=True)]


def test_the_reconciliation_accounts_for_every_line(tmp_path: Path) -> None:
    account = account_of(tmp_path, whole(ROWS))
    assert account == Account(files=2, unreadable=1, rows=6, corrupt=3, rescued=1)
    assert account.balanced
    assert unreadable_files(tmp_path, TELEMATICS_TEST) == {"json/cut.json.gz"}
    assert TELEMATICS.format == "parquet"


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (whole(ROWS)[1:], (1, 0, 0)),
        (whole(ROWS) + whole(ROWS)[:2], (0, 2, 0)),
        (whole([{**ROWS[0], "speed_kmh": "1.1"}, *ROWS[1:]]), (0, 0, 1)),
        (whole([*ROWS[:1], {**ROWS[1], "_rescued_data": None}, *ROWS[2:]]), (0, 0, 1)),
        (whole([*ROWS[:2], {"vehicle_id": "c"}, *ROWS[3:]]), (0, 0, 1)),
        ([*whole(ROWS)[:-1], {"_raw_record": "{ }"}], (1, 1, 0)),
        ([*whole(ROWS), {"_source_file": "elsewhere", "_raw_record": "{}"}], (0, 1, 0)),
    ],
    ids=range(7),
)
def test_the_reconciliation_sees_what_is_lost_doubled_or_changed(
    tmp_path: Path, rows: list[dict[str, Any]], found: tuple[int, int, int]
) -> None:
    account = account_of(tmp_path, rows)
    assert (account.lost, account.doubled, account.changed) == found
    assert not account.balanced
    assert account.examples
