"""A loader on a disk that fills up, or turns read-only, at one point after the other; run by `test_full_disks.py`.

Belongs here: the process that makes its own small disk. What it prints is one error type per line, counted.
"""

from __future__ import annotations

import collections
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from telematics_assets.autoloader import checkpoint
from telematics_assets.catalog import FileStream
from telematics_assets.engines.checkpointed import open_volume
from telematics_assets.engines.embedded import EmbeddedEngine
from telematics_assets.errors import TelematicsError
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.settings import Settings
from telematics_assets_tests.conformance.samples import json_stream

#: One batch each; two of them are merged into a segment of the ledger.
FILES = 3
LANDING = "Volumes/workspace/00_landing/telematics"
ROOMY = "size=64m,nr_inodes=10000"
STREAM: FileStream = json_stream("n", max_files_per_trigger=1)


def remount(disk: Path, options: str) -> bool:
    """Change the disk under whoever uses it; False if it is busy."""
    command = ["mount", "-o", f"remount,{options}", str(disk)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def engine_of(home: Path, on_step: Callable[[str], None] | None = None) -> EmbeddedEngine:
    """The engine of a fresh process."""
    settings = Settings(home=home, settle_seconds=0, incomplete_seconds=0)
    lakehouse = DeltaLakehouse(home / "tables")
    return EmbeddedEngine(
        open_volume(settings), lakehouse, settings.names, settle_seconds=0, incomplete_seconds=0, on_step=on_step
    )


def attempt(home: Path, told: collections.Counter[str], on_step: Callable[[str], None] | None = None) -> bool:
    """Load; whether it went through. What is there afterwards is whole, however it ended."""
    done = False
    try:
        engine_of(home, on_step).ingest(STREAM)
        done = True
    except TelematicsError as error:
        told[f"{type(error).__name__}{' (transient)' if error.transient else ''}"] += 1
    fresh = engine_of(home)
    fresh.doctor([STREAM])
    fresh.look(STREAM)
    table = fresh.state(fresh.names.bronze(STREAM.table))
    rows = [] if table is None else fresh.read(fresh.names.bronze(STREAM.table), ["n"])["n"].to_pylist()
    assert len(rows) == len(set(rows)), f"doubled: {rows}"
    return done


def squeezed(home: Path, disk: Path, told: collections.Counter[str], what: str, stride: int) -> int:
    """Load on a disk that is full after so many more files, or pages, then with room again; how many tries failed."""
    failed = 0
    before = used(disk, what)
    engine_of(home).ingest(STREAM)
    needed = used(disk, what) - before
    page = os.statvfs(disk).f_bsize if what == "size" else 1
    for extra in range(0, needed, page * stride):
        start_anew(home)
        remount(disk, f"{what}={used(disk, what) + extra}")
        failed += not attempt(home, told)
        remount(disk, ROOMY)
        reconcile(home)
    return failed


def used(disk: Path, what: str) -> int:
    """Files on the disk, or bytes."""
    now = os.statvfs(disk)
    return now.f_files - now.f_ffree if what == "nr_inodes" else (now.f_blocks - now.f_bfree) * now.f_bsize


def start_anew(home: Path) -> None:
    """Forget everything but the files that landed."""
    shutil.rmtree(home / "tables", ignore_errors=True)
    shutil.rmtree(home / LANDING / "_checkpoints", ignore_errors=True)


def reconcile(home: Path) -> None:
    """With room again the load goes through, and every record is there once."""
    engine = engine_of(home)
    engine.ingest(STREAM)
    rows = engine.read(engine.names.bronze(STREAM.table), ["n"])["n"].to_pylist()
    assert sorted(rows) == [str(number) for number in range(FILES)], rows
    assert {file.state for file in engine.files(STREAM)} == {"INGESTED"}
    assert all(book.expected_rows == book.added_rows for book in engine.balance(STREAM, 0))
    assert not list(home.rglob("*.tmp"))


def read_only(home: Path, disk: Path, told: collections.Counter[str], stride: int) -> int:
    """Turn the disk read-only at one step after the other; how many tries failed."""
    failed = 0
    for number in range(1, 1000, stride):
        left = number

        def on_step(step: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                remount(disk, "ro")

        start_anew(home)
        failed += not attempt(home, told, on_step)
        remount(disk, "rw")
        reconcile(home)
        if left > 0:
            break
    return failed


def main() -> None:
    """Make the disk, land files on it, and load them under one kind of trouble."""
    disk, trouble, stride = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    subprocess.run(["mount", "-t", "tmpfs", "-o", ROOMY, "tmpfs", str(disk)], check=True)
    checkpoint.FANOUT = 2
    home = disk / "home"
    folder = home / LANDING / "json"
    folder.mkdir(parents=True)
    for number in range(FILES):
        later = ',"later":1' if number == 1 else ""
        (folder / f"{number}.json").write_text(f'{{"n":"{number}"{later}}}\n')
    told: collections.Counter[str] = collections.Counter()
    failed = read_only(home, disk, told, stride) if trouble == "ro" else squeezed(home, disk, told, trouble, stride)
    print(json.dumps({"failed": failed, "told": told}))  # noqa: T201 - a test reads it


if __name__ == "__main__":
    main()
