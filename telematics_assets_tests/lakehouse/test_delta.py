"""Delta tables: rows, columns and position in one commit, conflicts that double nothing, counts without reading."""

from __future__ import annotations

import datetime
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake

from telematics_assets.catalog import TableName
from telematics_assets.errors import (
    CommitConflictError,
    SchemaError,
    TableError,
    TableMovedError,
    TableUnsupportedError,
    TelematicsError,
    TransientError,
    VolumeUnavailableError,
)
from telematics_assets.lakehouse import delta, upkeep
from telematics_assets.lakehouse import log as log_entries
from telematics_assets.lakehouse.base import Commit, Lakehouse, Table
from telematics_assets.lakehouse.delta import DeltaLakehouse, DeltaLakeTable
from telematics_assets.testing import MemoryLakehouse
from telematics_assets_tests.stores import servers
from telematics_assets_tests.turns import SPARINGLY

NAME = TableName("workspace", "01_bronze", "points")
MODIFIED = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, datetime.UTC)
SCHEMA = pa.schema(
    [
        pa.field("n", pa.int64(), metadata={"comment": "A number, km/h, with ünïcode."}),
        pa.field("text", pa.string()),
        pa.field("_source_file", pa.string()),
        pa.field("_source_file_modified_at", pa.timestamp("us", "UTC")),
        pa.field("_batch_id", pa.int64()),
    ]
)
APP = "stream-id"

LAKEHOUSES: dict[str, Callable[[Path], Lakehouse]] = {
    "delta": lambda folder: DeltaLakehouse(folder / "odd name #1 ü" / "tables"),
    "memory": lambda folder: MemoryLakehouse(),
    "azure": lambda folder: DeltaLakehouse(servers.azure()),
    "s3": lambda folder: DeltaLakehouse(servers.s3()),
}


@pytest.fixture(params=["delta", "memory", *(pytest.param(name, marks=SPARINGLY) for name in servers.PLACES)])
def lakehouse(request: pytest.FixtureRequest, tmp_path: Path) -> Lakehouse:
    return LAKEHOUSES[request.param](tmp_path)


@pytest.fixture
def local(tmp_path: Path) -> DeltaLakehouse:
    return DeltaLakehouse(tmp_path / "tables")


def create(lakehouse: Lakehouse, name: TableName = NAME, schema: pa.Schema = SCHEMA) -> Table:
    return lakehouse.create(name, schema, "One row per point.", {"telematics.streamId": APP})


def batch(numbers: Sequence[int | None], number: int = 0, schema: pa.Schema = SCHEMA, **more: Any) -> pa.RecordBatch:
    columns = {
        "n": numbers,
        "text": [f"text {n}" for n in numbers],
        "_source_file": [f"/Volumes/{number}"] * len(numbers),
        "_source_file_modified_at": [MODIFIED] * len(numbers),
        "_batch_id": [number] * len(numbers),
        **more,
    }
    return pa.record_batch([pa.array(columns[f.name], f.type) for f in schema], schema=schema)


def append(table: Table, numbers: Sequence[int | None], version: int, app: str = APP) -> Commit:
    return table.append(SCHEMA, [batch(numbers, version)], app, version, {"telematics.attempt": f"a{version}"})


def reopened(lakehouse: Lakehouse, name: TableName = NAME) -> Table:
    table = lakehouse.open(name)
    assert table is not None
    return table


def numbers(lakehouse: Lakehouse) -> list[int | None]:
    found: list[int | None] = reopened(lakehouse).read(["n"]).column("n").to_pylist()
    return sorted(found, key=lambda n: (n is None, n))


def log(table: Table) -> list[str]:
    return sorted(name for name in os.listdir(Path(table.uri, "_delta_log")) if name.endswith(".json"))


def data_files(table: Table) -> list[Path]:
    return sorted(Path(table.uri).glob("*.parquet"))


# -- every lakehouse ---------------------------------------------------------------------------------------------------


def test_what_is_not_there_is_none(lakehouse: Lakehouse) -> None:
    assert lakehouse.open(NAME) is None
    assert lakehouse.tables("workspace", "01_bronze") == []
    lakehouse.drop(NAME)


def test_a_created_table_carries_comments_and_properties(lakehouse: Lakehouse) -> None:
    table = create(lakehouse)
    for handle in (table, reopened(lakehouse)):
        assert (handle.name, handle.version, handle.count()) == (NAME, 0, 0)
        assert handle.schema.equals(SCHEMA)
        assert handle.schema.field("n").metadata[b"comment"].decode() == "A number, km/h, with ünïcode."
        assert handle.comment == "One row per point."
        assert handle.properties["telematics.streamId"] == APP
        assert handle.position(APP) is None
        assert handle.id == table.id
        assert handle.uri
    assert lakehouse.tables("workspace", "01_bronze") == [NAME]
    assert lakehouse.tables("workspace", "02_silver") == []


def test_creating_what_is_there_opens_it(lakehouse: Lakehouse) -> None:
    first = create(lakehouse)
    append(first, [1], 0)
    second = create(lakehouse)
    assert (second.id, second.version, second.count()) == (first.id, 1, 1)


def test_of_eight_creators_all_get_one_table(lakehouse: Lakehouse) -> None:
    start = threading.Barrier(8)

    def race(_: int) -> str:
        start.wait()
        return create(lakehouse).id

    with ThreadPoolExecutor(8) as pool:
        seen = set(pool.map(race, range(8)))
    assert seen == {reopened(lakehouse).id}
    assert reopened(lakehouse).version == 0, "who comes second changes nothing"


def test_rows_columns_and_position_are_one_commit(lakehouse: Lakehouse) -> None:
    table = create(lakehouse)
    append(table, [1, 2], 0)
    wider = SCHEMA.append(pa.field("extra", pa.float64())).append(pa.field("more", pa.string()))
    rows = batch([3], 1, wider, extra=[2.5], more=["x"])
    commit = table.append(wider, [rows], APP, 1, {"telematics.attempt": "abc", "telematics.planDigest": "d" * 64})
    assert commit.version == table.version == 2
    assert (commit.rows, commit.files) == (1, 1)
    assert commit.bytes > 0
    assert commit.transactions == {APP: 1}
    assert commit.info["telematics.attempt"] == "abc"
    assert commit.info["telematics.planDigest"] == "d" * 64
    assert not commit.removes_data
    handle = reopened(lakehouse)
    assert (handle.version, handle.position(APP), handle.count()) == (2, 1, 3)
    assert handle.schema.names == wider.names
    assert handle.schema.field("n").metadata == SCHEMA.field("n").metadata, "comments outlive new columns"
    assert [c.transactions for c in handle.commits(0)] == [{APP: 0}, {APP: 1}]
    assert list(handle.commits(2)) == []
    found = sorted(handle.read(["n", "extra", "more"]).to_pylist(), key=lambda row: row["n"])
    assert found == [
        {"n": 1, "extra": None, "more": None},
        {"n": 2, "extra": None, "more": None},
        {"n": 3, "extra": 2.5, "more": "x"},
    ]


def test_rows_keep_their_order(local: DeltaLakehouse) -> None:
    table = create(local)

    def batches() -> Iterator[pa.RecordBatch]:
        for number in range(200):
            yield batch(range(number * 1000, (number + 1) * 1000))

    table.append(SCHEMA, batches(), APP, 0, {})
    (file,) = data_files(table)
    assert pq.read_table(file)["n"].to_pylist() == list(range(200_000))


def test_an_empty_append_moves_the_position_alone(lakehouse: Lakehouse) -> None:
    table = create(lakehouse)
    append(table, [1], 0)
    commit = table.append(SCHEMA, iter(()), APP, 1, {"telematics.attempt": "empty"})
    assert (commit.version, commit.rows, commit.files, commit.bytes, commit.removes_data) == (2, 0, 0, 0, False)
    assert commit.info["telematics.attempt"] == "empty"
    assert reopened(lakehouse).position(APP) == 1
    assert numbers(lakehouse) == [1]


def test_the_position_of_one_application_is_not_anothers(lakehouse: Lakehouse) -> None:
    table = create(lakehouse)
    append(table, [1], 5, "one")
    append(table, [2], 9, "two")
    assert [reopened(lakehouse).position(app) for app in ("one", "two", "three")] == [5, 9, None]


def test_a_handle_sees_its_own_snapshot(lakehouse: Lakehouse) -> None:
    create(lakehouse)
    early = reopened(lakehouse)
    append(reopened(lakehouse), [1], 0)
    assert (early.version, early.count(), early.position(APP), list(early.commits(0))) == (0, 0, None, [])


def test_a_stale_handle_is_refused_and_nothing_of_it_is_there(lakehouse: Lakehouse) -> None:
    create(lakehouse)
    first, second = reopened(lakehouse), reopened(lakehouse)
    append(first, [1], 0)
    with pytest.raises(CommitConflictError, match="points first"):
        append(second, [1], 0)
    with pytest.raises(CommitConflictError):
        append(second, [2], 1)
    assert numbers(lakehouse) == [1]
    assert reopened(lakehouse).version == 1


@pytest.mark.parametrize("version", [0, 1, 7])
def test_of_eight_writers_of_a_batch_one_wins(lakehouse: Lakehouse, version: int) -> None:
    table = create(lakehouse)
    for earlier in range(version):
        append(table, [100 + earlier], earlier)
    start = threading.Barrier(8)

    def race(writer: int) -> int | None:
        handle = reopened(lakehouse)
        assert handle.position(APP) == (version - 1 if version else None)
        start.wait()
        try:
            append(handle, [writer], version)
        except CommitConflictError:
            return None
        return writer

    with ThreadPoolExecutor(8) as pool:
        won = [writer for writer in pool.map(race, range(8)) if writer is not None]
    assert len(won) == 1
    assert [n for n in numbers(lakehouse) if n is not None and n < 100] == won
    assert reopened(lakehouse).position(APP) == version


def test_streams_of_their_own_append_side_by_side(lakehouse: Lakehouse) -> None:
    create(lakehouse)

    def stream(writer: int) -> None:
        for version in range(5):
            handle = reopened(lakehouse)
            commit = append(handle, [10 * writer + version], version, f"app{writer}")
            assert commit.transactions == {f"app{writer}": version}

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(stream, range(4)))
    assert numbers(lakehouse) == sorted(10 * writer + version for writer in range(4) for version in range(5))


class MineError(Exception):
    """An exception of the caller's own."""


FAILURES: list[BaseException] = [
    MineError("mine"),
    KeyError("mine"),
    OSError("mine"),
    ValueError("mine"),
    KeyboardInterrupt("mine"),
    VolumeUnavailableError("mine"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_exception_of_the_rows_passes_through_and_commits_nothing(
    lakehouse: Lakehouse, error: BaseException, after: int
) -> None:
    table = create(lakehouse)

    def rows() -> Iterator[pa.RecordBatch]:
        for number in range(after):
            yield batch([number])
        raise error

    with pytest.raises(type(error), match="mine") as caught:
        table.append(SCHEMA, rows(), APP, 0, {})
    assert caught.value is error
    assert (reopened(lakehouse).version, reopened(lakehouse).position(APP), numbers(lakehouse)) == (0, None, [])
    append(table, [1], 0)
    assert numbers(lakehouse) == [1]


NARROW = pa.schema([SCHEMA.field("n"), pa.field("more", pa.string(), metadata={"comment": "New."}), SCHEMA.field(4)])


def rewrite(table: Table, numbers: Sequence[int], **positions: int) -> Commit:
    rows = [batch([n], 9, NARROW, more=["x"]) for n in numbers]
    return table.overwrite(NARROW, rows, positions, {"telematics.attempt": "o"})


def test_an_overwrite_replaces_rows_and_columns_and_sets_several_positions(lakehouse: Lakehouse) -> None:
    table = create(lakehouse)
    append(table, [1, 2], 0)
    before = reopened(lakehouse)
    commit = rewrite(table, [7, 8, 9], new=4, **{APP: 4})
    assert (commit.version, commit.rows, commit.removes_data) == (2, 3, True)
    assert commit.info["telematics.attempt"] == "o"
    assert commit.transactions == {"new": 4, APP: 4}
    handle = reopened(lakehouse)
    assert handle.schema.names == ["n", "more", "_batch_id"]
    assert [(field.metadata or {}).get(b"comment") for field in handle.schema][:2] == [
        "A number, km/h, with ünïcode.".encode(),
        b"New.",
    ]
    assert (handle.position("new"), handle.position(APP), handle.count()) == (4, 4, 3)
    assert (handle.id, handle.comment, handle.properties) == (before.id, before.comment, before.properties)
    assert numbers(lakehouse) == [7, 8, 9]
    # An open handle is a snapshot.
    assert sorted(before.read(["n"]).column("n").to_pylist()) == [1, 2]
    assert handle.append(NARROW, [batch([1], 10, NARROW, more=["y"])], "new", 5, {}).version == 3
    rewrite(reopened(lakehouse), [])
    assert numbers(lakehouse) == []


@pytest.mark.parametrize("what", ["own append", "foreign append", "property", "overwrite"])
def test_an_overwrite_is_the_next_version_or_none(lakehouse: Lakehouse, what: str) -> None:
    append(create(lakehouse), [1], 0)
    handle, other = reopened(lakehouse), reopened(lakehouse)
    if what == "property":
        other.set_property("telematics.note", "x")
    elif what == "overwrite":
        rewrite(other, [1], other=0)
    else:
        append(other, [2], 1, APP if what == "own append" else "theirs")
    before = numbers(lakehouse)
    with pytest.raises(CommitConflictError):
        rewrite(handle, [7], new=4)
    assert (reopened(lakehouse).version, numbers(lakehouse)) == (2, before)


@pytest.mark.parametrize("rows", [[], [1]])
def test_an_append_behind_an_overwrite_that_took_its_position_is_refused(lakehouse: Lakehouse, rows: list[int]) -> None:
    append(create(lakehouse), rows, 0)
    handle = reopened(lakehouse)
    reopened(lakehouse).overwrite(SCHEMA, [batch([5])], {"new": 2, APP: 2}, {})
    with pytest.raises(CommitConflictError):
        append(handle, [2], 1)
    assert numbers(lakehouse) == [5]


def test_an_exception_of_the_rows_of_an_overwrite_leaves_the_table_as_it_is(lakehouse: Lakehouse) -> None:
    append(create(lakehouse), [1], 0)

    def rows() -> Iterator[pa.RecordBatch]:
        yield batch([7])
        raise MineError("mine")

    with pytest.raises(MineError):
        reopened(lakehouse).overwrite(SCHEMA, rows(), {"new": 1}, {})
    assert (reopened(lakehouse).version, numbers(lakehouse)) == (1, [1])


def test_an_overwrite_of_an_append_only_table_is_refused_for_good(local: DeltaLakehouse) -> None:
    append(create(local), [1], 0)
    DeltaTable(reopened(local).uri).alter.set_table_properties({"delta.appendOnly": "true"})
    with pytest.raises(TableUnsupportedError, match=r"delta\.appendOnly.*Set it to false"):
        rewrite(reopened(local), [7], new=1)


def test_an_overwrite_with_a_type_that_delta_lacks_is_refused(local: DeltaLakehouse) -> None:
    schema = pa.schema([pa.field("n", pa.uint64())])
    with pytest.raises(SchemaError, match="'n'"):
        create(local).overwrite(schema, [], {"new": 1}, {})


def test_properties_are_set_in_a_commit_of_their_own(lakehouse: Lakehouse) -> None:
    table = create(lakehouse)
    append(table, [1], 0)
    table.set_property("telematics.streamId", "another")
    handle = reopened(lakehouse)
    assert handle.properties["telematics.streamId"] == "another"
    assert (handle.id, handle.count(), handle.position(APP)) == (table.id, 1, 0)
    (commit,) = handle.commits(1)
    assert (commit.rows, commit.files, commit.removes_data) == (0, 0, False)


def test_a_property_asks_nothing_more_of_readers_and_writers(local: DeltaLakehouse) -> None:
    schema = pa.schema([*SCHEMA, pa.field("local", pa.timestamp("us"))])
    table = create(local, schema=schema)
    before = DeltaTable(table.uri).protocol()
    table.set_property("telematics.streamId", "another")
    assert repr(DeltaTable(table.uri).protocol()) == repr(before)
    assert table.version == 1
    assert append(table, [1], 0).rows == 1
    opened = reopened(local)
    assert opened.properties == {"telematics.streamId": "another"}
    assert (opened.id, opened.comment) == (table.id, "One row per point.")
    assert opened.schema == schema
    opened.set_property("telematics.streamId", "third")
    with pytest.raises(CommitConflictError):
        table.set_property("telematics.streamId", "fourth")
    assert reopened(local).properties == {"telematics.streamId": "third"}


def test_a_feature_for_variants_without_a_variant_is_no_hindrance(local: DeltaLakehouse) -> None:
    table = create(local, schema=pa.schema([*SCHEMA, pa.field("local", pa.timestamp("us"))]))
    DeltaTable(table.uri).alter.set_table_properties({"somebody.else": "1"}, raise_if_not_exists=False)
    assert "variantType" in (DeltaTable(table.uri).protocol().reader_features or ())
    assert append(reopened(local), [1], 0).rows == 1


def test_a_dropped_table_is_gone_and_its_successor_is_another(lakehouse: Lakehouse) -> None:
    first = create(lakehouse)
    append(first, [1], 0)
    lakehouse.drop(NAME)
    assert lakehouse.open(NAME) is None
    assert lakehouse.tables("workspace", "01_bronze") == []
    second = create(lakehouse)
    assert (second.version, second.count(), second.position(APP)) == (0, 0, None)
    assert second.id != first.id


def test_a_limit_cuts_off_the_oldest_batches(lakehouse: Lakehouse) -> None:
    table = create(lakehouse)
    for version in range(4):
        append(table, [version] * 3, version)
    handle = reopened(lakehouse)
    assert handle.read(["n"], limit=4).column("n").to_pylist() == [3, 3, 3, 2]
    assert handle.read(["n"], limit=0).num_rows == 0
    assert handle.read(["n"], limit=100).num_rows == 12
    assert sorted(handle.read(["n"], since_batch=2).column("n").to_pylist()) == [2, 2, 2, 3, 3, 3]
    assert handle.read(["n"], limit=2, since_batch=3).column("n").to_pylist() == [3, 3]


def test_unknown_columns_are_left_out_and_order_is_as_asked(lakehouse: Lakehouse) -> None:
    append(create(lakehouse), [1], 0)
    found = reopened(lakehouse).read(["text", "nowhere", "n"])
    assert found.to_pylist() == [{"text": "text 1", "n": 1}]
    assert reopened(lakehouse).read().schema.names == SCHEMA.names


def test_the_sources_of_the_rows_are_told(lakehouse: Lakehouse) -> None:
    table = create(lakehouse)
    assert reopened(lakehouse).sources().num_rows == 0
    append(table, [1, 2], 0)
    again = {"_source_file": ["/Volumes/0"]}
    table.append(SCHEMA, [batch([3], 1), batch([4], 1, **again)], APP, 1, {})
    sources = reopened(lakehouse).sources()
    assert sources.schema.names == ["_source_file", "_source_file_modified_at", "rows", "_batch_id"]
    assert sorted(sources.to_pylist(), key=lambda row: row["_source_file"]) == [
        {"_source_file": "/Volumes/0", "_source_file_modified_at": MODIFIED, "rows": 3, "_batch_id": 1},
        {"_source_file": "/Volumes/1", "_source_file_modified_at": MODIFIED, "rows": 1, "_batch_id": 1},
    ]


def test_values_out_of_range_are_counted(lakehouse: Lakehouse) -> None:
    wider = SCHEMA.append(pa.field("late", pa.string()))
    table = create(lakehouse)
    append(table, [1000], 0)
    append(table, [5, None, -1, 7, 101], 1)
    table.append(wider, [batch([50] * 4, 2, wider, late=["5", "x", None, "NaN"])], APP, 2, {})
    handle = reopened(lakehouse)
    assert handle.out_of_range("n", 0, 100, 1)[:2] == (8, 2)
    assert handle.out_of_range("n", 0, 100, 1)[2] in ("-1", "101")
    assert handle.out_of_range("n", None, 6, 1)[:2] == (8, 6)
    assert handle.out_of_range("n", 0, None, 2) == (4, 0, None)
    assert handle.out_of_range("n", 0, 100, 9) == (0, 0, None)
    assert handle.out_of_range("late", 0, 100, 0)[:2] == (3, 2), "text that is no number is outside"


def test_an_outsiders_delete_is_seen(lakehouse: Lakehouse) -> None:
    table = create(lakehouse)
    append(table, [1, 2], 0)
    handle = reopened(lakehouse)
    if isinstance(handle, DeltaLakeTable):
        DeltaTable(handle.uri).delete()
    else:
        handle.delete_all()  # type: ignore[attr-defined]
    (commit,) = reopened(lakehouse).commits(1)
    assert (commit.operation, commit.removes_data, commit.transactions) == ("DELETE", True, {})
    assert (reopened(lakehouse).count(), reopened(lakehouse).position(APP)) == (0, 0)


# -- Delta in local folders --------------------------------------------------------------------------------------------


def test_an_append_adds_exactly_one_log_entry(local: DeltaLakehouse) -> None:
    table = create(local)
    wider = SCHEMA.append(pa.field("extra", pa.float64()))
    table.append(wider, [batch([n], 0, wider, extra=[0.5]) for n in range(20)], APP, 0, {"telematics.attempt": "a"})
    assert log(table) == [f"{0:020d}.json", f"{1:020d}.json"]
    entry = Path(table.uri, "_delta_log", f"{1:020d}.json").read_text()
    assert all(word in entry for word in ('"add"', '"metaData"', '"txn"', '"commitInfo"', '"telematics.attempt":"a"'))


def test_a_large_stream_is_one_commit_of_several_files(local: DeltaLakehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "TARGET_FILE_BYTES", 200_000)
    table = create(local)
    pulled = [0]

    def rows() -> Iterator[pa.RecordBatch]:
        for chunk in range(60):
            pulled[0] += 1
            noise = [os.urandom(50).hex() for _ in range(1000)]
            yield batch(range(chunk * 1000, chunk * 1000 + 1000), text=noise)

    commit = table.append(SCHEMA, rows(), APP, 0, {})
    assert pulled[0] == 60
    assert (commit.version, commit.rows) == (1, 60_000)
    assert commit.files > 5
    assert (
        (commit.files, commit.bytes) == table.size() == (len(data_files(table)), sum(map(size_of, data_files(table))))
    )
    assert numbers(local) == list(range(60_000))


def size_of(path: Path) -> int:
    return path.stat().st_size


_LARGE = """
import resource, sys
from pathlib import Path
import pyarrow as pa
from telematics_assets.catalog import TableName
from telematics_assets.lakehouse import delta, upkeep
from telematics_assets.lakehouse import log as log_entries
import numpy as np

delta.TARGET_FILE_BYTES = 16 << 20
schema = pa.schema([("n", pa.int64())])
table = delta.DeltaLakehouse(Path(sys.argv[1])).create(TableName("a", "b", "c"), schema, "", {})
random = np.random.default_rng(1)

def rows(megabytes):
    for _ in range(megabytes):
        yield pa.record_batch([pa.array(random.integers(-2**62, 2**62, 1 << 17))], schema=schema)

table.append(schema, rows(64), "app", 0, {})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
commit = table.append(schema, rows(640), "app", 1, {})
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
assert commit.rows == 640 << 17 and commit.files > 10, commit
assert grown < 200, f"{grown} MiB more for 640 MiB of rows"
"""


def test_memory_does_not_grow_with_the_stream(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _LARGE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


CASTS = [
    pa.field("n", pa.float64()),
    pa.field("n", pa.int32()),
    pa.field("n", pa.string()),
    pa.field("text", pa.binary()),
    pa.field("_source_file_modified_at", pa.timestamp("ns", "UTC")),
    pa.field("_source_file_modified_at", pa.timestamp("us")),
]


@pytest.mark.parametrize("field", CASTS, ids=str)
def test_rows_of_another_type_are_refused_by_name(local: DeltaLakehouse, field: pa.Field) -> None:
    table = create(local)
    schema = SCHEMA.set(SCHEMA.get_field_index(field.name), field)
    with pytest.raises(SchemaError, match=f"'{field.name}'.*would cast it silently"):
        table.append(schema, iter(()), APP, 0, {})
    assert reopened(local).version == 0


@pytest.mark.parametrize(
    "arrow", [pa.uint64(), pa.uint32(), pa.timestamp("ns", "UTC"), pa.time64("us"), pa.duration("s")], ids=str
)
def test_new_columns_of_a_type_that_delta_would_cast_are_refused(local: DeltaLakehouse, arrow: pa.DataType) -> None:
    table = create(local)
    wider = SCHEMA.append(pa.field("extra", arrow))
    with pytest.raises(SchemaError, match=r"'extra'.*would cast it silently"):
        table.append(wider, [batch([1], 0, wider, extra=[None])], APP, 0, {})
    assert reopened(local).version == 0


@pytest.mark.parametrize("text", [pa.large_string(), pa.string_view()], ids=str)
def test_text_is_text_however_arrow_keeps_it(local: DeltaLakehouse, text: pa.DataType) -> None:
    table = create(local)
    schema = SCHEMA.set(1, pa.field("text", text))
    table.append(schema, [batch([1], 0, schema)], APP, 0, {})
    assert reopened(local).read(["text"]).column("text").to_pylist() == ["text 1"]
    assert reopened(local).schema.field("text").type == pa.string()


def overwrite(table: DeltaTable) -> None:
    write_deltalake(table, pa.Table.from_batches([batch([9])]), mode="overwrite")


def replace_where(table: DeltaTable) -> None:
    write_deltalake(table, pa.Table.from_batches([batch([1])]), mode="overwrite", predicate="n = 1")


def merge(table: DeltaTable) -> None:
    source = pa.table({"n": pa.array([1], pa.int64())})
    table.merge(source, "t.n = s.n", source_alias="s", target_alias="t").when_matched_delete().execute()


REMOVING: dict[str, Callable[[DeltaTable], object]] = {
    "delete all": lambda table: table.delete(),
    "delete some": lambda table: table.delete("n = 1"),
    "update": lambda table: table.update({"text": "'x'"}, predicate="n = 1"),
    "merge": merge,
    "overwrite": overwrite,
    "replace where": replace_where,
    "restore": lambda table: table.restore(2),
    "restore to an empty table": lambda table: table.restore(0),
}
KEEPING: dict[str, Callable[[DeltaTable], object]] = {
    "optimize": lambda table: table.optimize.compact(),
    "z-order": lambda table: table.optimize.z_order(["n"]),
    "vacuum": lambda table: table.vacuum(0, dry_run=False, enforce_retention_duration=False),
    "append": lambda table: write_deltalake(table, pa.Table.from_batches([batch([9])]), mode="append"),
    "property": lambda table: table.alter.set_table_properties({"delta.logRetentionDuration": "interval 60 days"}),
    "column": lambda table: table.alter.add_columns([]),
}


@pytest.fixture
def grown(local: DeltaLakehouse) -> Table:
    table = create(local)
    for version in range(3):
        append(table, [version, 10 + version], version)
    return table


@pytest.mark.parametrize("what", REMOVING)
def test_what_takes_rows_away_is_seen_in_the_log(local: DeltaLakehouse, grown: Table, what: str) -> None:
    REMOVING[what](DeltaTable(grown.uri))
    commits = reopened(local).commits(grown.version)
    assert [commit.removes_data for commit in commits] == [True]
    assert commits[0].operation


@pytest.mark.parametrize("what", KEEPING)
def test_what_keeps_all_rows_is_no_reason_to_stop(local: DeltaLakehouse, grown: Table, what: str) -> None:
    KEEPING[what](DeltaTable(grown.uri))
    handle = reopened(local)
    assert not any(commit.removes_data for commit in handle.commits(grown.version))
    assert handle.position(APP) == 2
    assert handle.count() == 6 + (what == "append")
    append(handle, [99], 3)
    assert 99 in numbers(local)


@pytest.mark.parametrize("what", [*REMOVING, *KEEPING])
def test_between_opening_and_committing_an_outsider_never_makes_a_removal_unseen(
    local: DeltaLakehouse, grown: Table, what: str
) -> None:
    """Either the commit is refused, or nobody's rows went away below it."""
    handle = reopened(local)
    {**REMOVING, **KEEPING}[what](DeltaTable(grown.uri))
    try:
        append(handle, [99], 3)
    except CommitConflictError:
        assert 99 not in numbers(local)
        assert reopened(local).position(APP) == 2
    else:
        assert not any(commit.removes_data for commit in reopened(local).commits(grown.version))
        assert numbers(local).count(99) == 1


def test_positions_are_those_of_the_whole_log_whoever_wrote_it_and_whatever_has_expired(local: DeltaLakehouse) -> None:
    rng = random.Random(7)
    create(local)
    expected: dict[str, int] = {}

    def ours(app: str, position: int) -> None:
        append(reopened(local), [position], position, app)
        expected[app] = position

    def theirs(app: str, position: int) -> None:
        properties = CommitProperties(app_transactions=[Transaction(app, position)])
        rows = pa.Table.from_batches([batch([position])])
        write_deltalake(reopened(local).uri, rows, mode="append", commit_properties=properties)
        expected[app] = position

    def nobodys(app: str, position: int) -> None:
        DeltaTable(reopened(local).uri).alter.set_table_properties({"some.thing": app}, raise_if_not_exists=False)

    def expired(app: str, position: int) -> None:
        table = reopened(local)
        DeltaTable(table.uri).create_checkpoint()
        for version in range(table.version):
            Path(log_entries.entry_path(table.uri, version)).unlink(missing_ok=True)

    for position in range(12):
        early, then = reopened(local), dict(expected)
        action = rng.choice([ours, ours, theirs, nobodys, nobodys, expired])
        action(rng.choice("abc"), position)
        assert {app: reopened(local).position(app) for app in "abcd"} == {app: expected.get(app) for app in "abcd"}
        if action is not expired:
            assert {app: early.position(app) for app in "abcd"} == {app: then.get(app) for app in "abcd"}


def test_counts_and_sizes_come_from_the_log(local: DeltaLakehouse, grown: Table) -> None:
    files, size = grown.size()
    assert (files, size) == (3, sum(map(size_of, data_files(grown))))
    for path in data_files(grown):
        path.unlink()
    handle = reopened(local)
    assert (handle.count(), handle.size()) == (6, (files, size))
    assert [commit.rows for commit in handle.commits(0)] == [2, 2, 2]


def test_a_compacted_table_counts_each_row_once(local: DeltaLakehouse, grown: Table) -> None:
    DeltaTable(grown.uri).optimize.compact()
    handle = reopened(local)
    assert (handle.count(), handle.size()[0]) == (6, 1)
    assert handle.sources().num_rows == 3
    assert handle.out_of_range("n", 0, 5, 0)[:2] == (6, 3)


def test_durability_syncs_data_log_and_folders(local: DeltaLakehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    table = create(local)
    commit = append(table, [1], 0)
    synced: set[int] = set()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr("telematics_assets.lakehouse.delta.os.fsync", fsync)
    table.make_durable(commit)
    folder = Path(table.uri)
    needed = [*data_files(table), folder / "_delta_log" / f"{1:020d}.json", folder, folder / "_delta_log"]
    assert synced >= {path.stat().st_ino for path in needed}


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 10)])
def test_a_data_file_that_is_missing_or_cut_is_found_before_the_batch_counts(
    local: DeltaLakehouse, damage: Callable[[Path], None]
) -> None:
    table = create(local)
    append(table, [1], 0)
    before = set(data_files(table))
    commit = append(table, [2], 1)
    (new,) = set(data_files(table)) - before
    damage(new)
    with pytest.raises(TableMovedError, match=r"version 2 names the data file .*missing or cut short") as refused:
        table.make_durable(commit)
    assert new.name in str(refused.value)
    table.make_durable(Commit(1, "WRITE"))


def test_a_log_that_does_not_reach_back_is_refused(local: DeltaLakehouse, grown: Table) -> None:
    DeltaTable(grown.uri).create_checkpoint()
    os.unlink(Path(grown.uri, "_delta_log", f"{1:020d}.json"))
    handle = reopened(local)
    assert handle.count() == 6
    assert len(handle.commits(1)) == 2
    with pytest.raises(TableMovedError, match="no longer holds version 1"):
        handle.commits(0)


def test_a_damaged_log_is_a_table_error(local: DeltaLakehouse, grown: Table) -> None:
    entry = Path(grown.uri, "_delta_log", f"{3:020d}.json")
    entry.write_text(entry.read_text()[:40])
    with pytest.raises(TableError, match="points"):
        reopened(local).commits(2)


def test_a_table_without_its_beginning_is_a_table_error(local: DeltaLakehouse, grown: Table) -> None:
    os.unlink(Path(grown.uri, "_delta_log", f"{0:020d}.json"))
    with pytest.raises(TableError, match="can't be opened"):
        local.open(NAME)


def test_a_folder_that_is_no_table_is_none(local: DeltaLakehouse) -> None:
    path = Path(local.uri, NAME.location)
    path.mkdir(parents=True)
    assert local.open(NAME) is None
    assert local.tables("workspace", "01_bronze") == []
    assert create(local).version == 0


def test_copies_that_somebody_made_beside_a_table_dont_stop_the_listing(local: DeltaLakehouse, grown: Table) -> None:
    for copy in ("points copy", "points.bak", ".points.dropped", "points_2025"):
        shutil.copytree(grown.uri, Path(grown.uri).parent / copy)
    listed = local.tables("workspace", "01_bronze")
    assert [name.table for name in listed] == ["points", "points_2025"]


def test_a_drop_leaves_nothing(local: DeltaLakehouse, grown: Table) -> None:
    local.drop(NAME)
    assert os.listdir(Path(grown.uri).parent) == []


def test_what_a_drop_that_died_left_behind_goes_with_the_next(local: DeltaLakehouse, grown: Table) -> None:
    left = Path(grown.uri).with_name(".points.0123.dropped")
    other = Path(grown.uri).with_name(".points_2025.0123.dropped")
    shutil.copytree(grown.uri, left)
    shutil.copytree(grown.uri, other)
    local.drop(NAME)
    assert os.listdir(left.parent) == [other.name]
    shutil.copytree(other, left)
    local.drop(NAME)
    assert os.listdir(left.parent) == [other.name]


def test_a_handle_on_a_dropped_table_can_write_nothing(local: DeltaLakehouse, grown: Table) -> None:
    handle = reopened(local)
    local.drop(NAME)
    with pytest.raises(TelematicsError):
        append(handle, [1], 3)
    assert local.open(NAME) is None


def test_a_disk_that_refuses_is_transient_and_says_why(local: DeltaLakehouse) -> None:
    table = create(local)
    aside = f"{table.uri}.aside"
    os.rename(table.uri, aside)
    Path(table.uri).write_text("a file where the table was")
    with pytest.raises(TransientError, match="points could not be written"):
        table.append(SCHEMA, (batch([n]) for n in range(3)), APP, 0, {})
    os.unlink(table.uri)
    os.rename(aside, table.uri)
    assert append(table, [1], 0).version == 1


_FULL_DISK = """
import os, resource, sys
from pathlib import Path
import pyarrow as pa
from telematics_assets.catalog import TableName
from telematics_assets.errors import VolumeUnavailableError
from telematics_assets.lakehouse.delta import DeltaLakehouse

lakehouse, name = DeltaLakehouse(Path(sys.argv[1])), TableName("a", "b", "c")
schema = pa.schema([("data", pa.binary())])
table = lakehouse.create(name, schema, "", {})
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))

def rows():
    for _ in range(200):
        yield pa.record_batch([pa.array([os.urandom(1 << 20)])], schema=schema)

try:
    table.append(schema, rows(), "app", 0, {})
except VolumeUnavailableError as error:
    print(error)
else:
    sys.exit("the disk took it")
table = lakehouse.open(name)
assert (table.version, table.count()) == (0, 0)
"""


def test_a_disk_that_is_full_in_the_middle_of_a_stream_is_transient_and_commits_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_constraint_is_the_tables_fault(local: DeltaLakehouse, grown: Table) -> None:
    DeltaTable(grown.uri).alter.add_constraint({"small": "n < 1000"})
    with pytest.raises(TableUnsupportedError, match="the constraint small"):
        reopened(local).append(SCHEMA, (batch([n]) for n in range(990, 3000)), APP, 3, {})
    with pytest.raises(TableUnsupportedError, match="the constraint small"):
        rewrite(reopened(local), [7], new=1)
    assert reopened(local).position(APP) == 2
    assert len(numbers(local)) == 6


# -- what may not be written, and what comes with a column -------------------------------------------------------------


def entry(table: Table, *actions: dict[str, Any]) -> None:
    """Another writer's log entry behind the table's last."""
    version = len(log(table))
    path = Path(table.uri, "_delta_log", f"{version:020d}.json")
    path.write_text("".join(json.dumps(action) + "\n" for action in ({"commitInfo": {"operation": "X"}}, *actions)))


def metadata_of(table: Table) -> dict[str, Any]:
    first = Path(table.uri, "_delta_log", f"{0:020d}.json").read_text().splitlines()
    found: dict[str, Any] = next(json.loads(line)["metaData"] for line in first if '"metaData"' in line)
    return found


def protocol(*features: str, reader: tuple[str, ...] = ()) -> dict[str, Any]:
    versions = {"minReaderVersion": 3 if reader else 1, "minWriterVersion": 7}
    named = {"readerFeatures": list(reader)} if reader else {}
    return {"protocol": {**versions, **named, "writerFeatures": list(features)}}


REFUSED_FEATURES = ["rowTracking", "inCommitTimestamp", "allowColumnDefaults", "clustering", "of the future"]


@pytest.mark.parametrize("feature", REFUSED_FEATURES)
def test_a_feature_that_we_do_not_honour_is_refused_by_name(local: DeltaLakehouse, feature: str) -> None:
    table = create(local)
    entry(table, protocol(feature))
    with pytest.raises(TelematicsError, match=feature.partition(" ")[0]):
        append(reopened(local), [1], 0)
    assert len(log(table)) == 2
    assert data_files(table) == []


def changed_column(table: Table, **changes: Any) -> dict[str, Any]:
    metadata = metadata_of(table)
    schema = json.loads(metadata["schemaString"])
    schema["fields"][0].update(changes)
    return {"metaData": {**metadata, "schemaString": json.dumps(schema)}}


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"delta.invariants": '{"expression":{"expression":"n > 5"}}'}, "an invariant of column 'n'"),
        ({"delta.generationExpression": "1 + 1"}, "a generated value of column 'n'"),
    ],
)
def test_a_rule_of_a_column_is_refused(local: DeltaLakehouse, rule: dict[str, str], said: str) -> None:
    table = create(local)
    entry(table, changed_column(table, metadata=rule), protocol("invariants", "generatedColumns"))
    with pytest.raises(TableUnsupportedError, match=said):
        append(reopened(local), [1], 0)
    assert data_files(table) == []


def test_a_column_that_must_have_values_gets_them_or_nothing_is_written(local: DeltaLakehouse) -> None:
    table = create(local)
    entry(table, changed_column(table, nullable=False))
    append(reopened(local), [1, 2], 0)
    with pytest.raises(TableUnsupportedError, match=r"'n' of .*NOT NULL"):
        append(reopened(local), [3, None], 1)
    assert numbers(local) == [1, 2]
    assert len(data_files(table)) == 1


def test_a_column_that_must_have_values_inside_is_refused(local: DeltaLakehouse) -> None:
    schema = SCHEMA.append(pa.field("inner", pa.list_(pa.field("element", pa.int64(), nullable=False))))
    table = create(local, schema=schema)
    with pytest.raises(TableUnsupportedError, match="NOT NULL inside of column 'inner'"):
        table.append(schema, [batch([1], 0, schema, inner=[[1]])], APP, 0, {})


def test_a_partitioned_table_is_refused(local: DeltaLakehouse) -> None:
    table = create(local)
    entry(table, {"metaData": {**metadata_of(table), "partitionColumns": ["text"]}})
    with pytest.raises(TableUnsupportedError, match="partitioned by text"):
        append(reopened(local), [1], 0)


def test_names_that_stand_for_columns_are_refused(local: DeltaLakehouse) -> None:
    table = create(local)
    metadata = metadata_of(table)
    configuration = {**metadata["configuration"], "delta.columnMapping.mode": "name"}
    entry(table, {"metaData": {**metadata, "configuration": configuration}}, protocol("columnMapping"))
    with pytest.raises(TelematicsError, match=r"columnMapping|can't be opened"):
        append(reopened(local), [1], 0)
    assert data_files(table) == []


def test_a_table_with_deletion_vectors_takes_rows_but_is_not_overwritten(local: DeltaLakehouse) -> None:
    table = create(local)
    entry(table, protocol("deletionVectors", reader=("deletionVectors",)))
    append(reopened(local), [1], 0)
    with pytest.raises(TableUnsupportedError, match="deletionVectors"):
        rewrite(reopened(local), [7], new=1)


def test_changes_are_fed_from_what_was_added_and_removed(local: DeltaLakehouse) -> None:
    table = create(local)
    table.set_property("delta.enableChangeDataFeed", "true")
    append(reopened(local), [1, 2], 0)
    reopened(local).overwrite(SCHEMA, [batch([5])], {"new": 1}, {})
    fed = pa.table(DeltaTable(table.uri).load_cdf(starting_version=2).read_all())
    found = sorted(zip(fed["_change_type"].to_pylist(), fed["n"].to_pylist(), strict=True))
    assert found == [("delete", 1), ("delete", 2), ("insert", 1), ("insert", 2), ("insert", 5)]


def test_a_naive_timestamp_brings_its_feature_and_keeps_the_others(local: DeltaLakehouse) -> None:
    table = create(local)
    append(table, [1], 0)
    wider = SCHEMA.append(pa.field("local", pa.timestamp("us"))).append(pa.field("odd. näme", pa.string()))
    moment = datetime.datetime(2026, 1, 2)
    table.append(wider, [batch([2], 1, wider, local=[moment], **{"odd. näme": ["x"]})], APP, 1, {})
    found = DeltaTable(table.uri).protocol()
    assert (found.min_reader_version, found.min_writer_version) == (3, 7)
    assert found.reader_features == ["timestampNtz"]
    assert set(found.writer_features or ()) == {"appendOnly", "invariants", "timestampNtz"}
    assert reopened(local).read(["n", "local"]).sort_by("n").to_pylist() == [
        {"n": 1, "local": None},
        {"n": 2, "local": moment},
    ]
    append(reopened(local), [3], 2)
    assert pl.scan_delta(table.uri).select("local").collect().height == 3


@pytest.mark.parametrize(("cleaned", "first_is_there"), [("true", False), ("false", True)])
def test_expired_log_entries_go_with_a_checkpoint_unless_the_table_keeps_them(
    local: DeltaLakehouse, cleaned: str, first_is_there: bool
) -> None:
    table = create(local)
    table.set_property("delta.logRetentionDuration", "interval 1 hours")
    table.set_property("delta.enableExpiredLogCleanup", cleaned)
    table.set_property("delta.checkpointInterval", "3")
    for version in range(3):
        append(table, [version], version)
        for old in Path(table.uri, "_delta_log").iterdir():
            os.utime(old, (1_000_000_000 + version, 1_000_000_000 + version))
    for version in range(3, 6):
        append(table, [version], version)
    assert Path(table.uri, "_delta_log", f"{0:020d}.json").exists() == first_is_there
    assert numbers(local) == list(range(6))


def test_checkpoints_of_the_log_come_at_the_tables_interval(local: DeltaLakehouse) -> None:
    table = create(local)
    table.set_property("delta.checkpointInterval", "3")
    for version in range(5):
        append(table, [version], version)
    names = os.listdir(Path(table.uri, "_delta_log"))
    assert sorted(name[:20] for name in names if name.endswith(".checkpoint.parquet")) == [f"{2:020d}", f"{5:020d}"]
    assert numbers(local) == list(range(5))


def test_a_log_that_is_gone_gets_no_entry_without_a_beginning(local: DeltaLakehouse, grown: Table) -> None:
    shutil.rmtree(Path(grown.uri, "_delta_log"))
    with pytest.raises(TableMovedError, match="has lost its log"):
        append(grown, [1], 3)
    assert not Path(grown.uri, "_delta_log").exists()


@pytest.mark.parametrize(("lakehouse", "versions"), [("delta", 0), ("delta", 1), ("s3", 1)], indirect=["lakehouse"])
def test_a_table_that_was_created_in_the_place_of_a_dropped_one_gets_none_of_its_rows(
    lakehouse: Lakehouse, versions: int
) -> None:
    table = create(lakehouse)
    for version in range(versions):
        append(table, [version], version)

    def rows() -> Iterator[pa.RecordBatch]:
        yield batch([7])
        lakehouse.drop(NAME)
        successor = create(lakehouse)
        for version in range(versions):
            append(successor, [100], version, "another")

    with pytest.raises(TableMovedError, match="is another table by now"):
        table.append(SCHEMA, rows(), APP, 9, {})
    assert numbers(lakehouse) == [100] * versions


def test_a_compaction_puts_nothing_into_a_table_that_was_created_meanwhile(
    local: DeltaLakehouse, grown: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite = upkeep._rewrite

    def and_dropped(*arguments: Any) -> Any:
        adds = rewrite(*arguments)
        local.drop(NAME)
        for number in range(grown.version):
            append(create(local), [100 + number], number)
        return adds

    monkeypatch.setattr(upkeep, "_rewrite", and_dropped)
    with pytest.raises(TableMovedError, match="is another table by now"):
        grown.compact()
    assert numbers(local) == [100 + number for number in range(grown.version)]


def test_a_log_that_lost_its_newest_entries_gets_none_behind_a_gap(local: DeltaLakehouse, grown: Table) -> None:
    Path(log_entries.entry_path(grown.uri, grown.version)).unlink()
    with pytest.raises(TableMovedError, match="has lost its log"):
        append(grown, [1], 3)


def test_a_handle_shows_its_own_commit_though_another_came_behind_it(
    local: DeltaLakehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, other = create(local), reopened(local)
    publish = log_entries.publish

    def overtaken(*arguments: Any) -> bool:
        published = publish(*arguments)
        monkeypatch.undo()
        append(reopened(local), [2], 0, "other")
        return published

    monkeypatch.setattr(log_entries, "publish", overtaken)
    commit = append(table, [1], 0)
    assert (commit.version, table.version, table.position("other"), table.count()) == (1, 1, None, 1)
    assert append(other, [3], 0, "third").version == 3


def test_files_of_a_write_that_failed_are_taken_away(local: DeltaLakehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "TARGET_FILE_BYTES", 10_000)
    table = create(local)

    def rows() -> Iterator[pa.RecordBatch]:
        for number in range(20):
            yield batch(range(1000 * number, 1000 * number + 1000))
        assert len(data_files(table)) > 5
        raise MineError("mine")

    with pytest.raises(MineError):
        table.append(SCHEMA, rows(), APP, 0, {})
    assert data_files(table) == []


def test_what_is_written_is_plain_parquet(local: DeltaLakehouse) -> None:
    kinds = {
        "price": pa.decimal128(9, 2),
        "huge": pa.decimal128(38, 2),
        "at": pa.timestamp("us"),
        "tags": pa.list_(pa.field("element", pa.string())),
        "pairs": pa.map_(pa.string(), pa.int64()),
    }
    schema = pa.schema([*SCHEMA, *(pa.field(name, kind) for name, kind in kinds.items())])
    table = create(local, schema=schema)
    values = {"price": [1], "huge": [2], "at": [MODIFIED.replace(tzinfo=None)], "tags": [["a"]], "pairs": [[("k", 1)]]}
    table.append(schema, [batch([1], 0, schema, **values)], APP, 0, {})
    (file,) = data_files(table)
    footer = pq.read_metadata(file)
    physical = {footer.schema.column(i).path: footer.schema.column(i).physical_type for i in range(footer.num_columns)}
    assert physical["_source_file_modified_at"] == physical["at"] == "INT64"
    assert physical["price"] == "INT32"
    assert {"tags.list.element", "pairs.key_value.key", "pairs.key_value.value"} <= physical.keys()
    group = footer.row_group(0)
    assert {group.column(index).compression for index in range(footer.num_columns)} == {"SNAPPY"}
    assert footer.metadata is None
    assert pl.scan_delta(table.uri).collect().to_arrow()["price"].to_pylist() == [Decimal("1.00")]
