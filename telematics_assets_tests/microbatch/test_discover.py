"""What a database has, what is suggested for it, and what is said when it and the declarations have drifted apart."""

from __future__ import annotations

import pytest

from telematics_assets.catalog import Column, ReplicatedTable, TableContract
from telematics_assets.errors import ReplicationError
from telematics_assets.microbatch.connection import Supabase
from telematics_assets.microbatch.discover import (
    FoundTable,
    Suggestion,
    declarations,
    drift,
    find_tables,
    suggest,
    table_setup,
)
from telematics_assets.microbatch.session import transaction
from telematics_assets.microbatch.sql import TableSetup, setup_sql
from telematics_assets_tests.databases import Database


def look(supabase: Supabase) -> tuple[FoundTable, ...]:
    with transaction(supabase) as session:
        return find_tables(session)


def suggestions(supabase: Supabase) -> dict[str, Suggestion]:
    return {each.source: each for each in suggest(look(supabase))}


def prepare(database: Database, *declared: ReplicatedTable) -> None:
    setups = [table_setup(table, look(database.supabase)) for table in declared]
    database.run(setup_sql(setups, role=database.role))


def test_tables_with_a_key_get_the_best_mode_that_they_allow(database: Database) -> None:
    database.run(
        "CREATE TABLE public.policies (id int PRIMARY KEY, row_xid xid8)",
        "CREATE TABLE public.claims (policy int, number int, updated_at timestamptz, PRIMARY KEY (number, policy))",
        "INSERT INTO public.claims SELECT 1, n FROM generate_series(1, 1200) n",
        "ANALYZE public.claims",
    )
    found = suggestions(database.supabase)

    assert found["public.policies"].mode == "row_xid"
    claims = found["public.claims"]
    assert (claims.mode, claims.key, claims.rows) == ("xmin", ("number", "policy"), 1200)
    assert any("updated_at" in note for note in claims.notes)
    assert any("row_xid" in note for note in claims.notes)


def test_the_printed_declarations_are_python_that_declares_the_tables(database: Database) -> None:
    database.run(
        "CREATE SCHEMA sales",
        "CREATE SCHEMA hr",
        'CREATE TABLE sales."Orders" (id int PRIMARY KEY)',
        'CREATE TABLE hr."Orders" (id int PRIMARY KEY)',
        "CREATE TABLE sales.log (line text)",
        'CREATE TABLE sales."order lines" (id int PRIMARY KEY)',
    )
    text = declarations(suggest(look(database.supabase)))
    made: dict[str, tuple[ReplicatedTable, ...]] = {}
    exec(text, {}, made)

    assert {(table.source, table.target) for table in made["REPLICATED_TABLES"]} == {
        ("sales.Orders", "supabase_sales_Orders"),
        ("hr.Orders", "supabase_hr_Orders"),
    }
    assert "# sales.log: no declaration.\n    # It has no primary key." in text
    assert "# sales.order lines: no declaration." in text


def test_what_cannot_be_replicated_is_listed_with_the_reason(database: Database) -> None:
    database.run(
        "CREATE TABLE public.keyless (a int)",
        "CREATE VIEW public.seen AS SELECT 1 AS a",
        "CREATE MATERIALIZED VIEW public.stored AS SELECT 1 AS a",
        "CREATE TABLE public.parted (id int, year int, PRIMARY KEY (id, year)) PARTITION BY LIST (year)",
        "CREATE TABLE public.part_1 PARTITION OF public.parted FOR VALUES IN (1)",
        "CREATE TABLE public.part_2 PARTITION OF public.parted FOR VALUES IN (2)",
        "CREATE TABLE public.base (id int PRIMARY KEY)",
        "CREATE TABLE public.child () INHERITS (public.base)",
        "CREATE TABLE public.hidden (id int PRIMARY KEY)",
        f"REVOKE ALL ON public.hidden FROM {database.role}",
        "CREATE TABLE public.policed (id int PRIMARY KEY)",
        "ALTER TABLE public.policed ENABLE ROW LEVEL SECURITY",
        "CREATE SCHEMA auth",
        "CREATE TABLE auth.users (id int PRIMARY KEY)",
    )
    found = suggestions(database.supabase)
    notes = {source.removeprefix("public."): " ".join(each.notes) for source, each in found.items()}

    assert {name: found[f"public.{name}"].mode for name in notes} == {
        **dict.fromkeys(("base", "hidden", "parted", "policed"), "xmin"),
        **dict.fromkeys(("child", "keyless", "seen", "stored"), None),
    }
    assert "no primary key" in notes["keyless"]
    assert "view" in notes["seen"]
    assert "materialized view" in notes["stored"]
    assert "2 partitions" in notes["parted"]
    assert "inherit" in notes["base"]
    assert "may not read" in notes["hidden"]
    assert "BYPASSRLS" in notes["policed"]


def test_a_declared_table_gets_what_its_mode_needs_or_a_refusal_that_says_what_to_change(database: Database) -> None:
    database.run(
        "CREATE TABLE public.policies (id int PRIMARY KEY, old_xid int)",
        "CREATE TABLE public.keyless (a int)",
        "CREATE VIEW public.seen AS SELECT 1 AS a",
    )
    found = look(database.supabase)

    assert table_setup(ReplicatedTable("public.policies"), found) == TableSetup("public", "policies", ("id",))
    swept = table_setup(ReplicatedTable("public.policies", deletes="sweep"), found)
    assert (swept.position, swept.tombstones) == ("row_xid", False)
    assert table_setup(ReplicatedTable("public.keyless", "snapshot"), found).position is None
    unique = table_setup(ReplicatedTable("public.keyless", key=("a",), deletes="sweep"), found)
    assert (unique.position, unique.tombstones) == ("row_xid", False)
    with pytest.raises(ReplicationError, match="primary key \\(id\\), and the declared key is old_xid"):
        table_setup(ReplicatedTable("public.policies", key=("old_xid",)), found)
    for source, position, said in (
        ("public.nothing", None, "no table public.nothing"),
        ("public.keyless", None, "no primary key"),
        ("public.seen", None, "is a view"),
        ("public.policies", "old_xid", "old_xid is integer"),
    ):
        with pytest.raises(ReplicationError, match=said):
            table_setup(ReplicatedTable(source, position_column=position), found)


def test_a_prepared_and_declared_table_has_not_drifted(database: Database) -> None:
    declared = ReplicatedTable(
        "public.policies",
        exclude=("holder",),
        hash=("email",),
        contract=TableContract("A policy.", (Column("id", "INT", "Key."), Column("email", "STRING", "Who."))),
    )
    database.run("CREATE TABLE public.policies (id int PRIMARY KEY, holder text, email text)")
    prepare(database, declared)

    assert drift([declared], look(database.supabase)) == ()


def test_each_way_to_drift_is_named(database: Database) -> None:
    declared = ReplicatedTable(
        "public.policies",
        key=("id",),
        exclude=("holder",),
        contract=TableContract("A policy.", (Column("id", "INT", "Key."), Column("premium", "INT", "Price."))),
    )
    database.run("CREATE TABLE public.policies (id int PRIMARY KEY, holder text, premium int)")
    prepare(database, declared)
    database.run(
        "ALTER TABLE public.policies RENAME holder TO owner_name",
        "ALTER TABLE public.policies DROP COLUMN premium",
        "ALTER TABLE public.policies DROP CONSTRAINT policies_pkey",
        "ALTER TABLE public.policies ADD COLUMN version int, ADD PRIMARY KEY (id, version)",
        "ALTER TABLE public.policies DISABLE TRIGGER zz_telematics_position",
        "ALTER TABLE public.policies ENABLE ROW LEVEL SECURITY",
        f"ALTER ROLE {database.role} NOBYPASSRLS",
        "DROP TRIGGER zz_telematics_truncated ON public.policies",
        "DROP INDEX public.policies_row_xid_telematics",
        "CREATE TABLE public.claims (id int PRIMARY KEY)",
    )
    drifts = drift([declared, ReplicatedTable("public.gone")], look(database.supabase))
    said = [(each.source.removeprefix("public."), each.kind, each.message) for each in drifts]

    assert [(source, kind) for source, kind, _ in said] == [
        ("policies", "filtered"),
        ("policies", "key"),
        ("policies", "column"),
        ("policies", "column"),
        ("policies", "column"),
        ("policies", "position"),
        ("policies", "position"),
        ("policies", "tombstones"),
        ("policies", "tombstones"),
        ("gone", "missing"),
        ("claims", "undeclared"),
    ]
    messages = [message for _, _, message in said]
    assert "the primary key (id, version), and the declared key is id" in messages[1]
    assert "exclude names holder" in messages[2]
    assert "promises premium" in messages[3]
    assert "owner_name, version" in messages[4]
    assert "rows are lost" in messages[5]
    assert "by the key id, which is not its key now" in messages[7]


def test_the_time_column_of_mode_updated_at_is_looked_at_too(database: Database) -> None:
    database.run("CREATE TABLE public.policies (id int PRIMARY KEY, updated_at timestamptz, changed date)")
    found = look(database.supabase)
    for column, said in (("updated_at", "No index"), ("changed", "needs a timestamp"), ("nothing", "no column")):
        declared = ReplicatedTable("public.policies", "updated_at", position_column=column)
        (only,) = drift([declared], found)
        assert only.kind == "position"
        assert said in only.message
