"""A disk that is full, or read-only, at every write of a load: a named error, nothing doubled, and all of it later.

The disk is a small one in memory, mounted in a namespace of the process's own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

OWN_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]
#: What happens to the disk, and the errors that say so.
TROUBLES = {
    "nr_inodes": {"VolumeUnavailableError (transient)"},
    "size": {"VolumeUnavailableError (transient)"},
    "ro": {"VolumeError", "TableError"},
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_disk_that_refuses_at_any_write_is_told_and_outlived(
    trouble: str, tmp_path: Path, repository: Path, soak_factor: int
) -> None:
    mountable = "mount -t tmpfs -o size=64k tmpfs " + str(tmp_path)
    if not shutil.which("unshare") or subprocess.run([*OWN_MOUNTS, *mountable.split()], check=False).returncode:
        pytest.skip("this system lets no user mount a disk of their own: unshare --user --mount is refused")
    stride = "1" if soak_factor > 1 else "3"
    command = [sys.executable, "-m", "telematics_assets_tests.exactly_once.full_disk_process", str(tmp_path), trouble]
    done = subprocess.run(
        [*OWN_MOUNTS, *command, stride],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout)
    assert found["failed"] >= 3
    assert set(found["told"]) <= TROUBLES[trouble]
