"""How close Spark's loads are to Spark's own file stream: `python -m benchmarks.spark [--quick] [MEASURE…]`.

Belongs here: the measures of loading files on local Spark, each beside Spark's built-in stream into Delta.
Does not belong here: assertions; a ratio is to be read, not to fail.

Both sides run in turn in ONE session, as the contract has it: each with a small load before it, so that classes and
Python workers are there. Spark's stream is given the schema, and neither rescues, nor keeps texts as they stand, nor
knows afterwards which file brought how many rows.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.files import land_points
from telematics_assets.catalog import TELEMATICS, TELEMATICS_TEST, FileStream, Names

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from telematics_assets.engines.spark.engine import SparkEngine

ROUNDS = 3
PLAIN = TELEMATICS_TEST.with_options(raw_record_column=None)


@dataclass(frozen=True)
class Measure:
    """One line of the table: what is loaded, and the ratio that is aimed at."""

    name: str
    title: str
    stream: FileStream
    goal: float


MEASURES = (
    Measure("parquet", "2 M rows, 40 Parquet files", TELEMATICS, 1.1),
    Measure("json", "2 M rows, 40 NDJSON files", PLAIN, 1.5),
    Measure("json_raw", "the same with raw_record_column", TELEMATICS_TEST, 1.5),
)


def engine_at(home: Path) -> tuple[SparkEngine, Callable[[], SparkSession]]:
    """An engine, and this process's session."""
    from telematics_assets.engines.spark.engine import open_engine
    from telematics_assets.engines.spark.queries import open_session
    from telematics_assets.settings import Settings, load_settings

    spark = load_settings().spark
    settings = Settings(home=home, engine="spark", spark=spark, settle_seconds=0, incomplete_seconds=0)
    return open_engine(settings), lambda: open_session(spark, home, settings.names)


def ours(home: Path, stream: FileStream) -> int:
    """Drain the stream; its rows."""
    engine, _ = engine_at(home)
    return engine.ingest(stream).rows


def theirs(home: Path, stream: FileStream) -> int:
    """The same files by Spark's own stream, of which the schema is known; its rows."""
    _, session = engine_at(home)
    spark = session()
    place = home / "stream"
    schema = ", ".join(f"`{c.name}` {'STRING' if stream.format == 'json' else c.type}" for c in stream.contract.columns)
    folder = home / Names().volume_location.lstrip("/") / stream.folder
    reader = spark.readStream.format(stream.format).schema(schema).option("recursiveFileLookup", "true")
    rows = reader.load(str(folder)).selectExpr("*", "_metadata.file_path AS _source_file")
    writer = rows.writeStream.format("delta").option("checkpointLocation", str(place / "checkpoint"))
    writer.trigger(availableNow=True).start(str(place / "table")).awaitTermination()
    return spark.read.format("delta").load(str(place / "table")).count()


def timed(work: Callable[[Path, FileStream], int], landed: Path, stream: FileStream) -> tuple[float, int]:
    """One side over the landed files: seconds and rows."""
    for kept in ("tables", "stream"):
        shutil.rmtree(landed / kept, ignore_errors=True)
    shutil.rmtree(landed / Names().volume_location.lstrip("/") / "_checkpoints", ignore_errors=True)
    began = time.perf_counter()
    rows = work(landed, stream)
    return time.perf_counter() - began, rows


def measure(what: Measure, home: Path, rows: int) -> None:
    """Run both sides in turn, print the line."""
    land_points(home, what.stream, 40, rows // 20)
    for work in (ours, theirs):
        timed(work, home, what.stream)
    shutil.rmtree(home / "Volumes")
    land_points(home, what.stream, 40, rows)
    ratios, seconds = [], []
    for _ in range(ROUNDS):
        mine, found = timed(ours, home, what.stream)
        floor, expected = timed(theirs, home, what.stream)
        if found != expected:
            raise SystemExit(f"{what.name}: ours and Spark's stream did different work: {found} and {expected} rows")
        ratios.append(mine / floor)
        seconds.append((mine, floor))
    print(
        f"{what.title:38} {statistics.median(mine for mine, _ in seconds):7.2f} s | "
        f"Spark's own stream {statistics.median(floor for _, floor in seconds):7.2f} s | "
        f"ratio {statistics.median(ratios):5.2f} ({min(ratios):.2f}-{max(ratios):.2f}), aim {what.goal}",
        flush=True,
    )
    shutil.rmtree(home / "Volumes")


def main() -> None:
    """Run the named measures, or all."""
    names = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    rows = 200_000 if "--quick" in sys.argv else 2_000_000
    # One home for all: a process has one session, and its catalogs are of one home.
    with tempfile.TemporaryDirectory(prefix="telematics-bench-") as home:
        for what in MEASURES:
            if not names or what.name in names:
                measure(what, Path(home), rows)


if __name__ == "__main__":
    main()
