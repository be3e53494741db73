"""Every hurdle on the way to the database, met at a server that really answers so: its cause, its cure, who waits."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import adbc_driver_postgresql.dbapi
import deltalake
import psycopg
import pytest

from telematics_assets.errors import SupabaseError, SupabaseUnavailableError
from telematics_assets.microbatch.connection import Supabase
from telematics_assets.microbatch.doctor import examine
from telematics_assets.microbatch.hurdles import explain, retried
from telematics_assets.microbatch.session import connected, transaction
from telematics_assets.testing.pooler import TransactionPooler
from telematics_assets.testing.postgres import LocalPostgres
from telematics_assets_tests.databases import Connection, Database

AT_ONCE = (0.0, 0.0)
DRIVERS: dict[str, Callable[[str], Any]] = {"adbc": adbc_driver_postgresql.dbapi.connect, "psycopg": psycopg.connect}

#: SQLSTATE and message as poolers and servers send them, and what we make of them.
PERMANENT = [
    ("XX000", "Tenant or user not found", "another region's", "Copy it from the project's page"),
    ("XX000", "(ENOTFOUND) tenant/user reader.nope not found", "project is paused", "Copy it from the project's page"),
    (
        "XX000",
        "(ENOIDENTIFIER) no tenant identifier provided (external_id or sni_hostname required)",
        "lacks the",
        "<ro",
    ),
    (
        "XX000",
        "(EADDRNOTALLOWED) address not in tenant allow_list: {118, 189, 9, 2}",
        r"\(118.189.9.2\)",
        "Network Restri",
    ),
    ("XX000", "Address not in tenant allow_list: {1, 2, 3, 4}", "network restrictions", "Network Restrictions"),
    ("XX000", "(ESSLREQUIRED) SSL connection is required for user: reader", "enforces SSL", "SUPABASE_SSLMODE=verify"),
    (
        "28000",
        'no pg_hba.conf entry for host "1.2.3.4", user "u", database "d", SSL off',
        "enforces SSL",
        "verify-full",
    ),
    (
        "28000",
        'no pg_hba.conf entry for host "1.2.3.4", user "u", database "d", no encryption',
        "enforces SSL",
        "verify",
    ),
    (
        "28000",
        'no pg_hba.conf entry for host "1.2.3.4", user "u", database "d", SSL on',
        "admits no such",
        "SUPABASE_USER",
    ),
    ("28P01", 'password authentication failed for user "reader"', "password of user .* is wrong", "SUPABASE_PASSWORD"),
    ("28P01", "SASL authentication failed", "password of user .* is wrong", "SUPABASE_PASSWORD"),
    ("XX000", "(EAUTHQUERY) user not found in the database", "no role reader_", "SUPABASE_USER"),
    ("XX000", "(EBANNED) tenant is banned: unpaid", "paused or suspended", "Restore it"),
    ("3D000", 'database "nope" does not exist', "no database", "SUPABASE_DATABASE"),
    ("08P01", "unsupported startup parameter: options", "refused", "telematics doctor"),
]
TRANSIENT = [
    ("XX000", "(EMAXCONN) max client connections reached, limit: 200", "exhausted", "Connection pooling"),
    ("XX000", "Max client connections reached", "exhausted", "Connection pooling"),
    ("XX000", "(EMAXCONNSESSION) max clients reached in session mode", "exhausted", "Connection pooling"),
    (
        "XX000",
        "(ECHECKOUTTIMEOUT) unable to check out connection from the pool after 60000ms",
        "exhausted",
        "Connection",
    ),
    ("53300", "remaining connection slots are reserved for roles with the SUPERUSER attribute", "exhausted", "Close"),
    ("53300", "sorry, too many clients already", "exhausted", "Close"),
    ("08P01", "no more connections allowed (max_client_conn)", "exhausted", "Close"),
    ("08P01", "query_wait_timeout", "exhausted", "Close"),
    ("XX000", "(EDBHANDLEREXITED) connection to database closed", "was lost", "goes on"),
    ("XX000", "Failed to connect to database: {:error, :econnrefused}", "was lost", "goes on"),
    ("57P03", "the database system is starting up", "was lost", "goes on"),
    ("57P01", "terminating connection due to administrator command", "was lost", "goes on"),
]


@contextmanager
def listener(backlog: int | None) -> Iterator[int]:
    """A port that is taken; with a backlog somebody seems to listen, and never answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if backlog is not None:
            taken.listen(backlog)
        yield taken.getsockname()[1]


def ask(supabase: Supabase, *statements: str, pauses: tuple[float, ...] = ()) -> Any:
    """The answer to the last of some statements in one transaction."""
    with transaction(supabase, pauses) as session:
        for statement in statements[:-1]:
            session.run(statement)
        return session.value(statements[-1])


def met_by(driver: str, supabase: Supabase) -> SupabaseError | SupabaseUnavailableError:
    """The hurdle that a driver meets."""
    with pytest.raises((adbc_driver_postgresql.dbapi.Error, psycopg.Error)) as met:
        DRIVERS[driver](supabase.uri()).close()
    return explain(met.value, supabase)


def test_a_refusal_for_good_is_never_tried_again(database: Database) -> None:
    for state, message, _, _ in PERMANENT:
        database.pooler.refusal = (state, message)
        before = database.pooler.logins
        with pytest.raises(SupabaseError):
            ask(database.supabase, "SELECT 1", pauses=AT_ONCE)
        assert database.pooler.logins - before == 1, message


def test_a_refusal_that_passes_is_tried_again_and_then_told(database: Database) -> None:
    for state, message, _, _ in TRANSIENT:
        database.pooler.refusal = (state, message)
        before = database.pooler.logins
        with pytest.raises(SupabaseUnavailableError, match="It was tried 3 times"):
            ask(database.supabase, "SELECT 1", pauses=AT_ONCE)
        assert database.pooler.logins - before == 3, message


@pytest.mark.parametrize("driver", DRIVERS)
def test_each_refusal_has_its_cause_and_its_fix(database: Database, driver: str) -> None:
    for state, message, cause, fix in [*PERMANENT, *TRANSIENT]:
        database.pooler.refusal = (state, message)

        met = met_by(driver, database.supabase)

        assert met.transient is any(message == passing for _, passing, _, _ in TRANSIENT), message
        assert cause.replace("\\", "").split(" .* ")[0] in met.cause, message
        assert fix in met.fix or fix.lower() in met.fix.lower(), message
        assert message.split("{")[0].strip() in str(met), "what was said stays readable"


def test_who_is_locked_out_is_not_made_to_wait_longer_by_trying(database: Database) -> None:
    database.pooler.refusal = (
        "XX000",
        "(ECIRCUITBREAKER) too many authentication failures, new connections are blocked",
    )

    with pytest.raises(SupabaseUnavailableError, match="wait two minutes"):
        ask(database.supabase, "SELECT 1", pauses=AT_ONCE)

    assert database.pooler.logins == 1


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_wrong_password_is_tried_once_and_shown_nowhere(database: Database, driver: str) -> None:
    wrong = replace(database.supabase, password="not-it-%41 ü")

    with pytest.raises(SupabaseError, match="percent-encoded") as refused:
        ask(wrong, "SELECT 1", pauses=AT_ONCE)

    assert database.pooler.logins == 1
    assert "not-it" not in str(refused.value)
    assert refused.value.__suppress_context__, "an error report would print the driver's own message too"
    assert "is wrong" in met_by(driver, wrong).cause


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_role_that_is_not_there_is_named_as_one_that_gave_a_wrong_password(database: Database, driver: str) -> None:
    met = met_by(driver, replace(database.supabase, user=database.pooler.user("nobody_known")))

    assert isinstance(met, SupabaseError)
    assert "nobody_known" in met.cause


@pytest.mark.parametrize("driver", DRIVERS)
def test_nothing_listens(driver: str) -> None:
    with listener(None) as port:
        met = met_by(driver, Supabase("127.0.0.1", "u", "hush", port, sslmode="disable"))

    assert isinstance(met, SupabaseUnavailableError)
    assert met.soon
    assert f"Nothing listens at 127.0.0.1:{port}" in met.cause


@pytest.mark.parametrize(("driver", "sslmode"), [("adbc", "disable"), ("adbc", "require"), ("psycopg", "disable")])
def test_a_firewall_that_drops_everything_is_given_up_in_time(driver: str, sslmode: Any) -> None:
    with listener(5) as port:
        met = met_by(driver, Supabase("127.0.0.1", "u", "hush", port, sslmode=sslmode, connect_seconds=2))

    assert isinstance(met, SupabaseUnavailableError)
    assert not met.soon
    assert "does not answer: a firewall" in met.cause
    assert "paused" in met.fix


def test_a_pooler_that_hangs_is_given_up_in_time(database: Database) -> None:
    database.pooler.hanging = True
    try:
        with pytest.raises(SupabaseUnavailableError, match="does not answer"):
            ask(replace(database.supabase, connect_seconds=2), "SELECT 1", pauses=AT_ONCE)
    finally:
        database.pooler.hanging = False


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_name_that_nobody_knows(driver: str) -> None:
    met = met_by(driver, Supabase("aws-9-nowhere.invalid", "u", "hush", sslmode="require"))

    # Where there is no name server at all it may still come back.
    assert "aws-9-nowhere.invalid" in met.cause
    assert "no address of" in met.cause or met.transient


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_server_without_tls(database: Database, driver: str) -> None:
    met = met_by(driver, replace(database.supabase, sslmode="require"))

    assert isinstance(met, SupabaseError)
    assert "does not speak TLS" in met.cause


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_web_server_is_no_database(driver: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(300)
        supabase = Supabase("127.0.0.1", "u", "hush", server.getsockname()[1], sslmode="require", connect_seconds=120)

        def answer() -> None:
            client, _ = server.accept()
            with client:
                client.recv(100)
                client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                client.recv(100)

        thread = threading.Thread(target=answer)
        thread.start()
        met = met_by(driver, supabase)
        thread.join()

    assert isinstance(met, SupabaseError)
    assert "is no PostgreSQL" in met.cause


def test_the_pool_that_others_hold_is_waited_for(postgres: LocalPostgres, database: Database) -> None:
    with TransactionPooler(lambda: postgres.port, size=1, checkout_seconds=0.2) as pooler:
        supabase = replace(database.supabase, port=pooler.port)
        with transaction(supabase), pytest.raises(SupabaseUnavailableError, match=r"exhausted.*It was tried 3 times"):
            ask(supabase, "SELECT 1", pauses=AT_ONCE)
        assert ask(supabase, "SELECT 1") == 1


def test_trying_again_waits_longer_each_time_and_stops_at_the_first_success() -> None:
    waits: list[float] = []
    troubles = [SupabaseUnavailableError("busy", soon=True), SupabaseUnavailableError("busy", soon=True)]

    def action() -> str:
        if troubles:
            raise troubles.pop()
        return "done"

    assert retried(action, sleep=waits.append) == "done"
    assert waits == [0.5, 1.0]


def test_a_statement_that_the_server_cancels_is_told_with_the_limit_to_raise(supabase: Supabase) -> None:
    with pytest.raises(SupabaseUnavailableError, match=r"ALTER ROLE reader_.* SET statement_timeout"):
        ask(supabase, "SET LOCAL statement_timeout = '50ms'", "SELECT pg_sleep(5)::text")


def test_a_table_that_somebody_locks_is_told(database: Database, admin: Connection) -> None:
    database.run("CREATE TABLE public.policies (id int8)")
    with admin.transaction():
        admin.execute("LOCK TABLE public.policies IN ACCESS EXCLUSIVE MODE")
        lock = "SET LOCAL lock_timeout = '50ms'; LOCK TABLE public.policies IN ACCESS SHARE MODE"
        with pytest.raises(SupabaseUnavailableError, match="holds a lock"):
            ask(database.supabase, lock, "SELECT 1")


def test_rights_that_are_missing_are_told_with_the_grants(database: Database, admin: Connection) -> None:
    database.run(
        "CREATE TABLE public.closed (id int8)",
        f"REVOKE ALL ON public.closed FROM {database.role}",
        "CREATE TABLE public.filtered (id int8)",
        "ALTER TABLE public.filtered ENABLE ROW LEVEL SECURITY",
    )
    with pytest.raises(SupabaseError, match="telematics supabase sql"):
        ask(database.supabase, "SELECT count(*) FROM public.closed")
    with pytest.raises(SupabaseError, match="BYPASSRLS"):
        ask(database.supabase, "SELECT count(*) FROM public.filtered")


def test_a_connection_that_is_cut_in_the_middle_of_the_rows_passes(database: Database) -> None:
    def read() -> None:
        query = "SELECT g, repeat('x', 1000) FROM generate_series(1, 200000) g"
        with transaction(database.supabase) as session, session.stream(query) as reader:
            assert reader.read_next_batch().num_rows
            database.pooler.cut_after = 0
            for _ in reader:
                pass

    with pytest.raises(SupabaseUnavailableError, match="was lost"):
        read()


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("division by zero", SupabaseError),
        ("canceling statement due to conflict with recovery", SupabaseUnavailableError),
        ('could not write to file "base/pgsql_tmp/1.0": No space left on device', SupabaseUnavailableError),
    ],
)
def test_an_error_of_the_server_in_the_middle_of_the_rows(
    database: Database, message: str, kind: type[Exception]
) -> None:
    raising = f"IF g > 50000 THEN RAISE EXCEPTION '{message}'; END IF; RETURN g;"
    database.run(
        f"CREATE FUNCTION public.faulty(g int8) RETURNS int8 LANGUAGE plpgsql AS $$BEGIN {raising} END$$",
        f"GRANT EXECUTE ON FUNCTION public.faulty TO {database.role}",
    )

    def read() -> None:
        query = "SELECT public.faulty(g), repeat('x', 500) FROM generate_series(1, 100000) g"
        with transaction(database.supabase) as session, session.stream(query) as reader:
            for _ in reader:
                pass

    with pytest.raises(kind, match=message):
        read()


def test_a_loss_that_a_writer_meets_is_still_a_loss_of_the_database(database: Database, tmp_path: Path) -> None:
    def write() -> None:
        query = "SELECT g, repeat('x', 1000) FROM generate_series(1, 200000) g"
        with transaction(database.supabase) as session, session.stream(query) as reader:
            database.pooler.cut_after = 20_000_000
            deltalake.write_deltalake(tmp_path / "table", reader)

    with pytest.raises(SupabaseUnavailableError, match="was lost"):
        write()
    assert not deltalake.DeltaTable.is_deltatable(str(tmp_path / "table"))


def test_a_server_that_ends_the_connection_passes(database: Database, admin: Connection) -> None:
    def lose() -> None:
        with transaction(database.supabase) as session:
            process = session.value("SELECT pg_backend_pid()")
            admin.execute(f"SELECT pg_terminate_backend({process}, 5000)")
            session.value("SELECT 1")

    with pytest.raises(SupabaseUnavailableError, match="was lost"):
        lose()


def test_a_connection_that_was_lost_between_transactions_is_opened_again(database: Database) -> None:
    with connected(database.supabase, AT_ONCE) as connection:
        with connection.transaction() as session:
            assert session.value("SELECT 1") == 1
        database.pooler.restart()
        with connection.transaction() as session:
            assert session.value("SELECT 2") == 2


def test_a_trouble_of_the_readers_own_is_not_blamed_on_the_database(supabase: Supabase) -> None:
    def read() -> None:
        with transaction(supabase) as session, session.stream("SELECT 1 AS one"):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        read()


def test_a_transaction_that_somebody_lets_go_of_in_the_middle_ends_quickly(supabase: Supabase) -> None:
    def read() -> None:
        query = "SELECT generate_series(1, 1000000000), repeat('x', 1000)"
        with transaction(supabase) as session, session.stream(query) as reader:
            reader.read_next_batch()
            raise LookupError

    begun = time.monotonic()
    with pytest.raises(LookupError):
        read()
    assert time.monotonic() - begun < 90, "all was read"


@pytest.mark.parametrize("echo", ["{}", 'invalid percent-encoded token: "{}"', "postgresql://u:{}@h/d", "password={}"])
@pytest.mark.parametrize("secret", ["s3cr3t", "p%zz ü'\"", "a/b@c"])
def test_a_password_that_a_driver_repeats_is_scrubbed(echo: str, secret: str) -> None:
    supabase = Supabase("h", "u", secret, sslmode="require")
    for form in (secret, quote(secret, safe=""), quote(secret)):
        told = str(explain(OSError(echo.format(form)), supabase))
        assert form not in told
        assert secret not in told


def test_a_password_that_is_a_word_of_the_message_does_not_hide_the_hurdle() -> None:
    supabase = Supabase("h", "u", "password", sslmode="require")

    assert isinstance(explain(OSError('FATAL:  password authentication failed for user "u"'), supabase), SupabaseError)


# -- doctor ----------------------------------------------------------------------------------------------------------


def found(supabase: Supabase) -> dict[str, tuple[str, str, str]]:
    return {f.subject: (f.level, f.message, f.fix or "") for f in examine(supabase)}


def test_the_doctor_is_content_with_a_role_that_may_only_read(database: Database) -> None:
    database.run("CREATE TABLE public.policies (id int8)", "CREATE TABLE public.claims (id int8)")

    findings = found(database.supabase)

    assert {level for level, _, _ in findings.values()} == {"ok"}
    assert "PostgreSQL 1" in findings["Supabase"][1]
    assert "2 tables (public.claims, public.policies)" in findings["Supabase role"][1]


def test_the_doctor_names_what_a_role_has_too_much_and_too_little(database: Database, admin: Connection) -> None:
    assert found(database.supabase)["Supabase role"][:2] == ("warning", f"{database.role} may read no table.")
    database.run(
        "CREATE TABLE public.policies (id int8)",
        f"GRANT INSERT ON public.policies TO {database.role}",
        "CREATE TABLE public.filtered (id int8)",
        "ALTER TABLE public.filtered ENABLE ROW LEVEL SECURITY",
        "REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC",
    )

    messages = [(f.level, f.message, f.fix) for f in examine(database.supabase)]

    assert any(level == "warning" and "may change 1 table (public.policies)" in said for level, said, _ in messages)
    assert any(
        level == "error" and "public.filtered" in said and "BYPASSRLS" in (fix or "") for level, said, fix in messages
    )
    assert any(level == "warning" and "which database this is" in said for level, said, _ in messages)


def test_the_doctor_names_the_superuser(database: Database, postgres: LocalPostgres) -> None:
    supabase = replace(
        database.supabase, user=database.pooler.user("postgres"), password=postgres.password, database="postgres"
    )

    assert any("superuser" in f.message for f in examine(supabase))


def test_the_doctor_tells_a_hurdle_once_and_does_not_wait(database: Database) -> None:
    database.pooler.refusal = ("XX000", "(EMAXCONN) max client connections reached")

    (finding,) = examine(database.supabase)

    assert (finding.level, finding.subject) == ("error", "Supabase")
    assert "exhausted" in finding.message
    assert finding.fix
    assert database.pooler.logins == 1
