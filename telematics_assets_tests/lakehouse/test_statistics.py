"""What the log says of a data file hides no row from any reader, whatever the values are."""

from __future__ import annotations

import datetime as dt
import json
import math
import tempfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pytest
from deltalake import DeltaTable, QueryBuilder
from hypothesis import given
from hypothesis import strategies as st

from telematics_assets.catalog import TableName
from telematics_assets.lakehouse import data_files
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.lakehouse.statistics import TEXT_CHARS, Statistics, listed_columns
from telematics_assets.lakehouse.types import STATISTICS_PROPERTY, statistics_columns

NAME = TableName("a", "b", "c")
LAST = dt.datetime(9999, 12, 31, 23, 59, 59, 999999)
EDGE_TEXT = st.text(st.sampled_from("a\x00\ud7ff\ue000\uffff\U0010ffff"), min_size=TEXT_CHARS - 1, max_size=40)
VALUES: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.int8(): st.integers(-128, 127),
    pa.float64(): st.floats() | st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324]),
    pa.float32(): st.floats(width=32),
    pa.bool_(): st.booleans(),
    pa.string(): st.text(st.characters(codec="utf-8")) | EDGE_TEXT | st.sampled_from(["", "y" * 5_000, "z" * 64]),
    pa.binary(): st.binary(max_size=3),
    pa.date32(): st.dates() | st.sampled_from([dt.date.min, dt.date.max]),
    pa.timestamp("us", "UTC"): (st.datetimes() | st.sampled_from([dt.datetime.min, LAST])).map(
        lambda moment: moment.replace(tzinfo=dt.UTC)
    ),
    pa.timestamp("us"): st.datetimes() | st.sampled_from([dt.datetime.min, LAST]),
    pa.decimal128(15, 4): st.decimals(Decimal("-99999999999.9999"), Decimal("99999999999.9999"), places=4),
    pa.decimal128(15, 15): st.decimals(Decimal("-0.999999999999999"), Decimal("0.999999999999999"), places=15),
}


@st.composite
def columns(draw: st.DrawFn) -> tuple[pa.DataType, list[list[Any]]]:
    kind = draw(st.sampled_from(list(VALUES)))
    values = st.lists(st.none() | VALUES[kind], min_size=1, max_size=6)
    return kind, draw(st.lists(values, min_size=1, max_size=3))


def table_of(folder: str, kind: pa.DataType, files: list[list[Any]], *, listed: bool) -> DeltaTable:
    schema = pa.schema([pa.field("v", kind)])
    properties = {STATISTICS_PROPERTY: statistics_columns(schema)} if listed else {}
    table = DeltaLakehouse(Path(folder)).create(NAME, schema, "", properties)
    for number, values in enumerate(files):
        table.append(schema, [pa.record_batch([pa.array(values, kind)], schema=schema)], "app", number, {})
    return DeltaTable(table.uri)


def sized(value: Any) -> str:
    """A value as text that tells zeros and NaNs apart."""
    return repr(value)


@given(drawn=columns(), listed=st.booleans(), checkpoint=st.booleans())
def test_every_reader_that_skips_files_finds_every_row(
    drawn: tuple[pa.DataType, list[list[Any]]], listed: bool, checkpoint: bool
) -> None:
    kind, files = drawn
    everything = pa.array([value for values in files for value in values], kind)
    with tempfile.TemporaryDirectory() as folder:
        table = table_of(folder, kind, files, listed=listed)
        if checkpoint:
            table.create_checkpoint()
            table = DeltaTable(table.table_uri)
        dataset = table.to_pyarrow_dataset()
        held = pa.table({"v": everything})
        column = pc.field("v")
        compare: list[Callable[[Any, Any], Any]] = [
            lambda a, b: a == b,
            lambda a, b: a <= b,
            lambda a, b: a >= b,
            lambda a, b: a < b,
            lambda a, b: a > b,
        ]
        if not pa.types.is_floating(kind):
            # Of numbers Arrow itself overlooks a NaN, by the footer of any Parquet file.
            compare.append(lambda a, b: a != b)
        if not pa.types.is_boolean(kind):
            # Of a filter by NaN Arrow makes what it likes.
            looked_for = [value for value in everything.to_pylist() if value is not None and value == value]
            for value in {sized(value): value for value in looked_for}.values():
                scalar = pa.scalar(value, kind)
                for operation in compare:
                    expected = ds.dataset(held).to_table(filter=operation(column, scalar))
                    found = dataset.to_table(filter=operation(column, scalar))
                    assert sorted(map(sized, found["v"].to_pylist())) == sorted(map(sized, expected["v"].to_pylist()))
        empty = dataset.to_table(filter=column.is_null()).num_rows
        assert empty == everything.null_count
        assert dataset.to_table(filter=column.is_valid()).num_rows == len(everything) - empty


@given(drawn=columns())
def test_polars_and_sql_find_every_row_by_its_value(drawn: tuple[pa.DataType, list[list[Any]]]) -> None:
    kind, files = drawn
    everything = [value for values in files for value in values]
    with tempfile.TemporaryDirectory() as folder:
        table = table_of(folder, kind, files, listed=True)
        frame = pl.DataFrame(pa.table({"v": pa.array(everything, kind)}))
        scanned = pl.scan_delta(table.table_uri)
        for value in frame["v"].drop_nulls().unique():
            literal = pl.lit(value, frame.schema["v"])
            for test in (pl.col("v") == literal, pl.col("v") >= literal, pl.col("v") <= literal):
                assert scanned.filter(test).collect().height == frame.filter(test).height
        if kind == pa.int64():
            sql = QueryBuilder().register("t", table)
            for value in {value for value in everything if value is not None}:
                found = pa.table(sql.execute(f"SELECT count(*) AS n FROM t WHERE v >= {value}").read_all())
                assert found["n"].to_pylist() == [sum(v is not None and v >= value for v in everything)]


def told(kind: pa.DataType, *groups: list[Any]) -> dict[str, Any]:
    statistics = Statistics([pa.field("v", kind)])
    for values in groups:
        statistics.add(pa.table({"v": pa.array(values, kind)}))
    parsed: dict[str, Any] = json.loads(statistics.json())
    return parsed


def test_bounds_are_spelled_as_the_protocol_asks() -> None:
    moment = dt.datetime(2026, 1, 2, 3, 4, 5, 678901, dt.UTC)
    assert told(pa.timestamp("us", "UTC"), [moment]) == {
        "numRecords": 1,
        "minValues": {"v": "2026-01-02T03:04:05.678Z"},
        "maxValues": {"v": "2026-01-02T03:04:05.679Z"},
        "nullCount": {"v": 0},
    }
    assert told(pa.timestamp("us"), [dt.datetime(1969, 12, 31, 23, 59, 59, 999999)])["minValues"] == {
        "v": "1969-12-31T23:59:59.999"
    }
    assert told(pa.timestamp("us"), [LAST])["maxValues"] == {"v": "9999-12-31T23:59:59.999999"}
    assert told(pa.date32(), [dt.date(7, 1, 2), None])["minValues"] == {"v": "0007-01-02"}
    assert told(pa.float64(), [1.0], [math.inf, None]) == {
        "numRecords": 3,
        "minValues": {"v": 1.0},
        "maxValues": {"v": "Infinity"},
        "nullCount": {"v": 1},
    }
    assert told(pa.int64(), [None], [None])["nullCount"] == {"v": 2}
    assert told(pa.binary(), [b"a"]) == {"numRecords": 1, "minValues": {}, "maxValues": {}, "nullCount": {"v": 0}}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.float64(), [1.0, math.nan]),
        (pa.string(), ["\U0010ffff" * 5_000]),
        (pa.timestamp("us"), [2**62]),
        (pa.date32(), [2**31 - 1]),
    ],
    ids=str,
)
def test_a_file_of_which_nothing_is_true_for_all_readers_is_only_counted(kind: pa.DataType, values: list[Any]) -> None:
    statistics = Statistics([pa.field("v", kind)])
    array = pa.array(values, pa.int64()).cast(kind) if pa.types.is_timestamp(kind) else pa.array(values, kind)
    statistics.add(pa.table({"v": array}))
    assert statistics.json() == f'{{"numRecords":{len(values)}}}'


def test_a_long_text_is_bounded_by_its_beginning() -> None:
    found = told(pa.string(), ["b" * 5_000, "c" * 5_000])
    assert found["minValues"] == {"v": "b" * TEXT_CHARS}
    assert found["maxValues"] == {"v": "c" * (TEXT_CHARS - 1) + "d"}
    assert told(pa.string(), ["\ud7ff" * 5_000])["maxValues"] == {"v": "\ud7ff" * (TEXT_CHARS - 1) + "\ue000"}


def test_the_columns_with_statistics_are_those_of_the_table() -> None:
    schema = pa.schema([("a", pa.int64()), ("l", pa.list_(pa.int64())), ("b", pa.int64())])

    def names(properties: dict[str, str]) -> list[str]:
        return [field.name for field in listed_columns(schema, properties) or ()]

    assert names({}) == ["a", "b"]
    assert names({"delta.dataSkippingNumIndexedCols": "2"}) == ["a"]
    assert names({"delta.dataSkippingNumIndexedCols": "-1"}) == ["a", "b"]
    assert names({STATISTICS_PROPERTY: "b,gone"}) == ["b"]
    assert listed_columns(schema, {STATISTICS_PROPERTY: "s.inner"}) is None
    assert listed_columns(pa.schema([("s", pa.struct([("a", pa.int64())]))]), {}) is None
    assert listed_columns(pa.schema([("d", pa.decimal128(20, 2))]), {}) is None


def test_texts_of_several_row_groups_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_files, "GROUP_ROWS", 2)
    texts = ["m", "n", "long " * 2_000, "b", None, None, "z", "q"]
    table = table_of(str(tmp_path), pa.string(), [texts], listed=True)
    (add,) = pa.table(table.get_add_actions(flatten=True)).to_pylist()
    assert (add["min.v"], add["max.v"], add["null_count.v"], add["num_records"]) == ("b", "z", 2, 8)


def test_rows_without_a_column_are_found_as_rows_without_its_value(tmp_path: Path) -> None:
    schema = pa.schema([("v", pa.int64()), ("w", pa.string())])
    table = DeltaLakehouse(tmp_path).create(NAME, schema, "", {STATISTICS_PROPERTY: "v,w"})
    table.append(schema, [pa.record_batch([[1], ["x"]], schema=schema)], "app", 0, {})
    narrow = schema.remove(1)
    table.append(narrow, [pa.record_batch([[2]], schema=narrow)], "app", 1, {})
    dataset = DeltaTable(table.uri).to_pyarrow_dataset()
    assert dataset.to_table(filter=pc.field("w").is_null())["v"].to_pylist() == [2]
    assert pl.scan_delta(table.uri).filter(pl.col("w").is_null()).collect()["v"].to_list() == [2]


def test_a_name_with_a_dot_is_not_the_inside_of_another_column(tmp_path: Path) -> None:
    schema = pa.schema([("s.t", pa.string()), ("s", pa.struct([("t", pa.string())]))])
    table = DeltaLakehouse(tmp_path).create(NAME, schema, "", {"delta.dataSkippingNumIndexedCols": "1"})
    table.append(schema, [pa.record_batch([["z"], [{"t": "a"}]], schema=schema)], "app", 0, {})
    found = DeltaTable(table.uri).to_pyarrow_dataset().to_table(filter=pc.field(("s.t",)) == "z")
    assert found.num_rows == 1
