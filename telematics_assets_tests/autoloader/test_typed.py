"""Text of JSON and csv files in typed columns: exactly, or rescued verbatim."""

from __future__ import annotations

import io
import json
import re
import struct
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telematics_assets.autoloader.chunks import Chunk
from telematics_assets.autoloader.formats import read_file
from telematics_assets.autoloader.typed import typed
from telematics_assets.catalog import CORRUPT_RECORD, FileStream, TableContract
from telematics_assets.lakehouse.ddl import DeltaType, parse_type
from telematics_assets.lakehouse.types import arrow_type

MISFIT = object()

#: Type -> JSON texts that it holds, with their values; then texts that it does not hold.
JSON_VALUES: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "BIGINT",
        {"0": 0, "-1": -1, "9223372036854775807": 2**63 - 1, "-9223372036854775808": -(2**63)},
        ["9223372036854775808", "2.5", "2.0", "1e3", "-0", '"5"', "true", "[1]", '{"a":1}', "1" * 5000],
    ),
    ("TINYINT", {"127": 127, "-128": -128}, ["128", "-129"]),
    ("SMALLINT", {"32767": 32767}, ["32768"]),
    ("INT", {"-2147483648": -(2**31)}, ["2147483648"]),
    (
        "DOUBLE",
        {
            "0.1": 0.1,
            "1.10": 1.1,
            "1e3": 1000.0,
            "1E+3": 1000.0,
            "52520006599999995e-15": 52.520006599999995,
            "0.30000000000000004": 0.30000000000000004,
            "52.520006599999995": 52.520006599999995,
            "123456789012345680000": 123456789012345680000.0,
            "9007199254740992": 2.0**53,
            "5e-324": 5e-324,
            "1.7976931348623157e308": 1.7976931348623157e308,
            "0e999999999999999999999": 0.0,
        }
        | {"1." + "0" * 400: 1.0},
        [
            "12345678901234567890123",
            "9007199254740993",
            "0.1234567890123456789",
            "1e400",
            "-1e400",
            "1e-400",
            "2e-324",
            "1e99999999999999999999",
            "1" * 5000,
            '"0.1"',
            '"NaN"',
            "true",
        ],
    ),
    ("FLOAT", {"0.1": struct.unpack("f", struct.pack("f", 0.1))[0], "16777216": 2.0**24}, ["16777217", "3.5e38"]),
    (
        "DECIMAL(5,2)",
        {"1.10": Decimal("1.10"), "-999.99": Decimal("-999.99"), "1.1000": Decimal("1.10"), "1e2": Decimal(100)}
        | {"12345e-2": Decimal("123.45"), "0": Decimal(0), "0e7": Decimal(0)},
        ["1.101", "1000", "1e3", "-0", "-0.00", "1e-400", "1e99999999", '"1.10"'],
    ),
    ("DECIMAL(2,2)", {"0.25": Decimal("0.25"), "0": Decimal(0)}, ["1", "0.125"]),
    ("DECIMAL(38,0)", {"9" * 38: Decimal("9" * 38)}, ["9" * 39]),
    ("BOOLEAN", {"true": True, "false": False}, ["1", "0", '"true"']),
    (
        "DATE",
        {'"2026-01-31"': date(2026, 1, 31), '"0001-01-01"': date(1, 1, 1), '"9999-12-31"': date(9999, 12, 31)}
        | {r'"2026\u002d01-31"': date(2026, 1, 31)},
        [
            '"2026-02-30"',
            '"0000-01-01"',
            '"2026-1-31"',
            '" 2026-01-31"',
            '"2026-01-31T00:00"',
            "20260131",
            '"٢٠٢٦-01-31"',
        ],
    ),
    (
        "TIMESTAMP",
        {
            '"2026-01-31T12:00:01Z"': datetime(2026, 1, 31, 12, 0, 1, tzinfo=UTC),
            '"2026-01-31 12:00"': datetime(2026, 1, 31, 12, tzinfo=UTC),
            '"2026-01-31T12:00:00.123456"': datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=UTC),
            '"2026-01-31T12:00:00.120000000+02:30"': datetime(2026, 1, 31, 9, 30, 0, 120000, tzinfo=UTC),
            '"2026-01-01T00:00-01:00"': datetime(2026, 1, 1, 1, tzinfo=UTC),
            '"0001-01-01T00:00:00Z"': datetime(1, 1, 1, tzinfo=UTC),
            '"9999-12-31T23:59:59.999999Z"': datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
        },
        [
            '"2026-01-31"',
            '"2026-01-31T12:00:00.1234567Z"',
            '"2026-02-30T12:00:00Z"',
            '"2026-01-31T24:00:00Z"',
            '"2026-01-31T12:00:60Z"',
            '"2026-01-31T12:00:00+0200"',
            '"2026-01-31T12:00:00 Z"',
            '"2026-01-31T12:00:00ZZ"',
            '"2026-01-31T12:00:000"',
            '"0001-01-01T00:00:00+00:01"',
            '"9999-12-31T23:59:59-00:01"',
            '"0000-12-31T23:59:59Z"',
            "1769860800",
        ],
    ),
    (
        "TIMESTAMP_NTZ",
        {'"2026-01-31T12:00:01"': datetime(2026, 1, 31, 12, 0, 1), '"2026-01-31 12:00"': datetime(2026, 1, 31, 12)},
        ['"2026-01-31T12:00:01Z"', '"2026-01-31T12:00:01+00:00"'],
    ),
    (
        "ARRAY<BIGINT>",
        {"[]": [], "[ ]": [], "[1,null, 2 ]": [1, None, 2], "[\t1\n,\r2]": [1, 2]},
        ["[1,2.5]", '["1"]', "[[1]]", "1", "{}", '"[1]"'],
    ),
    (
        "ARRAY<STRING>",
        {r'["a,]\"","\\",5,1.10,{"x": [1]},null,true]': ['a,]"', "\\", "5", "1.10", '{"x": [1]}', None, "true"]},
        [r'["ok","\ud800"]'],
    ),
    (
        "STRUCT<a: BIGINT, b: STRUCT<c: STRING>>",
        {
            "{}": {"a": None, "b": None},
            '{"a":null,"b":{}}': {"a": None, "b": {"c": None}},
            '{ "b" : {"c":"x"} , "a" : 1 }': {"a": 1, "b": {"c": "x"}},
            r'{"\u0061":1}': {"a": 1, "b": None},
        },
        [
            '{"a":1,"a":1}',
            '{"a":1,"\\u0061":null}',
            '{"A":1}',
            '{"a":1,"x":2}',
            '{"b":{"c":1,"d":2}}',
            '{"a":"1"}',
            r'{"\ud800":1}',
            "[]",
            '"{}"',
        ],
    ),
    (
        "MAP<STRING, DOUBLE>",
        {"{}": [], '{"b":1,"a":null}': [("b", 1.0), ("a", None)], r'{"\u00e4,":0.1}': [("ä,", 0.1)]},
        ['{"a":1,"a":1}', '{"a":"x"}', '{"a":1e400}', "[]", r'{"\ud800":1}'],
    ),
    (
        "ARRAY<MAP<STRING, ARRAY<STRUCT<km: DOUBLE>>>>",
        {
            '[{"x":[{"km":1.5},{"km":null},{}],"y":[]},{},null]': [
                [("x", [{"km": 1.5}, {"km": None}, {"km": None}]), ("y", [])],
                [],
                None,
            ]
        },
        ['[{"x":[{"km":1.5},{"Km":1}]}]'],
    ),
]


@pytest.mark.parametrize(("kind", "held", "others"), JSON_VALUES, ids=[kind for kind, _, _ in JSON_VALUES])
def test_a_json_value_is_in_its_column_exactly_or_not_at_all(
    kind: str, held: dict[str, Any], others: list[str]
) -> None:
    texts = [text for pair in zip([*held, *held], [*others, None, *others, None], strict=False) for text in pair]
    texts = [*held, *others, None, *texts]
    values = typed(pa.array(texts, pa.string()), arrow_type(kind), is_json=True)
    values.validate(full=True)
    assert values.type == arrow_type(kind)
    assert values.to_pylist() == [held.get(text) if text is not None else None for text in texts]
    for text in (*held, *others):
        assert typed(pa.array([text]), arrow_type(kind), is_json=True).to_pylist() == [held.get(text)]


@pytest.mark.parametrize(
    ("kind", "held", "others"),
    [
        ("BIGINT", {"7": 7}, ["007", "+7", " 7", "7 ", "7\n", "", "1_000", "٣", "0x1"]),
        ("DOUBLE", {"0.5": 0.5, "1E2": 100.0}, [".5", "5.", "NaN", "inf", "1,5", "0x1p3", "1d"]),
        ("DECIMAL(3,1)", {"1.50": Decimal("1.5")}, ["+1.5", ".5", "1.55"]),
        ("BOOLEAN", {"true": True, "false": False}, ["True", "TRUE", "t", "1", "yes"]),
        ("DATE", {"2026-01-31": date(2026, 1, 31)}, ["31.01.2026", '"2026-01-31"']),
        ("TIMESTAMP", {"2026-01-31T12:00Z": datetime(2026, 1, 31, 12, tzinfo=UTC)}, ["2026-01-31"]),
    ],
)
def test_a_csv_field_is_read_by_its_text(kind: str, held: dict[str, Any], others: list[str]) -> None:
    texts = [*held, *others, None]
    values = typed(pa.array(texts, pa.string()), arrow_type(kind), is_json=False)
    assert values.to_pylist() == [None if text is None else held.get(text) for text in texts]


def rows(data: str, *, format: str = "json", text: str = "", **columns: str) -> list[dict[str, Any]]:
    """A file's rows in these columns, as the loader gets them."""
    options = {"schema_evolution_mode": "rescue"}
    stream = FileStream("s", format, "s", "s", TableContract("S."), options)  # type: ignore[arg-type]
    own = [pa.field(CORRUPT_RECORD, pa.string()), pa.field("_rescued_data", pa.string())]
    fields = [pa.field(name, arrow_type(kind)) for name, kind in columns.items()]
    chunks: list[Chunk] = list(read_file(io.BytesIO(data.encode()), stream, pa.schema([*fields, *own]), "p"))
    found = [row for chunk in chunks for row in chunk.table.to_pylist()]
    assert sum(chunk.rescued_rows for chunk in chunks) == sum(row["_rescued_data"] is not None for row in found)
    return found


def test_all_that_a_row_rescues_is_one_json_in_which_every_text_is_verbatim() -> None:
    line = '{"x": [ 1 ,1e400],"n" : "5", "m":{"A":1, "A":2} ,"s":5,"u":1.10,"k\\"":-0}\n'
    (row,) = rows(line, x="ARRAY<DOUBLE>", n="BIGINT", m="STRUCT<A: INT>", s="STRING", **{'k"': "INT"})
    assert row["_rescued_data"] == ('{"u":1.10,"x":[ 1 ,1e400],"n":"5","m":{"A":1, "A":2},"k\\"":-0,"_file_path":"p"}')
    assert [row[name] for name in ("x", "n", "m", "s", 'k"')] == [None, None, None, "5", None]


def test_a_csv_row_rescues_texts_beside_fields_beyond_the_header() -> None:
    found = rows('n,s,u\n1,a,\n"q""\t",b,c,d\n,"",\n', format="csv", n="BIGINT", s="STRING")
    assert [row["n"] for row in found] == [1, None, None]
    assert [row["s"] for row in found] == ["a", "b", ""]
    assert [row["_rescued_data"] for row in found] == [
        None,
        '{"u":"c","_c3":"d","n":"q\\"\\t","_file_path":"p"}',
        None,
    ]


def test_null_missing_and_corrupt_are_null_and_not_rescued() -> None:
    found = rows('{"n":null}\n{}\n{"n":1,"n":2}\n{"n":1}\n', n="BIGINT")
    assert [row["n"] for row in found] == [None, None, None, 1]
    assert [row["_rescued_data"] for row in found] == [None] * 4
    assert [row[CORRUPT_RECORD] is not None for row in found] == [False, False, True, False]


# -- any value, any type -----------------------------------------------------------------------------------------------

NUMBER = st.one_of(
    st.integers(-300, 300).map(str),
    st.integers(-(2**65), 2**65).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(lambda x: json.dumps(x)),
    st.from_regex(
        re.compile(r"-?(0|[1-9][0-9]{0,18})(\.[0-9]{1,18})?([eE][+-]?[0-9]{1,4})?", re.ASCII), fullmatch=True
    ),
)
MOMENT = st.datetimes().map(lambda moment: moment.isoformat())
STAMP = st.one_of(
    st.dates().map(str),
    st.tuples(MOMENT, st.sampled_from(["", "Z", "+02:00", "-11:30", "0", "+1", "+20:00"])).map("".join),
    st.from_regex(
        re.compile(r"[0-2]00[0-9]-[01][0-9]-[0-3][0-9]([T ][0-2][0-9]:[0-6][0-9](:[0-6][0-9])?)?Z?", re.ASCII),
        fullmatch=True,
    ),
)
STRING = st.one_of(STAMP, st.text(max_size=5), st.sampled_from(["\ud800", 'a"b', "\\", "1"])).map(json.dumps)
SCALAR = st.one_of(NUMBER, STRING, st.sampled_from(["true", "false", "null"]))
KEY = st.sampled_from(['"a"', '"b"', '"A"', '"\\u0061"', '"\\ud800"', '"ä ,}"'])
SPACE = st.sampled_from(["", "", " ", "\t", "      "])


def _values(inside: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    spaced = st.tuples(SPACE, inside, SPACE).map("".join)
    member = st.tuples(SPACE, KEY, SPACE, st.just(":"), spaced).map("".join)
    return st.one_of(
        st.tuples(SPACE, st.lists(spaced, max_size=3).map(",".join)).map(lambda parts: f"[{parts[0]}{parts[1]}]"),
        st.tuples(SPACE, st.lists(member, max_size=3).map(",".join)).map(lambda parts: f"{{{parts[0]}{parts[1]}}}"),
    )


VALUES = st.recursive(SCALAR, _values, max_leaves=6)
SCALARS = ("BIGINT", "TINYINT", "DOUBLE", "FLOAT", "BOOLEAN", "STRING", "DATE", "TIMESTAMP", "TIMESTAMP_NTZ")
LEAF = st.sampled_from((*SCALARS, "DECIMAL(10,3)", "DECIMAL(38,38)"))
TYPES = st.recursive(
    LEAF,
    lambda inside: st.one_of(
        inside.map(lambda kind: f"ARRAY<{kind}>"),
        inside.map(lambda kind: f"MAP<STRING, {kind}>"),
        st.tuples(inside, inside).map(lambda both: f"STRUCT<a: {both[0]}, b: {both[1]}>"),
    ),
    max_leaves=3,
)


class _Text(str):
    """A JSON string, apart from numbers, which are plain text."""


def parsed(text: str) -> Any:
    """A JSON value with numbers as text, objects as lists of pairs in a tuple, strings as `_Text`."""
    return _marked(
        json.loads(
            text,
            parse_int=lambda t: ("number", t),
            parse_float=lambda t: ("number", t),
            object_pairs_hook=lambda pairs: ("object", pairs),
        )
    )


def _marked(value: Any) -> Any:
    if isinstance(value, str):
        return _Text(value)
    if isinstance(value, list):
        return [_marked(item) for item in value]
    if isinstance(value, tuple) and value[0] == "object":
        return "object", [(key, _marked(item)) for key, item in value[1]]
    return value


def expected(value: Any, kind: DeltaType, source: str | None = None) -> Any:
    """What a column of a type shows of a value, or `MISFIT`; said again in plain Python."""
    if value is None:
        return None
    if kind.name == "STRING":
        if isinstance(value, _Text):
            return MISFIT if any("\ud800" <= char <= "\udfff" for char in value) else str(value)
        return source
    if kind.name == "BOOLEAN":
        return value if isinstance(value, bool) else MISFIT
    if isinstance(value, _Text):
        return _expected_moment(value, kind)
    if isinstance(value, tuple) and value[0] == "number":
        return _expected_number(value[1], kind)
    if isinstance(value, list) and kind.name == "ARRAY":
        items = [expected(item, kind.parts[0][1], ANY) for item in value]
        return MISFIT if MISFIT in items else items
    if isinstance(value, tuple) and value[0] == "object" and kind.name in ("STRUCT", "MAP"):
        return _expected_object(value[1], kind)
    return MISFIT


class _Any:
    """Equals any text: the source of a nested value, which the oracle does not cut out."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str)

    __hash__ = None  # type: ignore[assignment]


ANY: Any = _Any()


def _expected_object(pairs: list[tuple[str, Any]], kind: DeltaType) -> Any:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys) or any("\ud800" <= char <= "\udfff" for key in keys for char in key):
        return MISFIT
    if kind.name == "MAP":
        items = [(key, expected(value, kind.parts[1][1], ANY)) for key, value in pairs]
        return MISFIT if any(value is MISFIT for _, value in items) else items
    fields = dict(kind.parts)
    if not set(keys) <= set(fields):
        return MISFIT
    found = dict.fromkeys(fields) | {key: expected(value, fields[key], ANY) for key, value in pairs}
    return MISFIT if any(value is MISFIT for value in found.values()) else found


def _expected_number(text: str, kind: DeltaType) -> Any:
    number = Decimal(text)
    if kind.name in ("BIGINT", "TINYINT"):
        bits = 63 if kind.name == "BIGINT" else 7
        return int(text) if re.fullmatch("0|-?[1-9][0-9]*", text) and -(2**bits) <= int(text) < 2**bits else MISFIT
    if kind.name == "DOUBLE":
        return float(text) if Decimal(repr(float(text))) == number else MISFIT
    if kind.name == "FLOAT":
        value = pa.scalar(text).cast(pa.float32(), safe=False) if abs(number) < Decimal("3.5e38") else None
        if value is None:
            return MISFIT
        return value.as_py() if Decimal(value.cast(pa.string()).as_py()) == number else MISFIT
    if kind.digits is not None:
        precision, scale = kind.digits
        if number.is_zero():
            return MISFIT if number.is_signed() else Decimal(0)
        _, digits, exponent = number.as_tuple()
        assert isinstance(exponent, int)
        while digits[-1] == 0:
            digits, exponent = digits[:-1], exponent + 1
        return number if -exponent <= scale and len(digits) + exponent <= precision - scale else MISFIT
    return MISFIT


def _expected_moment(text: str, kind: DeltaType) -> Any:
    try:
        if kind.name == "DATE" and re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
            return date.fromisoformat(text)
        found = re.fullmatch(
            r"([0-9-]{10})[T ]([0-9]{2}:[0-9]{2})(?::([0-9]{2})(?:\.([0-9]+))?)?(Z|[+-][0-9]{2}:[0-9]{2})?", text
        )
        if found is None or not kind.name.startswith("TIMESTAMP"):
            return MISFIT
        day, minutes, seconds, fraction, zone = found.groups()
        fraction = (fraction or "").ljust(6, "0")
        if fraction[6:].strip("0") or (zone and kind.name == "TIMESTAMP_NTZ"):
            return MISFIT
        moment = datetime.fromisoformat(f"{day}T{minutes}:{seconds or '00'}.{fraction[:6]}")
        if kind.name == "TIMESTAMP_NTZ":
            return moment
        if zone and zone != "Z":
            hours, rest = int(zone[1:3]), int(zone[4:])
            if hours > 18 or rest > 59:
                return MISFIT
            moment -= (1 if zone[0] == "+" else -1) * timedelta(hours=hours, minutes=rest)
        return moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return MISFIT


@settings(max_examples=150)
@given(TYPES, st.lists(VALUES, min_size=1, max_size=6))
def test_any_json_value_is_in_its_column_or_rescued_verbatim(kind: str, texts: list[str]) -> None:
    found = rows("".join(f'{{"c": {text} }}\n' for text in texts), c=kind)
    for text, row in zip(texts, found, strict=True):
        if row[CORRUPT_RECORD] is not None:
            assert "\\ud800" in text, "only a record with a lone surrogate as its string is none"
            continue
        value = expected(parsed(text), parse_type(kind), text)
        if kind == "STRING" and value is MISFIT:
            pytest.fail("a record with an undecodable string is corrupt")
        assert row["c"] == (None if value is MISFIT else value)
        assert row["_rescued_data"] == (f'{{"c":{text},"_file_path":"p"}}' if value is MISFIT else None)


@given(
    LEAF,
    st.lists(
        st.one_of(NUMBER, STAMP, st.text(max_size=4), st.sampled_from(["true", "1 ", "+1"])), min_size=1, max_size=6
    ),
)
def test_any_csv_field_is_in_its_column_or_rescued_verbatim(kind: str, texts: list[str]) -> None:
    texts = [text for text in texts if text]
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    found = rows("c\n" + "".join(f"{text}\n" for text in quoted), format="csv", c=kind)
    for text, row in zip(texts, found, strict=True):
        value: Any = MISFIT
        if kind == "STRING":
            value = text
        elif re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?", text, re.ASCII):
            value = _expected_number(text, parse_type(kind))
        elif kind == "BOOLEAN":
            value = {"true": True, "false": False}.get(text, MISFIT)
        else:
            value = _expected_moment(text, parse_type(kind))
        assert row["c"] == (None if value is MISFIT else value)
        rescued = None if row["_rescued_data"] is None else json.loads(row["_rescued_data"])
        assert rescued == ({"c": text, "_file_path": "p"} if value is MISFIT else None)
