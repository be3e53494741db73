"""Random lives of one stream: all that may be asked of it, in any order, with kills in between.

Files land in folders that name a column, change, vanish and are repaired; hints come and go; loads, full refreshes,
retries, backfills and rebuilds are killed at any step and go on in another process. A model that knows nothing of
ledgers, plans and types says at every moment which records the table holds; each value of them stands in its column,
saying the same, or in the rescued data.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from telematics_assets.catalog import Column, FileStream
from telematics_assets.engines.base import Backfill, Engine, IngestRequest
from telematics_assets.errors import RowsAtRiskError
from telematics_assets_tests.conformance.platforms import CHECKPOINT_PLATFORMS, LOCATION, CheckpointPlatform
from telematics_assets_tests.conformance.samples import json_stream, parquet, parquet_stream
from telematics_assets_tests.conformance.test_random_waves import KINDS, Kind, Text

EXAMPLES = max(10, settings().max_examples // 10)

HINTS = [
    None,
    "b BIGINT",
    "b DOUBLE, `é` STRING",
    "b DECIMAL(20,2), p INT",
    "`é` STRUCT<x: BIGINT>, b BOOLEAN",
    "`é`.x DOUBLE, b ARRAY<STRING>",
]
TEXTS = [
    Text("1", "1"),
    Text("300", "300"),
    Text("1.10", "1.10"),
    Text("12345678901234567890", "12345678901234567890"),
    Text("1e400", "1e400"),
    Text("null", None),
    Text("true", "true"),
    Text('"a,b}"', "a,b}"),
    Text('"2026-03-01"', "2026-03-01"),
    Text('{"x": 1}', '{"x": 1}'),
    Text('{"x":2.5,"y":[1]}', '{"x":2.5,"y":[1]}'),
    Text("[1, 2]", "[1, 2]"),
    Text('["a",1.0]', '["a",1.0]'),
]
TYPED = [
    *(kind for kind in KINDS if kind.type != pa.timestamp("ns", "UTC")),
    Kind(pa.int16(), 300, "300"),
    Kind(pa.float64(), 2.0**60, "1.152921504606847e+18"),
    Kind(pa.decimal128(30, 5), Decimal("1234567890123456789.12345"), "1234567890123456789.12345"),
    Kind(pa.timestamp("us"), datetime(2026, 3, 1, 4, 5, 6), '"2026-03-01T04:05:06.000000"'),
    Kind(pa.list_(pa.float32()), [1.5], "[1.5]"),
    Kind(pa.struct([("x", pa.int64()), ("y", pa.string())]), {"x": 5, "y": "z"}, '{"x":5,"y":"z"}'),
    Kind(pa.struct([("x", pa.float64())]), {"x": 0.5}, '{"x":0.5}'),
]
OWN_P: dict[str, list[Any]] = {
    "json": [Text('"1"', "1"), Text('"2"', "2")],
    "parquet": [Kind(pa.int8(), 1, "1"), Kind(pa.string(), "2", '"2"'), Kind(pa.string(), "x", '"x"')],
}
NAMES = ["b", "é", "B", "a.b", "p"]
FOLDERS = ["1", "2", "x"]


class KilledError(BaseException):
    """The process ends here."""


@dataclass(frozen=True)
class Op:
    """One thing that happens. What the numbers mean depends on what it is."""

    what: str
    number: int = 0
    kill: int | None = None
    files: tuple[tuple[str, tuple[tuple[str, Any], ...] | None], ...] = ()


@dataclass(frozen=True)
class Version:
    """What a file holds: its records by number, or None if it is no such file at all."""

    data: bytes
    records: dict[str, dict[str, Any]] | None


@dataclass
class Model:
    """What has to be in the table, and what has to be said of the files."""

    overwrites: bool
    leaves_out: bool
    there: dict[str, Version] = field(default_factory=dict)
    known: dict[str, tuple[str, Version]] = field(default_factory=dict)
    left_out: dict[str, Version] = field(default_factory=dict)
    rows: dict[str, list[Version]] = field(default_factory=dict)
    begun: bool = False

    def begin(self) -> None:
        """What any first request does."""
        if not self.begun and self.leaves_out:
            self.left_out = dict(self.there)
            self.known = {path: ("SKIPPED_EXISTING", version) for path, version in self.there.items()}
        # A stream begins with its first file, unless it has to remember what was there before.
        self.begun = self.begun or self.leaves_out or bool(self.there)

    def load(self) -> None:
        """All that is new is taken."""
        self.begin()
        for path, version in self.there.items():
            state, before = self.known.get(path, (None, None))
            changed = before is not version
            if state is None or (changed and (state == "SKIPPED_CORRUPTED" or self.overwrites)):
                self.take(path, version)

    def take(self, path: str, version: Version) -> None:
        """One file is read."""
        good = version.records is not None
        self.known[path] = ("INGESTED" if good else "SKIPPED_CORRUPTED", version)
        if good:
            self.rows.setdefault(path, []).append(version)

    def backfill(self) -> None:
        """What was left out is taken too."""
        self.begin()
        for path, (state, _) in list(self.known.items()):
            if state == "SKIPPED_EXISTING":
                del self.known[path]
        self.load()
        for path, version in self.left_out.items():
            self.known.setdefault(path, ("SKIPPED_EXISTING", version))

    def loses(self) -> bool:
        """Whether a refresh would lose rows."""
        return any(path not in self.there or self.there[path].records is None for path in self.rows)

    def refresh(self) -> None:
        """The table is what is there, but for what is left out."""
        out = {path: known for path, known in self.known.items() if known[0] == "SKIPPED_EXISTING"}
        remembered = {path: ("SKIPPED_EXISTING", version) for path, version in self.left_out.items()}
        self.rows.clear()
        self.known = out
        self.load()
        for path, known in remembered.items():
            self.known.setdefault(path, known)

    def rebuild(self) -> None:
        """The rows and what was left out are all that is remembered."""
        remembered = {path: ("SKIPPED_EXISTING", version) for path, version in self.left_out.items()}
        self.known = {**remembered, **{path: ("INGESTED", versions[-1]) for path, versions in self.rows.items()}}

    def states(self) -> dict[str, str]:
        """What is said of the files once all is loaded."""
        return {
            path: "CHANGED"
            if state != "SKIPPED_CORRUPTED" and path in self.there and self.there[path] is not version
            else state
            for path, (state, version) in self.known.items()
        }


class Life:
    """A stream's life on one platform."""

    def __init__(self, platform: CheckpointPlatform, stream: FileStream) -> None:
        self.platform, self.stream = platform, stream
        options = stream.options
        self.model = Model(options.allow_overwrites, not options.include_existing_files)
        self.ids, self.times = itertools.count(1), itertools.count(1_000_000_000)
        self.drained = True

    def play(self, ops: list[Op]) -> None:
        """Let it all happen, and compare after every step that leaves nothing open."""
        for op in ops:
            getattr(self, op.what)(op)
        self.drain()

    def engine(self, kill: int | None, steps: list[str]) -> Engine:
        """A fresh process, which dies at a step."""

        def on_step(step: str) -> None:
            steps.append(step)
            if kill is not None and len(steps) > kill:
                raise KilledError(step)

        return self.platform.engine_over(on_step=on_step)

    def ask(self, request: IngestRequest, kill: int | None) -> tuple[bool, list[str]]:
        """Ask a fresh process; say whether it died, and where it came by."""
        steps: list[str] = []
        self.drained = False
        try:
            self.engine(kill, steps).ingest(self.stream, request)
        except KilledError:
            self.platform.restart().look(self.stream)
            return True, steps
        return False, steps

    def drain(self, *_: Op) -> None:
        """Load all that is there, and compare."""
        self.platform.restart()
        self.platform.engine.ingest(self.stream)
        self.model.load()
        self.drained = True
        self.compare()

    def land(self, op: Op) -> None:
        """Files land."""
        for folder, record in op.files:
            path = f"{self.stream.folder}/p={folder}/{next(self.ids):04}"
            self.put(path, record)

    def put(self, path: str, record: tuple[tuple[str, Any], ...] | None) -> None:
        """One file lands."""
        if record is None:
            version = Version(f"oops {path} {next(self.ids)}".encode(), None)
            version = version if self.stream.format == "parquet" else Version(b"\x1f\x8b" + version.data, None)
        else:
            version = written(self.stream, dict(record), self.ids)
        self.model.there[path] = version
        self.platform.volume_put(path, version.data, next(self.times) * 1000)

    def load(self, op: Op) -> None:
        """A load, perhaps of some files only."""
        died, _ = self.ask(IngestRequest(op.number or None), op.kill)
        if (died and self.model.leaves_out and not self.model.begun) or not died:
            self.model.begin()
        if self.model.leaves_out or (not died and not op.number):
            self.drain()

    def refresh(self, op: Op) -> None:
        """A full refresh, with an odd number by force; if it dies, something else may come before a load."""
        force = bool(op.number % 2)
        if not self.drained and self.model.leaves_out:
            self.drain()
        before = self.model.begun or not self.model.leaves_out
        risky = not force and self.model.loses()
        try:
            died, steps = self.ask(IngestRequest(full_refresh=True, force=force), op.kill)
        except RowsAtRiskError:
            assert risky
            self.drain()
            return
        assert died or not risky
        if before and "table_committed" in steps:
            self.model.refresh()
        if died and op.number % 4 > 1 and not self.model.leaves_out and before:
            return
        self.drain()

    def backfill(self, op: Op) -> None:
        """What was left out is loaded."""
        if not self.drained:
            self.drain()
        request = IngestRequest(backfill=Backfill(folder=self.stream.folder))
        if self.ask(request, op.kill)[0]:
            assert not self.ask(request, None)[0]
        self.model.backfill()
        self.drain()

    def retry(self, op: Op) -> None:
        """All that was skipped is read again."""
        skipped = tuple(file.path for file in self.platform.restart().files(self.stream, "SKIPPED_CORRUPTED"))
        if skipped:
            self.ask(IngestRequest(retry_files=skipped), op.kill)

    def rebuild(self, op: Op) -> None:
        """The ledger is made from the rows."""
        if self.platform.engine.state(self.platform.engine.names.bronze(self.stream.table)) is None:
            return
        if not self.drained:
            self.drain()
        self.platform.restart().reset(self.stream, rebuild=True)
        self.model.rebuild()
        self.drain()

    def overwrite(self, op: Op) -> None:
        """A file is replaced, whatever its state."""
        self.drain()
        paths = sorted(self.model.there)
        if paths:
            self.put(paths[op.number % len(paths)], op.files[0][1])

    def remove(self, op: Op) -> None:
        """A file vanishes."""
        self.drain()
        paths = sorted(self.model.there)
        if paths:
            path = paths[op.number % len(paths)]
            del self.model.there[path]
            self.platform.remove(path)

    def hint(self, op: Op) -> None:
        """Somebody declares other types."""
        if self.stream.format == "json":
            self.stream = changed(self.stream, schema_hints=HINTS[op.number % len(HINTS)])

    def compare(self) -> None:
        """Table, files, balance and look against the model."""
        engine = self.platform.restart()
        assert {file.path: file.state for file in engine.files(self.stream)} == self.model.states()
        assert engine.look(self.stream).files == 0
        assert all(b.expected_rows == b.added_rows for b in engine.balance(self.stream, 0))
        state = engine.state(engine.names.bronze(self.stream.table))
        if state is None:
            assert not self.model.known
            return
        assert [finding.level for finding in engine.doctor([self.stream]) if "stream" in finding.subject] == ["ok"]
        columns = self.platform.columns(self.stream)
        rows = {row["n"]: row for row in self.platform.rows(self.stream)}
        expected = {
            number: (path, record)
            for path, versions in self.model.rows.items()
            for version in versions
            for number, record in (version.records or {}).items()
        }
        assert rows.keys() == expected.keys()
        assert state.rows == len(rows)
        for number, (path, record) in expected.items():
            assert rows[number]["_source_file"] == f"{LOCATION}/{path}"
            check(rows[number], record, columns, path, self.stream)


def written(stream: FileStream, record: dict[str, Any], ids: Iterator[int]) -> Version:
    """A file of two records."""
    numbers = [f"{next(ids):06}", f"{next(ids):06}"]
    if stream.format == "json":
        lines = []
        for number in numbers:
            members = {"n": Text(f'"{number}"', number), **record}
            lines.append("{" + ",".join(f"{json.dumps(k)}: {v.source}" for k, v in members.items()) + "}\n")
        return Version("".join(lines).encode(), dict.fromkeys(numbers, record))
    columns = {name: pa.array([kind.value] * 2, kind.type) for name, kind in record.items()}
    # Null columns have no type of their own to hold.
    there = {name: kind for name, kind in record.items() if kind.rescued is not None}
    return Version(parquet({"n": numbers, **columns}), dict.fromkeys(numbers, there))


def check(row: dict[str, Any], record: dict[str, Any], columns: dict[str, str], path: str, stream: FileStream) -> None:
    """Every value stands in its column or in the rescued data, and nothing else does."""
    text = row["_rescued_data"] or "{}"
    rescued = json.loads(text)
    left = {key for key in rescued if key != "_file_path"}
    record = dict(record)
    raw = row.get("_raw_record")
    if raw is not None:
        assert json.loads(raw)["n"] == row["n"]
    if stream.options.partition_names:
        folder = path.split("/")[1].removeprefix("p=")
        own = record.pop("p", None)
        shown = None if own is None else (own.shown if isinstance(own, Text) else str(own.value))
        if "p" in columns and row["p"] is not None:
            assert str(row["p"]) == folder
            assert ("p" in left) == (shown not in (None, folder))
            if "p" in left:
                assert str(rescued["p"]) == shown
        else:
            assert str(rescued["p"]) == (folder if shown in (None, folder) else shown)
        left.discard("p")
    for name, value in record.items():
        null = isinstance(value, Text) and value.shown is None
        if name in columns and ((row[name] is not None and says(row[name], value)) or (null and row[name] is None)):
            continue
        assert name not in columns or row[name] is None, (name, row[name], value)
        source = value.source if isinstance(value, Text) else value.rescued
        assert f"{json.dumps(name, ensure_ascii=False)}:{source}" in text
        left.remove(name)
    assert not left
    partition = {"p"} if stream.options.partition_names else set()
    assert all(row[name] is None for name in columns.keys() - record.keys() - {"n", "_raw_record"} - partition)


def says(found: Any, value: Any) -> bool:
    """Whether a column's value says the same as the file's."""
    if isinstance(value, Text):
        if isinstance(found, str):
            return found == value.shown
        return means(found, json.loads(value.source, parse_float=Decimal, parse_int=Decimal))
    held = value.value
    if isinstance(found, datetime) and isinstance(held, date) and not isinstance(held, datetime):
        return found == datetime.combine(held, datetime.min.time())
    if isinstance(found, dict) and isinstance(held, dict):
        return all(found.get(key) == item for key, item in held.items()) and all(
            item is None for key, item in found.items() if key not in held
        )
    return isinstance(found, bool) == isinstance(held, bool) and bool(found == held)


def means(found: Any, parsed: Any) -> bool:
    """Whether a typed value says the same as a parsed JSON value."""
    if found is None or isinstance(found, bool) or isinstance(parsed, bool):
        return found is parsed
    if isinstance(found, str):
        try:
            return found == parsed or (not isinstance(parsed, str) and json.loads(found, parse_float=Decimal) == parsed)
        except ValueError:
            return False
    if isinstance(found, int | float | Decimal):
        try:
            return isinstance(parsed, Decimal) and Decimal(str(found)) == parsed
        except InvalidOperation:
            return False
    if isinstance(found, list):
        return isinstance(parsed, list) and len(found) == len(parsed) and all(map(means, found, parsed))
    if isinstance(found, dict):
        return (
            isinstance(parsed, dict)
            and parsed.keys() <= found.keys()
            and all(means(item, parsed.get(key)) for key, item in found.items())
        )
    return False


def changed(stream: FileStream, **options: Any) -> FileStream:
    """The stream with other options."""
    return replace(stream, options=replace(stream.options, **options))


def ops_of(format: str) -> st.SearchStrategy[list[Op]]:
    """Random lives of a stream of a format."""
    values: st.SearchStrategy[Any] = st.sampled_from(TEXTS if format == "json" else TYPED)
    record = st.dictionaries(st.sampled_from(NAMES[:-1]), values, max_size=3)
    own = st.one_of(st.none(), st.none(), st.sampled_from(OWN_P[format]))
    whole = st.builds(lambda r, p: tuple({**r, **({} if p is None else {"p": p})}.items()), record, own)
    file = st.tuples(st.sampled_from(FOLDERS), st.one_of(whole, whole, whole, st.none()))
    land = st.builds(lambda files: Op("land", files=tuple(files)), st.lists(file, min_size=1, max_size=3))
    kill = st.one_of(st.none(), st.integers(0, 22))
    asked = st.builds(
        Op,
        st.sampled_from(["load", "load", "refresh", "refresh", "backfill", "retry", "rebuild", "hint", "remove"]),
        st.integers(0, 3),
        kill,
    )
    overwrite = st.builds(lambda n, f: Op("overwrite", n, None, (f,)), st.integers(0, 9), file)
    return st.lists(st.one_of(land, land, asked, asked, asked, overwrite), min_size=2, max_size=10)


MODES = st.sampled_from(["addNewColumns", "addNewColumnsWithTypeWidening", "rescue", "none"])
OPTIONS = st.fixed_dictionaries(
    {
        "schema_evolution_mode": MODES,
        "max_files_per_trigger": st.sampled_from([1, 2, 1000]),
        "partition_columns": st.sampled_from([None, "p"]),
        "allow_overwrites": st.booleans(),
        "include_existing_files": st.sampled_from([True, True, False]),
    }
)
TEXT_OPTIONS = st.fixed_dictionaries(
    {
        "infer_column_types": st.booleans(),
        "raw_record_column": st.sampled_from([None, "_raw_record"]),
        "schema_hints": st.sampled_from(HINTS),
    }
)


def live(names: Iterable[str], stream: FileStream, ops: list[Op]) -> None:
    """Live it on some platforms."""
    for name in names:
        with tempfile.TemporaryDirectory() as home:
            Life(CHECKPOINT_PLATFORMS[name](Path(home)), stream).play(ops)


JSON_STREAMS = st.builds(lambda options, text: json_stream("n", **options, **text), OPTIONS, TEXT_OPTIONS)
PARQUET_STREAMS = st.builds(
    lambda options, declared: parquet_stream(
        Column("n", "STRING", "Number."), *([Column("p", declared, "Folder.")] if declared else []), **options
    ),
    OPTIONS,
    st.sampled_from([None, "INT", "STRING"]),
)
WITHOUT_SPARK = tuple(name for name in CHECKPOINT_PLATFORMS if name != "spark")
#: Spark takes seconds for what others do in milliseconds.
SPARK_EXAMPLES = max(2, EXAMPLES // 20)


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(JSON_STREAMS, ops_of("json"))
def test_lives_of_json(stream: FileStream, ops: list[Op]) -> None:
    live(WITHOUT_SPARK, stream, ops)


@pytest.mark.spark
@settings(max_examples=SPARK_EXAMPLES, suppress_health_check=list(HealthCheck))
@given(JSON_STREAMS, ops_of("json"))
def test_lives_of_json_on_spark(stream: FileStream, ops: list[Op]) -> None:
    live(["spark"], stream, ops)


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(PARQUET_STREAMS, ops_of("parquet"))
def test_lives_of_parquet(stream: FileStream, ops: list[Op]) -> None:
    live(WITHOUT_SPARK, stream, ops)


@pytest.mark.spark
@settings(max_examples=SPARK_EXAMPLES, suppress_health_check=list(HealthCheck))
@given(PARQUET_STREAMS, ops_of("parquet"))
def test_lives_of_parquet_on_spark(stream: FileStream, ops: list[Op]) -> None:
    live(["spark"], stream, ops)
