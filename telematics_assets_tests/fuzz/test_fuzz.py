"""Some seconds of fuzzing in every run of the tests, minutes with `--soak`; each in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from telematics_assets_tests.fuzz.oracle import check_json_lines
from telematics_assets_tests.fuzz.target import READERS

#: Inputs of a short run: some seconds each.
RUNS = {"json": 120, "document": 180, "csv": 80}


@pytest.mark.parametrize("reader", READERS)
def test_whatever_the_bytes_are_every_record_is_accounted_for_once(
    reader: str, tmp_path: Path, repository: Path, soak_factor: int
) -> None:
    command = [sys.executable, "-m", "telematics_assets_tests.fuzz.target", "--reader", reader]
    command += [
        "--runs",
        str(RUNS[reader] * (1 if soak_factor == 1 else 2 * soak_factor)),
        "--corpus",
        str(tmp_path / "corpus"),
    ]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False, timeout=900)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told[-5000:]
    guided = importlib.util.find_spec("atheris") is not None
    assert ("Done" if guided else "inputs, blind") in told


def test_the_oracle_notices_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("telematics_assets_tests.fuzz.oracle.lines_of", lambda content: content.split(b"\r"))
    with pytest.raises(AssertionError):
        check_json_lines(b'{"a":1}\r{"a":2}')
