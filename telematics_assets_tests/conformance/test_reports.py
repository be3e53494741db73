"""What an engine says: reports, states, pending files, books. Numbers that can be checked by hand."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from telematics_assets.autoloader import duplicates
from telematics_assets.catalog import Column
from telematics_assets.engines.base import (
    BatchBalance,
    BatchReport,
    Duplicate,
    Duplicates,
    Engine,
    FileRecord,
    IngestRequest,
    PendingFiles,
    Progress,
    SchemaChange,
    SkippedFile,
    Violations,
)
from telematics_assets.errors import OptionError, TransientError
from telematics_assets_tests.conformance.platforms import Platform
from telematics_assets_tests.conformance.samples import json_stream, lines, parquet, parquet_stream


def test_a_report_counts_files_bytes_rows_rescued_and_corrupt(platform: Platform) -> None:
    stream = json_stream("n")
    first, second = lines('{"n":1}', "oops", '{"n":2,"N":3}'), lines('{"n":4,"v":5}')
    platform.volume_put("json/a.json", first, 1)
    platform.volume_put("json/b.json", b"", 2)
    platform.volume_put("json/c.json", second, 3)
    report = platform.engine.ingest(stream)
    skipped = SkippedFile("json/b.json", "SKIPPED_CORRUPTED", platform.reason(stream, "b.json"))
    assert report.batches == (
        BatchReport(
            batch_id=0,
            table_version=report.table_version,
            files_ingested=2,
            bytes_ingested=len(first) + len(second),
            rows=4,
            rows_rescued=1,
            rows_corrupt=1,
            skipped=(skipped,),
            schema_changes=report.batches[0].schema_changes,
        ),
    )
    assert (report.stream, report.table, report.table_rows) == ("events", "workspace.01_bronze.events", 4)
    assert (report.files_ingested, report.files_skipped, report.rows_rescued, report.rows_corrupt) == (2, 1, 1, 1)
    assert (report.files_changed, report.files_waiting, report.yielded) == (0, 0, False)
    assert report.seconds > 0
    assert pickle.loads(pickle.dumps(report)) == report


def test_files_are_listed_by_path_with_what_became_of_each(platform: Platform) -> None:
    stream = json_stream("n")
    platform.volume_put("json/b.json", lines('{"n":1}', "oops"), 1_000)
    platform.volume_put("json/c.json", b"", 2_000)
    platform.engine.ingest(stream)
    platform.volume_put("json/a.json", lines("{}"), 3_000)
    empty = platform.reason(stream, "c.json")
    new = FileRecord("json/a.json", "DISCOVERED", None, 3, 3_000, None, None)
    loaded = FileRecord("json/b.json", "INGESTED", None, 13, 1_000, 0, 2)
    corrupted = FileRecord("json/c.json", "SKIPPED_CORRUPTED", empty, 0, 2_000, 0, 0)
    assert list(platform.engine.files(stream)) == [new, loaded, corrupted]
    assert list(platform.engine.files(stream, "INGESTED")) == [loaded]
    assert list(platform.engine.files(stream, "CHANGED")) == []


def test_a_look_counts_what_a_load_would_take_and_its_fingerprint_follows_the_set_of_files(platform: Platform) -> None:
    stream = json_stream()
    look = platform.engine.look
    nothing = look(stream)
    assert nothing == PendingFiles("events", 0, 0, "", 0, 0, 0, nothing.data_version)
    platform.volume_put("json/a.json", lines('{"n":1}'), 1_000)
    one = look(stream)
    assert (one.files, one.bytes, one.known, one.oldest_modified_ns) == (1, 8, 0, 1_000)
    assert look(stream) == one
    assert platform.restart().look(stream) == one
    seen = [nothing.fingerprint, one.fingerprint]
    for size, when in ((2, 1_000), (2, 2_000)):
        platform.volume_put("json/a.json", b"{}" + b"\n" * (size - 1), when)
        seen.append(platform.engine.look(stream).fingerprint)
    platform.volume_put("json/b.json", lines('{"n":2}'), 500)
    two = platform.engine.look(stream)
    seen.append(two.fingerprint)
    assert len(set(seen)) == 5
    assert (two.files, two.oldest_modified_ns) == (2, 500)
    platform.engine.ingest(stream)
    done = platform.engine.look(stream)
    assert (done.files, done.bytes, done.fingerprint, done.known) == (0, 0, "", 2)
    assert done.data_version == two.data_version != nothing.data_version


def test_a_look_writes_nothing(platform: Platform) -> None:
    stream = json_stream()
    platform.volume_put("json/a.json", lines('{"n":1}'))
    for _ in range(2):
        platform.engine.look(stream)
        platform.engine.files(stream)
    assert platform.engine.tables() == []
    assert platform.engine.ingest(stream).batches[0].batch_id == 0


def test_the_books_of_every_batch_balance(platform: Platform) -> None:
    stream = json_stream(max_files_per_trigger=1)
    for number, count in enumerate((2, 1, 3)):
        platform.volume_put(f"json/{number}.json", lines(*['{"n":1}'] * count), number)
    report = platform.engine.ingest(stream)
    versions = [batch.table_version or 0 for batch in report.batches]
    assert list(platform.engine.balance(stream, 0)) == [
        BatchBalance(0, versions[0], 2, 2),
        BatchBalance(1, versions[1], 1, 1),
        BatchBalance(2, versions[2], 3, 3),
    ]
    assert list(platform.restart().balance(stream, 2)) == [BatchBalance(2, versions[2], 3, 3)]
    assert list(platform.engine.balance(stream, 3)) == []


def test_reading_takes_columns_limits_and_batches(platform: Platform) -> None:
    stream = parquet_stream(max_files_per_trigger=1)
    for number in range(3):
        platform.volume_put(f"parquet/{number}.parquet", parquet(n=[number, number], v=["x", "y"]), number)
    platform.engine.ingest(stream)
    table = platform.engine.names.bronze("readings")
    assert platform.engine.read(table, ["v", "nobody", "n"]).column_names == ["v", "n"]
    assert platform.engine.read(table, ["n"], limit=2).num_rows == 2
    assert platform.engine.read(table, limit=100).num_rows == 6
    assert sorted(platform.engine.read(table, ["n"], since_batch=1)["n"].to_pylist()) == [1, 1, 2, 2]
    assert platform.engine.read(table, ["n"], since_batch=3).num_rows == 0


def test_the_state_of_a_table_tells_rows_and_version(platform: Platform) -> None:
    stream = parquet_stream()
    for number in range(2):
        platform.volume_put(f"parquet/{number}.parquet", parquet(n=[number] * 10))
        report = platform.engine.ingest(stream)
    state = platform.engine.state(platform.engine.names.bronze("readings"))
    assert state is not None
    assert (state.table, state.rows, state.version) == ("workspace.01_bronze.readings", 20, report.table_version)
    assert state.files == 2
    assert state.bytes > 0
    assert platform.engine.tables() == [state]


def test_implausible_values_are_counted_by_column_and_batch(platform: Platform) -> None:
    columns = (
        Column("speed", "STRING", "Speed.", minimum=0, maximum=300),
        Column("lat", "STRING", "Latitude.", minimum=-90),
        Column("note", "STRING", "A note."),
        Column("absent", "STRING", "Not in the table.", minimum=0),
    )
    stream = json_stream("speed", "lat", "note")
    platform.volume_put("json/a.json", lines('{"speed":-1,"lat":-91}'))
    platform.engine.ingest(stream)
    speeds = ["0", "300", "300.5", '"fast"', "null", "1e400", '""']
    platform.volume_put("json/b.json", lines(*(f'{{"speed":{speed},"lat":90}}' for speed in speeds)))
    platform.engine.ingest(stream)
    table = platform.engine.names.bronze("events")
    speed, lat = platform.engine.violations(table, columns, 1)
    assert (speed.column, speed.checked, speed.outside) == ("speed", 6, 4)
    assert speed.example in {"300.5", "fast", "1e400", ""}
    assert lat == Violations("lat", 7, 0, None)
    speed, lat = platform.engine.violations(table, columns, 0)
    assert (speed.checked, speed.outside, lat.checked, lat.outside) == (7, 5, 8, 1)


def test_progress_names_phases_and_counts(platform: Platform) -> None:
    stream = json_stream(max_files_per_trigger=2)
    for number in range(3):
        platform.volume_put(f"json/{number}.json", lines('{"n":1}'), number)
    told: list[Progress] = []
    platform.engine.ingest(stream, IngestRequest(), told.append)
    assert {p.phase for p in told} <= {"list", "plan", "read", "commit", "done"}
    assert [(p.done, p.total) for p in told if p.phase == "plan"] == [(0, 2), (0, 1)]
    assert all(p.message and p.done <= max(p.total, p.done) for p in told)


def test_schema_changes_name_delta_types(platform: Platform) -> None:
    stream = parquet_stream(Column("n", "BIGINT", "A number."))
    platform.volume_put("parquet/a.parquet", parquet(n=[1]))
    platform.engine.ingest(stream)
    platform.volume_put("parquet/b.parquet", parquet(n=[2], tags=[["x"]]))
    assert platform.engine.ingest(stream).batches[0].schema_changes == (SchemaChange("tags", "ARRAY<STRING>"),)


def test_loaders_at_the_same_time_load_every_file_once(platform: Platform) -> None:
    stream = json_stream(max_files_per_trigger=2)
    for number in range(12):
        platform.volume_put(f"json/{number:02}.json", lines(f'{{"n":"{number:02}"}}'), number)

    def load(engine: Engine) -> None:
        try:
            engine.ingest(stream)
        except TransientError:
            return

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(load, [platform.new_engine() for _ in range(3)]))
    platform.engine.ingest(stream)
    assert [row["n"] for row in platform.rows(stream, "n")] == [f"{number:02}" for number in range(12)]
    assert set(platform.states(stream).values()) == {"INGESTED"}


def test_two_streams_do_not_touch_each_other(platform: Platform) -> None:
    platform.volume_put("parquet/a.parquet", parquet(n=[1]))
    platform.volume_put("json/a.json", lines('{"n":2}'))
    assert platform.engine.ingest(parquet_stream()).rows == 1
    assert platform.engine.look(json_stream()).files == 1
    assert platform.engine.ingest(json_stream()).rows == 1
    assert [state.table for state in platform.engine.tables()] == [
        "workspace.01_bronze.events",
        "workspace.01_bronze.readings",
    ]


def test_the_doctor_finds_nothing_wrong_and_counts(platform: Platform) -> None:
    stream = json_stream()
    platform.volume_put("json/a.json", lines('{"n":1}'))
    platform.engine.ingest(stream)
    platform.volume_put("json/b.json", lines('{"n":2}'))
    (finding,) = [f for f in platform.engine.doctor([stream]) if f.subject == "stream events"]
    assert finding.level == "ok"
    assert "1 files known, 1 to load" in finding.message


@pytest.mark.parametrize("rebuild", [False, True])
def test_a_stream_that_never_began_has_nothing_to_reset(platform: Platform, rebuild: bool) -> None:
    stream = json_stream()
    if rebuild:
        with pytest.raises(OptionError, match="does not exist"):
            platform.engine.reset(stream, rebuild=True)
    else:
        platform.engine.reset(stream)
    platform.volume_put("json/a.json", lines('{"n":1}'))
    assert platform.engine.ingest(stream).rows == 1


def test_the_same_bytes_under_two_names_are_loaded_twice_and_told(platform: Platform) -> None:
    stream = json_stream("n")
    content = lines('{"n":1}', '{"n":2}')
    platform.volume_put("json/a.json", content, 1)
    platform.volume_put("json/blank_1", b"\n\n", 1)
    platform.volume_put("json/blank_2", b"\n\n", 1)
    platform.engine.ingest(stream)
    assert platform.engine.duplicates(stream, 0) == Duplicates((), 0)
    platform.volume_put("json/sub/a.json", content, 2)
    platform.volume_put("json/b.json", content, 3)
    platform.volume_put("json/other.json", lines('{"n":1}', '{"n":3}'), 4)
    assert platform.engine.ingest(stream).rows == 6
    found = Duplicates((Duplicate("json/b.json", "json/a.json", 1), Duplicate("json/sub/a.json", "json/a.json", 1)), 0)
    assert platform.engine.duplicates(stream, 0) == found
    assert platform.engine.duplicates(stream, 1) == found, "files of a batch are held against those of all batches"
    assert platform.restart().duplicates(stream, 2) == Duplicates((), 0)
    assert pickle.loads(pickle.dumps(found)) == found
    platform.volume_put("json/a.json", lines('{"n":1}', '{"n":9}'))
    platform.remove("json/other.json")
    assert platform.engine.duplicates(stream, 0) == Duplicates((Duplicate("json/sub/a.json", "json/b.json", 1),), 2)


def test_large_files_that_differ_in_their_middle_only_are_no_duplicates(platform: Platform) -> None:
    stream = json_stream("n")

    def large(middle: bytes) -> bytes:
        return b'{"n":"' + b"x" * 150_000 + middle + b"x" * 150_000 + b'"}'

    for name, middle in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        platform.volume_put(f"json/{name}", large(middle), 1)
    platform.engine.ingest(stream)
    assert platform.engine.duplicates(stream, 0) == Duplicates((Duplicate("json/c", "json/a", 0),), 0)


def test_the_search_for_duplicates_is_bounded_and_says_what_it_left_out(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "MAX_OPENED", 3)
    stream = json_stream("n")
    for number in range(5):
        platform.volume_put(f"json/{number}", lines('{"n":1}'), 1)
    platform.engine.ingest(stream)
    found = platform.engine.duplicates(stream, 0)
    assert ([file.path for file in found.files], found.passed_over) == (["json/1", "json/2"], 2)
    monkeypatch.setattr(duplicates, "END_BYTES", 2)
    monkeypatch.setattr(duplicates, "MAX_READ_BYTES", 10)
    assert platform.engine.duplicates(stream, 0) == Duplicates((), 5)
