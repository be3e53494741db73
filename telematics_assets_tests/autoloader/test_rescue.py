"""What does not fit, as JSON that loses nothing."""

from __future__ import annotations

import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from telematics_assets.autoloader.rescue import json_text, rescued_json

FILE = "/Volumes/workspace/00_landing/telematics/parquet/a.parquet"
UTC_US = pa.timestamp("us", "UTC")
STRUCT = pa.struct([("a", pa.int64()), ('b"', pa.list_(pa.float64()))])
BAD_TEXT = pa.Array.from_buffers(pa.string(), 2, [None, *pa.array([b"a\xff", b"ok"]).buffers()[1:]])

SHOWN: list[tuple[pa.Array, list[str | None]]] = [
    (pa.array([1, -(2**63), None]), ["1", "-9223372036854775808", None]),
    (pa.array([2**64 - 1], pa.uint64()), ["18446744073709551615"]),
    (pa.array([True, False, None]), ["true", "false", None]),
    (pa.array([1.0, -0.0, 0.1, 1e300, 5e-324, None]), ["1.0", "-0.0", "0.1", "1e+300", "5e-324", None]),
    (
        pa.array([float("nan"), float("inf"), float("-inf"), None, 2.0]),
        ['"NaN"', '"Infinity"', '"-Infinity"', None, "2.0"],
    ),
    (pa.array([0.1, None], pa.float32()), ["0.1", None]),
    (pa.array([0.5], pa.float16()), ["0.5"]),
    (pa.array([Decimal("123.40"), Decimal("0.00")], pa.decimal128(38, 2)), ["123.40", "0.00"]),
    (pa.array([Decimal(10) ** 60], pa.decimal256(70, 0)), ["1" + "0" * 60]),
    (pa.array(["a", "", None]), ['"a"', '""', None]),
    (pa.array(['"', "\\", "é\u2028\U0001f600"]), ['"\\""', '"\\\\"', '"é\u2028\U0001f600"']),
    (pa.array(["a\n\t\r\x00\x1f"]), ['"a\\n\\t\\r\\u0000\\u001f"']),
    (pa.array(["x"], pa.string_view()), ['"x"']),
    (pa.array(["x", None]).dictionary_encode(), ['"x"', None]),
    (BAD_TEXT, ['"base64:Yf8="', '"ok"']),
    (pa.array([b"\x00\xff", None]), ['"AP8="', None]),
    (pa.array([b"ab"], pa.binary(2)), ['"YWI="']),
    (pa.array([0, -800_000], pa.date32()), ['"1970-01-01"', '"-0221-09-04"']),
    (pa.array([2**31 - 1], pa.date32()), ['"2147483647 days since 1970-01-01"']),
    (pa.array([86_400_001], pa.date64()), ['"1970-01-02T00:00:00.001"']),
    (pa.array([1, None], pa.timestamp("ns")), ['"1970-01-01T00:00:00.000000001"', None]),
    (pa.array([-1], UTC_US), ['"1969-12-31T23:59:59.999999Z"']),
    (pa.array([0], pa.timestamp("s", "America/New_York")), ['"1970-01-01T00:00:00Z"']),
    (pa.array([2**62, 0], UTC_US), ['"4611686018427387904 us since 1970-01-01"', '"1970-01-01T00:00:00.000000Z"']),
    (pa.array([1, -1], pa.time64("ns")), ['"00:00:00.000000001"', '"-1 ns since midnight"']),
    (pa.array([3_723], pa.time32("s")), ['"01:02:03"']),
    (pa.array([1_500, None], pa.duration("ms")), ['"1500 ms"', None]),
    (pa.array([[1, None], [], None]), ["[1,null]", "[]", None]),
    (pa.array([[9], [1, None], [], None]).slice(1), ["[1,null]", "[]", None]),
    (pa.array([[1, 2], None], pa.list_(pa.int8(), 2)), ["[1,2]", None]),
    (
        pa.array([{"a": 1, 'b"': [1.5]}, None, {"a": None, 'b"': None}], STRUCT),
        ['{"a":1,"b\\"":[1.5]}', None, '{"a":null,"b\\"":null}'],
    ),
    (pa.array([{}, None], pa.struct([])), ["{}", None]),
    (
        pa.array([[("k", 1), ("k", 2)], [], None], pa.map_(pa.string(), pa.int64())),
        ['[{"key":"k","value":1},{"key":"k","value":2}]', "[]", None],
    ),
    (pa.nulls(2), [None, None]),
    (pa.array([[1]], pa.list_view(pa.int64())), ["[1]"]),
    (pa.array([], pa.list_(pa.int64())), []),
]


@pytest.mark.parametrize(
    ("array", "texts"), SHOWN, ids=lambda value: str(value.type) if isinstance(value, pa.Array) else ""
)
def test_a_value_is_shown_with_all_that_it_says(array: pa.Array, texts: list[str | None]) -> None:
    shown = json_text(array)
    assert shown.type == pa.string()
    assert shown.to_pylist() == texts
    for text in texts:
        json.loads(text or "null")


def test_a_row_names_its_rescued_values_and_its_file() -> None:
    columns = {"rpm": pa.array(["fast", None, None]), "Gear": pa.array([3, 4, None])}
    assert rescued_json(columns, FILE, 3).to_pylist() == [
        f'{{"rpm":"fast","Gear":3,"_file_path":"{FILE}"}}',
        f'{{"Gear":4,"_file_path":"{FILE}"}}',
        None,
    ]


@pytest.mark.parametrize("columns", [{}, {"gear": pa.nulls(2, pa.int8())}], ids=["no column", "only nulls"])
def test_nothing_rescued_is_null(columns: dict[str, pa.Array]) -> None:
    assert rescued_json(columns, FILE, 2).equals(pa.nulls(2, pa.string()))


def test_a_null_in_a_nested_value_is_something() -> None:
    assert rescued_json({"l": pa.array([[None], None])}, "a", 2).to_pylist() == ['{"l":[null],"_file_path":"a"}', None]


def test_a_column_called_like_the_file_path_makes_way_for_it() -> None:
    columns = {"_file_path": pa.array(["x"]), "__file_path": pa.array(["y"])}
    (text,) = rescued_json(columns, 'a"b', 1).to_pylist()
    assert json.loads(text) == {"___file_path": "x", "__file_path": "y", "_file_path": 'a"b'}


def test_odd_names_stay_json() -> None:
    (text,) = rescued_json({'a"\n': pa.array([1]), "": pa.array([2])}, "ü", 1).to_pylist()
    assert json.loads(text) == {'a"\n': 1, "": 2, "_file_path": "ü"}


@pytest.mark.parametrize(
    ("array", "texts"),
    [
        (pa.array([pa.MonthDayNano([1, -2, 3]), None]), ['"1 months -2 days 3 ns"', None]),
        (pc.run_end_encode(pa.array([1, 1, None])), ["1", "1", None]),
        (
            pa.array([[[1], None], None, [[2], []]], pa.list_(pa.list_view(pa.int64()))),
            ["[[1],null]", None, "[[2],[]]"],
        ),
        (pa.array([[1, None], None, []], pa.large_list_view(pa.int8())), ["[1,null]", None, "[]"]),
        (pa.array([{}, None], pa.struct([])), ["{}", None]),
        (
            pa.UnionArray.from_sparse(
                pa.array([0, 1, 0], pa.int8()), [pa.array([1, None, None]), pa.array([None, 'a"', "y"])]
            ),
            ["1", '"a\\""', None],
        ),
        (
            pa.array(
                [{"at": [1_001], "n": Decimal("9" * 60)}],
                pa.struct([("at", pa.list_(pa.timestamp("ns"))), ("n", pa.decimal256(60, 0))]),
            ),
            [f'{{"at":["1970-01-01T00:00:00.000001001"],"n":{"9" * 60}}}'],
        ),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_types_without_a_column_are_readable(array: pa.Array, texts: list[str | None]) -> None:
    assert json_text(array).to_pylist() == texts
    assert json_text(array.slice(1)).to_pylist() == texts[1:]
