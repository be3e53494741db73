"""Very many small files at once: batches of the asked size, each record once, memory that does not follow them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from telematics_assets_tests.conformance.platforms import DeltaPlatform
from telematics_assets_tests.conformance.samples import json_stream

FILES, PER_BATCH = 3000, 500
#: All at once, as the soak test has them.
MANY = 100_000

_LOAD = """
import resource, sys
from pathlib import Path
from telematics_assets.engines.embedded import open_engine
from telematics_assets.settings import Settings
from telematics_assets_tests.conformance.samples import json_stream

home, files, per_batch = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
engine = open_engine(Settings(home=home, settle_seconds=0, incomplete_seconds=0))
stream = json_stream("n", max_files_per_trigger=per_batch)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pending = engine.look(stream)
assert (pending.files, pending.waiting) == (files, 0), pending
report = engine.ingest(stream)
assert report.rows == files, report.rows
assert [batch.files_ingested for batch in report.batches] == [per_batch] * (files // per_batch)
assert engine.ingest(stream).batches == ()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""

_PLAN = """
import resource, sys, time
from dataclasses import replace
import polars as pl
from telematics_assets.testing import MemoryEngine, MemoryVolume
from telematics_assets.volumes.base import Listing
from telematics_assets_tests.conformance.samples import json_stream

files = int(sys.argv[1])

class Crowded(MemoryVolume):
    def scan(self, folder, from_path=""):
        number = pl.int_range(files, eager=True)
        return Listing(pl.DataFrame({
            "path": pl.select(pl.format("json/day={}/vehicle-{}.json", number % 365, number)).to_series(),
            "size": pl.Series([8], dtype=pl.Int64).new_from_index(0, files),
            "modified_ns": number.cast(pl.Int64),
            "etag": pl.Series([None], dtype=pl.String).new_from_index(0, files),
        }))

    def stat(self, path):
        self.put(path, b'{"n":1}\\n', modified_ns=int(path.rpartition("-")[2].removesuffix(".json")))
        return replace(super().stat(path), etag=None)

    def open(self, path):
        self.stat(path)
        return super().open(path)

engine = MemoryEngine()
engine._memory.__class__ = Crowded
stream = json_stream("n", max_files_per_trigger=100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.monotonic()
pending = engine.look(stream)
assert pending.files == files, pending
from telematics_assets.engines.base import IngestRequest
report = engine.ingest(stream, IngestRequest(max_files=300))
assert [batch.files_ingested for batch in report.batches] == [100] * 3, report
assert engine.look(stream).files == files - 300
took = time.monotonic() - began
assert took < 180, took
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def run(*command: object) -> int:
    """Run a program in a process of its own; by how many MiB it grew."""
    done = subprocess.run(
        [sys.executable, "-c", *map(str, command)], capture_output=True, text=True, check=False, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_many_tiny_files_are_loaded_in_batches_of_the_asked_size(tmp_path: Path, soak_factor: int) -> None:
    files, per_batch = (FILES, PER_BATCH) if soak_factor == 1 else (MANY, 1000)
    platform = DeltaPlatform(tmp_path)
    stream = json_stream("n")
    platform.at("json").mkdir(parents=True)
    for number in range(files):
        (platform.at("json") / f"{number:06}.json").write_bytes(b'{"n":"%06d"}\n' % number)
    assert run(_LOAD, tmp_path, files, per_batch) < 300
    assert [row["n"] for row in platform.rows(stream, "n")] == [f"{number:06}" for number in range(files)]
    assert set(platform.states(stream).values()) == {"INGESTED"}


def test_a_hundred_thousand_files_are_seen_and_planned_in_bounded_memory() -> None:
    assert run(_PLAN, MANY) < 300
