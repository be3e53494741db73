"""Maintenance of a replicated Delta table: its files, its change data feed, and the log that replication needs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from telematics_assets.catalog import Names, ReplicatedTable
from telematics_assets.engines.embedded import EmbeddedEngine
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.testing import MemoryEngine
from telematics_assets_tests.databases import Database

TABLE = ReplicatedTable("public.policies", "xmin")
DAY = 86_400


@pytest.fixture
def engine(database: Database, tmp_path: Path) -> EmbeddedEngine:
    """A table with three small data files."""
    database.run("CREATE TABLE public.policies (id int8 PRIMARY KEY, name text)")
    lakehouse = DeltaLakehouse(tmp_path / "tables")
    engine = EmbeddedEngine(MemoryEngine().volume, lakehouse, Names(), supabase=database.supabase)
    for number in range(3):
        database.run(f"INSERT INTO public.policies VALUES ({number}, 'a')")
        engine.replicate(TABLE)
    return engine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "tables/workspace/01_bronze/supabase_policies"


def age(folder: Path, days: float, *below: str) -> None:
    """Let files be that old."""
    then = time.time() - days * DAY
    for path in folder.joinpath(*below).rglob("*"):
        os.utime(path, (then, then))


def changes(folder: Path) -> list[str]:
    """The kinds of changes that the feed tells, of all versions that it can still be read for."""
    feed = pa.table(DeltaTable(folder).load_cdf(starting_version=0).read_all())
    return sorted(feed.column("_change_type").to_pylist())


def test_small_files_are_written_together_and_the_feed_stays_readable(
    engine: EmbeddedEngine, database: Database, folder: Path
) -> None:
    database.run("UPDATE public.policies SET name = 'b' WHERE id = 0", "DELETE FROM public.policies WHERE id = 1")
    engine.replicate(TABLE, None)
    fed = changes(folder)
    report = engine.maintain(TABLE)
    assert report.files_before > report.files_after == 1
    assert report.notes == ()
    assert changes(folder) == fed
    assert engine.replicate(TABLE).batches == 0


def test_change_data_goes_with_the_files_that_no_version_of_the_last_days_needs(
    engine: EmbeddedEngine, database: Database, folder: Path
) -> None:
    database.run("UPDATE public.policies SET name = 'b' WHERE id = 0")
    engine.replicate(TABLE)
    assert list(folder.glob("_change_data/*"))
    age(folder, 6, "_change_data")
    engine.maintain(TABLE)
    assert list(folder.glob("_change_data/*"))
    age(folder, 8, "_change_data")
    assert engine.maintain(TABLE).files_removed
    assert not list(folder.glob("_change_data/*"))
    assert len(engine.read(engine.names.bronze(TABLE.target))) == 3
    assert engine.replicate(TABLE).batches == 0


def test_expired_log_entries_go_and_those_that_replication_reads_again_stay(
    engine: EmbeddedEngine, database: Database, folder: Path
) -> None:
    age(folder, 40, "_delta_log")
    assert engine.maintain(TABLE).log_entries_removed > 0
    # Nothing is replicated for weeks, but maintained every day: what stands behind the last batch must not expire.
    age(folder, 40, "_delta_log")
    for _ in range(2):
        assert engine.maintain(TABLE).log_entries_removed == 0
    assert engine.replicate(TABLE).batches == 0
    database.run("INSERT INTO public.policies VALUES (7, 'new')")
    report = engine.replicate(TABLE)
    assert (report.inserted, report.snapshot) == (1, None)
