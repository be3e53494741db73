"""Options that choose files, size batches and rule what new columns do: each tells the story that its name promises."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from telematics_assets.autoloader.loader import STEPS
from telematics_assets.catalog import Column, FileStream, Names
from telematics_assets.engines.base import IngestRequest, SchemaChange
from telematics_assets.engines.checkpointed import CheckpointEngine
from telematics_assets.errors import SchemaError
from telematics_assets_tests.conformance.platforms import LOCATION, CheckpointPlatform, Platform
from telematics_assets_tests.conformance.samples import csv_stream, json_stream, lines, parquet, parquet_stream

N = Column("n", "BIGINT", "A number.")
FUEL = Column("fuel", "DOUBLE", "Fuel, litres.")
#: Steps that a load passes that only begins a stream.
BEGINNING = STEPS[: STEPS.index("metadata_published") + 1]


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the package catches it."""


def values(platform: Platform, stream: FileStream) -> list[Any]:
    return [row["n"] for row in platform.rows(stream, "n")]


def declared(stream: FileStream, *columns: Column) -> FileStream:
    """The stream with more columns in its contract."""
    contract = dataclasses.replace(stream.contract, columns=(*stream.contract.columns, *columns))
    return dataclasses.replace(stream, contract=contract)


def dying(platform: CheckpointPlatform, step: str) -> CheckpointEngine:
    def on_step(passed: str) -> None:
        if passed == step:
            raise Killed

    return platform.engine_over(on_step=on_step)


# -- schema_evolution_mode ---------------------------------------------------------------------------------------------


def refused_batch(platform: Platform) -> FileStream:
    """A good file and one with new columns have met a stream that fails on them."""
    stream = parquet_stream(N, schema_evolution_mode="failOnNewColumns")
    platform.volume_put("parquet/first", parquet(n=[0]), 1)
    platform.engine.ingest(stream)
    platform.volume_put("parquet/good", parquet(n=[1]), 2)
    platform.volume_put("parquet/wider", parquet(n=[2], fuel=[0.5], tag=["x"]), 3)
    with pytest.raises(SchemaError, match=r"parquet/wider .* fuel DOUBLE, tag STRING\. .*'failOnNewColumns'"):
        platform.engine.ingest(stream)
    return stream


def test_mode_fail_on_new_columns_commits_nothing_of_the_batch_however_often(platform: Platform) -> None:
    stream = refused_batch(platform)
    with pytest.raises(SchemaError, match="parquet/wider"):
        platform.restart().ingest(stream)
    assert values(platform, stream) == [0]
    assert platform.columns(stream) == {"n": "BIGINT"}
    assert platform.states(stream) == {"first": "INGESTED", "good": "DISCOVERED", "wider": "DISCOVERED"}
    assert platform.engine.look(stream).files == 2


def test_mode_fail_on_new_columns_goes_on_once_the_contract_declares_them(platform: Platform) -> None:
    stream = declared(refused_batch(platform), FUEL)
    with pytest.raises(SchemaError, match=r"lacks: tag STRING\."):
        platform.engine.ingest(stream)
    stream = declared(stream, Column("tag", "STRING", "A tag."))
    report = platform.engine.ingest(stream)
    assert [b.schema_changes for b in report.batches] == [
        (SchemaChange("fuel", "DOUBLE"), SchemaChange("tag", "STRING"))
    ]
    assert platform.rows(stream, "n", "fuel", "tag") == [
        {"n": 0, "fuel": None, "tag": None},
        {"n": 1, "fuel": None, "tag": None},
        {"n": 2, "fuel": 0.5, "tag": "x"},
    ]


def test_mode_fail_on_new_columns_gives_a_column_the_declared_type(platform: Platform) -> None:
    stream = declared(refused_batch(platform), Column("fuel", "STRING", "Fuel."), Column("tag", "STRING", "A tag."))
    assert platform.engine.ingest(stream).rows_rescued == 1
    assert platform.columns(stream) == {"n": "BIGINT", "fuel": "STRING", "tag": "STRING"}
    last = platform.rows(stream, "n", "fuel", "_rescued_data")[-1]
    assert json.loads(last.pop("_rescued_data")) == {"fuel": 0.5, "_file_path": f"{LOCATION}/parquet/wider"}
    assert last == {"n": 2, "fuel": None}


@pytest.mark.parametrize(("mode", "rescued"), [("addNewColumns", 0), ("rescue", 1), ("none", 1)])
def test_mode_fail_on_new_columns_goes_on_in_another_mode(platform: Platform, mode: str, rescued: int) -> None:
    stream = refused_batch(platform).with_options(schema_evolution_mode=mode)
    report = platform.engine.ingest(stream)
    assert (report.rows, report.rows_rescued) == (2, rescued)
    assert values(platform, stream) == [0, 1, 2]


def test_mode_fail_on_new_columns_goes_on_once_the_file_is_mended(platform: Platform) -> None:
    stream = refused_batch(platform)
    platform.volume_put("parquet/wider", parquet(n=[3]), 4)
    platform.engine.ingest(stream)
    platform.engine.ingest(stream)
    assert values(platform, stream) == [0, 1, 3]
    assert set(platform.states(stream).values()) == {"INGESTED"}


def test_mode_fail_on_new_columns_goes_on_once_the_file_is_removed(platform: Platform) -> None:
    stream = refused_batch(platform)
    platform.remove("parquet/wider")
    platform.engine.ingest(stream)
    assert values(platform, stream) == [0, 1]
    assert platform.states(stream) == {"first": "INGESTED", "good": "INGESTED", "wider": "SKIPPED_MISSING"}


def test_mode_fail_on_new_columns_does_not_fail_on_what_could_not_be_a_column(platform: Platform) -> None:
    stream = parquet_stream(N, schema_evolution_mode="failOnNewColumns")
    platform.volume_put("parquet/a", parquet({"n": [1], "N": [2], "two words": [3], "_batch_id": [4]}))
    assert platform.engine.ingest(stream).rows_rescued == 1
    assert platform.columns(stream) == {"n": "BIGINT"}


@pytest.mark.parametrize(
    ("stream", "path", "data"),
    [
        (json_stream("n", schema_evolution_mode="failOnNewColumns"), "json/a.json", lines('{"n":1}', '{"n":2,"v":3}')),
        (csv_stream("n", schema_evolution_mode="failOnNewColumns"), "csv/a.csv", lines("n,v", "1,2")),
    ],
    ids=["json", "csv"],
)
def test_mode_fail_on_new_columns_holds_text_files_from_the_first_load(
    platform: Platform, stream: FileStream, path: str, data: bytes
) -> None:
    platform.volume_put(path, data)
    with pytest.raises(SchemaError, match=rf"{path} has columns .* lacks: v STRING\."):
        platform.engine.ingest(stream)
    assert platform.rows(stream) == []
    platform.engine.ingest(declared(stream, Column("v", "STRING", "A value.")))
    assert platform.columns(stream) == {"n": "STRING", "v": "STRING"}


def test_a_file_that_changes_while_it_is_refused_leaves_its_batch_instead(
    checkpoint_platform: CheckpointPlatform,
) -> None:
    platform = checkpoint_platform
    stream = parquet_stream(N, schema_evolution_mode="failOnNewColumns")
    platform.volume_put("parquet/first", parquet(n=[4]), 1)
    platform.engine.ingest(stream)
    platform.volume_put("parquet/a", parquet(n=[1], v=[2]))
    platform.meddle("parquet/a", "read", lambda: platform.volume_put("parquet/a", parquet(n=[5]), 9))
    platform.engine.ingest(stream)
    platform.engine.ingest(stream)
    assert values(platform, stream) == [4, 5]


@pytest.mark.parametrize("mode", ["failOnNewColumns", "none"])
def test_without_a_contract_the_first_files_give_the_columns(platform: Platform, mode: str) -> None:
    stream = parquet_stream(schema_evolution_mode=mode)
    platform.volume_put("parquet/a", parquet(n=[1]), 1)
    platform.volume_put("parquet/b", parquet(n=[2], tag=["x"]), 2)
    platform.engine.ingest(stream)
    assert platform.columns(stream) == {"n": "BIGINT", "tag": "STRING"}


def test_mode_none_never_adds_a_column_not_even_to_a_new_table_and_loses_nothing(platform: Platform) -> None:
    stream = parquet_stream(N, schema_evolution_mode="none")
    platform.volume_put("parquet/a", parquet(n=[1], fuel=[0.5]), 1)
    report = platform.engine.ingest(stream)
    assert (report.rows_rescued, report.batches[0].schema_changes) == (1, ())
    assert platform.columns(stream) == {"n": "BIGINT"}
    (row,) = platform.rows(stream, "_rescued_data")
    assert json.loads(row["_rescued_data"]) == {"fuel": 0.5, "_file_path": f"{LOCATION}/parquet/a"}


# -- which files -------------------------------------------------------------------------------------------------------


def test_path_glob_filter_chooses_by_name_in_every_folder(platform: Platform) -> None:
    stream = json_stream("n", path_glob_filter="trip_[0-9]*.{json,ndjson}")
    names = ["trip_1.json", "day/trip_2.ndjson", "trip_x.json", "trip_3.txt", "trip_4.json/readme", "my_trip_5.json"]
    for number, name in enumerate(names):
        platform.volume_put(f"json/{name}", lines(f'{{"n":{number}}}'))
    assert platform.engine.look(stream).files == 2
    platform.engine.ingest(stream)
    assert values(platform, stream) == ["0", "1"]
    assert platform.states(stream) == {"trip_1.json": "INGESTED", "day/trip_2.ndjson": "INGESTED"}
    wider = stream.with_options(path_glob_filter="*")
    platform.engine.ingest(wider)
    assert values(platform, wider) == ["0", "1", "2", "3", "4", "5"]


def test_modified_after_and_before_are_bounds_that_exclude_themselves(platform: Platform) -> None:
    stream = json_stream("n", modified_after="1970-01-01T00:00:10", modified_before="1970-01-01T02:00:20+02:00")
    for nanoseconds in (9_999_999_999, 10_000_000_000, 10_000_000_001, 19_999_999_999, 20_000_000_000):
        platform.volume_put(f"json/{nanoseconds}", lines(f'{{"n":{nanoseconds}}}'), nanoseconds)
    assert platform.engine.look(stream).files == 2
    platform.engine.ingest(stream)
    assert values(platform, stream) == ["10000000001", "19999999999"]
    every = stream.with_options(modified_after=None, modified_before=None)
    platform.engine.ingest(every)
    assert len(values(platform, every)) == 5


def test_max_bytes_per_trigger_is_soft_and_takes_at_least_one_file(platform: Platform) -> None:
    record = lines('{"n":1}')
    for number in range(5):
        platform.volume_put(f"json/{number}", record, number + 1)
    sizes: list[list[int]] = []
    for limit in (1, 2 * len(record) - 1, 2 * len(record), 2 * len(record) + 1, f"{1 << 10}k"):
        stream = dataclasses.replace(
            json_stream("n", max_bytes_per_trigger=limit), name=f"s{len(sizes)}", table=f"t{len(sizes)}"
        )
        sizes.append([batch.files_ingested for batch in platform.engine.ingest(stream).batches])
        assert len(values(platform, stream)) == 5
    assert sizes == [[1, 1, 1, 1, 1], [2, 2, 1], [2, 2, 1], [3, 2], [5]]


def test_max_bytes_and_max_files_both_hold(platform: Platform) -> None:
    record = lines('{"n":1}')
    for number in range(5):
        platform.volume_put(f"json/{number}", record, number + 1)
    stream = json_stream("n", max_bytes_per_trigger=3 * len(record), max_files_per_trigger=2)
    assert [b.files_ingested for b in platform.engine.ingest(stream, IngestRequest(max_files=3)).batches] == [2, 1]
    assert [b.files_ingested for b in platform.engine.ingest(stream).batches] == [2]


# -- include_existing_files --------------------------------------------------------------------------------------------


def test_files_that_were_there_before_the_stream_began_are_known_and_never_loaded(platform: Platform) -> None:
    stream = json_stream("n", include_existing_files=False)
    platform.volume_put("json/old", lines('{"n":1}'))
    platform.volume_put("json/broken", b"\0\0")
    assert platform.engine.ingest(stream).batches == ()
    assert platform.rows(stream) == []
    assert platform.states(stream) == {"old": "SKIPPED_EXISTING", "broken": "SKIPPED_EXISTING"}
    assert "before the stream began" in platform.reason(stream, "old")
    pending = platform.engine.look(stream)
    assert (pending.files, pending.known) == (0, 2)
    for number in range(2, 22):
        platform.volume_put(f"json/{number}", lines(f'{{"n":{number}}}'), 1)
        assert platform.restart().ingest(stream).files_ingested == 1
    assert len(values(platform, stream)) == 20
    assert platform.states(stream)["old"] == "SKIPPED_EXISTING"
    assert [f.path for f in platform.engine.files(stream, "SKIPPED_EXISTING")] == ["json/broken", "json/old"]


def test_a_stream_that_began_with_an_empty_folder_loads_what_comes(platform: Platform) -> None:
    stream = parquet_stream(include_existing_files=False)
    assert platform.engine.ingest(stream).batches == ()
    platform.volume_put("parquet/a", parquet(n=[1]), 1)
    platform.restart().ingest(stream)
    assert values(platform, stream) == [1]


def test_include_existing_files_counts_only_when_the_stream_begins(platform: Platform) -> None:
    without, including = json_stream("n", include_existing_files=False), json_stream("n")
    platform.volume_put("json/a", lines('{"n":1}'))
    platform.engine.ingest(without)
    platform.volume_put("json/b", lines('{"n":2}'))
    platform.engine.ingest(including)
    platform.volume_put("json/c", lines('{"n":3}'))
    platform.engine.ingest(without)
    assert values(platform, without) == ["2", "3"]


def test_an_existing_file_that_changes_is_reported_and_loaded_only_with_allow_overwrites(platform: Platform) -> None:
    stream = json_stream("n", include_existing_files=False)
    platform.volume_put("json/a", lines('{"n":1}'), 1)
    platform.engine.ingest(stream)
    platform.volume_put("json/a", lines('{"n":2}'), 2)
    assert platform.engine.ingest(stream).files_changed == 1
    assert platform.states(stream) == {"a": "CHANGED"}
    assert "when it was left out" in platform.reason(stream, "a")
    platform.engine.ingest(stream.with_options(allow_overwrites=True))
    assert values(platform, stream) == ["2"]
    assert platform.states(stream) == {"a": "INGESTED"}


def test_a_stream_that_starts_anew_leaves_out_what_is_there_then(platform: Platform) -> None:
    stream = json_stream("n", include_existing_files=False)
    platform.volume_put("json/a", lines('{"n":1}'))
    platform.engine.ingest(stream)
    platform.volume_put("json/b", lines('{"n":2}'))
    platform.engine.ingest(stream)
    platform.engine.reset(stream, drop_table=True)
    platform.engine.ingest(stream)
    assert platform.states(stream) == {"a": "SKIPPED_EXISTING", "b": "SKIPPED_EXISTING"}
    platform.engine.reset(stream, drop_table=True)
    platform.engine.ingest(json_stream("n"))
    assert values(platform, stream) == ["1", "2"]


def test_a_ledger_made_from_the_table_still_knows_what_was_left_out(platform: Platform) -> None:
    stream = json_stream("n", include_existing_files=False)
    platform.volume_put("json/a", lines('{"n":1}'))
    platform.engine.ingest(stream)
    platform.volume_put("json/b", lines('{"n":2}'))
    platform.engine.ingest(stream)
    platform.engine.reset(stream, rebuild=True)
    platform.restart().ingest(stream)
    assert values(platform, stream) == ["2"]
    assert platform.states(stream) == {"a": "SKIPPED_EXISTING", "b": "INGESTED"}


@pytest.mark.parametrize("step", BEGINNING)
def test_a_beginning_that_dies_at_any_step_is_finished_by_the_next(
    checkpoint_platform: CheckpointPlatform, step: str
) -> None:
    """What landed before the record was made is left out, what landed after it is loaded."""
    platform = checkpoint_platform
    stream = json_stream("n", include_existing_files=False)
    platform.volume_put("json/a", lines('{"n":1}'))
    try:
        dying(platform, step).ingest(stream)
    except Killed:
        pass
    else:
        pytest.fail(f"{step} was not passed")
    recorded = "ledger/existing" in platform.checkpoint(stream)
    assert recorded == (step in ("table_created", "metadata_published"))
    platform.volume_put("json/b", lines('{"n":2}'))
    platform.restart().ingest(stream)
    assert platform.states(stream) == {"a": "SKIPPED_EXISTING", "b": "INGESTED" if recorded else "SKIPPED_EXISTING"}
    assert values(platform, stream) == (["2"] if recorded else [])


def test_of_two_beginnings_the_first_record_counts(checkpoint_platform: CheckpointPlatform) -> None:
    platform = checkpoint_platform
    stream = json_stream("n", include_existing_files=False)
    platform.volume_put("json/a", lines('{"n":1}'))
    with pytest.raises(Killed):
        dying(platform, "table_created").ingest(stream)
    platform.lakehouse.drop(Names().bronze(stream.table))
    platform.volume_put("json/b", lines('{"n":2}'))
    platform.restart().ingest(stream)
    assert platform.states(stream) == {"a": "SKIPPED_EXISTING", "b": "INGESTED"}


# -- allow_overwrites --------------------------------------------------------------------------------------------------


def test_an_overwritten_file_is_ingested_again_beside_its_old_rows_once_per_version(platform: Platform) -> None:
    stream = parquet_stream(allow_overwrites=True)
    platform.volume_put("parquet/a", parquet(n=[1]), 1_000)
    platform.volume_put("parquet/b", parquet(n=[9]), 1_000)
    platform.engine.ingest(stream)
    for version in range(2, 14):
        platform.volume_put("parquet/a", parquet(n=[version]), version * 1_000)
        assert platform.states(stream) == {"a": "DISCOVERED", "b": "INGESTED"}
        assert "beside the old" in platform.reason(stream, "a")
        assert platform.engine.look(stream).files == 1
        report = platform.restart().ingest(stream)
        assert (report.files_ingested, report.files_changed) == (1, 0)
        assert platform.engine.ingest(stream).batches == ()
    assert values(platform, stream) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 10, 11, 12, 13]
    a, b = platform.engine.files(stream)
    assert (a.state, a.batch_id, a.modified_ns, a.rows) == ("INGESTED", 12, 13_000, 1)
    assert (b.state, b.batch_id) == ("INGESTED", 0)


def test_the_books_of_batches_balance_after_their_files_were_overwritten(platform: Platform) -> None:
    stream = json_stream("n", allow_overwrites=True)
    for version in range(1, 12):
        platform.volume_put("json/a", lines(*[f'{{"n":{version}}}'] * version), version)
        platform.volume_put(f"json/b{version}", lines('{"n":0}'), version)
        platform.engine.ingest(stream)
    books = platform.restart().balance(stream, 0)
    assert [(b.batch_id, b.expected_rows, b.added_rows) for b in books] == [(n, n + 2, n + 2) for n in range(11)]


def test_a_version_that_comes_back_is_not_ingested_twice(platform: Platform) -> None:
    stream = parquet_stream(allow_overwrites=True)
    for n, modified in ((1, 1_000), (2, 2_000), (1, 1_000), (3, 3_000), (2, 2_000), (1, 1_000)):
        platform.volume_put("parquet/a", parquet(n=[n]), modified)
        platform.restart().ingest(stream)
    assert values(platform, stream) == [1, 2, 3]


def test_a_damaged_overwrite_is_named_and_the_old_rows_stay(platform: Platform) -> None:
    stream = parquet_stream(allow_overwrites=True)
    for data, modified in ((parquet(n=[1]), 1), (b"oops", 2), (parquet(n=[1]), 1), (parquet(n=[3]), 3)):
        platform.volume_put("parquet/a", data, modified)
        platform.restart().ingest(stream)
        if data == b"oops":
            assert platform.states(stream) == {"a": "SKIPPED_CORRUPTED"}
    assert values(platform, stream) == [1, 3]
    assert platform.states(stream) == {"a": "INGESTED"}


def test_versions_are_known_after_a_ledger_was_made_from_the_table(platform: Platform) -> None:
    stream = parquet_stream(allow_overwrites=True)
    platform.volume_put("parquet/a", parquet(n=[1]), 1_000)
    platform.engine.ingest(stream)
    platform.engine.reset(stream, rebuild=True)
    for n, modified in ((1, 1_000), (2, 2_000), (1, 1_000)):
        platform.volume_put("parquet/a", parquet(n=[n]), modified)
        platform.restart().ingest(stream)
    assert values(platform, stream) == [1, 2]


def test_overwrites_can_be_allowed_later_and_forbidden_again(platform: Platform) -> None:
    stream = json_stream("n")
    allowing = stream.with_options(allow_overwrites=True)
    platform.volume_put("json/a", lines('{"n":1}'), 1)
    platform.engine.ingest(stream)
    platform.volume_put("json/a", lines('{"n":2}'), 2)
    platform.engine.ingest(stream)
    assert values(platform, stream) == ["1"]
    platform.engine.ingest(allowing)
    assert values(platform, stream) == ["1", "2"]
    platform.volume_put("json/a", lines('{"n":3}'), 3)
    assert platform.engine.ingest(stream).files_changed == 1
    assert values(platform, stream) == ["1", "2"]


@pytest.mark.parametrize("step", STEPS)
def test_an_overwrite_whose_load_dies_at_any_step_is_there_once(
    checkpoint_platform: CheckpointPlatform, step: str
) -> None:
    platform = checkpoint_platform
    stream = json_stream("n", allow_overwrites=True)
    platform.volume_put("json/a", lines('{"n":1}'), 1)
    platform.engine.ingest(stream)
    platform.volume_put("json/a", lines('{"n":2}'), 2)
    try:
        dying(platform, step).ingest(stream)
    except Killed:
        pass
    else:
        assert step in ("table_created", "metadata_published"), "only a beginning passes these"
    platform.restart().ingest(stream)
    assert values(platform, stream) == ["1", "2"]
    assert platform.states(stream) == {"a": "INGESTED"}


def test_a_column_that_an_option_names_later_is_added_to_the_table_in_every_mode(platform: Platform) -> None:
    before = json_stream("n", schema_evolution_mode="rescue")
    platform.volume_put("json/a.json", lines('{"n":1}'), 1)
    platform.engine.ingest(before)
    after = json_stream(
        "n", schema_evolution_mode="rescue", raw_record_column="_raw_record", rescued_data_column="_left_over"
    )
    platform.volume_put("json/b.json", lines('{"n":2,"x":3}', "oops"), 2)
    report = platform.restart().ingest(after)
    assert {change.column for change in report.batches[0].schema_changes} == {"_raw_record", "_left_over"}
    rescued = f'{{"x":3,"_file_path":"{LOCATION}/json/b.json"}}'
    assert [(row["_raw_record"], row["_left_over"]) for row in platform.rows(after, "_raw_record", "_left_over")] == [
        (None, None),
        ("oops", None),
        ('{"n":2,"x":3}', rescued),
    ]
