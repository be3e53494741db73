"""Columns that get a wider type: all rows in one commit, exactly, whatever happens."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from telematics_assets.autoloader.loader import STEPS
from telematics_assets.catalog import Column, FileStream, Names
from telematics_assets.engines.base import IngestRequest, SchemaChange
from telematics_assets.engines.checkpointed import CheckpointEngine
from telematics_assets.errors import CommitConflictError, TableMovedError, TableUnsupportedError
from telematics_assets.lakehouse.base import STREAM_ID_PROPERTY
from telematics_assets_tests.conformance.platforms import LOCATION, CheckpointPlatform, DeltaPlatform, Platform
from telematics_assets_tests.conformance.samples import json_stream, lines, parquet, parquet_stream

MODE = "addNewColumnsWithTypeWidening"
STREAM = parquet_stream(schema_evolution_mode=MODE)
BIG = 2**40

#: A first file's values, a second one's, and what the column becomes; the values stay what they are.
WIDENINGS = [
    (pa.array([-128, None], pa.int8()), pa.array([-(2**15)], pa.int16()), "SMALLINT"),
    (pa.array([-128, None], pa.int8()), pa.array([255], pa.uint8()), "SMALLINT"),
    (pa.array([127, None], pa.int8()), pa.array([0.1]), "DOUBLE"),
    (pa.array([2**15 - 1, None], pa.int16()), pa.array([BIG]), "BIGINT"),
    (pa.array([2**31 - 1, None], pa.int32()), pa.array([BIG]), "BIGINT"),
    (pa.array([2**31 - 1, None], pa.int32()), pa.array([2**32 - 1], pa.uint32()), "BIGINT"),
    (pa.array([2**31 - 1, None], pa.int32()), pa.array([1.5], pa.float32()), "DOUBLE"),
    (pa.array([2**31 - 1, None], pa.int32()), pa.array([Decimal("999.25")]), "DECIMAL(12,2)"),
    (pa.array([2**63 - 1, None], pa.int64()), pa.array([Decimal("9.25")]), "DECIMAL(22,2)"),
    (pa.array([2**63 - 1, None], pa.int64()), pa.array([2**64 - 1], pa.uint64()), "DECIMAL(20,0)"),
    (pa.array([1.5, None], pa.float32()), pa.array([0.1]), "DOUBLE"),
    (pa.array([1.5, None], pa.float32()), pa.array([2**31 - 1], pa.int32()), "DOUBLE"),
    (pa.array([Decimal("99.9"), None]), pa.array([Decimal("1.123")]), "DECIMAL(5,3)"),
    (pa.array([Decimal("0.001"), None]), pa.array([7], pa.int32()), "DECIMAL(13,3)"),
    (pa.array([date(1, 1, 1), None]), pa.array([datetime(9999, 12, 31, 23, 59)]), "TIMESTAMP_NTZ"),
    (pa.array([[7, None], None], pa.list_(pa.int32())), pa.array([[BIG]]), "ARRAY<BIGINT>"),
    (
        pa.array([{"a": 7, "b": "x"}, None], pa.struct([("a", pa.int32()), ("b", pa.string())])),
        pa.array([{"a": BIG}]),
        "STRUCT<a: BIGINT, b: STRING>",
    ),
    (
        pa.array([[("k", 7)], None], pa.map_(pa.string(), pa.int32())),
        pa.array([[("k", BIG)]], pa.map_(pa.string(), pa.int64())),
        "MAP<STRING, BIGINT>",
    ),
]
#: The same with what can't be widened: the second file's values are rescued.
NO_WIDENINGS = [
    (pa.array([2**53 + 1, None]), pa.array([0.5])),
    (pa.array([0.5, None]), pa.array([2**53 + 1])),
    (pa.array([0.5, None]), pa.array([Decimal("0.1")])),
    (pa.array([1, None], pa.int32()), pa.array(["1"])),
    (pa.array(["1", None]), pa.array([1])),
    (pa.array([True, None]), pa.array([1])),
    (pa.array([date(2026, 1, 1), None]), pa.array([datetime(2026, 1, 1, tzinfo=UTC)])),
    (pa.array([1, None]), pa.array([Decimal("0." + "1" * 30)])),
    (pa.array([{"a": 1}, None]), pa.array([{"a": 1, "b": 2}])),
    (pa.array([[1], None]), pa.array([1])),
]


def load(platform: Platform, stream: FileStream, *files: dict[str, Any]) -> Any:
    """Land one file after the other, each in a batch of its own."""
    for columns in files:
        number = load.count = getattr(load, "count", 0) + 1  # type: ignore[attr-defined]
        platform.volume_put(f"parquet/{number}.parquet", parquet(columns), number)
        report = platform.engine.ingest(stream)
    return report


@pytest.mark.parametrize(("first", "second", "becomes"), WIDENINGS, ids=[f"{a.type}-{b.type}" for a, b, _ in WIDENINGS])
def test_a_wider_file_widens_the_column_and_every_value_stays(
    platform: Platform, first: pa.Array, second: pa.Array, becomes: str
) -> None:
    load(platform, STREAM, {"n": [1, 2], "v": first})
    had = platform.columns(STREAM)["v"]
    report = load(platform, STREAM, {"n": [3], "v": second})
    assert (report.rows, report.rows_rescued, report.table_rows) == (1, 0, 3)
    assert report.batches[0].schema_changes == (SchemaChange("v", becomes, had),)
    assert platform.columns(STREAM) == {"n": "BIGINT", "v": becomes}
    values = [row["v"] for row in platform.rows(STREAM, "n", "v")]
    if had == "DATE":
        first = first.cast(pa.timestamp("us"))
    if had.startswith("STRUCT"):
        second = pa.array([{"a": BIG, "b": None}])
    assert values == [*first.to_pylist(), *second.to_pylist()]
    assert all(b.expected_rows == b.added_rows for b in platform.engine.balance(STREAM, 0))
    # Files of the former type go on to fit.
    platform.restart()
    report = load(platform, STREAM, {"n": [4, 5], "v": first})
    assert (report.rows_rescued, report.batches[0].schema_changes) == (0, ())
    assert platform.restart().ingest(STREAM).batches == ()


@pytest.mark.parametrize(("first", "second"), NO_WIDENINGS, ids=[f"{a.type}-{b.type}" for a, b in NO_WIDENINGS])
def test_what_no_wider_type_holds_is_rescued(platform: Platform, first: pa.Array, second: pa.Array) -> None:
    load(platform, STREAM, {"n": [1, 2], "v": first})
    before = platform.columns(STREAM)
    report = load(platform, STREAM, {"n": [3], "v": second})
    assert (report.rows_rescued, report.batches[0].schema_changes) == (1, ())
    assert platform.columns(STREAM) == before


def test_without_the_mode_nothing_is_widened(platform: Platform) -> None:
    stream = parquet_stream()
    load(platform, stream, {"v": pa.array([1], pa.int32())})
    assert load(platform, stream, {"v": pa.array([BIG])}).rows_rescued == 1
    assert platform.columns(stream) == {"v": "INT"}


def test_one_batch_widens_twice_and_adds(platform: Platform) -> None:
    load(platform, STREAM, {"n": [1], "v": pa.array([1], pa.int16()), "w": pa.array([1], pa.int8())})
    platform.volume_put("parquet/a", parquet(n=[2], v=pa.array([BIG]), more=["x"]), 1)
    platform.volume_put("parquet/b", parquet(n=[3], v=pa.array([Decimal("0.5")]), more=pa.array([7])), 2)
    platform.volume_put("parquet/c", parquet(n=[4], v=pa.array([5], pa.int32()), w=[0.5]), 3)
    (batch,) = platform.engine.ingest(STREAM).batches
    assert batch.schema_changes == (
        SchemaChange("v", "DECIMAL(21,1)", "SMALLINT"),
        SchemaChange("w", "DOUBLE", "TINYINT"),
        SchemaChange("more", "STRING"),
    )
    assert platform.rows(STREAM, "n", "v", "w", "more", "_rescued_data") == [
        {"n": 1, "v": 1, "w": 1.0, "more": None, "_rescued_data": None},
        {"n": 2, "v": BIG, "w": None, "more": "x", "_rescued_data": None},
        {
            "n": 3,
            "v": Decimal("0.5"),
            "w": None,
            "more": None,
            "_rescued_data": f'{{"more":7,"_file_path":"{LOCATION}/parquet/b"}}',
        },
        {"n": 4, "v": 5, "w": 0.5, "more": None, "_rescued_data": None},
    ]


def test_the_first_batch_gets_the_widest_type(platform: Platform) -> None:
    stream = parquet_stream(Column("v", "INT", "A value."), schema_evolution_mode=MODE)
    platform.volume_put("parquet/a", parquet(n=pa.array([1], pa.int32()), v=pa.array([1], pa.int32())), 1)
    platform.volume_put("parquet/b", parquet(n=pa.array([2]), v=pa.array([BIG])), 2)
    (batch,) = platform.engine.ingest(stream).batches
    assert batch.rows_rescued == 0
    assert platform.columns(stream) == {"v": "BIGINT", "n": "BIGINT"}
    state = platform.engine.state(Names().bronze("readings"))
    assert state is not None
    assert state.columns[0].comment == "A value."


def test_a_table_without_rows_is_widened_too(platform: Platform) -> None:
    stream = parquet_stream(Column("v", "INT", "A value."), schema_evolution_mode=MODE, include_existing_files=False)
    assert platform.engine.ingest(stream).batches == ()
    report = load(platform, stream, {"v": [BIG]})
    assert report.batches[0].schema_changes == (SchemaChange("v", "BIGINT", "INT"),)
    assert platform.rows(stream, "v") == [{"v": BIG}]
    assert platform.restart().ingest(stream).batches == ()


def test_text_columns_stay_text(platform: Platform) -> None:
    stream = json_stream("v", schema_evolution_mode=MODE)
    platform.volume_put("json/a", lines('{"v":1}', '{"v":"x","w":1.5}'))
    assert platform.engine.ingest(stream).rows_rescued == 0
    assert platform.columns(stream) == {"v": "STRING", "w": "STRING"}


# -- the table ---------------------------------------------------------------------------------------------------------


EVERYTHING = {
    "b": pa.array([True, None]),
    "f": pa.array([float("nan"), -0.0], pa.float32()),
    "d": pa.array([Decimal("-99999.99999"), None]),
    "s": pa.array(["", "a\x00\U0010ffff"]),
    "x": pa.array([b"\x00\xff", None]),
    "day": pa.array([date(1, 1, 1), date(9999, 12, 31)]),
    "at": pa.array([datetime(9999, 12, 31, 23, 59, 59, 999999, UTC), None]),
    "ntz": pa.array([datetime(1, 1, 1), None]),
    "st": pa.array([{"a": None, "l": [{"m": [("k", None)]}]}, None], pa.struct([
        ("a", pa.int16()), ("l", pa.list_(pa.struct([("m", pa.map_(pa.string(), pa.date32()))])))])),
    "m": pa.array([[(1, {"a": [None, 1]})], []], pa.map_(pa.int64(), pa.struct([("a", pa.list_(pa.int8()))]))),
    "l": pa.array([[[]], [None, [1]]], pa.list_(pa.list_(pa.int32()))),
}  # fmt: skip


def described(table: DeltaTable) -> Any:
    """All that a table has beside its rows and its types."""
    about = table.metadata()
    columns = [(f.name, f.metadata) for f in table.schema().fields]
    return about.id, about.name, about.description, about.created_time, sorted(about.configuration.items()), columns


def test_everything_else_stays_as_it_was(delta_platform: DeltaPlatform) -> None:
    stream = parquet_stream(Column("v", "INT", "A value."), Column("day", "DATE", "A day."), schema_evolution_mode=MODE)
    load(delta_platform, stream, {"v": pa.array([1, 2], pa.int32()), **EVERYTHING})
    path = delta_platform.table_path(stream)
    before = DeltaTable(path)
    rows = delta_platform.rows(stream)
    report = load(delta_platform, stream, {"v": pa.array([BIG])})
    after = DeltaTable(path)
    assert described(after) == described(before)
    assert after.version() == before.version() + 1 == report.table_version
    assert after.protocol().reader_features == before.protocol().reader_features
    found = [row for row in delta_platform.rows(stream) if row["v"] < BIG]
    assert repr(sorted(found, key=lambda row: row["v"])) == repr(sorted(rows, key=lambda row: row["v"]))
    # Other readers, and the table as it was.
    assert sorted(pl.scan_delta(str(path)).select("v").collect()["v"].to_list()) == [1, 2, BIG]
    assert sorted(after.to_pyarrow_dataset().to_table(columns=["v"])["v"].to_pylist()) == [1, 2, BIG]
    former = DeltaTable(path, version=before.version()).to_pyarrow_table()
    assert (former.schema.field("v").type, sorted(former["v"].to_pylist())) == (pa.int32(), [1, 2])


def test_statistics_that_would_be_false_are_no_longer_kept(delta_platform: DeltaPlatform) -> None:
    load(delta_platform, STREAM, {"n": [1], "v": [1]})
    load(delta_platform, STREAM, {"n": [2], "v": pa.array([10**19 + 1], pa.uint64())})
    table = DeltaTable(delta_platform.table_path(STREAM))
    assert table.metadata().configuration["delta.dataSkippingStatsColumns"].split(",")[:2] == ["n", "_source_file"]
    most = [action["max"] for action in pa.table(table.get_add_actions()).to_pylist()]
    assert (max(values["n"] for values in most), any("v" in values for values in most)) == (2, False)
    beyond = pa.compute.field("v") > pa.scalar(Decimal(10**19), pa.decimal128(20, 0))
    assert table.to_pyarrow_dataset().to_table(filter=beyond)["n"].to_pylist() == [2]


def test_a_table_that_must_only_grow_is_left_as_it_is(delta_platform: DeltaPlatform) -> None:
    load(delta_platform, STREAM, {"v": pa.array([1], pa.int32())})
    path = delta_platform.table_path(STREAM)
    DeltaTable(path).alter.set_table_properties({"delta.appendOnly": "true"})
    before = DeltaTable(path).version()
    with pytest.raises(TableUnsupportedError, match="appendOnly"):
        load(delta_platform, STREAM, {"v": [BIG]})
    assert DeltaTable(path).version() == before


# -- others at the same table ------------------------------------------------------------------------------------------


def add_property(platform: DeltaPlatform) -> None:
    """Somebody sets a property."""
    DeltaTable(platform.table_path(STREAM)).alter.set_table_properties({"mine": "yes"}, raise_if_not_exists=False)


def add_rows(platform: DeltaPlatform) -> None:
    """Somebody appends rows."""
    table = DeltaTable(platform.table_path(STREAM))
    write_deltalake(table, table.to_pyarrow_table().slice(0, 1), mode="append")


def stopping(platform: CheckpointPlatform, step: str, action: Any) -> CheckpointEngine:
    """An engine that does something when it passes a step for the first time."""
    done: list[str] = []

    def on_step(passed: str) -> None:
        if passed == step and not done:
            done.append(step)
            action()

    return platform.engine_over(on_step=on_step)


def in_a_thread(action: Any) -> Any:
    """Steps are passed on a thread of delta-rs, which can't enter delta-rs again."""
    from concurrent.futures import ThreadPoolExecutor

    def run() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(action).result()

    return run


@pytest.mark.parametrize("meddle", [add_property, add_rows])
@pytest.mark.parametrize("wide", [pa.array([BIG]), pa.array([BIG], pa.uint64())], ids=["BIGINT", "DECIMAL"])
def test_a_commit_of_somebody_else_in_between_is_never_undone(
    delta_platform: DeltaPlatform, meddle: Any, wide: pa.Array
) -> None:
    load(delta_platform, STREAM, {"v": pa.array([1], pa.int32())})
    delta_platform.volume_put("parquet/wide", parquet(v=wide))
    engine = stopping(delta_platform, "opened", lambda: meddle(delta_platform))
    with pytest.raises(CommitConflictError, match="first"):
        engine.ingest(STREAM)
    assert delta_platform.columns(STREAM) == {"v": "INT"}
    delta_platform.restart().ingest(STREAM)
    there = [1, 1, BIG] if meddle is add_rows else [1, BIG]
    assert [int(row["v"]) for row in delta_platform.rows(STREAM, "v")] == there


@pytest.mark.parametrize("step", STEPS[STEPS.index("opened") :])
def test_two_loaders_widen_once(checkpoint_platform: CheckpointPlatform, step: str) -> None:
    if step in ("table_created", "metadata_published"):
        return
    load(checkpoint_platform, STREAM, {"v": pa.array([1], pa.int32())})
    checkpoint_platform.volume_put("parquet/wide", parquet(v=[BIG]))
    other = in_a_thread(lambda: checkpoint_platform.new_engine().ingest(STREAM))
    stopping(checkpoint_platform, step, other).ingest(STREAM)
    checkpoint_platform.restart()
    assert [row["v"] for row in checkpoint_platform.rows(STREAM, "v")] == [1, BIG]
    assert all(b.expected_rows == b.added_rows for b in checkpoint_platform.engine.balance(STREAM, 0))
    assert checkpoint_platform.engine.ingest(STREAM).batches == ()


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the package catches it."""


def kill() -> None:
    """Die where one stands."""
    raise Killed


@pytest.mark.parametrize("wide", [pa.array([BIG]), pa.array([BIG], pa.uint64())], ids=["BIGINT", "DECIMAL"])
@pytest.mark.parametrize("step", [s for s in STEPS if s not in ("table_created", "metadata_published")])
def test_a_widening_that_dies_at_any_step_is_finished_by_the_next(
    checkpoint_platform: CheckpointPlatform, step: str, wide: pa.Array
) -> None:
    load(checkpoint_platform, STREAM, {"v": pa.array([1], pa.int32())})
    checkpoint_platform.volume_put("parquet/wide", parquet(v=wide))
    with pytest.raises(Killed):
        stopping(checkpoint_platform, step, kill).ingest(STREAM)
    checkpoint_platform.volume_put("parquet/after", parquet(v=[BIG + 1]))
    report = checkpoint_platform.restart().ingest(STREAM)
    assert [int(row["v"]) for row in checkpoint_platform.rows(STREAM, "v")] == [1, BIG, BIG + 1]
    assert all(b.expected_rows == b.added_rows for b in checkpoint_platform.engine.balance(STREAM, 0))
    widened = [change for batch in report.batches for change in batch.schema_changes]
    if STEPS.index(step) < STEPS.index("commit_published"):
        assert [(change.column, change.previous) for change in widened] == [("v", "INT")]
    assert checkpoint_platform.restart().ingest(STREAM).batches == ()


def test_rows_that_somebody_else_rewrites_are_still_refused(delta_platform: DeltaPlatform) -> None:
    load(delta_platform, STREAM, {"v": pa.array([1], pa.int32())}, {"v": [BIG]})
    path = delta_platform.table_path(STREAM)
    rows = DeltaTable(path).to_pyarrow_table()
    write_deltalake(DeltaTable(path), rows, mode="overwrite")
    with pytest.raises(TableMovedError, match="removed by somebody else"):
        load(delta_platform, STREAM, {"v": [BIG]})
    assert DeltaTable(path).metadata().configuration[STREAM_ID_PROPERTY]


def test_a_ledger_can_be_rebuilt_from_a_widened_table(delta_platform: DeltaPlatform) -> None:
    load(delta_platform, STREAM, {"v": pa.array([1], pa.int32())}, {"v": [BIG]})
    delta_platform.engine.reset(STREAM, rebuild=True)
    assert delta_platform.restart().ingest(STREAM).batches == ()
    report = load(delta_platform, STREAM, {"v": pa.array([Decimal("0.5")])})
    assert report.batches[0].schema_changes == (SchemaChange("v", "DECIMAL(21,1)", "BIGINT"),)
    assert [row["v"] for row in delta_platform.rows(STREAM, "v")] == [Decimal("0.5"), 1, BIG]


def test_the_mode_may_come_later_and_the_rescued_stay_rescued(platform: Platform) -> None:
    narrow = parquet_stream()
    load(platform, narrow, {"n": [1], "v": pa.array([1], pa.int32())}, {"n": [2], "v": [BIG]})
    stream = dataclasses.replace(narrow, options=STREAM.options)
    load(platform, stream, {"n": [3], "v": [BIG]})
    rows = platform.rows(stream, "n", "v", "_rescued_data")
    assert [row["v"] for row in rows] == [1, None, BIG]
    assert json.loads(rows[1]["_rescued_data"])["v"] == BIG


def test_new_columns_of_text_are_still_inferred(platform: Platform) -> None:
    stream = json_stream("n", schema_evolution_mode=MODE, infer_column_types=True)
    platform.volume_put("json/a", lines('{"n":1}'), 1)
    platform.engine.ingest(stream)
    platform.volume_put("json/b", lines('{"n":2,"v":7}'), 2)
    platform.volume_put("json/c", lines(f'{{"n":3,"v":{BIG}.5}}'), 3)
    assert platform.engine.ingest(stream).rows == 2
    platform.volume_put("json/d", lines('{"n":4,"v":"text"}'), 4)
    assert platform.engine.ingest(stream).rows_rescued == 1
    assert [row["n"] for row in platform.rows(stream, "n")] == ["1", "2", "3", "4"]
    assert platform.columns(stream)["v"] != "STRING"


def test_a_full_refresh_gives_the_widest_type_at_once(checkpoint_platform: CheckpointPlatform) -> None:
    load(checkpoint_platform, STREAM, {"v": pa.array([1], pa.int32())}, {"v": [BIG]})
    checkpoint_platform.engine.ingest(STREAM, IngestRequest(full_refresh=True))
    assert checkpoint_platform.columns(STREAM) == {"v": "BIGINT"}
    assert [row["v"] for row in checkpoint_platform.rows(STREAM, "v")] == [1, BIG]
    load(checkpoint_platform, STREAM, {"v": pa.array([Decimal("0.5")])})
    assert [row["v"] for row in checkpoint_platform.rows(STREAM, "v")] == [Decimal("0.5"), 1, BIG]
    assert checkpoint_platform.restart().ingest(STREAM).batches == ()
