"""Keys, names and values that few tables have arrive like any others."""

from __future__ import annotations

import json

import pytest

from telematics_assets.catalog import ReplicatedTable
from telematics_assets.errors import ReplicationError, SchemaError
from telematics_assets_tests.conformance.replicas import ReplicaPlatform


@pytest.mark.parametrize(
    ("kind", "values", "changed"),
    [
        ("citext", ("'Aa'", "'b'", "'C'"), "'c'"),
        ("hstore", ("'a=>1'", "'b=>1'", "'c=>1'"), "'d=>1'"),
        ("float8", ("'Infinity'", "1e-300", "0.0"), "'-0.0'"),
        ("float8", ("'NaN'", "1.5", "2.5"), "'-Infinity'"),
        ("float8", ("0.5", "'NaN'", "2.5"), "'Infinity'"),
        ("jsonb", ("'{\"a\": 1}'", "'[1.10]'", "'null'"), "'1e2'"),
        ("text", ("'a '", "'a'", "''"), "E'\\t'"),
    ],
)
def test_keys_of_any_type_find_their_rows(
    replica_platform: ReplicaPlatform, kind: str, values: tuple[str, str, str], changed: str
) -> None:
    if kind in ("citext", "hstore"):
        replica_platform.run(f"CREATE EXTENSION {kind}")
    table = ReplicatedTable(replica_platform.made("odd", f"k {kind} PRIMARY KEY, v int4", key=("k",)))
    first, second, third = values
    replica_platform.run(f"INSERT INTO odd VALUES ({first}, 1), ({second}, 2), ({third}, 3)")
    replica_platform.replicate(table)
    replica_platform.run(
        f"UPDATE odd SET v = 10 WHERE k = {first}",
        f"DELETE FROM odd WHERE k = {second}",
        f"UPDATE odd SET k = {changed}, v = 30 WHERE k = {third}",
    )
    replica_platform.replicate(table)
    replica_platform.assert_mirrored(table, "v")
    replica_platform.run(f"DELETE FROM odd WHERE k = {changed}")
    assert replica_platform.replicate(table).deleted == 1
    assert replica_platform.replicate(table, sweep=True).deleted == 0
    replica_platform.assert_mirrored(table, "v")


def test_a_key_that_bronze_could_not_show_stops_no_batch_once_it_is_corrected(
    replica_platform: ReplicaPlatform,
) -> None:
    table = ReplicatedTable(replica_platform.made("odd", "at timestamptz PRIMARY KEY, v int4", key=("at",)))
    replica_platform.run("INSERT INTO odd VALUES ('2020-01-01', 1)")
    replica_platform.replicate(table)
    replica_platform.run("INSERT INTO odd VALUES ('infinity', 2)")
    with pytest.raises(ReplicationError, match="at is part of the key and holds 'infinity'"):
        replica_platform.replicate(table)
    replica_platform.run("UPDATE odd SET at = '2021-01-01' WHERE v = 2", "DELETE FROM odd WHERE v = 1")
    report = replica_platform.replicate(table)
    assert (report.inserted, report.deleted) == (1, 1)
    replica_platform.assert_mirrored(table, "v")
    assert replica_platform.engine.reconcile(table).extra == 0


@pytest.mark.parametrize(
    ("made", "column", "altered"),
    [
        ("CREATE TYPE state AS ENUM ('a', 'b')", "x state DEFAULT 'a'", "ALTER TYPE state RENAME VALUE 'a' TO 'z'"),
        ("CREATE TYPE state AS ENUM ('a', 'b')", "x state[] DEFAULT '{a}'", "ALTER TYPE state RENAME VALUE 'a' TO 'z'"),
        ("CREATE TYPE pair AS (a int4)", "x pair DEFAULT '(1)'", "ALTER TYPE pair ADD ATTRIBUTE b int4"),
        (
            "SELECT 1",
            "x int4 GENERATED ALWAYS AS (id * 2) STORED",
            "ALTER TABLE odd ALTER x SET EXPRESSION AS (id * 3)",
        ),
        (
            "SELECT 1",
            "x int4 GENERATED ALWAYS AS (id * 2) VIRTUAL",
            "ALTER TABLE odd ALTER x SET EXPRESSION AS (id * 3)",
        ),
    ],
)
def test_values_that_change_without_their_rows_being_written_are_read_again(
    replica_platform: ReplicaPlatform, made: str, column: str, altered: str
) -> None:
    replica_platform.run(made)
    table = ReplicatedTable(replica_platform.made("odd", f"id int4 PRIMARY KEY, {column}"))
    replica_platform.run("INSERT INTO odd (id) VALUES (1), (2)")
    replica_platform.replicate(table)
    replica_platform.run(altered)
    report = replica_platform.replicate(table)
    assert (report.snapshot, report.updated) == ("column x is not what it was", 2)
    assert replica_platform.replicate(table).batches == 0


def test_a_label_that_is_added_to_an_enum_needs_no_look_at_all_rows(replica_platform: ReplicaPlatform) -> None:
    replica_platform.run("CREATE TYPE state AS ENUM ('a')")
    table = ReplicatedTable(replica_platform.made("odd", "id int4 PRIMARY KEY, x state"))
    replica_platform.run("INSERT INTO odd VALUES (1, 'a')")
    replica_platform.replicate(table)
    replica_platform.run("ALTER TYPE state ADD VALUE 'b'", "INSERT INTO odd VALUES (2, 'b')")
    report = replica_platform.replicate(table)
    assert (report.snapshot, report.inserted) == (None, 1)
    replica_platform.assert_mirrored(table, "id", "x")


def test_what_a_column_can_not_show_is_kept_beside_it_as_the_source_spells_it(
    replica_platform: ReplicaPlatform,
) -> None:
    table = ReplicatedTable(
        replica_platform.made("odd", 'id int4 PRIMARY KEY, "til""l" date, n numeric(4,1), a int4[]')
    )
    replica_platform.run(
        "INSERT INTO odd VALUES (1, '2020-01-01', 1.5, '{1}'), (2, 'infinity', 'NaN', '{{1,2}}'), "
        "(3, '0044-03-15 BC', NULL, '[0:1]={7,8}')"
    )
    replica_platform.replicate(table)

    def rescued() -> list[object]:
        found = replica_platform.bronze(table, "id", "_rescued_data")
        return [None if text is None else json.loads(text) for _, text in found]

    assert rescued() == [
        None,
        {'til"l': "infinity", "n": "NaN", "a": "{{1,2}}"},
        {'til"l': "0044-03-15 BC", "a": "[0:1]={7,8}"},
    ]
    replica_platform.run('UPDATE odd SET "til""l" = \'2021-01-01\', n = 2 WHERE id = 2', "UPDATE odd SET a = NULL")
    replica_platform.replicate(table)
    assert rescued() == [None, None, {'til"l': "0044-03-15 BC"}]
    assert replica_platform.replicate(table, full=True).batches == 1
    assert rescued() == [None, None, {'til"l': "0044-03-15 BC"}]


@pytest.mark.parametrize("name", ["_replicated_at", "_Rescued_Data", "_change_type"])
def test_a_column_that_is_called_as_one_of_bronze_s_own_is_refused(
    replica_platform: ReplicaPlatform, name: str
) -> None:
    replica_platform.run(f'CREATE TABLE odd (id int4 PRIMARY KEY, "{name}" text)')
    with pytest.raises(ReplicationError, match=rf"{name}.*List it under exclude"):
        replica_platform.replicate(ReplicatedTable("public.odd", "xmin"))
    assert replica_platform.replicate(ReplicatedTable("public.odd", "xmin", exclude=(name,))).table_version is not None


def test_a_rewriting_never_loses_rows_that_only_bronze_has(replica_platform: ReplicaPlatform) -> None:
    replica_platform.run("CREATE TABLE odd (id int4 PRIMARY KEY, x int4)", "INSERT INTO odd VALUES (1, 1), (2, 2)")
    table = ReplicatedTable("public.odd", "xmin", deletes="none")
    replica_platform.replicate(table)
    replica_platform.run("DELETE FROM odd WHERE id = 1", "ALTER TABLE odd ALTER x TYPE text")
    with pytest.raises(SchemaError, match=r"deletes='none'.*another table"):
        replica_platform.replicate(table, full=True)
    assert replica_platform.bronze(table, "id") == [(1,), (2,)]
