"""Proving that a process is gone, and never taking a living one for dead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from telematics_assets.processes import is_gone, process_identity

_TELL = "from telematics_assets.processes import process_identity; print(process_identity(), flush=True); input()"


def test_this_process_is_not_gone() -> None:
    assert not is_gone(process_identity())


def test_a_killed_process_is_gone_even_before_its_parent_notices() -> None:
    with subprocess.Popen([sys.executable, "-c", _TELL], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        identity = process.stdout.readline().decode().strip()
        assert not is_gone(identity)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert is_gone(identity), "a zombie"
        process.wait()
        assert is_gone(identity)


def test_a_number_that_was_given_to_another_process_is_no_alibi() -> None:
    place, pid, started = process_identity().rsplit("/", 2)
    assert is_gone(f"{place}/{pid}/{int(started) - 1}")


@pytest.mark.parametrize("identity", ["", "nonsense", "elsewhere/1/1", "elsewhere//", "elsewhere/x/1"])
def test_what_cannot_be_proven_is_perhaps_alive(identity: str) -> None:
    assert not is_gone(identity)


def test_another_machine_is_never_judged() -> None:
    _, pid, started = process_identity().rsplit("/", 2)
    assert not is_gone(f"another-machine/{pid}/{started}0")


def test_without_proc_only_a_missing_process_is_gone(tmp_path: Path) -> None:
    identity = process_identity(tmp_path)
    assert not is_gone(identity, tmp_path)
    place, _, started = identity.rsplit("/", 2)
    assert not is_gone(f"{place}/1/{started}", tmp_path)
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    assert is_gone(f"{place}/{process.pid}/{started}", tmp_path)
