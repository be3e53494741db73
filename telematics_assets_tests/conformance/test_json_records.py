"""What a line of a JSON file is: a row with every value's own text, or a corrupt record, verbatim."""

from __future__ import annotations

import base64
import gzip
import json

from telematics_assets_tests.conformance.platforms import LOCATION, Platform
from telematics_assets_tests.conformance.samples import json_stream, lines

A = f"{LOCATION}/json/a.json"

#: A value as it stands in the file, and the text that its column holds.
VALUES = [
    ("1", "1"),
    ("1.10", "1.10"),
    ("-0", "-0"),
    ("-0.0", "-0.0"),
    ("1e400", "1e400"),
    ("1E+2", "1E+2"),
    ("12345678901234567890123", "12345678901234567890123"),
    ("0.1000000000000000055511151231257827021181583404541015625",) * 2,
    ("true", "true"),
    ("false", "false"),
    ("null", None),
    ('""', ""),
    ('"null"', "null"),
    ('"1.10"', "1.10"),
    (r'"a\"b\\c\/d\b\f\n\r\t"', 'a"b\\c/d\b\f\n\r\t'),
    (r'"\u00e9\ud83d\ude97"', "é🚗"),
    (r'"\u0000"', "\0"),
    ('"é🚗\u2028\x7f"', "é🚗\u2028\x7f"),
    ('{ "b" : [1.0 , 2e0] }', '{ "b" : [1.0 , 2e0] }'),
    ("[]", "[]"),
    ("{}", "{}"),
    (r'["\ud800", {"\u00e9": null}]', r'["\ud800", {"\u00e9": null}]'),
    ('{"a":1,"a":2}', '{"a":1,"a":2}'),
    ('", {}[]:"', ", {}[]:"),
]

#: Lines that are not exactly one JSON object.
CORRUPT = [
    '{"n": 1',
    '{"n": 1, "v": "cut',
    '{"n": 1}}',
    '{"n": 1} {"n": 2}',
    '{"n": 1}{"n": 2}',
    '{"n": 1}, {"n": 2}',
    '{"n": 1} trailing',
    '{"n": 1,}',
    '{"n" 1}',
    "{n: 1}",
    "{'n': 1}",
    '{"n": 01}',
    '{"n": 1.}',
    '{"n": .5}',
    '{"n": +1}',
    '{"n": 0x1}',
    '{"n": NaN}',
    '{"n": Infinity}',
    '{"n": -Infinity}',
    '{"n": True}',
    '{"n": nul}',
    '{"n": \u0661}',
    '{"n": 1, "n": 2}',
    '{"n": 1, "\\u006e": 2}',
    '{"n": "\\ud800"}',
    '{"n": "\\ud83d"}',
    '{"\\udc00": 1}',
    '{"n": "\\x41"}',
    '{"n": "\\u12g4"}',
    '{"n": "a\tb"}',
    '{"n": "a\x00b"}',
    '{"n": 1}\x00',
    '\u00a0{"n": 1}',
    '[{"n": 1}]',
    "[]",
    "1",
    '"text"',
    "null",
    "true",
    "n,v",
    "<n>1</n>",
    '{"n": ' + "[" * 300 + "]" * 300 + "}",
]

#: Lines that are no UTF-8: a lone byte, a surrogate, an overlong slash, UTF-16, a cut character.
NO_UTF8 = [b'{"n": "\xff"}', b'{"n": "\xed\xa0\x80"}', b'{"n": "\xc0\xaf"}', b"\xfe\xff\x00{", b"\xc3"]

#: Files that all hold the same two records.
FRAMES = {
    "lf": b'{"n":1}\n{"n":2}\n',
    "no_last_lf": b'{"n":1}\n{"n":2}',
    "crlf": b'{"n":1}\r\n{"n":2}\r\n',
    "bom": b'\xef\xbb\xbf{"n":1}\n{"n":2}\n',
    "bom_crlf_blank": b'\xef\xbb\xbf{"n":1}\r\n\r\n\n  \t\n{"n":2}\n\n',
    "blank_first": b'\n\n{"n":1}\n{"n":2}\n',
    "gzip.gz": gzip.compress(b'{"n":1}\n{"n":2}\n'),
    "gzip_without_its_ending": gzip.compress(b'{"n":1}\n{"n":2}\n'),
    "gzip_bom_crlf.json.gz": gzip.compress(b'\xef\xbb\xbf{"n":1}\r\n{"n":2}'),
    "gzip_of_two_members.gz": gzip.compress(b'{"n":1}\n') + gzip.compress(b'{"n":2}\n'),
    "plain_in_spite_of_its_ending.gz": b'{"n":1}\n{"n":2}\n',
}


def test_a_value_is_its_text_as_it_stands_in_the_file(platform: Platform) -> None:
    stream = json_stream()
    # Many lines of one shape may be read another way than few lines of many shapes: the rows have to be the same.
    for number, (source, _) in enumerate(VALUES):
        record = f'{{"n": "1", "v": {source}, "z":"last"}}'
        platform.volume_put(f"json/many{number:02}.json", lines(*[record] * 100))
        platform.volume_put(f"json/one{number:02}.json", lines(record))
    report = platform.engine.ingest(stream)
    assert (report.rows, report.rows_corrupt, report.rows_rescued) == (101 * len(VALUES), 0, 0)
    rows = platform.rows(stream, "_source_file", "n", "v", "z", "_corrupt_record")
    expected = [("many", number, 100) for number in range(len(VALUES))] + [("one", n, 1) for n in range(len(VALUES))]
    assert rows == [
        {
            "_source_file": f"{LOCATION}/json/{kind}{n:02}.json",
            "n": "1",
            "v": VALUES[n][1],
            "z": "last",
            "_corrupt_record": None,
        }
        for kind, n, count in expected
        for _ in range(count)
    ]


def test_a_line_that_is_not_one_object_is_kept_verbatim_as_corrupt_record(platform: Platform) -> None:
    stream = json_stream("n")
    good = '{"n": "good"}'
    for number, line in enumerate(CORRUPT):
        platform.volume_put(f"json/{number:02}.json", lines(good, line, *[good] * 99))
    report = platform.engine.ingest(stream)
    assert (report.files_ingested, report.rows_corrupt) == (len(CORRUPT), len(CORRUPT))
    assert report.rows == 101 * len(CORRUPT)
    assert list(platform.columns(stream)) == ["n"]
    rows = platform.rows(stream, "_source_file", "n", "_corrupt_record", "_rescued_data")
    assert [row for row in rows if row["n"] is None] == [
        {"_source_file": f"{LOCATION}/json/{number:02}.json", "n": None, "_corrupt_record": line, "_rescued_data": None}
        for number, line in enumerate(CORRUPT)
    ]
    assert all(row["_corrupt_record"] is None for row in rows if row["n"] == "good")


def test_a_line_that_is_no_utf8_is_kept_in_base64(platform: Platform) -> None:
    stream = json_stream(raw_record_column="_raw_record")
    for number, line in enumerate(NO_UTF8):
        platform.volume_put(f"json/{number}.json", lines('{"n": 1}', line))
    assert platform.engine.ingest(stream).rows_corrupt == len(NO_UTF8)
    rows = platform.rows(stream, "_source_file", "n", "_corrupt_record", "_raw_record")
    texts = ["base64:" + base64.b64encode(line).decode() for line in NO_UTF8]
    assert [row for row in rows if row["n"] is None] == [
        {"_source_file": f"{LOCATION}/json/{i}.json", "n": None, "_corrupt_record": text, "_raw_record": text}
        for i, text in enumerate(texts)
    ]
    assert [row["_raw_record"] for row in rows if row["n"] == "1"] == ['{"n": 1}'] * len(NO_UTF8)


def test_text_that_looks_like_our_base64_can_be_told_apart(platform: Platform) -> None:
    stream = json_stream()
    platform.volume_put("json/a.json", lines("base64:AAAA"))
    platform.engine.ingest(stream)
    (row,) = platform.rows(stream, "_corrupt_record")
    assert base64.b64decode(row["_corrupt_record"].removeprefix("base64:")) == b"base64:AAAA"


def test_the_raw_record_keeps_what_columns_can_not_show(platform: Platform) -> None:
    stream = json_stream(raw_record_column="_raw_record")
    records = ['{"n":1,"v":1}', '{ "v" : "1" , "n" : 2 }', '{"n":3,"v":null}', '{"n":4}', "{}", "oops", '  {"n":5}\t ']
    platform.volume_put("json/a.json", lines(*records))
    platform.engine.ingest(stream)
    assert platform.rows(stream, "n", "v", "_raw_record", "_corrupt_record") == [
        {"n": None, "v": None, "_raw_record": "{}", "_corrupt_record": None},
        {"n": None, "v": None, "_raw_record": "oops", "_corrupt_record": "oops"},
        {"n": "1", "v": "1", "_raw_record": '{"n":1,"v":1}', "_corrupt_record": None},
        {"n": "2", "v": "1", "_raw_record": '{ "v" : "1" , "n" : 2 }', "_corrupt_record": None},
        {"n": "3", "v": None, "_raw_record": '{"n":3,"v":null}', "_corrupt_record": None},
        {"n": "4", "v": None, "_raw_record": '{"n":4}', "_corrupt_record": None},
        {"n": "5", "v": None, "_raw_record": '  {"n":5}\t ', "_corrupt_record": None},
    ]


def test_line_ends_blank_lines_byte_order_marks_and_compression_are_no_data(platform: Platform) -> None:
    stream = json_stream(raw_record_column="_raw_record")
    for name, data in FRAMES.items():
        platform.volume_put(f"json/{name}", data)
    report = platform.engine.ingest(stream)
    assert (report.rows, report.rows_corrupt) == (2 * len(FRAMES), 0)
    assert platform.rows(stream, "_source_file", "n", "_raw_record") == [
        {"_source_file": f"{LOCATION}/json/{name}", "n": n, "_raw_record": f'{{"n":{n}}}'}
        for name in sorted(FRAMES)
        for n in ("1", "2")
    ]


def test_a_bare_carriage_return_ends_no_line(platform: Platform) -> None:
    stream = json_stream()
    platform.volume_put("json/a.json", b'{"n":1}\r{"n":2}\n{"n":\r3}\n')
    platform.engine.ingest(stream)
    assert platform.rows(stream, "n", "_corrupt_record") == [
        {"n": None, "_corrupt_record": '{"n":1}\r{"n":2}'},
        {"n": "3", "_corrupt_record": None},
    ]


def test_a_second_byte_order_mark_is_data(platform: Platform) -> None:
    stream = json_stream()
    platform.volume_put("json/a.json", b'{"n":1}\n\xef\xbb\xbf{"n":2}\n')
    platform.engine.ingest(stream)
    assert platform.rows(stream, "n", "_corrupt_record") == [
        {"n": None, "_corrupt_record": '\ufeff{"n":2}'},
        {"n": "1", "_corrupt_record": None},
    ]


def test_a_file_of_blank_lines_only_is_ingested_without_rows(platform: Platform) -> None:
    stream = json_stream()
    platform.volume_put("json/a.json", b"\n\r\n  \n")
    report = platform.engine.ingest(stream)
    assert (report.files_ingested, report.rows) == (1, 0)
    assert platform.states(stream) == {"a.json": "INGESTED"}


def test_a_pretty_printed_array_loses_no_line(platform: Platform) -> None:
    stream = json_stream("n")
    platform.volume_put("json/a.json", json.dumps([{"n": 1}, {"n": 2}], indent=2).encode())
    report = platform.engine.ingest(stream)
    assert (report.rows, report.rows_corrupt) == (8, 8)
    found = sorted(row["_corrupt_record"] for row in platform.rows(stream, "_corrupt_record"))
    assert found == ['    "n": 1', '    "n": 2', "  {", "  {", "  }", "  },", "[", "]"]


def test_a_file_of_many_chunks_keeps_every_line(platform: Platform) -> None:
    stream = json_stream(raw_record_column="_raw_record")
    count = 120_000
    late = count - 10
    records = [f'{{"n":{i},"text":"{"x" * 150}","v":{i}.50}}' for i in range(count)]
    records[late] = f'{{"late":"yes","n":{late}}}'
    records[count // 2] = '{"n":'
    data = lines(*records)
    assert len(data) > 20_000_000
    platform.volume_put("json/a.json", data)
    report = platform.engine.ingest(stream)
    assert (report.rows, report.rows_corrupt, report.rows_rescued) == (count, 1, 0)
    assert report.batches[0].files_ingested == 1
    found = platform.rows(stream, "_raw_record", "n", "v", "late", "_corrupt_record")
    assert sorted(row["_raw_record"] for row in found) == sorted(records)
    assert [row["n"] for row in found if row["late"] == "yes"] == [str(late)]
    assert [row["_raw_record"] for row in found if row["_corrupt_record"]] == ['{"n":']
    good = (row for row in found if row["v"] is not None)
    assert all(row["v"] == row["n"] + ".50" for row in good)
