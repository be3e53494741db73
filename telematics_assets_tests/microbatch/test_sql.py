"""The SQL of mode `row_xid`, run on a real server: what it records, who may run it, and that it goes again."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from telematics_assets.microbatch.session import transaction
from telematics_assets.microbatch.sql import TableSetup, setup_sql, undo_sql
from telematics_assets_tests.databases import Connection, Database, through

POLICIES = TableSetup("public", "policies", ("id",))


@dataclass
class Owner:
    """A role as Supabase's `postgres`: no superuser, but it owns the database and may make roles that pass policies."""

    database: Database
    name: str
    reader: str
    connection: Connection

    def run(self, *statements: str) -> None:
        for statement in statements:
            self.connection.execute(statement)

    def rows(self, query: str) -> list[Any]:
        return self.connection.execute(query).fetchall()

    def prepare(self, *tables: TableSetup, bigint: bool = False) -> None:
        self.run(setup_sql(tables, role=self.reader, bigint=bigint))

    def tombstones(self, table: str) -> list[Any]:
        """The keys in the order in which they were noted."""
        query = f"SELECT key FROM telematics.tombstones WHERE source = '{table}'::regclass ORDER BY id"
        return [key for (key,) in self.rows(query)]


@pytest.fixture
def owner(database: Database, admin: Connection) -> Iterator[Owner]:
    name, reader = (f"{kind}_{uuid.uuid4().hex[:12]}" for kind in ("owner", "telematics"))
    password = secrets.token_urlsafe(12)
    admin.execute(f"CREATE ROLE {name} LOGIN CREATEROLE BYPASSRLS PASSWORD '{password}'")
    admin.execute(f"ALTER DATABASE {database.name} OWNER TO {name}")
    where = f"host=127.0.0.1 port={database.server.port} user={name} password={password} dbname={database.name}"
    try:
        with psycopg.connect(where, autocommit=True) as connection:
            yield Owner(database, name, reader, connection)
    finally:
        admin.execute(f"ALTER DATABASE {database.name} OWNER TO postgres")
        for role in (reader, name):
            if admin.execute(f"SELECT FROM pg_roles WHERE rolname = '{role}'").fetchone() is not None:
                admin.execute(f"DROP OWNED BY {role}")
                admin.execute(f"DROP ROLE {role}")


def test_every_write_is_marked_with_its_transaction(owner: Owner) -> None:
    owner.run("CREATE TABLE policies (id int PRIMARY KEY, premium numeric)", "INSERT INTO policies VALUES (1, 10)")
    owner.prepare(POLICIES)
    assert owner.rows("SELECT row_xid FROM policies") == [(None,)]

    with owner.connection.transaction():
        (current,) = owner.rows("SELECT pg_current_xact_id()::text")[0]
        owner.run("INSERT INTO policies VALUES (2, 20, '7')")
        with owner.connection.transaction():
            owner.run("UPDATE policies SET premium = 11, row_xid = NULL WHERE id = 1")

    assert owner.rows("SELECT DISTINCT row_xid::text FROM policies") == [(current,)]


@pytest.mark.parametrize("bigint", [False, True])
def test_the_position_column_is_of_the_type_that_was_asked_for_and_is_read_by_its_index(
    owner: Owner, bigint: bool
) -> None:
    owner.run("CREATE TABLE policies (id int PRIMARY KEY)")
    owner.prepare(POLICIES, bigint=bigint)
    owner.prepare(POLICIES)  # whoever runs it again without saying so keeps what is there
    owner.run("INSERT INTO policies SELECT generate_series(1, 2000)", "ANALYZE policies")

    kind = "bigint" if bigint else "xid8"
    assert owner.rows("SELECT DISTINCT pg_typeof(row_xid)::text FROM policies") == [(kind,)]
    plan = owner.rows(f"EXPLAIN SELECT * FROM policies WHERE row_xid >= '9999999'::{kind}")
    assert "policies_row_xid_telematics" in str(plan)


def test_deletes_changed_keys_and_truncates_leave_tombstones_and_a_rolled_back_one_none(owner: Owner) -> None:
    owner.run("CREATE TABLE policies (id int PRIMARY KEY, premium numeric)")
    owner.prepare(POLICIES)
    owner.run("INSERT INTO policies SELECT n, n FROM generate_series(1, 6) n", "DELETE FROM policies WHERE id = 1")
    with pytest.raises(psycopg.errors.DivisionByZero), owner.connection.transaction():
        owner.run("DELETE FROM policies", "SELECT 1 / 0")
    owner.run(
        "UPDATE policies SET id = 20 WHERE id = 2",
        "UPDATE policies SET premium = premium + 1",
        "INSERT INTO policies VALUES (3) ON CONFLICT (id) DO UPDATE SET id = 30",
    )
    assert owner.tombstones("policies") == [["1"], ["2"], ["3"]]

    owner.run("TRUNCATE policies")
    assert owner.tombstones("policies")[3:] == [None]
    same = "SELECT count(DISTINCT row_xid), count(*) FROM telematics.tombstones"
    assert owner.rows(same) == [(4, 4)]


def test_keys_of_all_types_are_noted_as_the_text_that_the_reader_sees(owner: Owner) -> None:
    columns = {
        "a": ("timestamptz", "2026-03-29 01:30:00.000001+00"),
        "b": ("float8", "0.1"),
        "c": ("bytea", "\\x00ff"),
        "d": ("interval", "1 year 2 mons 3 days 04:05:06.7"),
        "e": ("uuid", "b2f7e5a0-0000-4000-8000-00000000000a"),
        "f": ("numeric", "1.10"),
        "g": ("text", 'it\'s \\ "odd" {} ,'),
        "h": ("date", "4713-01-01 BC"),
        "i": ("bool", "true"),
        "j": ("int4[]", "{1,2}"),
        "k": ("jsonb", '{"b": 1.0, "a": null}'),
        "l": ('"char"', "x"),
        "m": ("kind", "b c"),
    }
    owner.run("CREATE TYPE kind AS ENUM ('a', 'b c')")
    declared = ", ".join(f"{name} {kind}" for name, (kind, _) in columns.items())
    owner.run(f"CREATE TABLE policies ({declared}, PRIMARY KEY ({', '.join(columns)}))")
    owner.prepare(TableSetup("public", "policies", tuple(columns)))
    # Whatever the deleting session has set, the text is the same.
    owner.run("SET TimeZone = 'Asia/Tokyo'", "SET DateStyle = 'SQL, DMY'", "SET IntervalStyle = 'sql_standard'")
    owner.run("SET extra_float_digits = -15", "SET bytea_output = 'escape'")
    quoted = ", ".join("'" + value.replace("'", "''") + "'" for _, value in columns.values())
    owner.run("SET DateStyle = 'ISO'", f"INSERT INTO policies VALUES ({quoted})", "SET DateStyle = 'SQL, DMY'")
    owner.run(f"GRANT SELECT ON policies TO {owner.database.role}")
    with transaction(owner.database.supabase) as session:
        read = session.rows(f"SELECT {', '.join(f'{name}::text' for name in columns)} FROM public.policies")[0]

    owner.run("DELETE FROM policies")
    (key,) = owner.tombstones("policies")

    assert key == list(read.values())
    owner.run("RESET ALL", f"INSERT INTO policies VALUES ({quoted})")
    back = ", ".join(f"(key[{number}])::{kind}" for number, (kind, _) in enumerate(columns.values(), 1))
    where = f"({', '.join(columns)}) = ({back})"
    assert owner.rows(f"SELECT count(*) FROM policies, telematics.tombstones WHERE {where}") == [(1,)]


def test_partitions_leave_tombstones_under_the_name_of_the_whole(owner: Owner) -> None:
    owner.run(
        "CREATE TABLE policies (id int, year int, PRIMARY KEY (year, id)) PARTITION BY LIST (year)",
        "CREATE TABLE policies_1 PARTITION OF policies FOR VALUES IN (1)",
        "CREATE TABLE policies_2 PARTITION OF policies FOR VALUES IN (2) PARTITION BY LIST (id)",
        "CREATE TABLE policies_2_all PARTITION OF policies_2 DEFAULT",
    )
    table = TableSetup("public", "policies", ("year", "id"), partitioned=True)
    owner.prepare(table)
    owner.run(
        "CREATE TABLE policies_3 PARTITION OF policies FOR VALUES IN (3)",
        "INSERT INTO policies (id, year) VALUES (1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3)",
        "DELETE FROM policies_1 WHERE id = 1",
        "UPDATE policies SET year = 2 WHERE id = 2",
        "DELETE FROM policies WHERE id = 5",
        "TRUNCATE policies_2_all",
    )

    assert owner.rows("SELECT count(*) FROM policies WHERE row_xid IS NULL") == [(0,)]
    assert owner.tombstones("policies") == [["1", "1"], ["1", "2"], ["3", "5"], None]
    owner.run(undo_sql([table], role=owner.reader, everything=True))
    assert owner.rows("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'zz_telematics%'") == [(0,)]


def test_odd_names_are_quoted_and_long_ones_kept_apart(owner: Owner) -> None:
    long = "x" * 62
    tables = [
        TableSetup('Odd"S', "My$$Table's", ("a b", 'K"ey'), position="$t2$ pos'"),
        *(TableSetup("public", f"{long}{end}", ("id",)) for end in "ab"),
    ]
    owner.run(
        'CREATE SCHEMA "Odd""S"',
        'CREATE TABLE "Odd""S"."My$$Table\'s" ("a b" int, "K""ey" text, PRIMARY KEY ("a b", "K""ey"))',
        *(f"CREATE TABLE {long}{end} (id int PRIMARY KEY)" for end in "ab"),
    )
    for _ in range(2):
        owner.prepare(*tables)
        owner.run('INSERT INTO "Odd""S"."My$$Table\'s" VALUES (1, \'é\')')
        for statement in ('DELETE FROM "Odd""S"."My$$Table\'s"', f"TRUNCATE {long}a", f"TRUNCATE {long}b"):
            owner.run(statement)
        assert owner.rows("SELECT key FROM telematics.tombstones WHERE key IS NOT NULL") == [(["1", "é"],)]
        assert owner.rows("SELECT count(DISTINCT source) FROM telematics.tombstones") == [(3,)]
        for _ in range(2):
            owner.run(undo_sql(tables, role=owner.reader, everything=True))

    assert owner.rows(f"SELECT FROM pg_roles WHERE rolname = '{owner.reader}'") == []
    ours = "SELECT FROM pg_namespace WHERE nspname = 'telematics'"
    assert owner.rows(ours) == []
    left = "SELECT FROM pg_attribute WHERE attname IN ('row_xid', '$t2$ pos''') AND attrelid >= 16384"
    assert owner.rows(left) == []


def test_a_renamed_key_column_keeps_nobody_from_deleting_and_is_noted_once_per_transaction(owner: Owner) -> None:
    owner.run("CREATE TABLE policies (id int PRIMARY KEY)")
    owner.prepare(POLICIES)
    owner.run("INSERT INTO policies SELECT generate_series(1, 9)", "ALTER TABLE policies RENAME id TO policy_id")
    owner.run("ALTER TABLE policies ALTER policy_id TYPE text", "DELETE FROM policies WHERE policy_id < '5'")
    assert owner.tombstones("policies") == [None]

    owner.prepare(TableSetup("public", "policies", ("policy_id",)))
    owner.run("DELETE FROM policies WHERE policy_id = '9'")
    assert owner.tombstones("policies") == [None, ["9"]]


def test_rows_of_a_replicating_session_are_noted_too(owner: Owner, admin: Connection) -> None:
    owner.run("CREATE TABLE policies (id int PRIMARY KEY)")
    owner.prepare(POLICIES)
    admin.execute("SET session_replication_role = replica")
    admin.execute("INSERT INTO policies VALUES (1), (2)")
    admin.execute("DELETE FROM policies WHERE id = 1")

    assert owner.rows("SELECT row_xid IS NOT NULL FROM policies") == [(True,)]
    assert owner.tombstones("policies") == [["1"]]


def test_pruning_says_below_what_it_pruned(owner: Owner) -> None:
    owner.run("CREATE TABLE policies (id int PRIMARY KEY)", "CREATE TABLE claims (id int PRIMARY KEY)")
    owner.prepare(POLICIES, TableSetup("public", "claims", ("id",)))
    owner.run("INSERT INTO policies VALUES (1), (2)", "INSERT INTO claims VALUES (1)")
    owner.run("DELETE FROM policies WHERE id = 1", "DELETE FROM claims")
    assert owner.rows("SELECT telematics.prune_tombstones('1 hour')") == [(0,)]
    owner.run(
        "UPDATE telematics.tombstones SET deleted_at = now() - interval '2 hours' WHERE source = 'policies'::regclass"
    )
    (highest,) = owner.rows(
        "SELECT row_xid::text::int8 FROM telematics.tombstones WHERE source = 'policies'::regclass"
    )[0]
    owner.run("DELETE FROM policies")

    assert owner.rows("SELECT telematics.prune_tombstones('1 hour')") == [(1,)]
    published = owner.rows("SELECT source::regclass::text, pruned_below::text::int8 FROM telematics.pruned")
    assert published == [("policies", highest + 1)]
    assert owner.tombstones("policies") == [["2"]]
    assert owner.connection.execute("SELECT telematics.prune_tombstones(%s)", [timedelta()]).fetchall() == [(2,)]
    assert len(owner.rows("SELECT FROM telematics.pruned")) == 2


def test_the_reader_sees_all_rows_and_can_do_nothing_else(owner: Owner) -> None:
    owner.run(
        "CREATE TABLE policies (id int PRIMARY KEY)",
        "CREATE TABLE secrets (id int PRIMARY KEY)",
        "ALTER TABLE policies ENABLE ROW LEVEL SECURITY",
        "ALTER TABLE policies FORCE ROW LEVEL SECURITY",
    )
    owner.prepare(POLICIES)
    owner.run(f"ALTER ROLE {owner.reader} PASSWORD 'of its own'", "INSERT INTO policies VALUES (1)")
    reader = through(owner.database.pooler, owner.reader, "of its own", owner.database.name)
    with transaction(reader) as session:
        session.run("LOCK TABLE public.policies IN ACCESS SHARE MODE")
        assert session.value("SELECT count(*) FROM public.policies") == 1
        assert session.value("SELECT count(*) FROM telematics.tombstones") == 0
        assert session.value("SELECT identity::text FROM telematics.source_identity")

    with psycopg.connect(
        f"host=127.0.0.1 port={owner.database.server.port} user={owner.reader} dbname={owner.database.name}",
        password="of its own",
        autocommit=True,
    ) as connection:
        for statement in (
            "INSERT INTO policies VALUES (2)",
            "DELETE FROM policies",
            "SELECT FROM secrets",
            "DELETE FROM telematics.tombstones",
            "SELECT telematics.prune_tombstones()",
            "CREATE TABLE telematics.mine (id int)",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement)


def test_an_application_that_may_only_delete_leaves_tombstones_all_the_same(owner: Owner) -> None:
    owner.run("CREATE TABLE policies (id int PRIMARY KEY)")
    owner.prepare(POLICIES)
    owner.run(
        "INSERT INTO policies VALUES (1)", f"CREATE ROLE {owner.name}_app", f"GRANT {owner.name}_app TO {owner.name}"
    )
    try:
        owner.run(f"GRANT DELETE, INSERT ON policies TO {owner.name}_app", f"SET ROLE {owner.name}_app")
        owner.run("INSERT INTO policies VALUES (2)", "DELETE FROM policies", "RESET ROLE")
        assert sorted(owner.tombstones("policies")) == [["1"], ["2"]]
    finally:
        owner.run("RESET ROLE", f"DROP OWNED BY {owner.name}_app", f"DROP ROLE {owner.name}_app")


def test_who_cannot_let_the_reader_pass_policies_is_told_so_and_nothing_is_half_done(
    owner: Owner, admin: Connection
) -> None:
    owner.run("CREATE TABLE policies (id int PRIMARY KEY)")
    admin.execute(f"ALTER ROLE {owner.name} NOBYPASSRLS")
    owner.prepare(POLICIES)  # nothing is filtered, so nothing is amiss
    owner.run("ALTER TABLE policies ENABLE ROW LEVEL SECURITY")
    with pytest.raises(psycopg.errors.RaiseException, match="Policies filter") as refused:
        owner.prepare(POLICIES, TableSetup("public", "policies", ("id",), position="other"))
    assert "BYPASSRLS" in str(refused.value.diag.message_hint)
    owner.run("ROLLBACK")
    assert owner.rows("SELECT FROM pg_attribute WHERE attname = 'other'") == []
