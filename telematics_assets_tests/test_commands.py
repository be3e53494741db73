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
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
LIMIT_SECONDS = 120
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


@pytest.mark.parametrize("command", ["dg dev --host {host} --port {port}", "dagster dev -h {host} -p {port}"])
def test_the_ui_starts_and_stops_without_a_warning(
    command: str, prepared: Mapping[str, str], repository: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host, port = free.getsockname()
    program, *arguments = command.format(host=host, port=port).split()
    output = tmp_path / "output.txt"
    with output.open("w") as stream:
        process = subprocess.Popen(
            [BIN / program, *arguments],
            cwd=repository,
            env=prepared,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not (serves(f"http://{host}:{port}/server_info") and "Sensor telematics" in output.read_text()):
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        process.wait(LIMIT_SECONDS)
    finally:
        # A daemon that outlives its parent would go on for ever.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert UNWANTED.findall(output.read_text()) == []


def serves(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
