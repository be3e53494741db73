"""What only the embedded engine's own table and a server of one's own can show: foreign hands, restarts, standbys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from telematics_assets.catalog import Names, ReplicatedTable, ReplicationMode
from telematics_assets.errors import ReplicaLagsError, TableMovedError, TableNotOursError, TableUnsupportedError
from telematics_assets.lakehouse.base import Table
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.microbatch.cut import Cut, Rows
from telematics_assets.microbatch.position import Standing, at, newest_note, standing
from telematics_assets.microbatch.session import transaction
from telematics_assets.microbatch.source import describe
from telematics_assets.microbatch.sql import TableSetup, setup_sql
from telematics_assets.testing.pooler import TransactionPooler
from telematics_assets.testing.postgres import LocalPostgres
from telematics_assets_tests.databases import Database, through
from telematics_assets_tests.exactly_once.test_kills import Killed, kill, stop_at
from telematics_assets_tests.microbatch.replicate_process import PIECE_ROWS, replicate

TABLE = ReplicatedTable("public.policies")
XMIN = ReplicatedTable("public.policies", "xmin")


@pytest.fixture
def lakehouse(tmp_path: Path) -> DeltaLakehouse:
    return DeltaLakehouse(tmp_path / "tables")


@pytest.fixture
def policies(database: Database) -> Database:
    """A table of a hundred rows."""
    prepare(database)
    return database


def prepare(database: Database) -> None:
    database.run("CREATE TABLE policies (id int8 PRIMARY KEY, name text)")
    database.run(setup_sql([TableSetup("public", "policies", ("id",))], role=database.role))
    database.run("INSERT INTO policies SELECT i, repeat('row ' || i, 10) FROM generate_series(1, 100) i")


def bronze(lakehouse: DeltaLakehouse, table: ReplicatedTable = TABLE) -> Table:
    opened = lakehouse.open(Names().bronze(table.target))
    assert opened is not None
    return opened


def by_hand(lakehouse: DeltaLakehouse) -> DeltaTable:
    """The bronze table as somebody else opens it."""
    return DeltaTable(bronze(lakehouse).uri)


def stands(lakehouse: DeltaLakehouse, table: ReplicatedTable = TABLE) -> Standing:
    opened = bronze(lakehouse, table)
    note = newest_note(opened)
    assert note is not None
    found = standing(opened, str(note["identity"]))
    assert found is not None
    return found


def let_stand(lakehouse: DeltaLakehouse, table: ReplicatedTable, **parts: int) -> None:
    """Move the position by a commit as replication makes them."""
    opened = bronze(lakehouse, table)
    moved = at(replace(stands(lakehouse, table), **parts), opened)  # type: ignore[arg-type]
    rest = moved.transactions()
    opened.append(opened.schema, (), moved.app_id, rest.pop(moved.app_id), {}, rest)


def test_a_first_snapshot_that_was_killed_goes_on_behind_its_last_piece(
    lakehouse: DeltaLakehouse, policies: Database
) -> None:
    with pytest.raises(Killed):
        replicate(lakehouse, policies.supabase, TABLE, stop_at("committed", 2, kill))
    first = stands(lakehouse)
    assert (bronze(lakehouse).count(), first.complete) == (2 * PIECE_ROWS, 0)
    policies.run("UPDATE policies SET name = 'changed' WHERE id = 1", "DELETE FROM policies WHERE id = 2")
    report = replicate(lakehouse, policies.supabase, TABLE)
    assert (report.snapshot, report.inserted, report.updated, report.deleted) == ("first", 20, 1, 1)
    assert bronze(lakehouse).count() == 99
    assert stands(lakehouse).position > first.position


def test_ranges_of_a_key_with_an_order_of_its_own_leave_nothing_out(
    lakehouse: DeltaLakehouse, database: Database
) -> None:
    database.run(
        "CREATE EXTENSION citext",
        "CREATE TABLE policies (id citext PRIMARY KEY)",
        "INSERT INTO policies SELECT CASE i % 2 WHEN 0 THEN 'a' ELSE 'B' END || i FROM generate_series(1, 100) i",
    )
    assert replicate(lakehouse, database.supabase, XMIN).inserted == 100
    assert bronze(lakehouse).count() == 100


def test_rows_that_were_restored_overwritten_or_deleted_by_hand_stop_it_until_a_full_replication(
    lakehouse: DeltaLakehouse, policies: Database
) -> None:
    replicate(lakehouse, policies.supabase, TABLE)
    policies.run("DELETE FROM policies WHERE id = 1")
    replicate(lakehouse, policies.supabase, TABLE)
    for hand in ("restore", "delete"):
        if hand == "restore":
            by_hand(lakehouse).restore(1)
        else:
            by_hand(lakehouse).delete("id > 50")
        with pytest.raises(TableMovedError, match=r"changed by somebody else.*--full"):
            replicate(lakehouse, policies.supabase, TABLE)
        assert replicate(lakehouse, policies.supabase, TABLE, full=True).snapshot == "asked for"
        assert bronze(lakehouse).count() == 99
        assert replicate(lakehouse, policies.supabase, TABLE).batches == 0


def compact(lakehouse: DeltaLakehouse) -> None:
    """Write the data files together, as somebody else does."""
    by_hand(lakehouse).optimize.compact()


def test_compaction_beside_it_is_no_other_replication(lakehouse: DeltaLakehouse, policies: Database) -> None:
    replicate(lakehouse, policies.supabase, TABLE)
    policies.run("UPDATE policies SET name = 'changed' WHERE id = 1")
    compacted = stop_at("extracted", 1, lambda: compact(lakehouse))
    report = replicate(lakehouse, policies.supabase, TABLE, compacted)
    assert (report.yielded, report.updated) == (False, 1)
    assert replicate(lakehouse, policies.supabase, TABLE).batches == 0


def test_a_table_that_is_not_ours_is_left_alone(lakehouse: DeltaLakehouse, policies: Database) -> None:
    name = Names().bronze(TABLE.target)
    lakehouse.create(name, pa.schema([("id", pa.int64())]), "somebody's", {})
    with pytest.raises(TableNotOursError, match=r"holds rows of somebody else.*Move or drop it"):
        replicate(lakehouse, policies.supabase, TABLE)
    with pytest.raises(TableNotOursError):
        replicate(lakehouse, policies.supabase, TABLE, full=True)


def test_a_table_that_forgets_positions_is_refused(lakehouse: DeltaLakehouse, policies: Database) -> None:
    replicate(lakehouse, policies.supabase, TABLE)
    bronze(lakehouse).set_property("delta.setTransactionRetentionDuration", "interval 1 day")
    with pytest.raises(TableUnsupportedError, match="setTransactionRetentionDuration"):
        replicate(lakehouse, policies.supabase, TABLE)


@pytest.mark.parametrize("mode", ["row_xid", "xmin", "snapshot"])
def test_a_server_that_is_behind_the_position_is_refused_as_a_standby(
    lakehouse: DeltaLakehouse, policies: Database, mode: ReplicationMode
) -> None:
    table = ReplicatedTable("public.policies", mode)
    replicate(lakehouse, policies.supabase, table)
    let_stand(lakehouse, table, position=stands(lakehouse, table).position + 1_000_000)
    with pytest.raises(ReplicaLagsError, match=r"Connect to the primary"):
        replicate(lakehouse, policies.supabase, table)


def test_more_transactions_than_xmin_can_tell_take_a_new_snapshot(
    lakehouse: DeltaLakehouse, policies: Database
) -> None:
    replicate(lakehouse, policies.supabase, XMIN)
    let_stand(lakehouse, XMIN, start=-(2**31))
    report = replicate(lakehouse, policies.supabase, XMIN)
    assert report.snapshot == "more than 2^31 transactions since the last batch"
    assert replicate(lakehouse, policies.supabase, XMIN).batches == 0


def test_xmin_is_widened_to_the_epoch_in_which_the_row_was_written(policies: Database) -> None:
    with transaction(policies.supabase) as session:
        source = describe(session, "public.policies")
        own = session.value("SELECT min(xmin::text::int8) FROM public.policies")
        for following, expected in (
            (own + 1, own),
            ((3 << 32) + own + 1, (3 << 32) + own),
            # The id would lie in the future, so it is of the epoch before.
            ((3 << 32) + own, (2 << 32) + own),
            ((3 << 32) + 5, (2 << 32) + own),
        ):
            cut = Cut(following, following, 0, 0, 0, is_replica=False)
            writer = Rows(XMIN, source, cut, is_filled=False).writer
            assert session.value(f"SELECT min({writer}) FROM public.policies") == expected


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalPostgres]:
    """A server that a test may stop."""
    with LocalPostgres(tmp_path / "postgres") as server:
        yield server


@pytest.mark.parametrize("mode", ["row_xid", "xmin"])
@pytest.mark.parametrize("crash", [False, True])
def test_after_a_restart_of_the_server_the_last_range_is_read_again(
    lakehouse: DeltaLakehouse, server: LocalPostgres, mode: ReplicationMode, crash: bool
) -> None:
    with psycopg.connect(server.url(), autocommit=True) as owner:
        owner.execute("CREATE ROLE reader LOGIN PASSWORD 'for this test'")
        owner.execute("GRANT USAGE ON SCHEMA public TO reader")
        owner.execute("ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO reader")
    with TransactionPooler(lambda: server.port) as pooler:
        supabase = through(pooler, "reader", "for this test", "postgres")
        prepare(Database("postgres", supabase, "reader", "for this test", pooler, server))
        table = ReplicatedTable("public.policies", mode)
        replicate(lakehouse, supabase, table)
        with psycopg.connect(server.url(), autocommit=True) as owner:
            owner.execute("UPDATE policies SET name = 'in the last range' WHERE id = 1")
        replicate(lakehouse, supabase, table)
        # As if the server had lost that commit, and made another one by the same number.
        with psycopg.connect(server.url(), autocommit=True) as owner:
            owner.execute("CHECKPOINT")
        server.stop(kill=crash)
        server.start()
        pooler.restart()
        opened = bronze(lakehouse, table)
        before = stands(lakehouse, table)
        assert before.start < before.position
        report = replicate(lakehouse, supabase, table)
        # The range holds one row, which is as it was.
        assert (report.snapshot, report.batches, report.updated) == (None, 1, 0)
        assert bronze(lakehouse, table).version == opened.version + 1
        assert replicate(lakehouse, supabase, table).batches == 0
