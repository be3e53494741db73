"""The pooler behaves as Supabase's does: few server connections, lent transaction by transaction, as they were left."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from telematics_assets.testing import LocalPostgres, TransactionPooler
from telematics_assets.testing.pooler import _Walk
from telematics_assets_tests.databases import Connection, Database


def connect(pooler: TransactionPooler, postgres: LocalPostgres, **options: Any) -> Connection:
    """A client of the pooler: the server's superuser, in autocommit."""
    url = pooler.url("postgres", postgres.password)
    return psycopg.connect(url, autocommit=True, prepare_threshold=None, **options)


def value(connection: Connection, query: str) -> Any:
    row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


@contextmanager
def pooled(postgres: LocalPostgres, **terms: Any) -> Iterator[TransactionPooler]:
    with TransactionPooler(lambda: postgres.port, **terms) as pooler:
        yield pooler


@pytest.fixture
def single(postgres: LocalPostgres) -> Iterator[TransactionPooler]:
    """A pooler with one server connection for everybody."""
    with pooled(postgres, size=1) as pooler:
        yield pooler


def test_clients_take_turns_on_one_server_connection(single: TransactionPooler, postgres: LocalPostgres) -> None:
    with connect(single, postgres) as one, connect(single, postgres) as two:
        assert value(one, "SELECT pg_backend_pid()") == value(two, "SELECT pg_backend_pid()")
        assert single.server_connections == 1


def test_a_server_connection_is_its_clients_for_a_whole_transaction(
    single: TransactionPooler, postgres: LocalPostgres
) -> None:
    with connect(single, postgres) as one, connect(single, postgres) as two, ThreadPoolExecutor() as pool:
        one.execute("BEGIN")
        waiting = pool.submit(value, two, "SELECT 2")
        time.sleep(0.1)
        assert not waiting.done()
        assert value(one, "SELECT 3") == 3
        one.execute("COMMIT")
        assert waiting.result(300) == 2


def test_what_a_client_sets_is_the_next_ones(single: TransactionPooler, postgres: LocalPostgres) -> None:
    with connect(single, postgres) as one, connect(single, postgres) as two:
        one.execute("SET work_mem = '7MB'")
        one.execute("PREPARE left_behind AS SELECT 1")
        assert value(two, "SHOW work_mem") == "7MB"
        assert value(two, "SELECT name FROM pg_prepared_statements") == "left_behind"


def test_a_named_statement_meets_another_server_connection(database: Database, postgres: LocalPostgres) -> None:
    pooler = database.pooler
    with connect(pooler, postgres) as one, connect(pooler, postgres) as two:
        one.execute("PREPARE mine AS SELECT 1")
        # The other client takes the connection that knows the statement, and keeps it.
        with two.transaction():
            two.execute("SELECT 1")
            with pytest.raises(psycopg.errors.InvalidSqlStatementName):
                one.execute("EXECUTE mine")


def test_a_pipeline_of_questions_is_answered_in_order(single: TransactionPooler, postgres: LocalPostgres) -> None:
    with connect(single, postgres) as one, connect(single, postgres) as two:
        for client in (one, two):
            with client.pipeline():
                cursors = [client.execute("SELECT %s::int8", [number]) for number in range(200)]
                assert [cursor.fetchone() for cursor in cursors] == [(number,) for number in range(200)]


def test_an_error_in_a_pipeline_is_told_and_the_connection_goes_on(
    single: TransactionPooler, postgres: LocalPostgres
) -> None:
    def ask(client: Connection) -> None:
        with client.pipeline():
            for query in ("SELECT 1", "SELECT 1/0", "SELECT 2"):
                client.execute(query)

    with connect(single, postgres) as one, connect(single, postgres) as two:
        with pytest.raises(psycopg.errors.DivisionByZero):
            ask(one)
        assert value(two, "SELECT 3") == 3
        assert value(one, "SELECT 4") == 4


def test_rows_are_copied_both_ways(database: Database) -> None:
    database.run("CREATE TABLE public.big (id int8, body text)", f"GRANT ALL ON public.big TO {database.role}")
    url = database.pooler.url(database.role, database.password, database.name)
    with psycopg.connect(url, autocommit=True) as client:
        with client.cursor().copy("COPY public.big FROM STDIN") as copy:
            for number in range(20_000):
                copy.write_row((number, "ü" * 200))
        assert value(client, "SELECT count(*) FROM public.big") == 20_000
        with client.cursor().copy("COPY public.big TO STDOUT (FORMAT binary)") as copy:
            size = sum(len(block) for block in copy)
    assert size > 20_000 * 400


def test_a_copy_that_a_client_gives_up_leaves_nothing(single: TransactionPooler, postgres: LocalPostgres) -> None:
    def give_up(client: Connection) -> None:
        with client.cursor().copy("COPY rows FROM STDIN") as copy:
            copy.write_row((1,))
            raise LookupError

    with connect(single, postgres) as one, connect(single, postgres) as two:
        one.execute("CREATE TEMPORARY TABLE rows (id int8)")
        with pytest.raises(LookupError):
            give_up(one)
        assert value(two, "SELECT count(*) FROM rows") == 0


def test_a_client_can_cancel_its_own_statement(database: Database, postgres: LocalPostgres) -> None:
    with connect(database.pooler, postgres) as one:
        answered = threading.Event()

        def cancel() -> None:
            # What comes before the statement has begun cancels nothing.
            while not answered.wait(0.2):
                one.cancel_safe()

        with ThreadPoolExecutor() as pool:
            cancelling = pool.submit(cancel)
            with pytest.raises(psycopg.errors.QueryCanceled):
                one.execute("SELECT pg_sleep(300)")
            answered.set()
            cancelling.result()
        assert value(one, "SELECT 1") == 1


def test_there_are_never_more_server_connections_than_allowed(postgres: LocalPostgres) -> None:
    with pooled(postgres, size=3) as pooler:

        def work(number: int) -> int:
            with connect(pooler, postgres) as client:
                for _ in range(5):
                    with client.transaction():
                        client.execute("SELECT pg_sleep(0.005)")
                        assert pooler.server_connections <= 3
                return int(value(client, f"SELECT {number}"))

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(work, range(16))) == list(range(16))
        assert 0 < pooler.server_connections <= 3


def test_who_waits_too_long_for_a_server_connection_is_sent_away(postgres: LocalPostgres) -> None:
    with pooled(postgres, size=1, checkout_seconds=0.2) as pooler, connect(pooler, postgres) as one:
        with one.transaction():
            one.execute("SELECT 1")
            with pytest.raises(psycopg.OperationalError, match="ECHECKOUTTIMEOUT"):
                connect(pooler, postgres)
        with connect(pooler, postgres) as two:
            assert value(two, "SELECT 1") == 1


def test_there_are_never_more_clients_than_allowed(postgres: LocalPostgres) -> None:
    with pooled(postgres, max_clients=1) as pooler:
        with connect(pooler, postgres), pytest.raises(psycopg.OperationalError, match="EMAXCONN"):
            connect(pooler, postgres)
        with connect(pooler, postgres) as client:
            assert value(client, "SELECT 1") == 1


def test_clients_of_another_project_none_or_a_wrong_password_are_refused(
    database: Database, postgres: LocalPostgres
) -> None:
    pooler = database.pooler
    right = pooler.url("postgres", postgres.password)
    with psycopg.connect(right):
        pass
    # A server connection of the right password is idle now: it is nobody else's.
    for wrong, words in (
        (right.replace(".localproject", ""), "ENOIDENTIFIER"),
        (right.replace(".localproject", ".another"), "Tenant or user not found"),
        (right.replace(postgres.password, "guessed"), "password authentication failed"),
        (right + "?options=-c%20work_mem%3D1MB", "unsupported startup parameter"),
        (right + "?sslmode=require", "does not support SSL"),
    ):
        with pytest.raises(psycopg.OperationalError, match=words):
            psycopg.connect(wrong)


def test_a_server_that_wants_more_than_a_password_is_told(tmp_path: Path) -> None:
    with LocalPostgres(tmp_path / "postgres") as server, pooled(server) as pooler:
        with psycopg.connect(server.url(), autocommit=True) as owner:
            rules = tmp_path / "postgres" / "data" / "pg_hba.conf"
            rules.write_text("host all all 127.0.0.1/32 scram-sha-256\n")
            owner.execute("SELECT pg_reload_conf()")
        _wait_until_logins_take(server, "scram-sha-256")
        with pytest.raises(psycopg.OperationalError, match="must take logins by `password`"):
            connect(pooler, server)


def _wait_until_logins_take(server: LocalPostgres, method: str) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            psycopg.connect(server.url(), require_auth=method).close()
        except psycopg.OperationalError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        else:
            return


def test_a_pooler_may_take_plain_users(postgres: LocalPostgres) -> None:
    with pooled(postgres, project=None) as pooler, connect(pooler, postgres) as client:
        assert pooler.user("postgres") == "postgres"
        assert value(client, "SELECT current_user") == "postgres"


def test_a_client_that_dies_in_a_transaction_frees_its_locks_and_its_place(
    single: TransactionPooler, postgres: LocalPostgres
) -> None:
    one = connect(single, postgres)
    one.execute("BEGIN")
    one.execute("SELECT pg_advisory_xact_lock(4711)")
    one.pgconn.finish()

    with connect(single, postgres) as two:
        assert value(two, "SELECT pg_try_advisory_lock(4711)") is True
        assert single.server_connections == 1


def test_a_restart_cuts_every_client_and_listens_on_the_same_port(database: Database, postgres: LocalPostgres) -> None:
    pooler = database.pooler
    port = pooler.port
    one = connect(pooler, postgres)
    one.execute("SELECT 1")

    pooler.restart()

    assert (pooler.port, pooler.server_connections) == (port, 0)
    with pytest.raises(psycopg.OperationalError):
        one.execute("SELECT 1")
    with connect(pooler, postgres) as two:
        assert value(two, "SELECT 1") == 1


def test_a_server_that_restarted_is_found_again(tmp_path: Path) -> None:
    with LocalPostgres(tmp_path / "postgres") as server, pooled(server) as pooler, connect(pooler, server) as one:
        assert value(one, "SELECT 1") == 1
        server.stop()
        with pytest.raises(psycopg.OperationalError, match="EDBHANDLEREXITED"):
            connect(pooler, server)
        server.start()
        assert value(one, "SELECT 2") == 2


def test_a_connection_can_be_cut_after_so_many_bytes(database: Database, postgres: LocalPostgres) -> None:
    with connect(database.pooler, postgres) as one:
        database.pooler.cut_after = 100_000
        with pytest.raises(psycopg.OperationalError, match="closed the connection"):
            one.execute("SELECT repeat('x', 1000) FROM generate_series(1, 1000)")
    database.pooler.cut_after = None
    with connect(database.pooler, postgres) as two:
        assert value(two, "SELECT 1") == 1


def test_a_hanging_pooler_says_nothing_until_it_is_let_go(database: Database, postgres: LocalPostgres) -> None:
    database.pooler.hanging = True
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(connect, database.pooler, postgres)
        time.sleep(0.2)
        assert not waiting.done()
        database.pooler.hanging = False
        waiting.result(300).close()


def test_what_is_no_protocol_at_all_is_sent_away(database: Database, postgres: LocalPostgres) -> None:
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\4", b"\xff" * 100, b""):
        with socket.create_connection((database.pooler.host, database.pooler.port), 60) as stranger:
            stranger.sendall(words)
            stranger.shutdown(socket.SHUT_WR)
            stranger.settimeout(60)
            while stranger.recv(1000):
                pass
    with connect(database.pooler, postgres) as client:
        assert value(client, "SELECT 1") == 1


@given(
    st.lists(st.tuples(st.integers(65, 122), st.binary(max_size=20)), max_size=12),
    st.lists(st.integers(1, 7)),
    st.sampled_from([b"", b"dD", bytes(range(65, 100))]),
)
def test_messages_are_followed_however_they_are_cut(
    messages: list[tuple[int, bytes]], cuts: list[int], untold: bytes
) -> None:
    stream = b"".join(bytes([kind]) + (len(body) + 4).to_bytes(4, "big") + body for kind, body in messages)
    walk, found, at = _Walk(untold), [], 0
    for cut in [*cuts, len(stream)]:
        found += walk.feed(stream[at : at + cut])
        at += cut

    assert found == [(kind, body[0] if body else 0) for kind, body in messages if kind not in untold]
    assert walk.between


def test_rows_that_look_like_the_end_of_an_answer_do_not_end_it(
    single: TransactionPooler, postgres: LocalPostgres
) -> None:
    end = b"Z\0\0\0\5I"
    with connect(single, postgres) as client, client.cursor() as cursor:
        query = "COPY (SELECT decode(%s, 'hex') FROM generate_series(1, 50000)) TO STDOUT (FORMAT binary)"
        with cursor.copy(query, [(end * 7).hex()]) as copy:
            assert sum(end in bytes(row) for row in copy) == 50_000
        assert value(client, "SELECT 1") == 1
