"""Every PostgreSQL type has a stated fate, and the docs state the same."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from telematics_assets.errors import ReplicationError, SettingsError
from telematics_assets.lakehouse.types import delta_type, storable
from telematics_assets.microbatch.extract import Anomalies, extract
from telematics_assets.microbatch.session import transaction
from telematics_assets.microbatch.source import SourceColumn, SourceTable, describe, quoted
from telematics_assets.microbatch.types import arrow_schema, numeric_digits, plan_columns, select_list
from telematics_assets_tests.databases import Connection, Database

#: Pseudo-types and row types of the catalogs are no types of a column; arrays have a column of their own in the docs.
_TYPES = """
SELECT typname FROM pg_type t WHERE typnamespace = 'pg_catalog'::regnamespace AND typtype NOT IN ('p', 'c')
AND NOT EXISTS (SELECT FROM pg_type e WHERE e.typarray = t.oid)
"""


def told() -> dict[str, tuple[str, str | None]]:
    """What the docs say: type -> Delta type, Delta type of its array."""
    text = (Path(__file__).parents[2] / "docs" / "supabase-types.md").read_text(encoding="utf-8")
    found: dict[str, tuple[str, str | None]] = {}
    for line in text.splitlines():
        if not line.startswith("| `"):
            continue
        kinds, deltas, arrays = (re.findall("`([^`]+)`", cell) for cell in line.split(" | ")[:3])
        for cells in (deltas, arrays):
            assert len(cells) in (0, 1, len(kinds)), line
        for number, kind in enumerate(kinds):
            assert kind not in found, kind
            found[kind] = (deltas[number % len(deltas)], arrays[number % len(arrays)] if arrays else None)
    return found


def test_the_docs_leave_no_type_of_the_server_out(admin: Connection) -> None:
    named = {re.sub(r"\(.*\)", "", kind).strip('"') for kind in told()}
    assert named == {name for (name,) in admin.execute(_TYPES)}


def test_the_table_in_the_docs_says_what_the_code_does(database: Database) -> None:
    columns: dict[str, tuple[str, str]] = {}
    for number, (kind, (delta, array)) in enumerate(told().items()):
        columns[f"v{number}"] = (f"pg_catalog.{kind}", delta)
        if array is not None:
            columns[f"a{number}"] = (f"pg_catalog.{kind}[]", array)
    database.run(f"CREATE TABLE everything ({', '.join(f'{name} {kind}' for name, (kind, _) in columns.items())})")
    with transaction(database.supabase) as session:
        plans = plan_columns(describe(session, "public.everything"))
    assert {plan.name: delta_type(plan.arrow) for plan in plans} == {
        name: delta for name, (_, delta) in columns.items()
    }


def test_a_column_of_every_type_of_the_server_can_be_read(database: Database, admin: Connection) -> None:
    creatable = []
    for (name,) in admin.execute(
        "SELECT typname FROM pg_type WHERE typnamespace = 'pg_catalog'::regnamespace AND typtype <> 'p'"
    ):
        kind = f"pg_catalog.{quoted(name)}"
        try:
            admin.execute(f"CREATE TEMP TABLE probe (c {kind}); DROP TABLE probe")
            creatable.append(kind)
        except psycopg.Error as error:
            # Row types of catalogs with columns that no table of a user can have.
            if "pseudo-type" not in str(error):
                raise
    assert len(creatable) > 400
    columns = ", ".join(f"c{number} {kind}" for number, kind in enumerate(creatable))
    database.run(f"CREATE TABLE everything ({columns})", "INSERT INTO everything DEFAULT VALUES")
    with transaction(database.supabase) as session:
        plans = plan_columns(describe(session, "public.everything"))
        anomalies = Anomalies()
        (batch,) = extract(session, "public.everything", plans, anomalies=anomalies)
    assert batch.num_columns == len(creatable)
    assert all(column.null_count == 1 for column in batch.columns)
    assert all(storable(field.type) == field.type for field in batch.schema)
    assert anomalies.found == ()


def test_types_of_users_arrive_as_text_or_as_what_they_are_made_of(database: Database) -> None:
    database.run(
        "CREATE TYPE state AS ENUM ('open', 'it''s closed')",
        "CREATE TYPE address AS (street text, number int4, moved date)",
        "CREATE TYPE speeds AS RANGE (subtype = float8)",
        "CREATE DOMAIN amount AS numeric(9,3)",
        "CREATE DOMAIN price AS amount CHECK (VALUE > 0)",
        "CREATE DOMAIN tags AS text[]",
        "CREATE DOMAIN instant AS timestamptz",
        """CREATE TABLE t (
            id int8 PRIMARY KEY, state state, states state[], address address, addresses address[], speeds speeds,
            manyspeeds speeds_multirange, price price, prices price[], tags tags, instant instant, grid int4[][])""",
        """INSERT INTO t VALUES (1, 'open', '{open,NULL,"it''s closed"}', ('High "St"', 1, '2020-01-31'),
            ARRAY[('a', 1, NULL)::address], '[0.1,2)', '{[0.1,2)}', 1.5, '{1.5,NULL}', '{a,NULL}',
            '2020-01-01 00:00+02', '{{1,2},{3,4}}')""",
    )
    with transaction(database.supabase) as session:
        plans = plan_columns(describe(session, "public.t"))
        anomalies = Anomalies()
        (batch,) = extract(session, "public.t", plans, anomalies=anomalies)
    (row,) = batch.to_pylist()
    kinds = {plan.name: delta_type(plan.arrow) for plan in plans}
    assert {name: (kinds[name], str(value)) for name, value in row.items()} == {
        "id": ("BIGINT", "1"),
        "state": ("STRING", "open"),
        "states": ("ARRAY<STRING>", """['open', None, "it's closed"]"""),
        "address": ("STRING", '("High ""St""",1,2020-01-31)'),
        "addresses": ("ARRAY<STRING>", "['(a,1,)']"),
        "speeds": ("STRING", "[0.1,2)"),
        "manyspeeds": ("STRING", "{[0.1,2)}"),
        "price": ("DECIMAL(9,3)", "1.500"),
        "prices": ("ARRAY<STRING>", "['1.500', None]"),
        "tags": ("ARRAY<STRING>", "['a', None]"),
        "instant": ("TIMESTAMP", "2019-12-31 22:00:00+00:00"),
        "grid": ("STRING", "{{1,2},{3,4}}"),
    }
    assert anomalies.found == ()


@pytest.mark.parametrize(
    "setting",
    [
        *("DateStyle = 'German, DMY'", "IntervalStyle = 'sql_standard'", "TimeZone = 'Asia/Kolkata'"),
        *("bytea_output = 'escape'", "extra_float_digits = -3", "client_encoding = 'SQL_ASCII'"),
        "search_path = odd",
    ],
)
def test_texts_do_not_depend_on_the_settings_of_role_and_database(database: Database, setting: str) -> None:
    columns = {
        "days": ("daterange '[2020-01-31,2020-02-01)'", "[2020-01-31,2020-02-01)"),
        "span": ("interval '1 mon 2 days 3.5 s'", "P1M2DT3.5S"),
        "moments": ("tstzrange '[2020-01-01 00:00+00,)'", '["2020-01-01 00:00:00+00",)'),
        "pair": ("row('\\x00ff'::bytea, 0.1::float8)::pair", r'("\\x00ff",0.1)'),
        "spot": ("point '(0.1,1e300)'", "(0.1,1e+300)"),
        "class": ("'pg_class'::regclass", "pg_class"),
        "own": ("'public.t'::regclass", "public.t"),
        "umlaut": ("'größe'::text", "größe"),
    }
    database.run(
        "CREATE SCHEMA odd",
        "CREATE TYPE pair AS (b bytea, f float8)",
        "CREATE TABLE t (id int8 PRIMARY KEY)",
        f"CREATE VIEW v AS SELECT {', '.join(f'{value} AS {quoted(name)}' for name, (value, _) in columns.items())}",
        f"ALTER ROLE {database.role} SET {setting}",
        f"ALTER DATABASE {database.name} SET {setting}",
    )
    with transaction(database.supabase) as session:
        plans = plan_columns(describe(session, "public.v"))
        (batch,) = extract(session, "public.v", plans, anomalies=Anomalies())
    assert batch.to_pylist() == [{name: text for name, (_, text) in columns.items()}]


def test_text_of_a_database_with_another_encoding_arrives_as_unicode(database: Database, admin: Connection) -> None:
    name = f"{database.name}_latin"
    admin.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' TEMPLATE template0")
    try:
        with psycopg.connect(database.server.url(name), autocommit=True) as latin:
            latin.execute("CREATE TABLE public.t (größe text PRIMARY KEY)")
            latin.execute("INSERT INTO public.t VALUES ('müde')")
            latin.execute(f"GRANT SELECT ON public.t TO {database.role}")
        with transaction(replace(database.supabase, database=name)) as session:
            plans = plan_columns(describe(session, "public.t"))
            (batch,) = extract(session, "public.t", plans, anomalies=Anomalies())
        assert batch.to_pylist() == [{"größe": "müde"}]
    finally:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_text_of_a_database_without_an_encoding_is_refused(database: Database, admin: Connection) -> None:
    name = f"{database.name}_ascii"
    admin.execute(f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' TEMPLATE template0")
    try:
        other = replace(database.supabase, database=name)
        with pytest.raises(ReplicationError, match="SQL_ASCII"), transaction(other) as session:
            describe(session, "pg_catalog.pg_class")
    finally:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_a_setting_that_blinds_the_driver_is_named(database: Database) -> None:
    database.run("CREATE TABLE t (id int8)", f"ALTER ROLE {database.role} SET quote_all_identifiers = on")
    with pytest.raises(ReplicationError, match="quote_all_identifiers"), transaction(database.supabase) as session:
        describe(session, "public.t")


# -- digits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "digits"),
    [
        ("numeric", None),
        ("numeric(1)", (1, 0)),
        ("numeric(38,38)", (38, 38)),
        ("numeric(38,0)", (38, 0)),
        ("numeric(39,0)", None),
        ("numeric(1000,1000)", None),
        ("numeric(1,-37)", (38, 0)),
        ("numeric(1,-38)", None),
        ("numeric(1,-1000)", None),
        ("numeric(1,38)", (38, 38)),
        ("numeric(1,39)", None),
    ],
)
def test_the_digits_of_a_number_are_read_from_its_modifier(
    admin: Connection, declared: str, digits: tuple[int, int] | None
) -> None:
    admin.execute(f"CREATE TABLE t (n {declared})")
    query = "SELECT atttypmod FROM pg_attribute WHERE attrelid = 't'::regclass AND attname = 'n'"
    ((modifier,),) = admin.execute(query).fetchall()
    assert numeric_digits(modifier) == digits


# -- which columns, by which names -------------------------------------------------------------------------------------


def table(*names: str, key: tuple[str, ...] = ()) -> SourceTable:
    columns = tuple(
        SourceColumn(name, number, "text", "text", None, 0, -1, False, f"Comment of {name}.")
        for number, name in enumerate(names, 1)
    )
    return SourceTable("public", "t", 1, "table", columns, key, None, 0, False)


def test_columns_carry_their_comment_and_what_they_were() -> None:
    schema = arrow_schema(plan_columns(table("a", "b"), hashed=("b",), hash_key="0123456789abcdef"))
    assert schema.field("a").metadata == {b"comment": b"Comment of a. PostgreSQL: text."}
    comment = schema.field("b").metadata[b"comment"].decode()
    assert re.fullmatch(r"Comment of b\. Keyed hash \(HMAC-SHA-256, key [0-9a-f]{8}\) of text\.", comment)
    assert schema.field("a").nullable


def test_names_that_delta_can_not_hold_are_spelled_with_underscores() -> None:
    plans = plan_columns(table("Order Date", "a,b", "größe", "a.b", "`"))
    assert [plan.name for plan in plans] == ["Order_Date", "a_b", "größe", "a.b", "`"]
    assert '"Order Date" AS c0' in select_list(plans)


@pytest.mark.parametrize("names", [("Name", "name"), ("a b", "a_b"), ("a b", "a,B")])
def test_names_that_would_meet_in_bronze_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ReplicationError, match="would both be"):
        plan_columns(table(*names))
    assert [plan.source for plan in plan_columns(table(*names), exclude=names[:1])] == [names[1]]


def test_a_key_keeps_its_name() -> None:
    with pytest.raises(ReplicationError, match="part of the key"):
        plan_columns(table("order no", "b", key=("order no",)))
    plans = plan_columns(table("order no", "b", key=("order no",)), key=("b",))
    assert [plan.required for plan in plans] == [False, True]


@pytest.mark.parametrize("option", ["exclude", "hash"])
def test_a_column_that_is_gone_may_not_arrive_under_another_name(option: str) -> None:
    exclude, hashed = (("email",), ()) if option == "exclude" else ((), ("email",))
    with pytest.raises(ReplicationError, match=rf"no column email.*under {option}"):
        plan_columns(table("id", "email_address"), exclude, hashed, "0123456789abcdef")


def test_something_must_be_left() -> None:
    with pytest.raises(ReplicationError, match="No column"):
        plan_columns(table("a"), exclude=("a",))


def test_more_columns_than_postgres_selects_are_refused(database: Database) -> None:
    def made(arrays: int) -> tuple[int, bool]:
        columns = ", ".join(f"c{number} int4[]" for number in range(arrays))
        database.run("DROP TABLE IF EXISTS wide", f"CREATE TABLE wide (id int8 PRIMARY KEY, {columns})")
        with transaction(database.supabase) as session:
            plans = plan_columns(describe(session, "public.wide"))
            return len(plans), list(extract(session, "public.wide", plans, anomalies=Anomalies())) == []

    assert made(831) == (832, True)
    with pytest.raises(ReplicationError, match=r"makes 1665.*no more than 1664"):
        made(832)


@pytest.mark.parametrize("key", [None, "", "short and bad"])
def test_hashes_need_a_long_key_that_no_message_shows(key: str | None) -> None:
    with pytest.raises(SettingsError, match="SUPABASE_HASH_KEY") as failure:
        plan_columns(table("a"), hashed=("a",), hash_key=key)
    assert not key or key not in str(failure.value)


def test_the_key_of_hashes_is_not_shown() -> None:
    (plan,) = plan_columns(table("a"), hashed=("a",), hash_key="a secret of the tests")
    assert "secret" not in repr(plan) + plan.comment + plan.expression
