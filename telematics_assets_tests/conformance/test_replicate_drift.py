"""Source tables change their columns, are recreated, cloned and recovered; bronze stays right, or says why it can't."""

from __future__ import annotations

import psycopg
import pytest

from telematics_assets.catalog import ReplicatedTable, ReplicationMode
from telematics_assets.engines.base import SchemaChange
from telematics_assets.errors import SchemaError
from telematics_assets_tests.conformance.replicas import ReplicaPlatform

MODES: tuple[ReplicationMode, ...] = ("row_xid", "xmin", "snapshot")


@pytest.fixture
def policies(replica_platform: ReplicaPlatform) -> ReplicaPlatform:
    """A table with three rows."""
    replica_platform.made("policies", "id int8 PRIMARY KEY, name text, premium numeric(8,2)")
    replica_platform.run("INSERT INTO policies VALUES (1, 'one', 1.5), (2, 'two', 2.5), (3, 'three', 3.5)")
    return replica_platform


@pytest.mark.parametrize("mode", MODES)
def test_an_added_column_is_added(policies: ReplicaPlatform, mode: ReplicationMode) -> None:
    table = ReplicatedTable("public.policies", mode)
    policies.replicate(table)
    policies.run("ALTER TABLE policies ADD COLUMN note text")
    report = policies.replicate(table)
    assert report.schema_changes == (SchemaChange("note", "STRING"),)
    assert report.snapshot is None
    policies.run("UPDATE policies SET note = 'x' WHERE id = 1")
    assert policies.replicate(table).schema_changes == ()
    policies.assert_mirrored(table, "id", "note")


@pytest.mark.parametrize("mode", MODES)
def test_a_column_that_is_added_with_a_default_arrives_in_all_rows(
    policies: ReplicaPlatform, mode: ReplicationMode
) -> None:
    table = ReplicatedTable("public.policies", mode)
    policies.replicate(table)
    policies.run("ALTER TABLE policies ADD COLUMN state text DEFAULT 'active'", "DELETE FROM policies WHERE id = 3")
    report = policies.replicate(table)
    assert (report.updated, report.deleted) == (2, 1)
    if mode == "row_xid":
        assert report.snapshot == "column state was added with values"
    policies.assert_mirrored(table, "id", "name", "state")


@pytest.mark.parametrize("mode", MODES)
def test_a_dropped_column_stays_and_is_null_from_then_on(policies: ReplicaPlatform, mode: ReplicationMode) -> None:
    table = ReplicatedTable("public.policies", mode)
    policies.replicate(table)
    policies.run("ALTER TABLE policies DROP COLUMN premium", "UPDATE policies SET name = 'TWO' WHERE id = 2")
    report = policies.replicate(table)
    assert any("premium" in note for note in report.notes)
    assert [str(row[1]) for row in policies.bronze(table, "id", "premium")] == ["1.50", "None", "3.50"]


@pytest.mark.parametrize("mode", MODES)
def test_a_renamed_column_is_a_new_one_beside_the_old(policies: ReplicaPlatform, mode: ReplicationMode) -> None:
    table = ReplicatedTable("public.policies", mode)
    policies.replicate(table)
    policies.run("ALTER TABLE policies RENAME COLUMN name TO title")
    report = policies.replicate(table)
    assert [change.column for change in report.schema_changes] == ["title"]
    assert any("name" in note for note in report.notes)
    policies.assert_mirrored(table, "id", "title")


@pytest.mark.parametrize("mode", MODES)
def test_a_column_that_is_altered_without_its_rows_being_written_is_read_again(
    policies: ReplicaPlatform, mode: ReplicationMode
) -> None:
    table = ReplicatedTable("public.policies", mode)
    policies.replicate(table)
    policies.run("ALTER TABLE policies ALTER COLUMN name TYPE varchar(20) USING upper(name)")
    policies.replicate(table)
    policies.assert_mirrored(table, "id", "name", "premium")


@pytest.mark.parametrize("mode", MODES)
def test_a_column_of_another_type_is_refused_until_a_full_replication_rewrites_the_table(
    policies: ReplicaPlatform, mode: ReplicationMode
) -> None:
    table = ReplicatedTable("public.policies", mode)
    policies.replicate(table)
    policies.run("ALTER TABLE policies ALTER COLUMN premium TYPE text", "INSERT INTO policies VALUES (4, 'four', 'x')")
    with pytest.raises(SchemaError, match=r"premium .*DECIMAL\(8,2\).*STRING.*--full"):
        policies.replicate(table)
    assert len(policies.bronze(table, "id")) == 3
    report = policies.replicate(table, full=True)
    assert report.snapshot == "asked for"
    policies.assert_mirrored(table, "id", "name", "premium")
    policies.run("DELETE FROM policies WHERE id = 4")
    assert policies.replicate(table, sweep=True).deleted == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_table_that_was_created_anew_takes_the_place_of_the_old_one(
    policies: ReplicaPlatform, mode: ReplicationMode
) -> None:
    table = ReplicatedTable("public.policies", mode)
    policies.replicate(table)
    policies.run("DROP TABLE policies")
    policies.made("policies", "id int8 PRIMARY KEY, name text, premium numeric(8,2)")
    policies.run("INSERT INTO policies VALUES (2, 'two', 2.5), (9, 'nine', NULL)")
    report = policies.replicate(table)
    assert report.snapshot == "the table was created anew"
    assert (report.inserted, report.deleted) == (1, 2)
    policies.assert_mirrored(table, "id", "name", "premium")


@pytest.mark.parametrize("mode", MODES)
def test_a_cloned_database_is_another_one(policies: ReplicaPlatform, mode: ReplicationMode) -> None:
    table = ReplicatedTable("public.policies", mode)
    policies.replicate(table)
    name, old = policies.database.name, f"{policies.database.name}_old"
    with psycopg.connect(policies.database.server.url(), autocommit=True) as server:
        server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        server.execute(f"ALTER DATABASE {name} RENAME TO {old}")
        server.execute(f"CREATE DATABASE {name} TEMPLATE {old}")
        server.execute(f"DROP DATABASE {old}")
    policies.run("UPDATE policies SET name = 'here' WHERE id = 1")
    report = policies.replicate(table)
    assert report.snapshot == "another database"
    assert report.updated >= 1
    policies.assert_mirrored(table, "id", "name", "premium")


def test_another_mode_begins_anew_over_the_same_rows(policies: ReplicaPlatform) -> None:
    policies.replicate(ReplicatedTable("public.policies", "row_xid"))
    report = policies.replicate(ReplicatedTable("public.policies", "xmin"))
    assert (report.snapshot, report.inserted, report.updated, report.deleted) == ("another mode", 0, 0, 0)


def test_columns_that_are_left_out_or_hashed_never_arrive(policies: ReplicaPlatform) -> None:
    table = ReplicatedTable("public.policies", exclude=("name",))
    policies.replicate(table)
    assert "name" not in policies.columns(table)
    assert list(policies.columns(table)) == ["id", "premium", "row_xid", "_rescued_data", "_replicated_at"]
