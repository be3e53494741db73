"""A full refresh: what it takes, what it refuses to lose, which damage it cures, and who may look on meanwhile."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from telematics_assets.catalog import FileStream
from telematics_assets.engines.base import Backfill, IngestRequest
from telematics_assets.engines.checkpointed import CheckpointEngine
from telematics_assets.errors import (
    CheckpointError,
    CommitConflictError,
    OptionError,
    RowsAtRiskError,
    TableError,
    TableNotOursError,
    TableUnsupportedError,
)
from telematics_assets_tests.conformance.platforms import CheckpointPlatform, DeltaPlatform, Platform
from telematics_assets_tests.conformance.samples import json_stream, lines, parquet, parquet_stream

STREAM = json_stream("n", max_files_per_trigger=2)
REFRESH = IngestRequest(full_refresh=True)
FORCED = IngestRequest(full_refresh=True, force=True)


def land(platform: Platform, *numbers: int) -> None:
    """Land files of one record each."""
    for number in numbers:
        platform.volume_put(f"json/{number}.json", lines(f'{{"n":{number}}}'), number * 10**9)


def values(platform: Platform, stream: FileStream = STREAM) -> list[str | None]:
    """The table's records."""
    return [row["n"] for row in platform.rows(stream, "n")]


def elsewhere(action: Callable[[], Any]) -> Any:
    """Do it in a thread of its own, as another process would, and wait for it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(action).result()


# -- what it takes ----------------------------------------------------------------------------------------------------


def test_the_table_is_rewritten_from_all_files_in_one_batch_and_numbers_go_on(platform: Platform) -> None:
    land(platform, 0, 1, 2, 3, 4)
    loaded = platform.engine.ingest(STREAM)
    assert [batch.batch_id for batch in loaded.batches] == [0, 1, 2]
    assert loaded.operation == "load"
    report = platform.engine.ingest(STREAM, REFRESH)
    assert report.operation == "full_refresh"
    (batch,) = report.batches
    assert (batch.batch_id, batch.files_ingested, batch.rows, batch.recovered) == (4, 5, 5, False)
    assert report.table_rows == 5
    assert values(platform) == ["0", "1", "2", "3", "4"]
    assert {row["_batch_id"] for row in platform.rows(STREAM, "_batch_id")} == {4}
    assert set(platform.states(STREAM).values()) == {"INGESTED"}
    assert [(b.batch_id, b.expected_rows, b.added_rows) for b in platform.engine.balance(STREAM, 0)] == [(4, 5, 5)]
    assert platform.engine.look(STREAM).files == 0
    assert platform.restart().ingest(STREAM).batches == ()
    land(platform, 5)
    (after,) = platform.restart().ingest(STREAM).batches
    assert (after.batch_id, after.rows) == (5, 1)
    assert values(platform) == ["0", "1", "2", "3", "4", "5"]


def test_it_can_be_done_again_and_again(checkpoint_platform: CheckpointPlatform) -> None:
    platform = checkpoint_platform
    for number in range(12):
        land(platform, number)
        assert platform.restart().ingest(STREAM, REFRESH if number % 3 else None).rows == (
            number + 1 if number % 3 else 1
        )
        assert platform.engine.look(STREAM).files == 0
    assert values(platform) == sorted(map(str, range(12)))
    assert platform.volume.names(f"_checkpoints/{STREAM.name}/refreshes") == []
    # What the generations before left behind goes with the next segments.
    assert len(platform.checkpoint(STREAM)) < 60


def test_new_files_are_taken_and_what_was_skipped_is_read_again(platform: Platform) -> None:
    stream = parquet_stream()
    platform.volume_put("parquet/a.parquet", parquet(n=[1]))
    platform.volume_put("parquet/b.parquet", b"PAR1 broken PAR1")
    platform.engine.ingest(stream)
    platform.volume_put("parquet/c.parquet", parquet(n=[3]))
    (batch,) = platform.engine.ingest(stream, REFRESH).batches
    assert (batch.files_ingested, [file.path for file in batch.skipped]) == (2, ["parquet/b.parquet"])
    assert platform.states(stream) == {
        "a.parquet": "INGESTED",
        "b.parquet": "SKIPPED_CORRUPTED",
        "c.parquet": "INGESTED",
    }
    assert platform.engine.ingest(stream).batches == ()


def test_the_columns_are_made_anew_from_the_contract_and_the_files(platform: Platform) -> None:
    stream = parquet_stream()
    platform.volume_put("parquet/a.parquet", parquet(n=["1"], old=[1]), 10**9)
    platform.engine.ingest(stream)
    # Another type is rescued; a refresh after the first file was replaced gives the column the new one.
    platform.volume_put("parquet/b.parquet", parquet(n=[2], more=[0.5]), 2 * 10**9)
    platform.engine.ingest(stream)
    assert platform.columns(stream) == {"n": "STRING", "old": "BIGINT", "more": "DOUBLE"}
    platform.volume_put("parquet/a.parquet", parquet(n=[1]), 3 * 10**9)
    platform.engine.ingest(stream, REFRESH)
    assert platform.columns(stream) == {"n": "BIGINT", "more": "DOUBLE"}
    assert [(row["n"], row["more"]) for row in platform.rows(stream, "n", "more")] == [(1, None), (2, 0.5)]
    assert all(row["_rescued_data"] is None for row in platform.rows(stream, "_rescued_data"))
    platform.volume_put("parquet/c.parquet", parquet(n=[3], later=["x"]))
    assert platform.restart().ingest(stream).rows == 1
    assert platform.columns(stream) == {"n": "BIGINT", "more": "DOUBLE", "later": "STRING"}


def test_json_keys_that_only_later_files_have_become_columns(platform: Platform) -> None:
    for number in range(70):
        extra = ',"late":"x"' if number == 69 else ""
        platform.volume_put(f"json/{number:02}.json", lines(f'{{"n":{number}{extra}}}'), number * 10**9)
    platform.engine.ingest(json_stream("n"))
    (batch,) = platform.engine.ingest(json_stream("n"), REFRESH).batches
    assert batch.rows == 70
    assert [row["late"] for row in platform.rows(STREAM, "late")].count("x") == 1


def test_a_stream_that_never_began_is_simply_loaded(platform: Platform) -> None:
    land(platform, 0, 1, 2)
    report = platform.engine.ingest(STREAM, REFRESH)
    assert [batch.rows for batch in report.batches] == [2, 1]
    assert platform.restart().ingest(json_stream("n", max_files_per_trigger=9), REFRESH).rows == 3


def test_a_changed_file_is_read_as_it_is_now(platform: Platform) -> None:
    land(platform, 0, 1)
    platform.engine.ingest(STREAM)
    platform.volume_put("json/0.json", lines('{"n":"new"}', '{"n":"newer"}'))
    assert platform.states(STREAM)["0.json"] == "CHANGED"
    assert platform.engine.ingest(STREAM, REFRESH).rows == 3
    assert values(platform) == ["1", "new", "newer"]
    assert platform.engine.ingest(STREAM).batches == ()


def test_files_that_were_left_out_stay_out_and_those_fetched_since_stay_in(platform: Platform) -> None:
    stream = json_stream("n", include_existing_files=False)
    land(platform, 0, 1)
    platform.engine.ingest(stream)
    land(platform, 2)
    platform.engine.ingest(stream)
    platform.volume_put("json/piece/3.json", lines('{"n":3}'))
    assert platform.engine.ingest(stream, IngestRequest(backfill=Backfill("piece"))).rows == 1
    platform.engine.ingest(stream, IngestRequest(backfill=Backfill(modified_before="1970-01-01T00:00:01")))
    assert values(platform, stream) == ["0", "2", "3"]
    for _ in range(2):
        assert platform.restart().ingest(stream, REFRESH).rows == 3
        assert values(platform, stream) == ["0", "2", "3"]
        assert platform.states(stream)["1.json"] == "SKIPPED_EXISTING"
    assert platform.restart().ingest(stream).batches == ()


def test_files_still_being_written_are_left_for_the_next_load(checkpoint_platform: CheckpointPlatform) -> None:
    platform = checkpoint_platform
    land(platform, 0)
    platform.engine.ingest(STREAM)
    platform.volume_put("json/1.json", b'{"n":1}\n{"n":')
    platform.restart(incomplete_seconds=300)
    assert platform.engine.ingest(STREAM, REFRESH).rows == 1
    platform.volume_put("json/1.json", lines('{"n":1}', '{"n":11}'))
    assert platform.engine.ingest(STREAM).rows == 2
    assert values(platform) == ["0", "1", "11"]


def test_an_empty_folder_makes_an_empty_table_of_an_empty_one(platform: Platform) -> None:
    platform.volume_put("json/0.json", b"")
    platform.engine.ingest(STREAM)
    platform.remove("json/0.json")
    (batch,) = platform.engine.ingest(STREAM, REFRESH).batches
    assert (batch.rows, batch.files_ingested) == (0, 0)
    land(platform, 1)
    assert platform.restart().ingest(STREAM).rows == 1


@pytest.mark.parametrize(
    "request_",
    [
        IngestRequest(force=True),
        IngestRequest(full_refresh=True, max_files=3),
        IngestRequest(full_refresh=True, retry_files=("json/0.json",)),
        IngestRequest(full_refresh=True, backfill=Backfill("x")),
    ],
)
def test_what_does_not_go_together_is_refused(platform: Platform, request_: IngestRequest) -> None:
    land(platform, 0)
    with pytest.raises(OptionError):
        platform.engine.ingest(STREAM, request_)
    assert platform.engine.look(STREAM).files == 1


# -- what it refuses to lose ------------------------------------------------------------------------------------------


def test_files_that_are_gone_are_named_and_only_force_lets_their_rows_go(platform: Platform) -> None:
    land(platform, *range(9))
    platform.engine.ingest(STREAM)
    for number in range(7):
        platform.remove(f"json/{number}.json")
    refused = r"7 files .*no longer in json.*json/0\.json, .*json/4\.json and 2 more.*--force"
    with pytest.raises(RowsAtRiskError, match=refused):
        platform.engine.ingest(STREAM, REFRESH)
    assert len(values(platform)) == 9
    land(platform, 9)
    assert platform.engine.ingest(STREAM).rows == 1
    assert platform.engine.ingest(STREAM, FORCED).rows == 3
    assert values(platform) == ["7", "8", "9"]
    land(platform, 0)
    assert platform.restart().ingest(STREAM).rows == 1


def test_files_that_an_option_leaves_out_by_now_count_as_gone(platform: Platform) -> None:
    land(platform, 0, 1)
    platform.engine.ingest(STREAM)
    narrowed = json_stream("n", path_glob_filter="0*")
    with pytest.raises(RowsAtRiskError, match=r"json/1\.json"):
        platform.engine.ingest(narrowed, REFRESH)
    assert platform.engine.ingest(narrowed, FORCED).rows == 1


def test_a_loaded_file_that_can_not_be_read_any_more_is_refused_too(platform: Platform) -> None:
    stream = parquet_stream()
    for name in "ab":
        platform.volume_put(f"parquet/{name}.parquet", parquet(n=[name]))
    platform.engine.ingest(stream)
    platform.volume_put("parquet/b.parquet", b"PAR1 broken PAR1")
    with pytest.raises(RowsAtRiskError, match=r"1 files .*can't be read now .*parquet/b\.parquet"):
        platform.engine.ingest(stream, REFRESH)
    assert values(platform, stream) == ["a", "b"]
    assert platform.engine.ingest(stream).batches == ()
    (batch,) = platform.engine.ingest(stream, FORCED).batches
    assert (batch.rows, len(batch.skipped)) == (1, 1)


def test_a_loaded_file_that_vanishes_while_it_is_read_is_refused_too(checkpoint_platform: CheckpointPlatform) -> None:
    platform = checkpoint_platform
    land(platform, 0, 1)
    platform.engine.ingest(STREAM)
    # Its columns are looked at first, then its rows are read.
    platform.meddle("json/1.json", "open", lambda: platform.remove("json/1.json"), nth=2)
    with pytest.raises(RowsAtRiskError, match=r"json/1\.json"):
        platform.engine.ingest(STREAM, REFRESH)
    assert values(platform) == ["0", "1"]


def test_a_file_that_changes_while_it_is_read_is_loaded_by_the_same_call(
    checkpoint_platform: CheckpointPlatform,
) -> None:
    platform = checkpoint_platform
    land(platform, 0, 1)
    platform.engine.ingest(STREAM)
    platform.meddle("json/1.json", "close", lambda: platform.volume_put("json/1.json", lines('{"n":"now"}')), nth=2)
    report = platform.engine.ingest(STREAM, REFRESH)
    assert [batch.rows for batch in report.batches] == [1, 1]
    assert values(platform) == ["0", "now"]


# -- which damage it cures --------------------------------------------------------------------------------------------


def delete(platform: DeltaPlatform) -> None:
    DeltaTable(platform.table_path(STREAM)).delete("n = '2'")


def restore(platform: DeltaPlatform) -> None:
    DeltaTable(platform.table_path(STREAM)).restore(1)


def take_columns(platform: DeltaPlatform) -> None:
    write_deltalake(platform.table_path(STREAM), pa.table({"x": [1]}), mode="overwrite", schema_mode="overwrite")


def lose_table(platform: DeltaPlatform) -> None:
    shutil.rmtree(platform.table_path(STREAM))


def create_again(platform: DeltaPlatform) -> None:
    old = DeltaTable(platform.table_path(STREAM))
    schema, properties = old.schema(), dict(old.metadata().configuration)
    shutil.rmtree(platform.table_path(STREAM))
    DeltaTable.create(platform.table_path(STREAM), schema, configuration=properties, raise_if_key_not_exists=False)


def lose_checkpoint(platform: DeltaPlatform) -> None:
    platform.put_checkpoint(STREAM, {})


def lose_commits(platform: DeltaPlatform) -> None:
    copy = platform.checkpoint(STREAM)
    platform.put_checkpoint(STREAM, {name: data for name, data in copy.items() if not name.startswith("commits/")})


def cut_short(platform: DeltaPlatform) -> None:
    copy = platform.checkpoint(STREAM)
    platform.put_checkpoint(STREAM, {name: data[:-4] for name, data in copy.items()})


@pytest.mark.parametrize(
    "damage",
    [delete, restore, take_columns, lose_table, create_again, lose_checkpoint, lose_commits, cut_short],
)
def test_damage_that_stops_a_load_is_cured(
    delta_platform: DeltaPlatform, damage: Callable[[DeltaPlatform], None]
) -> None:
    platform = delta_platform
    land(platform, 0, 1, 2)
    platform.engine.ingest(STREAM)
    damage(platform)
    land(platform, 3)
    with pytest.raises((TableError, CheckpointError), match="--full-refresh"):
        platform.restart().ingest(STREAM)
    assert platform.restart().ingest(STREAM, REFRESH).rows == 4
    assert values(platform) == ["0", "1", "2", "3"]
    assert set(platform.states(STREAM).values()) == {"INGESTED"}
    land(platform, 4)
    assert platform.restart().ingest(STREAM).rows == 1
    assert all(b.expected_rows == b.added_rows for b in platform.engine.balance(STREAM, 0))
    assert all(finding.level == "ok" for finding in platform.engine.doctor([STREAM]))


@pytest.mark.parametrize("damage", [lose_checkpoint, cut_short, delete, lose_table])
def test_even_then_no_row_of_a_file_that_is_gone_is_lost(
    delta_platform: DeltaPlatform, damage: Callable[[DeltaPlatform], None]
) -> None:
    platform = delta_platform
    land(platform, 0, 1, 2)
    platform.engine.ingest(STREAM)
    damage(platform)
    platform.remove("json/1.json")
    with pytest.raises(RowsAtRiskError, match=r"1 files .*json/1\.json"):
        platform.restart().ingest(STREAM, REFRESH)
    assert platform.restart().ingest(STREAM, FORCED).rows == 2


def test_what_was_left_out_is_not_loaded_because_its_record_is_lost(delta_platform: DeltaPlatform) -> None:
    platform = delta_platform
    stream = json_stream("n", include_existing_files=False)
    land(platform, 0)
    platform.engine.ingest(stream)
    land(platform, 1)
    platform.engine.ingest(stream)
    platform.put_checkpoint(stream, {})
    with pytest.raises(RowsAtRiskError, match="can't be told any more"):
        platform.restart().ingest(stream, REFRESH)
    assert platform.restart().ingest(stream, FORCED).rows == 2


def test_a_table_of_somebody_else_is_not_overwritten(delta_platform: DeltaPlatform) -> None:
    platform = delta_platform
    write_deltalake(platform.table_path(STREAM), pa.table({"n": ["theirs"]}))
    land(platform, 0)
    with pytest.raises(TableNotOursError):
        platform.engine.ingest(STREAM, REFRESH)
    shutil.rmtree(platform.table_path(STREAM))
    platform.engine.ingest(STREAM)
    write_deltalake(platform.table_path(STREAM), pa.table({"n": ["theirs"]}), mode="overwrite", schema_mode="overwrite")
    shutil.rmtree(platform.table_path(STREAM))
    write_deltalake(platform.table_path(STREAM), pa.table({"n": ["theirs"]}))
    with pytest.raises(TableNotOursError):
        platform.restart().ingest(STREAM, FORCED)
    assert DeltaTable(platform.table_path(STREAM)).version() == 0


@pytest.mark.parametrize("name", ["delta.appendOnly", "delta.setTransactionRetentionDuration"])
def test_a_table_that_can_not_keep_the_promise_is_refused(delta_platform: DeltaPlatform, name: str) -> None:
    platform = delta_platform
    land(platform, 0)
    platform.engine.ingest(STREAM)
    value = "true" if name == "delta.appendOnly" else "interval 1 days"
    DeltaTable(platform.table_path(STREAM)).alter.set_table_properties({name: value})
    with pytest.raises(TableUnsupportedError, match=name):
        platform.restart().ingest(STREAM, FORCED)
    assert values(platform) == ["0"]


# -- who may look on --------------------------------------------------------------------------------------------------


def test_older_versions_stay_readable_and_the_table_keeps_its_identity(delta_platform: DeltaPlatform) -> None:
    platform = delta_platform
    land(platform, 0, 1)
    before = platform.engine.ingest(STREAM)
    handle = DeltaTable(platform.table_path(STREAM))
    platform.volume_put("json/0.json", lines('{"n":"new","more":1}'))
    after = platform.engine.ingest(STREAM, REFRESH)
    now = DeltaTable(platform.table_path(STREAM))
    assert now.metadata().id == handle.metadata().id
    assert now.metadata().description == handle.metadata().description
    assert now.metadata().configuration["telematics.streamId"] != handle.metadata().configuration["telematics.streamId"]
    assert now.schema().fields[0].metadata == {"comment": "The n."}
    assert before.table_version is not None
    assert after.table_version is not None
    old = DeltaTable(platform.table_path(STREAM), version=before.table_version)
    assert sorted(old.to_pyarrow_table()["n"].to_pylist()) == ["0", "1"]
    # One overwrite, and the new stream id.
    assert after.table_version - before.table_version == 2


def test_readers_see_the_rows_before_or_the_rows_after(delta_platform: DeltaPlatform) -> None:
    platform = delta_platform
    for number in range(40):
        platform.volume_put(f"json/{number}.json", lines(*[f'{{"n":{number}}}'] * 50), number)
    platform.engine.ingest(json_stream("n"))
    for number in range(40):
        platform.volume_put(f"json/{number}.json", lines(*[f'{{"n":"new {number}"}}'] * 100), 10**9 + number)
    seen: list[tuple[int, int]] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set() or not seen:
            column = DeltaTable(platform.table_path(STREAM)).to_pyarrow_table(columns=["n"])["n"].to_pylist()
            counts = Counter(value.startswith("new") for value in column)
            seen.append((counts[False], counts[True]))

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        platform.engine.ingest(json_stream("n"), REFRESH)
        done.set()
        reading.result()
    assert set(seen) <= {(2000, 0), (0, 4000)}
    assert seen[0] == (2000, 0)
    assert len(platform.rows(STREAM, "n")) == 4000


def refreshing(platform: CheckpointPlatform, step: str, action: Callable[[], object]) -> CheckpointEngine:
    """An engine during whose refresh something happens at a step, once."""
    left = [action]

    def on_step(passed: str) -> None:
        if passed == step and left:
            elsewhere(left.pop())

    return platform.engine_over(on_step=on_step)


def test_a_sensor_that_looks_meanwhile_gets_sensible_answers(checkpoint_platform: CheckpointPlatform) -> None:
    platform = checkpoint_platform
    land(platform, 0, 1)
    platform.engine.ingest(STREAM)
    land(platform, 2)
    looks: list[tuple[int, set[str]]] = []

    def look() -> None:
        engine = platform.new_engine()
        looks.append((engine.look(STREAM).files, {file.state for file in engine.files(STREAM)}))
        assert engine.balance(STREAM, 0) is not None

    for step in ("refresh_planned", "results_published", "table_committed", "identity_set", "refresh_published"):
        refreshing(platform, step, look).ingest(STREAM, REFRESH)
    # Before the commit the old ledger holds; then all files are pending until the new generation is published.
    assert looks == [
        (1, {"INGESTED", "DISCOVERED"}),
        (0, {"INGESTED"}),
        (3, {"DISCOVERED"}),
        (3, {"DISCOVERED"}),
        (0, {"INGESTED"}),
    ]


@pytest.mark.parametrize("step", ["refresh_planned", "reading", "file_read", "results_published"])
def test_a_load_meanwhile_wins_and_the_refresh_changes_nothing(
    checkpoint_platform: CheckpointPlatform, step: str
) -> None:
    platform = checkpoint_platform
    land(platform, 0, 1)
    platform.engine.ingest(STREAM)
    land(platform, 2)
    with pytest.raises(CommitConflictError, match=r"Somebody committed.*nothing was changed.*--full-refresh"):
        refreshing(platform, step, lambda: platform.new_engine().ingest(STREAM)).ingest(STREAM, REFRESH)
    assert values(platform) == ["0", "1", "2"]
    assert platform.restart().ingest(STREAM).batches == ()
    assert platform.restart().ingest(STREAM, REFRESH).rows == 3
    assert platform.volume.names(f"_checkpoints/{STREAM.name}/refreshes") == []


@pytest.mark.parametrize("step", ["planned", "reading", "file_read", "results_published"])
@pytest.mark.parametrize("rows", [0, 1])
def test_a_refresh_during_a_load_wins_and_the_load_adds_nothing(
    checkpoint_platform: CheckpointPlatform, step: str, rows: int
) -> None:
    platform = checkpoint_platform
    # With no rows to take away only the position tells the load that its files are in the table already.
    platform.volume_put("json/first.json", lines(*['{"n":"first"}'] * rows))
    platform.engine.ingest(STREAM)
    land(platform, 2)
    report = refreshing(platform, step, lambda: platform.new_engine().ingest(STREAM, REFRESH)).ingest(STREAM)
    assert report.yielded
    assert values(platform) == ["2", "first"][: 1 + rows]
    assert platform.restart().ingest(STREAM).batches == ()


def test_of_two_refreshes_at_once_one_is_made(checkpoint_platform: CheckpointPlatform) -> None:
    platform = checkpoint_platform
    land(platform, 0, 1)
    platform.engine.ingest(STREAM)
    for step in ("refresh_listed", "refresh_planned", "reading", "results_published"):
        with pytest.raises(CommitConflictError):
            refreshing(platform, step, lambda: platform.new_engine().ingest(STREAM, REFRESH)).ingest(STREAM, REFRESH)
        assert values(platform) == ["0", "1"]
        assert platform.restart().ingest(STREAM).batches == ()
    for step in ("table_committed", "identity_set", "made_durable", "refresh_published"):
        refreshing(platform, step, lambda: platform.new_engine().ingest(STREAM, REFRESH)).ingest(STREAM, REFRESH)
        assert values(platform) == ["0", "1"]
        assert platform.restart().ingest(STREAM).batches == ()


# -- statistics -------------------------------------------------------------------------------------------------------

BIG_DECIMAL = Decimal("12345678901234567890.5")


def shown_beyond(platform: DeltaPlatform, stream: FileStream, limit: str) -> list[Any]:
    """What a reader finds that skips files by their statistics."""
    table = DeltaTable(platform.table_path(stream))
    beyond = pa.compute.field("v") > pa.scalar(Decimal(limit), pa.decimal128(21, 1))
    found: list[Any] = table.to_pyarrow_dataset().to_table(filter=beyond, columns=["v"])["v"].to_pylist()
    return found


@pytest.mark.parametrize("crash", [False, True])
def test_a_column_that_becomes_a_large_decimal_loses_its_statistics_first(
    delta_platform: DeltaPlatform, crash: bool
) -> None:
    stream = parquet_stream()
    delta_platform.volume_put("parquet/a", parquet(v=[1], n=[1]), 10**9)
    delta_platform.engine.ingest(stream)
    delta_platform.volume_put("parquet/a", parquet(v=[BIG_DECIMAL], n=[1]), 2 * 10**9)
    if crash:
        intents: list[str] = []

        def die(step: str) -> None:
            intents.extend([step] if step == "refresh_planned" else [])
            # Behind the commit of the property.
            if len(intents) == 2:
                raise KeyboardInterrupt

        dying = delta_platform.engine_over(incomplete_seconds=300, on_step=die)
        with pytest.raises(KeyboardInterrupt):
            dying.ingest(stream, REFRESH)
        assert delta_platform.restart().ingest(stream).batches == ()
        assert [row["v"] for row in delta_platform.rows(stream, "v")] == [1]
    report = delta_platform.restart().ingest(stream, REFRESH)
    assert [(batch.batch_id, batch.rows) for batch in report.batches] == [(2, 1)]
    named = DeltaTable(delta_platform.table_path(stream)).metadata().configuration["delta.dataSkippingStatsColumns"]
    assert named.split(",")[:2] == ["n", "_source_file"]
    assert shown_beyond(delta_platform, stream, "12345678901234567890.4") == [BIG_DECIMAL]
    assert [(b.expected_rows, b.added_rows) for b in delta_platform.engine.balance(stream, 0)] == [(1, 1)]
    assert delta_platform.restart().ingest(stream).batches == ()
    assert delta_platform.volume.names(f"_checkpoints/{stream.name}/refreshes") == []


def test_a_dropped_column_that_comes_back_as_a_large_decimal_has_no_statistics(delta_platform: DeltaPlatform) -> None:
    stream = parquet_stream()
    delta_platform.volume_put("parquet/a", parquet(v=[1]), 10**9)
    delta_platform.engine.ingest(stream)
    delta_platform.volume_put("parquet/a", parquet(n=[1]), 2 * 10**9)
    delta_platform.engine.ingest(stream, REFRESH)
    delta_platform.volume_put("parquet/b", parquet(v=[BIG_DECIMAL], n=[2]), 3 * 10**9)
    delta_platform.engine.ingest(stream)
    assert delta_platform.columns(stream) == {"n": "BIGINT", "v": "DECIMAL(21,1)"}
    assert shown_beyond(delta_platform, stream, "12345678901234567890.4") == [BIG_DECIMAL]


# -- overwritten files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["unreadable", "gone"])
def test_rows_of_an_earlier_version_are_not_lost_with_a_file_that_can_no_longer_be_read(
    checkpoint_platform: CheckpointPlatform, what: str
) -> None:
    platform = checkpoint_platform
    stream = parquet_stream(allow_overwrites=True)
    platform.volume_put("parquet/a", parquet(n=[1]), 10**9)
    platform.engine.ingest(stream)
    platform.volume_put("parquet/a", b"no longer Parquet", 2 * 10**9)
    if what == "gone":
        platform.meddle("parquet/a", "open", lambda: platform.remove("parquet/a"))
    platform.engine.ingest(stream)
    assert platform.states(stream) == {"a": "SKIPPED_MISSING" if what == "gone" else "SKIPPED_CORRUPTED"}
    with pytest.raises(RowsAtRiskError, match="parquet/a"):
        platform.restart().ingest(stream, REFRESH)
    assert [row["n"] for row in platform.rows(stream, "n")] == [1]
    platform.restart().ingest(stream, FORCED)
    assert platform.rows(stream, "_source_file") == []


def test_rows_of_a_file_that_is_being_written_anew_wait_for_its_end(checkpoint_platform: CheckpointPlatform) -> None:
    platform = checkpoint_platform
    land(platform, 0, 1)
    platform.engine.ingest(STREAM)
    platform.volume_put("json/1.json", b'{"n":1}\n{"n":', time.time_ns())
    with pytest.raises(RowsAtRiskError, match="still be being written"):
        platform.restart(incomplete_seconds=300).ingest(STREAM, REFRESH)
    assert values(platform) == ["0", "1"]
    platform.volume_put("json/1.json", lines('{"n":1}', '{"n":2}'), time.time_ns())
    platform.restart(incomplete_seconds=300).ingest(STREAM, REFRESH)
    assert values(platform) == ["0", "1", "2"]
