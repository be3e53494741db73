"""Encrypted connections: who answers is proved, or refused; through our own pooler, and through Debian's PgBouncer.

The certificates are made by `openssl`. Where Debian's `pgbouncer` and `postgresql` are not installed, the tests with
them are skipped; CI installs both.
"""

from __future__ import annotations

import re
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from telematics_assets.catalog import Names
from telematics_assets.errors import SupabaseError, SupabaseUnavailableError, TransientError
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.microbatch.connection import SslMode, Supabase
from telematics_assets.microbatch.doctor import examine
from telematics_assets.microbatch.session import connected, transaction
from telematics_assets.testing.pooler import TransactionPooler
from telematics_assets.testing.postgres import LocalPostgres
from telematics_assets_tests.databases import Database
from telematics_assets_tests.microbatch.business import Business, books
from telematics_assets_tests.microbatch.endless_process import items
from telematics_assets_tests.microbatch.leftovers import backend, session_seen
from telematics_assets_tests.microbatch.replicate_process import replicate
from telematics_assets_tests.microbatch.test_random_kills import racers
from telematics_assets_tests.microbatch.test_stress import ROW_XID, Mirror, prepare
from telematics_assets_tests.pgbouncer import LOG, bouncing, pgbouncer

PASSWORD = "p@ss/w:rd ü%41"


@dataclass(frozen=True)
class Certificates:
    """A CA, the certificate of `localhost` that it signed, and a CA that signed nothing."""

    ca: Path
    certificate: Path
    key: Path
    other_ca: Path

    @property
    def context(self) -> ssl.SSLContext:
        """What a server needs to show the certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is missing: it makes the certificates of these tests")
    folder = tmp_path_factory.mktemp("certificates")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]

    def make(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], cwd=folder, check=True, capture_output=True)

    for name in ("ca", "other"):
        make("req", "-x509", *curve, "-keyout", f"{name}.key", "-out", f"{name}.crt", "-subj", f"/CN=Test {name}")
    make("req", *curve[:-2], "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
    (folder / "names").write_text("subjectAltName = DNS:localhost\n")
    signed = ["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names"]
    make("x509", "-req", "-in", "server.csr", "-out", "server.crt", *signed)
    return Certificates(folder / "ca.crt", folder / "server.crt", folder / "server.key", folder / "other.crt")


# -- our own pooler, everywhere --------------------------------------------------------------------------------------


@pytest.fixture
def encrypted(database: Database, postgres: LocalPostgres, certificates: Certificates) -> Iterator[Supabase]:
    with TransactionPooler(lambda: postgres.port, tls=certificates.context, require_tls=True) as pooler:
        yield replace(database.supabase, host="localhost", port=pooler.port, sslmode="verify-full", ca=certificates.ca)


def ask(supabase: Supabase, query: str = "SELECT 1") -> object:
    with transaction(supabase, pauses=()) as session:
        return session.value(query)


@pytest.mark.parametrize("sslmode", ["require", "verify-ca", "verify-full"])
def test_every_strictness_finds_the_right_server(encrypted: Supabase, sslmode: SslMode) -> None:
    assert ask(replace(encrypted, sslmode=sslmode)) == 1


def test_a_certificate_of_another_ca_is_refused(encrypted: Supabase, certificates: Certificates) -> None:
    for sslmode in ("verify-ca", "verify-full"):
        with pytest.raises(SupabaseError, match=r"is not signed by .*other\.crt"):
            ask(replace(encrypted, ca=certificates.other_ca, sslmode=sslmode))


def test_a_certificate_that_no_ca_of_this_machine_signed_is_refused(encrypted: Supabase) -> None:
    with pytest.raises(SupabaseError, match=r"not signed by any CA that this machine knows.*set SUPABASE_CA"):
        ask(replace(encrypted, ca=None))


def test_another_hosts_certificate_is_refused_by_the_strictest(encrypted: Supabase) -> None:
    with pytest.raises(SupabaseError, match="is another host's"):
        ask(replace(encrypted, host="127.0.0.1"))
    assert ask(replace(encrypted, host="127.0.0.1", sslmode="verify-ca")) == 1


def test_a_ca_that_is_no_certificate_is_named(encrypted: Supabase, tmp_path: Path) -> None:
    (tmp_path / "empty.crt").write_text("nothing")

    with pytest.raises(SupabaseError, match=r"can't be read: .*empty\.crt"):
        ask(replace(encrypted, ca=tmp_path / "empty.crt"))


def test_a_pooler_that_enforces_tls_refuses_a_connection_in_clear(encrypted: Supabase) -> None:
    with pytest.raises(SupabaseError, match="enforces SSL"):
        ask(replace(encrypted, sslmode="disable"))


def test_the_doctor_tells_how_strict_the_connection_is(encrypted: Supabase) -> None:
    def tls(sslmode: SslMode) -> tuple[str, str]:
        (finding,) = [f for f in examine(replace(encrypted, sslmode=sslmode)) if f.subject == "Supabase TLS"]
        return finding.level, finding.message

    assert tls("verify-full") == ("ok", f"verify-full, CA {encrypted.ca}")
    assert tls("require")[0] == "warning"


# -- Debian's PostgreSQL and PgBouncer -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bouncer:
    """PgBouncer in transaction mode in front of a PostgreSQL, both with TLS."""

    supabase: Supabase
    server: LocalPostgres
    log: Path

    @property
    def console(self) -> str:
        """What libpq needs for the pooler's own console."""
        return make_conninfo(self.supabase.uri(), dbname="pgbouncer")

    def owner(self) -> psycopg.Connection[tuple[object, ...]]:
        """A connection past the pooler."""
        return psycopg.connect(self.server.url(), sslmode="require", autocommit=True)


@pytest.fixture(scope="module")
def bouncer(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bouncer]:
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    program = pgbouncer()
    if not versions or program is None:
        pytest.skip("Debian's pgbouncer and postgresql are missing: apt-get install pgbouncer postgresql")
    folder = tmp_path_factory.mktemp("bouncer")
    tls = ["ssl=on", f"ssl_cert_file={certificates.certificate}", f"ssl_key_file={certificates.key}"]
    settings = [*tls, "max_prepared_transactions=8"]
    with LocalPostgres(folder / "postgres", settings=settings, programs=versions[-1].parent) as server:
        with psycopg.connect(server.url(), autocommit=True) as owner:
            owner.execute(f"CREATE ROLE reader LOGIN PASSWORD '{PASSWORD}'")
        strict = {
            "default_pool_size": 1,
            "query_wait_timeout": 1,
            "auth_type": "scram-sha-256",
            "client_tls_sslmode": "require",
            "client_tls_cert_file": certificates.certificate,
            "client_tls_key_file": certificates.key,
            "server_tls_sslmode": "require",
            "admin_users": "reader",
        }
        with bouncing(program, folder, server.port, {"reader": PASSWORD}, strict) as port:
            supabase = Supabase("localhost", "reader", PASSWORD, port, "postgres", "verify-full", certificates.ca)
            yield Bouncer(supabase, server, folder / LOG)


def test_rows_come_through_pgbouncer_in_one_snapshot(bouncer: Bouncer) -> None:
    with bouncer.owner() as owner:
        owner.execute("DROP TABLE IF EXISTS policies")
        owner.execute(
            "CREATE TABLE policies AS SELECT g AS id, repeat('ü', 50) AS name FROM generate_series(1, 300000) g"
        )
        owner.execute("GRANT SELECT ON policies TO reader")
        with transaction(bouncer.supabase) as session:
            session.run("LOCK TABLE public.policies IN ACCESS SHARE MODE")
            first = session.value("SELECT count(*) FROM public.policies")
            owner.execute("DELETE FROM policies WHERE id > 5")
            with session.stream("SELECT id, name FROM public.policies") as reader:
                rows = sum(batch.num_rows for batch in reader)

    assert (first, rows) == (300_000, 300_000)


def test_the_whole_way_is_encrypted(bouncer: Bouncer) -> None:
    with transaction(bouncer.supabase) as session:
        assert session.value("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()") is True
    assert re.search(r"C-0x\w+: postgres/reader@\S+ login attempt: .*tls=TLSv1", bouncer.log.read_text())


def test_pgbouncer_is_held_between_transactions_by_nobody(bouncer: Bouncer) -> None:
    # There is one server connection: who comes second would wait for ever.
    with connected(bouncer.supabase) as one, connected(bouncer.supabase) as two:
        for _ in range(3):
            for connection in (one, two):
                with connection.transaction() as session:
                    assert session.value("SELECT 1") == 1


def test_the_next_client_of_pgbouncer_finds_a_clean_session(bouncer: Bouncer) -> None:
    clean, process = session_seen(bouncer.supabase), backend(bouncer.supabase)

    with transaction(bouncer.supabase) as session, session.stream("SELECT g FROM generate_series(1, 9) g") as reader:
        reader.read_all()
    assert backend(bouncer.supabase) == process, "it is the very session that the transaction had"
    assert session_seen(bouncer.supabase) == clean

    with pytest.raises(SupabaseError, match="division by zero"):
        ask(bouncer.supabase, "SELECT 1/0")
    assert session_seen(bouncer.supabase) == clean


def test_pgbouncers_exhausted_pool_is_told(bouncer: Bouncer) -> None:
    with transaction(bouncer.supabase), pytest.raises(SupabaseUnavailableError, match="exhausted"):
        ask(bouncer.supabase)


@pytest.mark.parametrize("sslmode", ["verify-ca", "verify-full"])
def test_pgbouncer_with_a_certificate_of_another_ca_is_refused(
    bouncer: Bouncer, certificates: Certificates, sslmode: SslMode
) -> None:
    with pytest.raises(SupabaseError, match="is not signed by"):
        ask(replace(bouncer.supabase, ca=certificates.other_ca, sslmode=sslmode))


def test_pgbouncer_under_another_name_is_refused(bouncer: Bouncer) -> None:
    with pytest.raises(SupabaseError, match="is another host's"):
        ask(replace(bouncer.supabase, host="127.0.0.1"))


def test_pgbouncer_that_wants_tls_says_so(bouncer: Bouncer) -> None:
    with pytest.raises(SupabaseError, match="enforces SSL"):
        ask(replace(bouncer.supabase, sslmode="disable"))


def test_a_wrong_password_and_a_wrong_role_at_pgbouncer(bouncer: Bouncer) -> None:
    with pytest.raises(SupabaseError, match="password of user reader is wrong"):
        ask(replace(bouncer.supabase, password="another"))
    with pytest.raises(SupabaseError, match="nobody_known"):
        ask(replace(bouncer.supabase, user="nobody_known"))


def test_postgresql_itself_with_tls(bouncer: Bouncer, certificates: Certificates) -> None:
    direct = replace(bouncer.supabase, port=bouncer.server.port)

    assert ask(direct) == 1
    with pytest.raises(SupabaseError, match="is not signed by"):
        ask(replace(direct, ca=certificates.other_ca))
    with pytest.raises(SupabaseError, match="is another host's"):
        ask(replace(direct, host="127.0.0.1"))


def test_the_doctor_is_content_with_pgbouncer(bouncer: Bouncer) -> None:
    findings = examine(bouncer.supabase)

    assert [finding.subject for finding in findings if finding.level == "error"] == []
    assert any("PostgreSQL" in finding.message for finding in findings)


def test_no_row_is_lost_behind_pgbouncer_under_writers_kills_and_lost_connections(
    bouncer: Bouncer, tmp_path: Path, soak_factor: int
) -> None:
    supabase = replace(bouncer.supabase, sslmode="require", ca=None)
    mirror = Mirror(tmp_path / "threads", supabase)
    table = items("row_xid")
    prepare(bouncer.owner, "reader")
    business = Business(bouncer.owner, writers=3, slowest=0.3)
    faults = ("pg_cancel_backend", "pg_terminate_backend")
    try:
        with business.running():
            for _ in range(soak_factor):
                with racers(tmp_path / "processes", supabase, "row_xid") as running:
                    for fault in faults:
                        with bouncer.owner() as owner:
                            owner.execute(f"SELECT {fault}(pid) FROM pg_stat_activity WHERE usename = 'reader'")
                        for _ in range(3):
                            # Only what may go through later is allowed to go wrong.
                            with suppress(TransientError):
                                mirror.replicate(ROW_XID)
                    for each in running:
                        each.kill()
        replicate(DeltaLakehouse(tmp_path / "processes" / "tables"), supabase, table)
        mirror.replicate(ROW_XID)
        with bouncer.owner() as owner:
            raced = books(owner, tmp_path / "processes" / "tables" / Names().bronze(table.target).location)
            looped = books(owner, mirror.folder(ROW_XID))
    finally:
        with bouncer.owner() as owner:
            owner.execute("DROP TABLE public.items")
    assert raced.balanced, raced
    assert looped.balanced, looped
    assert business.written.commits > 0


def test_a_limit_of_pgbouncer_on_queries_is_told_by_name(bouncer: Bouncer) -> None:
    with psycopg.connect(bouncer.console, autocommit=True, prepare_threshold=None) as console:
        console.execute("SET query_timeout = 1")
        try:
            with pytest.raises(SupabaseUnavailableError, match="query_timeout"):
                ask(bouncer.supabase, "SELECT count(*) FROM (SELECT pg_sleep(5)) AS slept")
        finally:
            console.execute("SET query_timeout = 0")
    assert ask(bouncer.supabase) == 1
