"""What is left out or hashed from today on is in no current row of bronze, whatever was there before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from telematics_assets.catalog import Names, ReplicatedTable
from telematics_assets.engines.base import ReplicateReport, ReplicateRequest
from telematics_assets.engines.embedded import EmbeddedEngine
from telematics_assets.errors import TableMovedError
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.testing import MemoryEngine
from telematics_assets_tests.databases import Database
from telematics_assets_tests.exactly_once.test_kills import Killed, kill, stop_at

CUSTOMERS = ReplicatedTable("public.customers", "xmin")
PRIVATE = replace(CUSTOMERS, hash=("email", "born"), exclude=("phone",))
KEY, OTHER = "a key of the tests, long enough", "another key, long enough"
COLUMNS = ("id", "email", "born")


class Mirror:
    """A bronze table of customers, and what is in it."""

    def __init__(self, folder: Path, database: Database) -> None:
        self.lakehouse = DeltaLakehouse(folder / "tables")
        self._database = database

    def replicate(
        self, table: ReplicatedTable, key: str | None = None, step: Any = None, *, full: bool = False
    ) -> ReplicateReport:
        engine = EmbeddedEngine(
            *(MemoryEngine().volume, self.lakehouse, Names()),
            supabase=self._database.supabase,
            hash_key=key,
            on_step=step,
        )
        return engine.replicate(table, ReplicateRequest(full))

    def rows(self) -> dict[int, dict[str, Any]]:
        table = self.lakehouse.open(Names().bronze(CUSTOMERS.target))
        assert table is not None
        return {row["id"]: row for row in table.read().to_pylist()}


@pytest.fixture
def mirror(tmp_path: Path, database: Database) -> Mirror:
    """A table of two rows that was replicated in clear."""
    database.run(
        "CREATE TABLE customers (id int8 PRIMARY KEY, email text, born date, phone text)",
        "INSERT INTO customers VALUES (1, 'a@example.com', '1980-01-31', '1'), (2, NULL, NULL, '2')",
    )
    mirror = Mirror(tmp_path, database)
    mirror.replicate(CUSTOMERS)
    return mirror


def test_a_declaration_that_hides_columns_takes_them_out_of_the_rows_that_are_there(mirror: Mirror) -> None:
    report = mirror.replicate(PRIVATE, KEY)
    assert (report.snapshot, report.table_rows) == ("column email, born is not what it was", 2)
    rows = mirror.rows()
    assert [len(rows[1][name]) for name in ("email", "born")] == [64, 64]
    assert (rows[2]["email"], rows[2]["born"]) == (None, None)
    assert "phone" not in rows[1]
    assert mirror.replicate(PRIVATE, KEY).batches == 0


def test_another_key_hashes_every_row_anew(mirror: Mirror) -> None:
    mirror.replicate(PRIVATE, KEY)
    before = mirror.rows()
    report = mirror.replicate(PRIVATE, OTHER)
    assert report.snapshot is not None
    assert mirror.rows()[1]["email"] not in (None, before[1]["email"])
    mirror.replicate(PRIVATE, KEY)
    assert mirror.rows()[1]["email"] == before[1]["email"]


def test_rows_that_only_bronze_has_keep_nothing_in_clear(mirror: Mirror, database: Database) -> None:
    staying = replace(PRIVATE, deletes="none")
    database.run("DELETE FROM customers WHERE id = 1")
    mirror.replicate(staying, KEY)
    row = mirror.rows()[1]
    assert (row["email"], row["born"], "phone" in row) == (None, None, False)


def test_killed_after_the_columns_were_cleared_it_goes_on_from_there(mirror: Mirror) -> None:
    with pytest.raises(Killed):
        mirror.replicate(PRIVATE, KEY, stop_at("committed", 1, kill))
    assert mirror.rows()[1]["email"] is None
    # Whoever takes the declaration back gets the values back.
    assert mirror.replicate(CUSTOMERS, full=True).snapshot == "asked for"
    assert (mirror.rows()[1]["email"], mirror.rows()[1]["phone"]) == ("a@example.com", "1")
    mirror.replicate(PRIVATE, KEY)
    assert len(mirror.rows()[1]["email"]) == 64


def test_a_table_that_somebody_else_changed_is_refused_all_the_same(mirror: Mirror) -> None:
    from deltalake import DeltaTable

    table = mirror.lakehouse.open(Names().bronze(CUSTOMERS.target))
    assert table is not None
    DeltaTable(table.uri).delete("id = 2")
    with pytest.raises(TableMovedError):
        mirror.replicate(PRIVATE, KEY)
