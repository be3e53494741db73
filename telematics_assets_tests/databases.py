"""A real PostgreSQL and a transaction pooler for tests: one server per test process, one database per test.

Belongs here: the fixtures that every room uses which reads from a database, and the builders behind them.
Does not belong here: test cases; tables (each test makes its own through `database.run` or `admin`).

    def test_rows(database: Database) -> None:
        database.run("CREATE TABLE public.policies (id int8 PRIMARY KEY)", "INSERT INTO public.policies VALUES (1)")
        with transaction(database.supabase) as session:
            assert session.value("SELECT count(*) FROM public.policies") == 1
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from telematics_assets.microbatch.connection import Supabase
from telematics_assets.testing.pooler import TransactionPooler
from telematics_assets.testing.postgres import LocalPostgres

Connection = psycopg.Connection[tuple[Any, ...]]


@dataclass(frozen=True)
class Database:
    """An empty database of its own, and the ways into it.

    Attributes:
        name: Its name.
        supabase: The way in for the code under test: through the pooler, as a role that may only read.
        role: That role's name in the database; tables of schema public that the owner makes are readable to it.
        password: Its password.
        pooler: The pooler in front of it; may be told to refuse, cut and hang.
        server: The server.
    """

    name: str
    supabase: Supabase
    role: str
    password: str
    pooler: TransactionPooler
    server: LocalPostgres

    def connect(self) -> Connection:
        """A connection of the database's owner, past the pooler, in autocommit; whoever opens it closes it."""
        return psycopg.connect(self.server.url(self.name), autocommit=True)

    def run(self, *statements: str) -> None:
        """Execute statements as the database's owner, each committed by itself."""
        with self.connect() as connection:
            for statement in statements:
                connection.execute(statement)


def through(pooler: TransactionPooler, role: str, password: str, name: str) -> Supabase:
    """The way into a database through a pooler on loopback, in clear."""
    return Supabase(pooler.host, pooler.user(role), password, pooler.port, name, "disable")


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalPostgres]:
    """A real server. Tests that stop or kill it use one of their own."""
    with LocalPostgres(tmp_path_factory.mktemp("postgres"), settings=["max_prepared_transactions=8"]) as server:
        yield server


@pytest.fixture
def pooler(postgres: LocalPostgres) -> Iterator[TransactionPooler]:
    """A pooler in front of the server, with connections of its own."""
    with TransactionPooler(lambda: postgres.port) as pooler:
        yield pooler


@pytest.fixture
def database(postgres: LocalPostgres, pooler: TransactionPooler) -> Iterator[Database]:
    """An empty database behind the pooler, and a role that may only read in it."""
    name, role, password = f"db_{uuid.uuid4().hex[:12]}", f"reader_{uuid.uuid4().hex[:12]}", secrets.token_urlsafe(12)
    with psycopg.connect(postgres.url(), autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name}")
        server.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{password}'")
    database = Database(name, through(pooler, role, password, name), role, password, pooler, postgres)
    database.run(
        f"GRANT USAGE ON SCHEMA public TO {role}",
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO {role}",
    )
    try:
        yield database
    finally:
        with psycopg.connect(postgres.url(), autocommit=True) as server:
            server.execute(f"DROP DATABASE {name} WITH (FORCE)")
            server.execute(f"DROP ROLE {role}")


@pytest.fixture
def admin(database: Database) -> Iterator[Connection]:
    """A connection of the database's owner, past the pooler, in autocommit."""
    with database.connect() as connection:
        yield connection


@pytest.fixture
def supabase(database: Database) -> Supabase:
    """The way into the test's database for the code under test."""
    return database.supabase
