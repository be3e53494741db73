"""Parquet as different writers lay it out: the rows are the same, whatever the pages, codecs and lists look like."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from telematics_assets_tests.conformance.platforms import Platform
from telematics_assets_tests.conformance.samples import parquet_stream

MOMENT = datetime(2026, 1, 31, 7, 30, 0, 123456)
ROWS = pa.table(
    {
        "n": pa.array(range(200), pa.int64()),
        "i": pa.array([None, -(2**31)] * 100, pa.int32()),
        "f": pa.array([0.1, None] * 100, pa.float32()),
        "d": pa.array([5e-324, -0.0] * 100),
        "s": pa.array(["", "ü\x00", None, "x" * 50] * 50),
        "b": pa.array([True, None] * 100),
        "x": pa.array([b"", b"\xff", None, b"\x00"] * 50),
        "dec": pa.array([Decimal("-1.50"), None] * 100, pa.decimal128(38, 2)),
        "day": pa.array([date(1, 1, 1), None] * 100),
        "at": pa.array([MOMENT.replace(tzinfo=UTC), None] * 100, pa.timestamp("us", "UTC")),
        "l": pa.array([[1, None], [], None, [2]] * 50, pa.list_(pa.int64())),
        "ll": pa.array([[[1], None, []], None] * 100, pa.list_(pa.list_(pa.int8()))),
        "st": pa.array(
            [{"a": 1, "b": {"c": ["x", None]}}, {"a": None, "b": None}, None, {"a": 2, "b": {"c": None}}] * 50,
            pa.struct([("a", pa.int16()), ("b", pa.struct([("c", pa.list_(pa.string()))]))]),
        ),
        "m": pa.array([[("k", [1.5])], [], None, [("", None)]] * 50, pa.map_(pa.string(), pa.list_(pa.float64()))),
        "ls": pa.array(
            [[{"m": [(1, "v")]}, None], None] * 100, pa.list_(pa.struct([("m", pa.map_(pa.int32(), pa.string()))]))
        ),
    }
)
TYPES = [
    *("BIGINT", "INT", "FLOAT", "DOUBLE", "STRING", "BOOLEAN", "BINARY", "DECIMAL(38,2)", "DATE", "TIMESTAMP"),
    *("ARRAY<BIGINT>", "ARRAY<ARRAY<TINYINT>>", "STRUCT<a: SMALLINT, b: STRUCT<c: ARRAY<STRING>>>"),
    *("MAP<STRING, ARRAY<DOUBLE>>", "ARRAY<STRUCT<m: MAP<INT, STRING>>>"),
]  # fmt: skip


def written(table: pa.Table = ROWS, **options: Any) -> bytes:
    """A file by pyarrow."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


#: Ways to write `ROWS`.
LAYOUTS: dict[str, dict[str, Any]] = {
    **{f"{codec}": {"compression": codec} for codec in ("none", "snappy", "gzip", "brotli", "zstd", "lz4")},
    "pages v1": {"data_page_version": "1.0", "version": "1.0"},
    "pages v2": {"data_page_version": "2.0", "compression": "zstd"},
    "many pages": {"data_page_size": 64, "write_batch_size": 8, "row_group_size": 30, "data_page_version": "2.0"},
    "plain": {"use_dictionary": False, "column_encoding": "PLAIN"},
    "delta": {
        "use_dictionary": False,
        "column_encoding": {
            **dict.fromkeys(["n", "i", "day", "at"], "DELTA_BINARY_PACKED"),
            **dict.fromkeys(["f", "d", "dec"], "BYTE_STREAM_SPLIT"),
            "s": "DELTA_BYTE_ARRAY",
            "x": "DELTA_LENGTH_BYTE_ARRAY",
            "b": "RLE",
        },
    },
    "no arrow schema": {"store_schema": False},
    "checksums": {"write_page_checksum": True, "write_page_index": True},
    "old list names": {"use_compliant_nested_type": False},
    "decimals as integers": {"store_decimal_as_integer": True},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_same_rows_is_the_same_table(platform: Platform, layout: str) -> None:
    stream = parquet_stream()
    platform.volume_put("parquet/a", written(**LAYOUTS[layout]))
    report = platform.engine.ingest(stream)
    assert (report.rows, report.rows_rescued) == (200, 0)
    assert list(platform.columns(stream).values()) == TYPES
    assert repr(platform.rows(stream, *ROWS.column_names)) == repr(ROWS.to_pylist())


@pytest.mark.parametrize("codec", ["uncompressed", "snappy", "gzip", "brotli", "zstd", "lz4"])
def test_what_polars_writes_is_the_same_table(platform: Platform, codec: Any) -> None:
    stream = parquet_stream()
    # polars has no maps.
    names = [name for name in ROWS.column_names if name not in ("m", "ls")]
    buffer = io.BytesIO()
    pl.DataFrame(ROWS.select(names)).write_parquet(buffer, compression=codec, row_group_size=70)
    platform.volume_put("parquet/a", buffer.getvalue())
    assert platform.engine.ingest(stream).rows_rescued == 0
    assert list(platform.columns(stream).values()) == TYPES[: len(names)]
    assert repr(platform.rows(stream, *names)) == repr(ROWS.select(names).to_pylist())


def test_files_of_different_writers_go_into_one_table(platform: Platform) -> None:
    stream = parquet_stream()
    for number, layout in enumerate(LAYOUTS.values()):
        platform.volume_put(f"parquet/{number}", written(ROWS.slice(number, 1), **layout), number)
    report = platform.engine.ingest(stream)
    assert (report.rows, report.rows_rescued) == (len(LAYOUTS), 0)
    assert repr(platform.rows(stream, *ROWS.column_names)) == repr(ROWS.slice(0, len(LAYOUTS)).to_pylist())


def test_list_views_and_dictionaries_are_lists_and_values(platform: Platform) -> None:
    stream = parquet_stream()
    views = pa.array([[1, None], None, [], [2]], pa.list_view(pa.int16()))
    nested = pa.array([[[1]], None, [[2], [3]], []], pa.list_(pa.list_view(pa.int64())))
    kinds = pa.array([["x"], None, ["y", "x"], []], pa.list_(pa.dictionary(pa.int8(), pa.string())))
    rows = pa.table({"n": range(4), "views": views, "nested": nested, "kinds": kinds})
    platform.volume_put("parquet/a", written(rows, row_group_size=3))
    assert platform.engine.ingest(stream).rows_rescued == 3
    assert platform.columns(stream) == {"n": "BIGINT", "views": "ARRAY<SMALLINT>", "kinds": "ARRAY<STRING>"}
    found = platform.rows(stream, "n", "views", "kinds", "_rescued_data")
    assert [row["views"] for row in found] == views.to_pylist()
    assert [row["kinds"] for row in found] == kinds.to_pylist()
    texts = [row["_rescued_data"] and row["_rescued_data"].partition(',"_file_path"')[0] for row in found]
    assert texts == ['{"nested":[[1]]', None, '{"nested":[[2],[3]]', '{"nested":[]']


def test_int96_timestamps_are_instants_also_within_lists(platform: Platform) -> None:
    stream = parquet_stream()
    naive = pa.array([MOMENT, None, datetime(1, 1, 1)], pa.timestamp("us"))
    rows = pa.table({"n": range(3), "at": naive, "l": pa.ListArray.from_arrays([0, 2, 2, 3], naive)})
    platform.volume_put("parquet/a", written(rows, use_deprecated_int96_timestamps=True))
    assert platform.engine.ingest(stream).rows_rescued == 0
    assert platform.columns(stream) == {"n": "BIGINT", "at": "TIMESTAMP", "l": "ARRAY<TIMESTAMP>"}
    first, last = MOMENT.replace(tzinfo=UTC), datetime(1, 1, 1, tzinfo=UTC)
    assert platform.rows(stream, "n", "at", "l") == [
        {"n": 0, "at": first, "l": [first, None]},
        {"n": 1, "at": None, "l": []},
        {"n": 2, "at": last, "l": [last]},
    ]


# -- lists as old writers lay them out, by hand ------------------------------------------------------------------------

_I32, _I64, _TEXT, _LIST, _STRUCT = 5, 6, 8, 9, 12
Member = tuple[int, int, Any]


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def compact(kind: int, value: Any) -> bytes:
    """A value in Thrift's compact protocol; a struct is a list of (id, kind, value), a list is (kind, values)."""
    if kind in (_I32, _I64):
        return varint(value << 1 if value >= 0 else (-value << 1) - 1)
    if kind == _TEXT:
        text: bytes = value.encode()
        return varint(len(text)) + text
    if kind == _LIST:
        inner, values = value
        return bytes([len(values) << 4 | inner]) + b"".join(compact(inner, item) for item in values)
    out = b""
    last = 0
    for number, member, item in value:
        out += bytes([(number - last) << 4 | member]) + compact(member, item)
        last = number
    return out + b"\0"


def levels(values: Iterable[int]) -> bytes:
    runs = b"".join(varint(1 << 1) + bytes([value]) for value in values)
    return struct.pack("<i", len(runs)) + runs


def two_level_file(schema: Sequence[list[Member]], path: list[str], rows: int, entries: list[Any]) -> bytes:
    """A file of one INT32 column.

    Args:
        schema: The elements of its schema.
        path: The column in it.
        rows: How many rows there are.
        entries: Repetition level, definition level, and the value or None.
    """
    values = [value for *_, value in entries if value is not None]
    data = (
        levels(r for r, _, _ in entries) + levels(d for _, d, _ in entries) + struct.pack(f"<{len(values)}i", *values)
    )
    page: list[Member] = [(1, _I32, len(entries)), (2, _I32, 0), (3, _I32, 3), (4, _I32, 3)]
    header: list[Member] = [(1, _I32, 0), (2, _I32, len(data)), (3, _I32, len(data)), (5, _STRUCT, page)]
    body = compact(_STRUCT, header) + data
    column: list[Member] = [
        (1, _I32, 1),
        (2, _LIST, (_I32, [0, 3])),
        (3, _LIST, (_TEXT, path)),
        (4, _I32, 0),
        (5, _I64, len(entries)),
        (6, _I64, len(body)),
        (7, _I64, len(body)),
        (9, _I64, 4),
    ]
    group: list[Member] = [
        (1, _LIST, (_STRUCT, [[(2, _I64, 4), (3, _STRUCT, column)]])),
        (2, _I64, len(body)),
        (3, _I64, rows),
    ]
    footer = compact(
        _STRUCT, [(1, _I32, 1), (2, _LIST, (_STRUCT, schema)), (3, _I64, rows), (4, _LIST, (_STRUCT, [group]))]
    )
    return b"PAR1" + body + footer + struct.pack("<i", len(footer)) + b"PAR1"


def element(name: str, repetition: int, *, children: int = 0, is_list: bool = False) -> list[Member]:
    kind: list[Member] = [] if children else [(1, _I32, 1)]
    below: list[Member] = [(5, _I32, children)] if children else []
    return [*kind, (3, _I32, repetition), (4, _TEXT, name), *below, *([(6, _I32, 3)] if is_list else [])]


ROOT: list[Member] = [(4, _TEXT, "schema"), (5, _I32, 1)]


@pytest.mark.parametrize("inner", ["array", "v_tuple", "element"])
def test_a_list_of_two_levels_is_a_list(platform: Platform, inner: str) -> None:
    stream = parquet_stream()
    schema = [ROOT, element("v", 1, children=1, is_list=True), element(inner, 2)]
    entries = [(0, 2, 1), (1, 2, 2), (0, 1, None), (0, 0, None), (0, 2, 3)]
    platform.volume_put("parquet/a", two_level_file(schema, ["v", inner], 4, entries))
    assert platform.engine.ingest(stream).rows_rescued == 0
    assert platform.columns(stream) == {"v": "ARRAY<INT>"}
    assert [row["v"] for row in platform.rows(stream)] == [[1, 2], [], None, [3]]


def test_a_repeated_column_without_a_list_around_it_is_a_list(platform: Platform) -> None:
    stream = parquet_stream()
    entries = [(0, 1, 1), (1, 1, 2), (0, 0, None), (0, 1, 3)]
    platform.volume_put("parquet/a", two_level_file([ROOT, element("v", 2)], ["v"], 3, entries))
    assert platform.engine.ingest(stream).rows_rescued == 0
    assert platform.columns(stream) == {"v": "ARRAY<INT>"}
    assert [row["v"] for row in platform.rows(stream)] == [[1, 2], [], [3]]
