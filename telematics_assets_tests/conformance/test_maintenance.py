"""Maintenance: what is kept small, and that nothing of it is seen in rows, states or promises."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from telematics_assets.autoloader.loader import STEPS
from telematics_assets.catalog import FileStream
from telematics_assets.errors import TableMovedError, TableUnsupportedError
from telematics_assets_tests.conformance.platforms import CheckpointPlatform, DeltaPlatform, Platform
from telematics_assets_tests.conformance.samples import json_stream, lines, parquet, parquet_stream

DAY_S = 86_400


class Killed(BaseException):
    """Stands for SIGKILL inside one process: no handler of the package catches it."""


def fill(platform: Platform, stream: FileStream, waves: int = 5, first: int = 0) -> None:
    """Load some batches of one file each."""
    for wave in range(first, first + waves):
        platform.volume_put(f"json/{wave}.json", lines(f'{{"n":{wave}}}', f'{{"n":{wave + 1000}}}'))
        platform.engine.ingest(stream)


def numbers(platform: Platform, stream: FileStream) -> list[int]:
    """What the table holds."""
    return sorted(int(row["n"]) for row in platform.rows(stream, "n"))


def grow_old(platform: DeltaPlatform, stream: FileStream, days: float) -> None:
    """Make files of the table and its log look as if they were written some days ago."""
    when = time.time() - days * DAY_S
    for path in platform.table_path(stream).rglob("*"):
        if path.is_file():
            os.utime(path, (when, when))


def data_files(platform: DeltaPlatform, stream: FileStream) -> set[str]:
    """Names of the data files on disk."""
    return {path.name for path in platform.table_path(stream).glob("*.parquet")}


def test_a_stream_that_never_began_needs_no_maintenance(platform: Platform) -> None:
    report = platform.engine.maintain(json_stream("n"))
    assert report.table_version is None
    assert report.notes == ("the stream has no table yet",)


def test_rows_states_and_promises_stay_and_loading_goes_on(platform: Platform) -> None:
    stream = json_stream("n")
    fill(platform, stream)
    rows, states = platform.rows(stream), platform.states(stream)
    seen: list[str] = []
    report = platform.engine.maintain(stream, lambda progress: seen.append(progress.phase))
    assert report.files_after <= report.files_before
    assert platform.engine.read(platform.engine.names.bronze(stream.table)).to_pylist() == rows
    assert platform.states(stream) == states
    assert {"compact", "vacuum", "ledger"} <= set(seen)
    again = platform.restart()
    assert again.ingest(stream).batches == ()
    assert (
        [b.expected_rows for b in again.balance(stream, 0)]
        == [b.added_rows for b in again.balance(stream, 0)]
        == [2] * 5
    )
    fill(platform, stream, first=5)
    assert len(numbers(platform, stream)) == 20


def test_the_ledger_is_merged_and_superseded_files_go(checkpoint_platform: CheckpointPlatform) -> None:
    stream = json_stream("n", max_files_per_trigger=1)
    for wave in range(21):
        checkpoint_platform.volume_put(f"json/{wave}.json", lines(f'{{"n":{wave}}}'))
    checkpoint_platform.engine.ingest(stream)
    last = max(name for name in checkpoint_platform.checkpoint(stream) if name.startswith("commits/"))
    lost = f"results/{last.removeprefix('commits/')}.0123456789ab"
    checkpoint_platform.volume_put(f"_checkpoints/{stream.name}/{lost}", b"{}")
    states = checkpoint_platform.states(stream)
    report = checkpoint_platform.engine.maintain(stream)
    assert (report.ledger_parts_before, report.ledger_parts_after) == (7, 1)
    left = checkpoint_platform.checkpoint(stream)
    assert len(left) == 5
    assert lost not in left
    assert checkpoint_platform.restart().ingest(stream).batches == ()
    assert checkpoint_platform.states(stream) == states
    assert checkpoint_platform.engine.maintain(stream).ledger_parts_before == 1


def test_a_merge_that_races_with_a_loaders_own_merge_loses_nothing(checkpoint_platform: CheckpointPlatform) -> None:
    """A loader that is about to merge its batches has listed the ledger before maintenance merged a part of them."""
    stream = json_stream("n", max_files_per_trigger=1)

    def land(first: int, count: int) -> None:
        for wave in range(first, first + count):
            checkpoint_platform.volume_put(f"json/{wave:03}.json", lines(f'{{"n":{wave}}}'))

    land(0, 13)
    checkpoint_platform.engine.ingest(stream)
    before = checkpoint_platform.checkpoint(stream)
    checkpoint_platform.restart().maintain(stream)
    merged = {name: data for name, data in checkpoint_platform.checkpoint(stream).items() if name.startswith("ledger")}
    # The loader's segment of batches 8 to 15 stands beside the one of batches 0 to 12.
    checkpoint_platform.put_checkpoint(stream, before)
    land(13, 4)
    checkpoint_platform.restart().ingest(stream)
    both = checkpoint_platform.checkpoint(stream) | merged
    checkpoint_platform.put_checkpoint(stream, both)
    engine = checkpoint_platform.restart()
    assert engine.ingest(stream).batches == ()
    assert numbers(checkpoint_platform, stream) == list(range(17))
    assert engine.look(stream).known == 17
    assert [b.expected_rows for b in engine.balance(stream, 0)] == [1] * 17
    assert engine.maintain(stream).ledger_parts_after == 1
    assert checkpoint_platform.restart().look(stream).known == 17


def test_small_files_become_one_with_the_same_rows_in_the_same_order(delta_platform: DeltaPlatform) -> None:
    stream = parquet_stream()
    for wave in range(6):
        columns: dict[str, Any] = {
            "n": pa.array([wave, None], pa.int64()),
            "price": pa.array([Decimal("12345678901234567890.123456") + wave, None], pa.decimal128(30, 6)),
            "nested": pa.array([{"a": [wave]}, None], pa.struct([("a", pa.list_(pa.int32()))])),
            "pairs": pa.array([[("k", wave)], None], pa.map_(pa.string(), pa.int64())),
        }
        if wave > 3:
            columns["later"] = [float(wave), float("nan")]
        delta_platform.volume_put(f"parquet/{wave}.parquet", parquet(columns))
        delta_platform.engine.ingest(stream)
    path = str(delta_platform.table_path(stream))
    before = DeltaTable(path).to_pyarrow_table()
    report = delta_platform.engine.maintain(stream)
    assert (report.files_before, report.files_after) == (6, 1)
    table = DeltaTable(path)
    after = table.to_pyarrow_table()
    assert after.schema == before.schema
    # As text: a NaN is not equal to itself.
    assert str(after.to_pylist()) == str(before.to_pylist())
    (stats,) = pa.table(table.get_add_actions(flatten=True)).to_pylist()
    assert (stats["min.n"], stats["max.n"], stats["null_count.n"]) == (0, 5, 6)
    assert "min.price" not in stats
    assert "max.price" not in stats
    newest = delta_platform.engine.read(delta_platform.engine.names.bronze(stream.table), ["_batch_id"], limit=2)
    assert newest.to_pylist() == [{"_batch_id": 5}] * 2
    assert delta_platform.engine.maintain(stream).table_version == report.table_version


def test_only_files_that_nobody_needs_are_removed_and_only_when_they_are_old(delta_platform: DeltaPlatform) -> None:
    stream = json_stream("n")
    fill(delta_platform, stream, 3)
    folder = delta_platform.table_path(stream)
    small = data_files(delta_platform, stream)
    (folder / "part-killed-old.parquet").write_bytes(b"PAR1" * 25)
    (folder / "part-running.parquet").write_bytes(b"PAR1")
    os.utime(folder / "part-killed-old.parquet", (time.time() - 8 * DAY_S,) * 2)
    report = delta_platform.engine.maintain(stream)
    assert (report.files_removed, report.bytes_removed) == (1, 100)
    assert small < data_files(delta_platform, stream)
    assert "part-running.parquet" in data_files(delta_platform, stream)
    assert numbers(delta_platform, stream) == [0, 1, 2, 1000, 1001, 1002]


def test_an_idle_stream_opens_and_balances_after_its_log_entries_expired(delta_platform: DeltaPlatform) -> None:
    stream = json_stream("n")
    fill(delta_platform, stream, 3)
    assert delta_platform.engine.maintain(stream).log_entries_removed == 0
    grow_old(delta_platform, stream, 40)
    report = delta_platform.restart().maintain(stream)
    assert report.log_entries_removed >= 4
    log = delta_platform.table_path(stream) / "_delta_log"
    assert not (log / f"{1:020}.json").exists()
    engine = delta_platform.restart()
    assert engine.balance(stream, 0) == []
    assert engine.ingest(stream).batches == ()
    fill(delta_platform, stream, 1, first=3)
    assert [b.batch_id for b in engine.balance(stream, 0)] == [3]
    assert len(numbers(delta_platform, stream)) == 8


def test_entries_that_went_without_being_proven_are_still_refused(delta_platform: DeltaPlatform) -> None:
    stream = json_stream("n")
    fill(delta_platform, stream, 2)
    table = DeltaTable(str(delta_platform.table_path(stream)))
    table.optimize.compact()
    table.optimize.z_order(["n"])
    table.create_checkpoint()
    (delta_platform.table_path(stream) / "_delta_log" / f"{table.version() - 1:020}.json").unlink()
    with pytest.raises(TableMovedError, match="no longer holds version"):
        delta_platform.restart().ingest(stream)


def test_rows_that_somebody_removed_are_named_and_nothing_is_done(delta_platform: DeltaPlatform) -> None:
    stream = json_stream("n")
    fill(delta_platform, stream, 3)
    table = DeltaTable(str(delta_platform.table_path(stream)))
    table.delete("n = '1'")
    with pytest.raises(TableMovedError, match="removed by somebody else"):
        delta_platform.restart().maintain(stream)
    assert DeltaTable(str(delta_platform.table_path(stream))).version() == table.version()


def test_a_table_with_deletion_vectors_is_named(delta_platform: DeltaPlatform) -> None:
    stream = json_stream("n")
    fill(delta_platform, stream, 1)
    entry = delta_platform.table_path(stream) / "_delta_log" / f"{2:020}.json"
    features = '"readerFeatures":["deletionVectors"],"writerFeatures":["deletionVectors"]'
    entry.write_text(
        '{"commitInfo":{"operation":"UPGRADE PROTOCOL"}}\n'
        f'{{"protocol":{{"minReaderVersion":3,"minWriterVersion":7,{features}}}}}\n'
    )
    with pytest.raises(TableUnsupportedError, match="deletion vectors"):
        delta_platform.restart().maintain(stream)


@pytest.mark.parametrize("step", STEPS[5:])
def test_a_load_that_maintenance_overtakes_at_any_step_is_whole(delta_platform: DeltaPlatform, step: str) -> None:
    stream = json_stream("n")
    fill(delta_platform, stream, 3)
    delta_platform.volume_put("json/new.json", lines('{"n":7,"later":1}'))
    reports = []

    def maintain() -> None:
        # Steps are passed on a thread of delta-rs, which can't enter delta-rs again.
        with ThreadPoolExecutor(1) as pool:
            reports.append(pool.submit(delta_platform.new_engine().maintain, stream).result())

    engine = delta_platform.engine_when(time.time_ns, once(step, maintain))
    assert engine.ingest(stream).rows == 1
    assert [report.notes for report in reports] == [()]
    assert delta_platform.restart().ingest(stream).batches == ()
    assert numbers(delta_platform, stream) == [0, 1, 2, 7, 1000, 1001, 1002]
    assert all(b.expected_rows == b.added_rows for b in delta_platform.engine.balance(stream, 0))


@pytest.mark.parametrize("phase", ["compact", "vacuum", "log", "ledger", "clean"])
def test_maintenance_that_a_load_overtakes_or_that_dies_there_is_harmless(
    delta_platform: DeltaPlatform, phase: str
) -> None:
    stream = json_stream("n")
    fill(delta_platform, stream, 9)

    def load() -> None:
        fill_more = delta_platform.new_engine()
        delta_platform.volume_put("json/new.json", lines('{"n":7,"later":1}'))
        fill_more.ingest(stream)

    overtaken = delta_platform.new_engine().maintain(stream, lambda p: load() if p.phase == phase else None)
    assert overtaken.notes == ()

    def die(progress: Any) -> None:
        if progress.phase == phase:
            raise Killed

    delta_platform.volume_put("json/newer.json", lines('{"n":8}'))
    delta_platform.restart().ingest(stream)
    with pytest.raises(Killed):
        delta_platform.new_engine().maintain(stream, die)
    assert delta_platform.restart().ingest(stream).batches == ()
    assert len(numbers(delta_platform, stream)) == 20
    assert all(b.expected_rows == b.added_rows for b in delta_platform.engine.balance(stream, 0))


def test_loads_and_maintenance_of_several_processes_at_once_lose_and_double_nothing(
    delta_platform: DeltaPlatform, soak_factor: int
) -> None:
    stream = json_stream("n", max_files_per_trigger=1)
    fill(delta_platform, stream, 1)
    waves = 6 * soak_factor

    def load() -> None:
        engine = delta_platform.new_engine()
        for wave in range(1, waves):
            delta_platform.volume_put(f"json/{wave}.json", lines(f'{{"n":{wave}}}', f'{{"n":{wave + 1000}}}'))
            engine.ingest(stream)

    def maintain() -> None:
        for _ in range(waves):
            delta_platform.new_engine().maintain(stream)

    with ThreadPoolExecutor(3) as pool:
        for job in [pool.submit(load), pool.submit(maintain), pool.submit(maintain)]:
            job.result()
    delta_platform.restart().ingest(stream)
    assert numbers(delta_platform, stream) == sorted([*range(waves), *range(1000, 1000 + waves)])
    assert all(b.expected_rows == b.added_rows for b in delta_platform.engine.balance(stream, 0))


def test_a_commit_that_a_killed_loader_did_not_publish_is_finished_first(delta_platform: DeltaPlatform) -> None:
    stream = json_stream("n")
    fill(delta_platform, stream, 1)

    def die() -> None:
        raise Killed

    delta_platform.volume_put("json/new.json", lines('{"n":7}'))
    with pytest.raises(Killed):
        delta_platform.engine_when(time.time_ns, once("table_committed", die)).ingest(stream)
    grow_old(delta_platform, stream, 40)
    delta_platform.restart().maintain(stream)
    assert delta_platform.restart().ingest(stream).batches == ()
    assert numbers(delta_platform, stream) == [0, 7, 1000]


def once(step: str, action: Callable[[], None]) -> Callable[[str], None]:
    """Do something the first time that a step is passed."""
    waiting = [True]

    def on_step(passed: str) -> None:
        if passed == step and waiting:
            waiting.clear()
            action()

    return on_step


def test_temporary_files_of_killed_publications_are_swept(delta_platform: DeltaPlatform) -> None:
    stream = json_stream("n")
    fill(delta_platform, stream, 1)
    folder = Path(delta_platform.volume.uri) / "_checkpoints" / stream.name / "commits"
    for name, age in (("old", 2 * DAY_S), ("young", 0)):
        (folder / f".{name}.tmp").write_bytes(b"x")
        os.utime(folder / f".{name}.tmp", (time.time() - age,) * 2)
    delta_platform.engine.maintain(stream)
    assert [path.name for path in folder.glob(".*")] == [".young.tmp"]
