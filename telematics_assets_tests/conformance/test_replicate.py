"""Changes of a source table arrive in bronze, once, in every mode."""

from __future__ import annotations

import pytest

from telematics_assets.catalog import DeleteHandling, ReplicatedTable, ReplicationMode
from telematics_assets_tests.conformance.replicas import ReplicaPlatform

MODES: tuple[ReplicationMode, ...] = ("row_xid", "xmin", "updated_at", "snapshot")
COLUMNS = "id int8 PRIMARY KEY, name text, updated_at timestamptz NOT NULL DEFAULT clock_timestamp()"


def declared(mode: ReplicationMode, deletes: DeleteHandling | None = None) -> ReplicatedTable:
    """The table of these cases; changes arrive at once in every mode."""
    return ReplicatedTable("public.policies", mode, deletes=deletes, lag_seconds=0, sweep_hours=0)


@pytest.fixture
def policies(replica_platform: ReplicaPlatform) -> ReplicaPlatform:
    """A table with three rows."""
    replica_platform.made("policies", COLUMNS)
    replica_platform.run("INSERT INTO policies VALUES (1, 'one'), (2, 'two'), (3, 'three')")
    return replica_platform


@pytest.mark.parametrize("mode", MODES)
def test_bronze_follows_inserts_updates_deletes_and_new_keys(policies: ReplicaPlatform, mode: ReplicationMode) -> None:
    table = declared(mode)
    report = policies.replicate(table)
    assert (report.inserted, report.snapshot, report.batches) == (3, "first", 1)
    policies.assert_mirrored(table, "id", "name")
    policies.run(
        "UPDATE policies SET name = 'TWO', updated_at = clock_timestamp() WHERE id = 2",
        "DELETE FROM policies WHERE id = 1",
        "INSERT INTO policies VALUES (4, NULL)",
        "UPDATE policies SET id = 30, updated_at = clock_timestamp() WHERE id = 3",
    )
    report = policies.replicate(table)
    assert (report.inserted, report.updated, report.deleted, report.batches) == (2, 1, 2, 1)
    policies.assert_mirrored(table, "id", "name")
    found = policies.engine.reconcile(table)
    assert (found.source_rows, found.table_rows, found.missing, found.extra) == (3, 3, 0, 0)


@pytest.mark.parametrize("mode", ["row_xid", "xmin", "snapshot"])
def test_a_table_without_changes_gets_no_commit_and_stays_fresh(
    policies: ReplicaPlatform, mode: ReplicationMode
) -> None:
    table = ReplicatedTable("public.policies", mode)
    before = policies.replicate(table)
    policies.run("CREATE TABLE other ()")
    report = policies.replicate(table)
    assert (report.batches, report.table_version) == (0, before.table_version)
    assert report.lag_seconds is not None
    assert report.lag_seconds < 60
    if mode != "snapshot":
        assert report.position is not None
        assert before.position is not None
        assert report.position > before.position


@pytest.mark.parametrize("mode", MODES)
def test_a_truncated_table_is_emptied(policies: ReplicaPlatform, mode: ReplicationMode) -> None:
    table = declared(mode)
    policies.replicate(table)
    policies.run("TRUNCATE policies", "INSERT INTO policies VALUES (2, 'again')")
    policies.replicate(table)
    policies.assert_mirrored(table, "id", "name")


@pytest.mark.parametrize("mode", MODES)
def test_a_row_that_was_deleted_and_inserted_again_stays(policies: ReplicaPlatform, mode: ReplicationMode) -> None:
    table = declared(mode)
    policies.replicate(table)
    policies.run("DELETE FROM policies WHERE id = 2", "INSERT INTO policies VALUES (2, 'again')")
    policies.replicate(table)
    policies.assert_mirrored(table, "id", "name")
    policies.replicate(table)
    policies.assert_mirrored(table, "id", "name")


@pytest.mark.parametrize("mode", ["row_xid", "xmin"])
def test_a_transaction_that_commits_late_is_not_passed_over(policies: ReplicaPlatform, mode: ReplicationMode) -> None:
    table = declared(mode)
    policies.replicate(table)
    with policies.database.connect() as slow:
        slow.execute("BEGIN")
        slow.execute("INSERT INTO policies VALUES (10, 'late')")
        slow.execute("DELETE FROM policies WHERE id = 1")
        policies.run("INSERT INTO policies VALUES (11, 'quick')")
        report = policies.replicate(table)
        assert report.blocker is not None
        assert report.blocker.kind == "transaction"
        slow.execute("COMMIT")
    policies.replicate(table)
    policies.assert_mirrored(table, "id", "name")


def test_mode_updated_at_loses_what_commits_later_than_its_lag_until_keys_are_compared(
    policies: ReplicaPlatform,
) -> None:
    table = ReplicatedTable("public.policies", "updated_at", lag_seconds=0)
    policies.replicate(table)
    with policies.database.connect() as slow:
        slow.execute("BEGIN")
        slow.execute("INSERT INTO policies VALUES (10, 'late')")
        policies.run("UPDATE policies SET updated_at = clock_timestamp() WHERE id = 2")
        policies.replicate(table)
        slow.execute("COMMIT")
    policies.replicate(table)
    assert policies.engine.reconcile(table).missing == 1
    report = policies.replicate(table, sweep=True)
    assert (report.inserted, report.swept) == (1, True)
    policies.assert_mirrored(table, "id", "name")


def test_a_prepared_transaction_that_holds_the_cut_is_named_with_its_age(policies: ReplicaPlatform) -> None:
    table = declared("row_xid")
    with policies.database.connect() as other:
        other.execute("BEGIN")
        other.execute("INSERT INTO policies VALUES (10, 'prepared')")
        other.execute("PREPARE TRANSACTION 'forgotten'")
        try:
            policies.replicate(table)
            policies.run("UPDATE policies SET name = 'later' WHERE id = 2")
            report = policies.replicate(table)
            assert report.blocker is not None
            assert (report.blocker.kind, "forgotten" in report.blocker.who) == ("prepared transaction", True)
            assert report.blocker.age_seconds > 0
            assert report.lag_seconds is not None
            assert report.lag_seconds >= report.blocker.age_seconds
        finally:
            other.execute("COMMIT PREPARED 'forgotten'")
    policies.replicate(table)
    policies.assert_mirrored(table, "id", "name")


def test_savepoints_and_rollbacks_leave_what_was_committed(policies: ReplicaPlatform) -> None:
    tables = [ReplicatedTable("public.policies", mode, table=f"by_{mode}") for mode in MODES[:2]]
    for table in tables:
        policies.replicate(table)
    policies.run(
        "BEGIN; INSERT INTO policies VALUES (20, 'a'); SAVEPOINT s; INSERT INTO policies VALUES (21, 'b'); "
        "ROLLBACK TO s; SAVEPOINT t; INSERT INTO policies VALUES (22, 'c'); RELEASE t; COMMIT",
        "BEGIN; DELETE FROM policies WHERE id = 1; ROLLBACK",
    )
    for table in tables:
        assert policies.replicate(table).inserted == 2
        policies.assert_mirrored(table, "id", "name")


def test_rows_that_are_restored_past_the_triggers_are_found_by_a_sweep(policies: ReplicaPlatform) -> None:
    table = ReplicatedTable("public.policies")
    policies.replicate(table)
    with policies.database.connect() as restore:
        restore.execute("SET session_replication_role = replica")
        restore.execute("ALTER TABLE policies DISABLE TRIGGER ALL")
        for number, position in ((50, "NULL"), (51, "'3'"), (52, "'900000000000'")):
            restore.execute(f"INSERT INTO policies (id, name, row_xid) VALUES ({number}, 'restored', {position})")
        restore.execute("UPDATE policies SET name = 'changed', row_xid = NULL WHERE id = 1")
        restore.execute("DELETE FROM policies WHERE id = 3")
    policies.prepare("policies")
    policies.replicate(table, sweep=True)
    policies.assert_mirrored(table, "id", "name")
    assert policies.replicate(table, sweep=True).updated == 0


def test_tombstones_that_were_pruned_are_made_good_by_a_sweep(policies: ReplicaPlatform) -> None:
    table = ReplicatedTable("public.policies")
    policies.replicate(table)
    policies.run("DELETE FROM policies WHERE id = 1", "SELECT telematics.prune_tombstones('0 seconds')")
    report = policies.replicate(table)
    assert (report.swept, report.deleted) == (True, 1)
    policies.assert_mirrored(table, "id", "name")
    assert not policies.replicate(table).swept


@pytest.mark.parametrize("mode", ["row_xid", "xmin", "updated_at"])
def test_deleted_rows_stay_where_that_is_asked_for(policies: ReplicaPlatform, mode: ReplicationMode) -> None:
    table = declared(mode, "none")
    policies.replicate(table)
    policies.run("DELETE FROM policies WHERE id = 1")
    policies.replicate(table, sweep=True)
    policies.replicate(table, full=True)
    assert [row[0] for row in policies.bronze(table, "id")] == [1, 2, 3]


def test_keys_of_several_columns_and_types_find_their_rows(replica_platform: ReplicaPlatform) -> None:
    replica_platform.made(
        "parts",
        "u uuid, t text, d date, n numeric(8,3), z timestamptz, note text, PRIMARY KEY (t, u, z, n, d)",
        key=("t", "u", "z", "n", "d"),
    )
    table = ReplicatedTable("public.parts")
    replica_platform.run(
        "INSERT INTO parts SELECT gen_random_uuid(), 'It''s ' || chr(92) || i, '2024-02-29', i / 7.0, "
        "'2024-03-31 01:59:59.123456+01', 'x' FROM generate_series(1, 6) i"
    )
    replica_platform.replicate(table)
    replica_platform.run(
        "UPDATE parts SET note = 'y' WHERE n < 0.5", "DELETE FROM parts WHERE n > 0.8",
    )  # fmt: skip
    report = replica_platform.replicate(table)
    assert (report.updated, report.deleted) == (3, 1)
    replica_platform.assert_mirrored(table, "t", "note")
    assert replica_platform.engine.reconcile(table).missing == replica_platform.engine.reconcile(table).extra == 0


def test_a_partitioned_table_is_one_table(replica_platform: ReplicaPlatform) -> None:
    replica_platform.run(
        "CREATE TABLE claims (id int8, year int4, note text, PRIMARY KEY (id, year)) PARTITION BY LIST (year)",
        "CREATE TABLE claims_24 PARTITION OF claims FOR VALUES IN (2024)",
        "CREATE TABLE claims_25 PARTITION OF claims FOR VALUES IN (2025)",
    )
    replica_platform.prepare("claims", ("id", "year"), partitioned=True)
    table = ReplicatedTable("public.claims")
    replica_platform.run("INSERT INTO claims VALUES (1, 2024, 'a'), (2, 2025, 'b'), (3, 2025, 'c')")
    replica_platform.replicate(table)
    replica_platform.run("UPDATE claims SET year = 2025 WHERE id = 1", "DELETE FROM claims WHERE id = 2")
    replica_platform.replicate(table)
    replica_platform.assert_mirrored(table, "id", "year", "note")


@pytest.mark.parametrize("mode", ["row_xid", "xmin"])
def test_a_partition_that_comes_or_goes_is_seen_with_the_next_batch(
    replica_platform: ReplicaPlatform, mode: ReplicationMode
) -> None:
    replica_platform.run(
        "CREATE TABLE claims (id int8, year int4, PRIMARY KEY (id, year)) PARTITION BY RANGE (year)",
        "CREATE TABLE claims_20s PARTITION OF claims FOR VALUES FROM (2020) TO (2030) PARTITION BY LIST (year)",
        "CREATE TABLE claims_24 PARTITION OF claims_20s FOR VALUES IN (2024)",
        "CREATE TABLE claims_25 PARTITION OF claims_20s FOR VALUES IN (2025)",
    )
    replica_platform.prepare("claims", ("id", "year"), partitioned=True)
    table = ReplicatedTable("public.claims", mode)
    replica_platform.run("INSERT INTO claims VALUES (1, 2024), (2, 2025), (3, 2025)")
    replica_platform.replicate(table)
    assert not replica_platform.replicate(table).swept
    # Neither fires a trigger.
    for change, there in (
        ("DETACH PARTITION claims_25", [(1,)]),
        ("ATTACH PARTITION claims_25 FOR VALUES IN (2025)", [(1,), (2,), (3,)]),
    ):
        replica_platform.run(f"ALTER TABLE claims_20s {change}")
        assert replica_platform.replicate(table).swept
        assert replica_platform.bronze(table, "id") == there
        assert not replica_platform.replicate(table).swept


def test_a_view_is_replicated_by_the_key_that_is_declared(policies: ReplicaPlatform) -> None:
    policies.run("CREATE VIEW shown AS SELECT id, upper(name) AS name FROM policies")
    table = ReplicatedTable("public.shown", "snapshot", key=("id",))
    policies.replicate(table)
    policies.run("DELETE FROM policies WHERE id = 1", "UPDATE policies SET name = 'x' WHERE id = 2")
    report = policies.replicate(table)
    assert (report.updated, report.deleted) == (1, 1)
    policies.assert_mirrored(table, "id", "name")
