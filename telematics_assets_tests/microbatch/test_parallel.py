"""Several connections read a table as one would: one moment of it, every row once, and none of them is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from telematics_assets.catalog import ReplicatedTable
from telematics_assets.errors import ReplicationError, SupabaseUnavailableError
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.microbatch import lengths, parallel, snapshot
from telematics_assets.microbatch.parallel import read_together
from telematics_assets.microbatch.session import Session, transaction
from telematics_assets.microbatch.snapshot import Heap, heap_of, next_piece
from telematics_assets.microbatch.source import describe
from telematics_assets.testing import LocalPostgres, TransactionPooler
from telematics_assets_tests.databases import Connection, Database
from telematics_assets_tests.exactly_once.test_kills import Killed, kill, stop_at
from telematics_assets_tests.microbatch.leftovers import session_seen
from telematics_assets_tests.microbatch.replicate_process import replicate, table_of
from telematics_assets_tests.microbatch.test_kills import assert_mirrored, change

ROWS = 2_000
LOCK = "LOCK TABLE public.notes IN ACCESS SHARE MODE NOWAIT"
PATIENCE = 60.0

Read = Callable[[Session, str], Generator[pa.RecordBatch, None, None]]


@pytest.fixture
def notes(database: Database, monkeypatch: pytest.MonkeyPatch) -> Database:
    """A table of some dozen blocks, which counts as large, and three connections for it."""
    monkeypatch.setattr(snapshot, "LEAST_BYTES", 1)
    database.run(
        "CREATE TABLE public.notes (id int8 PRIMARY KEY, body text)",
        f"INSERT INTO public.notes SELECT g, repeat('x', 200) FROM generate_series(1, {ROWS}) g",
    )
    return replace(database, supabase=replace(database.supabase, connections=3))


def parts_of(session: Session) -> tuple[str, ...]:
    heap = heap_of(session, describe(session, "public.notes"))
    assert heap is not None
    return heap.parts()


def rows_of(session: Session, part: str) -> Generator[pa.RecordBatch, None, None]:
    with session.stream(f"SELECT id, body FROM public.notes WHERE {part}") as reader:
        yield from reader


def read_all(session: Session, read: Read = rows_of) -> list[int]:
    """All keys, in order."""
    batches = read_together(session, parts_of(session), read, lock=LOCK)
    return sorted(key for batch in batches for key in batch.column("id").to_pylist())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def open_transactions(admin: Connection) -> int:
    found = admin.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND backend_type = 'client backend' AND state <> 'idle'"
    ).fetchone()
    assert found is not None
    return int(found[0])


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("reader", "one-ahead"))]


@pytest.fixture(autouse=True)
def nobody_is_left(admin: Connection) -> Iterator[None]:
    """Whatever happened: threads end, and so do transactions."""
    yield
    until(lambda: not readers() and not open_transactions(admin))


# -- which parts there are ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 15, 16, 17, 33, 1000])
def test_ranges_of_blocks_follow_each_other_without_a_gap_and_are_open_at_both_ends(
    monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    monkeypatch.setattr(snapshot, "LEAST_BYTES", 1)
    parts = Heap(blocks, 8192).parts()
    if blocks == 1:
        assert parts == ("",)
        return
    bounds = [part.split(" AND ") for part in parts]
    assert [len(each) for each in bounds] == [1, *[2] * (len(parts) - 2), 1]
    assert [each[-1].replace("<", ">=") for each in bounds[:-1]] == [each[0] for each in bounds[1:]]
    assert len(parts) <= 32


def test_only_a_large_plain_table_is_read_in_parts(database: Database) -> None:
    database.run(
        "CREATE TABLE public.notes (id int8 PRIMARY KEY)",
        "INSERT INTO public.notes VALUES (1)",
        "CREATE TABLE public.parted (id int8 PRIMARY KEY) PARTITION BY RANGE (id)",
        "CREATE VIEW public.seen AS SELECT * FROM public.notes",
    )
    with transaction(database.supabase) as session:
        assert parts_of(session) == ()
        assert heap_of(session, describe(session, "public.parted")) is None
        assert heap_of(session, describe(session, "public.seen")) is None
    database.run("REVOKE EXECUTE ON FUNCTION pg_export_snapshot() FROM PUBLIC")
    with transaction(database.supabase) as session:
        assert heap_of(session, describe(session, "public.notes")) is None


def test_parts_of_a_range_of_keys_are_that_range(notes: Database) -> None:
    notes.run(
        "CREATE TABLE public.legs (trip text, leg int4, PRIMARY KEY (trip, leg))",
        "INSERT INTO public.legs SELECT 'trip ''' || g % 50, g FROM generate_series(1, 500) g",
    )
    with transaction(notes.supabase) as session:
        table = describe(session, "public.legs")
        start, seen, divided = None, [], 0
        while True:
            piece = next_piece(session, table, table.key, start, 200, heap_of(session, table))
            divided += len(piece.parts) > 1
            for condition in piece.parts or (piece.where,):
                seen += session.rows(f"SELECT trip, leg FROM public.legs WHERE {condition}")
            if piece.end is None:
                break
            whole = session.value(f"SELECT count(*) FROM public.legs WHERE {piece.where}")
            assert whole == 200
            start = piece.end
    assert divided == 3
    assert sorted((row["trip"], row["leg"]) for row in seen) == sorted((f"trip '{g % 50}", g) for g in range(1, 501))


# -- one moment, every row once ----------------------------------------------------------------------------------------


def test_all_connections_read_the_same_moment_while_the_table_changes(notes: Database, admin: Connection) -> None:
    together, processes, bodies = threading.Barrier(3), set(), set()

    def read(session: Session, part: str) -> Generator[pa.RecordBatch, None, None]:
        process = session.value("SELECT pg_backend_pid()")
        if process not in processes:
            processes.add(process)
            # All three are here, and none has read: what is written now, nobody may see.
            if together.wait(PATIENCE) == 0:
                admin.execute("UPDATE public.notes SET body = 'late', id = -id WHERE id % 3 = 0")
                admin.execute("DELETE FROM public.notes WHERE id % 3 = 1")
                admin.execute("INSERT INTO public.notes SELECT g, 'late' FROM generate_series(10001, 12000) g")
                admin.execute("VACUUM public.notes")
            together.wait(PATIENCE)
        for batch in rows_of(session, part):
            bodies.update(batch.column("body").unique().to_pylist())
            yield batch

    with transaction(notes.supabase) as session:
        assert read_all(session, read) == list(range(1, ROWS + 1))
        assert session.value("SELECT count(*) FROM public.notes") == ROWS
    assert len(processes) == 3
    assert bodies == {"x" * 200}


def test_helpers_leave_nothing_to_the_next_client(notes: Database, postgres: LocalPostgres) -> None:
    with TransactionPooler(lambda: postgres.port, size=3) as pooler:
        supabase = replace(notes.supabase, port=pooler.port)
        # All three server connections are in use: those that are looked at later have been lent to readers.
        with transaction(supabase), transaction(supabase):
            clean, logins = session_seen(supabase), pooler.logins
        for _ in range(3):
            with transaction(supabase) as session:
                assert len(read_all(session)) == ROWS
        assert pooler.logins > logins + 3
        with transaction(supabase), transaction(supabase):
            assert session_seen(supabase) == clean


# -- helpers that do not come, or do not stay --------------------------------------------------------------------------


def test_helpers_that_are_refused_are_not_missed(notes: Database) -> None:
    with transaction(notes.supabase) as session:
        logins = notes.pooler.logins
        notes.pooler.refusal = ("XX000", "(EMAXCONN) max client connections reached")
        assert read_all(session) == list(range(1, ROWS + 1))
        assert notes.pooler.logins == logins + 2


def test_where_the_pooler_has_no_connection_to_spare_nobody_waits_for_one(
    notes: Database, postgres: LocalPostgres
) -> None:
    with TransactionPooler(lambda: postgres.port, size=1, checkout_seconds=600) as pooler:
        began = time.monotonic()
        with transaction(replace(notes.supabase, port=pooler.port)) as session:
            assert read_all(session) == list(range(1, ROWS + 1))
        assert time.monotonic() - began < PATIENCE


def test_an_alter_that_waits_for_the_batch_does_not_stop_it(notes: Database, admin: Connection) -> None:
    def waits() -> bool:
        with notes.connect() as other:
            found = other.execute("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'").fetchone()
        return found == (1,)

    altering = threading.Thread(target=lambda: admin.execute("ALTER TABLE public.notes ADD COLUMN more text"))
    with transaction(notes.supabase) as session:
        session.run("LOCK TABLE public.notes IN ACCESS SHARE MODE")
        parts = parts_of(session)
        altering.start()
        until(waits)
        began = time.monotonic()
        batches = read_together(session, parts, rows_of, lock=LOCK)
        assert sum(batch.num_rows for batch in batches) == ROWS
        assert time.monotonic() - began < 10, "less than anybody waits for a lock"
    altering.join()


def test_a_part_that_a_helper_lost_before_any_row_was_passed_on_is_read_by_the_other(
    notes: Database, admin: Connection
) -> None:
    lost: list[str] = []
    with transaction(notes.supabase) as session:

        def read(reading: Session, part: str) -> Generator[pa.RecordBatch, None, None]:
            if reading is not session:
                lost.append(part)
                admin.execute(f"SELECT pg_terminate_backend({reading.value('SELECT pg_backend_pid()')})")
            elif len(lost) < 2:
                until(lambda: len(lost) == 2)
            yield from rows_of(reading, part)

        assert read_all(session, read) == list(range(1, ROWS + 1))
    assert len(lost) == 2


def test_a_helper_that_is_lost_in_the_middle_of_a_part_fails_the_batch_for_this_time(
    notes: Database, admin: Connection
) -> None:
    with transaction(notes.supabase) as session:
        helped = threading.Event()

        def read(reading: Session, part: str) -> Generator[pa.RecordBatch, None, None]:
            if reading is session:
                assert helped.wait(PATIENCE)
                yield from rows_of(reading, part)
                return
            process = reading.value("SELECT pg_backend_pid()")
            yield from rows_of(reading, part)
            helped.set()
            admin.execute(f"SELECT pg_terminate_backend({process})")
            reading.value("SELECT 1")

        with pytest.raises(SupabaseUnavailableError):
            read_all(session, read)


def test_what_else_fails_in_any_of_them_fails_the_batch(notes: Database) -> None:
    def read(session: Session, part: str) -> Generator[pa.RecordBatch, None, None]:
        yield from rows_of(session, part)
        raise ReplicationError("not what was planned for")

    with transaction(notes.supabase) as session, pytest.raises(ReplicationError, match="not what was planned for"):
        read_all(session, read)


# -- stopping early ----------------------------------------------------------------------------------------------------


def endless(session: Session, part: str) -> Generator[pa.RecordBatch, None, None]:
    with session.stream("SELECT generate_series(1, 1000000000)::int8 AS id") as reader:
        yield from reader


def silent(session: Session, part: str) -> Generator[pa.RecordBatch, None, None]:
    yield from rows_of(session, part)
    session.value("SELECT pg_sleep(600)::text")


@pytest.mark.parametrize("read", [endless, silent])
def test_who_stops_early_ends_all_of_them(notes: Database, admin: Connection, read: Read) -> None:
    began = time.monotonic()
    with (
        transaction(notes.supabase) as session,
        closing(read_together(session, parts_of(session), read, lock=LOCK)) as batches,
    ):
        next(batches)
    assert time.monotonic() - began < PATIENCE
    # A server that sleeps does not see that its client has gone.
    admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(600)%'")
    with transaction(notes.supabase) as session:
        assert session.value("SELECT 1") == 1


def test_an_iterator_that_nobody_closes_ends_with_its_transaction(notes: Database, admin: Connection) -> None:
    kept: list[Iterator[pa.RecordBatch]] = []

    def interrupted() -> None:
        with transaction(notes.supabase) as session:
            kept.append(read_together(session, parts_of(session), endless, lock=LOCK))
            next(kept[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    until(lambda: not readers() and not open_transactions(admin))
    assert kept


def test_no_more_is_held_than_a_few_batches_however_many_read(notes: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "QUEUE_BYTES", 1_000)
    batch = pa.record_batch({"id": pa.array(range(100), pa.int64())})
    made: list[int] = []

    def read(session: Session, part: str) -> Generator[pa.RecordBatch, None, None]:
        for number in range(20):
            made.append(number)
            yield batch

    with transaction(notes.supabase) as session:
        parts = parts_of(session)
        with closing(read_together(session, parts, read, lock=LOCK)) as batches:
            next(batches)
            time.sleep(0.5)
            assert len(made) <= 1 + 1 + 3, "one is taken, one waits, and each of three holds one"
            assert sum(1 for _ in batches) == 20 * len(parts) - 1


# -- replications ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["reading", "extracted", "committed"])
@pytest.mark.parametrize("occurrence", [1, 2])
def test_a_snapshot_by_several_connections_that_dies_is_finished_by_the_next(
    tmp_path: Path, policies: Database, monkeypatch: pytest.MonkeyPatch, step: str, occurrence: int
) -> None:
    monkeypatch.setattr(snapshot, "LEAST_BYTES", 1)
    supabase = replace(policies.supabase, connections=3)
    lakehouse = DeltaLakehouse(tmp_path / "tables")
    with pytest.raises(Killed):
        replicate(lakehouse, supabase, table_of("row_xid"), stop_at(step, occurrence, kill))
    change(policies, 1)
    logins = policies.pooler.logins
    replicate(lakehouse, supabase, table_of("row_xid"))
    assert policies.pooler.logins > logins + 1, "others helped"
    assert_mirrored(tmp_path, policies, "row_xid")
    change(policies, 2)
    replicate(lakehouse, supabase, table_of("row_xid"), full=True)
    assert_mirrored(tmp_path, policies, "row_xid")


@pytest.mark.parametrize("longest", [5_000, 50_000])
def test_long_rows_are_read_by_one_connection(
    tmp_path: Path, notes: Database, monkeypatch: pytest.MonkeyPatch, longest: int
) -> None:
    monkeypatch.setattr(lengths, "SHORT_ROW_BYTES", longest)
    notes.run(
        "DELETE FROM public.notes WHERE id > 120",
        "UPDATE public.notes SET body = (SELECT string_agg(md5(g::text), '') FROM generate_series(1, 500) g)",
    )
    logins = notes.pooler.logins
    table = ReplicatedTable("public.notes", "snapshot")
    assert replicate(DeltaLakehouse(tmp_path), notes.supabase, table).inserted == 120
    assert (notes.pooler.logins > logins + 4) == (longest == 50_000)
