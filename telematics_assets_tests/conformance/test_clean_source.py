"""`clean_source`: source files are moved or deleted once their rows are safe, and never otherwise."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, BinaryIO

import pytest

from telematics_assets.autoloader.cleaning import CLEANING_STEPS
from telematics_assets.catalog import FileStream
from telematics_assets.engines.base import Engine, FileRecord
from telematics_assets.errors import CheckpointCorruptError, VolumeError, VolumeUnavailableError
from telematics_assets.volumes.base import FileEntry, Listing, Volume, read_if_unchanged
from telematics_assets_tests.conformance.platforms import CheckpointPlatform
from telematics_assets_tests.conformance.samples import json_stream, lines

DAY = 86_400_000_000_000
ARCHIVE = "_archive/events"


class Killed(BaseException):
    """Stands for SIGKILL inside one process: no handler of the package catches it."""


def mover(**options: Any) -> FileStream:
    """A stream whose files are moved as soon as they are loaded."""
    chosen = {"clean_source_retention_duration": "0 days", "clean_source_move_destination": ARCHIVE, **options}
    return json_stream("n", clean_source="MOVE", **chosen)


def deleter(**options: Any) -> FileStream:
    """A stream whose files are deleted after seven days."""
    return json_stream("n", clean_source="DELETE", clean_source_retention_duration="7 days", **options)


def land(platform: CheckpointPlatform, count: int = 3, first: int = 0) -> dict[str, bytes]:
    """Land files of one record each; their content by path."""
    files = {f"json/2026/{n}.json": lines(f'{{"n":{n}}}') for n in range(first, first + count)}
    for path, data in files.items():
        platform.volume_put(path, data)
    return files


def at(moment: int) -> Callable[[], int]:
    """A clock that stands still."""
    return lambda: moment


def now() -> int:
    """Nanoseconds since the epoch."""
    return time.time_ns()


def there(platform: CheckpointPlatform, folder: str = "json") -> dict[str, bytes]:
    """Every file below a folder with its content; hidden ones too, for nothing may be left behind."""
    found: dict[str, bytes] = {}
    for part in (folder, f"{folder}/2026"):
        for name in platform.volume.names(part):
            found[f"{part}/{name}"] = platform.volume.read(f"{part}/{name}")
    return found


def archived(files: dict[str, bytes]) -> dict[str, bytes]:
    """Where moved files are expected."""
    return {path.replace("json/", f"{ARCHIVE}/", 1): data for path, data in files.items()}


def record(engine: Engine, stream: FileStream, path: str) -> FileRecord:
    """What the engine says of one file."""
    (found,) = [file for file in engine.files(stream) if file.path == path]
    return found


def test_nothing_is_cleaned_unless_asked_for(checkpoint_platform: CheckpointPlatform) -> None:
    files = land(checkpoint_platform)
    engine = checkpoint_platform.engine_when(at(now() + 1000 * DAY))
    stream = json_stream("n")
    assert engine.ingest(stream).files_cleaned == 0
    engine.maintain(stream)
    assert there(checkpoint_platform) == files


def test_loaded_files_are_moved_with_their_folders_and_the_stream_remembers(
    checkpoint_platform: CheckpointPlatform,
) -> None:
    stream = mover()
    files = land(checkpoint_platform)
    report = checkpoint_platform.engine.ingest(stream)
    assert (report.rows, report.files_cleaned, report.cleaning_problem) == (3, 3, None)
    assert there(checkpoint_platform) == {}
    assert there(checkpoint_platform, ARCHIVE) == archived(files)
    engine = checkpoint_platform.restart()
    for file in engine.files(stream):
        assert file.state == "INGESTED"
        target = file.path.replace("json/", f"{ARCHIVE}/", 1)
        assert file.reason is not None
        assert file.reason.startswith(f"moved to {target} by clean_source on 20")
    assert engine.ingest(stream).batches == ()
    assert engine.look(stream).files == 0
    assert [row["n"] for row in checkpoint_platform.rows(stream, "n")] == ["0", "1", "2"]


def test_files_are_deleted_when_their_retention_is_over_and_not_before(checkpoint_platform: CheckpointPlatform) -> None:
    stream, start = deleter(), now()
    files = land(checkpoint_platform)
    assert checkpoint_platform.engine_when(at(start)).ingest(stream).files_cleaned == 0
    assert checkpoint_platform.engine_when(at(start + 7 * DAY - 1)).ingest(stream).files_cleaned == 0
    assert there(checkpoint_platform) == files
    late = checkpoint_platform.engine_when(at(start + 7 * DAY))
    assert late.ingest(stream).files_cleaned == 3
    assert there(checkpoint_platform) == {}
    reason = record(late, stream, "json/2026/0.json").reason
    assert reason is not None
    assert reason.startswith("deleted by clean_source on ")


def test_a_clock_that_went_back_makes_no_file_look_older(checkpoint_platform: CheckpointPlatform) -> None:
    stream, start = deleter(), now()
    land(checkpoint_platform, 1)
    checkpoint_platform.engine_when(at(start)).ingest(stream)
    land(checkpoint_platform, 1, first=1)
    checkpoint_platform.engine_when(at(start - 300 * DAY)).ingest(stream)
    assert checkpoint_platform.engine_when(at(start + 6 * DAY)).ingest(stream).files_cleaned == 0
    assert checkpoint_platform.engine_when(at(0)).maintain(stream).sources_deleted == 0
    assert len(there(checkpoint_platform)) == 2


def test_a_file_from_the_future_stays_until_its_own_time(checkpoint_platform: CheckpointPlatform) -> None:
    stream, start = deleter(), now()
    checkpoint_platform.volume_put("json/a.json", lines('{"n":1}'), start + 3 * DAY)
    checkpoint_platform.engine_when(at(start)).ingest(stream)
    assert checkpoint_platform.engine_when(at(start + 9 * DAY)).ingest(stream).files_cleaned == 0
    assert checkpoint_platform.engine_when(at(start + 10 * DAY)).ingest(stream).files_cleaned == 1


def test_what_was_not_loaded_is_not_touched(checkpoint_platform: CheckpointPlatform) -> None:
    stream = mover(max_files_per_trigger=2)
    checkpoint_platform.volume_put("json/broken.json.gz", b"\x1f\x8bbroken")
    checkpoint_platform.volume_put("json/a.json", lines('{"n":1}'))
    report = checkpoint_platform.engine.ingest(stream)
    assert (report.files_skipped, report.files_cleaned) == (1, 1)
    assert list(there(checkpoint_platform)) == ["json/broken.json.gz"]


def test_a_new_version_under_the_same_name_is_not_touched(checkpoint_platform: CheckpointPlatform) -> None:
    stream, start = deleter(), now()
    checkpoint_platform.volume_put("json/a.json", lines('{"n":1}'), start - DAY)
    checkpoint_platform.volume_put("json/b.json", lines('{"n":2}'), start - DAY)
    checkpoint_platform.engine_when(at(start)).ingest(stream)
    # The same size and the same time: only the version tag tells them apart.
    checkpoint_platform.volume_put("json/a.json", lines('{"n":3}'), start - DAY)
    late = checkpoint_platform.engine_when(at(start + 30 * DAY))
    assert late.ingest(stream).files_cleaned == 1
    assert there(checkpoint_platform) == {"json/a.json": lines('{"n":3}')}
    assert record(late, stream, "json/b.json").reason is not None
    assert record(late, stream, "json/a.json").reason is None


def test_an_overwritten_file_waits_for_the_retention_of_its_newest_version(
    checkpoint_platform: CheckpointPlatform,
) -> None:
    stream, start = deleter(allow_overwrites=True), now()
    checkpoint_platform.volume_put("json/a.json", lines('{"n":1}'), start - DAY)
    checkpoint_platform.engine_when(at(start)).ingest(stream)
    checkpoint_platform.volume_put("json/a.json", lines('{"n":22}'), start + 5 * DAY)
    assert checkpoint_platform.engine_when(at(start + 8 * DAY)).ingest(stream).files_cleaned == 0
    assert list(there(checkpoint_platform)) == ["json/a.json"]
    assert checkpoint_platform.engine_when(at(start + 15 * DAY)).ingest(stream).files_cleaned == 1
    assert [row["n"] for row in checkpoint_platform.rows(stream, "n")] == ["1", "22"]


def test_a_checkpoint_that_knows_no_times_cleans_nothing(checkpoint_platform: CheckpointPlatform) -> None:
    stream = mover()
    files = land(checkpoint_platform)
    checkpoint_platform.engine.ingest(json_stream("n"))
    old = {}
    for name, data in checkpoint_platform.checkpoint(stream).items():
        document = json.loads(data)
        document["format"] = 1
        document.pop("committed_ns", None)
        old[name] = json.dumps(document).encode()
    checkpoint_platform.put_checkpoint(stream, old)
    engine = checkpoint_platform.restart()
    assert engine.ingest(stream).files_cleaned == 0
    assert there(checkpoint_platform) == files
    land(checkpoint_platform, 1, first=9)
    assert engine.ingest(stream).files_cleaned == 1
    assert there(checkpoint_platform) == files


def test_a_name_that_is_taken_by_other_content_is_left_and_another_one_found(
    checkpoint_platform: CheckpointPlatform,
) -> None:
    stream = mover()
    checkpoint_platform.volume_put(f"{ARCHIVE}/2026/0.json", b"older")
    checkpoint_platform.volume_put(f"{ARCHIVE}/2026/1.json", lines('{"n":1}'))
    land(checkpoint_platform, 2)
    assert checkpoint_platform.engine.ingest(stream).files_cleaned == 2
    assert there(checkpoint_platform, ARCHIVE) == {
        f"{ARCHIVE}/2026/0.json": b"older",
        f"{ARCHIVE}/2026/0~1.json": lines('{"n":0}'),
        f"{ARCHIVE}/2026/1.json": lines('{"n":1}'),
    }
    reason = record(checkpoint_platform.engine, stream, "json/2026/0.json").reason
    assert reason is not None
    assert f"moved to {ARCHIVE}/2026/0~1.json" in reason


def test_a_file_that_somebody_else_removed_is_named_gone_once(checkpoint_platform: CheckpointPlatform) -> None:
    stream, start = deleter(), now()
    land(checkpoint_platform, 2)
    checkpoint_platform.engine_when(at(start)).ingest(stream)
    checkpoint_platform.remove("json/2026/0.json")
    late = checkpoint_platform.engine_when(at(start + 8 * DAY))
    assert late.ingest(stream).files_cleaned == 1
    reason = record(late, stream, "json/2026/0.json").reason
    assert reason is not None
    assert reason.startswith("gone when clean_source looked for it")


def test_a_rebuilt_ledger_still_tells_where_the_files_went(checkpoint_platform: CheckpointPlatform) -> None:
    stream = mover()
    land(checkpoint_platform, 1)
    checkpoint_platform.engine.ingest(stream)
    checkpoint_platform.engine.reset(stream, rebuild=True)
    engine = checkpoint_platform.restart()
    assert record(engine, stream, "json/2026/0.json").reason is not None
    land(checkpoint_platform, 1, first=1)
    assert engine.ingest(stream).files_cleaned == 1
    engine.reset(stream, drop_table=True)
    assert engine.files(stream) == []


def test_maintenance_cleans_too_and_says_how_much(checkpoint_platform: CheckpointPlatform) -> None:
    stream, start = deleter(), now()
    land(checkpoint_platform)
    checkpoint_platform.engine_when(at(start)).ingest(stream)
    report = checkpoint_platform.engine_when(at(start + 8 * DAY)).maintain(stream)
    assert (report.sources_moved, report.sources_deleted) == (0, 3)
    assert there(checkpoint_platform) == {}


def test_a_damaged_record_of_clean_source_is_named_and_keeps_no_load_from_its_work(
    checkpoint_platform: CheckpointPlatform,
) -> None:
    stream = mover()
    land(checkpoint_platform, 1)
    checkpoint_platform.engine.ingest(stream)
    folder = f"_checkpoints/{stream.name}/cleaning"
    (name,) = checkpoint_platform.volume.names(folder)
    checkpoint_platform.volume_put(f"{folder}/{name}", b"PAR1")
    land(checkpoint_platform, 1, first=1)
    engine = checkpoint_platform.restart()
    report = engine.ingest(stream)
    assert report.rows == 1
    assert report.cleaning_problem is not None
    assert "move it away" in report.cleaning_problem
    with pytest.raises(CheckpointCorruptError, match="record of clean_source"):
        engine.files(stream)
    checkpoint_platform.remove(f"{folder}/{name}")
    # The file that was moved before is found where it went.
    assert engine.ingest(stream).files_cleaned == 2
    assert all("moved to" in (file.reason or "") for file in engine.files(stream))


# -- kills, races, faults ----------------------------------------------------------------------------------------------


def stop_at(step: str, occurrence: int, action: Callable[[], object]) -> Callable[[str], None]:
    """Do something when a step is passed for the nth time, on whichever thread."""
    lock, left = threading.Lock(), [occurrence]

    def on_step(passed: str) -> None:
        if passed == step:
            with lock:
                left[0] -= 1
                due = left[0] == 0
            if due:
                action()

    return on_step


def kill() -> None:
    """Die where one stands."""
    raise Killed


def assert_clean(platform: CheckpointPlatform, stream: FileStream, files: dict[str, bytes]) -> None:
    """All files are loaded once, and are where they belong, once."""
    assert there(platform) == {}
    if stream.options.clean_source == "MOVE":
        assert there(platform, ARCHIVE) == archived(files)
    engine = platform.restart()
    word = "moved to" if stream.options.clean_source == "MOVE" else "deleted by"
    assert {file.path for file in engine.files(stream) if (file.reason or "").startswith(word)} == set(files)
    assert sorted(int(row["n"]) for row in platform.rows(stream, "n")) == list(range(len(files)))
    intents = [n for n in platform.volume.names(f"_checkpoints/{stream.name}/cleaning") if n.endswith(".intent")]
    assert intents == []


@pytest.mark.parametrize("action", ["MOVE", "DELETE"])
@pytest.mark.parametrize("occurrence", [1, 2])
@pytest.mark.parametrize("step", CLEANING_STEPS)
def test_cleaning_that_dies_at_any_step_is_finished_by_the_next(
    checkpoint_platform: CheckpointPlatform, step: str, occurrence: int, action: str
) -> None:
    stream, start = mover() if action == "MOVE" else deleter(), now()
    files = land(checkpoint_platform)
    checkpoint_platform.engine_when(at(start)).ingest(json_stream("n"))
    died = False
    try:
        checkpoint_platform.engine_when(at(start + 9 * DAY), stop_at(step, occurrence, kill)).ingest(stream)
    except Killed:
        died = True
    per_file = ("source_copied", "source_removed")
    assert died == ((occurrence == 1 or step in per_file) and (step != "source_copied" or action == "MOVE"))
    checkpoint_platform.engine_when(at(start + 9 * DAY)).ingest(stream)
    assert_clean(checkpoint_platform, stream, files)


@pytest.mark.parametrize("action", ["MOVE", "DELETE"])
@pytest.mark.parametrize("step", CLEANING_STEPS)
def test_another_cleaner_at_any_step_does_the_same_once(
    checkpoint_platform: CheckpointPlatform, step: str, action: str
) -> None:
    stream, start = mover() if action == "MOVE" else deleter(), now()
    files = land(checkpoint_platform)
    checkpoint_platform.engine_when(at(start)).ingest(json_stream("n"))
    reports = []

    def other() -> None:
        with ThreadPoolExecutor(1) as pool:
            elsewhere = checkpoint_platform.engine_when(at(start + 9 * DAY))
            reports.append(pool.submit(elsewhere.ingest, stream).result())

    reports.append(checkpoint_platform.engine_when(at(start + 9 * DAY), stop_at(step, 1, other)).ingest(stream))
    assert_clean(checkpoint_platform, stream, files)
    assert [report.cleaning_problem for report in reports if report.cleaning_problem] == []
    assert sum(report.files_cleaned for report in reports) == 3


class FaultyVolume:
    """A Volume that asks before each operation; what the answer raises is what happens instead."""

    def __init__(self, volume: Volume, before: Callable[[str, str], None]) -> None:
        """Stand before a Volume."""
        self._volume = volume
        self._before = before
        self.location = volume.location
        self.uri = volume.uri

    @contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        self._before("open", path)
        with self._volume.open(path) as source:
            yield source

    def scan(self, folder: str, from_path: str = "") -> Listing:
        return self._volume.scan(folder, from_path)

    def names(self, folder: str) -> list[str]:
        self._before("names", folder)
        return self._volume.names(folder)

    def stat(self, path: str) -> FileEntry | None:
        self._before("stat", path)
        return self._volume.stat(path)

    def read(self, path: str) -> bytes:
        self._before("read", path)
        return self._volume.read(path)

    def read_unchanged(self, files: Sequence[FileEntry]) -> list[bytes | None]:
        return [read_if_unchanged(self, file) for file in files]

    def create(self, path: str, data: bytes) -> bool:
        self._before("create", path)
        return self._volume.create(path, data)

    def upload(self, path: str, source: BinaryIO, *, modified_ns: int | None = None) -> bool:
        self._before("upload", path)
        return self._volume.upload(path, source, modified_ns=modified_ns)

    def delete(self, path: str) -> None:
        self._before("delete", path)
        self._volume.delete(path)

    def remove(self, file: FileEntry) -> bool:
        self._before("remove", file.path)
        return self._volume.remove(file)


@pytest.mark.parametrize("action", ["MOVE", "DELETE"])
def test_cleaning_that_dies_before_any_operation_is_finished_by_the_next(
    checkpoint_platform: CheckpointPlatform, action: str
) -> None:
    stream, start = mover() if action == "MOVE" else deleter(), now()
    files: dict[str, bytes] = {}
    operations, died = 0, True
    while died:
        files |= land(checkpoint_platform, 1, first=operations)
        checkpoint_platform.engine_when(at(start)).ingest(json_stream("n"))
        left = [operations]

        def before(_: str, path: str, left: list[int] = left) -> None:
            if not path.startswith("_checkpoints") or path.endswith(("/cleaning", ".intent", ".end")):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed

        faulty = FaultyVolume(checkpoint_platform.volume, before)
        try:
            checkpoint_platform.engine_when(at(start + 9 * DAY), volume=faulty).ingest(stream)
            died = False
        except Killed:
            checkpoint_platform.engine_when(at(start + 9 * DAY)).ingest(stream)
        operations += 1
    assert_clean(checkpoint_platform, stream, files)
    assert operations > 10


def test_a_file_that_can_not_be_removed_is_named_and_the_others_are_cleaned(
    checkpoint_platform: CheckpointPlatform,
) -> None:
    stream, start = deleter(), now()
    land(checkpoint_platform)
    checkpoint_platform.engine_when(at(start)).ingest(stream)

    def before(operation: str, path: str) -> None:
        if operation == "remove" and path == "json/2026/1.json":
            raise VolumeError(f"{path}: permission denied. Check the permissions.")

    faulty = FaultyVolume(checkpoint_platform.volume, before)
    engine = checkpoint_platform.engine_when(at(start + 8 * DAY), volume=faulty)
    assert engine.ingest(stream).files_cleaned == 2
    reason = record(engine, stream, "json/2026/1.json").reason
    assert reason is not None
    assert "permission denied" in reason
    assert list(there(checkpoint_platform)) == ["json/2026/1.json"]
    # Not at every load, but once a day it is tried again.
    assert checkpoint_platform.engine_when(at(start + 8 * DAY + 1)).ingest(stream).files_cleaned == 0
    assert checkpoint_platform.engine_when(at(start + 9 * DAY)).ingest(stream).files_cleaned == 1


def test_a_volume_that_does_not_answer_leaves_a_whole_load_and_the_next_goes_on(
    checkpoint_platform: CheckpointPlatform,
) -> None:
    stream = mover()
    files = land(checkpoint_platform)

    def before(operation: str, path: str) -> None:
        if operation == "upload":
            raise VolumeUnavailableError(f"{path}: time-out. It may go through later.")

    faulty = FaultyVolume(checkpoint_platform.volume, before)
    report = checkpoint_platform.engine_when(now, volume=faulty).ingest(stream)
    assert report.rows == 3
    assert report.cleaning_problem is not None
    assert "time-out" in report.cleaning_problem
    assert there(checkpoint_platform) == files
    assert checkpoint_platform.engine_when(now).ingest(stream).files_cleaned == 3
    assert_clean(checkpoint_platform, stream, files)


@pytest.mark.parametrize("moment", ["stat", "open", "upload", "remove"])
def test_a_version_that_arrives_while_the_file_is_cleaned_is_not_touched(
    checkpoint_platform: CheckpointPlatform, moment: str
) -> None:
    stream, start = mover(), now()
    land(checkpoint_platform, 1)
    checkpoint_platform.engine_when(at(start)).ingest(json_stream("n"))
    path, newer = "json/2026/0.json", lines('{"n":7}')
    waiting = [True]

    def before(operation: str, there: str) -> None:
        if operation == moment and there in (path, f"{ARCHIVE}/2026/0.json") and waiting:
            waiting.clear()
            checkpoint_platform.volume_put(path, newer)

    faulty = FaultyVolume(checkpoint_platform.volume, before)
    checkpoint_platform.engine_when(at(start + DAY), volume=faulty).ingest(stream)
    assert not waiting
    assert there(checkpoint_platform) == {path: newer}
    (file,) = checkpoint_platform.engine.files(stream)
    assert file.reason is None or "moved" not in file.reason


@pytest.mark.parametrize("step", ["cleaning_planned", "source_removed"])
def test_an_intent_of_other_settings_is_closed_without_touching_more(
    checkpoint_platform: CheckpointPlatform, step: str
) -> None:
    start = now()
    land(checkpoint_platform)
    checkpoint_platform.engine_when(at(start)).ingest(json_stream("n"))
    with pytest.raises(Killed):
        checkpoint_platform.engine_when(at(start + 9 * DAY), stop_at(step, 1, kill)).ingest(deleter())
    left = there(checkpoint_platform)
    off = checkpoint_platform.engine_when(at(start + 9 * DAY))
    off.maintain(json_stream("n"))
    assert there(checkpoint_platform) == left
    told = [file.path for file in off.files(json_stream("n")) if file.reason]
    assert len(told) == 3 - len(left)
    assert off.ingest(mover()).files_cleaned == len(left)
    assert there(checkpoint_platform, ARCHIVE) == archived(left)


def test_a_stream_that_is_cleaned_for_long_keeps_few_records(checkpoint_platform: CheckpointPlatform) -> None:
    stream = mover()
    for number in range(20):
        land(checkpoint_platform, 1, first=number)
        assert checkpoint_platform.engine.ingest(stream).files_cleaned == 1
    assert len(checkpoint_platform.volume.names(f"_checkpoints/{stream.name}/cleaning")) <= 3
    assert sum(file.reason is not None for file in checkpoint_platform.restart().files(stream)) == 20
