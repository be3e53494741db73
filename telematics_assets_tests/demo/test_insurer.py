"""The insurer's database is plausible, joins to the fleet, is declared as it is, and never stands still."""

from __future__ import annotations

from typing import Any

import pytest

from telematics_assets.catalog import REPLICATED_TABLES
from telematics_assets.demo.fleet import FleetPlan, points, vin
from telematics_assets.demo.insurer import change, change_a_little, create, fill, is_seeded
from telematics_assets.errors import OptionError
from telematics_assets.microbatch.discover import drift, find_tables, suggest
from telematics_assets.microbatch.session import transaction
from telematics_assets_tests.databases import Connection, Database

TABLES = [table.source for table in REPLICATED_TABLES]


@pytest.fixture
def role(database: Database) -> str:
    return database.role


@pytest.fixture
def insurer(database: Database, admin: Connection, role: str) -> Connection:
    create(admin, role=role)
    fill(admin, customers=60)
    return admin


def rows(connection: Connection, query: str) -> list[Any]:
    return connection.execute(query).fetchall()


def content(connection: Connection) -> list[Any]:
    """All rows of all tables, but for the moments of their making."""
    return [
        rows(connection, f"SELECT (to_jsonb(t) - '{{updated_at,row_xid}}'::text[])::text FROM {table} t ORDER BY 1")
        for table in TABLES
    ]


def test_every_table_has_rows_and_the_vehicles_are_the_fleets(insurer: Connection) -> None:
    assert is_seeded(insurer)
    counts = {table: rows(insurer, f"SELECT count(*) FROM {table}")[0][0] for table in TABLES}
    assert counts["public.customers"] == counts["public.vehicles"] == counts["public.policies"] == 60
    assert 15 < counts["public.claims"] < 60
    assert 60 < counts["public.drivers"] < 120
    chassis = {number for (number,) in rows(insurer, "SELECT chassis_no FROM vehicles")}
    assert chassis == {vin(number) for number in range(60)}
    assert set(points(FleetPlan(vehicles=12))["chassis_no"]) <= chassis
    assert rows(insurer, "SELECT count(*) > 0 FROM policies WHERE valid_until = 'infinity'") == [(True,)]


def test_the_same_seed_fills_in_the_same_rows_in_one_step_or_in_several(
    database: Database, insurer: Connection, role: str
) -> None:
    once = content(insurer)
    insurer.execute("TRUNCATE public.customers, public.vehicles CASCADE")
    fill(insurer, customers=25)
    fill(insurer, customers=35, first=25)
    assert content(insurer) == once

    insurer.execute("TRUNCATE public.customers, public.vehicles CASCADE")
    fill(insurer, customers=60, seed=1)
    assert content(insurer) != once


def test_what_is_declared_of_the_tables_is_what_they_are(database: Database, insurer: Connection) -> None:
    with transaction(database.supabase) as session:
        found = find_tables(session)

    assert drift(REPLICATED_TABLES, found) == ()
    assert {(each.source, each.mode) for each in suggest(found)} == {(table, "row_xid") for table in TABLES}


def test_a_round_inserts_updates_deletes_and_commits_late(database: Database, insurer: Connection) -> None:
    before = content(insurer)
    (newest,) = rows(insurer, "SELECT max(row_xid::text::int8) FROM policies")[0]
    with database.connect() as late:
        done = change(insurer, late=late, add_column=True)

    assert done.inserted > 15
    assert done.updated > 5
    assert done.deleted >= 4
    assert (done.key_changed, done.added_column) == (1, "telematics_discount_pct")
    assert content(insurer) != before
    positions = rows(
        insurer,
        "SELECT DISTINCT row_xid::text::int8 FROM (SELECT row_xid FROM drivers UNION SELECT row_xid FROM policies) p "
        f"WHERE row_xid::text::int8 > {newest} ORDER BY 1",
    )
    # The transaction that began first committed last: its rows have the lowest position of the round.
    held = rows(insurer, f"SELECT count(*) > 0 FROM drivers WHERE row_xid::text::int8 = {positions[0][0]}")
    assert held == [(True,)]
    assert rows(insurer, "SELECT count(*) > 3 FROM telematics.tombstones") == [(True,)]

    again = change(insurer, seed=1)
    assert again.key_changed == 1
    assert rows(insurer, "SELECT count(*) FROM customers") == [(66,)]


def test_little_by_little_something_changes_and_nothing_grows(database: Database, insurer: Connection) -> None:
    fill(insurer, customers=60, first=60)
    counts = "SELECT (SELECT count(*) FROM customers), (SELECT count(*) FROM vehicles), (SELECT count(*) FROM policies)"
    before, counted = content(insurer), rows(insurer, counts)

    for _ in range(3):
        change_a_little(insurer)
        after = content(insurer)
        assert after != before
        before = after

    assert rows(insurer, counts) == counted
    assert rows(insurer, "SELECT count(*) >= 3 FROM telematics.tombstones") == [(True,)]
    assert rows(insurer, "SELECT max(premium_eur) < 2000, max(id) FROM policies, vehicles") == [(True, 122)]
    # The vehicles that send files stay.
    assert rows(insurer, "SELECT count(*) FROM vehicles WHERE id < 100") == [(100,)]


def test_a_fleet_without_customers_is_refused(insurer: Connection) -> None:
    with pytest.raises(OptionError, match="customers=0"):
        fill(insurer, customers=0)
