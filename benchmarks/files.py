"""How close the file streams are to the floor of this machine: `python -m benchmarks.files [--quick] [MEASURE…]`.

Belongs here: the measures of loading files, each beside a floor that does the least that could be done. Does not
belong here: assertions; a ratio is to be read, not to fail.

Every timed piece runs in a process of its own, ours and the floor in turn, so that neither warms the other's memory;
what is printed is the median of the rounds. Imports are not timed, and both write to the same disk.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from telematics_assets.catalog import TELEMATICS, TELEMATICS_TEST, FileStream, Names

if TYPE_CHECKING:
    import polars as pl

    from telematics_assets.volumes.base import Volume

LOCATION = Names().volume_location
ROUNDS = 3
INCREMENTAL = TELEMATICS.with_options(use_incremental_listing="auto")
#: New files of the measure of planning: five batches.
PLANNED = 5_000
#: Measures that change nothing in their home.
STANDING = ("look", "incremental", "files")


@dataclass(frozen=True)
class Measure:
    """One line of the table: what is timed, against what, and the ratio that is aimed at."""

    name: str
    title: str
    floor: str
    goal: float
    prepare: Callable[[Path, bool], None]


def land_points(home: Path, stream: FileStream, files: int, rows: int) -> None:
    """Land `files` files that hold `rows` rows together."""
    from telematics_assets.demo.fleet import FleetPlan, simulate
    from telematics_assets.volumes.local import LocalVolume

    volume = LocalVolume(home / LOCATION.lstrip("/"), LOCATION)
    simulate(FleetPlan(vehicles=200, files=files, rows=rows, seed=1), volume, [stream])
    for packed in Path(volume.uri).rglob("*.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()


def prepare_parquet(home: Path, quick: bool) -> None:
    """2 M rows in 40 Parquet files."""
    land_points(home, TELEMATICS, 40, 200_000 if quick else 2_000_000)


def prepare_json(home: Path, quick: bool) -> None:
    """2 M rows in 40 NDJSON files."""
    land_points(home, TELEMATICS_TEST, 40, 200_000 if quick else 2_000_000)


def prepare_small(home: Path, quick: bool) -> None:
    """4,000 Parquet files of 100 rows."""
    files = 400 if quick else 4000
    land_points(home, TELEMATICS, files, files * 100)


def prepare_known(home: Path, quick: bool) -> None:
    """A million files, all known to the ledger."""
    from telematics_assets.volumes.local import LocalVolume

    know_files(LocalVolume(home / LOCATION.lstrip("/"), LOCATION), 10 if quick else 1000)


def know_files(volume: Volume, days: int, begun: bool = False) -> None:
    """Land a thousand empty files a day and write a ledger that knows them, of a stream that has begun or never did."""
    import polars as pl

    from telematics_assets.autoloader.checkpoint import LEDGER_SCHEMA, BatchCommit, Checkpoint, Metadata

    root = Path(volume.uri)
    for day in range(days):
        folder = root / "parquet" / f"day-{day:04d}"
        folder.mkdir(parents=True)
        for number in range(1000):
            (folder / f"points-{number:06d}.parquet").touch()
    files = volume.scan("parquet").files
    ledger = files.with_columns(
        state=pl.lit("INGESTED"),
        reason=pl.lit(None, pl.String),
        rows=pl.lit(1, pl.Int64),
        batch_id=pl.lit(0, pl.Int64),
        table_version=pl.lit(1, pl.Int64),
        committed_ns=pl.lit(1, pl.Int64),
    )
    assert set(ledger.columns) == set(LEDGER_SCHEMA)
    checkpoint = Checkpoint(volume, "telematics")
    identity, last = Metadata("bench", "bench", 0, 1), BatchCommit(0, "bench", 1)
    if begun:
        identity = checkpoint.metadata() or identity
        last = checkpoint.last_commit(identity) or last
        checkpoint.forget()
    checkpoint.begin_from(identity, ledger, last)


def prepare_plan(home: Path, quick: bool) -> None:
    """Two homes, of many and of a thousand known files; thousands of new small ones in each."""
    from telematics_assets.engines.embedded import open_engine
    from telematics_assets.settings import Settings

    for name, days in (("many", 10 if quick else 1000), ("few", 1)):
        place = home / name
        engine = open_engine(Settings(home=place, settle_seconds=0, incomplete_seconds=0))
        root = Path(engine.volume.uri)
        land_points(place, TELEMATICS, 1, 10)
        (first,) = (root / "parquet").rglob("*.parquet")
        engine.ingest(TELEMATICS)
        know_files(engine.volume, days, begun=True)
        folder = root / "parquet" / "new"
        folder.mkdir()
        for number in range(PLANNED):
            shutil.copyfile(first, folder / f"new-{number:06d}.parquet")


def prepare_incremental(home: Path, quick: bool) -> None:
    """The same, and a load has just listed all of them."""
    from telematics_assets.autoloader.checkpoint import Checkpoint, WholeListing
    from telematics_assets.autoloader.discovery import choice_of
    from telematics_assets.autoloader.incremental import lower_bound
    from telematics_assets.volumes.local import LocalVolume

    prepare_known(home, quick)
    checkpoint = Checkpoint(LocalVolume(home / LOCATION.lstrip("/"), LOCATION), INCREMENTAL.name)
    metadata = checkpoint.metadata()
    assert metadata is not None
    bound = lower_bound(checkpoint.ledger(metadata), INCREMENTAL.folder, proven=True)
    assert bound
    chosen = choice_of(INCREMENTAL.folder, INCREMENTAL.options)
    checkpoint.publish_whole_listing(WholeListing(metadata.stream_id, chosen, time.time_ns(), bound))


def work_load(home: Path, stream: FileStream) -> int:
    """Ours: drain the stream."""
    from telematics_assets.engines.embedded import open_engine
    from telematics_assets.settings import Settings

    engine = open_engine(Settings(home=home, settle_seconds=0, incomplete_seconds=0))
    return timed(lambda: engine.ingest(stream).rows)


def floor_parquet(home: Path) -> int:
    """Floor: polars scan and one Delta commit."""
    import polars as pl

    folder = home / LOCATION.lstrip("/") / "parquet"
    return timed(lambda: write_floor(home, pl.scan_parquet(folder / "**/*.parquet").collect()))


def floor_json(home: Path) -> int:
    """Floor: polars NDJSON scan and one Delta commit."""
    import polars as pl

    folder = home / LOCATION.lstrip("/") / "json"
    return timed(lambda: write_floor(home, pl.scan_ndjson(folder / "**/*.json*").collect()))


def write_floor(home: Path, frame: pl.DataFrame) -> int:
    """One Delta commit of a polars frame."""
    from deltalake import write_deltalake

    write_deltalake(str(home / "floor"), frame, mode="append")
    return len(frame)


def work_look(home: Path) -> int:
    """Ours: ask what is new, with nothing new."""
    from telematics_assets.engines.embedded import open_engine
    from telematics_assets.settings import Settings

    engine = open_engine(Settings(home=home))
    engine.look(TELEMATICS)
    return timed(lambda: engine.look(TELEMATICS).known)


def work_incremental(home: Path) -> int:
    """Ours: the same where names sort like time; the first look lists the whole folder."""
    from telematics_assets.engines.embedded import open_engine
    from telematics_assets.settings import Settings

    engine = open_engine(Settings(home=home))
    engine.look(INCREMENTAL)
    return timed(lambda: engine.look(INCREMENTAL).known)


def work_files(home: Path) -> int:
    """Ours: every file with its state, as JSON."""
    import polars as pl

    from telematics_assets.cli import print_files
    from telematics_assets.engines.embedded import open_engine
    from telematics_assets.settings import Settings

    engine = open_engine(Settings(home=home))
    engine.look(TELEMATICS)

    def listed() -> int:
        found = pl.DataFrame(engine.file_table(TELEMATICS))
        with (home / "files.json").open("w") as out, contextlib.redirect_stdout(out):
            print_files(found)
        return found.height

    return timed(listed)


def work_plan(home: Path, place: str = "many") -> int:
    """Plan all that is new: the time from the end of a listing, or of a batch, to the plan."""
    from telematics_assets.engines.checkpointed import open_volume
    from telematics_assets.engines.embedded import EmbeddedEngine
    from telematics_assets.lakehouse.delta import DeltaLakehouse
    from telematics_assets.settings import Settings

    settings = Settings(home=home / place)
    seconds = [0.0, time.perf_counter()]

    def on_step(step: str) -> None:
        now = time.perf_counter()
        if step in ("opened", "planned"):
            seconds[0] += now - seconds[1]
        if step != "file_read":
            seconds[1] = now

    engine = EmbeddedEngine(
        open_volume(settings),
        DeltaLakehouse(home / place / "tables"),
        settings.names,
        settle_seconds=0,
        incomplete_seconds=0,
        on_step=on_step,
    )
    result = engine.ingest(TELEMATICS).files_ingested
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds[0], "result": result, "peak": peak, "before": 0}), flush=True)
    return result


def floor_look(home: Path) -> int:
    """Floor: an `os.scandir` walk with stat."""

    def walk(folder: str) -> int:
        count = 0
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    count += walk(entry.path)
                else:
                    entry.stat(follow_symlinks=False)
                    count += 1
        return count

    folder = str(home / LOCATION.lstrip("/") / "parquet")
    walk(folder)
    return timed(lambda: walk(folder))


WORKS: dict[str, tuple[Callable[[Path], int], Callable[[Path], int]]] = {
    "parquet": (lambda home: work_load(home, TELEMATICS), floor_parquet),
    "json": (lambda home: work_load(home, TELEMATICS_TEST.with_options(raw_record_column=None)), floor_json),
    "json_raw": (lambda home: work_load(home, TELEMATICS_TEST), floor_json),
    "small": (lambda home: work_load(home, TELEMATICS), floor_parquet),
    "look": (work_look, floor_look),
    "incremental": (work_incremental, floor_look),
    "files": (work_files, work_look),
    "plan": (work_plan, lambda home: work_plan(home, "few")),
}

MEASURES = (
    Measure("parquet", "2 M rows, 40 Parquet files", "polars scan, one Delta commit", 1.2, prepare_parquet),
    Measure("json", "2 M rows, 40 NDJSON files", "polars NDJSON, one Delta commit", 1.6, prepare_json),
    Measure("json_raw", "the same with raw_record_column", "polars NDJSON, one Delta commit", 2.0, prepare_json),
    Measure("small", "4,000 small Parquet files", "polars scan, one Delta commit", 1.5, prepare_small),
    Measure("look", "no-op look at 1,000,000 known files", "os.scandir walk with stat", 1.3, prepare_known),
    Measure("incremental", "the same, listed incrementally", "os.scandir walk with stat", 0.1, prepare_incremental),
    Measure("files", "files 1 M known, as JSON", "look at the same files", 1.5, prepare_known),
    Measure("plan", "planning 5,000 new beside 1 M known", "the same beside 1,000 known", 1.2, prepare_plan),
)


def timed(action: Callable[[], int]) -> int:
    """Time an action and print seconds, result and peak memory (MiB) for the parent process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "result": result, "peak": peak, "before": before / 1024}), flush=True)
    return result


def run(name: str, side: int, home: Path) -> dict[str, float]:
    """One side of a measure in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.files", "--child", name, str(side), str(home)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def measure(what: Measure, quick: bool) -> None:
    """Prepare, run both sides in turn, print the line."""
    with tempfile.TemporaryDirectory(prefix="telematics-bench-") as temporary:
        home = Path(temporary)
        # In a process of its own: a child inherits its parent's peak memory.
        command = [sys.executable, "-m", "benchmarks.files", "--prepare", what.name, str(home), *["--quick"] * quick]
        subprocess.run(command, check=True)
        ours: list[dict[str, float]] = []
        floor: list[dict[str, float]] = []
        for _ in range(ROUNDS):
            ours.append(run(what.name, 0, home))
            floor.append(run(what.name, 1, home))
            if what.name == "plan":
                break
            if what.name not in STANDING:
                for leftover in (home / "floor", home / "tables", home / LOCATION.lstrip("/") / "_checkpoints"):
                    shutil.rmtree(leftover, ignore_errors=True)
        show(what.name, what.title, what.floor, what.goal, ours, floor)


def show(
    name: str, title: str, least: str, goal: float, ours: list[dict[str, float]], floor: list[dict[str, float]]
) -> None:
    """Print the line of a measure."""
    if {o["result"] for o in ours} != {f["result"] for f in floor}:
        raise SystemExit(f"{name}: ours and the floor did different work: {ours} {floor}")
    ratios = sorted(o["seconds"] / f["seconds"] for o, f in zip(ours, floor, strict=True))
    print(
        f"{title:38} {statistics.median(o['seconds'] for o in ours):7.2f} s  "
        f"{max(o['peak'] for o in ours):6.0f} MiB | "
        f"{least:32} {statistics.median(f['seconds'] for f in floor):7.2f} s  "
        f"{max(f['peak'] for f in floor):6.0f} MiB | "
        f"ratio {statistics.median(ratios):5.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}), aim {goal}",
        flush=True,
    )


def import_cost() -> None:
    """What importing the definitions costs beyond importing Dagster."""

    def seconds(statement: str) -> float:
        code = f"import time; t=time.perf_counter(); {statement}; print(time.perf_counter()-t)"
        command = [sys.executable, "-c", code]
        runs = [subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout for _ in range(5)]
        return statistics.median(map(float, runs))

    dagster, ours = seconds("import dagster"), seconds("import telematics_assets.definitions")
    title = "import telematics_assets.definitions"
    print(f"{title:38} {ours:7.2f} s | import dagster {dagster:.2f} s | beyond {ours - dagster:.2f} s, aim 0.5")


def main() -> None:
    """Run the named measures, or all."""
    if sys.argv[1:2] == ["--child"]:
        name, side, home = sys.argv[2:]
        WORKS[name][int(side)](Path(home))
        return
    if sys.argv[1:2] == ["--prepare"]:
        chosen = next(what for what in MEASURES if what.name == sys.argv[2])
        chosen.prepare(Path(sys.argv[3]), "--quick" in sys.argv)
        return
    names = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    for what in MEASURES:
        if not names or what.name in names:
            measure(what, "--quick" in sys.argv)
    if not names or "import" in names:
        import_cost()


if __name__ == "__main__":
    main()
