"""The feed: files keep coming at their rate, whole, with seeds and points that go on."""

from __future__ import annotations

import collections
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

import polars as pl
import pytest

from telematics_assets.catalog import FILE_STREAMS, TELEMATICS
from telematics_assets.demo.feed import UPLOADS, FeedReport, feed
from telematics_assets.demo.fleet import FleetPlan, next_seed
from telematics_assets.engines.checkpointed import open_volume
from telematics_assets.errors import OptionError, VolumeError, VolumeUnavailableError
from telematics_assets.settings import Settings
from telematics_assets.volumes.base import as_files
from telematics_assets.volumes.memory import MemoryVolume
from telematics_assets_tests.stores import servers

PLAN = FleetPlan(vehicles=2, files=2, rows=40)


def run(volume: MemoryVolume, per_minute: float, seconds: float, plan: FleetPlan = PLAN, **more: int) -> FeedReport:
    return feed(plan, volume, per_minute, threading.Event(), seconds=seconds, **more)  # type: ignore[arg-type]


def landed(volume: MemoryVolume) -> dict[str, bytes]:
    return {e.path: volume.read(e.path) for s in FILE_STREAMS for e in as_files(volume.scan(s.folder).files)}


def test_each_stream_gets_its_files_at_the_rate_and_the_report_counts_them() -> None:
    volume = MemoryVolume()
    report = run(volume, per_minute=600, seconds=0.95)
    files = landed(volume)
    assert [stream.files for stream in report.streams] == [10, 10]
    assert [(stream.rows, stream.broken) for stream in report.streams] == [(200, 0)] * 2
    assert sum(stream.bytes for stream in report.streams) == sum(map(len, files.values()))
    assert len(files) == 20
    assert 0.95 <= report.seconds < 60
    assert (report.retries, report.abandoned) == (0, 0)


def test_points_are_of_now() -> None:
    volume = MemoryVolume()
    before = datetime.now(UTC)
    run(volume, per_minute=600, seconds=0.15)
    paths = sorted(path for path in landed(volume) if path.startswith("parquet/"))
    taken = pl.concat([pl.read_parquet(io.BytesIO(volume.read(path))) for path in paths])["recorded_at"]
    newest, oldest = taken.max(), taken.min()
    assert isinstance(newest, datetime)
    assert isinstance(oldest, datetime)
    assert before - timedelta(seconds=30) < newest <= datetime.now(UTC)
    assert before - timedelta(seconds=260) < oldest


def test_a_feed_that_is_started_again_repeats_and_overwrites_nothing() -> None:
    volume = MemoryVolume()
    first = run(volume, per_minute=6000, seconds=0.05)
    before = landed(volume)
    second = run(volume, per_minute=6000, seconds=0.05, first_seed=1)
    after = landed(volume)
    assert {path: after[path] for path in before} == before
    assert len(set(after.values())) == len(after) == len(before) + sum(s.files for s in second.streams)
    assert second.streams[0].first_seed == max(stream.last_seed for stream in first.streams) + 1
    assert next_seed(volume) == max(stream.last_seed for stream in second.streams) + 1
    assert run(volume, per_minute=60, seconds=0.01, first_seed=700).streams[0].last_seed == 700


def test_two_feeds_at_once_land_every_file_of_both() -> None:
    volume = MemoryVolume()
    reports: list[FeedReport] = []
    both = [threading.Thread(target=lambda: reports.append(run(volume, 3000, 0.5))) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    files = landed(volume)
    assert len(files) == sum(stream.files for report in reports for stream in report.streams) == 100
    assert len(set(files.values())) == 100


def test_drift_and_dirt_are_mixed_into_clean_waves() -> None:
    volume = MemoryVolume()
    report = run(volume, 6000, 0.2, FleetPlan(vehicles=2, files=4, rows=80, drift=True, dirty=True))
    assert report.streams[0].broken > 0
    schemas = collections.Counter[str]()
    for path, data in landed(volume).items():
        if path.startswith("parquet/"):
            try:
                columns = pl.read_parquet_schema(io.BytesIO(data))
            except pl.exceptions.PolarsError:
                schemas["broken"] += 1
            else:
                as_agreed = list(columns) == [c.name for c in TELEMATICS.contract.columns]
                schemas["as agreed" if as_agreed and columns["engine_rpm"] == pl.Int32 else "drifted"] += 1
    assert set(schemas) == {"broken", "as agreed", "drifted"}
    assert schemas["broken"] == report.streams[0].broken


class _Slow(MemoryVolume):
    """A store that takes its time for each upload."""

    def upload(self, path: str, source: BinaryIO, *, modified_ns: int | None = None) -> bool:
        time.sleep(0.3)
        return super().upload(path, source, modified_ns=modified_ns)


def test_slow_uploads_don_t_slow_the_feed() -> None:
    report = run(_Slow(), per_minute=600, seconds=1.5)
    assert [stream.files for stream in report.streams] == [15, 15]
    # One after the other they would take 9 seconds.
    assert report.behind_seconds < 4
    assert report.seconds < 7


class _Away(MemoryVolume):
    """A store that does not answer the first times, and never those who ask for ever."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times
        self.asked = set[str]()
        self.asked_for_both = threading.Event()

    def upload(self, path: str, source: BinaryIO, *, modified_ns: int | None = None) -> bool:
        self.left -= 1
        self.asked.add(path)
        if len(self.asked) == 2:
            self.asked_for_both.set()
        if self.left >= 0:
            raise VolumeUnavailableError("not now")
        return super().upload(path, source, modified_ns=modified_ns)


def test_a_volume_that_does_not_answer_is_waited_for_and_no_file_is_left_out() -> None:
    volume = _Away(2)
    report = run(volume, per_minute=60, seconds=1.5)
    assert [stream.files for stream in report.streams] == [2, 2]
    assert (report.retries, report.abandoned) == (2, 0)


def test_a_stopped_feed_waits_for_no_volume_and_says_what_did_not_land() -> None:
    away = _Away(10**9)
    report = feed(PLAN, away, 60, away.asked_for_both)
    assert report.seconds < 60
    assert report.abandoned == 2
    assert [stream.files for stream in report.streams] == [0, 0]


class _Refusing(MemoryVolume):
    """A store that takes nothing."""

    def upload(self, path: str, source: BinaryIO, *, modified_ns: int | None = None) -> bool:
        raise VolumeError("read only")


def test_a_volume_that_refuses_for_good_ends_the_feed() -> None:
    with pytest.raises(VolumeError, match="read only"):
        feed(PLAN, _Refusing(), 60, threading.Event())


def test_no_more_than_a_few_files_are_held_at_once() -> None:
    most = now = 0
    lock = threading.Lock()

    class Counting(MemoryVolume):
        def upload(self, path: str, source: BinaryIO, *, modified_ns: int | None = None) -> bool:
            nonlocal most, now
            with lock:
                now += 1
                most = max(most, now)
            time.sleep(0.05)
            with lock:
                now -= 1
            return super().upload(path, source, modified_ns=modified_ns)

    report = run(Counting(), per_minute=60_000, seconds=0.1)
    assert most <= UPLOADS
    # What fell behind was caught up, not left out.
    assert [stream.files for stream in report.streams] == [100, 100]


@pytest.mark.parametrize(("rate", "seconds"), [(0, 1), (-1, 1), (float("nan"), 1), (1e9, 1), (1, 0), (1, -1)])
def test_numbers_that_make_no_sense_are_refused(rate: float, seconds: float) -> None:
    with pytest.raises(OptionError, match="is not accepted"):
        run(MemoryVolume(), rate, seconds)


def test_a_feed_lands_in_an_object_store() -> None:
    volume = open_volume(Settings(home=servers.azure()))
    report = feed(PLAN, volume, 600, threading.Event(), seconds=0.5)
    assert [stream.files for stream in report.streams] == [5, 5]
    assert all(len(list(as_files(volume.scan(stream.folder).files))) == 5 for stream in FILE_STREAMS)


@pytest.fixture
def feeding(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The command, on a home of its own."""
    code = "from telematics_assets.cli import main; main()"
    command = [sys.executable, "-c", code, "simulate", "--feed", "600", "--files", "1", "--rows", "20", "--json"]
    environment = {**os.environ, "TELEMATICS_HOME": str(tmp_path)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_command_cleanly_with_its_summary(
    feeding: subprocess.Popen[str], tmp_path: Path, number: signal.Signals
) -> None:
    deadline = time.monotonic() + 300
    while len(list(tmp_path.rglob("points-*"))) < 6:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    feeding.send_signal(number)
    out, err = feeding.communicate(timeout=300)
    assert feeding.returncode == 0
    assert err == ""
    summary = json.loads(out)
    assert sum(stream["files"] for stream in summary["streams"]) == len(list(tmp_path.rglob("points-*")))
    assert not list(tmp_path.rglob("*.tmp"))
