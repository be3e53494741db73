"""The embedded engine: what it does when a file can't be opened, and how its work survives maintenance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import deltalake
import pytest

from telematics_assets.autoloader.loader import STEPS
from telematics_assets.catalog import FileStream, Names, TableContract
from telematics_assets.engines.embedded import EmbeddedEngine
from telematics_assets.errors import VolumeError
from telematics_assets.testing import MemoryLakehouse, MemoryVolume, json_bytes
from telematics_assets_tests.exactly_once.loader_process import engine_of
from telematics_assets_tests.exactly_once.test_kills import Killed, elsewhere, kill, land, stop_at

STREAM = FileStream("points", "json", "json", "points", TableContract("Points."))


class Guarded(MemoryVolume):
    """A Volume in which some files may be listed but not opened."""

    def __init__(self) -> None:
        super().__init__()
        self.forbidden: set[str] = set()

    @contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        if path in self.forbidden:
            raise VolumeError(f"{path}: Permission denied. Check the permissions of the loader's user.")
        with super().open(path) as source:
            yield source


@pytest.fixture
def volume() -> Guarded:
    return Guarded()


def test_a_file_that_must_not_be_opened_is_named_and_holds_up_no_other(volume: Guarded) -> None:
    engine = EmbeddedEngine(volume, MemoryLakehouse(), Names(), settle_seconds=0, incomplete_seconds=0)
    volume.put("json/mine.json", json_bytes([{"n": 1}]))
    volume.put("json/yours.json", json_bytes([{"n": 2}]))
    volume.forbidden = {"json/yours.json"}

    with pytest.raises(VolumeError, match=r"1 files of stream 'points' could not be opened.*json/yours.json: .*denied"):
        engine.ingest(STREAM)
    assert [row["n"] for row in engine.read(Names().bronze("points")).to_pylist()] == ["1"]
    assert [(r.path, r.state) for r in engine.files(STREAM)] == [
        ("json/mine.json", "INGESTED"),
        ("json/yours.json", "DISCOVERED"),
    ]

    volume.forbidden = set()
    assert engine.ingest(STREAM).rows == 1
    assert {r.state for r in engine.files(STREAM)} == {"INGESTED"}


def test_a_batch_is_finished_even_if_its_files_were_compacted_away_since(tmp_path: Path) -> None:
    stream = FileStream("kill_json", "json", "json", "kill_json", TableContract("Rows."))
    land(tmp_path, "json", 0)

    def die_in_two_files() -> None:
        location = str(tmp_path / "tables/workspace/01_bronze/kill_json")
        rows = deltalake.DeltaTable(location).to_pyarrow_table()
        deltalake.write_deltalake(location, rows.slice(0, 0), mode="append")
        deltalake.DeltaTable(location).optimize.compact()
        deltalake.DeltaTable(location).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
        kill()

    assert "table_committed" in STEPS
    engine = engine_of(tmp_path)
    engine.ingest(stream)
    land(tmp_path, "json", 1)
    with pytest.raises(Killed):
        engine_of(tmp_path, stop_at("table_committed", 1, lambda: elsewhere(die_in_two_files))).ingest(stream)
    report = engine_of(tmp_path).ingest(stream)
    assert [batch.recovered for batch in report.batches] == [True]
    assert report.table_rows == 40
