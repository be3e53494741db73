"""Typed columns of JSON and csv files: by contract, by schema hints, by inference; what does not fit is rescued."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from telematics_assets.catalog import Column, FileStream
from telematics_assets.engines.base import SchemaChange
from telematics_assets.errors import SchemaError
from telematics_assets_tests.conformance.platforms import LOCATION, Platform
from telematics_assets_tests.conformance.samples import csv_stream, json_stream, lines, parquet, parquet_stream

LEGS = "ARRAY<STRUCT<km: DOUBLE, at: TIMESTAMP>>"


def path(name: str) -> str:
    return f'"_file_path":"{LOCATION}/{name}"'


def with_contract(stream: FileStream, **columns: str) -> FileStream:
    """The stream with these columns in its contract."""
    contract = tuple(Column(name, kind, f"The {name}.") for name, kind in columns.items())
    return dataclasses.replace(stream, contract=dataclasses.replace(stream.contract, columns=contract))


# -- contract and hints ------------------------------------------------------------------------------------------------


def test_a_contract_types_json_columns(platform: Platform) -> None:
    stream = with_contract(
        json_stream(), n="BIGINT", price="DECIMAL(9,2)", at="TIMESTAMP", tags="MAP<STRING, STRING>", legs=LEGS
    )
    platform.volume_put(
        "json/a",
        lines(
            '{"n":1,"price":1.10,"at":"2026-01-31T12:00:00+01:00","tags":{"a":"x"},"legs":[{"km":1.5},{}],"more":1.10}',
            '{"n":2,"price":1.101,"at":"yesterday","tags":{"a":1,"a":2},"legs":[{"km":1e400}]}',
            '{"n":"3"}',
        ),
    )
    report = platform.engine.ingest(stream)
    assert (report.rows, report.rows_rescued, report.rows_corrupt) == (3, 2, 0)
    assert platform.columns(stream) == {
        "n": "BIGINT",
        "price": "DECIMAL(9,2)",
        "at": "TIMESTAMP",
        "tags": "MAP<STRING, STRING>",
        "legs": "ARRAY<STRUCT<km: DOUBLE, at: TIMESTAMP>>",
        "more": "STRING",
    }
    third, first, second = platform.rows(stream, "n", "price", "at", "tags", "legs", "more", "_rescued_data")
    assert first == {
        "n": 1,
        "price": Decimal("1.10"),
        "at": datetime(2026, 1, 31, 11, tzinfo=UTC),
        "tags": [("a", "x")],
        "legs": [{"km": 1.5, "at": None}, {"km": None, "at": None}],
        "more": "1.10",
        "_rescued_data": None,
    }
    assert second == {**dict.fromkeys(first), "n": 2, "_rescued_data": second["_rescued_data"]}
    assert second["_rescued_data"] == (
        f'{{"price":1.101,"at":"yesterday","tags":{{"a":1,"a":2}},"legs":[{{"km":1e400}}],{path("json/a")}}}'
    )
    assert third == {**dict.fromkeys(first), "_rescued_data": f'{{"n":"3",{path("json/a")}}}'}


def test_hinted_columns_are_in_a_new_table_before_any_file_has_them(platform: Platform) -> None:
    stream = json_stream("s", schema_hints="speed DOUBLE, device.model: STRING, device.sim.id BIGINT, `a.b` DATE")
    platform.volume_put(
        "json/a", lines('{"s":"x","speed":1.10}', '{"s":"y","device":{"sim":{"id":7}},"a.b":"2026-01-31"}')
    )
    platform.engine.ingest(stream)
    assert platform.columns(stream) == {
        "s": "STRING",
        "speed": "DOUBLE",
        "device": "STRUCT<model: STRING, sim: STRUCT<id: BIGINT>>",
        "a.b": "DATE",
    }
    assert platform.rows(stream, "s", "speed", "device", "a.b", "_rescued_data") == [
        {"s": "x", "speed": 1.1, "device": None, "a.b": None, "_rescued_data": None},
        {"s": "y", "speed": None, "device": {"model": None, "sim": {"id": 7}}, "a.b": date(2026, 1, 31)}
        | {"_rescued_data": None},
    ]


@pytest.mark.parametrize("multi_line", [False, True])
def test_a_struct_takes_no_key_that_it_lacks_and_none_twice(platform: Platform, multi_line: bool) -> None:
    stream = json_stream("s", schema_hints="d.a STRING", multi_line=multi_line)
    odd = ['{"a":1,"x":2}', '{"A":1}', '{ "a" : 1, "a":2 }', "5", '[{"a":1}]']
    platform.volume_put("json/a", lines(*[f'{{"s":"{number}","d":{value}}}' for number, value in enumerate(odd)]))
    platform.engine.ingest(stream)
    found = platform.rows(stream, "s", "d", "_rescued_data")
    assert [(row["d"], row["_rescued_data"]) for row in found] == [
        (None, f'{{"d":{value},{path("json/a")}}}') for value in odd
    ]


def test_a_hint_given_later_types_what_comes_later_and_leaves_what_is_there(platform: Platform) -> None:
    platform.volume_put("json/a", lines('{"n":1,"old":1}'), 1)
    platform.engine.ingest(json_stream("n"))
    stream = json_stream("n", schema_hints="old BIGINT, fresh BIGINT, never DOUBLE")
    platform.volume_put("json/b", lines('{"n":2,"old":2,"fresh":3}'), 2)
    report = platform.engine.ingest(stream)
    assert report.batches[0].schema_changes == (SchemaChange("fresh", "BIGINT"),)
    assert platform.rows(stream, "n", "old", "fresh") == [
        {"n": "1", "old": "1", "fresh": None},
        {"n": "2", "old": "2", "fresh": 3},
    ]


@pytest.mark.parametrize("mode", ["rescue", "none", "failOnNewColumns"])
def test_hints_are_columns_in_every_mode(platform: Platform, mode: str) -> None:
    stream = json_stream("n", schema_evolution_mode=mode, schema_hints="v INT")
    platform.volume_put("json/a", lines('{"n":1,"v":2}', '{"n":2,"v":"2"}'))
    platform.engine.ingest(stream)
    assert platform.columns(stream) == {"n": "STRING", "v": "INT"}
    assert [row["v"] for row in platform.rows(stream, "n", "v")] == [2, None]


def test_mode_fail_on_new_columns_goes_on_once_a_hint_names_them(platform: Platform) -> None:
    stream = json_stream("n", schema_evolution_mode="failOnNewColumns")
    platform.volume_put("json/a", lines('{"n":1}'), 1)
    platform.engine.ingest(stream)
    platform.volume_put("json/b", lines('{"n":2,"v":2}'), 2)
    with pytest.raises(SchemaError, match=r"v STRING.*schema_hints"):
        platform.engine.ingest(stream)
    stream = stream.with_options(schema_hints="v INT")
    platform.engine.ingest(stream)
    assert platform.rows(stream, "n", "v") == [{"n": "1", "v": None}, {"n": "2", "v": 2}]


def test_rescued_keys_and_rescued_values_of_a_row_are_one_json(platform: Platform) -> None:
    stream = json_stream("s", schema_evolution_mode="rescue", schema_hints="n BIGINT, v DOUBLE")
    platform.volume_put("json/a", lines('{"v": 1e999 ,"u":1.10,"s":"x","n":2.5,"_file_path":"theirs"}'))
    report = platform.engine.ingest(with_contract(stream, s="STRING"))
    assert report.rows_rescued == 1
    (row,) = platform.rows(stream, "s", "n", "v", "_rescued_data")
    assert (row["n"], row["v"]) == (None, None)
    rescued = json.loads(row["_rescued_data"], parse_float=str)
    assert rescued == {
        "n": "2.5",
        "v": "1e999",
        **({} if "u" in platform.columns(stream) else {"u": "1.10"}),
        **({} if "_file_path" in platform.columns(stream) else {"__file_path": "theirs"}),
        "_file_path": f"{LOCATION}/json/a",
    }


def test_a_csv_column_is_typed_and_its_misfits_are_rescued_as_text(platform: Platform) -> None:
    stream = with_contract(csv_stream(schema_hints="at TIMESTAMP"), n="INT", ok="BOOLEAN")
    platform.volume_put("csv/a", lines("n,ok,at,s", "1,true,2026-01-31T12:00Z,x", '007,TRUE,"noon, ""sharp""",', ",,,"))
    report = platform.engine.ingest(stream)
    assert (report.rows, report.rows_rescued) == (3, 1)
    assert platform.columns(stream) == {"n": "INT", "ok": "BOOLEAN", "at": "TIMESTAMP", "s": "STRING"}
    nulls = {"n": None, "ok": None, "at": None, "s": None}
    found = platform.rows(stream, "n", "ok", "at", "s", "_rescued_data")
    assert sorted(found[:2], key=lambda row: row["_rescued_data"] is None) == [
        {**nulls, "_rescued_data": f'{{"n":"007","ok":"TRUE","at":"noon, \\"sharp\\"",{path("csv/a")}}}'},
        {**nulls, "_rescued_data": None},
    ]
    assert found[2] == {
        "n": 1,
        "ok": True,
        "at": datetime(2026, 1, 31, 12, tzinfo=UTC),
        "s": "x",
        "_rescued_data": None,
    }


def test_a_hint_chooses_the_type_of_a_parquet_column(platform: Platform) -> None:
    stream = parquet_stream(schema_hints="n BIGINT, d.fw BIGINT, d.more STRING, x INT")
    device = pa.array([{"fw": 3, "id": "a"}], pa.struct([("fw", pa.int32()), ("id", pa.string())]))
    platform.volume_put("parquet/a", parquet(n=pa.array([1], pa.int32()), d=device, x=[2.5], y=[1]))
    platform.engine.ingest(stream)
    assert platform.columns(stream) == {
        "n": "BIGINT",
        "d": "STRUCT<fw: BIGINT, id: STRING, more: STRING>",
        "x": "INT",
        "y": "BIGINT",
    }
    assert platform.rows(stream, "n", "d", "x", "_rescued_data") == [
        {"n": 1, "d": {"fw": 3, "id": "a", "more": None}, "x": None}
        | {"_rescued_data": f'{{"x":2.5,{path("parquet/a")}}}'}
    ]


# -- inference ---------------------------------------------------------------------------------------------------------


def test_values_decide_types_and_later_values_that_do_not_fit_are_rescued(platform: Platform) -> None:
    stream = json_stream(infer_column_types=True)
    platform.volume_put(
        "json/a",
        lines(
            '{"i":1,"x":1,"big":1,"ok":true,"s":"5","d":{"a":1,"b":[1]},"none":null,"mix":1,"empty":{},"l":[]}',
            '{"i":-2,"x":2.5,"big":12345678901234567890123,"ok":false,"s":"x","d":{"c":"y","b":[2.5]},"mix":"1"}',
        ),
        1,
    )
    platform.engine.ingest(stream)
    assert platform.columns(stream) == {
        "i": "BIGINT",
        "x": "DOUBLE",
        "big": "STRING",
        "ok": "BOOLEAN",
        "s": "STRING",
        "d": "STRUCT<a: BIGINT, b: ARRAY<DOUBLE>, c: STRING>",
        "none": "STRING",
        "mix": "STRING",
        "empty": "STRING",
        "l": "ARRAY<STRING>",
    }
    assert platform.rows(stream, "i", "x", "big", "d", "l", "_rescued_data") == [
        {"i": -2, "x": 2.5, "big": "12345678901234567890123", "d": {"a": None, "b": [2.5], "c": "y"}, "l": None}
        | {"_rescued_data": None},
        {"i": 1, "x": 1.0, "big": "1", "d": {"a": 1, "b": [1.0], "c": None}, "l": [], "_rescued_data": None},
    ]
    platform.volume_put("json/b", lines('{"i":2.5,"x":"2","ok":0,"d":{"a":1,"new":2},"s":5}'), 2)
    report = platform.engine.ingest(stream)
    assert report.rows_rescued == 1
    (row,) = [row for row in platform.rows(stream, "_rescued_data", "i", "s", "d") if row["_rescued_data"]]
    assert row == {
        "_rescued_data": f'{{"i":2.5,"x":"2","ok":0,"d":{{"a":1,"new":2}},{path("json/b")}}}',
        "i": None,
        "s": "5",
        "d": None,
    }


def test_all_files_of_the_sample_decide_together(platform: Platform) -> None:
    stream = json_stream(infer_column_types=True)
    for name, value in enumerate(("1", "null", "2.5", '{"a":1}'), 1):
        platform.volume_put(f"json/{name}", lines(f'{{"v":{value},"n":{name},"only{name}":{value}}}'), name)
    platform.engine.ingest(stream.with_options(max_files_per_trigger=3))
    assert platform.columns(stream) == {
        "v": "DOUBLE",
        "n": "BIGINT",
        "only1": "BIGINT",
        "only2": "STRING",
        "only3": "DOUBLE",
        "only4": "STRUCT<a: BIGINT>",
    }
    assert [row["v"] for row in platform.rows(stream, "n", "v")] == [1.0, None, 2.5, None]


@pytest.mark.parametrize(
    "limits", [{"schema_inference_sample_files": 1}, {"schema_inference_sample_bytes": len('{"n":1,"v":1}\n')}]
)
@pytest.mark.parametrize("format", ["json", "csv"])
def test_beyond_the_sample_values_do_not_decide(platform: Platform, limits: dict[str, Any], format: str) -> None:
    options = {"infer_column_types": True, **limits}
    if format == "json":
        stream = json_stream(**options)
        contents = [lines('{"n":1,"v":1}'), lines('{"n":2,"v":"x","late":2}')]
    else:
        if "schema_inference_sample_bytes" in limits:
            options["schema_inference_sample_bytes"] = len("n,v\n1,1\n2")
        stream = csv_stream(**options)
        contents = [lines("n,v", "1,1"), lines("n,v,late", "2,x,2")]
    for number, content in enumerate(contents):
        platform.volume_put(f"{format}/{number}", content, number)
    platform.engine.ingest(stream)
    assert platform.columns(stream) == {"n": "BIGINT", "v": "BIGINT", "late": "BIGINT"}
    assert [(row["v"], row["late"]) for row in platform.rows(stream, "n", "v", "late")] == [(1, None), (None, 2)]


def test_columns_that_come_later_are_typed_by_the_values_that_bring_them(platform: Platform) -> None:
    stream = json_stream("n", infer_column_types=True, schema_hints="hint.a STRING")
    platform.volume_put("json/a", lines('{"n":1}'), 1)
    platform.engine.ingest(stream)
    platform.volume_put(
        "json/b", lines('{"n":2,"x":1}', '{"n":3,"x":1.5,"d":[{"a":true}]}', '{"n":4,"t":"2026-01-31"}'), 2
    )
    platform.volume_put("json/c", lines('{"n":5,"x":2,"y":1}'), 3)
    report = platform.restart().ingest(stream)
    assert report.batches[0].schema_changes == (
        SchemaChange("x", "DOUBLE"),
        SchemaChange("d", "ARRAY<STRUCT<a: BOOLEAN>>"),
        SchemaChange("t", "STRING"),
        SchemaChange("y", "BIGINT"),
    )
    assert [(row["x"], row["d"], row["t"], row["y"]) for row in platform.rows(stream, "n", "x", "d", "t", "y")] == [
        (None, None, None, None),
        (1.0, None, None, None),
        (1.5, [{"a": True}], None, None),
        (None, None, "2026-01-31", None),
        (2.0, None, None, 1),
    ]


def test_csv_text_tells_types_by_exact_forms_only(platform: Platform) -> None:
    stream = csv_stream(infer_column_types=True)
    platform.volume_put(
        "csv/a",
        lines("i,x,ok,day,at,zip,s,none", "1,1,true,2026-01-31,2026-01-31T12:00:00Z,01067,1,", "2,0.5,false,,,9,a,"),
        1,
    )
    platform.engine.ingest(stream)
    assert platform.columns(stream) == {
        "i": "BIGINT",
        "x": "DOUBLE",
        "ok": "BOOLEAN",
        "day": "DATE",
        "at": "TIMESTAMP",
        "zip": "STRING",
        "s": "STRING",
        "none": "STRING",
    }
    platform.volume_put("csv/b", lines("i,fresh,empty", "3,1.5,", "x,2,"), 2)
    report = platform.engine.ingest(stream)
    assert report.batches[0].schema_changes == (SchemaChange("fresh", "DOUBLE"), SchemaChange("empty", "STRING"))
    found = platform.rows(stream, "i", "fresh", "_rescued_data")
    assert [row["i"] for row in found] == [None, 1, 2, 3]
    assert found[0] == {"i": None, "fresh": 2.0, "_rescued_data": f'{{"i":"x",{path("csv/b")}}}'}


def test_hints_join_what_is_inferred(platform: Platform) -> None:
    stream = json_stream(infer_column_types=True, schema_hints="d.a STRING, d.more DATE, n DECIMAL(10,2)")
    platform.volume_put("json/a", lines('{"n":1.1,"d":{"a":1.10,"b":2},"s":1}'))
    platform.engine.ingest(stream)
    assert platform.columns(stream) == {
        "d": "STRUCT<a: STRING, b: BIGINT, more: DATE>",
        "n": "DECIMAL(10,2)",
        "s": "BIGINT",
    }
    assert platform.rows(stream, "n", "d") == [{"n": Decimal("1.10"), "d": {"a": "1.10", "b": 2, "more": None}}]


@pytest.mark.parametrize("compressed", [False, True])
def test_documents_and_packed_files_are_sampled_as_they_are_read(platform: Platform, compressed: bool) -> None:
    import gzip

    data = b'[{"n": 1, "d": {"a":\n1}},\n {"n": 2.5, "d": {}}]'
    platform.volume_put("json/a", gzip.compress(data) if compressed else data)
    stream = json_stream(infer_column_types=True, multi_line=True)
    platform.engine.ingest(stream)
    assert platform.columns(stream) == {"n": "DOUBLE", "d": "STRUCT<a: BIGINT>"}
    assert platform.rows(stream, "n", "d") == [{"n": 1.0, "d": {"a": 1}}, {"n": 2.5, "d": {"a": None}}]


def test_a_file_that_can_not_be_read_decides_nothing(platform: Platform) -> None:
    import gzip

    stream = json_stream(infer_column_types=True)
    platform.volume_put("json/a", gzip.compress(lines('{"n":"x"}'))[:-4], 1)
    platform.volume_put("json/b", lines('{"n":1}', "no json"), 2)
    report = platform.engine.ingest(stream)
    assert (report.files_skipped, report.rows_corrupt) == (1, 1)
    assert platform.columns(stream) == {"n": "BIGINT"}


def test_a_column_called_like_the_rescued_path_stays_text(platform: Platform) -> None:
    stream = json_stream(infer_column_types=True)
    platform.volume_put("json/a", lines('{"n":1,"_file_path":1}'), 1)
    platform.volume_put("json/b", lines('{"n":2,"__file_path":2,"_file_path":"x"}'), 2)
    platform.engine.ingest(stream.with_options(max_files_per_trigger=1))
    assert platform.columns(stream) == {"n": "BIGINT", "_file_path": "STRING", "__file_path": "STRING"}
    assert [row["_rescued_data"] for row in platform.rows(stream, "n", "_rescued_data")] == [None, None]
