"""The whole house as its user runs it: the real `dagster dev`, files that land, and a kill of everything at once.

Belongs here: what only all processes together can show: how soon a file is a row, and that a crash needs nobody's help.
Does not belong here: start-up without a warning (`test_commands.py`), kills at every step of a load (`exactly_once/`).
"""

from __future__ import annotations

import collections
import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster as dg
import deltalake
import pyarrow.parquet as pq
import pytest

from telematics_assets.assets.files import bronze_key, pool_name
from telematics_assets.automation import STREAM_TAG
from telematics_assets.catalog import FILE_STREAMS, TELEMATICS, TELEMATICS_TEST, FileStream, Names
from telematics_assets.dagster_home import prepare_dagster_home
from telematics_assets.demo.fleet import FleetPlan, simulate
from telematics_assets.volumes.local import LocalVolume
from telematics_assets_tests.test_commands import UNWANTED

#: The project's promise: from a file that lands to its green asset.
PROMISED_SECONDS = 15.0
#: What that is on a machine that is slow or busy: so often the time in which a process loads the definitions there.
PROMISED_STARTS = 5.0
#: Nothing here takes longer, however slow and busy the machine is.
LIMIT_SECONDS = 240.0

_SERVER = "{ version }"
_TICKS = """query($sensor: SensorSelector!) { sensorOrError(sensorSelector: $sensor) { ... on Sensor {
    sensorState { ticks(limit: 1) { timestamp } } } } }"""
_RUN = "query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
_ASSET = """query($key: [String!]!) { assetNodeOrError(assetKey: {path: $key}) { ... on AssetNode {
    assetMaterializations(limit: 1) { timestamp }
    assetChecksOrError { ... on AssetChecks { checks { executionForLatestMaterialization { status } } } } } } }"""


class Fleet:
    """The world outside: makes files somewhere else and lands them by renaming, as an uploader does."""

    def __init__(self, outbox: Path, landing: Path) -> None:
        self._outbox = outbox
        self._landing = landing
        self._seed = 0

    def pack(self, streams: Sequence[FileStream], files: int, rows: int) -> list[Path]:
        """Make files that no wave before had; nothing lands."""
        self._seed += 1
        plan = FleetPlan(files=files, rows=rows, seed=self._seed)
        report = simulate(plan, LocalVolume(self._outbox, "/Volumes/out/of/house"), streams)
        return [Path(file.path) for stream in report.streams for file in stream.files]

    def land(self, files: Sequence[Path]) -> float:
        """Land packed files.

        Returns:
            When the first one was there, in seconds since the epoch.
        """
        parts = []
        for file in files:
            target = self._landing / file
            target.parent.mkdir(parents=True, exist_ok=True)
            parts.append((shutil.copyfile(self._outbox / file, target.with_name(f".{file.name}.part")), target))
        landed_at = time.time()
        for part, target in parts:
            part.replace(target)
        return landed_at


class House:
    """A deployment of its own, and `dagster dev` for it: started, asked, killed, started again."""

    def __init__(self, repository: Path, home: Path, temporary: Path) -> None:
        self._repository = repository
        self._output = home / "output.txt"
        self._process: subprocess.Popen[bytes] | None = None
        self._url = ""
        self.home = home
        self.landing = home / Names().volume_location.lstrip("/")
        self.dagster_home = prepare_dagster_home(home / "dagster", [pool_name(stream) for stream in FILE_STREAMS])
        self._environment = {
            **os.environ,
            "TELEMATICS_HOME": str(home),
            "DAGSTER_HOME": str(self.dagster_home),
            # Killed processes leave their sockets behind.
            "TMPDIR": str(temporary),
        }

    def start(self) -> None:
        """Start it as a user would; returns once the UI answers and every sensor has looked."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            host, port = free.getsockname()
        self._url = f"http://{host}:{port}/graphql"
        started_at = time.time()
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                [Path(sys.executable).parent / "dagster", "dev", "-h", host, "-p", str(port)],
                cwd=self._repository,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A group that can be killed as a whole.
                start_new_session=True,
            )
        self.wait_until(self._answers, "the UI answers")
        self.wait_until(lambda: all(self._ticked_since(stream, started_at) for stream in FILE_STREAMS), "sensors look")

    def kill(self) -> None:
        """SIGKILL every process of the deployment; returns when none is left."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        self.wait_until(lambda: not self._kill_strays(), "every process is dead")

    def wait_until(self, condition: Callable[[], bool], what: str, *, pause_seconds: float = 0.1) -> None:
        """Ask until it is so; fail with what `dagster dev` printed if that takes too long, or if it ended."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            ended = self._process is not None and self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                end = self.printed()[-10_000:]
                pytest.fail(f"{what}: not within {LIMIT_SECONDS:g} s, or dagster dev ended. It printed:\n{end}")
            time.sleep(pause_seconds)

    def wait_until_green(self, since: float) -> None:
        """Wait until the UI shows both tables as made after that moment, with every check passed."""
        self.wait_until(lambda: all(self._green_since(stream, since) for stream in FILE_STREAMS), "assets are green")

    def printed(self) -> str:
        """What `dagster dev` printed up to now."""
        return self._output.read_text(errors="replace")

    def run_status(self, run_id: str) -> str:
        """A run's status as the UI shows it."""
        return str(self._ask(_RUN, id=run_id)["runOrError"]["status"])

    def pending(self, stream: FileStream) -> bool:
        """Whether the stream's newest batch is planned and not committed."""
        checkpoint = self.landing / "_checkpoints" / stream.name
        planned = max((path.name for path in (checkpoint / "offsets").glob("[0-9]*")), default=None)
        return planned is not None and not (checkpoint / "commits" / planned).exists()

    def landed(self, stream: FileStream) -> collections.Counter[tuple[str, ...]]:
        """Every record that landed: its file, and the record."""
        records: collections.Counter[tuple[str, ...]] = collections.Counter()
        for path in (self.landing / stream.folder).rglob("*"):
            if not path.is_file():
                continue
            if stream.format == "parquet":
                columns = pq.read_table(path, columns=["vehicle_id", "recorded_at"]).to_pydict().values()
                values = zip(*(map(str, column) for column in columns), strict=True)
                records.update((path.name, *value) for value in values)
                continue
            data = path.read_bytes()
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
            records.update((path.name, line) for line in text.splitlines())
        return records

    def loaded(self, stream: FileStream) -> collections.Counter[tuple[str, ...]]:
        """Every row of the stream's table: its file, and the record it came from."""
        names = ["vehicle_id", "recorded_at"] if stream.format == "parquet" else ["_raw_record"]
        table = deltalake.DeltaTable(str(self.home / "tables" / Names().bronze(stream.table).location))
        columns = table.to_pyarrow_table(columns=["_source_file", *names]).to_pydict().values()
        return collections.Counter(
            (file.rpartition("/")[2], *values) for file, *values in zip(*(map(str, c) for c in columns), strict=True)
        )

    def _ask(self, query: str, **variables: Any) -> Any:
        """Ask the running webserver."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert "errors" not in answer, answer
        return answer["data"]

    def _answers(self) -> bool:
        try:
            return bool(self._ask(_SERVER)["version"])
        except OSError:
            return False

    def _ticked_since(self, stream: FileStream, since: float) -> bool:
        sensor = {
            "repositoryName": "__repository__",
            "repositoryLocationName": "telematics_assets",
            "sensorName": f"{stream.name}_files",
        }
        ticks = self._ask(_TICKS, sensor=sensor)["sensorOrError"]["sensorState"]["ticks"]
        return any(tick["timestamp"] >= since for tick in ticks)

    def _green_since(self, stream: FileStream, since: float) -> bool:
        asset = self._ask(_ASSET, key=bronze_key(stream).path)["assetNodeOrError"]
        made = any(float(event["timestamp"]) / 1000 >= since for event in asset["assetMaterializations"])
        checked = [check["executionForLatestMaterialization"] for check in asset["assetChecksOrError"]["checks"]]
        return made and bool(checked) and all(check and check["status"] == "SUCCEEDED" for check in checked)

    def _kill_strays(self) -> bool:
        """Kill processes that left the group; whether there were any. All inherit the deployment's environment."""
        mark = f"DAGSTER_HOME={self.dagster_home}".encode()
        strays = False
        for environment in Path("/proc").glob("[0-9]*/environ"):
            # They may end, or belong to somebody else.
            with suppress(OSError):
                if mark in environment.read_bytes().split(b"\0"):
                    os.kill(int(environment.parent.name), signal.SIGKILL)
                    strays = True
        return strays


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[House]:
    """A running `dagster dev` of a deployment of its own; nothing of it outlives the tests."""
    # Paths of sockets must be short.
    with tempfile.TemporaryDirectory(prefix="dev-", ignore_cleanup_errors=True) as temporary:
        house = House(repository, tmp_path_factory.mktemp("house"), Path(temporary))
        try:
            house.start()
            assert UNWANTED.findall(house.printed()) == []
            yield house
        finally:
            house.kill()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, house: House) -> Fleet:
    """Vehicles that send files to that deployment."""
    return Fleet(tmp_path_factory.mktemp("outbox"), house.landing)


def seconds_of_a_start() -> float:
    """How long a process takes at this moment to load the definitions, which is most of what a run does."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import telematics_assets.definitions"], check=True)
    return time.monotonic() - began


def seconds_until_green(house: House, fleet: Fleet) -> float:
    """Land one file per stream; how long until both assets are green."""
    landed_at = fleet.land(fleet.pack(FILE_STREAMS, files=1, rows=500))
    house.wait_until_green(landed_at)
    return time.time() - landed_at


def assert_exactly_once(house: House) -> None:
    """Every record of every file that ever landed is one row."""
    for stream in FILE_STREAMS:
        assert house.loaded(stream) == house.landed(stream)


def test_files_that_land_are_rows_of_green_assets_within_15_seconds(house: House, fleet: Fleet) -> None:
    took, promised = [seconds_until_green(house, fleet)], PROMISED_SECONDS
    while took[-1] > promised and sum(took) < LIMIT_SECONDS:
        promised = max(PROMISED_SECONDS, PROMISED_STARTS * seconds_of_a_start())
        took.append(seconds_until_green(house, fleet))
    assert took[-1] <= promised, f"seconds from landing to green: {took}, promised: {promised}"
    assert_exactly_once(house)


def test_a_stream_recovers_by_itself_after_everything_was_killed_in_the_middle_of_a_run(
    house: House, fleet: Fleet, soak_factor: int
) -> None:
    for tries in range(5):
        if tries:
            # The run was quicker than the kill.
            house.start()
            seconds_until_green(house, fleet)
        fleet.land(fleet.pack([TELEMATICS_TEST], files=300, rows=120_000))
        house.wait_until(lambda: house.pending(TELEMATICS_TEST), "a batch is planned", pause_seconds=0.002)
        house.kill()
        if house.pending(TELEMATICS_TEST):
            break
    assert house.pending(TELEMATICS_TEST), "runs are quicker than kills"
    with dg.DagsterInstance.from_config(str(house.dagster_home)) as instance:
        (killed,) = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
    assert killed.tags[STREAM_TAG] == TELEMATICS_TEST.name

    while_it_was_down = fleet.land(fleet.pack([TELEMATICS], files=2, rows=500))
    house.start()
    house.wait_until_green(while_it_was_down)
    assert house.run_status(killed.run_id) == "FAILURE"
    assert not house.pending(TELEMATICS_TEST)
    assert_exactly_once(house)

    if soak_factor > 1:
        seconds_until_green(house, fleet)
        assert_exactly_once(house)


@pytest.mark.soak
@pytest.mark.parametrize("status", [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED])
def test_a_stream_recovers_by_itself_after_everything_was_killed_before_a_run_began_to_load(
    house: House, fleet: Fleet, status: dg.DagsterRunStatus
) -> None:
    landed_at = fleet.land(fleet.pack(FILE_STREAMS, files=1, rows=500))
    with dg.DagsterInstance.from_config(str(house.dagster_home)) as instance:
        launched = dg.RunsFilter(statuses=[status])
        house.wait_until(lambda: instance.get_runs_count(launched) > 0, f"a run is {status}", pause_seconds=0.005)
        house.kill()
        killed = instance.get_runs(dg.RunsFilter(statuses=[status]))
    house.start()
    house.wait_until_green(landed_at)
    assert {house.run_status(run.run_id) for run in killed} <= {"FAILURE"}
    assert_exactly_once(house)
