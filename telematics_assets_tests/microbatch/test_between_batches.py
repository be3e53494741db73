"""What happens between two batches of one replicator: whatever is asked in fewer words must still be seen."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
from deltalake import DeltaTable

from telematics_assets.catalog import Names, ReplicatedTable
from telematics_assets.engines.base import ReplicateReport
from telematics_assets.errors import ReplicationError, SupabaseError, TableMovedError
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.lakehouse.log import entry_path
from telematics_assets.microbatch.cut import QUESTIONS, Rows, locking, taken
from telematics_assets.microbatch.replicate import Replicator
from telematics_assets.microbatch.session import BeginningRefusedError, connected
from telematics_assets.microbatch.source import described
from telematics_assets.microbatch.sql import TableSetup, setup_sql
from telematics_assets_tests.databases import Database
from telematics_assets_tests.exactly_once.test_kills import Killed, kill, stop_at
from telematics_assets_tests.microbatch.replicate_process import replicate

TABLE = ReplicatedTable("public.policies")
NAME = Names().bronze(TABLE.target)


class Mirror:
    """One replicator with one connection, behind which things change."""

    def __init__(self, database: Database, lakehouse: DeltaLakehouse, replicator: Replicator) -> None:
        self.database = database
        self.lakehouse = lakehouse
        self.replicator = replicator

    def replicate(self) -> ReplicateReport:
        """A batch."""
        return self.replicator.replicate()

    def bronze(self) -> DeltaTable:
        """The bronze table as somebody else opens it."""
        table = self.lakehouse.open(NAME)
        assert table is not None
        return DeltaTable(table.uri)

    def names(self) -> dict[int, str]:
        """What bronze has."""
        found = self.bronze().to_pyarrow_table(columns=["id", "name"]).to_pydict()
        return dict(zip(found["id"], found["name"], strict=True))


@pytest.fixture
def mirror(policies: Database, tmp_path: Path) -> Iterator[Mirror]:
    lakehouse = DeltaLakehouse(tmp_path / "tables")
    with connected(policies.supabase) as connection:
        mirror = Mirror(policies, lakehouse, Replicator(TABLE, NAME, lakehouse, connection))
        assert mirror.replicate().inserted == 100
        assert mirror.replicate().batches == 0
        yield mirror


@pytest.mark.parametrize(
    ("statement", "error", "says"),
    [
        ("ALTER TABLE policies DISABLE TRIGGER ALL", ReplicationError, "No trigger fills row_xid"),
        ("DROP TRIGGER telematics_row_xid ON policies", ReplicationError, "No trigger fills row_xid"),
        ("REVOKE SELECT ON policies FROM {role}", ReplicationError, r"may not read public\.policies"),
        (
            "ALTER TABLE policies ENABLE ROW LEVEL SECURITY; ALTER ROLE {role} NOBYPASSRLS",
            SupabaseError,
            "ALTER ROLE .* BYPASSRLS",
        ),
        ("REVOKE SELECT ON telematics.tombstones FROM {role}", SupabaseError, "permission denied .*tombstones"),
        ("ALTER TABLE policies DROP CONSTRAINT policies_pkey", ReplicationError, "has no primary key"),
        ("ALTER TABLE policies RENAME TO renamed", ReplicationError, r"There is no table public\.policies"),
        ("DROP TABLE telematics.tombstones CASCADE", ReplicationError, r"There is no table telematics\.tombstones"),
    ],
)
def test_what_a_batch_rests_on_is_looked_at_by_each(
    mirror: Mirror, statement: str, error: type[Exception], says: str
) -> None:
    trigger = "SELECT tgname FROM pg_trigger WHERE tgrelid = 'policies'::regclass AND tgtype::int4 & 23 = 23"
    with mirror.database.connect() as owner:
        (name,) = next(iter(owner.execute(trigger)))
    mirror.database.run(statement.format(role=mirror.database.role).replace("telematics_row_xid", name))
    with pytest.raises(error, match=says):
        mirror.replicate()


def test_a_column_that_comes_between_two_batches_comes_with_its_values(mirror: Mirror) -> None:
    mirror.database.run("ALTER TABLE policies ADD COLUMN state text DEFAULT 'active'")
    report = mirror.replicate()
    assert [change.column for change in report.schema_changes] == ["state"]
    assert set(mirror.bronze().to_pyarrow_table(columns=["state"])["state"].to_pylist()) == {"active"}
    assert mirror.replicate().batches == 0


def test_another_key_is_the_one_that_counts_from_then_on(mirror: Mirror) -> None:
    mirror.database.run(
        "ALTER TABLE policies DROP CONSTRAINT policies_pkey, ADD PRIMARY KEY (id, name)",
        "UPDATE policies SET name = 'other' WHERE id = 1",
        "DELETE FROM policies WHERE id = 2",
    )
    mirror.replicate()
    names = mirror.names()
    assert (names[1], 2 in names, len(names)) == ("other", False, 99)


def test_another_identity_means_a_new_snapshot(mirror: Mirror) -> None:
    mirror.database.run("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC")
    report = mirror.replicate()
    assert report.snapshot in ("another server", "another source")
    assert mirror.replicate().batches == 0


def test_a_table_that_is_created_anew_is_read_anew(mirror: Mirror) -> None:
    mirror.database.run(
        "DROP TABLE policies",
        "CREATE TABLE policies (id int8 PRIMARY KEY, name text, updated_at timestamptz)",
        setup_sql([TableSetup("public", "policies", ("id",))], role=mirror.database.role),
        "INSERT INTO policies VALUES (7, 'new')",
    )
    assert mirror.replicate().snapshot == "the table was created anew"
    assert mirror.names() == {7: "new"}


def test_rows_that_somebody_else_commits_to_bronze_stop_the_next_batch(mirror: Mirror) -> None:
    mirror.bronze().delete("id = 5")
    with pytest.raises(TableMovedError, match="changed by somebody else"):
        mirror.replicate()


def test_many_commits_that_move_nothing_hide_no_position(mirror: Mirror) -> None:
    # Further back than the newest entries that are looked through; the last of them stands for all of the log.
    for number in range(6):
        mirror.bronze().alter.set_table_properties({"some.property": str(number)}, raise_if_not_exists=False)
    mirror.bronze().create_checkpoint()
    mirror.database.run("UPDATE policies SET name = 'changed' WHERE id = 1")
    report = mirror.replicate()
    assert (report.snapshot, report.updated) == (None, 1)
    assert mirror.replicate().batches == 0


def test_a_batch_that_waits_for_a_rewriting_alter_sees_its_rows(mirror: Mirror) -> None:
    """The lock comes with the transaction's first message, and takes no snapshot all the same."""
    found: list[ReplicateReport] = []
    with mirror.database.connect() as owner, owner.transaction():
        owner.execute("UPDATE policies SET name = 'rewritten'")
        owner.execute("ALTER TABLE policies ALTER COLUMN id TYPE numeric(12)")
        owner.execute("ALTER TABLE policies ALTER COLUMN id TYPE int8")
        waiting = Thread(target=lambda: found.append(mirror.replicate()))
        waiting.start()
        _wait_for_the_lock(mirror.database)
    waiting.join(60)
    assert [(report.updated, report.deleted) for report in found] == [(100, 0)]
    assert set(mirror.names().values()) == {"rewritten"}


def _wait_for_the_lock(database: Database) -> None:
    with database.connect() as owner:
        for _ in range(2000):
            waiting = "SELECT count(*), pg_sleep(0.005)::text FROM pg_locks WHERE NOT granted AND relation IS NOT NULL"
            if next(iter(owner.execute(waiting)))[0]:
                return
    raise AssertionError("nobody waits")


def test_a_beginning_that_is_refused_leaves_a_connection_that_goes_on(policies: Database) -> None:
    with connected(policies.supabase) as connection:
        with (
            pytest.raises(BeginningRefusedError, match="does not exist"),
            connection.transaction(locking("public.nowhere", tombstones=False)),
        ):
            pass
        with connection.transaction(locking("public.policies", tombstones=True)) as session:
            held = session.rows(
                "SELECT c.relname::text AS name FROM pg_locks l JOIN pg_class c ON c.oid = l.relation "
                "WHERE l.pid = pg_backend_pid() AND l.mode = 'AccessShareLock' AND c.relname IN "
                "('policies', 'tombstones', 'pruned') ORDER BY 1"
            )
            assert [row["name"] for row in held] == ["policies", "pruned", "tombstones"]


def test_further_questions_are_answered_once_with_the_description(policies: Database) -> None:
    with connected(policies.supabase) as connection, connection.transaction() as session:
        source, answers = described(session, "public.policies", {"oid": "c.oid::int8", "two": "1 + 1"})
    assert answers == {"oid": source.oid, "two": 2}
    assert source.key == ("id",)


# -- how the first changed row is found ------------------------------------------------------------------------------


@pytest.mark.parametrize("analyzed", ["before the changes", "after them"])
def test_changed_rows_are_found_by_their_index_whatever_the_statistics_say(database: Database, analyzed: str) -> None:
    database.run(
        "CREATE TABLE policies (id int8 PRIMARY KEY, name text)",
        "INSERT INTO policies SELECT i, repeat('row ' || i, 5) FROM generate_series(1, 30000) i",
        setup_sql([TableSetup("public", "policies", ("id",))], role=database.role),
        "ANALYZE policies",
        "UPDATE policies SET name = 'changed' WHERE id % 10 = 0",
    )
    if analyzed == "after them":
        database.run("ANALYZE policies")
    with connected(database.supabase) as connection, connection.transaction() as session:
        source, answers = described(session, "public.policies", QUESTIONS)
        cut = taken(answers)
        rows = Rows(TABLE, source, cut, is_filled=answers["is_filled"])
        first = session.value("SELECT min(row_xid::text::int8) FROM public.policies")
        for start, there in ((first, True), (first + 1, False), (cut.oldest, False)):
            asked = f"SELECT {rows.any_between(start, cut.oldest)} AS there"
            assert session.value(asked) is there
            plan = "\n".join(str(row["QUERY PLAN"]) for row in session.rows(f"EXPLAIN {asked}"))
            assert re.search(r"Index Cond: \(+row_xid >=", plan), plan
            assert "Seq Scan" not in plan, plan


# -- what is brought to disk, and when -------------------------------------------------------------------------------


def test_what_was_committed_last_is_on_disk_before_the_next_commit_and_no_sooner(
    policies: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lakehouse = DeltaLakehouse(tmp_path / "tables")
    synced: set[int] = set()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    def entry(version: int) -> int:
        table = lakehouse.open(NAME)
        assert table is not None
        return os.stat(entry_path(table.uri, version)).st_ino

    replicate(lakehouse, policies.supabase, TABLE)
    policies.run("UPDATE policies SET name = 'changed' WHERE id = 1")
    with pytest.raises(Killed):
        replicate(lakehouse, policies.supabase, TABLE, stop_at("committed", 1, kill))
    table = lakehouse.open(NAME)
    assert table is not None
    killed = table.version
    monkeypatch.setattr("telematics_assets.lakehouse.delta.os.fsync", fsync)

    assert replicate(lakehouse, policies.supabase, TABLE).batches == 0
    assert not synced, "nothing stands behind it that could be there without it"

    policies.run("UPDATE policies SET name = 'again' WHERE id = 1")
    there: list[bool] = []
    replicate(
        lakehouse, policies.supabase, TABLE, stop_at("committed", 1, lambda: there.append(entry(killed) in synced))
    )
    assert there == [True]
    assert entry(killed + 1) in synced
