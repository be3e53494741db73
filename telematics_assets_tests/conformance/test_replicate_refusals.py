"""What can't be replicated is refused before anything is written, and the message says what to change."""

from __future__ import annotations

import pytest

from telematics_assets.catalog import ReplicatedTable, ReplicationMode
from telematics_assets.errors import ReplicationError, SupabaseError, TableNotOursError
from telematics_assets_tests.conformance.replicas import ReplicaPlatform


@pytest.mark.parametrize(
    ("ddl", "declared", "message"),
    [
        ("CREATE TABLE t (id int8, row_xid xid8)", {"deletes": "sweep"}, r"no primary key.*ADD PRIMARY KEY"),
        ("CREATE TABLE t (id int8 PRIMARY KEY)", {"deletes": "sweep"}, r"no column row_xid.*telematics supabase sql"),
        ("CREATE TABLE t (id int8 PRIMARY KEY, row_xid text)", {"deletes": "sweep"}, r"row_xid.*is text.*xid8 or int8"),
        ("CREATE TABLE t (id int8 PRIMARY KEY, row_xid xid8)", {}, r"telematics\.tombstones.*telematics supabase sql"),
        (
            "CREATE TABLE t (id int8 PRIMARY KEY, row_xid xid8)",
            {"deletes": "sweep"},
            r"No trigger fills row_xid.*telematics supabase sql",
        ),
        ("CREATE TABLE t (id int8 PRIMARY KEY)", {"mode": "updated_at"}, r"no column updated_at.*position_column"),
        ("CREATE TABLE t (id int8 PRIMARY KEY, updated_at date)", {"mode": "updated_at"}, r"updated_at.*is date"),
        ("CREATE TABLE t (id int8 PRIMARY KEY, n int)", {"mode": "xmin", "key": ("n",)}, r"key=\('n',\).*is no key"),
        ("CREATE TABLE t (id int8 PRIMARY KEY, n int)", {"mode": "xmin", "exclude": ("id",)}, r"id .*part of its key"),
        ("CREATE TABLE t (id int8 PRIMARY KEY, n int)", {"mode": "xmin", "exclude": ("m",)}, r"no column m.*exclude"),
        ("CREATE VIEW t AS SELECT 1 AS id", {"mode": "xmin", "key": ("id",)}, r"is a view.*snapshot"),
        ("CREATE VIEW t AS SELECT 1 AS id", {"mode": "snapshot"}, r"view.*no primary key.*key="),
        (
            "CREATE VIEW t AS SELECT 1 AS id FROM generate_series(1, 2)",
            {"mode": "snapshot", "key": ("id",)},
            r"Several rows.*same id",
        ),
        ("CREATE MATERIALIZED VIEW t AS SELECT 1 AS id", {"mode": "snapshot"}, r"materialized view.*view of it"),
        ("CREATE TABLE other ()", {"mode": "xmin"}, r"no table public\.t.*supabase discover"),
    ],
)
def test_a_declaration_that_the_database_contradicts_is_refused(
    replica_platform: ReplicaPlatform, ddl: str, declared: dict[str, object], message: str
) -> None:
    replica_platform.run(ddl)
    table = ReplicatedTable("public.t", **declared)  # type: ignore[arg-type]
    with pytest.raises(ReplicationError, match=message):
        replica_platform.replicate(table)
    assert replica_platform.engine.state(replica_platform.engine.names.bronze(table.target)) is None


@pytest.mark.parametrize("mode", ["xmin", "snapshot"])
def test_a_reader_whom_policies_filter_fails_instead_of_seeing_fewer_rows(
    replica_platform: ReplicaPlatform, mode: ReplicationMode
) -> None:
    replica_platform.run("CREATE TABLE t (id int8 PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    table = ReplicatedTable("public.t", mode)
    replica_platform.replicate(table)
    replica_platform.run("ALTER TABLE t ENABLE ROW LEVEL SECURITY", "INSERT INTO t VALUES (2)")
    with pytest.raises(SupabaseError, match="BYPASSRLS"):
        replica_platform.replicate(table)
    assert replica_platform.bronze(table, "id") == [(1,)]


def test_a_role_without_a_grant_is_told_which(replica_platform: ReplicaPlatform) -> None:
    role = replica_platform.database.role
    replica_platform.run("CREATE TABLE t (id int8 PRIMARY KEY)", f"REVOKE ALL ON t FROM {role}")
    with pytest.raises(ReplicationError, match=r"may not read public\.t.*grants"):
        replica_platform.replicate(ReplicatedTable("public.t", "xmin"))


def test_a_key_that_bronze_can_not_show_is_refused(replica_platform: ReplicaPlatform) -> None:
    replica_platform.run("CREATE TABLE t (at timestamptz PRIMARY KEY)", "INSERT INTO t VALUES ('infinity')")
    with pytest.raises(ReplicationError, match=r"Column at is part of the key and holds 'infinity'"):
        replica_platform.replicate(ReplicatedTable("public.t", "xmin"))


def test_values_that_bronze_can_not_show_are_null_and_counted(replica_platform: ReplicaPlatform) -> None:
    replica_platform.run(
        "CREATE TABLE t (id int8 PRIMARY KEY, at timestamptz)", "INSERT INTO t VALUES (1, 'infinity'), (2, NULL)"
    )
    table = ReplicatedTable("public.t", "xmin")
    (anomaly,) = replica_platform.replicate(table).anomalies
    assert (anomaly.column, anomaly.kind, anomaly.rows) == ("at", "infinity", 1)
    assert replica_platform.bronze(table, "id", "at") == [(1, None), (2, None)]


def test_reconciling_before_the_first_snapshot_says_so(replica_platform: ReplicaPlatform) -> None:
    replica_platform.run("CREATE TABLE t (id int8 PRIMARY KEY)")
    with pytest.raises(ReplicationError, match="no whole snapshot"):
        replica_platform.engine.reconcile(ReplicatedTable("public.t", "xmin"))


def test_two_declarations_for_one_bronze_table_are_told_apart(replica_platform: ReplicaPlatform) -> None:
    replica_platform.run("CREATE TABLE t (id int8 PRIMARY KEY)", "CREATE TABLE u (id int8 PRIMARY KEY)")
    replica_platform.replicate(ReplicatedTable("public.t", "xmin"))
    with pytest.raises(TableNotOursError, match=r"holds rows of public\.t, not of public\.u"):
        replica_platform.replicate(ReplicatedTable("public.u", "xmin", table="supabase_t"))
