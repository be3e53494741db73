"""JSON files become rows exactly: what is a record, how each value is shown, and that no line is lost or changed.

Lines are read in two ways, by shape and one by one. A file of fewer than 64 lines, or of fewer than 8 if they are long,
is always read one by one; that is how these tests compare the two.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telematics_assets.autoloader.chunks import MAX_RECORD_BYTES
from telematics_assets.autoloader.codecs import LOOK_BYTES, LOOK_UNPACKED_BYTES
from telematics_assets.autoloader.json_exact import MAX_DEPTH, parse_record
from telematics_assets.autoloader.json_grid import Block, proven
from telematics_assets.autoloader.json_lines import CHUNK_VALUES, TAIL_BYTES, is_complete_json, json_keys, read_json
from telematics_assets.autoloader.json_shapes import learn
from telematics_assets.errors import UnreadableFileError
from telematics_assets_tests.fuzz.oracle import check_json_lines
from telematics_assets_tests.turns import examples

BOM = b"\xef\xbb\xbf"
FILE = "json/a.json"
DATA = ("a", "b", "device")
OWN = ("_corrupt_record", "_raw_record", "_rescued_data")


def schema(*data: str, type: pa.DataType | None = None) -> pa.Schema:
    return pa.schema([(name, type or pa.string()) for name in (*data, *OWN)])


def read_table(
    content: bytes,
    target: pa.Schema | None = None,
    *,
    raw_column: str | None = "_raw_record",
    on_unknown: Callable[[Sequence[str]], None] | None = None,
    **options: Any,
) -> pa.Table:
    target = target or schema(*DATA)
    chunks = list(
        read_json(
            io.BytesIO(content),
            target,
            rescued_column="_rescued_data",
            raw_column=raw_column,
            file_path=FILE,
            on_unknown=on_unknown,
            **options,
        )
    )
    for chunk in chunks:
        assert chunk.table.num_rows
        assert chunk.table.schema == target
        assert chunk.rescued_rows == chunk.table.num_rows - chunk.table["_rescued_data"].null_count
        assert chunk.corrupt_rows == chunk.table.num_rows - chunk.table["_corrupt_record"].null_count
    table = pa.concat_tables([target.empty_table(), *(chunk.table for chunk in chunks)])
    table.validate(full=True)
    return table


def read(content: bytes, **options: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(content, **options).to_pylist()
    return rows


def read_line(line: bytes) -> dict[str, Any]:
    """Read a line alone, and again as one of so many that shapes are learned; both say the same."""
    [row] = read(line + b"\n")
    many = read((line + b"\n") * 100)
    assert many == [row] * 100
    return row


def value(json_text: str) -> Any:
    row = read_line(b'{"a":' + json_text.encode() + b"}")
    assert row["_corrupt_record"] is None
    return row["a"]


def corrupt(line: bytes) -> str:
    row = read_line(line)
    assert row["_raw_record"] == row["_corrupt_record"]
    assert [row[name] for name in (*DATA, "_rescued_data")] == [None] * 4
    text: str = row["_corrupt_record"]
    return text


#: The first ones are single values, the others none or more.
WIDE_VALUES = [
    *(
        "1e400",
        "-0",
        "9" * 40,
        "1.5E-07",
        '"a\\"b"',
        '"\\\\"',
        '"\\\\,\\""',
        '"\\ud83d\\ude00"',
        '"é, ł"',
        "{}",
        "null",
    ),
    *("01", "1e", "--1", '"\\ud800"', '"\\x"', '"a\tb"', '"a"b"', '"\\', '"', "[1,2]", "nul", ""),
]
HELD = 11


class TestValues:
    @pytest.mark.parametrize(
        "text",
        [
            "1",
            "1.10",
            "-0",
            "0.0",
            "1E+5",
            "1e400",
            "12345678901234567890123",
            "9" * 5000,
            "0." + "3" * 5000,
            "true",
            "false",
            "{}",
            "[]",
            "{ }",
            '{"model":"X","firmware":"1.2"}',
            '{"model": "a, b", "x" : [1, 2.50, {"y": null}]}',
            '[1,"\\u00e9","\\ud800"]',
            '{"twice":1,"twice":2}',
        ],
    )
    def test_what_is_no_string_keeps_its_source_text(self, text: str) -> None:
        assert value(text) == text

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ('"x"', "x"),
            ('""', ""),
            ('"null"', "null"),
            ('"1"', "1"),
            ('"a, b: {c}"', "a, b: {c}"),
            ('"Zażółć"', "Zażółć"),
            ('"\\u017c\\u00f3\\u0142w"', "żółw"),
            ('"\\ud83d\\ude80"', "🚀"),
            ('"a\\"b\\\\c\\/d\\b\\f\\n\\r\\t"', 'a"b\\c/d\b\f\n\r\t'),
            ('"\\\\"', "\\"),
            ('"\\\\,\\\\\\",x"', '\\,\\",x'),
            ('"\\u0000"', "\x00"),
            ('"\x7f"', "\x7f"),
            ('"\x85\u2028\u2029\ufeff"', "\x85\u2028\u2029\ufeff"),
            ('"\\uFFFF\uffff"', "\uffff\uffff"),
        ],
    )
    def test_a_string_is_decoded(self, text: str, shown: str) -> None:
        assert value(text) == shown

    def test_null_and_a_missing_key_are_null(self) -> None:
        row = read_line(b'{"a":null}')
        assert (row["a"], row["b"]) == (None, None)

    def test_backslashes_escape_in_pairs(self) -> None:
        row = read_line(b'{"a":"x\\\\","b":"p, \\\\\\", q","device":"\\\\\\\\, r"}')
        assert (row["a"], row["b"], row["device"]) == ("x\\", 'p, \\", q', "\\\\, r")

    def test_a_key_is_decoded(self) -> None:
        assert read_line(b'{"\\u0061":1}')["a"] == "1"

    def test_an_empty_object_is_a_row(self) -> None:
        row = read_line(b"{}")
        assert (row["_corrupt_record"], row["_raw_record"], row["_rescued_data"]) == (None, "{}", None)

    @pytest.mark.parametrize(
        "line",
        [b' {"a":1,"b":"x"}', b'{"a":1,"b":"x"} ', b'\t{ "a"\t:\r1 , "b":  "x"\r}\t', b'{"a": 1, "b": "x"}'],
    )
    def test_white_space_may_stand_where_json_allows_it(self, line: bytes) -> None:
        row = read_line(line)
        assert (row["a"], row["b"], row["_raw_record"]) == ("1", "x", line.decode())

    def test_any_string_type_may_be_asked_for(self) -> None:
        for type in (pa.string(), pa.large_string(), pa.string_view()):
            table = read_table(b'{"a":1}\n', schema(*DATA, type=type))
            assert table["a"].to_pylist() == ["1"]


class TestCorruptRecords:
    @pytest.mark.parametrize(
        "line",
        [
            '{"a":1,"b":"cut mid-rec',
            '{"a":1',
            '{"a":1,}',
            '{"a":1 "b":2}',
            '{"a" 1}',
            '{"a":}',
            "{a:1}",
            "{'a':1}",
            '{"a":1}}',
            '{"a":1} x',
            '{"a":1}{"a":2}',
            '{"a":1} {"a":2}',
            '{"a":1},',
            "[1,2]",
            '[{"a":1}]',
            "1",
            '"a"',
            "null",
            "x",
            "{",
            '{"a":1,"a":1}',
            '{"a":1,"\\u0061":2}',
            '{"a":NaN}',
            '{"a":Infinity}',
            '{"a":-Infinity}',
            '{"a":[NaN]}',
            '{"a":01}',
            '{"a":+1}',
            '{"a":.5}',
            '{"a":1.}',
            '{"a":1e}',
            '{"a":-}',
            '{"a":0x1}',
            '{"a":\u0661}',
            '{"a":1\u0662}',
            '{"a":1.\u0662}',
            '{"a":1e\u0662}',
            '{"a":True}',
            '{"a":nul}',
            '{"a":"\t"}',
            '{"a":"\x00"}',
            '{"a":"\x1f"}',
            '{"a":"\\x"}',
            '{"a":"\\u12"}',
            '{"a":"\\u12g4"}',
            '{"a":"\\u\u0661\u0662\u0663\u0664"}',
            '{"a":"\\ud800"}',
            '{"a":"\\udc00\\ud800"}',
            '{"unknown":"\\ud800"}',
            '{"\\ud800":1}',
            '{"a":{"b":1}',
            '{"a":[1,]}',
            '{"a":"x"y"}',
            '{\u00a0"a":1}',
            '{"a":\x0c1}',
            '\ufeff{"a":1}',
            "\u2028",
            "\x85",
            "\x00",
        ],
    )
    def test_a_line_that_is_no_record_is_kept_verbatim(self, line: str) -> None:
        content = line.encode()
        # Among lines of which a shape is learned; and not first, where a byte order mark would be one.
        good = b'{"a":0}\n' * 100 + b'{"a":0,"b":"x"}\n' * 100
        row = read(good + content)[-1]
        assert row["_corrupt_record"] == row["_raw_record"] == line
        assert [row[name] for name in (*DATA, "_rescued_data")] == [None] * 4
        assert read(b'{"a":0}\n' + content)[1:] == [row]
        assert read(good + (content + b"\n") * 100 + good)[200:300] == [row] * 100

    @pytest.mark.parametrize(
        "line", [b"\xff", b'{"a":"\xc3("}', b'{"a":"\xed\xa0\x80"}', b'{"a":"\xc0\x80"}', b"\xef\xbb"]
    )
    def test_a_line_that_is_no_utf8_is_kept_in_base64(self, line: bytes) -> None:
        shown = corrupt(line)
        assert base64.b64decode(shown.removeprefix("base64:")) == line

    def test_text_that_looks_like_base64_of_ours_is_encoded_too(self) -> None:
        assert corrupt(b"base64:/w==") == "base64:" + base64.b64encode(b"base64:/w==").decode()

    def test_invalid_utf8_on_one_line_does_not_touch_the_others(self) -> None:
        good = '{"a":"ż, ó","b":1}'
        rows = read((f"{good}\n".encode() * 50) + b'{"a":"\xff","b":1}\r\n' + (f"{good}\n".encode() * 50))
        assert [row["a"] for row in rows] == ["ż, ó"] * 50 + [None] + ["ż, ó"] * 50
        assert rows[50]["_corrupt_record"] == "base64:" + base64.b64encode(b'{"a":"\xff","b":1}').decode()

    def test_nesting_is_limited(self) -> None:
        def nested(depth: int) -> bytes:
            return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

        assert read_line(nested(MAX_DEPTH))["a"] == nested(MAX_DEPTH)[5:-1].decode()
        assert corrupt(nested(MAX_DEPTH + 1)) == nested(MAX_DEPTH + 1).decode()
        assert len(corrupt(b'{"a":' + b"[" * 200_000)) == 200_005

    def test_many_brackets_side_by_side_are_not_deep(self) -> None:
        flat = "[" + ",".join(['"]["'] + ["[]"] * 1000) + "]"
        assert value(flat) == flat

    def test_a_deep_end_inside_a_string_does_not_hide_depth(self) -> None:
        deep = '{"a":' + '["]",' * MAX_DEPTH + "1" + "]" * MAX_DEPTH + "}"
        assert corrupt(deep.encode()) == deep


class TestLines:
    def test_rows_stand_in_file_order_whatever_way_they_took(self) -> None:
        lines = [f'{{"a":{i}}}' if i % 7 else f'{{"b":1,"a":"\\u0{i % 10}30","zz":{i}}}' for i in range(500)]
        lines[100] = "broken"
        rows = read("\n".join(lines).encode())
        assert [row["_raw_record"] for row in rows] == lines
        assert [row["a"] for row in rows if row["_rescued_data"] is None] == [
            str(i) if i != 100 else None for i in range(500) if i % 7
        ]

    def test_crlf_belongs_to_the_line_end(self) -> None:
        rows = read(b'{"a":1}\r\n{"a":2}\r\nx\r\n' * 50)
        assert [row["_raw_record"] for row in rows] == ['{"a":1}', '{"a":2}', "x"] * 50

    def test_a_bare_cr_is_no_line_end(self) -> None:
        assert [row["_raw_record"] for row in read(b'{"a":1}\r{"a":2}\n{"a":\r3}\n')] == [
            '{"a":1}\r{"a":2}',
            '{"a":\r3}',
        ]
        assert read(b'{"a":1}\r')[0]["_raw_record"] == '{"a":1}\r'
        assert read(b'{"a":{"x":1}}\r\r\n')[0]["_raw_record"] == '{"a":{"x":1}}\r'

    def test_a_cr_at_the_end_of_the_file_does_not_shift_values(self) -> None:
        lines = b'{"a":{"x":1}}\r\r\n' * 80
        for content in (lines, lines + b'{"a":{"x":1}}\r', b'{"a":{"x":1}}\r\n' * 80 + b'{"a":{"x":1}}\r'):
            assert {row["a"] for row in read(content)} == {'{"x":1}'}

    def test_only_a_line_feed_ends_a_line(self) -> None:
        text = '{"a":"\u2028\u2029\x85"}'
        assert [row["_raw_record"] for row in read(f"{text}\n{text}".encode())] == [text, text]

    def test_blank_lines_are_no_rows(self) -> None:
        rows = read(b"\n \n\t\r\n" + b'{"a":1}\n\n \r\r\n' * 60 + b"  ")
        assert [row["a"] for row in rows] == ["1"] * 60

    @pytest.mark.parametrize("content", [b"", b"\n", b"  ", BOM, BOM + b"\n"])
    def test_a_file_without_records_has_no_chunks(self, content: bytes) -> None:
        assert read(content) == []

    def test_a_byte_order_mark_at_the_start_is_skipped(self) -> None:
        for chunk_bytes in (1, 1 << 20):
            rows = read(BOM + b'{"a":1}\n' + BOM + b'{"a":2}\n', chunk_bytes=chunk_bytes)
            assert [row["_corrupt_record"] for row in rows] == [None, '\ufeff{"a":2}']
            assert [row["_raw_record"] for row in rows] == ['{"a":1}', '\ufeff{"a":2}']

    def test_without_a_raw_column_there_is_none(self) -> None:
        target = pa.schema([(name, pa.string()) for name in ("a", "_corrupt_record", "_rescued_data")])
        rows = read(b'{"a":1,"_raw_record":2}\n', target=target, raw_column=None)
        assert rows == [
            {"a": "1", "_corrupt_record": None, "_rescued_data": '{"_raw_record":2,"_file_path":"json/a.json"}'}
        ]

    def test_a_line_at_the_limit_is_read_and_one_beyond_names_line_and_limit(self) -> None:
        longest = b'{"a":"' + b"x" * (MAX_RECORD_BYTES - 8) + b'"}'
        assert [len(row["a"]) for row in read(b'{"a":"x"}\n' + longest + b"\r\n")] == [1, MAX_RECORD_BYTES - 8]
        for content in (b"\n" + longest + b" \n", b"\n" + longest + b" ", b"\n" + longest * 2):
            for chunk_bytes in (1 << 20, 1 << 26):
                with pytest.raises(UnreadableFileError, match=rf"Line 2 of 'json/a\.json' .* {MAX_RECORD_BYTES} bytes"):
                    read(content, chunk_bytes=chunk_bytes)

    def test_a_source_may_give_less_than_it_is_asked_for(self) -> None:
        class Slow(io.BytesIO):
            def read(self, size: int | None = -1, /) -> bytes:
                return super().read(min(size, 7) if size and size > 0 else size)

        content = BOM + b'{"a":1}\n' * 50 + b'{"b":2}'
        for stored in (content, gzip.compress(content)):
            chunks = read_json(
                Slow(stored), schema(*DATA), rescued_column="_rescued_data", raw_column="_raw_record", file_path=FILE
            )
            assert sum(chunk.table.num_rows for chunk in chunks) == 51
            assert json_keys(Slow(stored), 1 << 20) == ["a", "b"]
            assert is_complete_json(Slow(stored), len(stored))

    def test_more_kinds_of_lines_than_are_remembered_are_read_all_the_same(self) -> None:
        lines = [f'{{"a":{i},"k{i // 100}":"x"}}' for i in range(90 * 100)]
        rows = read("\n".join(lines).encode(), chunk_bytes=1 << 14)
        assert [row["_raw_record"] for row in rows] == lines
        assert [row["a"] for row in rows] == [str(i) for i in range(len(lines))]
        assert [row["_rescued_data"] for row in rows] == [
            f'{{"k{i // 100}":"x","_file_path":"json/a.json"}}' for i in range(len(lines))
        ]

    def test_the_line_number_counts_the_lines_of_all_chunks(self) -> None:
        content = b'{"a":1}\n\n' * 5000 + b"x" * (MAX_RECORD_BYTES + 1)
        with pytest.raises(UnreadableFileError, match=r"Line 10001 "):
            read(content, chunk_bytes=1 << 12)


class TestRescue:
    def test_an_unknown_key_is_rescued_with_its_source_text(self) -> None:
        row = read_line(b'{"x":1.10,"a":1,"y":"\\u0061, b","z":{ "q":[1e400] },"w":null}')
        assert row["a"] == "1"
        assert row["_rescued_data"] == (
            '{"x":1.10,"y":"\\u0061, b","z":{ "q":[1e400] },"w":null,"_file_path":"json/a.json"}'
        )

    def test_keys_differ_by_case(self) -> None:
        row = read_line(b'{"A":1,"a":2}')
        assert (row["a"], row["_rescued_data"]) == ("2", '{"A":1,"_file_path":"json/a.json"}')

    @pytest.mark.parametrize("key", [*OWN, "_source_file", "_batch_id"])
    def test_a_key_named_like_a_column_of_ours_never_fills_it(self, key: str) -> None:
        row = read_line(f'{{"a":1,"{key}":"mine"}}'.encode())
        assert row["_corrupt_record"] is None
        assert row["_raw_record"] == f'{{"a":1,"{key}":"mine"}}'
        assert row["_rescued_data"] == f'{{"{key}":"mine","_file_path":"json/a.json"}}'

    def test_a_key_named_like_the_file_path_gets_underscores(self) -> None:
        assert read_line(b'{"_file_path":1}')["_rescued_data"] == '{"__file_path":1,"_file_path":"json/a.json"}'
        row = read_line(b'{"_file_path":1,"__file_path":2}')
        assert row["_rescued_data"] == '{"___file_path":1,"__file_path":2,"_file_path":"json/a.json"}'

    def test_odd_keys_stay_json(self) -> None:
        row = read_line('{"q\\"\\\\":1,"k,k":2,"é":3,"":4,"\\u0000":5}'.encode())
        assert json.loads(row["_rescued_data"]) == {
            'q"\\': 1, "k,k": 2, "é": 3, "": 4, "\x00": 5, "_file_path": FILE,
        }  # fmt: skip

    def test_a_column_of_another_type_is_not_filled(self) -> None:
        target = pa.schema([("a", pa.int64()), *((name, pa.string()) for name in ("b", *OWN))])
        for count in (1, 100):
            rows = read(b'{"a":1,"b":2}\n' * count, target=target)
            assert {(row["a"], row["b"], row["_rescued_data"]) for row in rows} == {
                (None, "2", '{"a":1,"_file_path":"json/a.json"}')
            }

    def test_unknown_keys_are_told_in_order_of_appearance_before_the_chunk(self) -> None:
        heard: list[list[str]] = []
        lines = [b'{"a":1}'] * 70 + [b'{"z":1,"y":2,"_corrupt_record":3}'] * 70 + [b'{"x":"\\ud800"}', b'{"w":1,"y":1}']
        read(b"\n".join(lines), on_unknown=lambda keys: heard.append(list(keys)))
        assert heard == [["z", "y", "w"]]

    def test_the_listener_may_stop_the_reading(self) -> None:
        class NewColumnsError(Exception):
            pass

        def stop(keys: Sequence[str]) -> None:
            raise NewColumnsError(*keys)

        with pytest.raises(NewColumnsError, match="z"):
            read(b'{"a":1}\n' * 5000 + b'{"z":1}\n' * 5000, on_unknown=stop, chunk_bytes=1 << 12)

    def test_a_file_may_be_left_half_read(self) -> None:
        chunks = read_json(
            io.BytesIO(b'{"a":1}\n' * 5000),
            schema(*DATA),
            rescued_column="_rescued_data",
            raw_column="_raw_record",
            file_path=FILE,
            chunk_bytes=1 << 10,
        )
        assert next(chunks).table.num_rows
        chunks.close()  # type: ignore[attr-defined]


class TestGzip:
    def test_members_one_after_another_are_one_file(self) -> None:
        content = gzip.compress(BOM + b'{"a":1}\n{"a"') + gzip.compress(b":2}\n")
        assert [row["a"] for row in read(content)] == ["1", "2"]

    def test_a_bomb_is_read_in_chunks(self) -> None:
        content = gzip.compress(b'{"a":1}\n' * 1_000_000)
        sizes = [
            chunk.table.num_rows
            for chunk in read_json(
                io.BytesIO(content),
                schema(*DATA),
                rescued_column="_rescued_data",
                raw_column="_raw_record",
                file_path=FILE,
                chunk_bytes=1 << 20,
            )
        ]
        assert sum(sizes) == 1_000_000
        assert max(sizes) <= (1 << 20) // 8 + 1

    @pytest.mark.parametrize("damage", [lambda c: c[:-1], lambda c: c[:15], lambda c: c[:2], lambda c: c + b"garbage"])
    def test_a_file_that_does_not_unpack_to_its_end_is_unreadable(self, damage: Callable[[bytes], bytes]) -> None:
        content = damage(gzip.compress(b'{"a":1}\n' * 1000))
        with pytest.raises(UnreadableFileError, match=r"'json/a\.json' is a gzip file that can't be unpacked"):
            read(content)
        assert not is_complete_json(io.BytesIO(content), len(content))

    def test_garbled_bytes_are_unreadable(self) -> None:
        content = bytearray(gzip.compress(bytes(range(256)) * 1000))
        content[40:60] = b"\xff" * 20
        with pytest.raises(UnreadableFileError, match="gzip"):
            read(bytes(content))
        with pytest.raises(UnreadableFileError, match="gzip"):
            json_keys(io.BytesIO(bytes(content)), 1 << 20)


class TestIsComplete:
    @staticmethod
    def complete(content: bytes) -> bool:
        plain = is_complete_json(io.BytesIO(content), len(content))
        if content:
            packed = gzip.compress(content)
            assert is_complete_json(io.BytesIO(packed), len(packed)) == plain
        return plain

    @pytest.mark.parametrize(
        "content",
        [
            b'{"a":1}\n',
            b"\n",
            b'{"a":1}',
            b'{"a":1}\r',
            b'{"a":1}\n{"a":1}',
            b'{"a":1}\n  ',
            BOM + b'{"a":1}',
            b'{"a":1,"a":2}',
            b'[{"a":1}]',
            b'{"a":"\xff"}',
            b"{\n" + b'{"a":"' + b"x" * TAIL_BYTES + b'"} ',
        ],
    )
    def test_a_whole_last_line_is_an_end(self, content: bytes) -> None:
        assert self.complete(content)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"  ",
            BOM,
            b'{"a":1}\n{"a":',
            b'{"a":{"b":1}',
            b'{"a":"\xc3',
            b"[" * 100_000,
            b'{"a":"' + b"x" * TAIL_BYTES,
        ],
    )
    def test_a_last_line_that_is_cut_is_none(self, content: bytes) -> None:
        assert not self.complete(content)

    def test_the_look_at_a_long_file_is_short(self) -> None:
        class Counted(io.BytesIO):
            taken = 0

            def read(self, size: int | None = -1, /) -> bytes:
                data = super().read(size)
                self.taken += len(data)
                return data

        source = Counted(b'{"a":1}\n' * 1_000_000)
        assert is_complete_json(source, 8_000_000)
        assert source.taken <= TAIL_BYTES + 10

    def test_a_gzip_file_is_not_unpacked_beyond_a_limit(self) -> None:
        cut = gzip.compress(b'{"a":')
        assert not is_complete_json(io.BytesIO(cut), len(cut))
        assert is_complete_json(io.BytesIO(cut), LOOK_BYTES + 1)
        bomb = gzip.compress(bytes(1 << 20)) * (LOOK_UNPACKED_BYTES // (1 << 20)) + cut
        assert is_complete_json(io.BytesIO(bomb), len(bomb))


class TestKeys:
    def test_keys_stand_in_order_of_appearance(self) -> None:
        lines = [b'{"b":1,"a":2}'] * 100 + [b"broken", b'{"B":1,"a":{"inner":1}}', b'{"\\u0063":1}'] * 40
        assert json_keys(io.BytesIO(BOM + b"\n".join(lines)), 1 << 20) == ["b", "a", "B", "c"]

    def test_only_whole_lines_within_the_limit_count(self) -> None:
        content = b'{"a":1}\n{"b":1}'
        assert json_keys(io.BytesIO(content), len(content)) == ["a", "b"]
        assert json_keys(io.BytesIO(content), len(content) - 1) == ["a"]
        assert json_keys(io.BytesIO(content), 7) == ["a"]
        assert json_keys(io.BytesIO(content), 6) == []
        assert json_keys(io.BytesIO(gzip.compress(content)), 8) == ["a"]
        assert json_keys(io.BytesIO(b""), 8) == []


class TestShapes:
    @pytest.mark.parametrize(
        "text",
        [
            "{}",
            '{"a":1}',
            '{"a": "x, y", "b": null}',
            '{"a":{"model":"X","firmware":"1.2"},"b":[1,[2,{}],"z"]}',
            ' {"é" : 1 , "b":{"ż":"\\n","l":[]}} ',
        ],
    )
    def test_lines_of_one_writer_take_the_fast_way(self, text: str) -> None:
        record = parse_record(text)
        assert record is not None
        shape = learn(text, record)
        assert shape is not None
        hits = pl.Series([text, text + "\n", text + "\r\n", text + "\r", "x" + text]).str.contains(shape.pattern)
        assert hits.to_list() == [True, True, True, False, False]

    @pytest.mark.parametrize(
        "text",
        [
            '{"a":{ }}',
            '{"a,b":1}',
            '{"a":1}\r',
            json.dumps({str(i): i for i in range(5000)}),
            '{"x":[1,{ },2],' + json.dumps({str(i): i for i in range(300)})[1:],
            json.dumps({"x" * 300_000: 1}),
        ],
    )
    def test_some_records_make_no_shape(self, text: str) -> None:
        record = parse_record(text)
        assert record is not None
        assert learn(text, record) is None

    def test_a_very_wide_fleet_is_read_by_shape(self) -> None:
        line = json.dumps({f"key_{i}": [i, "x", None] for i in range(80)}).encode() + b"\n"
        [row] = {tuple(row.values()) for row in read(line * 200, target=schema(*(f"key_{i}" for i in range(80))))}
        assert row[:80] == tuple(f'[{i}, "x", null]' for i in range(80))

    @pytest.mark.parametrize("value", WIDE_VALUES)
    def test_a_line_too_wide_for_a_pattern_is_proven_value_by_value(self, value: str) -> None:
        columns = [f"key_{i}" for i in range(300)]
        usual = json.dumps({name: [i, "x,", None][i % 3] for i, name in enumerate(columns)})
        lines = [usual.encode()] * 4
        for at in (0, 7, 298):
            before = json.dumps({name: i for i, name in enumerate(columns[:at])})[:-1]
            after = json.dumps({name: f"y{i}" for i, name in enumerate(columns[at + 1 :])})[1:]
            lines.append(f'{before}{", " if at else ""}"{columns[at]}": {value}, {after}'.encode())
        record = parse_record(usual)
        assert record is not None
        shape = learn(usual, record)
        assert shape is not None
        assert not shape.pattern
        block = Block(b"\n".join(lines * 2))
        found = proven(block, np.arange(block.lines), shape).tolist()
        assert found == [i for i in range(14) if i % 7 < 4 or value in WIDE_VALUES[:HELD]]
        target = schema(*columns)
        assert read(b"\n".join(lines * 2), target=target) == [read(line, target=target)[0] for line in lines] * 2


SCALARS = st.sampled_from(
    [
        "1",
        "-0",
        "1e400",
        "true",
        "null",
        '"x"',
        '""',
        '"a,b"',
        '"q\\"x"',
        '"\\\\"',
        '"\\\\,"',
        '"\\u00e9"',
        '"\\ud83d\\ude00"',
        '"é, ł"',
        '"\u2028"',
        "{}",
        "[]",
        '{"m":1,"f":"y"}',
        '{"m":"a,\\"b","f":null}',
        '[1,"]"]',
        '"\\u0000"',
        '"\\\\\\","',
    ]
)
ODDITIES = st.sampled_from(
    [
        "01",
        "\u0661",
        "+1",
        ".5",
        "NaN",
        '"\t"',
        '"\\ud800"',
        '{ "m" : 1 }',
        "",
        "1 2",
        "'x'",
        '"\\x"',
        '"\x00"',
        "{ }",
        "[[]",
    ]
)
KEYS = st.lists(
    st.sampled_from(["a", "b", "device", "A", "z", "é", "k,k", "\\u0061", "_file_path", "_raw_record"]), max_size=5
)
SEPARATORS = st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", " :\r")])


@st.composite
def fleet_lines(draw: st.DrawFn) -> list[bytes]:
    """Lines of a few writers, most of them records, some damaged."""
    writers = draw(st.lists(st.tuples(KEYS, SEPARATORS), min_size=1, max_size=3))
    scalars = [*draw(st.lists(SCALARS, min_size=1, max_size=5)), *draw(st.lists(ODDITIES, max_size=1))]
    random = draw(st.randoms(use_true_random=False))
    lines = []
    for _ in range(draw(st.integers(64, 90))):
        keys, (comma, colon) = random.choice(writers)
        text = "{" + comma.join(f'"{key}"{colon}{random.choice(scalars)}' for key in keys) + "}"
        line = text.encode()
        match random.randrange(30):
            case 0:
                at = random.randrange(len(line))
                line = line[:at] + bytes([random.randrange(256)]) + line[at + random.randrange(2) :]
            case 1:
                line = line[: random.randrange(len(line))]
            case 2:
                line = random.choice([b"", b" ", b"\r", b"\xff", b"[1]", b" " + line, line + b"\r", line + b"x"])
        lines.append(line)
    return lines


def one_by_one(content: bytes) -> list[dict[str, Any]]:
    """Few lines at a time, each time as a file of their own: so few are read exactly, without a shape."""
    lines = content.removeprefix(BOM).split(b"\n")
    feeds = [line + b"\n" for line in lines[:-1]] + lines[-1:]
    rows = []
    for start in range(0, len(feeds), 32):
        rows += read(BOM + b"".join(feeds[start : start + 32]))
    return rows


def accounted(content: bytes, rows: list[dict[str, Any]]) -> None:
    """Every line that is not blank is one row, and the raw column gives its bytes back."""
    lines = content.removeprefix(BOM).split(b"\n")
    stripped = [line.removesuffix(b"\r") for line in lines[:-1]] + lines[-1:]
    raw = [row["_raw_record"] for row in rows]
    decoded = [base64.b64decode(text[7:]) if text.startswith("base64:") else text.encode() for text in raw]
    assert decoded == [line for line in stripped if line.strip(b" \t\r")]
    for text, row in zip(raw, rows, strict=True):
        assert row["_corrupt_record"] in (None, text)


@settings(max_examples=40, deadline=None)
@given(
    fleet_lines(),
    st.sampled_from([b"\n", b"\r\n"]),
    st.sampled_from([b"", b"\n", b"\r"]),
    st.booleans(),
    st.sampled_from([1, 50, 2000]),
)
def test_by_shape_and_one_by_one_give_the_same_rows(
    lines: list[bytes], line_end: bytes, file_end: bytes, mark: bool, chunk_bytes: int
) -> None:
    content = (BOM if mark else b"") + line_end.join(lines) + file_end
    rows = read(content)
    assert rows == one_by_one(content)
    accounted(content, rows)
    assert read(content, chunk_bytes=chunk_bytes) == rows


@pytest.mark.parametrize("last", [b'{"a":"\\', b"\\", b'{"a":"x,y","b":"\\\\\\', b'"', b",", b'{"a":"x,y","b":1}\r'])
def test_a_file_may_be_cut_anywhere_behind_lines_of_one_shape(last: bytes) -> None:
    check_json_lines(b'{"a":"x,y","b":1}\n' * 70 + last)


@settings(max_examples=40, deadline=None)
@given(fleet_lines(), st.sampled_from([b"\n", b"\r\n"]))
def test_a_row_is_what_a_strict_parser_says_to_the_last_byte(lines: list[bytes], line_end: bytes) -> None:
    check_json_lines(line_end.join(lines))


@settings(max_examples=examples(60), deadline=None)
@given(
    st.binary(max_size=300)
    | st.lists(st.sampled_from([b"{", b"}", b'"', b"\n", b"\r", b",", b":", b"\\", b"a", b"1", b"\xff"])).map(b"".join)
    | st.dictionaries(st.text(max_size=5), st.floats() | st.integers() | st.text() | st.none(), max_size=5).map(
        lambda record: json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")
    )
)
def test_arbitrary_bytes_are_accounted_for(content: bytes) -> None:
    check_json_lines(content)


@pytest.mark.parametrize("multi_line", [False, True])
def test_short_records_of_many_columns_come_in_small_chunks(multi_line: bool) -> None:
    rows = 3 * (CHUNK_VALUES // 2_000) + 7
    records = [f'{{"c{number % 50}":{number}}}'.encode() for number in range(rows)]
    content = b"[" + b",".join(records) + b"]" if multi_line else b"\n".join(records)
    target = schema(*(f"c{number}" for number in range(2_000 - len(OWN))))
    chunks = list(
        read_json(
            io.BytesIO(content),
            target,
            rescued_column="_rescued_data",
            raw_column=None,
            file_path=FILE,
            multi_line=multi_line,
        )
    )
    assert all(chunk.table.num_rows * len(target) <= CHUNK_VALUES for chunk in chunks)
    values = [chunk.table[f"c{number}"].to_pylist() for chunk in chunks for number in range(50)]
    assert sorted(int(v) for column in values for v in column if v is not None) == list(range(rows))
    assert sum(chunk.table.num_rows for chunk in chunks) == rows


_FAULTS = """
import io, json, resource
import pyarrow as pa
from telematics_assets.autoloader.json_lines import read_json

names = [f"value_{number}" for number in range(20)]
lines = [json.dumps(dict.fromkeys(names, number), separators=(",", ":")) for number in range(20_000)]
content = "\\n".join(lines).encode()
target = pa.schema([(name, pa.string()) for name in (*names, "_rescued_data", "_corrupt_record")])
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    chunks = read_json(io.BytesIO(content), target, rescued_column="_rescued_data", raw_column=None, file_path="/a")
    assert sum(chunk.table.num_rows for chunk in chunks) == len(lines)
    faulted = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize()
    print(faulted / len(content))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such habit to be kept from")
def test_blocks_take_the_memory_of_those_before_them() -> None:
    # In a process of its own: what other tests allocated before changes the allocator's habits.
    told = subprocess.run([sys.executable, "-c", _FAULTS], check=True, stdout=subprocess.PIPE, text=True).stdout
    # Blocks that give their memory back take eight times the file anew, with each file again.
    assert min(map(float, told.split())) < 2
