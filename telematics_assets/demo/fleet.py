"""A simulated fleet: plausible vehicles whose files land in the Volume.

Belongs here: the maths of the fleet, files in the two shipped formats, drift and dirt on request.
Does not belong here: loading anything (`engines/`), the demo's order of events (`story.py`), Dagster.

The same plan gives the same bytes: every random number comes from the plan's seed, and no clock is read except for the
modification times of the files. Rows are made as whole columns.
"""

from __future__ import annotations

import gzip
import io
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from telematics_assets.catalog import FILE_STREAMS, FileStream
from telematics_assets.errors import OptionError, VolumeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from telematics_assets.volumes.base import Volume

    Floats = NDArray[np.float64]

#: The first simulated day; each seed drives one day later, so that two waves of one fleet never overlap.
FIRST_DAY = datetime(2026, 1, 5, 6, tzinfo=UTC)

#: Where vehicles start: latitude, longitude (Vienna, Munich, Prague, Zurich, Stuttgart, Salzburg, Brno, Nuremberg).
CITIES = (
    (48.2082, 16.3738),
    (48.1372, 11.5756),
    (50.0755, 14.4378),
    (47.3769, 8.5417),
    (48.7758, 9.1829),
    (47.8095, 13.0550),
    (49.1951, 16.6068),
    (49.4521, 11.0767),
)

_INTERVAL_S = 10
_BLOCK = 12  # points between two decisions of a driver: two minutes
_RAMP = 4  # points that a change of speed or course takes: no more than 0.9 m/s²
_SPEEDS_KMH = (0.0, 30.0, 50.0, 80.0, 100.0, 130.0)
_SPEED_ODDS = (0.14, 0.2, 0.28, 0.18, 0.1, 0.1)
_GPS_NOISE_M = 3.0
_RADIUS_M = 60_000.0  # vehicles turn round this far from their city
_METRES_PER_DEGREE = 111_320.0
_KM_PER_DAY = 150.0
_KM_PER_TANK_PCT = 6.5
_OLD_NS = 3600 * 1_000_000_000

_VIN_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ0123456789"  # I, O and Q are not used
_VIN_VALUES = dict(zip("ABCDEFGHJKLMNPRSTUVWXYZ", map(int, "12345678123457923456789"), strict=True))
_VIN_WEIGHTS = (8, 7, 6, 5, 4, 3, 2, 10, 0, 9, 8, 7, 6, 5, 4, 3, 2)
_FILE_NAME = re.compile(r"points-(\d+)-\d+\.")


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """What to simulate.

    Attributes:
        vehicles: Vehicles of the fleet; vehicle n has the same chassis number under every seed.
        files: Sound files per stream.
        rows: Points per stream, over all its files.
        drift: Give every file a schema that differs from the contract, by turns: a new column, `engine_rpm` as text, a
            column in other case, `engine_rpm` as a fraction.
        dirty: Damage some records of every file, and add files that can't be read.
        seed: Repeats the same fleet byte for byte; also its day and part of the file names.
        start: Time of the first points (UTC); by the seed if None.
    """

    vehicles: int = 20
    files: int = 4
    rows: int = 4000
    drift: bool = False
    dirty: bool = False
    seed: int = 0
    start: datetime | None = None

    def __post_init__(self) -> None:
        for name, least in (("vehicles", 1), ("files", 1), ("rows", 1), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise OptionError(f"{name}={value} is not accepted. Use a whole number from {least}.")
        if self.rows < self.files:
            raise OptionError(f"{self.rows} rows don't fill {self.files} files. Use at least one row for each file.")

    @property
    def first_point_at(self) -> datetime:
        """When the first points are taken."""
        return self.start or FIRST_DAY + timedelta(days=self.seed)


@dataclass(frozen=True, slots=True)
class SimulatedFile:
    """One file that landed.

    Attributes:
        path: Path relative to the Volume.
        rows: Rows that a loader must make of it: records of a Parquet file, lines of a JSON file; 0 if unreadable.
        size: Bytes.
        fault: What is wrong with the file as a whole, or None.
    """

    path: str
    rows: int
    size: int
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class StreamFiles:
    """What landed for one stream.

    Attributes:
        stream: Name of the stream.
        files: Its files, in the order of their names.
    """

    stream: str
    files: tuple[SimulatedFile, ...]

    @property
    def rows(self) -> int:
        """Rows that a loader must make of all files."""
        return sum(file.rows for file in self.files)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class SimulationReport:
    """What `simulate` wrote.

    Attributes:
        seed: Seed of the plan.
        streams: What landed, by stream.
    """

    seed: int
    streams: tuple[StreamFiles, ...]

    @property
    def rows(self) -> int:
        """Rows that a loader must make of everything."""
        return sum(stream.rows for stream in self.streams)

    @property
    def files(self) -> int:
        """Files that landed."""
        return sum(len(stream.files) for stream in self.streams)


def vin(number: int) -> str:
    """The chassis number of vehicle `number`: 17 characters with a valid check digit."""
    model = ""
    rest = number * 7919 + 104_729
    for _ in range(8):
        rest, digit = divmod(rest, len(_VIN_LETTERS))
        model += _VIN_LETTERS[digit]
    text = f"WTX{model[:5]}0{model[5:]}{number % 100_000:05d}"
    total = sum((int(c) if c.isdigit() else _VIN_VALUES[c]) * w for c, w in zip(text, _VIN_WEIGHTS, strict=True))
    check = total % 11
    return text[:8] + ("X" if check == 10 else str(check)) + text[9:]


def points(plan: FleetPlan) -> pl.DataFrame:
    """The plan's points as one table in the types of the `telematics` contract, by time, then vehicle.

    Drift and dirt are a matter of files: they don't show here.
    """
    rng = np.random.default_rng(plan.seed)
    vehicles = plan.vehicles
    blocks = -(-plan.rows // (vehicles * _BLOCK)) + 1
    steps = blocks * _BLOCK

    decided = rng.choice(_SPEEDS_KMH, p=_SPEED_ODDS, size=(vehicles, blocks))
    decided[:, 0] = 0.0  # every trip starts from rest
    # A vehicle that stands for two decisions in a row is parked; the first block is the park it starts from.
    decided[:, 1:] *= rng.random((vehicles, blocks - 1)) > 0.02
    parked_block = (decided == 0.0) & (np.roll(decided, 1, axis=1) == 0.0)
    parked_block[:, 0] = False
    standing = np.repeat(decided == 0.0, _BLOCK, axis=1)
    parked = np.repeat(parked_block, _BLOCK, axis=1)

    flow = 1.0 + 0.02 * np.sin(np.arange(steps) / 3.0 + rng.random((vehicles, 1)) * 6.28)
    speed = _ramped(decided) * flow
    metres_per_s = speed / 3.6
    acceleration = np.diff(metres_per_s, axis=1, prepend=metres_per_s[:, :1]) / _INTERVAL_S
    metres = (metres_per_s + np.roll(metres_per_s, 1, axis=1)) / 2 * _INTERVAL_S
    metres[:, 0] = 0.0
    km = np.cumsum(metres, axis=1) / 1000

    # Turns are added up, not course itself, so that no ramp runs the long way round the compass.
    turns = rng.choice((-90.0, -30.0, 0.0, 30.0, 90.0), p=(0.15, 0.2, 0.3, 0.2, 0.15), size=(vehicles, blocks))
    turns[:, 0] = rng.random(vehicles) * 360
    course = np.deg2rad(_ramped(np.cumsum(turns, axis=1)))
    # Home is fixed by the vehicle; the day decides how far from home it starts.
    home = np.array([CITIES[n % len(CITIES)] for n in range(vehicles)])
    east, west_turns = _folded(rng.uniform(-8000, 8000, (vehicles, 1)) + np.cumsum(metres * np.sin(course), axis=1))
    north, south_turns = _folded(rng.uniform(-8000, 8000, (vehicles, 1)) + np.cumsum(metres * np.cos(course), axis=1))
    heading = np.rad2deg(np.arctan2(west_turns * np.sin(course), south_turns * np.cos(course))) % 360
    noise = rng.normal(0.0, _GPS_NOISE_M, (2, vehicles, steps))
    latitude = home[:, :1] + (north + noise[0]) / _METRES_PER_DEGREE
    longitude = home[:, 1:] + (east + noise[1]) / (_METRES_PER_DEGREE * np.cos(np.deg2rad(latitude)))

    # Fuel falls with the distance; a tank is filled only while the vehicle stands.
    used = 5 + rng.random((vehicles, 1)) * 60 + km / _KM_PER_TANK_PCT
    filled = np.maximum.accumulate(np.where(standing, np.floor(used / 80), 0.0), axis=1)
    fuel = np.clip(98 - used + 80 * filled, 0.5, 100)

    gear = np.where(speed < 1, 0.0, 1.0 + np.digitize(speed, (20, 40, 60, 85)))
    rpm = np.where(gear == 0, 820 + rng.integers(-20, 20, speed.shape), 900 + speed / np.maximum(gear, 1) * 75)
    rpm[parked] = 0
    trip = 1 + np.cumsum(np.diff(parked.astype(np.int8), axis=1, prepend=0) == -1, axis=1)

    days = (plan.first_point_at - FIRST_DAY) / timedelta(days=1)
    odometer = np.array([[8000 + vehicle * 1371 % 90_000] for vehicle in range(vehicles)]) + days * _KM_PER_DAY + km
    started_us = int(plan.first_point_at.timestamp() * 1_000_000)
    jitter = rng.integers(0, 900_000, (vehicles, 1))
    taken_us = started_us + np.arange(steps)[None, :] * _INTERVAL_S * 1_000_000 + jitter

    fleet_numbers = pl.Series([f"V{number:05d}" for number in range(vehicles)])
    chassis = pl.Series([vin(number) for number in range(vehicles)])

    def by_time(values: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(values.T).ravel()[: plan.rows]

    who = pl.Series(by_time(np.broadcast_to(np.arange(vehicles)[:, None], (vehicles, steps))))
    return pl.DataFrame(
        {
            "vehicle_id": fleet_numbers.gather(who),
            "chassis_no": chassis.gather(who),
            "trip": by_time(trip),
            "recorded_at": pl.Series(by_time(taken_us)).cast(pl.Datetime("us", "UTC")),
            "latitude": by_time(latitude.round(6)),
            "longitude": by_time(longitude.round(6)),
            "speed_kmh": by_time(speed.round(2)),
            "heading_deg": by_time(heading.round(1) % 360),
            "acceleration_ms2": by_time(acceleration.round(3)) + 0.0,
            "odometer_km": by_time(odometer.round(3)),
            "engine_rpm": by_time(rpm.astype(np.int32)),
            "fuel_level_pct": by_time(fuel.round(2)),
            "ignition_on": by_time(~parked),
        }
    ).select(
        "vehicle_id",
        "chassis_no",
        pl.format(f"{{}}-{plan.first_point_at:%Y%m%d}-{{}}", "vehicle_id", "trip").alias("trip_id"),
        pl.exclude("vehicle_id", "chassis_no", "trip"),
    )


def simulate(
    plan: FleetPlan,
    volume: Volume,
    streams: Sequence[FileStream] = FILE_STREAMS,
    *,
    modified_ns: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> SimulationReport:
    """Land the plan's files in the Volume, each one whole or not at all.

    Args:
        plan: What to simulate.
        volume: Where to land.
        streams: Streams to land files for; their format and folder decide what is written.
        modified_ns: Modification time of the sound files; now if None. Broken files are always an hour older, so that
            nobody takes them for files that are still being written.
        progress: Called with each path once it has landed.

    Raises:
        VolumeError: If a file of this seed is there already. What landed before it stays.
    """
    table = points(plan)
    broken_ns = (time.time_ns() if modified_ns is None else modified_ns) - _OLD_NS
    landed = []
    for stream in streams:
        files = []
        for path, data, rows, fault in _contents(plan, stream, table):
            at = modified_ns if fault is None else broken_ns
            if not volume.upload(path, io.BytesIO(data), modified_ns=at):
                raise VolumeError(f"{path} is there already: seed {plan.seed} was simulated before. Give another seed.")
            files.append(SimulatedFile(path, rows, len(data), fault))
            if progress:
                progress(path)
        landed.append(StreamFiles(stream.name, tuple(files)))
    return SimulationReport(plan.seed, tuple(landed))


def wave_files(plan: FleetPlan, stream: FileStream) -> Iterator[tuple[str, bytes, int, str | None]]:
    """Path, bytes, rows and fault of each of a plan's files for a stream, made one by one."""
    return _contents(plan, stream, points(plan))


def wave_seconds(plan: FleetPlan) -> float:
    """From a plan's first points to a moment when all are taken."""
    return -(-plan.rows // plan.vehicles) * _INTERVAL_S + 1.0


def next_seed(volume: Volume, streams: Sequence[FileStream] = FILE_STREAMS) -> int:
    """The smallest seed above all those whose files are in the Volume."""
    used = [
        int(match.group(1))
        for stream in streams
        for path in volume.scan(stream.folder).files["path"]
        if (match := _FILE_NAME.match(path.rpartition("/")[2]))
    ]
    return max(used, default=-1) + 1


def parquet_bytes(table: pl.DataFrame) -> bytes:
    """A table as a Parquet file, in the plain types of the contract (no large or view types)."""
    arrow = table.to_arrow(compat_level=pl.CompatLevel.oldest())
    plain = [field.with_type(pa.string()) if field.type == pa.large_string() else field for field in arrow.schema]
    sink = io.BytesIO()
    pq.write_table(arrow.cast(pa.schema(plain)), sink, compression="zstd")
    return sink.getvalue()


def json_bytes(table: pl.DataFrame) -> bytes:
    """A table as one JSON object per line; times as ISO 8601 text in UTC."""
    sink = io.BytesIO()
    table.with_columns(pl.col(pl.Datetime).dt.strftime("%Y-%m-%dT%H:%M:%S%.6fZ")).write_ndjson(sink)
    return sink.getvalue()


def _ramped(decided: Floats) -> Floats:
    """Each decision held for a block, after a straight ramp from the one before."""
    before = np.roll(decided, 1, axis=1)
    before[:, 0] = decided[:, 0]
    share = np.minimum(np.arange(1, _BLOCK + 1) / _RAMP, 1.0)
    ramps: Floats = before[:, :, None] + (decided - before)[:, :, None] * share
    return ramps.reshape(len(decided), -1)


def _folded(offset_m: Floats) -> tuple[Floats, Floats]:
    """Mirror a way at the border of the region; also the sign of its direction in each point."""
    crossings = np.floor((offset_m + _RADIUS_M) / (2 * _RADIUS_M))
    sign = np.where(crossings % 2 == 0, 1.0, -1.0)
    return (offset_m - crossings * 2 * _RADIUS_M) * sign, sign


def _contents(plan: FleetPlan, stream: FileStream, table: pl.DataFrame) -> Iterator[tuple[str, bytes, int, str | None]]:
    """Path, bytes, rows and fault of each file of a stream."""
    rng = np.random.default_rng((plan.seed, *stream.name.encode()))
    stem = f"{stream.folder}/{plan.first_point_at:%Y-%m-%d}/points-{plan.seed:05d}"
    borders = np.linspace(0, plan.rows, plan.files + 1).astype(int)
    sample = b""
    for number in range(plan.files):
        part = table.slice(borders[number], borders[number + 1] - borders[number])
        if plan.drift:
            part = _drifted(part, number)
        if plan.dirty:
            part = _implausible(part, rng)
        if stream.format == "parquet":
            sample = parquet_bytes(part)
            yield f"{stem}-{number:04d}.parquet", sample, len(part), None
        else:
            lines = json_bytes(_with_device(part)).splitlines(keepends=True)
            if plan.dirty:
                lines = _damaged(lines, rng)
            data = b"".join(lines)
            sample = sample or data
            # Every third file is compressed: loaders meet both kinds.
            packed = number % 3 == 2
            name = f"{stem}-{number:04d}.json" + (".gz" if packed else "")
            yield name, gzip.compress(data, 6, mtime=0) if packed else data, len(lines), None
    if plan.dirty:
        if stream.format == "parquet":
            suffix = "parquet"
            broken = {
                "truncated": sample[: len(sample) * 2 // 3],
                "not of this format": b"<html>502 Bad Gateway</html>\n",
                "zero bytes": b"",
            }
        else:
            # A cut stream of gzip is the one JSON file that is broken as a whole: any plain text has lines.
            suffix, broken = "json.gz", {"truncated": gzip.compress(sample, 6, mtime=0)[:-40]}
        for number, (fault, data) in enumerate(broken.items(), start=plan.files):
            yield f"{stem}-{number:04d}.{suffix}", data, 0, fault


def _drifted(part: pl.DataFrame, number: int) -> pl.DataFrame:
    """One of four drifts, by turns."""
    match number % 4:
        case 0:
            return part.with_columns((12.2 + pl.col("engine_rpm").sign() * 1.7).round(1).alias("battery_voltage_v"))
        case 1:
            return part.with_columns(pl.format("{} rpm", "engine_rpm").alias("engine_rpm"))
        case 2:
            return part.rename({"fuel_level_pct": "Fuel_Level_Pct"})
        case _:
            return part.with_columns(pl.col("engine_rpm") + 0.5)


def _implausible(part: pl.DataFrame, rng: np.random.Generator) -> pl.DataFrame:
    """A few points that no vehicle can have been at, and a few speeds that none can have had."""
    chosen = rng.choice(len(part), size=min(len(part), 2 + len(part) // 200), replace=False)
    rows, half = pl.int_range(pl.len()), len(chosen) // 2
    return part.with_columns(
        pl.when(rows.is_in(pl.Series(chosen[:half]).implode())).then(912.5).otherwise("latitude").alias("latitude"),
        pl.when(rows.is_in(pl.Series(chosen[half:]).implode())).then(1305.7).otherwise("speed_kmh").alias("speed_kmh"),
    )


def _with_device(part: pl.DataFrame) -> pl.DataFrame:
    """The points with the device that sent each, as a nested object."""
    number = pl.col("vehicle_id").str.slice(1).cast(pl.Int64)
    sim = pl.struct(pl.format("89430{}", 10_000_000 + number * 37).alias("iccid"), pl.lit("A1").alias("carrier"))
    return part.with_columns(
        pl.struct(
            pl.format("TX-{}", number % 3 + 7).alias("model"),
            pl.format("4.{}.1", number % 5).alias("firmware"),
            sim.alias("sim"),
        ).alias("device")
    )


def _damaged(lines: list[bytes], rng: np.random.Generator) -> list[bytes]:
    """Some lines cut, in wrong bytes, with a key twice, or two records run together."""
    chosen = rng.choice(len(lines), size=min(len(lines), 4 * (1 + len(lines) // 400)), replace=False)
    for position, index in enumerate(sorted(chosen.tolist())):
        line = lines[index]
        match position % 4:
            case 0:
                lines[index] = line[: len(line) // 2] + b"\n"
            case 1:
                lines[index] = line.replace(b'"trip_id":"', b'"trip_id":"\xff\xfe', 1)
            case 2:
                lines[index] = line.replace(b"{", b'{"speed_kmh":1.0,', 1)
            case _:
                lines[index] = line.rstrip(b"\n") + line
    return lines
