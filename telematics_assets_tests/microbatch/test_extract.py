"""Rows of every type arrive as the server holds them, or as null and counted."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from telematics_assets.engines.base import Anomaly
from telematics_assets.errors import ReplicationError, TelematicsError
from telematics_assets.microbatch.extract import Anomalies, extract, keyed_hash, uuid_text
from telematics_assets.microbatch.session import Session, transaction
from telematics_assets.microbatch.source import describe, literal
from telematics_assets.microbatch.types import ColumnPlan, arrow_schema, plan_columns
from telematics_assets_tests.databases import Database

KEY = "a key of the tests, long enough"
#: Types whose values are drawn at random; a column of a table of theirs is called by its place here.
DRAWN = (
    *("int2", "int4", "int8", "float4", "float8", "bool", "text", "varchar(9)", "char(9)", "bytea", "uuid", "json"),
    *("jsonb", "numeric", "numeric(12,2)", "numeric(38,10)", "numeric(3,-2)", "numeric(2,5)", "date", "timestamp"),
    *("timestamptz", "time", "timetz", "interval", "xid8", "inet", "text[]", "int4[]", "numeric(12,2)[]"),
    *("timestamptz[]", "uuid[]", "bytea[]"),
)


@pytest.fixture
def session(database: Database) -> Iterator[Session]:
    """One transaction, in a database with a table of all drawn types."""
    columns = ", ".join(f"c{number} {kind}" for number, kind in enumerate(DRAWN))
    database.run(f"CREATE TABLE drawn ({columns})")
    with transaction(database.supabase) as session:
        yield session


@pytest.fixture
def plans(session: Session) -> dict[str, ColumnPlan]:
    """How a column of each drawn type travels."""
    return dict(zip(DRAWN, plan_columns(describe(session, "public.drawn")), strict=True))


def values_sql(plan: ColumnPlan, kind: str, texts: list[str | None]) -> str:
    """What to select from to get values of a type, given as text, in the plan's column."""
    rows = ", ".join(f"({n}, {'NULL' if text is None else literal(text)})" for n, text in enumerate(texts))
    return f"(SELECT n, v::{kind} AS {plan.source} FROM (VALUES {rows}) AS r(n, v)) AS t"


def extracted(
    session: Session, plan: ColumnPlan, kind: str, texts: list[str | None]
) -> tuple[list[Any], tuple[Anomaly, ...]]:
    """What arrives of the values, and what was counted."""
    anomalies = Anomalies()
    batches = list(extract(session, values_sql(plan, kind, texts), [plan], anomalies=anomalies, order_by="n"))
    return pa.Table.from_batches(batches).column(0).to_pylist(), anomalies.found


def arrived(session: Session, plan: ColumnPlan, kind: str, texts: list[str | None]) -> tuple[list[Any], list[Any]]:
    """What arrives of the values, all of which fit, and how the server itself spells them."""
    found, anomalies = extracted(session, plan, kind, texts)
    assert anomalies == ()
    spelled = session.rows(f"SELECT {plan.source}::text AS v FROM {values_sql(plan, kind, texts)} ORDER BY n")
    return found, [row["v"] for row in spelled]


printable = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
in_range = st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31, 23, 59, 59, 999999))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(printable, inner, max_size=3),
    max_leaves=5,
)
together = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def values_of(kind: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.none() | kind, min_size=1, max_size=8)


def as_texts(values: list[Any]) -> list[str | None]:
    return [None if value is None else str(value) for value in values]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return (math.isnan(one) and math.isnan(other)) or (
            one == other and math.copysign(1, one) == math.copysign(1, other)
        )
    return bool(one == other)


@together
@given(st.data())
def test_numbers_arrive_exactly(session: Session, plans: dict[str, ColumnPlan], data: st.DataObject) -> None:
    for kind, bits in (("int2", 15), ("int4", 31), ("int8", 63)):
        numbers = data.draw(values_of(st.integers(-(2**bits), 2**bits - 1)))
        assert arrived(session, plans[kind], kind, as_texts(numbers))[0] == numbers
    for kind, any_float in (("float4", st.floats(width=32)), ("float8", st.floats())):
        floats = data.draw(values_of(any_float))
        found, _ = arrived(session, plans[kind], kind, [None if f is None else repr(f) for f in floats])
        assert all(map(same, found, floats))
    for kind, digits, scale in (
        *(("numeric(12,2)", 12, 2), ("numeric(38,10)", 38, 10)),
        *(("numeric(3,-2)", 3, -2), ("numeric(2,5)", 2, 5)),
    ):
        whole = data.draw(values_of(st.integers(-(10**digits) + 1, 10**digits - 1)))
        decimals = [None if n is None else Decimal(f"{n}e{-scale}") for n in whole]
        found, spelled = arrived(session, plans[kind], kind, as_texts(decimals))
        assert found == decimals == [None if text is None else Decimal(text) for text in spelled]
        # With the zeros behind the point, too; Python writes the smallest ones with an exponent.
        assert scale < 0 or [None if value is None else f"{value:f}" for value in found] == spelled


@together
@given(values_of(st.decimals(allow_nan=True, allow_infinity=True)))
@example([Decimal("1e-25"), Decimal("12345678901234567890123456789012345678901234567890.10"), Decimal("1.10")])
def test_numbers_without_precision_arrive_as_their_text(
    session: Session, plans: dict[str, ColumnPlan], numbers: list[Decimal | None]
) -> None:
    numbers = [n if n is None or not n.is_finite() or abs(n.adjusted()) < 1000 else Decimal(0) for n in numbers]
    texts = [None if n is None else "NaN" if n.is_nan() else str(n) for n in numbers]
    found, spelled = arrived(session, plans["numeric"], "numeric", texts)
    assert found == spelled


@together
@given(st.data())
def test_dates_and_times_arrive_exactly(session: Session, plans: dict[str, ColumnPlan], data: st.DataObject) -> None:
    moments = data.draw(values_of(in_range))
    naive = [None if moment is None else moment.isoformat(" ") for moment in moments]
    assert arrived(session, plans["timestamp"], "timestamp", naive)[0] == moments
    instants = [None if moment is None else moment.replace(tzinfo=UTC) for moment in moments]
    zoned = [None if text is None else f"{text}+00" for text in naive]
    assert arrived(session, plans["timestamptz"], "timestamptz", zoned)[0] == instants
    days = [None if moment is None else moment.date() for moment in moments]
    assert arrived(session, plans["date"], "date", as_texts(days))[0] == days


@together
@given(st.data())
def test_texts_and_bytes_arrive_as_they_are(
    session: Session, plans: dict[str, ColumnPlan], data: st.DataObject
) -> None:
    texts = data.draw(values_of(printable))
    assert arrived(session, plans["text"], "text", texts)[0] == texts
    short = [None if text is None else text[:9] for text in texts]
    assert arrived(session, plans["varchar(9)"], "varchar(9)", short)[0] == short
    padded = [None if text is None else text.ljust(9) for text in short]
    assert arrived(session, plans["char(9)"], "char(9)", short)[0] == padded
    blobs = data.draw(values_of(st.binary(max_size=20)))
    hexed = [None if blob is None else f"\\x{blob.hex()}" for blob in blobs]
    assert arrived(session, plans["bytea"], "bytea", hexed)[0] == blobs
    uuids = data.draw(values_of(st.uuids()))
    assert arrived(session, plans["uuid"], "uuid", as_texts(uuids))[0] == as_texts(uuids)
    assert arrived(session, plans["bool"], "bool", ["t", None, "f"])[0] == [True, None, False]


@together
@given(values_of(json_values))
@example([{"a": 1}])
def test_documents_arrive_as_the_text_of_the_server(
    session: Session, plans: dict[str, ColumnPlan], documents: list[Any]
) -> None:
    texts = [None if document is None else json.dumps(document, ensure_ascii=False, indent=1) for document in documents]
    found, spelled = arrived(session, plans["json"], "json", texts)
    assert found == spelled == texts
    found, spelled = arrived(session, plans["jsonb"], "jsonb", texts)
    assert found == spelled


@pytest.mark.parametrize("kind", ["json", "jsonb"])
def test_large_numbers_in_documents_keep_all_their_digits(
    session: Session, plans: dict[str, ColumnPlan], kind: str
) -> None:
    text = '{"a": 12345678901234567890.10, "b": 1e400, "a": -0}'
    found, spelled = arrived(session, plans[kind], kind, [text])
    assert found == spelled
    assert ("1e400" in found[0]) if kind == "json" else ("1" + "0" * 400 in found[0])


@together
@given(st.data())
def test_arrays_arrive_element_by_element(session: Session, plans: dict[str, ColumnPlan], data: st.DataObject) -> None:
    def check(kind: str, element: st.SearchStrategy[Any], spell: Any, expect: Any = lambda value: value) -> None:
        arrays = data.draw(values_of(st.lists(st.none() | element, max_size=4)))
        texts = [
            None if values is None else f"{{{','.join('NULL' if v is None else spell(v) for v in values)}}}"
            for values in arrays
        ]
        found, _ = arrived(session, plans[kind], kind, texts)
        assert found == [
            None if values is None else [None if v is None else expect(v) for v in values] for values in arrays
        ]

    def in_quotes(text: str) -> str:
        escaped = text.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'

    check("text[]", printable, in_quotes)
    check("int4[]", st.integers(-(2**31), 2**31 - 1), str)
    check("numeric(12,2)[]", st.integers(-(10**12) + 1, 10**12 - 1).map(lambda n: Decimal(n).scaleb(-2)), str)
    check("timestamptz[]", in_range.map(lambda moment: moment.replace(tzinfo=UTC)), lambda m: f'"{m.isoformat(" ")}"')
    check("uuid[]", st.uuids(), str, str)
    check("bytea[]", st.binary(max_size=5), lambda blob: f'"\\\\x{blob.hex()}"')


#: What a type without a Delta counterpart arrives as: input, and text in bronze.
AS_TEXT = {
    "time": {"24:00": "24:00:00", "07:30:00.000001": "07:30:00.000001"},
    "timetz": {"24:00+01:30": "24:00:00+01:30"},
    "interval": {"1 mon -2 days 00:00:00.000003": "P1M-2DT0.000003S", "infinity": "infinity"},
    "inet": {"10.0.0.1": "10.0.0.1", "10.0.0.1/8": "10.0.0.1/8", "::1": "::1"},
}


@pytest.mark.parametrize("kind", AS_TEXT)
def test_other_types_arrive_as_the_text_of_the_server(
    session: Session, plans: dict[str, ColumnPlan], kind: str
) -> None:
    assert arrived(session, plans[kind], kind, list(AS_TEXT[kind]))[0] == list(AS_TEXT[kind].values())


# -- what bronze can't show --------------------------------------------------------------------------------------------

FAR = [
    ("date", "infinity", "infinity", "infinity"),
    ("date", "-infinity", "-infinity", "-infinity"),
    ("date", "0044-03-15 BC", "before year 1", "0044-03-15 BC"),
    ("date", "4714-11-24 BC", "before year 1", "4714-11-24 BC"),
    ("date", "10000-01-01", "after year 9999", "10000-01-01"),
    ("date", "5874897-12-31", "after year 9999", "5874897-12-31"),
    ("timestamp", "infinity", "infinity", "infinity"),
    ("timestamp", "-infinity", "-infinity", "-infinity"),
    ("timestamp", "0001-12-31 23:59:59.999999 BC", "before year 1", "0001-12-31 23:59:59.999999 BC"),
    ("timestamp", "4714-11-24 00:00:00 BC", "before year 1", "4714-11-24 00:00:00 BC"),
    ("timestamp", "294276-12-31 23:59:59.999999", "after year 9999", "294276-12-31 23:59:59.999999"),
    ("timestamptz", "infinity", "infinity", "infinity"),
    ("timestamptz", "-infinity", "-infinity", "-infinity"),
    ("timestamptz", "0045-02-29 12:00:00+00 BC", "before year 1", "0045-02-29 12:00:00+00 BC"),
    ("timestamptz", "10000-01-01 00:00:00+00", "after year 9999", "10000-01-01 00:00:00+00"),
    ("numeric(12,2)", "NaN", "NaN", "NaN"),
    ("xid8", "18446744073709551615", "larger than a BIGINT", "18446744073709551615"),
    ("int4[]", "{{1,2},{3,4}}", "more than one dimension", "{{1,2},{3,4}}"),
    ("int4[]", "[0:0][0:0]={{7}}", "more than one dimension", "[0:0][0:0]={{7}}"),
    ("numeric(12,2)[]", "{1.10,NaN}", "NaN", "NaN"),
    ("timestamptz[]", "{2020-01-01,-infinity}", "-infinity", "-infinity"),
]
FINE = {
    "date": ("2020-02-29", date(2020, 2, 29)),
    "timestamp": ("0001-01-01", datetime(1, 1, 1)),
    "timestamptz": ("2020-01-01 00:00+02", datetime(2019, 12, 31, 22, tzinfo=UTC)),
    "numeric(12,2)": ("1.50", Decimal("1.50")),
    "xid8": ("9223372036854775807", 2**63 - 1),
    "int4[]": ("{1,NULL}", [1, None]),
    "numeric(12,2)[]": ("{1.5,NULL}", [Decimal("1.50"), None]),
    "timestamptz[]": ("{2020-01-01+00}", [datetime(2020, 1, 1, tzinfo=UTC)]),
}


@pytest.mark.parametrize(("kind", "text", "name", "shown"), FAR)
def test_a_value_that_bronze_can_not_show_is_null_and_counted_and_its_neighbours_stay(
    session: Session, plans: dict[str, ColumnPlan], kind: str, text: str, name: str, shown: str
) -> None:
    fine, value = FINE[kind]
    plan = plans[kind]
    found, anomalies = extracted(session, plan, kind, [fine, text, None, text, fine])
    assert found == [value, None, None, None, value]
    assert anomalies == (Anomaly(plan.source, name, 2, shown),)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *((kind, text) for kind, text, _, _ in FAR),
        ("timestamp", "10000-01-01 01:02:03.1"),
        ("timestamptz[]", "{2020-01-01 00:00:00.01,NULL,0044-03-15 BC}"),
        ("numeric(12,2)[]", "{1.10,NaN,NULL}"),
        ("int4[]", "[0:1]={7,8}"),
    ],
)
def test_what_bronze_can_not_show_is_rescued_as_the_server_spells_it(
    session: Session, plans: dict[str, ColumnPlan], kind: str, text: str
) -> None:
    plan, values = plans[kind], values_sql(plans[kind], kind, [FINE[kind][0], text, None, text])
    (batch,) = extract(session, values, [plan], anomalies=Anomalies(), order_by="n", rescued=True)
    spelled = json.dumps({plan.source: session.value(f"SELECT {plan.source}::text FROM {values} WHERE n = 1")})
    found = batch.column("_rescued_data").to_pylist()
    assert [None if value is None else json.loads(value) for value in found] == [
        *(None, json.loads(spelled)),
        *(None, json.loads(spelled)),
    ]


def test_an_array_that_does_not_start_at_1_keeps_its_elements_and_is_counted(
    session: Session, plans: dict[str, ColumnPlan]
) -> None:
    found, anomalies = extracted(session, plans["int4[]"], "int4[]", ["[0:1]={7,8}", "{}", "{9}"])
    assert found == [[7, 8], [], [9]]
    assert anomalies == (Anomaly(plans["int4[]"].source, "array that does not start at 1", 1, "[0:1]={7,8}"),)


@together
@given(st.integers(-(2**31), 2**31 - 1))
def test_the_example_of_a_far_date_is_spelled_as_the_server_does(
    session: Session, plans: dict[str, ColumnPlan], number: int
) -> None:
    days = max(-2_451_507, min(number % 2_200_000_000 - 2_451_507, 2_145_031_948))
    spelled = session.value(f"SELECT (date '2000-01-01' + {days})::text")
    found, anomalies = extracted(session, plans["date"], "date", [spelled])
    if found == [None]:
        assert anomalies[0].example == spelled
    else:
        assert found[0] == date(2000, 1, 1) + timedelta(days)


def test_anomalies_add_up_over_batches_and_show_the_first_of_them_cut_short(
    session: Session, plans: dict[str, ColumnPlan]
) -> None:
    plan, anomalies = plans["int4[]"], Anomalies()
    long = f"{{{{{','.join(map(str, range(100)))}}}}}"
    for text in (long, "{{1}}"):
        list(extract(session, values_sql(plan, "int4[]", [text]), [plan], anomalies=anomalies))
    (found,) = anomalies.found
    assert (found.rows, found.example) == (2, f"{long[:100]}…")


def test_a_key_that_bronze_can_not_show_stops_the_batch(database: Database) -> None:
    database.run("CREATE TABLE t (day date PRIMARY KEY)", "INSERT INTO t VALUES ('infinity')")
    with transaction(database.supabase) as session:
        plans = plan_columns(describe(session, "public.t"))
        with pytest.raises(ReplicationError, match="day is part of the key"):
            list(extract(session, "public.t", plans, anomalies=Anomalies()))


# -- which rows, in which batches --------------------------------------------------------------------------------------


def test_rows_are_chosen_ordered_and_limited_and_come_in_the_planned_schema(database: Database) -> None:
    database.run(
        'CREATE TABLE t (id int8 PRIMARY KEY, "Odd, name" text[])',
        "INSERT INTO t SELECT g, ARRAY['a', g::text] FROM generate_series(1, 100) g",
    )
    with transaction(database.supabase) as session:
        table = describe(session, "public.t")
        plans = plan_columns(table)
        (batch,) = extract(
            session, table.rows_sql, plans, anomalies=Anomalies(), where="id > 5", order_by="id DESC", limit=3
        )
        nothing = list(extract(session, table.rows_sql, plans, anomalies=Anomalies(), where="id < 0"))
    assert batch.schema.equals(arrow_schema(plans), check_metadata=True)
    assert batch.column("id").to_pylist() == [100, 99, 98]
    assert batch.column("Odd__name").to_pylist() == [["a", "100"], ["a", "99"], ["a", "98"]]
    assert nothing == []


def test_a_large_table_comes_in_many_batches_of_some_megabytes(database: Database) -> None:
    database.run(
        "CREATE TABLE t (id int8 PRIMARY KEY, body text)",
        "INSERT INTO t SELECT g, repeat('x', 1000) FROM generate_series(1, 30000) g",
    )
    with transaction(database.supabase) as session:
        table = describe(session, "public.t")
        sizes = [
            (batch.num_rows, batch.nbytes)
            for batch in extract(session, table.rows_sql, plan_columns(table), anomalies=Anomalies())
        ]
    assert sum(rows for rows, _ in sizes) == 30_000
    assert 2 <= len(sizes) <= 8
    assert max(size for _, size in sizes) < 16 << 20


def test_a_column_that_arrives_otherwise_than_planned_stops_the_batch(
    session: Session, plans: dict[str, ColumnPlan]
) -> None:
    plan = plans["int8"]
    with pytest.raises(ReplicationError, match="arrives as int32"):
        list(extract(session, f"(SELECT 1::int4 AS {plan.source}) t", [plan], anomalies=Anomalies()))


# -- personal data -----------------------------------------------------------------------------------------------------


def test_a_hashed_column_arrives_as_the_keyed_hash_of_its_text(database: Database) -> None:
    database.run(
        "CREATE TABLE customers (id int8 PRIMARY KEY, email text, born date)",
        "CREATE TABLE claims (id int8 PRIMARY KEY, reporter varchar(50))",
        "INSERT INTO customers VALUES (1, 'a@example.com', '1980-01-31'), (2, NULL, 'infinity'), (3, '', NULL)",
        "INSERT INTO claims VALUES (1, 'a@example.com')",
    )

    def rows(source: str, hashed: tuple[str, ...], key: str = KEY) -> list[dict[str, Any]]:
        with transaction(database.supabase) as session:
            table = describe(session, source)
            plans = plan_columns(table, hashed=hashed, hash_key=key)
            found = extract(session, table.rows_sql, plans, anomalies=Anomalies(), order_by="id")
            return list(pa.Table.from_batches(found).to_pylist())

    def hashed(text: str) -> str:
        return hmac.new(KEY.encode(), text.encode(), hashlib.sha256).hexdigest()

    customers = rows("public.customers", ("email", "born"))
    assert customers == [
        {"id": 1, "email": hashed("a@example.com"), "born": hashed("1980-01-31")},
        {"id": 2, "email": None, "born": hashed("infinity")},
        {"id": 3, "email": hashed(""), "born": None},
    ]
    assert rows("public.claims", ("reporter",))[0]["reporter"] == customers[0]["email"]
    assert rows("public.claims", ("reporter",), "another key, long enough")[0]["reporter"] != customers[0]["email"]


def test_a_column_that_is_left_out_is_not_even_asked_for(database: Database) -> None:
    database.run(
        "CREATE TABLE customers (id int8 PRIMARY KEY)",
        "INSERT INTO customers VALUES (1)",
        "CREATE VIEW careful AS SELECT id, id / 0 AS secret FROM customers",
    )
    with transaction(database.supabase) as session:
        table = describe(session, "public.careful")
        (batch,) = extract(session, table.rows_sql, plan_columns(table, exclude=("secret",)), anomalies=Anomalies())
        assert batch.to_pylist() == [{"id": 1}]
        with pytest.raises(TelematicsError, match="division by zero"):
            list(extract(session, table.rows_sql, plan_columns(table), anomalies=Anomalies()))


@given(st.lists(st.none() | st.uuids(), max_size=5), st.integers(0, 5))
def test_uuids_are_spelled_canonically_also_in_a_slice(uuids: list[UUID | None], start: int) -> None:
    array = pa.array([None if value is None else value.bytes for value in uuids], pa.binary(16)).slice(start)
    text = uuid_text(array)
    text.validate(full=True)
    assert text.to_pylist() == as_texts(uuids)[start:]


@given(st.lists(st.none() | printable, max_size=5), st.integers(0, 5), st.binary(min_size=1, max_size=100))
@example(["a", "b"], 1, bytes(65))
def test_hashes_are_the_standard_s_and_stand_beside_their_rows_also_in_a_slice(
    texts: list[str | None], start: int, key: bytes
) -> None:
    found = keyed_hash(pa.array(texts, pa.string()).slice(start), key).to_pylist()
    assert found == [
        None if text is None else hmac.new(key, text.encode(), hashlib.sha256).hexdigest() for text in texts[start:]
    ]
