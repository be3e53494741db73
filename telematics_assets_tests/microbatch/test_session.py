"""One transaction in the database, through a pooler: one snapshot, read only, and nothing left to the next client."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path

import psycopg
import pyarrow as pa
import pytest

from telematics_assets.errors import SupabaseError, SupabaseUnavailableError, TelematicsError
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.microbatch.connection import Supabase
from telematics_assets.microbatch.session import Session, connected, transaction
from telematics_assets.testing import LocalPostgres, TransactionPooler
from telematics_assets_tests.databases import Connection, Database
from telematics_assets_tests.microbatch.leftovers import backend, session_seen
from telematics_assets_tests.microbatch.replicate_process import replicate, table_of

_DYING = """
import ast, sys
from telematics_assets.microbatch.connection import Supabase
from telematics_assets.microbatch.session import transaction
with transaction(Supabase(**ast.literal_eval(sys.stdin.readline()))) as session:
    session.run("LOCK TABLE public.policies IN ACCESS SHARE MODE")
    session.value("SELECT pg_advisory_xact_lock(4711)::text")
    with session.stream("SELECT g, repeat('x', 1000) FROM generate_series(1, 5000000) g") as reader:
        reader.read_next_batch()
        print("reading", flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def single(database: Database, postgres: LocalPostgres) -> Iterator[Supabase]:
    """The way in through a pooler with one server connection: whoever comes next gets the same session."""
    database.run("CREATE TABLE public.policies (id int8)", "INSERT INTO public.policies VALUES (1)")
    with TransactionPooler(lambda: postgres.port, size=1) as pooler:
        yield replace(database.supabase, port=pooler.port)


def test_every_answer_of_a_transaction_is_of_one_snapshot(database: Database, admin: Connection) -> None:
    database.run("CREATE TABLE public.policies (id int8 PRIMARY KEY)", "INSERT INTO public.policies VALUES (1)")

    with transaction(database.supabase) as session:
        before = session.value("SELECT count(*) FROM public.policies")
        admin.execute("INSERT INTO public.policies VALUES (2)")
        after = session.value("SELECT count(*) FROM public.policies")

    assert (before, after) == (1, 1)
    with transaction(database.supabase) as session:
        assert session.value("SELECT count(*) FROM public.policies") == 2


def test_a_lock_comes_before_the_snapshot(database: Database, admin: Connection) -> None:
    database.run("CREATE TABLE public.policies (id int8 PRIMARY KEY)")

    with transaction(database.supabase) as session:
        # Committed after the transaction began, and before its first question: it is seen.
        admin.execute("INSERT INTO public.policies VALUES (1)")
        session.run("LOCK TABLE public.policies IN ACCESS SHARE MODE")
        admin.execute("INSERT INTO public.policies VALUES (2)")
        assert session.value("SELECT count(*) FROM public.policies") == 2


def test_a_transaction_can_only_read(supabase: Supabase) -> None:
    def write() -> None:
        with transaction(supabase) as session:
            session.run("CREATE TABLE public.stray (id int8)")

    with pytest.raises(TelematicsError, match="read-only"):
        write()


def test_answers_do_not_depend_on_what_the_role_or_the_database_prefers(database: Database) -> None:
    query = (
        "SELECT ('2026-03-01 12:00+00'::timestamptz)::text || ' ' || ('1 day'::interval)::text || ' ' || 0.1::float8"
    )
    preferred = {"TimeZone": "Asia/Tokyo", "DateStyle": "German", "IntervalStyle": "sql_standard"}
    preferred |= {"extra_float_digits": "-10", "search_path": "nowhere"}
    for name, value in preferred.items():
        database.run(f"ALTER ROLE {database.role} SET {name} = '{value}'")

    with transaction(database.supabase) as session:
        assert session.value(query) == "2026-03-01 12:00:00+00 P1D 0.1"


def test_rows_of_any_number_come_in_batches(supabase: Supabase) -> None:
    query = "SELECT g AS id, repeat('ü', 500) AS body FROM generate_series(1, 50000) g"
    with transaction(supabase) as session, session.stream(query) as reader:
        assert reader.schema == pa.schema([("id", pa.int32()), ("body", pa.string())])
        sizes = [batch.num_rows for batch in reader]

    assert sum(sizes) == 50_000
    assert len(sizes) > 3


def test_an_answer_without_rows_has_its_columns(supabase: Supabase) -> None:
    with transaction(supabase) as session:
        assert session.rows("SELECT 1 AS one WHERE false") == []
        assert session.value("SELECT 1 AS one WHERE false") is None
        with session.stream("SELECT 1::int8 AS one WHERE false") as reader:
            assert reader.read_all().schema == pa.schema([("one", pa.int64())])


def test_one_connection_serves_several_transactions_and_is_lent_out_in_between(single: Supabase) -> None:
    with connected(single) as connection:
        for _ in range(3):
            with connection.transaction() as session:
                mine = session.value("SELECT pg_backend_pid()")
            assert backend(single) == mine, "somebody else has it between two transactions"


def test_a_connection_goes_on_after_an_error(single: Supabase) -> None:
    with connected(single) as connection:
        with pytest.raises(SupabaseError, match="division by zero"):
            _fail(connection.transaction)
        with connection.transaction() as session:
            assert session.value("SELECT 1") == 1


# -- what is left to the next client ---------------------------------------------------------------------------------


def test_the_next_client_would_see_what_is_left(single: Supabase) -> None:
    clean = session_seen(single)
    with psycopg.connect(single.uri(), autocommit=True) as careless:
        careless.execute("SET work_mem = '7MB'")
        careless.execute("PREPARE mine AS SELECT 1")
        careless.execute("SELECT pg_advisory_lock(1)")
        careless.execute("CREATE TEMPORARY TABLE mine (id int8)")
        careless.execute("LISTEN mine")

    left = session_seen(single)

    changed = {what for what, value in left.items() if clean[what] != value}
    assert changed == {"work_mem", "prepared statements", "advisory locks", "temporary tables", "listeners"}


def test_a_transaction_that_succeeds_leaves_nothing_to_the_next_client(single: Supabase) -> None:
    clean, process = session_seen(single), backend(single)

    with transaction(single) as session:
        session.run("LOCK TABLE public.policies IN ACCESS SHARE MODE")
        session.value("SELECT pg_advisory_xact_lock(4711)::text")
        assert session.rows("SELECT id FROM public.policies") == [{"id": 1}]
        with session.stream("SELECT id FROM public.policies") as reader:
            assert reader.read_all().num_rows == 1

    assert backend(single) == process, "it is the very session that the transaction had"
    assert session_seen(single) == clean


def test_a_transaction_that_is_not_read_to_its_end_leaves_nothing(single: Supabase) -> None:
    clean = session_seen(single)

    with transaction(single) as session, session.stream("SELECT g FROM generate_series(1, 100000) g") as reader:
        reader.read_next_batch()

    assert session_seen(single) == clean


def test_a_transaction_that_fails_in_the_middle_leaves_nothing(single: Supabase) -> None:
    clean = session_seen(single)

    for fail in (_fail, _fail_while_reading, _fail_by_itself):
        with pytest.raises((SupabaseError, LookupError)):
            fail(lambda: transaction(single))
        assert session_seen(single) == clean


def test_a_transaction_that_the_server_cancels_or_ends_leaves_nothing(single: Supabase, admin: Connection) -> None:
    clean = session_seen(single)

    for fault in ("pg_cancel_backend", "pg_terminate_backend"):
        with pytest.raises(SupabaseUnavailableError):
            _read_until(single, admin, fault)
        assert session_seen(single) == clean


def test_a_whole_replication_leaves_nothing_to_the_next_client(
    policies: Database, postgres: LocalPostgres, tmp_path: Path
) -> None:
    with TransactionPooler(lambda: postgres.port, size=1) as pooler:
        single = replace(policies.supabase, port=pooler.port)
        clean, process = session_seen(single), backend(single)
        for _ in range(2):
            replicate(DeltaLakehouse(tmp_path), single, table_of("row_xid"))
            policies.run("DELETE FROM public.policies WHERE id < 5")
        assert backend(single) == process
        assert session_seen(single) == clean


def test_a_client_that_is_killed_while_it_reads_leaves_nothing(single: Supabase) -> None:
    clean = session_seen(single)
    dying = subprocess.Popen([sys.executable, "-c", _DYING], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert dying.stdin is not None
    assert dying.stdout is not None
    dying.stdin.write(f"{asdict(single)!r}\n".encode())
    dying.stdin.flush()
    assert dying.stdout.readline() == b"reading\n"

    dying.send_signal(signal.SIGKILL)
    dying.wait()

    assert session_seen(single) == clean


def _read_until(supabase: Supabase, admin: Connection, fault: str) -> None:
    with transaction(supabase) as session:
        session.value("SELECT pg_advisory_xact_lock(4711)::text")
        process = session.value("SELECT pg_backend_pid()")
        with session.stream("SELECT g, repeat('x', 1000) FROM generate_series(1, 5000000) g") as reader:
            reader.read_next_batch()
            admin.execute(f"SELECT {fault}({process})")
            for _ in reader:
                pass


def _fail(begin: Callable[[], AbstractContextManager[Session]]) -> None:
    with begin() as session:
        session.run("LOCK TABLE public.policies IN ACCESS SHARE MODE")
        session.value("SELECT pg_advisory_xact_lock(4711)::text")
        session.value("SELECT 1/0")


def _fail_while_reading(begin: Callable[[], AbstractContextManager[Session]]) -> None:
    with begin() as session, session.stream("SELECT 1 / (90000 - g) FROM generate_series(1, 100000) g") as reader:
        for _ in reader:
            pass


def _fail_by_itself(begin: Callable[[], AbstractContextManager[Session]]) -> None:
    with begin() as session, session.stream("SELECT g FROM generate_series(1, 1000000) g") as reader:
        reader.read_next_batch()
        raise LookupError


def test_a_transaction_that_stops_reading_early_does_not_read_the_rest(database: Database) -> None:
    endless = "SELECT generate_series(1, 1000000000)"
    began = time.monotonic()
    with connected(database.supabase) as connection:
        with connection.transaction() as session, session.stream(endless) as reader:
            reader.read_next_batch()
        with connection.transaction() as session:
            assert session.value("SELECT 1") == 1
    assert time.monotonic() - began < 90
