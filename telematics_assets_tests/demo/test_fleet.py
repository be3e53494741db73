"""The simulated fleet: repeatable, plausible, and dirty only where it was asked to be."""

from __future__ import annotations

import gzip
import io
import json
import math
import time
from itertools import pairwise

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from telematics_assets.catalog import TELEMATICS, TELEMATICS_TEST
from telematics_assets.demo.fleet import (
    FIRST_DAY,
    FleetPlan,
    SimulationReport,
    next_seed,
    points,
    simulate,
    vin,
)
from telematics_assets.errors import OptionError, VolumeError
from telematics_assets.volumes.base import as_files
from telematics_assets.volumes.memory import MemoryVolume

SMALL = FleetPlan(vehicles=3, files=3, rows=300, seed=4)
ARROW_TYPES = {
    "STRING": pa.string(),
    "DOUBLE": pa.float64(),
    "INT": pa.int32(),
    "BOOLEAN": pa.bool_(),
    "TIMESTAMP": pa.timestamp("us", "UTC"),
}


def contents(volume: MemoryVolume) -> dict[str, bytes]:
    return {
        entry.path: volume.read(entry.path)
        for stream in (TELEMATICS, TELEMATICS_TEST)
        for entry in as_files(volume.scan(stream.folder).files)
    }


def run(plan: FleetPlan) -> tuple[dict[str, bytes], SimulationReport]:
    volume = MemoryVolume()
    report = simulate(plan, volume)
    return contents(volume), report


def json_lines(data: bytes) -> list[bytes]:
    plain = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    return plain.splitlines()


@pytest.mark.parametrize("plan", [SMALL, FleetPlan(vehicles=3, files=5, rows=300, drift=True, dirty=True, seed=4)])
def test_the_same_plan_lands_the_same_bytes_and_another_seed_lands_others(plan: FleetPlan) -> None:
    first, _ = run(plan)
    again, _ = run(plan)
    assert first == again
    other, _ = run(FleetPlan(vehicles=3, files=3, rows=300, seed=5))
    assert not set(first) & set(other)
    assert not set(first.values()) & set(other.values())


def test_every_chassis_number_is_a_valid_vin_and_no_two_vehicles_share_one() -> None:
    vins = [vin(number) for number in range(2000)]
    assert len(set(vins)) == 2000
    values = {**{str(d): d for d in range(10)}, **dict(zip("ABCDEFGH", range(1, 9), strict=True))}
    values |= dict(zip("JKLMN", range(1, 6), strict=True)) | {"P": 7, "R": 9}
    values |= dict(zip("STUVWXYZ", range(2, 10), strict=True))
    weights = (8, 7, 6, 5, 4, 3, 2, 10, 0, 9, 8, 7, 6, 5, 4, 3, 2)
    for text in vins:
        assert len(text) == 17
        assert set(text) <= set(values)
        check = sum(values[c] * w for c, w in zip(text, weights, strict=True)) % 11
        assert text[8] == ("X" if check == 10 else str(check))


def test_a_vehicle_keeps_its_identity_and_its_odometer_never_falls_from_day_to_day() -> None:
    days = [points(FleetPlan(vehicles=4, files=1, rows=2000, seed=seed)) for seed in (0, 1)]
    identities = [day.select("vehicle_id", "chassis_no").unique().sort("vehicle_id") for day in days]
    assert identities[0].equals(identities[1])
    odometer = [
        day.group_by("vehicle_id").agg(pl.col("odometer_km").min().alias("low"), pl.max("odometer_km")) for day in days
    ]
    both = odometer[0].join(odometer[1], on="vehicle_id", suffix="_next")
    assert both.select((pl.col("low_next") >= pl.col("odometer_km")).all()).item()


def test_speed_acceleration_odometer_and_position_tell_one_story() -> None:
    table = points(FleetPlan(vehicles=5, files=1, rows=10_000, seed=11))
    assert len(table) == 10_000
    stopped = moved = 0
    for (_,), drive in table.group_by("vehicle_id"):
        rows = drive.sort("recorded_at").to_dicts()
        for before, after in pairwise(rows):
            seconds = (after["recorded_at"] - before["recorded_at"]).total_seconds()
            assert seconds == 10
            faster = (after["speed_kmh"] - before["speed_kmh"]) / 3.6 / seconds
            assert after["acceleration_ms2"] == pytest.approx(faster, abs=0.002)
            km = (after["speed_kmh"] + before["speed_kmh"]) / 2 / 3600 * seconds
            assert after["odometer_km"] - before["odometer_km"] == pytest.approx(km, abs=0.002)
            north = (after["latitude"] - before["latitude"]) * 111.32
            east = (after["longitude"] - before["longitude"]) * 111.32 * math.cos(math.radians(before["latitude"]))
            assert math.hypot(north, east) <= km + 0.04  # GPS noise
            if km > 0.2 and before["heading_deg"] == after["heading_deg"]:
                course = math.degrees(math.atan2(east, north)) % 360
                assert abs((course - after["heading_deg"] + 180) % 360 - 180) < 10
                moved += 1
            if not after["ignition_on"]:
                assert after["speed_kmh"] == 0
                assert after["engine_rpm"] == 0
            elif not before["ignition_on"]:
                assert after["trip_id"] != before["trip_id"]
            else:
                assert after["trip_id"] == before["trip_id"]
            if after["fuel_level_pct"] > before["fuel_level_pct"]:
                assert after["speed_kmh"] == before["speed_kmh"] == 0 or km < 0.2
            stopped += after["speed_kmh"] == 0
    assert stopped > 500
    assert moved > 500


def test_clean_points_are_all_plausible() -> None:
    table = points(FleetPlan(vehicles=17, files=1, rows=50_000, seed=2))
    for column in TELEMATICS.contract.columns:
        if column.minimum is not None:
            low, high = table[column.name].min(), table[column.name].max()
            assert isinstance(low, int | float)
            assert isinstance(high, int | float)
            assert column.minimum <= low
            assert column.maximum is None or high <= column.maximum
    assert table.null_count().sum_horizontal().item() == 0


def test_parquet_files_have_exactly_the_types_of_the_contract() -> None:
    landed, report = run(SMALL)
    expected = pa.schema([(c.name, ARROW_TYPES[c.type]) for c in TELEMATICS.contract.columns])
    files = {path: data for path, data in landed.items() if path.startswith("parquet/")}
    assert len(files) == 3
    for data in files.values():
        assert pq.read_schema(io.BytesIO(data)).equals(expected)
    assert sum(pq.read_metadata(io.BytesIO(data)).num_rows for data in files.values()) == 300 == report.streams[0].rows


def test_json_files_hold_the_same_points_with_a_nested_device_plain_and_compressed() -> None:
    landed, report = run(SMALL)
    files = {path: data for path, data in sorted(landed.items()) if path.startswith("json/")}
    assert [path.endswith(".gz") for path in files] == [data[:2] == b"\x1f\x8b" for data in files.values()]
    assert {path.endswith(".gz") for path in files} == {True, False}
    records = [json.loads(line) for data in files.values() for line in json_lines(data)]
    assert len(records) == 300 == report.streams[1].rows
    assert list(records[0]) == [column.name for column in TELEMATICS_TEST.contract.columns]
    assert records[0]["device"]["sim"]["iccid"]
    table = points(SMALL)
    assert [r["latitude"] for r in records] == table["latitude"].to_list()
    assert records[0]["recorded_at"].startswith(f"{SMALL.first_point_at:%Y-%m-%dT06:00:00}.")


def test_drift_brings_a_new_column_text_other_case_and_fractions_by_turns() -> None:
    landed, _ = run(FleetPlan(vehicles=3, files=4, rows=400, drift=True))
    schemas = [pq.read_schema(io.BytesIO(landed[p])) for p in sorted(landed) if p.startswith("parquet/")]
    assert "battery_voltage_v" in schemas[0].names
    assert schemas[1].field("engine_rpm").type == pa.string()
    assert "Fuel_Level_Pct" in schemas[2].names
    assert "fuel_level_pct" not in schemas[2].names
    assert schemas[3].field("engine_rpm").type == pa.float64()
    first = [json.loads(json_lines(landed[p])[0]) for p in sorted(landed) if p.startswith("json/")]
    assert "battery_voltage_v" in first[0]
    assert first[1]["engine_rpm"].endswith(" rpm")
    assert "Fuel_Level_Pct" in first[2]


def _verdict(line: bytes) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    pairs: list[str] = []
    try:
        json.loads(text, object_pairs_hook=lambda found: pairs.extend(key for key, _ in found))
    except json.JSONDecodeError as error:
        return "two records" if error.msg == "Extra data" else "cut"
    return "key twice" if pairs.count("speed_kmh") > 1 else "sound"


def test_dirty_json_has_each_kind_of_damage_and_the_report_counts_its_lines() -> None:
    landed, report = run(FleetPlan(vehicles=4, files=2, rows=800, dirty=True))
    sound = [file for file in report.streams[1].files if file.fault is None]
    lines = [line for file in sound for line in json_lines(landed[file.path])]
    assert len(lines) == 800 == report.streams[1].rows
    verdicts = [_verdict(line) for line in lines]
    assert {kind: verdicts.count(kind) for kind in sorted(set(verdicts))} == {
        "cut": 4,
        "key twice": 4,
        "not UTF-8": 4,
        "sound": 784,
        "two records": 4,
    }
    (cut,) = (file for file in report.streams[1].files if file.fault)
    assert cut.fault == "truncated"
    with pytest.raises(EOFError):
        gzip.decompress(landed[cut.path])


def test_dirty_parquet_has_implausible_points_and_files_that_nobody_can_read() -> None:
    landed, report = run(FleetPlan(vehicles=4, files=2, rows=800, dirty=True))
    files = report.streams[0].files
    assert {file.fault for file in files if file.fault} == {"truncated", "not of this format", "zero bytes"}
    for file in files:
        if file.fault:
            assert file.rows == 0
            with pytest.raises(pa.ArrowInvalid):
                pq.read_metadata(io.BytesIO(landed[file.path]))
    table = pl.concat([pl.read_parquet(io.BytesIO(landed[file.path])) for file in files if not file.fault])
    assert len(table) == 800
    assert table.filter(pl.col("latitude") > 90).height > 0
    assert table.filter(pl.col("speed_kmh") > 300).height > 0
    assert table.schema == points(SMALL).schema


def test_broken_files_look_an_hour_old_so_that_nobody_waits_for_their_end() -> None:
    volume = MemoryVolume()
    report = simulate(FleetPlan(vehicles=2, files=1, rows=50, dirty=True), volume)
    for file in (file for stream in report.streams for file in stream.files):
        entry = volume.stat(file.path)
        assert entry is not None
        age = (time.time_ns() - entry.modified_ns) / 1e9
        assert (age > 3500) == (file.fault is not None)


def test_a_seed_that_has_landed_is_refused_and_the_next_free_one_is_known() -> None:
    volume = MemoryVolume()
    assert next_seed(volume) == 0
    simulate(SMALL, volume)
    before = contents(volume)
    with pytest.raises(VolumeError, match="seed 4 was simulated before"):
        simulate(SMALL, volume)
    assert contents(volume) == before
    assert next_seed(volume) == 5
    volume.put("parquet/somebody-else.parquet", b"")
    assert next_seed(volume) == 5


def test_a_plan_starts_at_its_seeds_day_unless_it_is_told_when() -> None:
    assert FleetPlan(seed=3).first_point_at.day == FIRST_DAY.day + 3
    late = FleetPlan(vehicles=1, files=1, rows=1, start=FIRST_DAY.replace(year=2027))
    assert points(late)["recorded_at"].dt.year().to_list() == [2027]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"vehicles": 0}, "vehicles=0"),
        ({"seed": -1}, "seed=-1"),
        ({"rows": 3, "files": 4}, "3 rows don't fill 4 files"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_by_name(given: dict[str, int], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        FleetPlan(**given)  # type: ignore[arg-type]
