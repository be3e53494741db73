"""What types values have in common."""

from __future__ import annotations

import io

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from telematics_assets.autoloader.formats import sample_file
from telematics_assets.autoloader.inference import MAX_DEPTH, MAX_FIELDS, Head, Sample, Seen, seen_json, seen_text
from telematics_assets.autoloader.typed import typed
from telematics_assets.catalog import FileStream, TableContract
from telematics_assets.lakehouse.types import delta_type
from telematics_assets_tests.autoloader.test_typed import VALUES

JSON = FileStream("s", "json", "s", "s", TableContract("S."), {"infer_column_types": True})  # type: ignore[arg-type]
CSV = FileStream("s", "csv", "s", "s", TableContract("S."), {"infer_column_types": True})  # type: ignore[arg-type]


def texts(*values: str | None) -> pa.StringArray:
    return pa.array(values, pa.string())


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([], "STRING"),
        ([None], "STRING"),
        (["1", None, "-9223372036854775808"], "BIGINT"),
        (["1", "9223372036854775808"], "STRING"),
        (["1", "18446744073709551616"], "STRING"),
        (["1", "2.5", "1e3"], "DOUBLE"),
        (["9007199254740993", "2.5"], "STRING"),
        (["1e400"], "STRING"),
        (["-0"], "DOUBLE"),
        (["true", "false"], "BOOLEAN"),
        (["true", "1"], "STRING"),
        (['"1"', '"2026-01-31"'], "STRING"),
        (["{}"], "STRING"),
        (["[]", "[null]"], "ARRAY<STRING>"),
        (["[1]", "[2.5,null]", "[]"], "ARRAY<DOUBLE>"),
        (["[1]", '{"a":1}'], "STRING"),
        (['{"a":1}', "{}", '{"b":[{"c":true}],"a":null}'], "STRUCT<a: BIGINT, b: ARRAY<STRUCT<c: BOOLEAN>>>"),
        (['{"a":1,"A":2}'], "STRING"),
        (['{"a":1,"a":2}'], "STRING"),
        (['{"two words":1}'], "STRING"),
        (['{"a":1,"b":{"two words":1}}'], "STRUCT<a: BIGINT, b: STRING>"),
        ([r'{"\ud800":1}'], "STRING"),
        ([r'{"a":"\ud800"}'], "STRING"),
        ([r'["x","\ud800"]'], "STRING"),
    ],
)
def test_json_values_have_the_first_type_that_holds_them_all(values: list[str | None], kind: str) -> None:
    assert delta_type(seen_json(texts(*values)).type()) == kind
    parts = [seen_json(texts(value)) for value in values]
    merged = Seen()
    for part in parts:
        merged.merge(part)
    assert delta_type(merged.type()) == kind


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", None], "BIGINT"),
        (["1", "2.5"], "DOUBLE"),
        (["true", "false"], "BOOLEAN"),
        (["2026-01-31"], "DATE"),
        (["2026-01-31T12:00", "2026-01-31 12:00:00+01:00"], "TIMESTAMP"),
        (["2026-01-31T12:00", "2026-01-31"], "STRING"),
        (["01"], "STRING"),
        (["1", ""], "STRING"),
    ],
)
def test_csv_texts_have_the_first_type_that_holds_them_all(values: list[str | None], kind: str) -> None:
    assert delta_type(seen_text(texts(*values)).type()) == kind


@given(st.lists(VALUES, max_size=6), st.integers(0, 6))
def test_sampled_values_fit_the_type_that_they_give(values: list[str], cut: int) -> None:
    column = texts(*(None if value == "null" else value for value in values))
    seen = seen_json(column[:cut])
    seen.merge(seen_json(column[cut:]))
    kind = seen.type()
    assert kind == seen_json(column).type()
    if kind != pa.string():
        assert typed(column, kind, is_json=True).null_count == column.null_count


def test_objects_with_many_keys_and_deep_values_stay_text() -> None:
    wide = [f"{{{','.join(f'{chr(34)}k{key}{chr(34)}:1' for key in range(first, first + 150))}}}" for first in (0, 150)]
    assert delta_type(seen_json(texts(wide[0])).type()).count("BIGINT") == 150
    assert seen_json(texts(*wide)).type() == pa.string()
    apart = seen_json(texts(wide[0]))
    apart.merge(seen_json(texts(wide[1])))
    assert len(apart.fields) <= MAX_FIELDS
    assert apart.type() == pa.string()
    deep = delta_type(seen_json(texts("[" * 50 + "1" + "]" * 50)).type())
    assert deep == "ARRAY<" * MAX_DEPTH + "STRING" + ">" * MAX_DEPTH


@pytest.mark.parametrize("size", [0, 1, 7, 63, 64, 65, 100])
def test_a_head_is_the_first_bytes_and_can_go_back_to_its_start(size: int) -> None:
    data = bytes(range(100))
    head = Head(io.BytesIO(data), size)
    assert head.read(10) == data[:10][:size]
    head.seek(0)
    read = b""
    while piece := head.read(13):
        read += piece
    assert (read, head.taken, head.is_cut) == (data[:size], size, True)


def test_a_sample_counts_files_and_bytes() -> None:
    sample = Sample(2, 30)
    full = []
    for content in (b'{"a":1,"b":true}\n', b'{"a":2}\n{"a":"never seen"}\n'):
        sample_file(sample, io.BytesIO(content), JSON)
        full.append(sample.is_full)
    assert full == [False, True]
    assert sample.columns() == [("a", pa.int64()), ("b", pa.bool_())]


def test_the_last_record_of_a_cut_csv_file_decides_nothing() -> None:
    for limit in range(len("n,s\n1,x\n"), len("n,s\n1,x\n2.5,y\n")):
        sample = Sample(1, limit)
        sample_file(sample, io.BytesIO(b"n,s\n1,x\n2.5,y\n"), CSV)
        assert sample.columns() in ([], [("n", pa.int64()), ("s", pa.string())])
