"""JSON documents become rows exactly: where an element starts and ends, and that no byte of a broken one is lost."""

from __future__ import annotations

import io
import itertools
import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telematics_assets.autoloader.chunks import MAX_RECORD_BYTES
from telematics_assets.autoloader.json_documents import elements
from telematics_assets.autoloader.json_exact import MAX_DEPTH
from telematics_assets.autoloader.json_lines import TAIL_BYTES, is_complete_json, json_keys, read_json
from telematics_assets.errors import UnreadableFileError
from telematics_assets_tests.turns import examples

TARGET = pa.schema([(name, pa.string()) for name in ("a", "_corrupt_record", "_raw_record", "_rescued_data")])
SPACE = b" \t\r\n"


def read(content: bytes, **options: Any) -> list[dict[str, Any]]:
    chunks = read_json(
        io.BytesIO(content),
        TARGET,
        rescued_column="_rescued_data",
        raw_column="_raw_record",
        file_path="f",
        multi_line=True,
        **options,
    )
    table = pa.concat_tables([TARGET.empty_table(), *(chunk.table for chunk in chunks)])
    table.validate(full=True)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def split(content: bytes, chunk_bytes: int = 1 << 20) -> list[bytes]:
    """The elements of a document."""
    found = []
    for part in elements(io.BytesIO(content), chunk_bytes):
        offsets = part.offsets.tolist()
        assert offsets[-1] == len(part.data)
        for start, end in itertools.pairwise(offsets):
            assert part.data[end - 1 : end] == b"\n"
            found.append(part.data[start : end - 1])
    return found


def is_complete(content: bytes) -> bool:
    return is_complete_json(io.BytesIO(content), len(content), multi_line=True)


@pytest.mark.parametrize(
    ("document", "found"),
    [
        (b"", []),
        (b" \n\t ", []),
        (b"[]", []),
        (b" [ ] ", []),
        (b'{"a":1}', ['{"a":1}']),
        (b'\xef\xbb\xbf\n{\n  "a": 1.10\n}\n', ['{\n  "a": 1.10\n}']),
        (b'[{"a":1},{"a":2}]', ['{"a":1}', '{"a":2}']),
        (b'[\n  {"a": 1},\r\n  {"a": [{}, "]"]}\n]\n', ['{"a": 1}', '{"a": [{}, "]"]}']),
        (b'[{"a":"x\\"},{"},{"a":"\\\\"}]', ['{"a":"x\\"},{"}', '{"a":"\\\\"}']),
        (b'{"a":1}{"a":2}\n{"a":3} [{"a":4}] [] {"a":5}', [f'{{"a":{i}}}' for i in range(1, 6)]),
    ],
)
def test_an_object_and_every_element_of_an_array_is_a_row(document: bytes, found: list[str]) -> None:
    rows = read(document)
    assert [row["_raw_record"] for row in rows] == found
    assert [row["_corrupt_record"] for row in rows] == [None] * len(found)


@pytest.mark.parametrize(
    ("document", "found", "corrupt"),
    [
        (b"1", ["1"], [0]),
        (b' "x" ', ['"x"'], [0]),
        (b"a,b\n1,2\n", ["a,b\n1,2"], [0]),
        (b'[1, "x,y", null, [{"a":1}], {"a":1}]', ["1", '"x,y"', "null", '[{"a":1}]', '{"a":1}'], [0, 1, 2, 3]),
        (b'[{"a":1},{"a":},{"a":3}]', ['{"a":1}', '{"a":}', '{"a":3}'], [1]),
        (b'[{"a":1} {"a":2},{"a":3}]', ['{"a":1} {"a":2}', '{"a":3}'], [0]),
        (b'[{"a":1,"a":2},{"a":3}]', ['{"a":1,"a":2}', '{"a":3}'], [0]),
        (b'[{"a":1},,{"a":2},]', ['{"a":1}', '{"a":2}'], []),
        (b'[{"a":1}', ['{"a":1}'], []),
        (b'[{"a":1},', ['{"a":1}'], []),
        (b'[{"a":1},{"a":"2', ['{"a":1}', '{"a":"2'], [1]),
        (b'[{"a":1},{"a":2}}, {"a":3}]', ['{"a":1}', '{"a":2}', '}, {"a":3}]'], [2]),
        (b'[{"a":1}]]', ['{"a":1}', "]"], [1]),
        (b'[{"a":1}], {"a":2}', ['{"a":1}', ', {"a":2}'], [1]),
        (b'{"a":1} x\n{"a":2}', ['{"a":1}', 'x\n{"a":2}'], [1]),
        (b'{"a":1', ['{"a":1'], [0]),
        (b'{"a":"\xff"} {"a":2}', ["base64:eyJhIjoi/yJ9", '{"a":2}'], [0]),
        (b"[\xff, \xfe]", ["base64:/w==", "base64:/g=="], [0, 1]),
    ],
)
def test_what_is_no_object_is_a_corrupt_record_verbatim(document: bytes, found: list[str], corrupt: list[int]) -> None:
    rows = read(document)
    assert [row["_raw_record"] for row in rows] == found
    assert [i for i, row in enumerate(rows) if row["_corrupt_record"] is not None] == corrupt
    assert all(rows[i]["_corrupt_record"] == found[i] for i in corrupt)


def test_values_are_exact_also_where_many_elements_have_one_shape() -> None:
    texts = ["1.10", "1e400", '"x\\ny"', "12345678901234567890123", '{ "b" : [1.0] }', "null"]
    shown = ["1.10", "1e400", "x\ny", "12345678901234567890123", '{ "b" : [1.0] }', None]
    records = [f'{{\n    "a": {text},\n    "z": "],}}{{"\n  }}' for text in texts * 200]
    rows = read(("[\n  " + ",\n  ".join(records) + "\n]\n").encode(), chunk_bytes=5000)
    assert [row["_raw_record"] for row in rows] == records
    assert [row["a"] for row in rows] == shown * 200
    assert {row["_rescued_data"] for row in rows} == {'{"z":"],}{","_file_path":"f"}'}


def test_an_element_that_nests_too_deep_is_corrupt_and_the_next_one_is_read() -> None:
    deep = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
    deepest = '{"a":' + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + "}"
    rows = read(f"[{deep},{deepest}]".encode())
    assert [row["_corrupt_record"] for row in rows] == [deep, None]


def test_an_element_beyond_the_limit_makes_the_file_unreadable() -> None:
    longest = b'{"a":"' + b"x" * (MAX_RECORD_BYTES - 8) + b'"}'
    assert [len(row["_raw_record"]) for row in read(b'[{"a":1},' + longest + b"]")] == [7, MAX_RECORD_BYTES]
    longer = longest[:-2] + b'x"}'
    for document in (
        b'[{"a":1},%b]' % longer,
        b'{"a":1}%b' % longer,
        b'{"a":1} x%b' % longer,
        b'[{"a":1},"%b' % longer,
    ):
        for chunk_bytes in (1 << 20, 8 << 20, 64 << 20):
            with pytest.raises(UnreadableFileError, match=f"Element 2 of 'f' is longer than {MAX_RECORD_BYTES} bytes"):
                read(document, chunk_bytes=chunk_bytes)


def test_white_space_of_any_length_is_no_data() -> None:
    assert split(b"[" + b" " * 3000 + b"{}" + b"\n" * 3000 + b", {}" + b"\t" * 200 + b"]", 512) == [b"{}", b"{}"]
    assert split(b" " * (MAX_RECORD_BYTES + 10) + b"{}") == [b"{}"]


@pytest.mark.parametrize("document", ["[]", "{}", '{"a":"}"}\n', '[{"a":1}]', "[1]  ", '{"a":1}\n{"a":2}', "[1,]"])
def test_a_closed_document_is_complete(document: str) -> None:
    assert is_complete(document.encode())


@pytest.mark.parametrize("document", ["", " ", "[", "{", '[{"a":1}', '{"a":{}', '{"a":"}', "[1]]", "1", '{"a":1} x'])
def test_what_is_not_closed_is_not_complete(document: str) -> None:
    assert not is_complete(document.encode())


def test_of_a_large_document_the_last_bracket_is_asked_for() -> None:
    body = b'{"a":1},' * (TAIL_BYTES // 8)
    assert is_complete(b"[" + body + b'{"a":1}]\n')
    assert not is_complete(b"[" + body)


def test_keys_are_those_of_the_whole_elements_within_the_limit() -> None:
    document = b'[{"b":1,"a":{"x":1}}, 7, {"c":1,"a":2}, {"d":1}]'
    keys = [json_keys(io.BytesIO(document), limit, multi_line=True) for limit in (10, 40, 45, 1000)]
    assert keys == [[], ["b", "a", "c"], ["b", "a", "c"], ["b", "a", "c", "d"]]


def by_byte(content: bytes) -> list[bytes]:
    """The same rules, byte by byte."""
    content = content.removeprefix(b"\xef\xbb\xbf").rstrip(SPACE)
    found: list[bytes] = []
    at, in_array = 0, False
    while True:
        while at < len(content) and content[at] in SPACE:
            at += 1
        if at == len(content):
            return found
        if not in_array:
            if content[at : at + 1] == b"[":
                in_array = True
                at += 1
                continue
            if content[at : at + 1] != b"{":
                return [*found, content[at:]]
        start, depth, in_string = at, 0, False
        while True:
            if at == len(content):
                return [*found, content[start:]]
            char = content[at : at + 1]
            if char == b'"':
                slashes = len(content[start:at]) - len(content[start:at].rstrip(b"\\"))
                in_string ^= slashes % 2 == 0
            elif not in_string and char in b"[{":
                depth += 1
            elif not in_string and char in b"]}":
                depth -= 1
            if in_array and not in_string and (depth < 0 or (depth == 0 and char == b",")):
                break
            at += 1
            if not in_array and not in_string and depth == 0:
                break
        if element := content[start:at].strip(SPACE):
            found.append(element)
        if not in_array:
            continue
        if depth < 0:
            in_array = False
            if char == b"}":
                return [*found, content[at:]]
        at += 1


PIECES = st.sampled_from(
    [
        b"[",
        b"[",
        b"]",
        b"{",
        b"}",
        b"{}",
        b'{"a":1}',
        b",",
        b",",
        b'"',
        b"\\",
        b'\\"',
        b" ",
        b"\n",
        b"x",
        b"\xff",
        b'"],{"',
    ]
)


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(PIECES, max_size=40).map(b"".join), st.booleans(), st.sampled_from([1, 2, 5, 1 << 20]))
def test_columns_and_single_bytes_give_the_same_elements(document: bytes, in_array: bool, chunk_bytes: int) -> None:
    document = b"[" * in_array + document
    assert split(document, chunk_bytes) == by_byte(document)


@settings(max_examples=examples(60), deadline=None)
@given(st.lists(PIECES, max_size=40).map(b"".join))
def test_every_byte_is_in_an_element_or_around_one(document: bytes) -> None:
    left = document
    for element in split(document):
        before, found, left = left.partition(element)
        assert found
        assert not before.strip(b" \t\r\n,[]")
    assert not left.strip(b" \t\r\n,[]")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=examples(40), deadline=None)
@given(st.lists(st.fixed_dictionaries({"a": JSON}), max_size=8), st.sampled_from([None, 2]), st.booleans())
def test_what_another_writer_writes_is_read_as_it_was(
    rows: list[dict[str, Any]], indent: int | None, ascii: bool
) -> None:
    document = json.dumps(rows, indent=indent, ensure_ascii=ascii).encode()
    found = read(document, chunk_bytes=16)
    assert [json.loads(row["_raw_record"]) for row in found] == rows
    assert all(row["_corrupt_record"] is None for row in found)
    assert is_complete(document)
    assert not is_complete(document[:-1])
