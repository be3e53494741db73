"""Random waves of clean, drifting and dirty files, loaded in pieces by one process after the other.

However it comes, every record of every readable file is in the table exactly once, every value of it stands in its
column exactly or in the rescued data, and all engines make the same table. What is expected is known from how the files
are made; nothing here asks the loader.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telematics_assets.catalog import Column, FileStream
from telematics_assets.engines.base import IngestRequest
from telematics_assets_tests.conformance.platforms import LOCATION, PLATFORMS, Platform
from telematics_assets_tests.conformance.samples import json_stream, parquet_stream

EXAMPLES = max(10, settings().max_examples // 10)


@dataclass(frozen=True)
class Text:
    """A JSON value: as it stands in the file, and what its column shows."""

    source: str
    shown: str | None


@dataclass(frozen=True)
class Kind:
    """A Parquet value: its type, the value, and its text in the rescued data."""

    type: pa.DataType
    value: Any
    rescued: str | None


TEXTS = [
    Text("1", "1"),
    Text("1.10", "1.10"),
    Text("-1e400", "-1e400"),
    Text("null", None),
    Text("true", "true"),
    Text('""', ""),
    Text('"a,b}"', "a,b}"),
    Text(r'"\u00e9\n\"q\""', 'é\n"q"'),
    Text('[1, {"x" : 2.0}]', '[1, {"x" : 2.0}]'),
    Text("{}", "{}"),
]
_MARCH = datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=UTC)
_UNHOLDABLE = object()
KINDS = [
    Kind(pa.int8(), -5, "-5"),
    Kind(pa.int32(), 2**31 - 1, "2147483647"),
    Kind(pa.int64(), 2**60 + 1, "1152921504606846977"),
    Kind(pa.uint64(), 2**64 - 1, "18446744073709551615"),
    Kind(pa.float32(), 1.5, "1.5"),
    Kind(pa.float64(), 0.1, "0.1"),
    Kind(pa.string(), 'tä "q"\n', '"tä \\"q\\"\\n"'),
    Kind(pa.large_string(), "", '""'),
    Kind(pa.bool_(), True, "true"),
    Kind(pa.timestamp("us", "UTC"), _MARCH, '"2026-03-01T12:30:15.123456Z"'),
    Kind(pa.timestamp("ns", "UTC"), _UNHOLDABLE, '"2026-03-01T12:30:15.123456789Z"'),
    Kind(pa.date32(), date(2026, 3, 1), '"2026-03-01"'),
    Kind(pa.decimal128(5, 2), Decimal("1.25"), "1.25"),
    Kind(pa.binary(), b"\x00\xff", '"AP8="'),
    Kind(pa.list_(pa.int64()), [1, None], "[1,null]"),
    Kind(pa.struct([("x", pa.int32())]), {"x": 1}, '{"x":1}'),
    Kind(pa.null(), None, None),
]
#: Keys and column names beside `n`; some differ by case only, some Delta can't hold, some are our own.
NAMES = ["a", "A", "b", "é", "a.b", "x y", "_batch_id", "_Rescued_Data"]
#: Those of them that nothing forbids as columns.
FREE = {"b", "é", "a.b"}


@dataclass(frozen=True)
class File:
    """One file: its records (values by name, None for a corrupt line), and how it is written."""

    records: list[dict[str, Any] | int]
    dirt: int | None
    compressed: bool
    line_end: str
    separators: tuple[str, str]
    times: int


@dataclass(frozen=True)
class Wave:
    """Files that land, and what happens then."""

    files: list[File]
    max_files: int | None
    restart: bool
    repair: bool
    overwrite: bool


@dataclass
class Books:
    """What has to be in the table: by path and record."""

    records: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    corrupt: dict[str, str] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)


_CORRUPT = [
    '{{"n":"{0}"',
    '[{{"n":"{0}"}}]',
    "{0}",
    '{{"n":"{0}"}} {{"n":"{0}"}}',
    '{{"n":"{0}","n":"{0}"}}',
    '{{"n":"{0}","a":"\\ud800"}}',
]


def json_data(file: File, ids: Iterator[int], path: str, books: Books) -> bytes:
    """Write a JSON file and enter its records into the books."""
    comma, colon = file.separators
    text = []
    for _ in range(file.times):
        for record in file.records:
            number = f"{next(ids):06}"
            if isinstance(record, int):
                line = _CORRUPT[record % len(_CORRUPT)].format(number)
                books.corrupt[line] = path
            else:
                members = {"n": Text(f'"{number}"', number), **record}
                line = (
                    "{"
                    + comma.join(f"{json.dumps(k, ensure_ascii=False)}{colon}{v.source}" for k, v in members.items())
                    + "}"
                )
                books.records[number] = (path, members)
            text.append(line + file.line_end)
    data = "".join(text).encode()
    return gzip.compress(data, mtime=0) if file.compressed else data


def parquet_data(file: File, ids: Iterator[int], path: str, books: Books) -> bytes:
    """Write a Parquet file and enter its records into the books. Types are those of each column's first value."""
    records = [record for record in file.records if not isinstance(record, int)] * file.times
    kinds: dict[str, Kind] = {}
    for record in records:
        kinds = {**record, **kinds}
    numbers = [f"{next(ids):06}" for _ in records]
    for number, record in zip(numbers, records, strict=True):
        present = {name: kind for name, kind in kinds.items() if name in record and kind.rescued is not None}
        books.records[number] = (path, {"n": Kind(pa.string(), number, None), **present})
    columns = {"n": pa.array(numbers, pa.string())}
    for name, kind in kinds.items():
        value = _MARCH_NS if kind.value is _UNHOLDABLE else kind.value
        columns[name] = pa.array([value if name in record else None for record in records], kind.type)
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=7, compression="zstd" if file.compressed else "none")
    return buffer.getvalue()


_MARCH_NS = 1_772_368_215_123_456_789
_DIRT = {
    "parquet": [b"", b"oops", b"PAR1" + b"\x00" * 40],
    "json": [b"", gzip.compress(b'{"n":"1"}\n')[:-3], gzip.compress(b'{"n":"1"}\n')[:-9] + b"\x00" * 9],
}
_WRITE = {"json": json_data, "parquet": parquet_data}


def run(platform: Platform, stream: FileStream, waves: list[Wave]) -> tuple[Books, list[Any]]:
    """Let it all happen; return what has to be there, and what the reports said."""
    ids, times = itertools.count(1), itertools.count(1_000_000_000)
    books, said = Books(), list[Any]()
    for number, wave in enumerate(waves):
        for index, file in enumerate(wave.files):
            path = f"{stream.folder}/{'day %41' if index else ''}{number}-{index}"
            if file.dirt is None:
                data = _WRITE[stream.format](file, ids, f"{LOCATION}/{path}", books)
                books.states[path] = "INGESTED" if data else "SKIPPED_CORRUPTED"
            else:
                data = _DIRT[stream.format][file.dirt]
                books.states[path] = "SKIPPED_CORRUPTED"
            platform.volume_put(path, data, next(times))
        said += load(platform, stream, wave)
        if wave.repair or wave.overwrite:
            said += load(platform, stream, Wave([], None, False, False, False))
            state = "SKIPPED_CORRUPTED" if wave.repair else "INGESTED"
            path = next((path for path, known in books.states.items() if known == state), "")
            if path and wave.repair:
                whole = File([{}, {}], None, False, "\n", (",", ":"), 1)
                platform.volume_put(path, _WRITE[stream.format](whole, ids, f"{LOCATION}/{path}", books), next(times))
                books.states[path] = "INGESTED"
            elif path:
                platform.volume_put(path, b"something else", next(times))
                books.states[path] = "CHANGED"
    said += load(platform, stream, Wave([], None, True, False, False))
    return books, said


def load(platform: Platform, stream: FileStream, wave: Wave) -> list[Any]:
    """Load as the wave says."""
    engine = platform.restart() if wave.restart else platform.engine
    report = engine.ingest(stream, IngestRequest(wave.max_files))
    return [
        (b.batch_id, b.files_ingested, b.rows, b.rows_rescued, b.rows_corrupt, len(b.skipped)) for b in report.batches
    ]


def reconcile(platform: Platform, stream: FileStream, books: Books) -> list[dict[str, Any]]:
    """Compare the table with the books, row by row; return its rows without the time of loading."""
    states = {file.path: file.state for file in platform.engine.files(stream)}
    assert states == books.states
    if platform.engine.state(platform.engine.names.bronze(stream.table)) is None:
        assert not books.states
        return []
    rows = platform.rows(stream)
    columns = platform.columns(stream)
    good = {row["n"]: row for row in rows if row.get("_corrupt_record") is None}
    corrupt = {row["_corrupt_record"]: row for row in rows if row.get("_corrupt_record") is not None}
    assert len(good) + len(corrupt) == len(rows) == len(books.records) + len(books.corrupt)
    assert {text: row["_source_file"] for text, row in corrupt.items()} == books.corrupt
    assert good.keys() == books.records.keys()
    for number, (path, values) in books.records.items():
        row = good[number]
        assert row["_source_file"] == path
        check_values(row, values, columns, path)
    if stream.options.schema_evolution_mode == "addNewColumns" and stream.format == "json":
        names = {name for _, values in books.records.values() for name in values}
        assert columns.keys() >= FREE & names
    for row in rows:
        del row["_ingested_at"]
    return sorted(rows, key=lambda row: (row["n"] or "", row.get("_corrupt_record") or ""))


def check_values(row: dict[str, Any], values: dict[str, Any], columns: dict[str, str], path: str) -> None:
    """Every value stands in its column exactly or in the rescued data, and nothing else is there."""
    rescued_text = row["_rescued_data"]
    rescued = {} if rescued_text is None else json.loads(rescued_text)
    expected_rescued = set()
    for name, value in values.items():
        held = value.shown if isinstance(value, Text) else value.value
        if name in columns and same(row[name], held):
            continue
        assert name not in columns or row[name] is None
        expected_rescued.add(name)
        source = value.source if isinstance(value, Text) else value.rescued
        assert f"{json.dumps(name, ensure_ascii=False)}:{source}" in rescued_text
    assert rescued.keys() == (expected_rescued | {"_file_path"} if expected_rescued else set())
    assert rescued.get("_file_path", path) == path
    assert all(row[name] is None for name in columns.keys() - values.keys())


def same(found: Any, held: Any) -> bool:
    """Whether a column shows exactly this value."""
    return isinstance(found, bool) == isinstance(held, bool) and bool(found == held)


def waves_of(values: st.SearchStrategy[Any], formats: str) -> st.SearchStrategy[list[Wave]]:
    """Random waves of files with such values."""
    good = st.dictionaries(st.sampled_from(NAMES), values, max_size=4)
    records = st.lists(st.one_of(good, good, st.integers(0, 5)) if formats == "json" else good, min_size=1, max_size=3)
    files = st.builds(
        File,
        records,
        st.one_of(st.none(), st.none(), st.none(), st.integers(0, 2)),
        st.booleans(),
        st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"]),
        st.sampled_from([(",", ":"), (", ", ": ")]),
        st.sampled_from([1, 1, 40]),
    )
    wave = st.builds(
        Wave,
        st.lists(files, max_size=3),
        st.sampled_from([None, None, 1, 2]),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    )
    return st.lists(wave, min_size=1, max_size=4)


MODES = st.sampled_from(["addNewColumns", "addNewColumns", "rescue"])
TRIGGERS = st.sampled_from([1, 2, 1000])


def play(names: Iterable[str], stream: FileStream, waves: list[Wave]) -> None:
    """Run the same on some platforms, reconcile each, and compare them with one another."""
    outcomes = {}
    for name in names:
        with tempfile.TemporaryDirectory() as home:
            platform = PLATFORMS[name](Path(home))
            books, said = run(platform, stream, waves)
            outcomes[name] = (reconcile(platform, stream, books), said)
    first, *others = outcomes.values()
    assert all(other == first for other in others)


JSON_STREAMS = st.builds(
    lambda mode, trigger, raw: json_stream(
        "n", schema_evolution_mode=mode, max_files_per_trigger=trigger, raw_record_column=raw
    ),
    MODES,
    TRIGGERS,
    st.sampled_from([None, "_raw_record"]),
)
PARQUET_STREAMS = st.builds(
    lambda mode, trigger: parquet_stream(
        Column("n", "STRING", "Number of the record."), schema_evolution_mode=mode, max_files_per_trigger=trigger
    ),
    MODES,
    TRIGGERS,
)
#: Spark takes seconds for what others do in milliseconds: it is compared with one of them, and less often.
WITH_SPARK = ("embedded", "spark")
WITHOUT_SPARK = tuple(name for name in PLATFORMS if name != "spark")
SPARK_EXAMPLES = max(2, EXAMPLES // 20)


@settings(max_examples=EXAMPLES)
@given(JSON_STREAMS, waves_of(st.sampled_from(TEXTS), "json"))
def test_json_waves(stream: FileStream, waves: list[Wave]) -> None:
    play(WITHOUT_SPARK, stream, waves)


@pytest.mark.spark
@settings(max_examples=SPARK_EXAMPLES)
@given(JSON_STREAMS, waves_of(st.sampled_from(TEXTS), "json"))
def test_json_waves_on_spark(stream: FileStream, waves: list[Wave]) -> None:
    play(WITH_SPARK, stream, waves)


@settings(max_examples=EXAMPLES)
@given(PARQUET_STREAMS, waves_of(st.sampled_from(KINDS), "parquet"))
def test_parquet_waves(stream: FileStream, waves: list[Wave]) -> None:
    play(WITHOUT_SPARK, stream, waves)


@pytest.mark.spark
@settings(max_examples=SPARK_EXAMPLES)
@given(PARQUET_STREAMS, waves_of(st.sampled_from(KINDS), "parquet"))
def test_parquet_waves_on_spark(stream: FileStream, waves: list[Wave]) -> None:
    play(WITH_SPARK, stream, waves)


@pytest.mark.parametrize("changed", [{"b": Text("2", "2")}, {"b": Text("1", "1.0")}, {}])
def test_the_reconciliation_itself_sees_a_wrong_value(changed: dict[str, Any]) -> None:
    row = {"n": "1", "b": "1", "_rescued_data": None}
    check_values(row, {"n": Text('"1"', "1"), "b": Text("1", "1")}, {"n": "STRING", "b": "STRING"}, "p")
    with pytest.raises((AssertionError, TypeError)):
        check_values(row, {"n": Text('"1"', "1"), **changed}, {"n": "STRING", "b": "STRING"}, "p")
