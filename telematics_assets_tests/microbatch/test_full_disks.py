"""A disk that is full, or read-only, at every write of a replication: a named error, no row half there, all later.

The disk is a small one in memory, mounted in a namespace of the process's own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from telematics_assets_tests.databases import Database
from telematics_assets_tests.exactly_once.test_full_disks import OWN_MOUNTS
from telematics_assets_tests.microbatch.replicate_process import MODES

#: What happens to the disk, and the errors that say so.
TROUBLES = {
    "nr_inodes": {"VolumeUnavailableError (transient)"},
    "size": {"VolumeUnavailableError (transient)"},
    "ro": {"VolumeError", "TableError", "VolumeUnavailableError (transient)"},
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_disk_that_refuses_at_any_write_is_told_and_outlived(
    trouble: str, tmp_path: Path, policies: Database, repository: Path, soak_factor: int
) -> None:
    mountable = "mount -t tmpfs -o size=64k tmpfs " + str(tmp_path)
    if not shutil.which("unshare") or subprocess.run([*OWN_MOUNTS, *mountable.split()], check=False).returncode:
        pytest.skip("this system lets no user mount a disk of their own: unshare --user --mount is refused")
    stride, modes = ("1", MODES) if soak_factor > 1 else ("7", ("row_xid",))
    command = [sys.executable, "-m", "telematics_assets_tests.microbatch.full_disk_process", str(tmp_path)]
    done = subprocess.run(
        [
            *OWN_MOUNTS,
            *command,
            json.dumps(asdict(policies.supabase)),
            policies.server.url(policies.name),
            trouble,
            stride,
            *modes,
        ],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout)
    assert found["failed"] >= 3
    assert set(found["told"]) <= TROUBLES[trouble]
