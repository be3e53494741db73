"""Parquet files become rows: once each, with every value exactly, and with where they came from."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from decimal import Decimal

import pyarrow as pa
import pytest

from telematics_assets.catalog import Column
from telematics_assets.engines.base import IngestRequest
from telematics_assets.errors import OptionError, TableNotFoundError
from telematics_assets_tests.conformance.platforms import LOCATION, Platform
from telematics_assets_tests.conformance.samples import parquet, parquet_stream

MARCH = datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=UTC)
MARCH_NS = 1_772_368_215_123_456_000


def test_the_rows_of_all_files_are_in_the_table(platform: Platform) -> None:
    stream = parquet_stream()
    platform.volume_put("parquet/a.parquet", parquet(n=[1, 2], name=["one", None]))
    platform.volume_put("parquet/2026/03/b.parquet", parquet(n=[3], name=["three"]))
    report = platform.engine.ingest(stream)
    assert (report.files_ingested, report.rows, report.table_rows, report.files_skipped) == (2, 3, 3, 0)
    assert platform.rows(stream, "n", "name", "_rescued_data") == [
        {"n": 1, "name": "one", "_rescued_data": None},
        {"n": 2, "name": None, "_rescued_data": None},
        {"n": 3, "name": "three", "_rescued_data": None},
    ]
    assert platform.columns(stream) == {"n": "BIGINT", "name": "STRING"}
    assert platform.states(stream) == {"a.parquet": "INGESTED", "2026/03/b.parquet": "INGESTED"}


def test_a_later_load_takes_only_what_is_new_also_in_another_process(platform: Platform) -> None:
    stream = parquet_stream()
    for number in range(1, 4):
        platform.volume_put(f"parquet/{number}.parquet", parquet(n=[number]))
        report = platform.restart().ingest(stream)
        assert (report.files_ingested, report.rows, report.table_rows) == (1, 1, number)
    assert platform.engine.ingest(stream).batches == ()
    assert platform.rows(stream, "n", "_batch_id") == [
        {"n": 1, "_batch_id": 0},
        {"n": 2, "_batch_id": 1},
        {"n": 3, "_batch_id": 2},
    ]


def test_nothing_there_makes_no_table(platform: Platform) -> None:
    stream = parquet_stream(Column("n", "BIGINT", "A number."))
    report = platform.engine.ingest(stream)
    assert (report.batches, report.table_version, report.table_rows) == ((), None, 0)
    assert platform.engine.state(platform.engine.names.bronze("readings")) is None
    with pytest.raises(TableNotFoundError, match=r"workspace\.01_bronze\.readings.*Load a stream"):
        platform.rows(stream, "n")


def test_many_files_are_loaded_in_batches_oldest_first(platform: Platform) -> None:
    stream = parquet_stream(max_files_per_trigger=2)
    for number, name in enumerate("edcba"):
        platform.volume_put(f"parquet/{name}.parquet", parquet(n=[number]), MARCH_NS + number)
    report = platform.engine.ingest(stream)
    assert [(b.batch_id, b.files_ingested, b.rows) for b in report.batches] == [(0, 2, 2), (1, 2, 2), (2, 1, 1)]
    versions = [b.table_version or 0 for b in report.batches]
    assert versions == sorted(set(versions))
    assert versions[-1] == report.table_version
    assert [row["_batch_id"] for row in platform.rows(stream, "n", "_batch_id")] == [0, 0, 1, 1, 2]


def test_a_request_bounds_how_many_files_are_loaded(platform: Platform) -> None:
    stream = parquet_stream(max_files_per_trigger=2)
    for number in range(5):
        platform.volume_put(f"parquet/{number}.parquet", parquet(n=[number]), MARCH_NS + number)
    report = platform.engine.ingest(stream, IngestRequest(max_files=3))
    assert [b.files_ingested for b in report.batches] == [2, 1]
    assert platform.engine.look(stream).files == 2
    assert [row["n"] for row in platform.rows(stream, "n")] == [0, 1, 2]
    assert platform.engine.ingest(stream).files_ingested == 2
    with pytest.raises(OptionError, match="max_files=0"):
        platform.engine.ingest(stream, IngestRequest(max_files=0))


def test_every_row_tells_where_it_came_from(platform: Platform) -> None:
    stream = parquet_stream()
    before = datetime.now(UTC)
    platform.volume_put("parquet/day 1/a.parquet", parquet(n=[1]), MARCH_NS)
    platform.engine.ingest(stream)
    (row,) = platform.rows(stream)
    ingested_at = row.pop("_ingested_at")
    assert row == {
        "n": 1,
        "_rescued_data": None,
        "_source_file": f"{LOCATION}/parquet/day 1/a.parquet",
        "_source_file_modified_at": MARCH,
        "_batch_id": 0,
    }
    assert before <= ingested_at <= datetime.now(UTC)


def test_a_file_without_rows_is_ingested(platform: Platform) -> None:
    stream = parquet_stream()
    platform.volume_put("parquet/none.parquet", parquet(n=pa.array([], pa.int32())))
    report = platform.engine.ingest(stream)
    assert (report.files_ingested, report.rows, report.table_rows) == (1, 0, 0)
    assert platform.states(stream) == {"none.parquet": "INGESTED"}
    assert platform.engine.look(stream).files == 0


def test_the_table_has_the_contract_from_the_start(platform: Platform) -> None:
    stream = parquet_stream(
        Column("vehicle", "STRING", "Fleet number."),
        Column("rpm", "INT", "Engine speed, revolutions per minute."),
    )
    platform.volume_put("parquet/a.parquet", parquet(extra=[True], rpm=pa.array([900], pa.int32())))
    platform.engine.ingest(stream)
    state = platform.engine.state(platform.engine.names.bronze("readings"))
    assert state is not None
    assert state.comment == "One row per reading."
    assert [(c.name, c.type) for c in state.columns] == [
        ("vehicle", "STRING"),
        ("rpm", "INT"),
        ("extra", "BOOLEAN"),
        ("_rescued_data", "STRING"),
        ("_source_file", "STRING"),
        ("_source_file_modified_at", "TIMESTAMP"),
        ("_batch_id", "BIGINT"),
        ("_ingested_at", "TIMESTAMP"),
    ]
    comments = {c.name: c.comment for c in state.columns}
    assert (comments["vehicle"], comments["rpm"]) == ("Fleet number.", "Engine speed, revolutions per minute.")
    assert all(comments[name] for name in stream.own_columns)
    assert platform.rows(stream, "vehicle", "rpm", "extra") == [{"vehicle": None, "rpm": 900, "extra": True}]


def test_every_type_keeps_its_values(platform: Platform) -> None:
    stream = parquet_stream()
    columns = {
        "tiny": pa.array([-128], pa.int8()),
        "small": pa.array([-32768], pa.int16()),
        "int": pa.array([-(2**31)], pa.int32()),
        "big": pa.array([-(2**63)], pa.int64()),
        "float": pa.array([0.1], pa.float32()),
        "double": pa.array([0.1], pa.float64()),
        "yes": pa.array([True]),
        "text": pa.array(['Zürich 🚗\n\t"x"']),
        "raw": pa.array([b"\x00\xff"]),
        "money": pa.array([Decimal("-12345678901234567890.123456789")], pa.decimal128(38, 9)),
        "day": pa.array([date(1582, 10, 4)]),
        "at": pa.array([MARCH], pa.timestamp("us", "UTC")),
        "zurich": pa.array([MARCH], pa.timestamp("us", "Europe/Zurich")),
        "local": pa.array([datetime(2026, 3, 1)], pa.timestamp("us")),
        "list": pa.array([[1, None, 3]], pa.list_(pa.int64())),
        "struct": pa.array([{"make": "VW", "axles": [{"load": 1.5}]}]),
        "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
    }
    platform.volume_put("parquet/a.parquet", parquet(columns))
    platform.engine.ingest(stream)
    assert platform.columns(stream) == {
        "tiny": "TINYINT",
        "small": "SMALLINT",
        "int": "INT",
        "big": "BIGINT",
        "float": "FLOAT",
        "double": "DOUBLE",
        "yes": "BOOLEAN",
        "text": "STRING",
        "raw": "BINARY",
        "money": "DECIMAL(38,9)",
        "day": "DATE",
        "at": "TIMESTAMP",
        "zurich": "TIMESTAMP",
        "local": "TIMESTAMP_NTZ",
        "list": "ARRAY<BIGINT>",
        "struct": "STRUCT<make: STRING, axles: ARRAY<STRUCT<load: DOUBLE>>>",
        "map": "MAP<STRING, BIGINT>",
    }
    (row,) = platform.rows(stream, *columns)
    assert row == {
        "tiny": -128,
        "small": -32768,
        "int": -2147483648,
        "big": -9223372036854775808,
        "float": 0.10000000149011612,
        "double": 0.1,
        "yes": True,
        "text": 'Zürich 🚗\n\t"x"',
        "raw": b"\x00\xff",
        "money": Decimal("-12345678901234567890.123456789"),
        "day": date(1582, 10, 4),
        "at": MARCH,
        "zurich": MARCH,
        "local": datetime(2026, 3, 1),
        "list": [1, None, 3],
        "struct": {"make": "VW", "axles": [{"load": 1.5}]},
        "map": [("a", 1)],
    }


def test_types_that_delta_lacks_get_one_that_holds_every_value(platform: Platform) -> None:
    stream = parquet_stream()
    columns = {
        "u8": pa.array([255], pa.uint8()),
        "u16": pa.array([65535], pa.uint16()),
        "u32": pa.array([4294967295], pa.uint32()),
        "u64": pa.array([18446744073709551615], pa.uint64()),
        "half": pa.array([1.5], pa.float16()),
        "ms": pa.array([MARCH_NS // 1_000_000], pa.timestamp("ms", "UTC")),
        "fixed": pa.array([b"abc"], pa.binary(3)),
        "word": pa.array(["x"]).dictionary_encode(),
    }
    platform.volume_put("parquet/a.parquet", parquet(columns))
    platform.engine.ingest(stream)
    assert platform.columns(stream) == {
        "u8": "SMALLINT",
        "u16": "INT",
        "u32": "BIGINT",
        "u64": "DECIMAL(20,0)",
        "half": "FLOAT",
        "ms": "TIMESTAMP",
        "fixed": "BINARY",
        "word": "STRING",
    }
    assert platform.rows(stream, *columns) == [
        {
            "u8": 255,
            "u16": 65535,
            "u32": 4294967295,
            "u64": Decimal(18446744073709551615),
            "half": 1.5,
            "ms": MARCH.replace(microsecond=123000),
            "fixed": b"abc",
            "word": "x",
        }
    ]


def test_nanoseconds_that_a_timestamp_can_not_hold_are_rescued_and_the_others_are_not(platform: Platform) -> None:
    stream = parquet_stream()
    at = pa.array([MARCH_NS, MARCH_NS + 1, None], pa.timestamp("ns", "UTC"))
    platform.volume_put("parquet/a.parquet", parquet(n=[1, 2, 3], at=at))
    report = platform.engine.ingest(stream)
    assert report.rows_rescued == 1
    rows = platform.rows(stream, "n", "at", "_rescued_data")
    assert [row["at"] for row in rows] == [MARCH, None, None]
    assert [row["_rescued_data"] for row in rows[::2]] == [None, None]
    assert json.loads(rows[1]["_rescued_data"]) == {
        "at": "2026-03-01T12:30:15.123456001Z",
        "_file_path": f"{LOCATION}/parquet/a.parquet",
    }
