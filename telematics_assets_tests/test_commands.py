"""Dagster's own commands, as a developer types them in the checkout.

Belongs here: that each command works on this project, as a process, without a line of warning.
Does not belong here: what runs do (`test_end_to_end.py` and the rooms' own tests), the `telematics` command.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from telematics_assets.assets.files import pool_name
from telematics_assets.catalog import FILE_STREAMS
from telematics_assets.dagster_home import prepare_dagster_home

BIN = Path(sys.executable).parent
#: Nothing here takes longer, however slow and busy the machine is.
LIMIT_SECONDS = 240.0
# `dagster definitions validate` advises to use `dg check defs`; that is Dagster's to say.
UNWANTED = re.compile(r"^.*(?:(?<!Supersession)Warning|WARN|Traceback|ERROR|Telemetry|new release).*$", re.MULTILINE)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Mapping[str, str]:
    """The environment of a deployment of its own whose DAGSTER_HOME is ready, as `make dev` and the demo leave it."""
    environment = {**os.environ, "TELEMATICS_HOME": str(tmp_path_factory.mktemp("home")), "COLUMNS": "200"}
    home = run(["telematics", "home"], repository, environment).strip()
    assert home == str(Path(environment["TELEMATICS_HOME"]) / "dagster")
    return {**environment, "DAGSTER_HOME": home}


def run(command: list[str], cwd: Path, environment: Mapping[str, str]) -> str:
    """Run a command of the environment that runs the tests; what it printed to stdout."""
    program, *arguments = command
    done = subprocess.run(
        [BIN / program, *arguments],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert UNWANTED.findall(done.stdout + done.stderr) == []
    return done.stdout


@pytest.mark.parametrize(
    "command",
    ["dagster definitions validate", "dg check defs"],
)
def test_the_project_passes_dagsters_own_checks(command: str, prepared: Mapping[str, str], repository: Path) -> None:
    run(command.split(), repository, prepared)


def test_dg_lists_what_the_project_defines(prepared: Mapping[str, str], repository: Path) -> None:
    listed = json.loads(run(["dg", "list", "defs", "--json"], repository, prepared))
    assets = {asset["asset_key"] for asset in listed["assets"]}
    assert {"bronze/telematics", "bronze/telematics_test"} <= assets
    assert {"engine", "landing"} <= {resource["name"] for resource in listed["resources"]}
    assert "bronze/telematics" in run(["dg", "list", "defs"], repository, prepared)


def test_dg_launches_a_load(prepared: Mapping[str, str], repository: Path) -> None:
    run(["telematics", "simulate", "--vehicles", "2", "--files", "1", "--seed", "1"], repository, prepared)
    run(["dg", "launch", "--assets", "bronze/telematics"], repository, prepared)
    tables = json.loads(run(["telematics", "tables", "--json"], repository, prepared))
    (table,) = [table for table in tables if table["table"] == "workspace.01_bronze.telematics"]
    assert table["rows"] > 0


@pytest.mark.parametrize(
    "command",
    [
        "dg dev --host {host} --port {port}",
        # test_dev.py looks at what this one prints at its start.
        pytest.param("dagster dev -h {host} -p {port}", marks=pytest.mark.soak),
    ],
)
def test_the_ui_starts_without_a_warning_and_stops_when_it_is_told(
    command: str, repository: Path, tmp_path: Path
) -> None:
    home = prepare_dagster_home(tmp_path / "dagster", [pool_name(stream) for stream in FILE_STREAMS])
    environment = {**os.environ, "TELEMATICS_HOME": str(tmp_path), "DAGSTER_HOME": str(home), "COLUMNS": "200"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host, port = free.getsockname()
    program, *arguments = command.format(host=host, port=port).split()
    output = tmp_path / "output.txt"
    with output.open("w") as stream:
        process = subprocess.Popen(
            [BIN / program, *arguments],
            cwd=repository,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def up() -> bool:
        assert process.poll() is None, output.read_text()
        looked = (f"Sensor {each.name}_files skipped" in output.read_text() for each in FILE_STREAMS)
        return all(looked) and serves(f"http://{host}:{port}/server_info")

    try:
        wait_until(up, output)
        printed = output.read_text()
        process.send_signal(signal.SIGTERM)
        # A tick that is cut off may complain: Dagster stops its code server under its sensors.
        wait_until(lambda: process.poll() is not None, output)
        assert process.returncode == 0, output.read_text()
        wait_until(lambda: not alive(process.pid), output)
    finally:
        # A daemon that outlives its parent would go on for ever.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert UNWANTED.findall(printed) == []


def wait_until(condition: Callable[[], bool], output: Path) -> None:
    """Ask until it is so; fail with what was printed if that takes too long."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.1)


def alive(group: int) -> list[str]:
    """What the processes of a group run that have not ended."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        # It may end meanwhile.
        with suppress(OSError):
            # Its name comes before, in brackets, and may hold anything.
            state, _, its_group, *_ = (process / "stat").read_text().rpartition(")")[2].split()
            if int(its_group) == group and state not in "ZX":
                found.append((process / "cmdline").read_text())
    return found


def serves(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
