"""Staging: what matches the contract lands whole; what doesn't is named, and nothing of it is there."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from telematics_assets.catalog import TELEMATICS, TELEMATICS_TEST, Column, FileStream, TableContract
from telematics_assets.demo.fleet import FleetPlan, json_bytes, parquet_bytes, points
from telematics_assets.errors import UnknownNameError, VolumeError, VolumeUnavailableError
from telematics_assets.staging import RefusedFile, StageReport, stage
from telematics_assets.volumes.base import as_files
from telematics_assets.volumes.local import LocalVolume
from telematics_assets.volumes.memory import MemoryVolume

POINTS = points(FleetPlan(vehicles=2, files=1, rows=20))
PARQUET = parquet_bytes(POINTS)
JSON = json_bytes(POINTS)
RECORD: dict[str, Any] = json.loads(JSON.splitlines()[0])


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    folder = tmp_path / "samples"
    folder.mkdir()
    return folder


@pytest.fixture
def volume() -> MemoryVolume:
    return MemoryVolume()


def landed(volume: MemoryVolume) -> dict[str, bytes]:
    return {e.path: volume.read(e.path) for folder in ("parquet", "json") for e in as_files(volume.scan(folder).files)}


def refusal(report: StageReport) -> str:
    """The reason of the one file that was refused."""
    assert report.staged == ()
    (refused,) = report.refused
    return refused.reason


def stage_one(data: bytes, stream: FileStream, samples: Path, volume: MemoryVolume) -> StageReport:
    path = samples / "sample"
    path.write_bytes(data)
    return stage([path], stream, volume)


def json_of(*records: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_a_folder_lands_below_the_streams_folder_with_its_own_paths_and_hidden_names_stay_out(
    samples: Path, volume: MemoryVolume
) -> None:
    for name in ("a.parquet", "day 1/b.parquet", "_tmp/c.parquet", ".git/d", "day 1/.e.parquet", "_f.parquet"):
        (samples / name).parent.mkdir(exist_ok=True)
        (samples / name).write_bytes(PARQUET)
    report = stage([samples], TELEMATICS, volume)
    assert [(file.path, file.size, file.already_there) for file in report.staged] == [
        ("parquet/a.parquet", len(PARQUET), False),
        ("parquet/day 1/b.parquet", len(PARQUET), False),
    ]
    assert report.refused == ()
    assert landed(volume) == {"parquet/a.parquet": PARQUET, "parquet/day 1/b.parquet": PARQUET}


def test_json_lands_plain_or_compressed_whatever_its_name_says(samples: Path, volume: MemoryVolume) -> None:
    packed = gzip.compress(JSON)
    (samples / "plain.txt").write_bytes(JSON)
    (samples / "packed.json").write_bytes(packed)
    report = stage([samples / "plain.txt", samples / "packed.json"], TELEMATICS_TEST, volume)
    assert report.refused == ()
    assert landed(volume) == {"json/plain.txt": JSON, "json/packed.json": packed}


def test_staging_again_changes_nothing_and_says_so(samples: Path, volume: MemoryVolume) -> None:
    (samples / "a.parquet").write_bytes(PARQUET)
    stage([samples], TELEMATICS, volume)
    before = volume.stat("parquet/a.parquet")
    again = stage([samples], TELEMATICS, volume)
    assert [file.already_there for file in again.staged] == [True]
    assert volume.stat("parquet/a.parquet") == before


def test_nothing_is_overwritten_silently(samples: Path, volume: MemoryVolume) -> None:
    volume.put("parquet/sample", b"somebody else's")
    assert "parquet/sample exists with other content" in refusal(stage_one(PARQUET, TELEMATICS, samples, volume))
    assert landed(volume) == {"parquet/sample": b"somebody else's"}


def test_of_two_sources_with_one_name_the_second_is_refused(samples: Path, volume: MemoryVolume) -> None:
    for folder, rows in (("x", 10), ("y", 20)):
        (samples / folder).mkdir()
        (samples / folder / "a.parquet").write_bytes(parquet_bytes(POINTS.head(rows)))
    report = stage([samples / "x", samples / "y"], TELEMATICS, volume)
    assert [file.source for file in report.staged] == [str(samples / "x" / "a.parquet")]
    assert [file.source for file in report.refused] == [str(samples / "y" / "a.parquet")]


def test_one_bad_file_does_not_keep_the_good_ones_out(samples: Path, volume: MemoryVolume) -> None:
    (samples / "a.parquet").write_bytes(b"PAR1 no")
    (samples / "b.parquet").write_bytes(PARQUET)
    report = stage([samples], TELEMATICS, volume)
    assert [file.path for file in report.staged] == ["parquet/b.parquet"]
    assert [file.source for file in report.refused] == [str(samples / "a.parquet")]
    assert landed(volume) == {"parquet/b.parquet": PARQUET}


@pytest.mark.parametrize(
    "data", [b"", PARQUET[:-20], PARQUET[: len(PARQUET) // 2], b"<html></html>", JSON], ids=range(5)
)
def test_what_is_no_parquet_file_is_refused(data: bytes, samples: Path, volume: MemoryVolume) -> None:
    assert "arquet" in refusal(stage_one(data, TELEMATICS, samples, volume))
    assert landed(volume) == {}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.drop("vehicle_id", "latitude"), "required columns are missing: vehicle_id, latitude"),
        (lambda t: t.with_columns(pl.col("speed_kmh").cast(pl.String)), "column 'speed_kmh' is string in the file"),
        (lambda t: t.with_columns(pl.col("engine_rpm") + 0.5), "column 'engine_rpm' is double in the file"),
        (
            lambda t: t.rename({"fuel_level_pct": "Fuel_Level_Pct"}),
            "differs from the contract's 'fuel_level_pct' by case",
        ),
        (lambda t: t.with_columns(pl.lit("x").alias("_Source_File")), "is a name of the loader's own"),
        (lambda t: t.with_columns(pl.lit("x").alias("a b")), "a name that a Delta table can't hold"),
    ],
)
def test_parquet_that_does_not_fit_the_contract_is_refused_by_column(
    change: Callable[[pl.DataFrame], pl.DataFrame], reason: str, samples: Path, volume: MemoryVolume
) -> None:
    assert reason in refusal(stage_one(parquet_bytes(change(POINTS)), TELEMATICS, samples, volume))
    assert landed(volume) == {}


def test_narrower_types_missing_optional_columns_and_new_columns_are_welcome(
    samples: Path, volume: MemoryVolume
) -> None:
    table = POINTS.drop("ignition_on").with_columns(
        pl.col("engine_rpm").cast(pl.Int16), pl.lit(12.5).alias("battery_voltage_v")
    )
    assert stage_one(parquet_bytes(table), TELEMATICS, samples, volume).refused == ()
    assert stage_one(JSON.replace(b"engine_rpm", b"new_key"), TELEMATICS_TEST, samples, volume).refused == ()


def test_a_stream_that_rescues_takes_no_new_columns(samples: Path, volume: MemoryVolume) -> None:
    for stream, data in (
        (TELEMATICS, parquet_bytes(POINTS.with_columns(pl.lit(1).alias("extra")))),
        (TELEMATICS_TEST, json_of(RECORD, {**RECORD, "extra": 1})),
    ):
        strict = stream.with_options(schema_evolution_mode="rescue")
        assert "column 'extra' is not in the contract" in refusal(stage_one(data, strict, samples, volume))
        assert stage_one(data, stream, samples, MemoryVolume()).refused == ()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it has no records"),
        (b"\n\r\n  \n", "it has no records"),
        (JSON + b'{"vehicle_id":"V1","chass', "line 21 is no JSON object"),
        (b"\n\n" + JSON.splitlines(keepends=True)[0] + b"\n[1]\n" + JSON, "line 5 is no JSON object: [1]"),
        (JSON.replace(b"V00001-", b"V\xff-", 1), "line 2 is no JSON object"),
        (gzip.compress(JSON + b"{} {}\n"), "line 21 is no JSON object: {} {}"),
        (gzip.compress(JSON)[:-10], "gzip"),
        (json_of({k: v for k, v in RECORD.items() if k != "trip_id"}), "required columns are missing: trip_id"),
        (json_of({**RECORD, "trip_id": None}), "required columns are missing: trip_id"),
        (json_of({**RECORD, "Speed_KMH": 1}), "column 'Speed_KMH' differs from the contract's 'speed_kmh' by case"),
        (PARQUET, "line 1 is no JSON object"),
    ],
    ids=range(11),
)
def test_json_that_does_not_fit_the_contract_is_refused_by_its_first_bad_line(
    data: bytes, reason: str, samples: Path, volume: MemoryVolume
) -> None:
    assert reason in refusal(stage_one(data, TELEMATICS_TEST, samples, volume))
    assert landed(volume) == {}


def test_the_first_bad_line_is_named_however_far_behind_it_is(samples: Path, volume: MemoryVolume) -> None:
    lines = JSON.splitlines(keepends=True)[0] * 40_000
    assert "line 40001 is no JSON object: oops" in refusal(
        stage_one(lines + b"oops\n" + lines, TELEMATICS_TEST, samples, volume)
    )


def test_a_contract_without_required_columns_still_keeps_other_data_out(samples: Path, volume: MemoryVolume) -> None:
    trips = FileStream(
        "trips", "json", "json", "trips", TableContract("Trips.", (Column("trip_id", "STRING", "Trip."),))
    )
    assert refusal(stage_one(b'{"other": 1}\n', trips, samples, volume)) == "it has none of the contract's columns"
    anything = FileStream("trips", "json", "json", "trips", TableContract("Anything."))
    assert stage_one(b'{"other": 1}\n', anything, samples, volume).refused == ()


TYPED = TableContract("Trips.", (Column("km", "DOUBLE", "Distance, km."), Column("no", "BIGINT", "Number.")))
HINTS = {"schema_hints": "legs.km DOUBLE, at TIMESTAMP"}
TYPED_JSON = FileStream("trips", "json", "json", "trips", TYPED, HINTS)  # type: ignore[arg-type]
TYPED_CSV = FileStream("trips", "csv", "json", "trips", TYPED, {"schema_hints": "at TIMESTAMP"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stream", "good", "bad", "reason"),
    [
        (
            TYPED_JSON,
            '"km":1.10,"no":1,"x":{"no":"1"}',
            '"km":1,"no":2.5',
            "record 2 has 2.5 in column 'no', and BIGINT",
        ),
        (TYPED_JSON, '"no":1,"legs":{"km":1}', '"legs":{"km":1,"m":2}', 'has {"km":1,"m":2} in column \'legs\''),
        (TYPED_JSON, '"no":1,"at":"2026-01-31T12:00Z"', '"at":"noon"', "has \"noon\" in column 'at', and TIMESTAMP"),
        (TYPED_JSON, '"no":1', '"AT":1', "differs from the contract's 'at' by case only"),
    ],
)
def test_json_is_judged_by_the_types_that_the_loader_gives_it(
    stream: FileStream, good: str, bad: str, reason: str, samples: Path, volume: MemoryVolume
) -> None:
    assert stage_one(f"{{{good}}}\n".encode(), stream, samples, volume).refused == ()
    volume.delete("json/sample")
    assert reason in refusal(stage_one(f"{{{good}}}\n{{{bad}}}\n".encode(), stream, samples, volume))
    assert landed(volume) == {}


def test_csv_is_judged_by_the_types_that_the_loader_gives_it(samples: Path, volume: MemoryVolume) -> None:
    good = b"no,km,at,more\n1,1.10,2026-01-31T12:00Z,x\n,,,\n"
    assert stage_one(good, TYPED_CSV, samples, volume).refused == ()
    volume.delete("json/sample")
    assert "record 3 has \"007\" in column 'no', and BIGINT can't hold it exactly" in refusal(
        stage_one(good + b"007,,,\n", TYPED_CSV, samples, volume)
    )
    assert "record 3 has more fields" in refusal(stage_one(good + b"7,,,,x\n", TYPED_CSV, samples, volume))


def test_parquet_is_judged_by_its_hints(samples: Path, volume: MemoryVolume) -> None:
    stream = FileStream("trips", "parquet", "parquet", "trips", TYPED, {"schema_hints": "d.a BIGINT"})  # type: ignore[arg-type]

    def refused(kind: pa.DataType) -> tuple[RefusedFile, ...]:
        buffer = io.BytesIO()
        given = pa.array([{"a": 1, "b": 2}], pa.struct([("a", kind), ("b", pa.int8())]))
        pq.write_table(pa.table({"km": [1.5], "d": given}), buffer)
        return stage_one(buffer.getvalue(), stream, samples, volume).refused

    assert refused(pa.int32()) == ()
    assert "and the stream says STRUCT<a: BIGINT, b: TINYINT>" in refused(pa.float64())[0].reason


TRIPS_CSV = FileStream(
    "trips",
    "csv",
    "csv",
    "trips",
    TableContract(
        "One row per trip.", (Column("trip_id", "STRING", "Trip.", required=True), Column("km", "STRING", "Distance."))
    ),
)


@pytest.mark.parametrize(
    "data",
    [b"trip_id,km\n1,2.5\n", b'km,trip_id,new\r\n"a\nb",,\r\n', b"trip_id\n1\n", bz2.compress(b"trip_id\n1\n")],
    ids=range(4),
)
def test_a_delimited_file_that_fits_is_staged_as_it_is(data: bytes, samples: Path, volume: MemoryVolume) -> None:
    (staged,) = stage_one(data, TRIPS_CSV, samples, volume).staged
    assert volume.read(staged.path) == data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it has no records"),
        (b"trip_id,km\n", "it has no records"),
        (b"km,speed\n1,2\n", "required columns are missing: trip_id"),
        (b"trip_id,KM\n1,2\n", "column 'KM' differs from the contract's 'km' by case"),
        (b"trip_id,_batch_id\n1,2\n", "column '_batch_id' is a name of the loader's own"),
        (b'trip_id,km\n1,2\n3,"4"5\n', 'record 2 can\'t be read: 3,"4"5'),
        (b"trip_id,km\n1,2\n3,4,5\n", "record 2 has more fields than the file has columns"),
        (b'trip_id,km\n1,"2\n', "record 1 can't be read"),
        (b'"trip_id,km\n1,2\n', "header"),
        (gzip.compress(b"trip_id,km\n1,2\n")[:-4], "gzip"),
        (PARQUET, "header"),
    ],
    ids=range(11),
)
def test_a_delimited_file_that_does_not_fit_is_refused_with_the_reason(
    data: bytes, reason: str, samples: Path, volume: MemoryVolume
) -> None:
    assert reason in refusal(stage_one(data, TRIPS_CSV, samples, volume))
    assert list(as_files(volume.scan("csv").files)) == []


def test_a_delimited_file_is_checked_with_the_streams_options(samples: Path, volume: MemoryVolume) -> None:
    bare = TRIPS_CSV.with_options(header=False, sep=";", raw_record_column="_raw")
    assert stage_one(b"1;2\n", bare, samples, volume).refused == ()
    assert "record 2 has more fields" in refusal(stage_one(b"1\n2;3;4\n", bare, samples, MemoryVolume()))
    strict = TRIPS_CSV.with_options(schema_evolution_mode="rescue")
    assert "column 'new' is not in the contract" in refusal(
        stage_one(b"trip_id,new\n1,2\n", strict, samples, MemoryVolume())
    )


def test_a_json_document_is_checked_element_by_element(samples: Path, volume: MemoryVolume) -> None:
    documents = TELEMATICS_TEST.with_options(multi_line=True)
    whole = json.dumps([RECORD, RECORD], indent=2).encode()
    assert stage_one(whole, documents, samples, volume).refused == ()
    broken = whole.rstrip(b"]") + b", [1]]"
    assert refusal(stage_one(broken, documents, samples, MemoryVolume())) == "element 3 is no JSON object: [1]"


@pytest.mark.parametrize("pack", [bz2.compress, lambda data: pa.Codec("zstd").compress(data, asbytes=True)])
def test_json_may_be_packed(pack: Callable[[bytes], bytes], samples: Path, volume: MemoryVolume) -> None:
    assert stage_one(pack(JSON), TELEMATICS_TEST, samples, volume).refused == ()
    reason = refusal(stage_one(pack(JSON + b"oops\n"), TELEMATICS_TEST, samples, MemoryVolume()))
    assert reason == "line 21 is no JSON object: oops"


def test_names_that_are_no_data_and_things_that_are_no_files_are_refused_with_the_reason(
    samples: Path, volume: MemoryVolume
) -> None:
    (samples / "_hidden.parquet").write_bytes(PARQUET)
    os.mkfifo(samples / "pipe")
    reasons = {
        Path(refused.source).name: refused.reason
        for refused in stage([samples / "_hidden.parquet", samples / "pipe"], TELEMATICS, volume).refused
    }
    assert reasons == {
        "_hidden.parquet": "names that start with '_' or '.' are not data; rename it",
        "pipe": "it is no regular file",
    }


def test_a_name_that_is_not_utf8_is_refused_and_can_be_shown(samples: Path, volume: MemoryVolume) -> None:
    with open(os.fsencode(samples) + b"/bad\xff.parquet", "wb") as file:
        file.write(PARQUET)
    (refused,) = stage([samples], TELEMATICS, volume).refused
    assert refused == RefusedFile(f"{samples}/bad\\xff.parquet", "its name is not UTF-8; rename it")


def test_a_broken_link_in_a_folder_is_refused_and_the_rest_goes_on(samples: Path, volume: MemoryVolume) -> None:
    (samples / "a.parquet").symlink_to(samples / "nowhere")
    (samples / "b.parquet").write_bytes(PARQUET)
    report = stage([samples], TELEMATICS, volume)
    assert [file.path for file in report.staged] == ["parquet/b.parquet"]
    assert [refused.reason for refused in report.refused] == ["it can't be read: No such file or directory"]


def test_a_source_that_does_not_exist_stops_before_anything_is_uploaded(samples: Path, volume: MemoryVolume) -> None:
    (samples / "a.parquet").write_bytes(PARQUET)
    with pytest.raises(UnknownNameError, match=r"no file or folder '.*nowhere'"):
        stage([samples, samples / "nowhere"], TELEMATICS, volume)
    assert landed(volume) == {}


class _GrowingWhileUploaded(MemoryVolume):
    """Somebody appends to the source while the store reads it."""

    def __init__(self, source: Path) -> None:
        super().__init__()
        self.source = source

    def upload(self, path: str, source: BinaryIO, *, modified_ns: int | None = None) -> bool:
        with self.source.open("ab") as file:
            file.write(b"more")
        return super().upload(path, source, modified_ns=modified_ns)


def test_a_file_that_changes_between_its_check_and_its_upload_is_refused_and_never_seen(samples: Path) -> None:
    volume = _GrowingWhileUploaded(samples / "sample")
    assert "it changed while it was being staged" in refusal(stage_one(PARQUET, TELEMATICS, samples, volume))
    assert landed(volume) == {}


class _Failing(MemoryVolume):
    """A store that answers everything but uploads."""

    def __init__(self, error: VolumeError | VolumeUnavailableError) -> None:
        super().__init__()
        self.error = error

    def upload(self, path: str, source: BinaryIO, *, modified_ns: int | None = None) -> bool:
        raise self.error


def test_a_store_that_refuses_one_name_is_a_reason_and_one_that_does_not_answer_ends_it(samples: Path) -> None:
    assert refusal(stage_one(PARQUET, TELEMATICS, samples, _Failing(VolumeError("name too long")))) == "name too long"
    with pytest.raises(VolumeUnavailableError):
        stage_one(PARQUET, TELEMATICS, samples, _Failing(VolumeUnavailableError("disk full")))


def test_on_a_local_disk_a_staged_file_appears_whole_under_its_name_and_leaves_nothing_else(
    samples: Path, tmp_path: Path
) -> None:
    volume = LocalVolume(tmp_path / "volume", "/Volumes/workspace/00_landing/telematics")
    (samples / "a.parquet").write_bytes(PARQUET)
    seen: list[str] = []
    report = stage([samples], TELEMATICS, volume, progress=seen.append)
    assert len(report.staged) == 1
    assert seen == [str(samples / "a.parquet")]
    everything = [path for path in (tmp_path / "volume").rglob("*") if path.is_file()]
    assert [path.name for path in everything] == ["a.parquet"]
    assert pq.read_table(io.BytesIO(everything[0].read_bytes())).equals(pa.table(pq.read_table(io.BytesIO(PARQUET))))


# -- folders that name columns -----------------------------------------------------------------------------------------


def daily(format: str) -> FileStream:
    """A stream whose required day is in the path."""
    columns = (Column("n", "STRING", "A number."), Column("day", "DATE", "The day.", required=True))
    contract = TableContract("One row per reading.", columns)
    return FileStream("daily", format, "json", "daily", contract, {"partition_columns": "day,hour"})  # type: ignore[arg-type]


def stage_below(folder: str, data: bytes, format: str, samples: Path, volume: MemoryVolume) -> StageReport:
    (samples / folder).mkdir(parents=True)
    (samples / folder / "f").write_bytes(data)
    return stage([samples], daily(format), volume)


def parquet_of(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


DAILY = {"json": b'{"n":"1"}\n', "csv": b"n\n1\n", "parquet": parquet_of(pa.table({"n": ["1"]}))}


@pytest.mark.parametrize("format", DAILY)
def test_a_required_column_may_be_in_the_path(format: str, samples: Path, volume: MemoryVolume) -> None:
    report = stage_below("day=2026-01-31/hour=7", DAILY[format], format, samples, volume)
    assert [file.path for file in report.staged] == ["json/day=2026-01-31/hour=7/f"]


@pytest.mark.parametrize("format", DAILY)
@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("hour=7", "required columns are missing: day"),
        ("day=2026-02-30", "folder day='2026-02-30' is no value of its column's type"),
        ("Day=2026-02-28", "folder 'Day' differs from the partition column 'day' by case only"),
    ],
)
def test_a_path_that_the_loader_would_take_in_part_is_refused(
    format: str, folder: str, reason: str, samples: Path, volume: MemoryVolume
) -> None:
    assert reason in refusal(stage_below(folder, DAILY[format], format, samples, volume))


@pytest.mark.parametrize("data", [b'{"n":"1","hour":"8"}\n', b"n,hour\n1,8\n"])
def test_a_text_file_that_contradicts_its_path_is_refused(data: bytes, samples: Path, volume: MemoryVolume) -> None:
    format = "json" if data.startswith(b"{") else "csv"
    report = stage_below("day=2026-01-31/hour=7", data, format, samples, volume)
    assert "column 'hour' has values that differ from the folder hour=" in refusal(report)


@pytest.mark.parametrize(("kind", "lands"), [(pa.int64(), True), (pa.float64(), True), (pa.string(), False)])
def test_a_file_with_a_wider_type_lands_where_the_stream_widens(
    kind: pa.DataType, lands: bool, samples: Path, volume: MemoryVolume
) -> None:
    contract = TableContract("One row per reading.", (Column("v", "INT", "A value."),))
    narrow = FileStream("wide", "parquet", "parquet", "wide", contract)
    wide = narrow.with_options(schema_evolution_mode="addNewColumnsWithTypeWidening")
    data = parquet_of(pa.table({"v": pa.array([1]).cast(kind)}))
    assert "and the stream says INT" in refusal(stage_one(data, narrow, samples, volume))
    assert bool(stage_one(data, wide, samples, volume).staged) == lands
