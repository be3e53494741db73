"""JSON documents: every element of an array, or the one object, is a row; a broken one loses nothing."""

from __future__ import annotations

import json
import time

from telematics_assets_tests.conformance.platforms import Platform
from telematics_assets_tests.conformance.samples import json_stream
from telematics_assets_tests.turns import SPARINGLY

HOUR_NS = 3_600_000_000_000


def test_an_object_or_an_array_of_objects_becomes_rows(platform: Platform) -> None:
    stream = json_stream("n", multi_line=True, raw_record_column="_raw_record")
    pretty = '{\n  "n": 1.10,\n  "v": [\n    1,\n    "]"\n  ]\n}'
    platform.volume_put("json/object.json", f"\ufeff{pretty}\n".encode(), 1)
    platform.volume_put("json/array.json", f"[{pretty},\n{pretty}]\n".encode(), 2)
    platform.volume_put("json/empty.json", b" [\n] \n", 3)
    report = platform.engine.ingest(stream)
    assert (report.rows, report.rows_corrupt, report.files_ingested) == (3, 0, 3)
    expected = {"n": "1.10", "v": '[\n    1,\n    "]"\n  ]', "_raw_record": pretty, "_corrupt_record": None}
    assert platform.rows(stream, "n", "v", "_raw_record", "_corrupt_record") == [expected] * 3


def test_elements_that_are_no_objects_are_corrupt_records(platform: Platform) -> None:
    stream = json_stream("n", multi_line=True)
    platform.volume_put("json/a.json", b'[{"n":1}, 2, "x", [3], {"n":}, {"n":4,"n":4}, null]')
    assert platform.engine.ingest(stream).rows_corrupt == 6
    rows = platform.rows(stream, "_corrupt_record", "n")
    assert rows == [
        {"_corrupt_record": None, "n": "1"},
        *(
            {"_corrupt_record": text, "n": None}
            for text in sorted(["2", '"x"', "[3]", '{"n":}', '{"n":4,"n":4}', "null"])
        ),
    ]


def test_a_broken_document_keeps_its_rows_and_the_rest_verbatim(platform: Platform) -> None:
    stream = json_stream("n", multi_line=True)
    platform.volume_put("json/a.json", b'[{"n":1},\n{"n":2}, {"n": "3, {"n":4}]\n', time.time_ns() - HOUR_NS)
    platform.volume_put("json/b.json", b'[{"n":5}]\n] tail\n')
    report = platform.restart(incomplete_seconds=300).ingest(stream)
    assert (report.rows, report.rows_corrupt, report.files_waiting) == (3, 1, 1)
    assert platform.restart().ingest(stream).rows == 2
    rows = platform.rows(stream, "n", "_corrupt_record")
    assert [row["n"] for row in rows] == [None, None, "1", "2", "5"]
    assert {row["_corrupt_record"] for row in rows} == {None, '{"n": "3, {"n":4}]', "] tail"}


def test_a_document_that_is_not_closed_waits(platform: Platform) -> None:
    stream = json_stream("n", multi_line=True)
    engine = platform.restart(incomplete_seconds=300)
    platform.volume_put("json/a.json", b'[{"n":1},\n{"n":2}\n')
    assert (engine.ingest(stream).rows, engine.look(stream).waiting) == (0, 1)
    platform.volume_put("json/a.json", b'[{"n":1},\n{"n":2}\n]')
    assert engine.ingest(stream).rows == 2


@SPARINGLY
def test_a_large_array_of_changing_elements_keeps_every_one(platform: Platform) -> None:
    stream = json_stream("n", multi_line=True, raw_record_column="_raw_record")
    records = [json.dumps({"n": i, "text": "x" * 150, "at": [{"lat": i}]}, indent=1) for i in range(60_000)]
    records[30_000] = "7"
    records[59_990] = '{"late":"yes","n":59990}'
    data = ("[" + ",\n".join(records) + "]").encode()
    assert len(data) > 12_000_000
    platform.volume_put("json/a.json", data)
    report = platform.engine.ingest(stream)
    assert (report.rows, report.rows_corrupt, report.rows_rescued) == (60_000, 1, 0)
    rows = platform.rows(stream, "_raw_record", "n", "late")
    assert [row["_raw_record"] for row in rows] == sorted(records)
    assert [row["n"] for row in rows if row["late"]] == ["59990"]
