"""The map between Arrow and Delta, held against real Delta tables."""

from __future__ import annotations

import datetime as dt
import json
import re
from decimal import Decimal
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable, write_deltalake
from hypothesis import given
from hypothesis import strategies as st

from telematics_assets.autoloader.rescue import json_text
from telematics_assets.errors import SchemaError
from telematics_assets.lakehouse.ddl import holdable
from telematics_assets.lakehouse.types import (
    arrow_type,
    delta_type,
    fits,
    lossless_cast,
    plain,
    statistics_columns,
    storable,
    wider,
)

US_UTC = pa.timestamp("us", "UTC")
DELTA_TYPES = {
    "STRING": pa.string(),
    "BIGINT": pa.int64(),
    "INT": pa.int32(),
    "SMALLINT": pa.int16(),
    "TINYINT": pa.int8(),
    "DOUBLE": pa.float64(),
    "FLOAT": pa.float32(),
    "BOOLEAN": pa.bool_(),
    "TIMESTAMP": US_UTC,
    "TIMESTAMP_NTZ": pa.timestamp("us"),
    "DATE": pa.date32(),
    "BINARY": pa.binary(),
    "DECIMAL(10,2)": pa.decimal128(10, 2),
    "DECIMAL(38,38)": pa.decimal128(38, 38),
}
FIRST, LAST = dt.datetime(1, 1, 1), dt.datetime(9999, 12, 31, 23, 59, 59, 999999)
STRUCT = pa.struct([("a", pa.uint8()), ("b", pa.list_(pa.timestamp("ms", "+05:00")))])

#: File type -> values at the edges of what it can say.
FILE_VALUES: list[tuple[pa.DataType, list[object]]] = [
    (pa.bool_(), [True, False, None]),
    (pa.int8(), [-128, 127, None]),
    (pa.int16(), [-(2**15), 2**15 - 1, None]),
    (pa.int32(), [-(2**31), 2**31 - 1, None]),
    (pa.int64(), [-(2**63), 2**63 - 1, None]),
    (pa.uint8(), [0, 255, None]),
    (pa.uint16(), [0, 2**16 - 1, None]),
    (pa.uint32(), [0, 2**32 - 1, None]),
    (pa.uint64(), [0, 2**64 - 1, None]),
    (pa.float16(), [0.5, 65504.0, -0.0, None]),
    (pa.float32(), [1.401298464324817e-45, float("inf"), -0.0, None]),
    (pa.float64(), [5e-324, 1.7976931348623157e308, float("-inf"), 0.1, None]),
    (pa.string(), ["", "a\x00b", "\U0010ffff" * 50, None]),
    (pa.large_string(), ["é", None]),
    (pa.string_view(), ["a text of more than twelve bytes", "x", None]),
    (pa.dictionary(pa.int8(), pa.string()), ["x", "y", "x", None]),
    (pa.binary(), [b"", b"\x00\xff", None]),
    (pa.large_binary(), [b"\xff", None]),
    (pa.binary_view(), [b"\xff", None]),
    (pa.binary(3), [b"abc", None]),
    (pa.date32(), [FIRST.date(), LAST.date(), None]),
    (pa.date64(), [FIRST.date(), LAST.date(), None]),
    (pa.timestamp("s"), [FIRST, dt.datetime(9999, 12, 31, 23, 59, 59), None]),
    (pa.timestamp("ms", "UTC"), [dt.datetime(1969, 12, 31, 23, 59, 59, 999000, dt.UTC), None]),
    (US_UTC, [FIRST.replace(tzinfo=dt.UTC), LAST.replace(tzinfo=dt.UTC), None]),
    (pa.timestamp("us", "America/New_York"), [dt.datetime(2024, 7, 1, tzinfo=dt.UTC), None]),
    (pa.timestamp("us"), [FIRST, LAST, None]),
    (pa.timestamp("ns", "UTC"), [dt.datetime(2024, 7, 1, 0, 0, 0, 1, dt.UTC), None]),
    (pa.decimal32(5, 2), [Decimal("-999.99"), None]),
    (pa.decimal64(18, 0), [Decimal("9" * 18), None]),
    (pa.decimal128(38, 38), [Decimal("0." + "9" * 38), None]),
    (pa.decimal128(5, -2), [Decimal("1234500"), None]),
    (pa.decimal256(38, 0), [Decimal("9" * 38), None]),
    (pa.list_(pa.int32()), [[1, None], [], None]),
    (pa.large_list(pa.uint32()), [[2**32 - 1], None]),
    (pa.list_(pa.int64(), 2), [[1, 2], None]),
    (pa.map_(pa.string(), pa.uint16()), [[("a", 65535), ("b", None)], [], None]),
    (STRUCT, [{"a": 255, "b": [dt.datetime(2024, 7, 1, tzinfo=dt.UTC), None]}, {"a": None, "b": None}, None]),
    (pa.uuid(), [b"0123456789abcdef", None]),
    (pa.json_(), ['{"a":1}', None]),
    (pa.bool8(), [0, 1, 2, None]),
    (pa.list_view(pa.uint8()), [[1, None], [], None, [255]]),
    (pa.large_list_view(pa.string()), [["x", None], [], None]),
    (pa.list_(pa.dictionary(pa.int8(), pa.string())), [["x", None], None]),
    (pa.list_(pa.binary(3), 2), [[b"abc", None], None]),
    (pa.map_(pa.large_string(), pa.large_list(pa.float16())), [[("a", [0.5, None])], None]),
    (pa.list_(pa.struct([("m", pa.map_(pa.string(), pa.decimal64(5, 2)))])), [[{"m": [("a", Decimal("1.50"))]}], None]),
]
NOT_STORABLE = [
    pa.null(),
    pa.time32("s"),
    pa.time64("ns"),
    pa.duration("us"),
    pa.month_day_nano_interval(),
    pa.decimal256(39, 0),
    pa.decimal128(38, -1),
    pa.struct([]),
    pa.struct([("a", pa.time32("s"))]),
    pa.struct([("a b", pa.int64())]),
    pa.struct([("a", pa.int64()), ("A", pa.int64())]),
    pa.list_(pa.duration("s")),
    pa.map_(pa.string(), pa.null()),
    pa.list_(pa.list_view(pa.int64())),
    pa.list_view(pa.list_view(pa.int64())),
    pa.struct([("a", pa.large_list_view(pa.int64()))]),
    pa.map_(pa.string(), pa.list_view(pa.int64())),
    pa.run_end_encoded(pa.int32(), pa.int64()),
    pa.list_(pa.run_end_encoded(pa.int32(), pa.int64())),
    pa.sparse_union([pa.field("0", pa.int64())]),
    pa.list_(pa.struct([])),
    pa.list_(pa.null()),
]


def flags(misfits: pa.Array | None) -> list[bool]:
    assert misfits is not None
    return list(misfits.to_pylist())


@pytest.mark.parametrize(("spelling", "arrow"), DELTA_TYPES.items())
def test_a_delta_type_and_its_arrow_type_name_each_other(spelling: str, arrow: pa.DataType) -> None:
    assert arrow_type(spelling) == arrow
    assert arrow_type(f" {spelling.lower()} ") == arrow
    assert delta_type(arrow) == spelling


@pytest.mark.parametrize(
    "spelling", ["TEXT", "DECIMAL(39,0)", "DECIMAL(5,6)", "DECIMAL(0,0)", "DECIMAL", "BIGINT(3)", ""]
)
def test_an_unknown_type_is_refused_with_the_accepted_ones(spelling: str) -> None:
    with pytest.raises(SchemaError, match=r"is not a column type. Use one of: STRING, BIGINT.*DECIMAL"):
        arrow_type(spelling)


def test_nested_types_are_shown_in_sql_spelling() -> None:
    nested = pa.struct([("a", pa.list_(pa.int64())), ("b", pa.map_(pa.string(), pa.decimal128(5, 1)))])
    assert delta_type(nested) == "STRUCT<a: ARRAY<BIGINT>, b: MAP<STRING, DECIMAL(5,1)>>"
    assert delta_type(pa.duration("s")) == "duration[s]"


@pytest.mark.parametrize(("kind", "values"), FILE_VALUES, ids=[str(kind) for kind, _ in FILE_VALUES])
def test_every_storable_value_survives_a_real_delta_table(
    kind: pa.DataType, values: list[object], tmp_path: Path
) -> None:
    table_type = storable(kind)
    assert table_type is not None
    assert fits(kind, table_type)
    written, misfits = lossless_cast(_array(kind, values), table_type)
    assert misfits is None
    assert written.type == table_type
    assert written.to_pylist() == plain(_array(kind, values)).to_pylist()

    write_deltalake(str(tmp_path), pa.table({"v": written}))
    table = DeltaTable(str(tmp_path))
    assert pa.schema(table.schema().to_arrow()).field("v").type == table_type
    assert repr(table.to_pyarrow_table()["v"].to_pylist()) == repr(written.to_pylist())


@pytest.mark.parametrize("kind", NOT_STORABLE, ids=str)
def test_a_type_that_delta_cannot_hold_exactly_gets_no_column(kind: pa.DataType) -> None:
    assert storable(kind) is None


def test_a_naive_timestamp_column_can_join_an_old_table(tmp_path: Path) -> None:
    write_deltalake(str(tmp_path), pa.table({"a": [1]}))
    naive = pa.array([dt.datetime(2024, 7, 1, 0, 0, 0, 7)], pa.timestamp("us"))
    write_deltalake(str(tmp_path), pa.table({"a": [2], "n": naive}), mode="append", schema_mode="merge")

    protocol = DeltaTable(str(tmp_path)).protocol()
    assert (protocol.min_reader_version, protocol.reader_features) == (3, ["timestampNtz"])
    assert pl.read_delta(str(tmp_path)).sort("a")["n"].to_list() == [None, dt.datetime(2024, 7, 1, 0, 0, 0, 7)]


LOSSLESS = [
    (pa.int8(), pa.int64()),
    (pa.uint8(), pa.int16()),
    (pa.uint64(), pa.decimal128(20, 0)),
    (pa.int32(), pa.float64()),
    (pa.uint32(), pa.float64()),
    (pa.int16(), pa.float32()),
    (pa.int64(), pa.decimal128(21, 2)),
    (pa.float16(), pa.float64()),
    (pa.float32(), pa.float64()),
    (pa.decimal128(5, 2), pa.decimal128(8, 4)),
    (pa.dictionary(pa.int32(), pa.large_string()), pa.string()),
    (pa.timestamp("ns", "+01:00"), US_UTC),
    (pa.timestamp("ns"), pa.timestamp("us")),
    (pa.date64(), pa.date32()),
    (pa.null(), pa.float64()),
    (pa.list_(pa.int8()), pa.list_(pa.int64())),
    (pa.struct([("a", pa.int8())]), pa.struct([("b", pa.string()), ("a", pa.int64())])),
    (pa.map_(pa.string(), pa.int8()), pa.map_(pa.string(), pa.int64())),
]
LOSSY = [
    (pa.float64(), pa.int64()),
    (pa.float64(), pa.float32()),
    (pa.float32(), pa.int32()),
    (pa.int64(), pa.float64()),
    (pa.int32(), pa.float32()),
    (pa.int64(), pa.int32()),
    (pa.int64(), pa.uint64()),
    (pa.uint64(), pa.int64()),
    (pa.int8(), pa.string()),
    (pa.string(), pa.int64()),
    (pa.string(), pa.binary()),
    (pa.binary(), pa.string()),
    (pa.bool_(), pa.int64()),
    (pa.int64(), pa.bool_()),
    (pa.timestamp("us"), US_UTC),
    (US_UTC, pa.timestamp("us")),
    (pa.date32(), US_UTC),
    (US_UTC, pa.date32()),
    (pa.int64(), US_UTC),
    (pa.int64(), pa.decimal128(18, 0)),
    (pa.decimal128(5, 2), pa.decimal128(5, 1)),
    (pa.decimal128(5, 2), pa.decimal128(5, 3)),
    (pa.decimal128(5, 2), pa.float64()),
    (pa.list_(pa.int64()), pa.list_(pa.int32())),
    (pa.list_(pa.int64()), pa.int64()),
    (pa.struct([("a", pa.int64()), ("b", pa.int64())]), pa.struct([("a", pa.int64())])),
    (pa.struct([("A", pa.int64())]), pa.struct([("a", pa.int64())])),
    (pa.struct([("a", pa.int64()), ("a", pa.int64())]), pa.struct([("a", pa.int64())])),
    (pa.map_(pa.string(), pa.int64()), pa.map_(pa.string(), pa.int32())),
    (pa.time64("us"), pa.int64()),
]


@pytest.mark.parametrize(("file_type", "table_type"), LOSSLESS, ids=str)
def test_a_wider_column_takes_a_narrower_one(file_type: pa.DataType, table_type: pa.DataType) -> None:
    assert fits(file_type, table_type)
    values, misfits = lossless_cast(pa.nulls(3, file_type), table_type)
    assert (values.type, values.null_count, misfits) == (table_type, 3, None)


@pytest.mark.parametrize(("file_type", "table_type"), LOSSY, ids=str)
def test_a_column_never_takes_what_it_could_change(file_type: pa.DataType, table_type: pa.DataType) -> None:
    assert not fits(file_type, table_type)


WIDER = [
    (pa.int8(), pa.uint8(), pa.int16()),
    (pa.int32(), pa.decimal128(5, 2), pa.decimal128(12, 2)),
    (pa.int8(), pa.decimal128(5, 2), pa.decimal128(12, 2)),
    (pa.int64(), pa.decimal128(5, 2), pa.decimal128(22, 2)),
    (pa.decimal128(5, 2), pa.int64(), pa.decimal128(22, 2)),
    (pa.decimal128(5, 2), pa.decimal256(7, 3), pa.decimal128(7, 3)),
    (pa.int32(), pa.float16(), pa.float64()),
    (pa.date32(), pa.timestamp("ns"), pa.timestamp("us")),
    (
        pa.struct([("a", pa.int8()), ("b", pa.string())]),
        pa.struct([("a", pa.int16())]),
        pa.struct([("a", pa.int16()), ("b", pa.string())]),
    ),
    (pa.int64(), pa.int32(), None),
    (pa.int64(), pa.float64(), None),
    (pa.float64(), pa.int64(), None),
    (pa.float64(), pa.decimal128(5, 2), None),
    (pa.decimal128(38, 2), pa.decimal128(38, 3), None),
    (pa.decimal128(5, 2), pa.float64(), None),
    (pa.date32(), US_UTC, None),
    (pa.string(), pa.int64(), None),
    (pa.bool_(), pa.int8(), None),
    (pa.int32(), pa.time32("s"), None),
    (pa.int32(), pa.null(), None),
    (pa.struct([("a", pa.int8())]), pa.struct([("a", pa.int8()), ("b", pa.int8())]), None),
    (pa.list_(pa.int8()), pa.list_(pa.string()), None),
]


@pytest.mark.parametrize(("table_type", "file_type", "expected"), WIDER, ids=str)
def test_a_column_is_widened_as_delta_allows_and_no_further(
    table_type: pa.DataType, file_type: pa.DataType, expected: pa.DataType | None
) -> None:
    found = wider(table_type, file_type)
    assert found == expected
    if found is not None:
        assert fits(file_type, found)
        assert fits(table_type, found)


def test_delta_rs_would_cut_a_fraction_without_a_word(tmp_path: Path) -> None:
    """The reason for `fits`: if this ever fails, delta-rs has learned to refuse."""
    write_deltalake(str(tmp_path), pa.table({"rpm": [1]}))
    write_deltalake(str(tmp_path), pa.table({"rpm": [2.5]}), mode="append")
    assert sorted(DeltaTable(str(tmp_path)).to_pyarrow_table()["rpm"].to_pylist()) == [1, 2]


@pytest.mark.parametrize("zone", [None, "UTC"])
def test_only_the_values_that_are_too_fine_or_too_far_are_left_out(zone: str | None) -> None:
    fine = pa.array([1_000, 1_001, -1_000, -1, None], pa.timestamp("ns", zone))
    values, misfits = lossless_cast(fine, pa.timestamp("us", zone))
    assert values.cast(pa.int64()).to_pylist() == [1, None, -1, None, None]
    assert flags(misfits) == [False, True, False, True, False]

    far = pa.array([253_402_300_799, 253_402_300_800, -62_135_596_800, -62_135_596_801, 2**62], pa.timestamp("s", zone))
    _, misfits = lossless_cast(far, pa.timestamp("us", zone))
    assert flags(misfits) == [False, True, False, True, True]


def test_a_date_that_would_stop_delta_rs_is_left_out() -> None:
    values, misfits = lossless_cast(pa.array([2**31 - 1, 0, 2_932_896, -719_163], pa.date32()), pa.date32())
    assert flags(misfits) == [True, False, False, True]
    assert values.to_pylist() == [None, dt.date(1970, 1, 1), dt.date(9999, 12, 31), None]


def test_a_moment_within_a_day_is_no_date() -> None:
    values, misfits = lossless_cast(pa.array([86_400_000, 86_400_001, None], pa.date64()), pa.date32())
    assert flags(misfits) == [False, True, False]
    assert values.to_pylist() == [dt.date(1970, 1, 2), None, None]


def test_text_that_is_no_utf8_is_left_out_row_by_row_even_when_nested() -> None:
    raw = [b"a", b"\xff", b"c", b"d"]
    text = pa.Array.from_buffers(pa.string(), 4, [None, *pa.array(raw).buffers()[1:]])
    values, misfits = lossless_cast(text, pa.string())
    assert (values.to_pylist(), flags(misfits)) == (["a", None, "c", "d"], [False, True, False, False])

    listed = pa.ListArray.from_arrays([0, 1, 2, 4], text)
    values, misfits = lossless_cast(listed, pa.list_(pa.string()))
    assert (values.to_pylist(), flags(misfits)) == ([["a"], None, ["c", "d"]], [False, True, False])


def test_a_nested_timestamp_that_is_too_fine_takes_its_row_along() -> None:
    kind = pa.map_(pa.string(), pa.timestamp("ns", "UTC"))
    array = pa.array([[("a", 1_000)], [("b", 1)], None, [("c", 2_000)]], kind)
    values, misfits = lossless_cast(array.slice(1), pa.map_(pa.string(), US_UTC))
    assert flags(misfits) == [True, False, False]
    assert values.is_null().to_pylist() == [True, True, False]


@pytest.mark.parametrize("name", ["a", "ü", "a.b", "a`b", "A'\"", "x" * 255, "%41", "日本"])
def test_delta_holds_a_column_of_this_name(name: str, tmp_path: Path) -> None:
    assert holdable(name)
    write_deltalake(str(tmp_path), pa.table({name: [1]}))
    assert DeltaTable(str(tmp_path)).to_pyarrow_table().to_pydict() == {name: [1]}


@pytest.mark.parametrize("name", ["", "a b", "a,b", "a;b", "a{", "a}", "(", ")", "a\nb", "a\tb", "a=b", "\x00", "\x7f"])
def test_a_name_that_needs_column_mapping_is_not_held(name: str) -> None:
    assert not holdable(name)


@pytest.mark.parametrize("name", ["\ud800", "x" * 256])
def test_a_name_without_text_or_end_is_not_held(name: str) -> None:
    assert not holdable(name)


def test_without_statistics_a_decimal_is_found_again(tmp_path: Path) -> None:
    large = Decimal("9" * 20)
    rows = pa.table({"id": [1], "large": pa.array([large], pa.decimal128(20, 0))})
    finding = pc.field("large") > pa.scalar(Decimal(10**19), pa.decimal128(20, 0))

    write_deltalake(str(tmp_path / "as_it_comes"), rows)
    assert DeltaTable(str(tmp_path / "as_it_comes")).to_pyarrow_dataset().to_table(filter=finding).num_rows == 0

    listed = statistics_columns(rows.schema)
    assert listed == "id"
    ours = str(tmp_path / "ours")
    write_deltalake(ours, rows, configuration={"delta.dataSkippingStatsColumns": listed})
    assert DeltaTable(ours).to_pyarrow_dataset().to_table(filter=finding).num_rows == 1


def test_statistics_name_only_columns_that_can_be_listed() -> None:
    fields = [
        pa.field("speed_kmh", pa.float64()),
        pa.field("odd.name", pa.int64()),
        pa.field("price", pa.decimal128(15, 2)),
        pa.field("device", pa.struct([("a", pa.int64())])),
    ]
    assert statistics_columns(fields) == "speed_kmh,price"


def _array(kind: pa.DataType, values: list[object]) -> pa.Array:
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))
    if pa.types.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode()
    return pa.array(values, kind)


# -- the table for people ----------------------------------------------------------------------------------------------


def members(*types: pa.DataType) -> list[pa.Field]:
    return [pa.field(str(number), kind) for number, kind in enumerate(types)]


#: Every type of the table, by Arrow's own spelling.
SHOWN = {
    str(kind): kind
    for kind in [
        *(pa.bool_(), pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
        *(pa.float16(), pa.float32(), pa.float64()),
        *(pa.decimal32(9, 2), pa.decimal64(18, 2), pa.decimal128(38, 2), pa.decimal256(38, 2), pa.decimal256(39, 2)),
        *(pa.decimal256(76, 0), pa.decimal128(5, -2)),
        *(pa.string(), pa.large_string(), pa.string_view()),
        *(pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(12)),
        *(pa.date32(), pa.date64(), pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns")),
        *(pa.timestamp(unit, zone) for unit in ("s", "ms", "us", "ns") for zone in (None, "UTC")),
        *(pa.duration(unit) for unit in ("s", "ms", "us", "ns")),
        *(pa.month_day_nano_interval(), pa.null(), pa.dictionary(pa.int32(), pa.string())),
        pa.run_end_encoded(pa.int32(), pa.int64()),
        *(pa.list_(pa.int32()), pa.large_list(pa.int32()), pa.list_(pa.int32(), 2)),
        *(pa.list_view(pa.int32()), pa.large_list_view(pa.int32()), pa.list_(pa.list_view(pa.int32()))),
        pa.map_(pa.string(), pa.uint8()),
        pa.struct([("a", pa.uint8()), ("b", pa.list_(pa.string()))]),
        *(pa.struct([]), pa.struct([("a b", pa.int32())]), pa.struct([("a", pa.int32()), ("A", pa.int32())])),
        pa.struct([("a", pa.time32("s"))]),
        pa.sparse_union(members(pa.int64(), pa.string())),
        pa.dense_union(members(pa.int64(), pa.string())),
        *(pa.uuid(), pa.json_(), pa.bool8()),
    ]
}
#: No Python object has these.
NOT_MADE = {"INTERVAL_MONTHS", "INTERVAL_DAY_TIME"}


def test_the_table_in_the_docs_says_what_the_code_does() -> None:
    text = (Path(__file__).parents[2] / "docs" / "types.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.split("\n## ")[1].splitlines() if line.startswith("| `")]
    told: dict[str, str | None] = {}
    for arrow, delta, _ in rows:
        kinds, types = re.findall("`([^`]+)`", arrow), re.findall("`([^`]+)`", delta)
        assert delta == "no column" or len(types) == len(kinds), arrow
        told |= dict(zip(kinds, types or [None] * len(kinds), strict=True))
    held = {name: storable(kind) for name, kind in SHOWN.items()}
    assert told == {name: None if kind is None else delta_type(kind) for name, kind in held.items()}


def test_the_table_leaves_no_arrow_type_out() -> None:
    ids = {getattr(pa.lib, name): name for name in dir(pa.lib) if name.startswith("Type_")}
    named = {ids[kind.id] for kind in SHOWN.values() if kind.id in ids}
    assert {name.removeprefix("Type_") for name in ids.values()} - {n.removeprefix("Type_") for n in named} == NOT_MADE


@st.composite
def nested_values(draw: st.DrawFn) -> tuple[pa.DataType, list[object]]:
    """A type of a few levels that has a column, and some values of it."""
    kinds: st.SearchStrategy[tuple[pa.DataType, st.SearchStrategy[object]]] = st.recursive(
        st.sampled_from(
            [
                (pa.uint8(), st.integers(0, 255)),
                (pa.large_string(), st.text(max_size=3)),
                (pa.string_view(), st.text(max_size=20)),
                (pa.decimal64(5, 2), st.integers(-999, 999).map(lambda n: Decimal(n).scaleb(-2))),
            ]
        ),
        lambda inner: st.one_of(
            inner.map(lambda i: (pa.list_(i[0]), st.lists(i[1] | st.none(), max_size=3))),
            inner.map(lambda i: (pa.large_list(i[0]), st.lists(i[1] | st.none(), max_size=3))),
            inner.map(lambda i: (pa.list_(i[0], 2), st.lists(i[1] | st.none(), min_size=2, max_size=2))),
            inner.map(
                lambda i: (
                    pa.map_(pa.string(), i[0]),
                    st.dictionaries(st.text(max_size=2), i[1] | st.none(), max_size=2).map(lambda d: list(d.items())),
                )
            ),
            st.tuples(inner, inner).map(
                lambda two: (
                    pa.struct([("a", two[0][0]), ("b", two[1][0])]),
                    st.fixed_dictionaries({"a": two[0][1] | st.none(), "b": two[1][1] | st.none()}),
                )
            ),
        ),
        max_leaves=4,
    )
    kind, value = draw(kinds)
    if draw(st.booleans()):
        kind, value = pa.list_view(kind), st.lists(value | st.none(), max_size=3)
    return kind, draw(st.lists(value | st.none(), max_size=6))


@given(nested_values(), st.integers(0, 3))
def test_every_nested_value_is_cast_exactly_also_from_a_slice(
    made: tuple[pa.DataType, list[object]], start: int
) -> None:
    kind, values = made
    table_type = storable(kind)
    assert table_type is not None
    array = pa.array(values, kind).slice(start)
    written, misfits = lossless_cast(array, table_type)
    assert misfits is None
    assert written.to_pylist() == array.to_pylist()
    assert [text and json.loads(text) for text in json_text(written).to_pylist()] == [
        text and json.loads(text) for text in json_text(array).to_pylist()
    ]
