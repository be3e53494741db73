"""Delimited files become rows exactly: where records end, what fields hold, and that no record is lost or changed.

Records are read in two ways, by columns and one by one. The property tests compare the first with the second, and the
second with the standard library's parser.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telematics_assets.autoloader import delimited
from telematics_assets.autoloader.chunks import MAX_RECORD_BYTES
from telematics_assets.autoloader.codecs import LOOK_BYTES
from telematics_assets.autoloader.delimited import csv_keys, is_complete_csv, read_csv
from telematics_assets.autoloader.delimited_exact import MAX_FIELDS, Dialect, parse_record
from telematics_assets.errors import UnreadableFileError
from telematics_assets_tests.turns import examples

FILE = "csv/a.csv"
OWN = ("_corrupt_record", "_raw_record", "_rescued_data")
BARE = Dialect(header=False)


def schema(*data: str, type: pa.DataType | None = None) -> pa.Schema:
    return pa.schema([(name, type or pa.string()) for name in (*data, *OWN)])


def read(
    content: bytes,
    dialect: Dialect | None = None,
    *,
    names: Sequence[str] = (),
    target: pa.Schema | None = None,
    on_unknown: Callable[[Sequence[str]], None] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    target = target or schema("a", "b")
    chunks = list(
        read_csv(
            io.BytesIO(content),
            target,
            dialect=dialect or Dialect(),
            names=names,
            rescued_column="_rescued_data",
            raw_column="_raw_record",
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
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def values(content: bytes, dialect: Dialect | None = None, **options: Any) -> list[tuple[str | None, ...]]:
    return [(row["a"], row["b"]) for row in read(content, dialect, **options)]


def corrupt(content: bytes, dialect: Dialect | None = None) -> list[str | None]:
    rows = read(content, dialect)
    for row in rows:
        if row["_corrupt_record"] is not None:
            assert row["_raw_record"] == row["_corrupt_record"]
            assert [row[name] for name in ("a", "b", "_rescued_data")] == [None] * 3
    return [row["_corrupt_record"] for row in rows]


def rescued(row: dict[str, Any]) -> dict[str, Any] | None:
    text = row["_rescued_data"]
    if text is None:
        return None
    found: dict[str, Any] = json.loads(text)
    assert found.pop("_file_path") == FILE
    return found


class TestFields:
    @pytest.mark.parametrize(
        "text",
        [
            "1",
            "1.10",
            " 1 ",
            "\t",
            "NULL",
            "\\N",
            "1e400",
            "{}",
            "é🚗",
            "\x00",
            "\x85\u2028",
            'it"s',
            '5""',
            "'x'",
            "\r",
        ],
    )
    def test_a_field_is_its_text_as_it_stands(self, text: str) -> None:
        assert values(f"a,b\n{text},2\n".encode()) == [(text, "2")]

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ('"x"', "x"),
            ('""', ""),
            ('"a,b"', "a,b"),
            ('"say ""hi"""', 'say "hi"'),
            ('""""', '"'),
            ('""""""', '""'),
            ('"\\"', "\\"),
            ('" x "', " x "),
            ('"line\nend"', "line\nend"),
            ('"line\r\nend\r"', "line\r\nend\r"),
            ('"\n\n,"', "\n\n,"),
        ],
    )
    def test_quotes_are_taken_off_and_doubled_ones_are_one(self, text: str, shown: str) -> None:
        for content in (f"a,b\n{text},2\n", f"a,b\n2,{text}\r\n", f"a,b\n2,{text}"):
            assert shown in values(content.encode())[0]
            assert corrupt(content.encode()) == [None]

    def test_an_empty_field_is_null_and_an_empty_text_is_not(self) -> None:
        assert values(b'a,b\n,""\n"",\n,\n') == [(None, ""), ("", None), (None, None)]

    def test_other_separators_and_quotes_may_be_asked_for(self) -> None:
        assert values(b"a;b\n'x;''y';2,5\n", Dialect(sep=";", quote="'")) == [("x;'y", "2,5")]
        assert values(b'a\tb\n"x"\t"y\n', Dialect(sep="\t", quote="")) == [('"x"', '"y')]

    def test_any_string_type_may_be_asked_for(self) -> None:
        for type in (pa.large_string(), pa.string_view()):
            assert values(b"a,b\n1,2\n", target=schema("a", "b", type=type)) == [("1", "2")]


class TestRecords:
    @pytest.mark.parametrize(
        "content",
        [
            b"a,b\n1,2\n3,4\n",
            b"a,b\n1,2\n3,4",
            b"a,b\r\n1,2\r\n3,4\r\n",
            b"\xef\xbb\xbfa,b\n1,2\n3,4\n",
            b"\n\r\na,b\n\n1,2\n\r\n\n3,4\n\n",
            b'"a","b"\n"1",2\n3,"4"',
        ],
    )
    def test_line_ends_empty_lines_and_a_byte_order_mark_are_no_data(self, content: bytes) -> None:
        assert values(content) == [("1", "2"), ("3", "4")]

    @pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n\r\n\n", b"a,b", b"a,b\r\n", b'"a",b\n\n'])
    def test_a_file_without_records_has_no_rows(self, content: bytes) -> None:
        assert read(content) == []

    def test_a_bare_carriage_return_ends_no_record(self) -> None:
        assert values(b"a,b\n1\r2,3\r4\n") == [("1\r2", "3\r4")]

    def test_spaces_alone_are_a_record(self) -> None:
        assert values(b"a\n \n") == [(" ", None)]

    def test_a_record_that_is_too_short_has_nulls(self) -> None:
        (row,) = read(b"a,b\n1\n")
        assert (row["a"], row["b"], row["_corrupt_record"], row["_rescued_data"]) == ("1", None, None, None)

    @pytest.mark.parametrize("extra", [1, 3, 40])
    def test_what_is_too_much_is_rescued_by_position(self, extra: int) -> None:
        texts = [f"x{i}" for i in range(extra)]
        rows = read(("a,b\n1,2," + ",".join(texts) + "\n3,4,,\n").encode())
        assert [(row["a"], row["b"]) for row in rows] == [("1", "2"), ("3", "4")]
        assert rescued(rows[0]) == {f"_c{i + 2}": text for i, text in enumerate(texts)}
        assert rescued(rows[1]) is None

    def test_a_record_with_too_many_fields_is_corrupt(self) -> None:
        widest = "," * (MAX_FIELDS - 1)
        assert corrupt(f"a,b\n{widest}\n{widest},\n".encode()) == [None, widest + ","]

    @pytest.mark.parametrize("line", ['"a"b,2', '"a" ,2', '"a""', '"a', '1,"2', '1,"2"3', '"a"\r,2', '"a"\t'])
    def test_a_quote_that_does_not_close_a_field_makes_its_line_corrupt(self, line: str) -> None:
        dialect = Dialect(multi_line=False)
        found = corrupt(f"a,b\n1,2\n{line}\r\n3,4\n".encode(), dialect)
        assert found == [None, line, None]

    def test_text_behind_a_closing_quote_costs_only_its_line(self) -> None:
        assert corrupt(b'a,b\n1,2\n"x"y,"\n3,4\n"5",6\n') == [None, '"x"y,"', None, None]

    def test_an_open_quote_takes_the_rest_of_the_file(self) -> None:
        assert corrupt(b'a,b\n1,2\n3,"4\n5,6\n') == [None, '3,"4\n5,6\n']

    def test_without_multi_line_a_line_end_in_quotes_ends_the_record(self) -> None:
        assert corrupt(b'a,b\n1,"2\n3",4\n', Dialect(multi_line=False)) == ['1,"2', None]
        assert values(b'a,b\n1,"2\n3",4\n', Dialect(multi_line=False)) == [(None, None), ('3"', "4")]

    def test_a_record_that_is_no_utf8_is_kept_in_base64(self) -> None:
        lines = [b"\xff,1", b'"\xed\xa0\x80\n",2', b"3,\xc3"]
        found = corrupt(b"a,b\n\xc3\xa9,1\n" + b"\n".join(lines) + b"\n2,3\n")
        assert found == [None, *("base64:" + base64.b64encode(line).decode() for line in lines), None]

    def test_text_that_looks_like_our_base64_can_be_told_apart(self) -> None:
        text = corrupt(b'a,b\nbase64:AAAA,"\n')[0]
        assert text is not None
        assert base64.b64decode(text.removeprefix("base64:")) == b'base64:AAAA,"\n'

    def test_a_longer_record_makes_the_file_unreadable(self) -> None:
        longest = b"x" * (MAX_RECORD_BYTES - 2) + b",1"
        assert [len(row["a"]) for row in read(b"a,b\n1,2\n" + longest + b"\r\n")] == [1, MAX_RECORD_BYTES - 2]
        for content in (b"1,2\nx" + longest + b"\n3,4\n", b'1,2\n"' + longest + b"\n" + longest):
            for chunk_bytes in (1 << 20, 8 << 20, 64 << 20):
                with pytest.raises(UnreadableFileError, match=rf"Record 2 of 'csv/a\.csv' .* {MAX_RECORD_BYTES} bytes"):
                    read(b"a,b\n" + content, chunk_bytes=chunk_bytes)


class TestColumns:
    @pytest.mark.parametrize(
        ("header", "names"),
        [
            (b"a,b", ["a", "b"]),
            (b'" a ","b,""c"""', [" a ", 'b,"c"']),
            (b'a,,""', ["a", "_c1", "_c2"]),
            (b"a,b,a,a3", ["a0", "b", "a2", "a3"]),
            (b"a,a,a1", ["a0", "a1_", "a1"]),
            (b"_c1,,x", ["_c1", "_c1_", "x"]),
            (b"A,a", ["A", "a"]),
            (b"\xef\xbb\xbfa\r", ["a"]),
        ],
    )
    def test_the_header_gives_every_column_a_name_of_its_own(self, header: bytes, names: list[str]) -> None:
        for content in (header + b"\n", header + b"\n1,2\n"):
            assert csv_keys(io.BytesIO(content), dialect=Dialect(), names=["z"]) == names
        found: list[str] = []
        read(header + b"\n", target=schema(), on_unknown=found.extend)
        assert found == names

    def test_columns_are_placed_by_name(self) -> None:
        assert values(b"x,b,a\n1,2,3\n") == [("3", "2")]

    def test_what_fits_no_column_is_rescued_as_text(self) -> None:
        rows = read(b'x,"a ""y""",_raw_record,a,_file_path\n1.10,"q""\n\x01",,3,p\n,,,4,\n')
        assert [row["a"] for row in rows] == ["3", "4"]
        assert rows[0]["_rescued_data"] == (
            r'{"x":"1.10","a \"y\"":"q\"\n\u0001","__file_path":"p","_file_path":"csv/a.csv"}'
        )
        assert rows[1]["_rescued_data"] is None

    def test_a_column_of_another_type_is_rescued(self) -> None:
        target = pa.schema([("a", pa.int64()), *((name, pa.string()) for name in OWN)])
        (row,) = read(b"a\n1\n", target=target)
        assert (row["a"], rescued(row)) == (None, {"a": "1"})

    def test_without_a_header_columns_come_in_the_given_order(self) -> None:
        assert values(b"1,2\n3,4,5\n", BARE, names=["b", "a"]) == [("2", "1"), ("4", "3")]
        assert rescued(read(b"1,2\n3,4,5\n", BARE, names=["b", "a"])[1]) == {"_c2": "5"}

    def test_without_a_header_and_without_names_columns_are_numbered(self) -> None:
        assert csv_keys(io.BytesIO(b'"x"y\n1,2,3\n'), dialect=BARE, names=["a"]) == ["a", "_c1", "_c2"]
        assert csv_keys(io.BytesIO(b""), dialect=BARE, names=["a"]) == ["a"]
        assert csv_keys(io.BytesIO(b""), dialect=Dialect(), names=["a"]) == []

    @pytest.mark.parametrize("header", [b'"a"b', b'"a\n1,2', b"\xff\xfea\x00", b"," * MAX_FIELDS, b"a\x00\xe9"])
    def test_a_header_that_is_no_record_makes_the_file_unreadable(self, header: bytes) -> None:
        with pytest.raises(UnreadableFileError, match=r"The header of 'csv/a\.csv'"):
            read(header + b"\n1,2\n")
        with pytest.raises(UnreadableFileError, match="The header of the file"):
            csv_keys(io.BytesIO(header + b"\n1,2\n"), dialect=Dialect(), names=[])

    def test_a_header_beyond_the_limit_makes_the_file_unreadable(self) -> None:
        with pytest.raises(UnreadableFileError, match="quote that is not closed"):
            csv_keys(io.BytesIO(b'"' + bytes(MAX_RECORD_BYTES + 1)), dialect=Dialect(), names=[])

    def test_columns_are_told_before_the_first_row(self) -> None:
        told: list[str] = []
        chunks = read_csv(
            io.BytesIO(b"a,x,y\n1,2,3\n"),
            schema("a"),
            dialect=Dialect(),
            names=(),
            rescued_column="_rescued_data",
            raw_column=None,
            file_path=FILE,
            on_unknown=told.extend,
        )
        next(chunks)
        assert told == ["x", "y"]

    def test_a_header_may_have_as_many_names_as_a_record_fields(self) -> None:
        names = [f"x{i}" for i in range(MAX_FIELDS)]
        content = (",".join(names) + "\n" + ",".join("7" * MAX_FIELDS) + "\n1\n").encode()
        rows = read(content, target=schema("x0", names[-1]))
        assert [(row["x0"], row[names[-1]]) for row in rows] == [("7", "7"), ("1", None)]
        assert len(rescued(rows[0]) or {}) == MAX_FIELDS - 2

    def test_a_wide_table_of_short_records_comes_in_small_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(delimited, "CHUNK_VALUES", 70)
        chunks = read_csv(
            io.BytesIO(b"a,b\n" + b"1,2\n" * 100),
            schema("a", "b"),
            dialect=Dialect(),
            names=(),
            rescued_column="_rescued_data",
            raw_column=None,
            file_path=FILE,
        )
        assert [chunk.table.num_rows for chunk in chunks] == [10] * 10


class TestIsComplete:
    @pytest.mark.parametrize(
        ("content", "complete"),
        [
            (b"", False),
            (b"a,b", False),
            (b"a,b\n1,2", False),
            (b"a,b\n1,2\n", True),
            (b'a,b\n1,"2\n', False),
            (b'a,b\n1,"2\n"\n', True),
            (b'a,b\n1,"2""\n', False),
        ],
    )
    def test_a_file_ends_with_a_line_feed_outside_of_quotes(self, content: bytes, complete: bool) -> None:
        assert is_complete_csv(io.BytesIO(content), len(content), dialect=Dialect()) is complete

    def test_quotes_that_hold_no_line_end_are_not_asked_for(self) -> None:
        content = b'a,b\n1,"2\n'
        assert is_complete_csv(io.BytesIO(content), len(content), dialect=Dialect(multi_line=False))
        assert is_complete_csv(io.BytesIO(content), len(content), dialect=Dialect(quote=""))

    def test_of_a_large_file_only_the_end_is_read(self) -> None:
        class Large(io.BytesIO):
            def seek(self, offset: int, whence: int = 0) -> int:
                return super().seek(min(offset, 3), whence)

        for last, complete in ((b"\n", True), (b"x", False)):
            assert is_complete_csv(Large(b'a,"' + last), LOOK_BYTES + 1, dialect=Dialect()) is complete


def by_one(content: bytes, dialect: Dialect) -> Iterator[tuple[bytes, tuple[str | None, ...] | None]]:
    """Every record of a file by the exact parser, with its bytes."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    at = 0
    while at < len(content):
        record = parse_record(content, at, dialect)
        if record.stop > at:
            yield content[at : record.stop], record.fields
        assert record.end > at
        at = record.end


def text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "base64:" + base64.b64encode(data).decode()


DIALECTS = st.sampled_from([BARE, Dialect(header=False, multi_line=False), Dialect(header=False, quote="")])
MESSY = st.lists(
    st.sampled_from(
        [
            b"1",
            b"x",
            b",",
            b",",
            b'"',
            b'"',
            b'""',
            b"\n",
            b"\n",
            b"\r\n",
            b"\r",
            "é".encode(),
            b"\xff",
            b'","',
            b'"\n"',
        ]
    ),
    max_size=60,
).map(b"".join)
TIDY = st.lists(
    st.sampled_from(
        [b"1,2\n", b'"x",2\r\n', b'"x""y","\n"\n', b",\n", b'5" x,2\n', b'"a"b,2\n', b"\n", b"1,2,3,4\n", b"\xff\n"]
    ),
    max_size=40,
).map(b"".join)


@settings(max_examples=examples(100), deadline=None)
@given(st.one_of(MESSY, TIDY), DIALECTS, st.sampled_from([1, 2, 3, 7, 20, 1 << 20]))
def test_columns_and_single_records_give_the_same_rows(content: bytes, dialect: Dialect, chunk_bytes: int) -> None:
    expected = []
    for source, fields in by_one(content, dialect):
        row = (None, None, text(source), text(source), None)
        if fields is not None:
            a, b = (*fields, None, None)[:2]
            extra = {f"_c{i}": f for i, f in enumerate(fields[2:], 2) if f is not None}
            row = (a, b, None, text(source), extra or None)  # type: ignore[assignment]
        expected.append(row)
    found = [
        (row["a"], row["b"], row["_corrupt_record"], row["_raw_record"], rescued(row))
        for row in read(content, dialect, names=["a", "b"], target=schema("a", "b"), chunk_bytes=chunk_bytes)
    ]
    # Fields beyond the names may be columns of the file: they are rescued all the same, the target lacks them.
    assert found == expected


@settings(max_examples=examples(60), deadline=None)
@given(st.one_of(MESSY, TIDY), DIALECTS)
def test_every_byte_is_in_a_record_or_a_line_end(content: bytes, dialect: Dialect) -> None:
    records = [source for source, _ in by_one(content, dialect)]
    left = content.removeprefix(b"\xef\xbb\xbf")
    for record in records:
        before, found, left = left.partition(record)
        assert found
        assert not before.strip(b"\r\n")
    assert not left.strip(b"\r\n")


FIELDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


@settings(max_examples=examples(60), deadline=None)
@given(
    st.lists(st.lists(FIELDS, min_size=2, max_size=2), max_size=20),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([",", ";", "\t"]),
    st.sampled_from([5, 1 << 20]),
)
def test_what_another_writer_quotes_is_read_as_it_was(
    rows: list[list[str]], line_end: str, sep: str, chunk_bytes: int
) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=sep, lineterminator=line_end, quoting=csv.QUOTE_ALL)
    writer.writerows([["a", "b"], *rows])
    content = buffer.getvalue().encode()
    assert values(content, Dialect(sep=sep), chunk_bytes=chunk_bytes) == [tuple(row) for row in rows]
    assert is_complete_csv(io.BytesIO(content), len(content), dialect=Dialect(sep=sep))
    assert [tuple(row) for row in csv.reader(io.StringIO(content.decode(), newline=""), delimiter=sep)][1:] == [
        tuple(row) for row in rows
    ]
