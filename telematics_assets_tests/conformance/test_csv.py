"""Delimited files: columns by their header, every field its text, and records that can't be placed kept verbatim."""

from __future__ import annotations

import base64
import json
import time

from telematics_assets_tests.conformance.platforms import LOCATION, Platform
from telematics_assets_tests.conformance.samples import csv_stream, lines
from telematics_assets_tests.turns import SPARINGLY

A = f"{LOCATION}/csv/a.csv"
HOUR_NS = 3_600_000_000_000


def test_every_field_is_its_text_as_it_stands_in_the_file(platform: Platform) -> None:
    stream = csv_stream("n")
    fields = {
        "1.10": "1.10",
        " 1e400 ": " 1e400 ",
        "12345678901234567890123": "12345678901234567890123",
        "": None,
        '""': "",
        '"a,b"': "a,b",
        '"say ""hi"""': 'say "hi"',
        '"two\nlines\r\nand more"': "two\nlines\r\nand more",
        '5" pipe': '5" pipe',
        "é🚗": "é🚗",
    }
    rows = "".join(f"{number:02},{field},z\n" for number, field in enumerate(fields))
    platform.volume_put("csv/a.csv", f"n,v,w\n{rows}".encode())
    report = platform.engine.ingest(stream)
    assert (report.rows, report.rows_corrupt, report.rows_rescued) == (len(fields), 0, 0)
    assert platform.columns(stream) == {"n": "STRING", "v": "STRING", "w": "STRING"}
    assert [row["v"] for row in platform.rows(stream, "n", "v")] == list(fields.values())


def test_frames_of_a_file_are_no_data(platform: Platform) -> None:
    stream = csv_stream(raw_record_column="_raw_record")
    frames = {
        "lf": b"n,v\n1,x\n2,y\n",
        "no_last_lf": b"n,v\n1,x\n2,y",
        "crlf_and_blank": b"n,v\r\n\r\n1,x\r\n\n2,y\r\n",
        "bom": b"\xef\xbb\xbfn,v\n1,x\n2,y\n",
        "quoted_header": b'"n","v"\n1,x\n2,y\n',
    }
    for name, data in frames.items():
        platform.volume_put(f"csv/{name}.csv", data)
    report = platform.engine.ingest(stream)
    assert (report.rows, report.rows_corrupt) == (2 * len(frames), 0)
    rows = platform.rows(stream, "n", "v", "_raw_record")
    assert rows == [{"n": n, "v": v, "_raw_record": f"{n},{v}"} for n, v in (("1", "x"), ("2", "y")) for _ in frames]


def test_records_of_another_width_lose_nothing(platform: Platform) -> None:
    stream = csv_stream("n")
    platform.volume_put("csv/a.csv", lines("n,v", "1", "2,x", "3,y,more,,last"))
    report = platform.engine.ingest(stream)
    assert (report.rows, report.rows_corrupt, report.rows_rescued) == (3, 0, 1)
    rows = platform.rows(stream, "n", "v", "_rescued_data")
    assert [(row["n"], row["v"]) for row in rows] == [("1", None), ("2", "x"), ("3", "y")]
    assert json.loads(rows[2]["_rescued_data"]) == {"_c2": "more", "_c4": "last", "_file_path": A}


def test_records_that_can_not_be_placed_are_kept_verbatim(platform: Platform) -> None:
    stream = csv_stream("n")
    platform.volume_put("csv/a.csv", b'n,v\n1,x\n"2"x,y\n\xff,y\n3,"open\n4,z\n')
    report = platform.engine.ingest(stream)
    assert (report.rows, report.rows_corrupt, report.files_ingested) == (4, 3, 1)
    found = {row["_corrupt_record"] for row in platform.rows(stream, "_corrupt_record", "n")}
    assert found == {None, '"2"x,y', "base64:" + base64.b64encode(b"\xff,y").decode(), '3,"open\n4,z\n'}


def test_without_multi_line_a_lost_quote_costs_one_line(platform: Platform) -> None:
    stream = csv_stream("n", multi_line=False)
    platform.volume_put("csv/a.csv", b'n,v\n1,x\n2,"open\n3,z\n')
    assert platform.engine.ingest(stream).rows_corrupt == 1
    assert platform.rows(stream, "n", "_corrupt_record") == [
        {"n": None, "_corrupt_record": '2,"open'},
        {"n": "1", "_corrupt_record": None},
        {"n": "3", "_corrupt_record": None},
    ]


def test_new_columns_are_added_in_the_same_run(platform: Platform) -> None:
    stream = csv_stream("n")
    platform.volume_put("csv/a.csv", lines("n,v", "1,x"), 1)
    platform.engine.ingest(stream)
    platform.volume_put("csv/b.csv", lines("w,n", "y,2"), 2)
    report = platform.engine.ingest(stream)
    assert [change.column for batch in report.batches for change in batch.schema_changes] == ["w"]
    assert platform.rows(stream, "n", "v", "w") == [{"n": "1", "v": "x", "w": None}, {"n": "2", "v": None, "w": "y"}]


def test_in_rescue_mode_the_table_stays_and_nothing_is_lost(platform: Platform) -> None:
    stream = csv_stream("n", schema_evolution_mode="rescue")
    platform.volume_put("csv/a.csv", lines("n,v", "0,w"), 1)
    platform.engine.ingest(stream)
    platform.volume_put("csv/b.csv", lines("n,N,_batch_id,new", '1,x,y,"q"""', "2,,,"), 2)
    platform.engine.ingest(stream)
    assert list(platform.columns(stream)) == ["n", "v"]
    rows = platform.rows(stream, "n", "_rescued_data")
    assert [row["n"] for row in rows] == ["0", "1", "2"]
    path = f"{LOCATION}/csv/b.csv"
    assert json.loads(rows[1]["_rescued_data"]) == {"N": "x", "_batch_id": "y", "new": 'q"', "_file_path": path}
    assert rows[2]["_rescued_data"] is None


def test_headers_without_or_with_repeated_names_fill_columns_of_their_own(platform: Platform) -> None:
    stream = csv_stream()
    platform.volume_put("csv/a.csv", lines("n,,v,v", "1,2,3,4"))
    platform.engine.ingest(stream)
    assert platform.rows(stream, "n", "_c1", "v2", "v3") == [{"n": "1", "_c1": "2", "v2": "3", "v3": "4"}]


def test_a_file_without_header_fills_the_contract_in_order(platform: Platform) -> None:
    stream = csv_stream("n", "v", header=False, sep=";", quote="'")
    platform.volume_put("csv/a.csv", lines("1;'x;''y'", "2;z;more"))
    platform.engine.ingest(stream)
    rows = platform.rows(stream, "n", "v", "_rescued_data")
    assert [(row["n"], row["v"]) for row in rows] == [("1", "x;'y"), ("2", "z")]
    assert json.loads(rows[1]["_rescued_data"])["_c2"] == "more"


def test_a_file_without_header_and_contract_has_numbered_columns(platform: Platform) -> None:
    stream = csv_stream(header=False)
    platform.volume_put("csv/a.csv", lines("1,2", "3,4"))
    platform.engine.ingest(stream)
    assert platform.rows(stream, "_c0", "_c1") == [{"_c0": "1", "_c1": "2"}, {"_c0": "3", "_c1": "4"}]


def test_files_without_records(platform: Platform) -> None:
    stream = csv_stream("n")
    platform.volume_put("csv/header.csv", b"n,v\n")
    platform.volume_put("csv/blank.csv", b"\n\r\n")
    platform.volume_put("csv/empty.csv", b"")
    report = platform.engine.ingest(stream)
    assert (report.rows, report.files_ingested, report.files_skipped) == (0, 2, 1)
    assert platform.states(stream) == {
        "header.csv": "INGESTED",
        "blank.csv": "INGESTED",
        "empty.csv": "SKIPPED_CORRUPTED",
    }


def test_files_without_a_readable_header_are_quarantined_and_the_others_land(platform: Platform) -> None:
    stream = csv_stream("n")
    platform.volume_put("csv/utf16.csv", "n,v\n1,x\n".encode("utf-16"))
    platform.volume_put("csv/open.csv", b'"n,v\n1,x\n')
    platform.volume_put("csv/good.csv", lines("n,v", "1,x"))
    report = platform.engine.ingest(stream)
    assert (report.rows, report.files_skipped) == (1, 2)
    assert platform.states(stream)["utf16.csv"] == "SKIPPED_CORRUPTED"
    assert "header" in platform.reason(stream, "open.csv")


def test_a_file_that_may_still_grow_waits_for_its_end(platform: Platform) -> None:
    stream = csv_stream("n")
    engine = platform.restart(incomplete_seconds=300)
    platform.volume_put("csv/cut.csv", b"n,v\n1,2.5")
    platform.volume_put("csv/open.csv", b'n,v\n2,"x\n')
    platform.volume_put("csv/old.csv", b"n,v\n3,2.5", time.time_ns() - HOUR_NS)
    report = engine.ingest(stream)
    assert (report.rows, report.files_waiting) == (1, 2)
    platform.volume_put("csv/cut.csv", b"n,v\n1,2.53\n")
    platform.volume_put("csv/open.csv", b'n,v\n2,"x\n"\n')
    assert engine.ingest(stream).rows == 2
    assert [row["v"] for row in platform.rows(stream, "n", "v")] == ["2.53", "x\n", "2.5"]


@SPARINGLY
def test_a_large_file_keeps_every_record(platform: Platform) -> None:
    stream = csv_stream("n", raw_record_column="_raw_record")
    records = [f'{i},"{"x" * (i % 200)}\n, ""{i}""",{i}.50' for i in range(100_000)]
    records[50_000] = '50000,"x"y'
    records[70_000] = '70000,5" pipe,70000.50'
    platform.volume_put("csv/a.csv", lines("n,text,v", *records))
    report = platform.engine.ingest(stream)
    assert (report.rows, report.rows_corrupt, report.rows_rescued) == (100_000, 1, 0)
    rows = platform.rows(stream, "_raw_record", "n", "text", "v")
    assert [row["_raw_record"] for row in rows] == sorted(records)
    good = [row for row in rows if row["n"] not in (None, "70000")]
    assert len(good) == 99_998
    assert all(row["v"] == row["n"] + ".50" for row in good)
    assert all(row["text"] == f'{"x" * (int(row["n"]) % 200)}\n, "{row["n"]}"' for row in good)
