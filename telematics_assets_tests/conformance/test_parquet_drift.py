"""Parquet files whose columns drift: what fits becomes columns, the rest is rescued, nothing is cast or dropped."""

from __future__ import annotations

import json
from decimal import Decimal

import pyarrow as pa

from telematics_assets.catalog import Column
from telematics_assets.engines.base import SchemaChange
from telematics_assets_tests.conformance.platforms import LOCATION, Platform
from telematics_assets_tests.conformance.samples import parquet, parquet_stream

A = f"{LOCATION}/parquet/a.parquet"
B = f"{LOCATION}/parquet/b.parquet"


#: A column's type, a file's column that it can't hold, and the value as it is rescued.
MISFITS = [
    ("BIGINT", pa.array(["7"]), '"7"'),
    ("BIGINT", pa.array([7.0]), "7.0"),
    ("BIGINT", pa.array([2**64 - 1], pa.uint64()), "18446744073709551615"),
    ("INT", pa.array([7], pa.int64()), "7"),
    ("DOUBLE", pa.array([2**53 + 1], pa.int64()), "9007199254740993"),
    ("FLOAT", pa.array([0.1], pa.float64()), "0.1"),
    ("STRING", pa.array([7]), "7"),
    ("STRING", pa.array([b"abc"]), '"YWJj"'),
    ("BOOLEAN", pa.array([1]), "1"),
    ("DATE", pa.array([0], pa.timestamp("us", "UTC")), '"1970-01-01T00:00:00.000000Z"'),
    ("TIMESTAMP", pa.array([0], pa.timestamp("us")), '"1970-01-01T00:00:00.000000"'),
    ("DECIMAL(5,2)", pa.array([Decimal("1.234")], pa.decimal128(5, 3)), "1.234"),
    ("STRING", pa.array([{"a": [1, None]}]), '{"a":[1,null]}'),
]
#: A column's type, a file's column that it holds exactly, and the value.
FITS = [
    ("BIGINT", pa.array([-7], pa.int8()), -7),
    ("BIGINT", pa.array([2**32 - 1], pa.uint32()), 4294967295),
    ("INT", pa.array([65535], pa.uint16()), 65535),
    ("DOUBLE", pa.array([2**31 - 1], pa.int32()), 2147483647.0),
    ("DOUBLE", pa.array([1.5], pa.float32()), 1.5),
    ("DECIMAL(20,0)", pa.array([2**63 - 1], pa.int64()), Decimal(9223372036854775807)),
    ("DECIMAL(10,3)", pa.array([Decimal("1.25")], pa.decimal128(5, 2)), Decimal("1.250")),
    ("STRING", pa.array(["x"], pa.large_string()), "x"),
    ("STRING", pa.array([None], pa.null()), None),
]


def test_a_new_column_is_added_in_the_same_run(platform: Platform) -> None:
    stream = parquet_stream()
    platform.volume_put("parquet/a.parquet", parquet(n=[1]))
    platform.engine.ingest(stream)
    platform.volume_put("parquet/b.parquet", parquet(n=[2], fuel=[0.5], tag=["x"]))
    report = platform.engine.ingest(stream)
    (batch,) = report.batches
    assert batch.schema_changes == (SchemaChange("fuel", "DOUBLE"), SchemaChange("tag", "STRING"))
    assert report.rows_rescued == 0
    assert platform.rows(stream, "n", "fuel", "tag") == [
        {"n": 1, "fuel": None, "tag": None},
        {"n": 2, "fuel": 0.5, "tag": "x"},
    ]
    platform.volume_put("parquet/c.parquet", parquet(n=[3], fuel=[0.25]))
    assert platform.restart().ingest(stream).batches[0].schema_changes == ()
    assert platform.rows(stream, "n", "fuel")[2] == {"n": 3, "fuel": 0.25}


def test_files_of_one_batch_bring_different_columns(platform: Platform) -> None:
    stream = parquet_stream()
    platform.volume_put("parquet/a.parquet", parquet(n=[1], left=["l"]), 1)
    platform.volume_put("parquet/b.parquet", parquet(right=["r"], n=[2]), 2)
    platform.volume_put("parquet/c.parquet", parquet(up=["u"]), 3)
    platform.engine.ingest(stream)
    assert list(platform.columns(stream)) == ["n", "left", "right", "up"]
    assert platform.rows(stream, "n", "left", "right", "up") == [
        {"n": None, "left": None, "right": None, "up": "u"},
        {"n": 1, "left": "l", "right": None, "up": None},
        {"n": 2, "left": None, "right": "r", "up": None},
    ]


def test_a_retyped_column_is_rescued_not_cast(platform: Platform) -> None:
    stream = parquet_stream(Column("n", "INT", "A number."), Column("speed", "INT", "Speed."))
    n = pa.array([1, 2], pa.int32())
    platform.volume_put("parquet/a.parquet", parquet(n=n, speed=pa.array([2.5, None])))
    report = platform.engine.ingest(stream)
    assert (report.rows, report.rows_rescued) == (2, 1)
    first, second = platform.rows(stream, "n", "speed", "_rescued_data")
    assert json.loads(first.pop("_rescued_data")) == {"speed": 2.5, "_file_path": A}
    assert first == {"n": 1, "speed": None}
    assert second == {"n": 2, "speed": None, "_rescued_data": None}


def test_what_a_type_can_not_hold_is_rescued_as_it_is(platform: Platform) -> None:
    stream = parquet_stream(*(Column(f"v{i}", held, "A value.") for i, (held, _, _) in enumerate(MISFITS)))
    platform.volume_put("parquet/a.parquet", parquet({f"v{i}": arrives for i, (_, arrives, _) in enumerate(MISFITS)}))
    assert platform.engine.ingest(stream).rows_rescued == 1
    assert list(platform.columns(stream).values()) == [held for held, _, _ in MISFITS]
    (row,) = platform.rows(stream, "_rescued_data", *(f"v{i}" for i in range(len(MISFITS))))
    members = [f'"v{i}":{rescued}' for i, (_, _, rescued) in enumerate(MISFITS)]
    assert row.pop("_rescued_data") == f'{{{",".join(members)},"_file_path":"{A}"}}'
    assert set(row.values()) == {None}


def test_what_a_wider_type_holds_exactly_goes_into_the_column(platform: Platform) -> None:
    stream = parquet_stream(*(Column(f"v{i}", held, "A value.") for i, (held, _, _) in enumerate(FITS)))
    platform.volume_put("parquet/a.parquet", parquet({f"v{i}": arrives for i, (_, arrives, _) in enumerate(FITS)}))
    assert platform.engine.ingest(stream).rows_rescued == 0
    assert list(platform.columns(stream).values()) == [held for held, _, _ in FITS]
    names = [f"v{i}" for i in range(len(FITS))]
    assert platform.rows(stream, *names) == [{f"v{i}": value for i, (_, _, value) in enumerate(FITS)}]


def test_of_two_types_in_one_batch_the_first_files_decides(platform: Platform) -> None:
    stream = parquet_stream()
    platform.volume_put("parquet/a.parquet", parquet(n=[1], v=pa.array([1], pa.int32())), 1)
    platform.volume_put("parquet/b.parquet", parquet(n=[2], v=["two"]), 2)
    platform.volume_put("parquet/c.parquet", parquet(n=[3], v=pa.array([3], pa.int16())), 3)
    platform.engine.ingest(stream)
    assert platform.columns(stream) == {"n": "BIGINT", "v": "INT"}
    assert platform.rows(stream, "n", "v", "_rescued_data") == [
        {"n": 1, "v": 1, "_rescued_data": None},
        {"n": 2, "v": None, "_rescued_data": f'{{"v":"two","_file_path":"{B}"}}'},
        {"n": 3, "v": 3, "_rescued_data": None},
    ]


def test_a_column_in_other_case_is_rescued(platform: Platform) -> None:
    stream = parquet_stream()
    platform.volume_put("parquet/a.parquet", parquet({"n": [1], "Speed": [10], "SPEED": [11]}), 1)
    platform.volume_put("parquet/b.parquet", parquet(n=[2], speed=[20]), 2)
    platform.engine.ingest(stream)
    assert platform.columns(stream) == {"n": "BIGINT", "Speed": "BIGINT"}
    assert platform.rows(stream, "n", "Speed", "_rescued_data") == [
        {"n": 1, "Speed": 10, "_rescued_data": f'{{"SPEED":11,"_file_path":"{A}"}}'},
        {"n": 2, "Speed": None, "_rescued_data": f'{{"speed":20,"_file_path":"{B}"}}'},
    ]


def test_names_that_delta_can_not_hold_are_rescued(platform: Platform) -> None:
    stream = parquet_stream()
    odd = {"speed km/h": [1], "a,b": [2], "(x)": [3], "new\nline": [4], "": [5], "a=b": [6], '"q"': [7]}
    platform.volume_put("parquet/a.parquet", parquet({"n": [1], **odd}))
    platform.engine.ingest(stream)
    assert platform.columns(stream) == {"n": "BIGINT", '"q"': "BIGINT"}
    (row,) = platform.rows(stream, "n", '"q"', "_rescued_data")
    assert row['"q"'] == 7
    assert json.loads(row["_rescued_data"]) == {
        "speed km/h": 1,
        "a,b": 2,
        "(x)": 3,
        "new\nline": 4,
        "": 5,
        "a=b": 6,
        "_file_path": A,
    }


def test_columns_named_like_our_own_are_rescued_and_ours_stay_true(platform: Platform) -> None:
    stream = parquet_stream()
    theirs = {"_source_file": ["lie"], "_batch_id": [99], "_Ingested_At": ["never"], "_rescued_data": ["x"]}
    platform.volume_put("parquet/a.parquet", parquet({"n": [1], **theirs}))
    platform.engine.ingest(stream)
    (row,) = platform.rows(stream, "n", "_source_file", "_batch_id", "_rescued_data")
    assert (row["_source_file"], row["_batch_id"]) == (A, 0)
    assert json.loads(row["_rescued_data"]) == {
        "_source_file": "lie",
        "_batch_id": 99,
        "_Ingested_At": "never",
        "_rescued_data": "x",
        "_file_path": A,
    }


def test_mode_rescue_never_changes_the_table(platform: Platform) -> None:
    stream = parquet_stream(Column("n", "BIGINT", "A number."), schema_evolution_mode="rescue")
    platform.volume_put("parquet/a.parquet", parquet(n=[1]))
    platform.engine.ingest(stream)
    platform.volume_put("parquet/b.parquet", parquet(n=[2], fuel=[0.5], tag=pa.array([None], pa.string())))
    report = platform.engine.ingest(stream)
    assert (report.rows_rescued, report.batches[0].schema_changes) == (1, ())
    assert platform.columns(stream) == {"n": "BIGINT"}
    assert platform.rows(stream, "n", "_rescued_data") == [
        {"n": 1, "_rescued_data": None},
        {"n": 2, "_rescued_data": f'{{"fuel":0.5,"_file_path":"{B}"}}'},
    ]


def test_in_mode_rescue_the_first_batch_gives_the_table_its_columns(platform: Platform) -> None:
    stream = parquet_stream(Column("n", "BIGINT", "A number."), schema_evolution_mode="rescue")
    platform.volume_put("parquet/a.parquet", parquet(n=[1], tag=["x"]))
    platform.engine.ingest(stream)
    assert platform.columns(stream) == {"n": "BIGINT", "tag": "STRING"}


def test_a_rescued_data_column_of_another_name_and_a_column_named_like_its_path(platform: Platform) -> None:
    stream = parquet_stream(schema_evolution_mode="rescue", rescued_data_column="_left_over")
    platform.volume_put("parquet/a.parquet", parquet(n=[1]))
    platform.engine.ingest(stream)
    platform.volume_put("parquet/b.parquet", parquet(n=[2], _file_path=["theirs"], _rescued_data=["free"]))
    platform.engine.ingest(stream)
    rows = platform.rows(stream, "n", "_left_over")
    assert rows[0] == {"n": 1, "_left_over": None}
    assert json.loads(rows[1]["_left_over"]) == {"__file_path": "theirs", "_rescued_data": "free", "_file_path": B}


def test_a_column_without_a_type_waits_for_one(platform: Platform) -> None:
    stream = parquet_stream()
    platform.volume_put("parquet/a.parquet", parquet(n=[1], v=pa.nulls(1)))
    platform.engine.ingest(stream)
    assert platform.columns(stream) == {"n": "BIGINT"}
    platform.volume_put("parquet/b.parquet", parquet(n=[2], v=["two"]))
    platform.engine.ingest(stream)
    assert platform.rows(stream, "n", "v", "_rescued_data") == [
        {"n": 1, "v": None, "_rescued_data": None},
        {"n": 2, "v": "two", "_rescued_data": None},
    ]


def test_a_struct_that_got_another_field_is_rescued_whole(platform: Platform) -> None:
    stream = parquet_stream()
    platform.volume_put("parquet/a.parquet", parquet(n=[1], device=[{"id": "d1"}]))
    platform.engine.ingest(stream)
    platform.volume_put("parquet/b.parquet", parquet(n=[2], device=[{"id": "d2", "sim": "s2"}]))
    platform.engine.ingest(stream)
    assert platform.rows(stream, "n", "device", "_rescued_data") == [
        {"n": 1, "device": {"id": "d1"}, "_rescued_data": None},
        {"n": 2, "device": None, "_rescued_data": f'{{"device":{{"id":"d2","sim":"s2"}},"_file_path":"{B}"}}'},
    ]


def test_a_number_beyond_any_type_is_rescued_with_all_its_digits(platform: Platform) -> None:
    stream = parquet_stream()
    wide = pa.array([Decimal("1" * 60)], pa.decimal256(60, 0))
    special = pa.array([float("nan")])
    platform.volume_put("parquet/a.parquet", parquet(n=[1], wide=wide, special=special))
    platform.engine.ingest(stream)
    (row,) = platform.rows(stream, "n", "special", "_rescued_data")
    assert row["special"] != row["special"]
    assert row["_rescued_data"] == f'{{"wide":{"1" * 60},"_file_path":"{A}"}}'
