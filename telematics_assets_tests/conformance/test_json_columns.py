"""Which columns JSON keys become, and where a value goes that no column can have."""

from __future__ import annotations

import json

from telematics_assets.engines.base import SchemaChange
from telematics_assets_tests.conformance.platforms import LOCATION, Platform
from telematics_assets_tests.conformance.samples import json_stream, lines

A = f"{LOCATION}/json/a.json"
B = f"{LOCATION}/json/b.json"


def test_every_key_becomes_a_text_column_in_order_of_appearance(platform: Platform) -> None:
    stream = json_stream("vehicle")
    platform.volume_put("json/a.json", lines('{"z": 1, "vehicle": "v1"}', '{"a": [1], "z": 2}'))
    platform.engine.ingest(stream)
    state = platform.engine.state(platform.engine.names.bronze("events"))
    assert state is not None
    assert [(c.name, c.type) for c in state.columns] == [
        ("vehicle", "STRING"),
        ("z", "STRING"),
        ("a", "STRING"),
        ("_corrupt_record", "STRING"),
        ("_rescued_data", "STRING"),
        ("_source_file", "STRING"),
        ("_source_file_modified_at", "TIMESTAMP"),
        ("_batch_id", "BIGINT"),
        ("_ingested_at", "TIMESTAMP"),
    ]
    assert platform.rows(stream, "z", "vehicle", "a") == [
        {"z": "1", "vehicle": "v1", "a": None},
        {"z": "2", "vehicle": None, "a": "[1]"},
    ]


def test_new_keys_of_different_files_become_columns_in_the_same_run(platform: Platform) -> None:
    stream = json_stream()
    platform.volume_put("json/a.json", lines('{"n":1}'))
    platform.engine.ingest(stream)
    platform.volume_put("json/b.json", lines('{"n":2,"left":"l"}', '{"n":3}'), 1)
    platform.volume_put("json/c.json", lines('{"right":"r","n":4}'), 2)
    report = platform.engine.ingest(stream)
    (batch,) = report.batches
    assert batch.schema_changes == (SchemaChange("left", "STRING"), SchemaChange("right", "STRING"))
    assert (report.rows, report.rows_rescued) == (3, 0)
    assert platform.rows(stream, "n", "left", "right") == [
        {"n": "1", "left": None, "right": None},
        {"n": "2", "left": "l", "right": None},
        {"n": "3", "left": None, "right": None},
        {"n": "4", "left": None, "right": "r"},
    ]


def test_a_corrupt_line_brings_no_columns(platform: Platform) -> None:
    stream = json_stream("n")
    platform.volume_put("json/a.json", lines('{"n":1}', '{"x":1,"x":2}', '{"y":'))
    platform.engine.ingest(stream)
    assert list(platform.columns(stream)) == ["n"]


def test_keys_that_differ_by_case_are_rescued(platform: Platform) -> None:
    stream = json_stream()
    platform.volume_put("json/a.json", lines('{"n":1,"Speed":10,"speed":1.10}', '{"N":2}'))
    report = platform.engine.ingest(stream)
    assert (report.rows_rescued, report.rows_corrupt) == (2, 0)
    assert list(platform.columns(stream)) == ["n", "Speed"]
    assert platform.rows(stream, "n", "Speed", "_rescued_data") == [
        {"n": None, "Speed": None, "_rescued_data": f'{{"N":2,"_file_path":"{A}"}}'},
        {"n": "1", "Speed": "10", "_rescued_data": f'{{"speed":1.10,"_file_path":"{A}"}}'},
    ]


def test_keys_named_like_our_own_columns_are_rescued_and_ours_stay_true(platform: Platform) -> None:
    stream = json_stream(raw_record_column="_raw_record")
    names = ["_source_file", "_batch_id", "_corrupt_record", "_raw_record", "_rescued_data", "_Ingested_At"]
    theirs = ",".join(f'"{name}":"lie"' for name in names)
    line = f'{{"n":1,{theirs}}}'
    platform.volume_put("json/a.json", lines(line))
    report = platform.engine.ingest(stream)
    assert (report.rows_rescued, report.rows_corrupt) == (1, 0)
    assert platform.rows(
        stream, "n", "_source_file", "_batch_id", "_corrupt_record", "_raw_record", "_rescued_data"
    ) == [
        {
            "n": "1",
            "_source_file": A,
            "_batch_id": 0,
            "_corrupt_record": None,
            "_raw_record": line,
            "_rescued_data": f'{{{theirs},"_file_path":"{A}"}}',
        }
    ]


def test_a_key_named_like_the_rescued_path_does_not_hide_it(platform: Platform) -> None:
    stream = json_stream("n", schema_evolution_mode="rescue")
    platform.volume_put("json/a.json", lines('{"n":1}'))
    platform.engine.ingest(stream)
    platform.volume_put("json/b.json", lines('{"n":2,"_file_path":"theirs"}'))
    platform.engine.ingest(stream)
    assert json.loads(platform.rows(stream, "n", "_rescued_data")[1]["_rescued_data"]) == {
        "__file_path": "theirs",
        "_file_path": B,
    }


def test_keys_that_delta_can_not_hold_are_rescued_verbatim(platform: Platform) -> None:
    stream = json_stream()
    odd = '"speed km/h":1.10,"a,b":"x","":null,"tab\\t":[ 1 ],"a=b":1e400'
    platform.volume_put("json/a.json", lines(f'{{"n":1,{odd}}}'))
    platform.engine.ingest(stream)
    assert list(platform.columns(stream)) == ["n"]
    (row,) = platform.rows(stream, "n", "_rescued_data")
    assert row["_rescued_data"] == f'{{{odd},"_file_path":"{A}"}}'


def test_keys_with_dots_quotes_and_other_letters_become_columns(platform: Platform) -> None:
    stream = json_stream()
    platform.volume_put("json/a.json", lines(r'{"a.b":1,"größe":2,"\"q\"":3,"\u00e4":4,"%":5,"#":6,"a`b":7}'))
    platform.engine.ingest(stream)
    names = ["a.b", "größe", '"q"', "ä", "%", "#", "a`b"]
    assert list(platform.columns(stream)) == names
    (row,) = platform.rows(stream, *names)
    assert list(row.values()) == ["1", "2", "3", "4", "5", "6", "7"]


def test_mode_rescue_never_changes_the_table(platform: Platform) -> None:
    stream = json_stream("n", schema_evolution_mode="rescue")
    platform.volume_put("json/a.json", lines('{"n":1}'))
    platform.engine.ingest(stream)
    platform.volume_put("json/b.json", lines('{"n":2,"v":12345678901234567890123}', '{"w":{ "x" :1}}'))
    report = platform.engine.ingest(stream)
    assert (report.rows_rescued, report.batches[0].schema_changes) == (2, ())
    assert list(platform.columns(stream)) == ["n"]
    assert platform.rows(stream, "n", "_rescued_data") == [
        {"n": None, "_rescued_data": f'{{"w":{{ "x" :1}},"_file_path":"{B}"}}'},
        {"n": "1", "_rescued_data": None},
        {"n": "2", "_rescued_data": f'{{"v":12345678901234567890123,"_file_path":"{B}"}}'},
    ]


def test_an_empty_object_is_a_row(platform: Platform) -> None:
    stream = json_stream()
    platform.volume_put("json/a.json", lines("{}", "{ }"))
    report = platform.engine.ingest(stream)
    assert (report.rows, report.rows_corrupt, report.rows_rescued) == (2, 0, 0)
    assert platform.columns(stream) == {}
    assert (
        platform.rows(stream, "_source_file", "_corrupt_record") == [{"_source_file": A, "_corrupt_record": None}] * 2
    )


def test_more_keys_than_a_table_has_room_for_are_rescued(platform: Platform) -> None:
    stream = json_stream()
    record = {f"k{i}": i for i in range(2500)}
    platform.volume_put("json/a.json", lines(json.dumps(record)))
    platform.engine.ingest(stream)
    columns = platform.columns(stream)
    (row,) = platform.rows(stream)
    rescued = json.loads(row["_rescued_data"])
    assert len(columns) + len(stream.own_columns) == 2000
    assert {**{name: int(row[name]) for name in columns}, **rescued} == {**record, "_file_path": A}
    assert not rescued.keys() & columns.keys()
