"""Embedded and Spark take turns over one stream, batch by batch, and either may die at any step of its batch."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import pytest

from telematics_assets.autoloader.loader import STEPS
from telematics_assets.catalog import Column, FileStream, FileStreamOptions, Names, TableContract
from telematics_assets.engines.embedded import EmbeddedEngine
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.testing import json_bytes
from telematics_assets_tests.conformance.spark import SparkPlatform

pytestmark = pytest.mark.spark
STREAM = FileStream(
    name="trips",
    format="json",
    folder="json",
    table="trips",
    contract=TableContract("Trips.", (Column("n", "STRING", "Number."),)),
    options=FileStreamOptions(raw_record_column="_raw_record"),
)
#: What a batch passes between its plan and its end; before it nothing has happened yet.
BETWEEN = [step for step in STEPS if step not in ("listed", "table_created", "metadata_published")]


class KilledError(BaseException):
    """The end of a process."""


class Deployment:
    """One home on which engines take turns."""

    def __init__(self, home: Path) -> None:
        self.spark = SparkPlatform(home)
        self.embedded = EmbeddedEngine
        self.home = home
        self.landed = 0

    def land(self) -> None:
        """Three files: two plain ones, and one with a damaged record and a column of its own."""
        for _ in range(2):
            self.put([{"n": self.landed}, {"n": self.landed + 0.5}])
        self.put([{"n": self.landed, f"c{self.landed // 3}": 1}, "{broken"])

    def put(self, records: list[dict[str, object] | str]) -> None:
        """One file."""
        self.spark.volume_put(f"json/{self.landed:04d}.json", json_bytes(records))
        self.landed += 1

    def load(self, engine: str, die_at: str | None = None) -> bool:
        """Load by an engine in a process of its own; whether it lived."""

        def on_step(step: str) -> None:
            if step == die_at:
                raise KilledError

        options = {"settle_seconds": 0.0, "incomplete_seconds": 0.0, "on_step": on_step}
        if engine == "spark":
            loader = self.spark.engine_over(on_step=on_step)
        else:
            tables = DeltaLakehouse(self.home / "tables")
            loader = EmbeddedEngine(self.spark.volume, tables, Names(), **options)  # type: ignore[arg-type]
        try:
            loader.ingest(STREAM)
        except KilledError:
            return False
        return True

    def prove(self) -> None:
        """Every record of every file is there once, and the books say so."""
        rows = self.spark.rows(STREAM, "_source_file", "_raw_record")
        found = sorted((row["_source_file"].rpartition("/")[2], row["_raw_record"]) for row in rows)
        folder = self.spark.at("json")
        lines = [(file.name, line) for file in sorted(folder.iterdir()) for line in file.read_text().splitlines()]
        assert found == sorted(lines)
        assert set(self.spark.states(STREAM).values()) == {"INGESTED"}
        counts = {file.path.rpartition("/")[2]: file.rows for file in self.spark.engine.files(STREAM)}
        assert counts == {name: 2 for name, _ in lines}
        assert all(b.expected_rows == b.added_rows for b in self.spark.engine.balance(STREAM, 0))


def test_whoever_goes_on_reads_nothing_twice_and_leaves_nothing_out(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path)
    engines = cycle(["spark", "embedded"])
    for _ in range(4):
        deployment.land()
        assert deployment.load(next(engines))
    deployment.prove()


@pytest.mark.parametrize("first", ["spark", "embedded"])
def test_one_dies_at_any_step_and_the_other_ends_its_batch(tmp_path: Path, first: str) -> None:
    second = "embedded" if first == "spark" else "spark"
    deployment = Deployment(tmp_path)
    deployment.land()
    assert deployment.load(first)
    died = set()
    for step in BETWEEN:
        deployment.land()
        if not deployment.load(first, die_at=step):
            died.add(step)
        assert deployment.load(second)
        deployment.prove()
    # Checkpoints are compacted now and then only.
    assert died >= set(BETWEEN) - {"compacted"}
