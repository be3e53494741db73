"""One merge by key: rows in, rows out, columns and positions, in one commit of the handle that is open."""

from __future__ import annotations

import random
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from telematics_assets.catalog import TableName
from telematics_assets.engines.spark.tables import SparkLakehouse
from telematics_assets.errors import CommitConflictError, SchemaError, TableUnsupportedError
from telematics_assets.lakehouse.base import Lakehouse, Table
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.lakehouse.merging import WIDE_COLUMNS
from telematics_assets.testing.memory import MemoryLakehouse

NAME = TableName("workspace", "01_bronze", "merged")
SCHEMA = pa.schema([("id", pa.int64()), ("Ünï select", pa.string()), ("order", pa.float64())])


@pytest.fixture(params=["delta", "large delta", "memory", pytest.param("spark", marks=pytest.mark.spark)])
def lakehouse(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lakehouse:
    if request.param == "large delta":
        # As if every file were too large to be held.
        monkeypatch.setattr("telematics_assets.lakehouse.merging.HELD_BYTES", -1)
    if request.param == "spark":
        # Only where it is asked for: it needs Spark.
        from telematics_assets_tests.conformance.spark import spark as session

        return SparkLakehouse(tmp_path, session)
    return MemoryLakehouse() if request.param == "memory" else DeltaLakehouse(tmp_path)


def made(lakehouse: Lakehouse, **properties: str) -> Table:
    names = SCHEMA.names if isinstance(lakehouse, MemoryLakehouse) else ["id", "Ünï_select", "order"]
    schema = pa.schema([field.with_name(name) for field, name in zip(SCHEMA, names, strict=True)])
    return lakehouse.create(NAME, schema, "rows", {"delta.enableChangeDataFeed": "true", **properties})


def rows_of(table: Table, *values: tuple[object, ...]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(table.schema.names, row, strict=True)) for row in values], table.schema)


def keys(*ids: int) -> pa.Table:
    return pa.table({"id": pa.array(ids, pa.int64())})


def shown(lakehouse: Lakehouse) -> list[tuple[object, ...]]:
    table = lakehouse.open(NAME)
    assert table is not None
    return pl.DataFrame(table.read()).sort("id").rows()


def test_rows_come_change_and_go_by_their_key(lakehouse: Lakehouse) -> None:
    table = made(lakehouse)
    first = table.merge(
        rows_of(table, (1, "a", 1.0), (2, "b", float("nan")), (3, None, 0.0)), keys(), ["id"], {"x": 7}, {}
    )
    assert (first.inserted, first.commit.transactions, table.version) == (3, {"x": 7}, 1)
    again = rows_of(table, (1, "a", 1.0), (2, "b", float("nan")), (3, None, -0.0), (4, "d", None))
    second = table.merge(again, keys(9), ["id"], {"x": 8}, {"why": "again"})
    assert (second.inserted, second.updated, second.deleted) == (1, 1, 0)
    third = table.merge(rows_of(table), keys(1, 4, 99), ["id"], {"x": 9, "y": 1}, {})
    assert (third.deleted, third.commit.transactions, table.position("x")) == (2, {"x": 9, "y": 1}, 9)
    assert [row[0] for row in shown(lakehouse)] == [2, 3]


def test_rows_of_very_many_columns_are_merged_in_one_commit(tmp_path: Path) -> None:
    names = [f"column_{i}" for i in range(WIDE_COLUMNS)]
    schema = pa.schema([("id", pa.int64()), *((name, pa.string()) for name in names)])
    table = DeltaLakehouse(tmp_path).create(NAME, schema, "rows", {"delta.enableChangeDataFeed": "true"})

    def rows(*values: tuple[int, str]) -> pa.Table:
        return pa.Table.from_pylist([{"id": number, **dict.fromkeys(names, text)} for number, text in values], schema)

    table.merge(rows((1, "a"), (2, "b"), (3, "c")), keys(), ["id"], {"x": 1}, {})
    done = table.merge(rows((1, "a"), (2, "B"), (4, "d")), keys(3), ["id"], {"x": 2}, {})
    assert (done.inserted, done.updated, done.deleted, table.version, table.position("x")) == (1, 1, 1, 2, 2)
    assert pl.DataFrame(table.read(["id", names[-1]])).sort("id").rows() == [(1, "a"), (2, "B"), (4, "d")]
    feed = pl.DataFrame(DeltaTable(table.uri).load_cdf(2, 2, columns=["id", "_change_type"]).read_all())
    assert sorted(feed.rows()) == [(2, "update_postimage"), (2, "update_preimage"), (3, "delete"), (4, "insert")]


def test_positions_are_committed_although_no_row_changes(lakehouse: Lakehouse) -> None:
    table = made(lakehouse)
    table.merge(rows_of(table, (1, "a", 1.0)), keys(), ["id"], {"x": 1}, {})
    same = table.merge(rows_of(table, (1, "a", 1.0)), keys(), ["id"], {"x": 2}, {})
    none = table.merge(rows_of(table), keys(), ["id"], {"x": 3}, {})
    assert (same.updated, none.updated, table.version, table.position("x")) == (0, 0, 3, 3)
    # Spark writes files anew in which a key was found, whatever becomes of its row.
    assert same.commit.removes_data == isinstance(lakehouse, SparkLakehouse)


def test_columns_are_added_and_those_that_are_not_given_become_null_where_rows_change(lakehouse: Lakehouse) -> None:
    table = made(lakehouse)
    table.merge(rows_of(table, (1, "a", 1.0), (2, "b", 2.0)), keys(), ["id"], {"x": 1}, {})
    name = table.schema.names[1]
    comment = pa.field("neu", pa.decimal128(5, 2), metadata={"comment": "said"})
    schema = pa.schema([table.schema.field("id"), table.schema.field(name), comment])
    given = pa.Table.from_pylist([{"id": 1, name: "a", "neu": None}, {"id": 2, name: "c", "neu": None}], schema)
    table.merge(given, keys(), ["id"], {"x": 2}, {})
    assert shown(lakehouse) == [(1, "a", 1.0, None), (2, "c", None, None)]
    opened = lakehouse.open(NAME)
    assert opened is not None
    assert opened.schema.field("neu").metadata[b"comment"] == b"said"


def test_a_column_of_a_type_that_is_a_feature_of_the_table_is_added(lakehouse: Lakehouse) -> None:
    table = made(lakehouse)
    table.merge(rows_of(table, (1, "a", 1.0)), keys(), ["id"], {"x": 1}, {})
    local = pa.field("local", pa.timestamp("us"), metadata={"comment": "said"})
    given = pa.Table.from_pylist([{"id": 1, "local": None}, {"id": 7, "local": 8}], pa.schema([SCHEMA[0], local]))
    done = table.merge(given, keys(), ["id"], {"x": 2}, {})
    assert (done.inserted, done.updated, table.version) == (1, 0, 2)
    found = lakehouse.open(NAME)
    assert found is not None
    assert found.schema.field("local").metadata[b"comment"] == b"said"
    assert [row[-1] is None for row in shown(lakehouse)] == [True, False]


def test_whoever_committed_in_between_makes_it_a_conflict(lakehouse: Lakehouse) -> None:
    table = made(lakehouse)
    table.merge(rows_of(table, (1, "a", 1.0)), keys(), ["id"], {"x": 1}, {})
    other = lakehouse.open(NAME)
    assert other is not None
    other.merge(rows_of(table, (2, "b", 1.0)), keys(), ["id"], {"y": 1}, {})
    for rows in (rows_of(table, (1, "late", 1.0)), rows_of(table, (1, "a", 1.0)), rows_of(table)):
        with pytest.raises(CommitConflictError):
            table.merge(rows, keys(), ["id"], {"x": 2}, {})
    assert len(shown(lakehouse)) == 2


def test_delta_casts_nothing_silently(tmp_path: Path) -> None:
    table = made(DeltaLakehouse(tmp_path))
    wrong = rows_of(table, (1, "a", 1.0)).set_column(0, "id", pa.array([2.5]))
    with pytest.raises(SchemaError, match="'id'"):
        table.merge(wrong, keys(), ["id"], {"x": 1}, {})
    with pytest.raises(SchemaError, match="'id'"):
        table.merge(rows_of(table), pa.table({"id": ["1"]}), ["id"], {"x": 1}, {})
    assert table.version == 0


def test_a_table_that_only_grows_is_refused(tmp_path: Path) -> None:
    table = made(DeltaLakehouse(tmp_path), **{"delta.appendOnly": "true"})
    table.merge(rows_of(table, (1, "a", 1.0)), keys(), ["id"], {"x": 1}, {})
    with pytest.raises(TableUnsupportedError, match="appendOnly"):
        table.merge(rows_of(table, (1, "b", 1.0)), keys(), ["id"], {"x": 2}, {})


@pytest.mark.parametrize("by_ourselves", [False, True])
def test_the_change_data_feed_shows_changes_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_ourselves: bool
) -> None:
    if by_ourselves:
        monkeypatch.setattr("telematics_assets.lakehouse.merging.HELD_BYTES", -1)
    table = made(DeltaLakehouse(tmp_path))
    table.merge(rows_of(table, (1, "a", 1.0), (2, "b", 2.0), (3, "c", 3.0)), keys(), ["id"], {"x": 1}, {})
    merged = table.merge(rows_of(table, (1, "a", 1.0), (2, "B", 2.0)), keys(3), ["id"], {"x": 2}, {}, ["order"])
    table.make_durable(merged.commit)
    feed = pl.DataFrame(DeltaTable(table.uri).load_cdf(starting_version=2).read_all())
    seen = feed.select("id", "_change_type").sort("id", "_change_type").rows()
    assert seen == [(2, "update_postimage"), (2, "update_preimage"), (3, "delete")]
    images = feed.filter(pl.col("id") == 2).sort("_change_type")["Ünï_select"].to_list()
    assert images == ["B", "b"]


def test_long_rows_are_merged_by_rewriting_only_the_files_that_have_changed_ones(tmp_path: Path) -> None:
    table = made(DeltaLakehouse(tmp_path))
    text = random.Random(7).randbytes(1_000_000).hex()
    for start in (1, 4, 7):
        added = rows_of(table, *((start + n, f"{text}{n}", 1.0) for n in range(3)))
        table.append(table.schema, added.to_batches(), "x", start, {})
    before = set(DeltaTable(table.uri).file_uris())
    changed = rows_of(table, (4, f"{text}0", 1.0), (5, "short", 2.0), (99, f"{text}99", None))
    done = table.merge(changed, keys(7), ["id"], {"x": 8}, {})
    assert (done.inserted, done.updated, done.deleted, done.commit.operation) == (1, 1, 1, "MERGE")
    opened = DeltaTable(table.uri)
    assert opened.history(1)[0]["engineInfo"] == "telematics_assets"
    assert len(before & set(opened.file_uris())) == 1
    found = pl.DataFrame(table.read()).sort("id")
    assert found["id"].to_list() == [1, 2, 3, 4, 5, 6, 8, 9, 99]
    assert found["Ünï_select"].str.len_chars().to_list()[3:6] == [2_000_001, 5, 2_000_001]
    feed = pl.DataFrame(DeltaTable(table.uri).load_cdf(starting_version=4).read_all())
    seen = feed.select("id", "_change_type").sort("id", "_change_type").rows()
    assert seen == [(5, "update_postimage"), (5, "update_preimage"), (7, "delete"), (99, "insert")]


def test_columns_that_do_not_count_alone_change_no_row(lakehouse: Lakehouse) -> None:
    table = made(lakehouse)
    table.merge(rows_of(table, (1, "a", 1.0)), keys(), ["id"], {"x": 1}, {})
    assert table.merge(rows_of(table, (1, "a", 5.0)), keys(), ["id"], {"x": 2}, {}, ["order"]).updated == 0
    assert shown(lakehouse) == [(1, "a", 1.0)]


def test_keys_of_every_type_are_told_apart_where_files_are_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("telematics_assets.lakehouse.merging.HELD_BYTES", -1)
    schema = pa.schema(
        [
            *(("t", pa.string()), ("i", pa.int32()), ("d", pa.date32()), ("z", pa.timestamp("us", "UTC"))),
            *(("n", pa.decimal128(28, 8)), ("v", pa.list_(pa.field("element", pa.string())))),
        ]
    )
    keys = ["t", "i", "d", "z", "n"]
    texts = ["o'c", 'a"b', "ü\\n", "", "x;--"]
    rows = pa.Table.from_pylist(
        [
            {"t": text, "i": n, "d": n, "z": 10**12 + n, "n": Decimal(n) / 1000, "v": ["a", None]}
            for n, text in enumerate(texts)
        ],
        schema,
    )
    table = DeltaLakehouse(tmp_path).create(NAME, schema, "rows", {"delta.enableChangeDataFeed": "true"})
    assert table.merge(rows, rows.slice(0, 0).select(keys), keys, {"x": 1}, {}).inserted == 5
    changed = rows.slice(0, 4).set_column(
        5, schema.field("v"), pa.array([["b"], ["a", None], [], None], schema.field("v").type)
    )
    done = table.merge(changed, rows.slice(4).select(keys), keys, {"x": 2}, {})
    assert (done.inserted, done.updated, done.deleted) == (0, 3, 1)
    assert [row["v"] for row in sorted(table.read().to_pylist(), key=lambda row: row["i"])] == [
        ["b"],
        ["a", None],
        [],
        None,
    ]


def test_two_changes_far_apart_in_a_large_table_take_little_memory(tmp_path: Path) -> None:
    code = f"""
import resource, numpy as np, pyarrow as pa
from pathlib import Path
from telematics_assets.catalog import TableName
from telematics_assets.lakehouse.delta import DeltaLakehouse
numbers = np.random.default_rng(7)
schema = pa.schema([("id", pa.string()), ("a", pa.int64()), ("b", pa.int64()), ("c", pa.int64()), ("d", pa.int64())])
table = DeltaLakehouse(Path({str(tmp_path)!r})).create(TableName("c", "s", "t"), schema, "", {{}})
def rows(part):
    ids = pa.array([f"{{n:016x}}" for n in numbers.integers(0, 2**60, 50_000)])
    others = [pa.array(numbers.integers(0, 2**62, 50_000)) for _ in range(4)]
    return pa.RecordBatch.from_arrays([ids, *others], schema=schema)
first = rows(0)
for part in range(4):
    table.append(schema, (first if not part + n else rows(part) for n in range(15)), "x", part, {{}})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
two = pa.Table.from_batches([first.slice(0, 2)]).set_column(1, "a", pa.array([1, 2]))
done = table.merge(two, two.slice(0, 0).select(["id"]), ["id"], {{"x": 9}}, {{}})
print(done.updated, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    updated, more = map(int, run.stdout.split())
    assert updated == 2
    assert more < 200 << 10


def test_the_empty_column_that_a_merge_of_spark_leaves_in_data_files_is_no_one_s(tmp_path: Path) -> None:
    table = made(DeltaLakehouse(tmp_path))
    for number in (1, 2):
        table.append(table.schema, rows_of(table, (number, "a", 1.0)).to_batches(), "x", number, {})
    for path in Path(table.uri).glob("*.parquet"):
        held = pq.read_table(path)
        pq.write_table(held.append_column("_change_type", pa.nulls(held.num_rows, pa.string())), path)
    expected = [(1, "a", 1.0), (2, "a", 1.0)]
    assert shown(DeltaLakehouse(tmp_path)) == expected
    assert table.compact()
    assert shown(DeltaLakehouse(tmp_path)) == expected
