"""A table that somebody else deleted, restored, overwrote or emptied under a live checkpoint, and what disturbs nobody.

For engines that share our checkpoint and keep Delta tables in a local folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from telematics_assets.catalog import FileStream
from telematics_assets.errors import (
    OptionError,
    SchemaError,
    TableError,
    TableMovedError,
    TableNotOursError,
    TableUnsupportedError,
)
from telematics_assets_tests.conformance.platforms import LOCATION, DeltaPlatform
from telematics_assets_tests.conformance.samples import json_stream, lines

STREAM = json_stream("n", max_files_per_trigger=1)


def land(platform: DeltaPlatform, *numbers: int) -> None:
    """Land files of one record each."""
    for number in numbers:
        platform.volume_put(f"json/{number}.json", lines(f'{{"n":{number}}}'), number)


def values(platform: DeltaPlatform) -> list[str | None]:
    """The table's records."""
    return [row["n"] for row in platform.rows(STREAM, "n")]


def table(platform: DeltaPlatform) -> DeltaTable:
    """The table as any other program opens it."""
    return DeltaTable(platform.table_path(STREAM))


def restore(platform: DeltaPlatform) -> None:
    """Go back to the version of the second batch."""
    table(platform).restore(2)


def overwrite(platform: DeltaPlatform) -> None:
    """Replace all rows by those of the first two files."""
    kept = pa.table(table(platform).to_pyarrow_table(filters=[("n", "in", ["0", "1"])]))
    write_deltalake(table(platform), kept, mode="overwrite")


def delete(platform: DeltaPlatform) -> None:
    """Delete the rows of one file."""
    table(platform).delete("n = '2'")


def update(platform: DeltaPlatform) -> None:
    """Rewrite the rows of one file under another file's name."""
    table(platform).delete("n = '2'")
    table(platform).update(updates={"n": "'1'"}, predicate="n = '1'")


def older_copy(platform: DeltaPlatform) -> None:
    """Put an older copy of the folder in its place."""
    log = platform.table_path(STREAM) / "_delta_log"
    for path in log.iterdir():
        if path.name.split(".")[0].isdigit() and int(path.name.split(".")[0]) > 2:
            path.unlink()


#: What somebody else did; each leaves the rows of files 0 and 1 and takes those of file 2 away.
FAULTS: list[Callable[[DeltaPlatform], None]] = [restore, overwrite, delete, update, older_copy]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way_out", ["rebuild", "drop_table"])
def test_rows_that_somebody_took_away_are_seen_and_both_ways_out_lead_on(
    delta_platform: DeltaPlatform, fault: Callable[[DeltaPlatform], None], way_out: str
) -> None:
    land(delta_platform, 0, 1, 2)
    delta_platform.engine.ingest(STREAM)
    fault(delta_platform)
    assert values(delta_platform) == ["0", "1"]
    land(delta_platform, 3)
    with pytest.raises(TableMovedError, match=r"--rebuild.*--drop-table"):
        delta_platform.restart().ingest(STREAM)
    assert values(delta_platform) == ["0", "1"]
    delta_platform.engine.reset(STREAM, **{way_out: True})
    report = delta_platform.restart().ingest(STREAM)
    # The file whose rows are gone is taken again.
    assert report.rows == (2 if way_out == "rebuild" else 4)
    assert values(delta_platform) == ["0", "1", "2", "3"]
    assert delta_platform.restart().ingest(STREAM).batches == ()


def test_a_deleted_table_is_seen_and_everything_can_be_loaded_anew(delta_platform: DeltaPlatform) -> None:
    land(delta_platform, 0, 1)
    delta_platform.engine.ingest(STREAM)
    shutil.rmtree(delta_platform.table_path(STREAM))
    land(delta_platform, 2)
    with pytest.raises(TableMovedError, match=r"is gone.*telematics reset events"):
        delta_platform.restart().ingest(STREAM)
    assert not delta_platform.table_path(STREAM).exists()
    with pytest.raises(OptionError, match="no ledger can be made"):
        delta_platform.engine.reset(STREAM, rebuild=True)
    delta_platform.engine.reset(STREAM)
    assert delta_platform.restart().ingest(STREAM).rows == 3
    assert values(delta_platform) == ["0", "1", "2"]


def test_a_table_that_comes_back_is_gone_on_with(delta_platform: DeltaPlatform) -> None:
    land(delta_platform, 0)
    delta_platform.engine.ingest(STREAM)
    path = delta_platform.table_path(STREAM)
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(TableMovedError):
        delta_platform.engine.ingest(STREAM)
    path.with_name("elsewhere").rename(path)
    land(delta_platform, 1)
    assert delta_platform.engine.ingest(STREAM).rows == 1
    assert values(delta_platform) == ["0", "1"]


def test_a_table_created_again_under_a_live_checkpoint_is_another_table(delta_platform: DeltaPlatform) -> None:
    land(delta_platform, 0, 1)
    delta_platform.engine.ingest(STREAM)
    schema = table(delta_platform).schema()
    properties = {key: value for key, value in table(delta_platform).metadata().configuration.items() if value}
    shutil.rmtree(delta_platform.table_path(STREAM))
    DeltaTable.create(
        delta_platform.table_path(STREAM), schema, configuration=properties, raise_if_key_not_exists=False
    )
    with pytest.raises(TableMovedError, match=r"another table.*--rebuild.*--drop-table"):
        delta_platform.restart().ingest(STREAM)
    delta_platform.engine.reset(STREAM, rebuild=True)
    assert delta_platform.restart().ingest(STREAM).rows == 2
    assert values(delta_platform) == ["0", "1"]


def test_two_checkpoints_do_not_fill_one_table(delta_platform: DeltaPlatform) -> None:
    land(delta_platform, 0)
    delta_platform.engine.ingest(STREAM)
    thief = FileStream("thief", "json", "json", STREAM.table, STREAM.contract, STREAM.options)
    with pytest.raises(TableNotOursError, match="belongs to stream 'events'"):
        delta_platform.engine.ingest(thief)
    with pytest.raises(TableNotOursError):
        delta_platform.engine.reset(thief, rebuild=True)
    assert values(delta_platform) == ["0"]
    assert delta_platform.engine.ingest(STREAM).batches == ()


def test_a_table_that_was_there_before_is_left_alone(delta_platform: DeltaPlatform) -> None:
    path = delta_platform.table_path(STREAM)
    write_deltalake(path, pa.table({"n": ["theirs"]}))
    land(delta_platform, 0)
    with pytest.raises(TableNotOursError, match=r"was not made by this project.*another table"):
        delta_platform.engine.ingest(STREAM)
    assert DeltaTable(path).version() == 0
    shutil.move(path, path.with_name("theirs"))
    assert delta_platform.engine.ingest(STREAM).rows == 1


def test_a_folder_that_is_no_table_is_a_clear_error_or_becomes_one(delta_platform: DeltaPlatform) -> None:
    path = delta_platform.table_path(STREAM)
    (path / "_delta_log").mkdir(parents=True)
    (path / "_delta_log" / f"{0:020}.json").write_text("{}\n")
    land(delta_platform, 0)
    with pytest.raises(TableError, match=r"workspace\.01_bronze\.events"):
        delta_platform.engine.ingest(STREAM)
    shutil.rmtree(path)
    (path / "old").mkdir(parents=True)
    (path / "old" / "left_over.parquet").write_bytes(b"")
    assert delta_platform.engine.ingest(STREAM).rows == 1
    assert values(delta_platform) == ["0"]


def test_a_table_that_forgets_transactions_is_refused(delta_platform: DeltaPlatform) -> None:
    name = "delta.setTransactionRetentionDuration"
    land(delta_platform, 0)
    delta_platform.engine.ingest(STREAM)
    table(delta_platform).alter.set_table_properties({name: "interval 1 days"})
    land(delta_platform, 1)
    with pytest.raises(TableUnsupportedError, match=rf"{name}.*loaded twice.*UNSET TBLPROPERTIES"):
        delta_platform.restart().ingest(STREAM)
    assert values(delta_platform) == ["0"]
    delta_platform.engine.reset(STREAM, drop_table=True)
    assert delta_platform.restart().ingest(STREAM).rows == 2


def test_an_overwrite_that_took_our_columns_away_can_not_be_rebuilt_from(delta_platform: DeltaPlatform) -> None:
    land(delta_platform, 0, 1)
    delta_platform.engine.ingest(STREAM)
    write_deltalake(table(delta_platform), pa.table({"n": ["x"]}), mode="overwrite", schema_mode="overwrite")
    with pytest.raises(TableMovedError):
        delta_platform.restart().ingest(STREAM)
    with pytest.raises(TableError, match=r"_source_file.*--drop-table"):
        delta_platform.engine.reset(STREAM, rebuild=True)
    delta_platform.engine.reset(STREAM, drop_table=True)
    assert delta_platform.engine.ingest(STREAM).rows == 2


def test_a_rebuild_leaves_rows_of_others_alone(delta_platform: DeltaPlatform) -> None:
    land(delta_platform, 0, 1)
    delta_platform.engine.ingest(STREAM)
    write_deltalake(table(delta_platform), pa.table({"n": ["theirs"]}), mode="append", schema_mode="merge")
    delta_platform.put_checkpoint(STREAM, {})
    delta_platform.restart().reset(STREAM, rebuild=True)
    land(delta_platform, 2)
    assert delta_platform.engine.ingest(STREAM).rows == 1
    assert values(delta_platform) == ["0", "1", "2", "theirs"]


def test_what_takes_no_rows_away_disturbs_nobody(delta_platform: DeltaPlatform) -> None:
    land(delta_platform, 0, 1, 2)
    delta_platform.engine.ingest(STREAM)
    table(delta_platform).optimize.compact()
    table(delta_platform).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    land(delta_platform, 3)
    assert delta_platform.restart().ingest(STREAM).rows == 1
    table(delta_platform).optimize.z_order(["n"])
    table(delta_platform).alter.set_table_description("Somebody's comment.")
    table(delta_platform).alter.set_table_properties({"delta.appendOnly": "true"})
    write_deltalake(table(delta_platform), pa.table({"n": ["theirs"], "more": [1]}), mode="append", schema_mode="merge")
    table(delta_platform).create_checkpoint()
    land(delta_platform, 4)
    assert delta_platform.restart().ingest(STREAM).rows == 1
    assert values(delta_platform) == ["0", "1", "2", "3", "4", "theirs"]
    assert all(b.expected_rows == b.added_rows for b in delta_platform.engine.balance(STREAM, 0))


def test_an_old_log_that_was_cleaned_up_disturbs_nobody(delta_platform: DeltaPlatform) -> None:
    land(delta_platform, 0, 1, 2)
    delta_platform.engine.ingest(STREAM)
    table(delta_platform).create_checkpoint()
    log = delta_platform.table_path(STREAM) / "_delta_log"
    newest = table(delta_platform).version()
    for version in range(newest):
        (log / f"{version:020}.json").unlink()
    land(delta_platform, 3)
    assert delta_platform.restart().ingest(STREAM).rows == 1
    assert values(delta_platform) == ["0", "1", "2", "3"]
    assert [b.batch_id for b in delta_platform.engine.balance(STREAM, 3)] == [3]


def test_a_log_with_a_gap_behind_our_last_commit_proves_nothing(delta_platform: DeltaPlatform) -> None:
    land(delta_platform, 0)
    delta_platform.engine.ingest(STREAM)
    table(delta_platform).delete("n = '0'")
    gap = table(delta_platform).version()
    write_deltalake(table(delta_platform), pa.table({"n": ["theirs"]}), mode="append", schema_mode="merge")
    table(delta_platform).create_checkpoint()
    (delta_platform.table_path(STREAM) / "_delta_log" / f"{gap:020}.json").unlink()
    land(delta_platform, 1)
    with pytest.raises(TableMovedError, match=r"can't be proven.*telematics reset"):
        delta_platform.restart().ingest(STREAM)
    delta_platform.engine.reset(STREAM, rebuild=True)
    assert delta_platform.engine.ingest(STREAM).rows == 2


def by_hand(platform: DeltaPlatform, change: Callable[[dict[str, Any], list[dict[str, Any]]], None]) -> None:
    """Write a log entry that changes properties or columns, as `ALTER TABLE` of any other program does."""
    log = platform.table_path(STREAM) / "_delta_log"
    entries = sorted(log.glob("*.json"))
    lines = [json.loads(line) for entry in entries for line in entry.read_text().splitlines() if '"metaData"' in line]
    metadata = lines[-1]["metaData"]
    schema = json.loads(metadata["schemaString"])
    change(metadata["configuration"], schema["fields"])
    metadata["schemaString"] = json.dumps(schema)
    entry = [{"metaData": metadata}, {"commitInfo": {"timestamp": 1, "operation": "CHANGE COLUMN"}}]
    name = f"{int(entries[-1].stem) + 1:020}.json"
    (log / name).write_text("".join(json.dumps(action) + "\n" for action in entry))


def dropped(name: str) -> Callable[[dict[str, Any], list[dict[str, Any]]], None]:
    """Drop a column."""

    def change(properties: dict[str, Any], fields: list[dict[str, Any]]) -> None:
        fields[:] = [field for field in fields if field["name"] != name]

    return change


def changed(column: str, **values: Any) -> Callable[[dict[str, Any], list[dict[str, Any]]], None]:
    """Change a column."""

    def change(properties: dict[str, Any], fields: list[dict[str, Any]]) -> None:
        next(field for field in fields if field["name"] == column).update(values)

    return change


@pytest.mark.parametrize(
    "name",
    ["_corrupt_record", "_rescued_data", "_source_file", "_source_file_modified_at", "_batch_id", "_ingested_at"],
)
def test_a_column_of_the_loaders_own_that_was_dropped_is_added_again_and_filled(
    delta_platform: DeltaPlatform, name: str
) -> None:
    stream = json_stream("n", schema_evolution_mode="rescue")
    delta_platform.volume_put("json/a.json", lines('{"n":1}'), 1)
    delta_platform.engine.ingest(stream)
    by_hand(delta_platform, dropped(name))
    delta_platform.volume_put("json/b.json", lines("oops", '{"n":2,"later":3}'), 2)
    report = delta_platform.restart().ingest(stream)
    assert [change.column for change in report.batches[0].schema_changes] == [name]
    found = [row for row in delta_platform.rows(stream, "n", *stream.own_columns) if row["_batch_id"] == 1]
    assert [(row["n"], row["_corrupt_record"]) for row in found] == [(None, "oops"), ("2", None)]
    assert found[1]["_rescued_data"] == f'{{"later":3,"_file_path":"{LOCATION}/json/b.json"}}'
    assert all(row[column] is not None for row in found for column in stream.own_columns[2:])


@pytest.mark.parametrize(("name", "kind"), [("_batch_id", "string"), ("_corrupt_record", "binary")])
def test_a_column_of_the_loaders_own_with_another_type_is_refused_by_name(
    delta_platform: DeltaPlatform, name: str, kind: str
) -> None:
    land(delta_platform, 0)
    delta_platform.engine.ingest(STREAM)
    by_hand(delta_platform, changed(name, type=kind))
    land(delta_platform, 1)
    with pytest.raises(SchemaError, match=rf"'{name}' of table 'events'.*somebody changed it.*--drop-table"):
        delta_platform.restart().ingest(STREAM)
    delta_platform.engine.reset(STREAM, drop_table=True)
    assert delta_platform.engine.ingest(STREAM).rows == 2


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (dropped("n"), ["0", "1", "2"]),
        (changed("n", name="m"), ["0", "1", "2"]),
        (changed("n", type="long"), [0, 1, 2]),
    ],
    ids=["dropped", "renamed", "of another type"],
)
def test_data_columns_that_somebody_changed_lose_no_new_value(
    delta_platform: DeltaPlatform, change: Callable[[Any, Any], None], found: list[Any]
) -> None:
    land(delta_platform, 0, 1)
    delta_platform.engine.ingest(STREAM)
    by_hand(delta_platform, change)
    land(delta_platform, 2)
    report = delta_platform.restart().ingest(STREAM)
    assert [row["n"] for row in delta_platform.rows(STREAM, "n")] == found
    assert (report.rows, report.rows_rescued) == (1, 0)


@pytest.mark.parametrize("value", [None, "another"])
def test_a_table_that_lost_its_streams_id_is_another_table(delta_platform: DeltaPlatform, value: str | None) -> None:
    land(delta_platform, 0)
    delta_platform.engine.ingest(STREAM)
    land(delta_platform, 1)

    def change(properties: dict[str, Any], fields: list[dict[str, Any]]) -> None:
        del properties["telematics.streamId"]
        if value:
            properties["telematics.streamId"] = value

    by_hand(delta_platform, change)
    with pytest.raises(TableMovedError, match="another table"):
        delta_platform.restart().ingest(STREAM)
    delta_platform.engine.reset(STREAM, rebuild=True)
    assert delta_platform.engine.ingest(STREAM).rows == 1
    assert values(delta_platform) == ["0", "1"]


def test_a_log_entry_in_the_middle_that_is_gone_is_a_table_error(delta_platform: DeltaPlatform) -> None:
    land(delta_platform, 0, 1, 2)
    delta_platform.engine.ingest(STREAM)
    entry = delta_platform.table_path(STREAM) / "_delta_log" / f"{2:020}.json"
    kept = entry.read_bytes()
    entry.unlink()
    land(delta_platform, 3)
    with pytest.raises(TableError, match=r"can't be opened.*Restore its _delta_log"):
        delta_platform.restart().ingest(STREAM)
    entry.write_bytes(kept)
    assert delta_platform.restart().ingest(STREAM).rows == 1
    assert values(delta_platform) == ["0", "1", "2", "3"]


def test_a_data_file_that_is_gone_or_damaged_stops_every_reader_by_name_and_no_load(
    delta_platform: DeltaPlatform,
) -> None:
    land(delta_platform, 0, 1)
    delta_platform.engine.ingest(STREAM)
    path = max(delta_platform.table_path(STREAM).glob("*.parquet"))
    kept = path.read_bytes()
    for damage in (path.unlink, lambda: path.write_bytes(kept[:50]), lambda: path.write_bytes(b"")):
        damage()
        with pytest.raises(TableError, match=r"can't be read.*restore them from a copy.*telematics reset"):
            values(delta_platform)
        with pytest.raises(TableError, match=r"can't be read"):
            delta_platform.engine.reset(STREAM, rebuild=True)
    land(delta_platform, 2)
    assert delta_platform.restart().ingest(STREAM).rows == 1
    path.write_bytes(kept)
    assert values(delta_platform) == ["0", "1", "2"]
