"""A feed: files of the simulated fleet that keep coming until it is told to stop.

Belongs here: when which file lands, and what a feed says of itself at its end.
Does not belong here: what is in the files (`fleet.py`), what a command line makes of signals, Dagster.

Every stream has its own lane: waves of the fleet, one after another, each with a seed that no file in the Volume has,
landed one file at a time. Files fall due by the clock: an upload that takes longer delays no other, and what fell
behind is caught up.
"""

from __future__ import annotations

import collections
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from telematics_assets.catalog import FILE_STREAMS, FileStream
from telematics_assets.demo.fleet import FleetPlan, next_seed, wave_files, wave_seconds
from telematics_assets.errors import OptionError, TransientError

if TYPE_CHECKING:
    from telematics_assets.volumes.base import Volume

#: Files that are being uploaded at the same time, at most.
UPLOADS = 8
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.5, 30.0
_OLD_NS = 3600 * 1_000_000_000


@dataclass(frozen=True, slots=True)
class FedStream:
    """What a feed landed for one stream.

    Attributes:
        stream: Name of the stream.
        files: Files that landed.
        broken: Those of them that nobody can read.
        rows: Rows that a loader must make of them.
        bytes: Their size.
        first_seed: Seed of the first wave.
        last_seed: Seed of the last wave.
    """

    stream: str
    files: int
    broken: int
    rows: int
    bytes: int
    first_seed: int
    last_seed: int


@dataclass(frozen=True, slots=True)
class FeedReport:
    """What a feed did.

    Attributes:
        per_minute: Files per minute and stream that were asked for.
        seconds: How long it ran.
        behind_seconds: By how much the latest file began to land too late.
        retries: Uploads that were tried again because the Volume did not answer.
        abandoned: Files that had not landed when it was stopped.
        streams: What landed, by stream.
    """

    per_minute: float
    seconds: float
    behind_seconds: float
    retries: int
    abandoned: int
    streams: tuple[FedStream, ...]


def feed(
    plan: FleetPlan,
    volume: Volume,
    per_minute: float,
    stop: threading.Event,
    *,
    streams: Sequence[FileStream] = FILE_STREAMS,
    seconds: float | None = None,
    first_seed: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> FeedReport:
    """Land files at a steady rate, each whole or not at all, until told to stop.

    Args:
        plan: What one wave is. Its seed and start are not used: a wave's last points are taken when it begins. With
            `drift` or `dirty` every second wave is so, the others are clean.
        volume: Where to land.
        per_minute: Files per minute for each stream; the first ones land at once.
        stop: Ends the feed when it is set; files on their way still land.
        streams: Streams to land files for.
        seconds: Ends the feed once all files that fall due in this time have landed; never if None.
        first_seed: Seed of the first wave, if no file has it or a higher one; the next unused one if None.
        progress: Called with each path once it has landed.

    Raises:
        OptionError: If a number makes no sense.
        VolumeError: If the Volume refuses a file for good. What landed before stays.
    """
    if not 0 < per_minute <= 60_000:
        raise OptionError(f"feed={per_minute:g} is not accepted. Use files per minute, above 0 and up to 60000.")
    if seconds is not None and not seconds > 0:
        raise OptionError(f"for={seconds:g} is not accepted. Use seconds above 0.")
    seed = max(next_seed(volume, streams), first_seed or 0)
    lanes = [_Lane(stream, plan, volume, seed, stop, progress) for stream in streams]
    began = time.monotonic()
    ends = None if seconds is None else began + seconds
    behind = 0.0
    landed = 0
    pending: set[Future[None]] = set()
    with ThreadPoolExecutor(UPLOADS, "feed") as pool:
        try:
            while True:
                due = began + landed * 60 / per_minute
                if ends is not None and due >= ends:
                    stop.wait(max(0.0, ends - time.monotonic()))
                    break
                if stop.wait(max(0.0, due - time.monotonic())):
                    break
                for lane in lanes:
                    pending = _with_room(pending)
                    pending.add(pool.submit(lane.land))
                behind = max(behind, time.monotonic() - due)
                landed += 1
            while pending:
                pending = _with_room(pending, 1)
        finally:
            # Whatever ended it, no upload is tried for ever.
            stop.set()
    return FeedReport(
        per_minute=per_minute,
        seconds=time.monotonic() - began,
        behind_seconds=behind,
        retries=sum(lane.retries for lane in lanes),
        abandoned=sum(lane.abandoned for lane in lanes),
        streams=tuple(lane.report(seed) for lane in lanes),
    )


def _with_room(pending: set[Future[None]], most: int = UPLOADS) -> set[Future[None]]:
    """The uploads that go on, once there are fewer than so many; raises what an upload raised."""
    while True:
        done = {future for future in pending if future.done()}
        for future in done:
            future.result()
        pending = pending - done
        if len(pending) < most:
            return pending
        wait(pending, return_when=FIRST_COMPLETED)


class _Lane:
    """The files of one stream, one after another."""

    def __init__(
        self,
        stream: FileStream,
        plan: FleetPlan,
        volume: Volume,
        seed: int,
        stop: threading.Event,
        progress: Callable[[str], None] | None,
    ) -> None:
        self._stream = stream
        self._plan = plan
        self._volume = volume
        self._stop = stop
        self._progress = progress
        self._lock = threading.Lock()
        self._seed = seed - 1
        self._wave: Iterator[tuple[str, bytes, int, str | None]] = iter(())
        self._counted: collections.Counter[str] = collections.Counter()
        self.retries = 0
        self.abandoned = 0

    def land(self) -> None:
        """Land the next file, however long the Volume does not answer, unless the feed is stopped."""
        while True:
            seed, path, data, rows, fault = self._next()
            landed = self._upload(path, data, fault)
            if landed is None:
                return
            with self._lock:
                if landed:
                    self._counted.update(files=1, rows=rows, bytes=len(data), broken=int(fault is not None))
                    if self._progress:
                        self._progress(path)
                    return
                if self._seed == seed:
                    # Another feed has this seed: go on above whatever is there.
                    self._seed = max(seed, next_seed(self._volume, [self._stream]) - 1)
                    self._wave = iter(())

    def report(self, first_seed: int) -> FedStream:
        counted = self._counted
        return FedStream(
            self._stream.name,
            counted["files"],
            counted["broken"],
            counted["rows"],
            counted["bytes"],
            first_seed,
            max(self._seed, first_seed),
        )

    def _next(self) -> tuple[int, str, bytes, int, str | None]:
        with self._lock:
            while True:
                for path, data, rows, fault in self._wave:
                    return self._seed, path, data, rows, fault
                self._seed += 1
                odd = self._seed % 2 == 1
                now = datetime.now(UTC)
                plan = replace(
                    self._plan,
                    seed=self._seed,
                    start=now - timedelta(seconds=wave_seconds(self._plan)),
                    drift=self._plan.drift and odd,
                    dirty=self._plan.dirty and odd,
                )
                self._wave = wave_files(plan, self._stream)

    def _upload(self, path: str, data: bytes, fault: str | None) -> bool | None:
        """Whether the file landed by this call, or None if the feed was stopped before it could."""
        pause = _FIRST_WAIT_SECONDS
        while True:
            # Broken files look an hour old, so that nobody takes them for files that are still being written.
            at = None if fault is None else time.time_ns() - _OLD_NS
            try:
                return self._volume.upload(path, io.BytesIO(data), modified_ns=at)
            except TransientError:
                if self._stop.wait(pause):
                    with self._lock:
                        self.abandoned += 1
                    return None
            with self._lock:
                self.retries += 1
            pause = min(pause * 2, _LONGEST_WAIT_SECONDS)
