"""The exactly-once promise under kills and races: every record is there once, every state is right."""

from __future__ import annotations

import gzip
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from telematics_assets.autoloader.loader import STEPS
from telematics_assets.errors import TransientError
from telematics_assets_tests.exactly_once import books
from telematics_assets_tests.exactly_once.loader_process import LOCATION, engine_of, stream_of
from telematics_assets_tests.turns import in_turn

FORMATS = ("parquet", "json")
#: Steps that only the first load of a stream passes; the rest is passed again and again.
FIRST_TIME = ("table_created", "metadata_published")


class Killed(BaseException):
    """Stands for SIGKILL inside one process: no handler of the package catches it."""


def land(home: Path, format: str, wave: int, files: int = 4, rows: int = 5) -> None:
    """Land files whose rows carry a number that is unique over all waves."""
    folder = home / LOCATION.lstrip("/") / format
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        values = [wave * 1_000_000 + number * 1000 + i for i in range(rows)]
        if format == "parquet":
            columns = {"n": values, **({"later": [str(v) for v in values]} if number == 3 else {})}
            pq.write_table(pa.table(columns), folder / f"w{wave}-{number}.parquet")
            continue
        extra = {"later": "x"} if number == 3 else {}
        data = "".join(json.dumps({"n": value, **extra}) + "\n" for value in values).encode()
        compressed = number % 2 == 1
        name = f"w{wave}-{number}.json" + (".gz" if compressed else "")
        (folder / name).write_bytes(gzip.compress(data) if compressed else data)


def assert_exactly_once(home: Path, format: str) -> None:
    """The books balance, and the states say the same."""
    stream = stream_of(format)
    assert books.loaded(home, stream.table) == books.landed(home, stream.folder)
    engine = engine_of(home)
    assert {record.state for record in engine.files(stream)} == {"INGESTED"}
    assert all(b.expected_rows == b.added_rows for b in engine.balance(stream, 0))
    assert engine.look(stream).files == 0
    engine.doctor([stream])
    assert engine.ingest(stream).batches == ()


def stop_at(step: str, occurrence: int, action: Callable[[], None]) -> Callable[[str], None]:
    """Do something when a step is passed for the nth time."""
    left = occurrence

    def on_step(passed: str) -> None:
        nonlocal left
        if passed == step:
            left -= 1
            if left == 0:
                action()

    return on_step


def kill() -> None:
    """Die where one stands."""
    raise Killed


def elsewhere(action: Callable[[], object]) -> None:
    """Do it in a thread of its own: steps are passed on a thread of delta-rs, which can't enter delta-rs again."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(action).result()


@pytest.mark.parametrize("occurrence", [1, 2])
@pytest.mark.parametrize(("step", "format"), in_turn(STEPS, FORMATS))
def test_a_load_that_dies_at_any_step_is_finished_by_the_next(
    tmp_path: Path, format: str, step: str, occurrence: int
) -> None:
    land(tmp_path, format, 0)
    died = False
    try:
        engine_of(tmp_path, stop_at(step, occurrence, kill)).ingest(stream_of(format))
    except Killed:
        died = True
    assert died or (step in FIRST_TIME and occurrence == 2)
    land(tmp_path, format, 1)
    engine_of(tmp_path).ingest(stream_of(format))
    assert_exactly_once(tmp_path, format)


@pytest.mark.parametrize(("step", "format"), in_turn(STEPS, FORMATS[::-1]))
def test_a_load_that_dies_at_the_same_step_twice_is_finished_by_the_next(
    tmp_path: Path, format: str, step: str
) -> None:
    land(tmp_path, format, 0)
    for _ in range(2):
        try:
            engine_of(tmp_path, stop_at(step, 1, kill)).ingest(stream_of(format))
        except Killed:
            continue
    engine_of(tmp_path).ingest(stream_of(format))
    assert_exactly_once(tmp_path, format)


@pytest.mark.parametrize(("step", "format"), in_turn(STEPS, FORMATS))
@pytest.mark.parametrize("began", [False, True])
def test_another_loader_at_any_step_wins_and_this_one_stops_cleanly(
    tmp_path: Path, format: str, step: str, began: bool
) -> None:
    stream = stream_of(format)
    if began:
        land(tmp_path, format, 9)
        engine_of(tmp_path).ingest(stream)
    land(tmp_path, format, 0)
    slow = engine_of(tmp_path, stop_at(step, 1, lambda: elsewhere(lambda: engine_of(tmp_path).ingest(stream))))
    report = slow.ingest(stream)
    engine_of(tmp_path).ingest(stream)
    assert_exactly_once(tmp_path, format)
    if step in ("planned", "reading", "file_read", "results_published"):
        assert report.yielded


@pytest.mark.parametrize("step", STEPS)
def test_another_loader_that_dies_at_any_step_leaves_work_that_this_one_finishes(tmp_path: Path, step: str) -> None:
    stream = stream_of("json")
    land(tmp_path, "json", 0)

    def half_a_load() -> None:
        try:
            engine_of(tmp_path, stop_at(step, 1, kill)).ingest(stream)
        except Killed:
            return

    slow = engine_of(tmp_path, stop_at("listed", 1, lambda: elsewhere(half_a_load)))
    with suppress(TransientError):
        slow.ingest(stream)
    engine_of(tmp_path).ingest(stream)
    assert_exactly_once(tmp_path, "json")


def start(home: Path, format: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a loader as a process."""
    return start_process("telematics_assets_tests.exactly_once.loader_process", str(home), format, *arguments)


def start_process(module: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a module as a process that says when it is ready."""
    return subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True)


def load_under_kills(
    wanted: int, land_wave: Callable[[int], None], start_load: Callable[[], subprocess.Popen[str]]
) -> int:
    """Land wave after wave and SIGKILL the load of each at a random moment, until so many loads died before their end.

    Args:
        wanted: Loads that must die.
        land_wave: Lands the wave of a number.
        start_load: Starts a loader that says when it begins and when it is done.

    Returns:
        The number of waves.
    """
    moments = random.Random(7)
    land_wave(0)
    with start_load() as process:
        assert process.stdout is not None
        process.stdout.readline()
        began = time.monotonic()
        process.communicate(timeout=300)
        whole_seconds = time.monotonic() - began
    deaths, wave = 0, 0
    while deaths < wanted:
        wave += 1
        assert wave < 20 + 3 * wanted, "loads end before they can be killed"
        land_wave(wave)
        with start_load() as process:
            assert process.stdout is not None
            process.stdout.readline()
            # Now and then one ends, so that what is left for the next does not grow and grow.
            if wave % 6:
                time.sleep(moments.uniform(0, whole_seconds))
                process.kill()
            rows, _ = process.communicate(timeout=300)
        deaths += process.returncode == -signal.SIGKILL and not rows
    with start_load() as process:
        process.communicate(timeout=300)
    assert process.returncode == 0
    sys.stdout.write(f"{deaths} loads killed over {wave + 1} waves\n")
    return wave + 1


@pytest.mark.parametrize("format", FORMATS)
def test_a_process_killed_at_one_step_after_the_other_loses_and_doubles_nothing(
    tmp_path: Path, format: str, soak_factor: int
) -> None:
    # A process needs a second to begin: the formats share some steps, each of which is passed above without one.
    steps = STEPS if soak_factor > 1 else STEPS[FORMATS.index(format) :: 2 * len(FORMATS)]
    for wave, step in enumerate(steps):
        land(tmp_path, format, wave)
        with start(tmp_path, format, step, "1") as process:
            process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL
    with start(tmp_path, format) as process:
        process.communicate(timeout=300)
    assert process.returncode == 0
    assert_exactly_once(tmp_path, format)


def test_processes_killed_at_random_moments_lose_and_double_nothing(tmp_path: Path, soak_factor: int) -> None:
    load_under_kills(
        3 if soak_factor == 1 else 6 * soak_factor,
        lambda wave: land(tmp_path, "json", wave, rows=400),
        lambda: start(tmp_path, "json"),
    )
    assert_exactly_once(tmp_path, "json")


def test_processes_that_load_at_the_same_time_lose_and_double_nothing(tmp_path: Path, soak_factor: int) -> None:
    for wave in range(2 * soak_factor):
        land(tmp_path, "json", wave, files=8)
        processes = [start(tmp_path, "json") for _ in range(3)]
        for process in processes:
            with process:
                process.communicate(timeout=300)
        assert [process.returncode for process in processes].count(0) >= 1
    with start(tmp_path, "json") as process:
        process.communicate(timeout=300)
    assert_exactly_once(tmp_path, "json")
