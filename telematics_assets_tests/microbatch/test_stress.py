"""Overlapping, dawdling, wavering writers and a reader in a loop: what each mode keeps, and what it says that it loses.

The books are kept by `business.py`, which shares nothing with the replicator.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from telematics_assets.catalog import ReplicatedTable
from telematics_assets.engines.base import ReplicateReport, ReplicateRequest
from telematics_assets.engines.embedded import open_engine
from telematics_assets.errors import CommitConflictError, SupabaseUnavailableError
from telematics_assets.microbatch.connection import Supabase
from telematics_assets.microbatch.session import transaction
from telematics_assets.microbatch.sql import TableSetup, setup_sql
from telematics_assets.settings import Settings
from telematics_assets.testing.pooler import TransactionPooler
from telematics_assets.testing.postgres import LocalPostgres
from telematics_assets_tests.databases import Connection, Database, through
from telematics_assets_tests.microbatch.business import TABLE, Books, Business, books, replayed

#: How long the writers write without `--soak`, seconds.
SECONDS = 4.0
#: And with it.
SOAK_SECONDS = 40.0
#: Nothing here takes longer, however slow and busy the machine is.
LIMIT_SECONDS = 240.0
LAG_SECONDS = 0.4
#: Rows that are there before anybody writes; their keys are negative.
SEEDS = 60

ROW_XID = ReplicatedTable("public.items", "row_xid", "by_row_xid")
XMIN = ReplicatedTable("public.items", "xmin", "by_xmin")
UPDATED_AT = ReplicatedTable("public.items", "updated_at", "by_updated_at", lag_seconds=LAG_SECONDS)
SNAPSHOT = ReplicatedTable("public.items", "snapshot", "by_snapshot")


@dataclass
class Mirror:
    """The bronze side: one home, filled through the pooler."""

    home: Path
    supabase: Supabase

    def __post_init__(self) -> None:
        self.engine = open_engine(Settings(home=self.home, supabase=self.supabase))

    def replicate(self, table: ReplicatedTable, *, sweep: bool = False) -> ReplicateReport:
        return self.engine.replicate(table, ReplicateRequest(sweep=sweep))

    def folder(self, table: ReplicatedTable) -> Path:
        return self.home / "tables" / "workspace" / "01_bronze" / table.target


@pytest.fixture
def mirror(tmp_path: Path, database: Database) -> Mirror:
    prepare(database.connect, database.role)
    return Mirror(tmp_path, database.supabase)


def prepare(connect: Callable[[], Connection], role: str) -> None:
    with connect() as connection:
        connection.execute(TABLE)
        connection.execute(setup_sql([TableSetup("public", "items", ("id",))], role=role))
        seeds = "INSERT INTO public.items SELECT -n, -n, 'seed', now() FROM generate_series(1, %s) n"
        connection.execute(seeds, [SEEDS])


def settled(mirror: Mirror, table: ReplicatedTable, connection: Connection) -> Books:
    """The books after the last batch, when nobody writes any more."""
    mirror.replicate(table)
    return books(connection, mirror.folder(table))


def test_each_mode_keeps_what_it_promises_under_writers_of_every_kind(
    database: Database, admin: Connection, mirror: Mirror, soak_factor: int
) -> None:
    for table in (XMIN, UPDATED_AT):
        # Whoever of the seeds is deleted later had been replicated.
        mirror.replicate(table)
    business = Business(database.connect)
    written = business.written
    rounds, batches = [0, 0], [0, 0]
    enough = threading.Event()
    ends = time.monotonic() + (SECONDS if soak_factor == 1 else SOAK_SECONDS)

    def stressed() -> bool:
        (left,) = admin.execute("SELECT count(*) FROM public.items WHERE id < 0").fetchone() or (SEEDS,)
        return min(written.commits, written.undone, SEEDS - left, sum(batches)) > 5 and min(rounds) >= 3

    def loop(number: int, *tables: ReplicatedTable) -> None:
        # A reader of its own: two of them race for the same table.
        reader = Mirror(mirror.home, mirror.supabase)
        while not enough.is_set():
            for table in tables:
                with suppress(CommitConflictError):
                    batches[number] += reader.replicate(table).batches
            rounds[number] += 1

    with business.running(), ThreadPoolExecutor() as readers:
        loops = [readers.submit(loop, 0, ROW_XID), readers.submit(loop, 1, ROW_XID, XMIN, UPDATED_AT, SNAPSHOT)]
        try:
            # A busy machine is given more time.
            while not any(each.done() for each in loops) and (time.monotonic() < ends or not stressed()):
                assert time.monotonic() < ends + LIMIT_SECONDS, "nothing was stressed"
                time.sleep(0.05)
        finally:
            enough.set()
        for each in loops:
            each.result()
    time.sleep(2 * LAG_SECONDS)

    kept = settled(mirror, ROW_XID, admin)
    assert kept.balanced, kept
    whole = settled(mirror, SNAPSHOT, admin)
    assert whole.balanced, whole

    # Deletes are the documented gap of the modes that find them by a sweep, and there were some.
    scanned = settled(mirror, XMIN, admin)
    assert (scanned.missing, scanned.stale, scanned.doubled) == (frozenset(), frozenset(), 0)
    assert scanned.undeleted <= written.gone
    mirror.replicate(XMIN, sweep=True)
    assert books(admin, mirror.folder(XMIN)).balanced

    timed = settled(mirror, UPDATED_AT, admin)
    late = {key for key, value in timed.values.items() if written.durations.get(value, 0) > LAG_SECONDS}
    assert timed.missing | timed.stale <= late
    assert timed.undeleted <= written.gone
    assert timed.doubled == 0
    assert scanned.undeleted, "nothing that was replicated was deleted"
    assert timed.undeleted
    for table in (ROW_XID, XMIN, UPDATED_AT, SNAPSHOT):
        replayed(mirror.folder(table), ("id", "value", "note"))


def test_a_commit_within_the_lag_is_seen_and_a_later_one_is_the_documented_gap(
    database: Database, admin: Connection, mirror: Mirror
) -> None:
    for table in (ROW_XID, XMIN, UPDATED_AT):
        mirror.replicate(table)
    lost: dict[str, frozenset[int]] = {}
    with database.connect() as writer:
        for key, dawdles in ((1, 0.0), (2, 3 * LAG_SECONDS)):
            writer.execute("BEGIN")
            writer.execute("INSERT INTO public.items VALUES (%s, 0, '', now())", [key])
            ends, began = time.monotonic() + dawdles, 0.0
            # The last batches begin when the lag is over, however long the others took.
            while dawdles and began < ends:
                began = time.monotonic()
                admin.execute("UPDATE public.items SET value = value + 1, updated_at = now() WHERE id = -1")
                for table in (ROW_XID, XMIN, UPDATED_AT):
                    mirror.replicate(table)
            writer.execute("COMMIT")
    admin.execute("DELETE FROM public.items WHERE id = -2")
    time.sleep(2 * LAG_SECONDS)
    for table in (ROW_XID, XMIN, UPDATED_AT):
        found = settled(mirror, table, admin)
        lost[table.mode] = found.missing
        assert found.stale == frozenset()
        assert found.undeleted == (frozenset() if table is ROW_XID else {-2})

    assert lost == {"row_xid": frozenset(), "xmin": frozenset(), "updated_at": {2}}


@dataclass
class House:
    """A server, a pooler and a mirror that a test may break."""

    server: LocalPostgres
    pooler: TransactionPooler
    mirror: Mirror

    def connect(self) -> Connection:
        return psycopg.connect(self.server.url(), autocommit=True, connect_timeout=60)


@pytest.fixture(scope="module")
def breakable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalPostgres, TransactionPooler]]:
    """A server and a pooler that nobody else uses."""
    folder, settings = tmp_path_factory.mktemp("server"), ["max_prepared_transactions=16"]
    # It keeps its port: one that comes back is found where it was.
    with LocalPostgres(folder, settings=settings) as first:
        port = first.port
    server = LocalPostgres(folder, settings=settings, port=port)
    with server, TransactionPooler(lambda: port, size=3, checkout_seconds=0.3) as pooler:
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute("CREATE ROLE reader LOGIN PASSWORD 'secret'")
        yield server, pooler


@pytest.fixture
def house(tmp_path: Path, breakable: tuple[LocalPostgres, TransactionPooler]) -> Iterator[House]:
    server, pooler = breakable
    house = House(server, pooler, Mirror(tmp_path, through(pooler, "reader", "secret", "postgres")))
    prepare(house.connect, "reader")
    yield house
    with house.connect() as connection:
        connection.execute("DROP TABLE public.items")


@contextmanager
def nothing_lost(house: House) -> Iterator[None]:
    """Whatever is done to the house: once it is whole again, one more batch makes bronze what the source is."""
    yield
    house.pooler.cut_after = None
    with house.connect() as connection:
        found = settled(house.mirror, ROW_XID, connection)
        assert found.balanced, found
        assert found.rows > 0


def kill_the_server(house: House) -> None:
    house.server.stop(kill=True)
    house.server.start()


def stop_the_server(house: House) -> None:
    house.server.stop()
    house.server.start()


def restart_the_pooler(house: House) -> None:
    house.pooler.restart()


def end_all_sessions_of_the_reader(house: House) -> None:
    with house.connect() as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'reader'")


def cancel_what_the_reader_asks(house: House) -> None:
    """What a statement's time-out does, at whatever it asks just then."""
    with house.connect() as connection:
        connection.execute("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE usename = 'reader'")


FAULTS = (
    kill_the_server,
    stop_the_server,
    restart_the_pooler,
    end_all_sessions_of_the_reader,
    cancel_what_the_reader_asks,
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_no_row_is_lost_while_servers_and_connections_die(
    house: House, fault: Callable[[House], None], soak_factor: int
) -> None:
    rng = random.Random(fault.__name__)
    done = threading.Event()

    def strike() -> None:
        try:
            for _ in range(3 * soak_factor):
                time.sleep(0.1 + rng.random() * 0.4)
                with suppress(psycopg.OperationalError):
                    fault(house)
        finally:
            done.set()

    business = Business(house.connect, writers=3, slowest=0.3)
    striker = threading.Thread(target=strike)
    with nothing_lost(house), business.running():
        house.mirror.replicate(ROW_XID)
        striker.start()
        try:
            while not done.is_set():
                # Only what may go through later is allowed to go wrong.
                with suppress(SupabaseUnavailableError):
                    house.mirror.replicate(ROW_XID)
        finally:
            striker.join()


def test_a_connection_that_is_cut_amid_the_rows_loses_none(house: House) -> None:
    with nothing_lost(house), house.connect() as connection:
        connection.execute(
            "INSERT INTO public.items SELECT n, n, repeat('x', 200), now() FROM generate_series(1, 3000) n"
        )
        for after in (100_000, 200_000, 400_000):
            connection.execute("UPDATE public.items SET value = value + 1")
            house.pooler.cut_after = after
            with pytest.raises(SupabaseUnavailableError):
                house.mirror.replicate(ROW_XID)


def test_a_pool_that_others_exhaust_is_waited_for(house: House) -> None:
    house.mirror.replicate(ROW_XID)
    url = house.pooler.url("reader", "secret")
    with nothing_lost(house), house.connect() as connection:
        connection.execute("DELETE FROM public.items WHERE id < -50")
        others = [psycopg.connect(url, prepare_threshold=None) for _ in range(3)]
        for other in others:
            other.execute("SELECT 1")
        with (
            pytest.raises(SupabaseUnavailableError, match="pool"),
            transaction(house.mirror.supabase, pauses=(0.1,)),
        ):
            pass
        tried = house.pooler.logins

        def free() -> None:
            # It has been sent away once, and tries again.
            deadline = time.monotonic() + LIMIT_SECONDS
            while house.pooler.logins < tried + 2 and time.monotonic() < deadline:
                time.sleep(0.02)
            others[0].close()

        freed = threading.Thread(target=free)
        freed.start()
        assert house.mirror.replicate(ROW_XID).deleted == 10
        freed.join()
        for other in others:
            other.close()
