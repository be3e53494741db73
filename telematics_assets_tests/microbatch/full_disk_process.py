"""A replication on a disk that fills up, or turns read-only, at one point after the other; run by `test_full_disks.py`.

Belongs here: the process that makes its own small disk, for tables and for temporary files; the database is elsewhere.
What it prints is how many tries failed, and how often which error was told.

`python -m … DISK PARAMETERS OWNER TROUBLE STRIDE MODE…`; PARAMETERS is the connection as JSON, OWNER the owner's URL.
"""

from __future__ import annotations

import collections
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import deltalake
import psycopg

from telematics_assets.catalog import Names, ReplicatedTable
from telematics_assets.errors import TelematicsError
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.microbatch import keys
from telematics_assets.microbatch.connection import Supabase
from telematics_assets_tests.exactly_once.full_disk_process import ROOMY, remount, used
from telematics_assets_tests.microbatch.business import replayed
from telematics_assets_tests.microbatch.replicate_process import replicate, table_of

Rows = dict[int, str]


class SmallDisk:
    """The small disk, and a mirror of one table on it."""

    def __init__(self, disk: Path, supabase: Supabase, table: ReplicatedTable) -> None:
        self._disk = disk
        self._supabase = supabase
        self._table = table
        self._home, self._before = disk / "home", disk / "before"
        self.told: collections.Counter[str] = collections.Counter()
        self.failed = 0

    def replicate(self, on_step: Callable[[str], None] | None = None) -> None:
        """Replicate once, as a fresh process would."""
        replicate(DeltaLakehouse(self._home), self._supabase, self._table, on_step)

    def rows(self) -> Rows:
        """What readers of bronze see; its change data feed tells the same."""
        folder = self._home / Names().bronze(self._table.target).location
        if not deltalake.DeltaTable.is_deltatable(str(folder)):
            return {}
        found = replayed(folder, ("id", "name"))
        assert len({key for key, _ in found}) == len(found), f"doubled: {found}"
        return dict(found)

    def keep(self) -> None:
        """What is there now is what each try begins with."""
        shutil.copytree(self._home, self._before)

    def begin(self) -> None:
        """Go back to the beginning of a try."""
        shutil.rmtree(self._home, ignore_errors=True)
        if self._before.exists():
            shutil.copytree(self._before, self._home)

    def attempt(self, after: Rows, on_step: Callable[[str], None] | None = None) -> None:
        """Replicate on a disk that refuses. Readers then see each row as it was, or as it is."""
        before = self.rows()
        try:
            self.replicate(on_step)
        except TelematicsError as error:
            self.told[f"{type(error).__name__}{' (transient)' if error.transient else ''}"] += 1
            self.failed += 1
        seen = self.rows()
        assert seen.items() <= before.items() | after.items()
        assert before.keys() & after.keys() <= seen.keys()

    def recover(self, after: Rows, options: str) -> None:
        """With room again one more batch makes bronze what the source is, and leaves nothing lying about."""
        assert remount(self._disk, options)
        self.replicate()
        assert self.rows() == after
        assert not any((self._disk / "tmp").iterdir())

    def squeeze(self, what: str, stride: int, after: Rows) -> None:
        """Replicate on a disk that is full after so many more files, or pages."""
        self.begin()
        had = used(self._disk, what)
        self.replicate()
        needed = used(self._disk, what) - had
        page = os.statvfs(self._disk).f_bsize if what == "size" else 1
        for extra in range(0, needed, page * stride):
            self.begin()
            # 0 would be no limit at all.
            remount(self._disk, f"{what}={max(used(self._disk, what) + extra, page)}")
            self.attempt(after)
            self.recover(after, ROOMY)

    def read_only(self, stride: int, after: Rows) -> None:
        """Turn the disk read-only at one step after the other."""
        for number in range(1, 1000, stride):
            left = number

            def on_step(step: str) -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    remount(self._disk, "ro")

            self.begin()
            self.attempt(after, on_step)
            self.recover(after, "rw")
            if left > 0:
                break


def main() -> None:
    """Make the disk, and take a snapshot and a batch under one kind of trouble."""
    disk, parameters, owner, trouble = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
    stride, modes = int(sys.argv[5]), sys.argv[6:]
    subprocess.run(["mount", "-t", "tmpfs", "-o", ROOMY, "tmpfs", str(disk)], check=True)
    (disk / "tmp").mkdir()
    tempfile.tempdir = str(disk / "tmp")
    # A hundred keys do not fit into memory either then.
    keys.KEYS_IN_MEMORY = 40
    disks = [SmallDisk(disk, Supabase(**json.loads(parameters)), table_of(mode)) for mode in modes]  # type: ignore[arg-type]
    with psycopg.connect(owner, autocommit=True) as connection:
        for small in disks:
            for wave in range(2):
                after: Rows = dict(connection.execute("SELECT id, name FROM policies").fetchall())
                if trouble == "ro":
                    small.read_only(stride, after)
                else:
                    small.squeeze(trouble, stride, after)
                if wave == 0:
                    small.keep()
                    connection.execute("DELETE FROM policies WHERE id % 13 = 3")
                    connection.execute(
                        "UPDATE policies SET name = name || '!', updated_at = clock_timestamp() WHERE id % 7 = 1"
                    )
                    connection.execute("INSERT INTO policies SELECT max(id) + 1, 'new' FROM policies")
            shutil.rmtree(disk / "before")
    told = sum((small.told for small in disks), collections.Counter[str]())
    print(json.dumps({"failed": sum(small.failed for small in disks), "told": told}), flush=True)  # noqa: T201 - a test reads it
    # A thread of the driver may be at work still that a refused write cut off: C++ ends the process for that, too.
    os._exit(0)


if __name__ == "__main__":
    main()
