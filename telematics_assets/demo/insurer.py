"""The insurer's database: tables whose vehicles are the simulated fleet's, and a business that goes on.

Belongs here: its tables, what fills them, and changes in rounds or little by little, over any psycopg connection of the
database's owner.
Does not belong here: the server (`local_supabase.py`), what is declared of the tables (`catalog.py`), Dagster.

The same seed gives the same rows: all that looks random is made of MD5 sums of seed and number, on the server, as whole
sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from telematics_assets.catalog import REPLICATED_TABLES, ReplicatedTable
from telematics_assets.demo.fleet import vin
from telematics_assets.errors import OptionError
from telematics_assets.microbatch.sql import READER, TableSetup, setup_steps

if TYPE_CHECKING:
    import psycopg

    Connection = psycopg.Connection[Any]

# A number from 0 to n - 1 that depends on a salt and the row alone.
_FUNCTIONS = """
CREATE SCHEMA IF NOT EXISTS demo;
CREATE OR REPLACE FUNCTION demo.pick(salt text, n bigint) RETURNS bigint LANGUAGE sql IMMUTABLE AS
    $$ SELECT ('x' || substr(md5(salt), 1, 15))::bit(60)::bigint % n $$;
"""

_TABLES = """
CREATE TYPE public.fuel AS ENUM ('petrol', 'diesel', 'electric', 'hybrid');
CREATE TYPE public.policy_state AS ENUM ('quoted', 'active', 'lapsed', 'cancelled');
CREATE TYPE public.claim_state AS ENUM ('reported', 'assessed', 'paid', 'rejected');

CREATE TABLE public.customers (
    id uuid PRIMARY KEY,
    customer_no bigint NOT NULL UNIQUE,
    full_name text NOT NULL,
    email text NOT NULL,
    phone text,
    date_of_birth date NOT NULL,
    address jsonb NOT NULL,
    country char(2) NOT NULL DEFAULT 'AT',
    language text NOT NULL DEFAULT 'de',
    segments text[] NOT NULL DEFAULT '{}',
    marketing_consent boolean,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE public.vehicles (
    id bigint PRIMARY KEY,
    chassis_no text NOT NULL UNIQUE CHECK (length(chassis_no) = 17),
    customer_id uuid REFERENCES public.customers ON DELETE SET NULL ON UPDATE CASCADE,
    registration text,
    make text NOT NULL,
    model text NOT NULL,
    fuel public.fuel NOT NULL,
    built_year smallint NOT NULL,
    power_kw int,
    list_price_eur numeric(12,2) NOT NULL,
    first_registered date,
    equipment text[] NOT NULL DEFAULT '{}',
    updated_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE public.policies (
    policy_no text PRIMARY KEY,
    customer_id uuid NOT NULL REFERENCES public.customers ON DELETE CASCADE ON UPDATE CASCADE,
    vehicle_id bigint REFERENCES public.vehicles ON DELETE SET NULL,
    state public.policy_state NOT NULL DEFAULT 'quoted',
    premium_eur numeric(12,2) NOT NULL CHECK (premium_eur >= 0),
    sum_insured_eur numeric(14,2) NOT NULL,
    bonus_factor double precision NOT NULL DEFAULT 1,
    valid_from date NOT NULL,
    valid_until date NOT NULL DEFAULT 'infinity',
    pays_per_km boolean NOT NULL DEFAULT false,
    terms jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE public.claims (
    policy_no text NOT NULL REFERENCES public.policies ON DELETE CASCADE ON UPDATE CASCADE,
    claim_no int NOT NULL,
    state public.claim_state NOT NULL DEFAULT 'reported',
    occurred_at timestamptz NOT NULL,
    reported_on date NOT NULL,
    claimed_eur numeric(12,2) NOT NULL,
    paid_eur numeric(12,2),
    fraud_score real,
    police_report boolean,
    photos text[] NOT NULL DEFAULT '{}',
    assessment jsonb,
    description text,
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (policy_no, claim_no)
);

CREATE TABLE public.drivers (
    vehicle_id bigint NOT NULL REFERENCES public.vehicles ON DELETE CASCADE,
    driver_no smallint NOT NULL,
    customer_id uuid REFERENCES public.customers ON DELETE SET NULL ON UPDATE CASCADE,
    full_name text NOT NULL,
    date_of_birth date NOT NULL,
    licence_no text NOT NULL,
    licence_classes text[] NOT NULL,
    licensed_since date,
    penalty_points smallint NOT NULL DEFAULT 0,
    is_main_driver boolean NOT NULL DEFAULT false,
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (vehicle_id, driver_no)
);

CREATE INDEX ON public.vehicles (customer_id);
CREATE INDEX ON public.policies (customer_id);
CREATE INDEX ON public.policies (vehicle_id);
CREATE INDEX ON public.drivers (customer_id);

CREATE FUNCTION demo.touch() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN NEW.updated_at := now(); RETURN NEW; END $$;
"""

_FIRST_NAMES = "Anna Bernd Carla David Eva Franz Greta Hugo Ida Jonas Klara Leo Mia Noah Olga Paul Rosa Simon Tina Uwe"
_LAST_NAMES = "Gruber Huber Wagner Pichler Steiner Moser Mayer Hofer Leitner Berger Fuchs Eder Fischer Schmid Winkler"

#: Customers `first` to `last`, by number; vehicle n belongs to customer n.
_CUSTOMERS = """
INSERT INTO public.customers
SELECT md5(s.salt)::uuid, 1000 + n, names.first || ' ' || names.last,
       lower(names.first || '.' || names.last || n) || '@example.com',
       CASE WHEN demo.pick(s.salt || 'known', 5) > 0
           THEN '+43 660 ' || 1000000 + demo.pick(s.salt || 'phone', 8999999) END,
       date '1950-01-01' + demo.pick(s.salt || 'born', 19000)::int,
       jsonb_build_object('street', 'Ringstraße ' || demo.pick(s.salt || 'street', 200) + 1,
                          'zip', (1010 + demo.pick(s.salt || 'zip', 8000))::text,
                          'floor', demo.pick(s.salt || 'floor', 9)),
       (ARRAY['AT', 'DE', 'CH', 'CZ'])[demo.pick(s.salt || 'country', 4) + 1],
       (ARRAY['de', 'en', 'cs'])[demo.pick(s.salt || 'language', 3) + 1],
       (ARRAY['family', 'fleet', 'young', 'loyal'])[1:demo.pick(s.salt || 'segments', 4)],
       CASE demo.pick(s.salt || 'consent', 3) WHEN 0 THEN true WHEN 1 THEN false END,
       timestamptz '2024-01-01 08:00Z' + n * interval '7 hours 3.25 seconds', now()
FROM generate_series(%(first)s::bigint, %(last)s) n
CROSS JOIN LATERAL (SELECT format('%%s-%%s', %(seed)s::bigint, n)) AS s(salt)
CROSS JOIN LATERAL (
    SELECT (%(first_names)s::text[])[demo.pick(s.salt || 'f', cardinality(%(first_names)s::text[])) + 1],
           (%(last_names)s::text[])[demo.pick(s.salt || 'l', cardinality(%(last_names)s::text[])) + 1]
) AS names(first, last)
"""

_VEHICLES = """
INSERT INTO public.vehicles
SELECT n, chassis, md5(s.salt)::uuid,
       'W ' || 10000 + demo.pick(s.salt || 'plate', 89999) || ' ' || chr(65 + demo.pick(s.salt || 'plate2', 26)::int),
       (ARRAY['Volkswagen', 'Škoda', 'BMW', 'Renault', 'Tesla'])[demo.pick(s.salt || 'make', 5) + 1],
       (ARRAY['Kombi', 'Limousine', 'Compact', 'Van'])[demo.pick(s.salt || 'model', 4) + 1],
       (enum_range(NULL::public.fuel))[demo.pick(s.salt || 'fuel', 4) + 1],
       2010 + demo.pick(s.salt || 'year', 16), 50 + demo.pick(s.salt || 'power', 200),
       15000 + demo.pick(s.salt || 'price', 6000000) / 100.0,
       date '2010-01-01' + demo.pick(s.salt || 'registered', 5700)::int,
       (ARRAY['ABS', 'ESP', 'lane assist', 'emergency brake'])[1:demo.pick(s.salt || 'equipment', 5)], now()
FROM unnest(%(chassis)s::text[]) WITH ORDINALITY AS c(chassis, place)
CROSS JOIN LATERAL (SELECT %(first)s::bigint + place - 1) AS numbered(n)
CROSS JOIN LATERAL (SELECT format('%%s-%%s', %(seed)s::bigint, n)) AS s(salt)
"""

_POLICIES = """
INSERT INTO public.policies
SELECT format('P-%%s', lpad(n::text, 6, '0')), md5(s.salt)::uuid, n,
       (ARRAY['quoted', 'active', 'active', 'active', 'lapsed'])[demo.pick(s.salt || 'state', 5) + 1]
           ::public.policy_state,
       250 + demo.pick(s.salt || 'premium', 150000) / 100.0, 1000000 + demo.pick(s.salt || 'sum', 20) * 500000,
       0.5 + demo.pick(s.salt || 'bonus', 11) / 10.0, date '2025-01-01' + demo.pick(s.salt || 'from', 365)::int,
       CASE WHEN demo.pick(s.salt || 'until', 3) = 0 THEN date 'infinity' ELSE date '2027-12-31' END,
       demo.pick(s.salt || 'km', 2) = 1,
       jsonb_build_object('cover', (ARRAY['liability', 'partial', 'full'])[demo.pick(s.salt || 'cover', 3) + 1],
                          'deductible_eur', demo.pick(s.salt || 'deductible', 5) * 150,
                          'riders', jsonb_build_array('glass', 'marten')),
       timestamptz '2024-06-01 09:30Z' + n * interval '5 hours', now()
FROM generate_series(%(first)s::bigint, %(last)s) n
CROSS JOIN LATERAL (SELECT format('%%s-%%s', %(seed)s::bigint, n)) AS s(salt)
"""

_CLAIMS = """
INSERT INTO public.claims
SELECT policy_no, number, (enum_range(NULL::public.claim_state))[demo.pick(s.salt || 'state', 4) + 1],
       timestamptz '2026-01-05 06:00Z' + demo.pick(s.salt || 'at', 300) * interval '1 hour 17.123456 seconds',
       date '2026-01-20' + demo.pick(s.salt || 'on', 30)::int, 100 + demo.pick(s.salt || 'claimed', 900000) / 100.0,
       CASE WHEN demo.pick(s.salt || 'paid', 2) = 0 THEN demo.pick(s.salt || 'amount', 900000) / 100.0 END,
       demo.pick(s.salt || 'fraud', 1000) / 1000.0,
       CASE demo.pick(s.salt || 'police', 3) WHEN 0 THEN true WHEN 1 THEN false END,
       (ARRAY['front.jpg', 'rear.jpg', 'plate.jpg'])[1:demo.pick(s.salt || 'photos', 4)],
       jsonb_build_object('workshop_hours', demo.pick(s.salt || 'hours', 400) / 10.0), 'As the driver told it.', now()
FROM public.policies p CROSS JOIN generate_series(1, 2) number
CROSS JOIN LATERAL (SELECT format('%%s-%%s-%%s', %(seed)s::bigint, policy_no, number)) AS s(salt)
WHERE p.vehicle_id BETWEEN %(first)s AND %(last)s AND demo.pick(s.salt || 'there', 4) = 0
"""

_DRIVERS = """
INSERT INTO public.drivers
SELECT v.id, number, CASE WHEN number = 1 THEN v.customer_id END,
       (%(first_names)s::text[])[demo.pick(s.salt || 'f', cardinality(%(first_names)s::text[])) + 1] || ' '
           || (%(last_names)s::text[])[demo.pick(s.salt || 'l', cardinality(%(last_names)s::text[])) + 1],
       date '1955-01-01' + demo.pick(s.salt || 'born', 18000)::int,
       'L' || 10000000 + demo.pick(s.salt || 'licence', 89999999),
       (ARRAY['B', 'BE', 'C'])[1:1 + demo.pick(s.salt || 'classes', 3)],
       CASE WHEN demo.pick(s.salt || 'known', 6) > 0 THEN date '1990-01-01' + demo.pick(s.salt || 'since', 12000)::int
       END,
       demo.pick(s.salt || 'points', 8), number = 1, now()
FROM public.vehicles v CROSS JOIN generate_series(1, 2) number
CROSS JOIN LATERAL (SELECT format('%%s-%%s-%%s', %(seed)s::bigint, v.id, number)) AS s(salt)
WHERE v.id BETWEEN %(first)s AND %(last)s AND (number = 1 OR demo.pick(s.salt || 'there', 2) = 0)
"""

#: The insurer's tables, by the order in which rows refer to each other.
_KEYS = {
    "customers": ("id",),
    "vehicles": ("id",),
    "policies": ("policy_no",),
    "claims": ("policy_no", "claim_no"),
    "drivers": ("vehicle_id", "driver_no"),
}

#: What the business thinks of later.
NEW_COLUMN = "telematics_discount_pct"
_FILL_NEW_COLUMN = f"""
UPDATE public.policies SET {NEW_COLUMN} = demo.pick(%(salt)s || policy_no, 2000) / 100.0
WHERE pays_per_km AND demo.pick(%(salt)s || policy_no, 4) = 0
"""
# Drivers who are no customers: no foreign key of the round's deletions waits for them.
_LATE = """
UPDATE public.drivers SET penalty_points = penalty_points + 1
WHERE driver_no > 1 AND demo.pick(%(salt)s || vehicle_id, 10) = 1
"""
_UPDATES = (
    """
    UPDATE public.policies SET premium_eur = round(premium_eur * 1.03, 2), terms = terms || '{"reviewed": true}'
    WHERE demo.pick(%(salt)s || policy_no, 10) = 1
    """,
    """
    UPDATE public.claims SET state = 'paid', paid_eur = claimed_eur
    WHERE state = 'assessed' AND demo.pick(%(salt)s || policy_no || claim_no, 3) = 1
    """,
    "UPDATE public.customers SET marketing_consent = false WHERE demo.pick(%(salt)s || id, 25) = 1",
)
_CHANGE_A_KEY = """
UPDATE public.policies SET policy_no = policy_no || '-A' WHERE policy_no IN (
    SELECT p.policy_no FROM public.policies p LEFT JOIN public.claims c USING (policy_no) WHERE c.policy_no IS NULL
    ORDER BY md5(%(salt)s || p.policy_no) LIMIT 1)
"""
_DELETE = """
DELETE FROM public.customers WHERE id IN (SELECT id FROM public.customers ORDER BY md5(%(salt)s || id) LIMIT 2)
"""
#: Little by little: nothing grows without end, however long it goes on. The vehicles of the fleet stay.
_FLEET = 100
_LITTLE = (
    """
    UPDATE public.policies SET premium_eur = 250 + demo.pick(%(salt)s || policy_no || 'premium', 150000) / 100.0
    WHERE demo.pick(%(salt)s || policy_no, 100) = 1
    """,
    """
    UPDATE public.claims SET state = 'paid', paid_eur = claimed_eur
    WHERE state = 'assessed' AND demo.pick(%(salt)s || policy_no || claim_no, 10) = 1
    """,
    """
    UPDATE public.claims SET state = 'assessed'
    WHERE state = 'reported' AND demo.pick(%(salt)s || policy_no || claim_no, 10) = 1
    """,
)
_ONE_LEAVES = f"""
WITH one AS (
    SELECT id, customer_id FROM public.vehicles WHERE id >= {_FLEET} ORDER BY md5(%(salt)s || id) LIMIT 1
), gone AS (
    DELETE FROM public.vehicles WHERE id IN (SELECT id FROM one)
)
DELETE FROM public.customers WHERE id IN (SELECT customer_id FROM one)
"""
_COUNT = "SELECT " + " + ".join(f"(SELECT count(*) FROM public.{name})" for name in _KEYS)


@dataclass(frozen=True, slots=True)
class Changes:
    """What one round changed, over all tables.

    Attributes:
        inserted: Rows that came.
        updated: Rows that are others now.
        deleted: Rows that went, by foreign keys too.
        key_changed: Rows whose primary key changed (a deletion and an insertion for whoever follows the keys).
        added_column: A column that came, or None.
    """

    inserted: int
    updated: int
    deleted: int
    key_changed: int
    added_column: str | None


def is_seeded(connection: Connection) -> bool:
    """Whether the insurer's tables are there; what fills them belongs into the transaction that makes them."""
    return bool(connection.execute("SELECT to_regclass('public.drivers') IS NOT NULL").fetchone()[0])  # type: ignore[index]


def create(
    connection: Connection, *, role: str = READER, tables: Sequence[ReplicatedTable] = REPLICATED_TABLES
) -> None:
    """Make the insurer's tables, all that mode `row_xid` needs, and the role that reads.

    Args:
        connection: Of the database's owner; where a transaction is open, all is part of it.
        role: The role that reads; it has no password yet.
        tables: What is declared of the tables.
    """
    touching = "".join(
        f"CREATE TRIGGER touch BEFORE UPDATE ON public.{name} FOR EACH ROW EXECUTE FUNCTION demo.touch();\n"
        for name in _KEYS
    )
    setups = [
        TableSetup(
            "public",
            name,
            _KEYS[name],
            position=table.position if table.mode == "row_xid" else None,
            tombstones=table.delete_handling == "tombstones",
        )
        for table in tables
        if (name := table.source.removeprefix("public.")) in _KEYS
    ]
    with connection.transaction():
        connection.execute(_FUNCTIONS + _TABLES + touching)
        connection.execute(setup_steps(setups, role=role))


def fill(connection: Connection, *, customers: int = 200, seed: int = 0, first: int = 0) -> int:
    """Fill the tables; customer n has vehicle n of the simulated fleet and a policy on it.

    Args:
        connection: Of the database's owner; where a transaction is open, all is part of it.
        customers: How many.
        seed: The same seed gives the same rows.
        first: Number of the first customer; those before must have been seeded already.

    Returns:
        The rows that were inserted, over all tables.
    """
    if customers < 1 or first < 0:
        raise OptionError(f"customers={customers}, first={first} is not accepted. Use one customer or more, from 0 on.")
    values = {
        "seed": seed,
        "first": first,
        "last": first + customers - 1,
        "chassis": [vin(number) for number in range(first, first + customers)],
        "first_names": _FIRST_NAMES.split(),
        "last_names": _LAST_NAMES.split(),
    }
    with connection.transaction():
        inserted = sum(
            connection.execute(statement, values).rowcount
            for statement in (_CUSTOMERS, _VEHICLES, _POLICIES, _CLAIMS, _DRIVERS)
        )
    for name in _KEYS:
        connection.execute(f"ANALYZE public.{name}")
    return inserted


def change(
    connection: Connection, *, late: Connection | None = None, seed: int = 0, add_column: bool = False
) -> Changes:
    """One round of business: customers come and go, premiums change, claims are settled, a policy gets another number.

    Args:
        connection: Of the database's owner.
        late: Another connection, whose transaction begins before the round and commits after it: its rows have older
            positions than some that are committed already.
        seed: The same seed and rows give the same changes.
        add_column: Let the business think of something new: a column of `policies` that was not there.
    """
    (highest,) = connection.execute("SELECT coalesce(max(id), -1) + 1 FROM public.vehicles").fetchone() or (0,)
    salt = {"salt": f"{seed}-{highest}"}
    updated = 0
    if late is not None:
        late.execute("BEGIN")
        updated += late.execute(_LATE, salt).rowcount
    if add_column:
        connection.execute(f"ALTER TABLE public.policies ADD COLUMN IF NOT EXISTS {NEW_COLUMN} numeric(5,2)")
        updated += connection.execute(_FILL_NEW_COLUMN, salt).rowcount
    inserted = fill(connection, customers=5, seed=seed, first=highest)
    with connection.transaction():
        updated += sum(connection.execute(statement, salt).rowcount for statement in _UPDATES)
        key_changed = connection.execute(_CHANGE_A_KEY, salt).rowcount
    with connection.transaction():
        (before,) = connection.execute(_COUNT).fetchone() or (0,)
        connection.execute(_DELETE, salt)
        (after,) = connection.execute(_COUNT).fetchone() or (0,)
    if late is not None:
        late.execute("COMMIT")
    return Changes(inserted, updated, int(before - after), key_changed, NEW_COLUMN if add_column else None)


def change_a_little(connection: Connection, *, seed: int = 0) -> None:
    """What a minute brings: one customer comes and one goes, a few premiums and claims change; all in one transaction.

    Args:
        connection: Of the database's owner.
        seed: The same seed and rows give the same changes.
    """
    with connection.transaction():
        (highest,) = connection.execute("SELECT coalesce(max(id), -1) + 1 FROM public.vehicles").fetchone() or (0,)
        salt = {"salt": f"{seed}-{highest}"}
        fill(connection, customers=1, seed=seed, first=highest)
        for statement in (*_LITTLE, _ONE_LEAVES):
            connection.execute(statement, salt)
