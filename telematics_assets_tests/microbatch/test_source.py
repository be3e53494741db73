"""What the system catalogs say about a table, and which database it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from telematics_assets.errors import ReplicationError
from telematics_assets.microbatch.connection import Supabase
from telematics_assets.microbatch.session import transaction
from telematics_assets.microbatch.source import SourceTable, checked_key, database_identity, describe, literal, quoted
from telematics_assets_tests.databases import Connection, Database


def described(supabase: Supabase, source: str) -> SourceTable:
    with transaction(supabase) as session:
        return describe(session, source)


def identity(supabase: Supabase) -> str:
    with transaction(supabase) as session:
        return database_identity(session)


def test_a_table_is_described_with_its_columns_key_and_comments(database: Database) -> None:
    database.run(
        "CREATE TYPE state AS ENUM ('open', 'closed')",
        """CREATE TABLE policies (
            region text, gone int4, number int8 GENERATED ALWAYS AS IDENTITY, premium numeric(12,2) NOT NULL,
            state state, tags text[], doubled numeric GENERATED ALWAYS AS (premium * 2) STORED,
            virtual int8 GENERATED ALWAYS AS (number + 1) VIRTUAL, grid int4[][],
            PRIMARY KEY (number, region))""",
        "ALTER TABLE policies DROP COLUMN gone",
        "COMMENT ON TABLE policies IS 'Policies.'",
        "COMMENT ON COLUMN policies.premium IS 'A year''s premium.'",
    )
    table = described(database.supabase, "public.policies")

    assert (table.kind, table.comment, table.key, table.row_security) == (
        "table",
        "Policies.",
        ("number", "region"),
        False,
    )
    columns = {
        c.name: (c.number, c.type, c.base, c.element, c.dimensions, c.not_null, c.comment) for c in table.columns
    }
    assert columns == {
        "region": (1, "text", "text", None, 0, True, None),
        "number": (3, "bigint", "int8", None, 0, True, None),
        "premium": (4, "numeric(12,2)", "numeric", None, 0, True, "A year's premium."),
        "state": (5, "public.state", "enum", None, 0, False, None),
        "tags": (6, "text[]", "_text", "text", 1, False, None),
        "doubled": (7, "numeric", "numeric", None, 0, False, None),
        "virtual": (8, "bigint", "int8", None, 0, False, None),
        "grid": (9, "integer[]", "_int4", "int4", 2, False, None),
    }


def test_a_domain_is_its_base_type_through_all_its_layers(database: Database) -> None:
    database.run(
        "CREATE DOMAIN amount AS numeric(9,3)",
        "CREATE DOMAIN price AS amount CHECK (VALUE > 0)",
        "CREATE DOMAIN grid AS int4[][]",
        "CREATE TABLE t (price price PRIMARY KEY, grid grid, prices price[])",
    )
    price, grid, prices = described(database.supabase, "public.t").columns
    assert (price.type, price.base, price.modifier) == ("public.price", "numeric", (9 << 16 | 3) + 4)
    assert (grid.base, grid.element, grid.dimensions) == ("_int4", "int4", 2)
    assert (prices.base, prices.element) == ("public._price", "domain")


@pytest.mark.parametrize(
    ("definition", "kind"),
    [
        ("CREATE TABLE t (id int8 PRIMARY KEY) PARTITION BY RANGE (id)", "partitioned table"),
        ("CREATE VIEW t AS SELECT 1 AS id", "view"),
        ("CREATE MATERIALIZED VIEW t AS SELECT 1 AS id", "materialized view"),
        ("CREATE UNLOGGED TABLE t (id int8)", "table"),
    ],
)
def test_every_kind_of_table_is_told(database: Database, definition: str, kind: str) -> None:
    database.run(definition)
    assert described(database.supabase, "public.t").kind == kind


def test_partitions_belong_to_their_table_and_inheriting_tables_do_not(database: Database) -> None:
    database.run(
        "CREATE TABLE parted (id int8 PRIMARY KEY) PARTITION BY RANGE (id)",
        "CREATE TABLE part PARTITION OF parted DEFAULT",
        "INSERT INTO parted VALUES (1)",
        "CREATE TABLE parent (id int8 PRIMARY KEY)",
        "CREATE TABLE child () INHERITS (parent)",
        "INSERT INTO parent VALUES (1)",
        "INSERT INTO child VALUES (1)",
    )
    with transaction(database.supabase) as session:
        parted, parent = describe(session, "public.parted"), describe(session, "public.parent")
        assert (parted.children, parent.children) == (0, 1)
        assert session.value(f"SELECT count(*) FROM {parted.rows_sql}") == 1
        assert session.value(f"SELECT count(*) FROM {parent.rows_sql}") == 1


def test_odd_names_are_quoted(database: Database, admin: Connection) -> None:
    name = """we"ird 'na\\me' é"""
    admin.execute(f"CREATE TABLE public.{quoted(name)} ({quoted(name)} int8 PRIMARY KEY)")
    with transaction(database.supabase) as session:
        table = describe(session, f"public.{name}")
        assert table.key == (name,)
        assert session.value(f"SELECT count(*) FROM {table.rows_sql}") == 0
        assert session.value(f"SELECT {literal(name)}::text") == name


@pytest.mark.parametrize("definition", ["", "CREATE SEQUENCE t", "CREATE INDEX t ON other (id)"])
def test_what_is_no_table_is_refused(database: Database, definition: str) -> None:
    database.run("CREATE TABLE other (id int8)", definition or "SELECT 1")
    with pytest.raises(ReplicationError, match=r"no table public\.t.*supabase discover"):
        described(database.supabase, "public.t")


def test_a_table_that_the_role_may_not_read_is_refused(database: Database) -> None:
    database.run("CREATE TABLE t (id int8 PRIMARY KEY)", f"REVOKE ALL ON t FROM {database.role}")
    with pytest.raises(ReplicationError, match=r"may not read public\.t.*supabase sql"):
        described(database.supabase, "public.t")


# -- keys --------------------------------------------------------------------------------------------------------------


def test_a_unique_key_may_stand_in_for_the_primary_key(database: Database) -> None:
    database.run(
        "CREATE TABLE t (a int8 NOT NULL, b text NOT NULL, c int8 UNIQUE, d int8 NOT NULL)",
        "CREATE UNIQUE INDEX ON t (a, b) INCLUDE (d)",
        "CREATE UNIQUE INDEX ON t (d) WHERE a > 0",
        "CREATE UNIQUE INDEX ON t (lower(b))",
        "CREATE INDEX ON t (d)",
    )
    table = described(database.supabase, "public.t")
    assert (table.key, table.unique_keys) == ((), (("a", "b"),))
    assert checked_key(table, ("b", "a")) == ("b", "a")
    for bad in (("a",), ("c",), ("d",), ("b",), ("a", "b", "d")):
        with pytest.raises(ReplicationError, match="is no key in the database"):
            checked_key(table, bad)
    with pytest.raises(ReplicationError, match=r"no primary key.*key=\('a', 'b'\)"):
        checked_key(table)
    with pytest.raises(ReplicationError, match="no column nope"):
        checked_key(table, ("nope",))


def test_a_table_without_any_key_is_told_what_to_do(database: Database) -> None:
    database.run("CREATE TABLE t (a int8)", "CREATE VIEW v AS SELECT * FROM t")
    with pytest.raises(ReplicationError, match="ADD PRIMARY KEY"):
        checked_key(described(database.supabase, "public.t"))
    view = described(database.supabase, "public.v")
    with pytest.raises(ReplicationError, match="Declare key="):
        checked_key(view)
    assert checked_key(view, ("a",)) == ("a",)


# -- which database it is ----------------------------------------------------------------------------------------------


def test_each_database_has_an_identity_that_stays(database: Database) -> None:
    other = replace(database.supabase, database="postgres")
    assert identity(database.supabase) == identity(database.supabase)
    assert identity(database.supabase) != identity(other)


def test_where_the_server_does_not_tell_its_identity_a_marker_does(database: Database) -> None:
    database.run("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC")
    with pytest.raises(ReplicationError, match=r"pg_control_system.*telematics\.source_identity"):
        identity(database.supabase)
    database.run(
        "CREATE SCHEMA telematics",
        "CREATE TABLE telematics.source_identity (identity uuid)",
        "INSERT INTO telematics.source_identity VALUES ('12345678-1234-1234-1234-123456789abc')",
        f"GRANT USAGE ON SCHEMA telematics TO {database.role}",
        f"GRANT SELECT ON telematics.source_identity TO {database.role}",
    )
    assert identity(database.supabase).startswith("12345678-1234-1234-1234-123456789abc-")
