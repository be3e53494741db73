"""Incremental listing: it spares work where names sort like time, and costs a late file no more than one interval."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import hypothesis.stateful as stateful
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from telematics_assets.autoloader.checkpoint import (
    ATTEMPT_INFO,
    DIGEST_INFO,
    LEDGER_SCHEMA,
    Checkpoint,
    FileResult,
    Plan,
    Result,
    WholeListing,
)
from telematics_assets.autoloader.discovery import Discovery
from telematics_assets.autoloader.incremental import lower_bound
from telematics_assets.autoloader.loader import STEPS, StreamLoader
from telematics_assets.catalog import FileStream, FileStreamOptions, TableContract, TableName
from telematics_assets.engines.base import Backfill, IngestRequest, PendingFiles, ProgressListener
from telematics_assets.errors import TransientError
from telematics_assets.lakehouse.base import Commit, Table
from telematics_assets.testing import parquet_bytes
from telematics_assets.testing.memory import MemoryLakehouse
from telematics_assets.volumes.base import FileEntry, Listing, Volume
from telematics_assets.volumes.memory import MemoryVolume

SECOND = 1_000_000_000
HOUR = 3600
EMPTY = pl.DataFrame(schema=LEDGER_SCHEMA)


def ledger(paths: list[str], per_batch: int = 10) -> pl.DataFrame:
    """A ledger of files that arrived in this order."""
    rows = [(path, 1, 0, "INGESTED", None, 1, n // per_batch, 1, None, None) for n, path in enumerate(paths)]
    return pl.DataFrame(rows, schema=LEDGER_SCHEMA, orient="row")


def hours(days: int, files: int, form: str) -> list[str]:
    """Files of every hour, in order of arrival."""
    return [
        form.format(day=day + 1, hour=hour, number=number)
        for day in range(days)
        for hour in range(24)
        for number in range(files)
    ]


def bound(paths: list[str], *, proven: bool = True, recent: int = 20) -> str:
    return lower_bound(ledger(paths), "in", proven=proven, recent=recent)


# -- where a partial listing begins ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "begins"),
    [
        ("in/2026/11/{day:02}/{hour:02}/vehicle-{number}", "in/2026/11/09/19/"),
        ("in/date=2026-11-{day:02}/hour={hour:02}/{number}", "in/date=2026-11-09/hour=19/"),
        ("in/2026-11-{day:02}/{hour:02}-{number}", "in/2026-11-08/"),
        ("in/202611{day:02}{hour:02}/v{number:03}/points", "in/2026110920/v000/"),
        ("in/202611{day:02}T{hour:02}0{number}-points", "in/20261109T20"),
    ],
)
def test_the_bound_leaves_the_newest_files_and_the_folder_before_them_to_every_listing(form: str, begins: str) -> None:
    paths = hours(9, 10, form)
    begin = bound(paths)
    assert begin.startswith(begins)
    assert all(path >= begin for path in paths[-38:])
    assert bound(paths, proven=False) == begin


@pytest.mark.parametrize(
    "paths",
    [
        [f"in/{number}" for number in range(1, 1500)],
        [f"in/year=2026/month={month}/{n}" for month in range(1, 10) for n in range(50)],
        [f"in/vehicle={n % 7:02}/2026-11-{n // 50:02}/{n:04}" for n in range(1400)],
        [f"in/{random.Random(n).getrandbits(64):016x}" for n in range(1400)],
        [f"in/2026/11/{day:02}/{n}" for day in reversed(range(1, 30)) for n in range(40)],
        [f"in/{'archive' if n % 3 else 'live'}/2026-11-{n // 50:02}/{n:04}" for n in range(1400)],
    ],
    ids=["unpadded numbers", "unpadded months", "vehicles first", "random", "backwards", "two archives"],
)
def test_names_that_do_not_prove_to_sort_like_time_are_listed_whole(paths: list[str]) -> None:
    assert bound(paths) == ""


def test_whoever_says_that_names_sort_like_time_is_believed_where_it_spares_anything() -> None:
    months = [f"in/year=2026/month={month}/{n}" for month in range(1, 10) for n in range(50)]
    assert bound(months, proven=False) == "in/year=2026/month=8/"
    assert bound([f"in/{random.Random(n).getrandbits(64):016x}" for n in range(1400)], proven=False) == ""


def test_little_is_listed_whole() -> None:
    paths = hours(9, 10, "in/2026/11/{day:02}/{hour:02}/{number}")
    assert bound(paths[:39]) == ""
    assert bound(paths[-200:]) != ""
    # A bound that leaves more than half of the files to the listing is not worth its gaps.
    assert bound([f"in/2026-11-{day:02}/{n:03}" for day in (1, 2, 3) for n in range(100)]) == ""
    assert lower_bound(EMPTY, "in", proven=True) == ""


def test_one_file_from_the_future_or_the_past_moves_nothing() -> None:
    paths = hours(9, 10, "in/2026/11/{day:02}/{hour:02}/{number}")
    begin = bound(paths)
    assert bound([*paths[:-5], "in/2099/01/01/00/x", *paths[-5:]], proven=False) == begin
    assert bound([*paths[:-5], "in/2001/01/01/00/x", *paths[-5:]]) == begin


def test_existing_and_rebuilt_files_arrived_by_their_times() -> None:
    paths = hours(9, 10, "in/2026/11/{day:02}/{hour:02}/{number}")
    known = ledger(paths).with_columns(batch_id=pl.lit(None, pl.Int64), modified_ns=pl.int_range(pl.len()))
    assert lower_bound(known.sample(fraction=1, shuffle=True, seed=1), "in", proven=True, recent=20) == bound(paths)


def test_the_part_of_a_large_ledger_that_counts_as_newest_grows_with_it() -> None:
    paths = [f"in/{n:06}" for n in range(100_000)]
    assert bound(paths) == "in/098200"


# -- what a look answers -----------------------------------------------------------------------------------------------


class Clocks:
    """A wall clock that anybody may set, and one that only goes forward."""

    def __init__(self) -> None:
        self.wall = 1_700_000_000 * SECOND
        self.steady = 1000.0

    def pass_(self, seconds: float) -> None:
        self.wall += int(seconds * SECOND)
        self.steady += seconds


class Landing(MemoryVolume):
    """Notes from where on it is listed; can be told to break at a file, and to know no offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.scans: list[str] = []
        self.listed: list[str] = []
        self.breaking: Callable[[str], None] = lambda path: None
        self.answers_offsets = True

    def scan(self, folder: str, from_path: str = "") -> Listing:
        self.scans.append(from_path)
        found = super().scan(folder, from_path)
        if from_path and not self.answers_offsets:
            return Listing(found.files.clear())
        self.listed += found.files["path"].to_list()
        return found

    def create(self, path: str, data: bytes) -> bool:
        self.breaking(f"before {path}")
        made = super().create(path, data)
        self.breaking(f"after {path}")
        return made

    def delete(self, path: str) -> None:
        self.breaking(f"delete {path}")
        super().delete(path)


RECORD = WholeListing("s", "c", 0, "in/b/")


@pytest.fixture
def landing() -> Landing:
    landing = Landing()
    for name in ("a/1", "a/2", "b/1", "c/1"):
        landing.put(f"in/{name}", b"x", modified_ns=1)
    return landing


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


def discovery(landing: Landing, clocks: Clocks, settle: float = 0, incomplete: float = 0, **options: Any) -> Discovery:
    return Discovery(
        landing,
        "in",
        "parquet",
        settle,
        incomplete,
        clock=lambda: clocks.wall,
        monotonic=lambda: clocks.steady,
        options=FileStreamOptions(**options),
    )


def known(landing: Landing) -> pl.DataFrame:
    """A ledger of all that is there."""
    files = landing.scan("in").files.rows()
    landing.scans.clear()
    rows = [(path, size, at, "INGESTED", None, 1, 0, 1, tag, None) for path, size, at, tag in files]
    return pl.DataFrame(rows, schema=LEDGER_SCHEMA, orient="row")


def test_an_unchanged_folder_has_one_version_whether_it_is_listed_whole_or_in_part(
    landing: Landing, clocks: Clocks
) -> None:
    look, files = discovery(landing, clocks), known(landing)
    answers = [look.look(files, EMPTY, RECORD, HOUR) for _ in range(3)]
    assert landing.scans == ["", RECORD.bound, RECORD.bound]
    assert {(a.data_version, a.known, a.changed.height, a.ready.height) for a in answers} == {
        (look.run(files).data_version, 4, 0, 0)
    }


def test_what_is_new_or_changed_from_the_bound_on_shows_at_once(landing: Landing, clocks: Clocks) -> None:
    look, files = discovery(landing, clocks), known(landing)
    look.look(files, EMPTY, RECORD, HOUR)
    landing.put("in/b/2", b"x", modified_ns=2)
    landing.put("in/c/1", b"other", modified_ns=2)
    found = look.look(files, EMPTY, RECORD, HOUR)
    assert landing.scans == ["", RECORD.bound]
    assert (found.ready["path"].to_list(), found.changed["path"].to_list(), found.late) == (["in/b/2"], ["in/c/1"], 0)
    assert found.data_version == look.run(files).data_version


def test_a_late_file_shows_once_the_interval_is_over_and_until_a_load_took_it(landing: Landing, clocks: Clocks) -> None:
    look, files = discovery(landing, clocks), known(landing)
    look.look(files, EMPTY, RECORD, HOUR)
    landing.put("in/a/late", b"x", modified_ns=2)
    clocks.pass_(HOUR - 1)
    clocks.wall -= 7 * HOUR * SECOND
    assert look.look(files, EMPTY, RECORD, HOUR).ready.is_empty()
    clocks.pass_(1)
    for _ in range(3):
        found = look.look(files, EMPTY, RECORD, HOUR)
        assert (found.ready["path"].to_list(), found.late, look.sees_late_files) == (["in/a/late"], 1, True)
    landing.scans.clear()
    look.look(known(landing), EMPTY, RECORD, HOUR)
    assert not look.sees_late_files
    look.look(known(landing), EMPTY, RECORD, HOUR)
    assert landing.scans == [RECORD.bound]


def test_a_look_follows_a_load_that_listed_whole(landing: Landing, clocks: Clocks) -> None:
    look, files = discovery(landing, clocks), known(landing)
    look.look(files, EMPTY, RECORD, HOUR)
    landing.put("in/a/late", b"x", modified_ns=2)
    found = look.look(files, EMPTY, WholeListing("s", "c", 1, "in/c/"), HOUR)
    assert (found.ready["path"].to_list(), found.late) == (["in/a/late"], 1)


def test_files_that_changed_below_the_bound_stay_counted(landing: Landing, clocks: Clocks) -> None:
    look, files = discovery(landing, clocks), known(landing)
    landing.put("in/a/1", b"other", modified_ns=2)
    assert [look.look(files, EMPTY, RECORD, HOUR).changed["path"].to_list() for _ in range(2)] == [["in/a/1"]] * 2
    assert landing.scans == ["", RECORD.bound]
    # After a reset with rebuild, or the like, the ledger knows better.
    assert look.look(known(landing), EMPTY, RECORD, HOUR).changed.is_empty()


def test_a_late_file_that_may_still_be_written_keeps_listings_whole_until_it_settles(
    landing: Landing, clocks: Clocks
) -> None:
    look, files = discovery(landing, clocks, settle=2.0), known(landing)
    landing.put("in/a/late", parquet_bytes({"a": [1]}), modified_ns=clocks.wall + HOUR * SECOND)
    for _ in range(2):
        found = look.look(files, EMPTY, RECORD, HOUR)
        assert ([file.path for file, _ in found.waiting], found.late) == (["in/a/late"], 0)
        assert look.sees_late_files
        clocks.pass_(1)
    assert look.look(files, EMPTY, RECORD, HOUR).ready["path"].to_list() == ["in/a/late"]


def test_a_store_that_answers_an_offset_with_nothing_is_listed_whole(landing: Landing, clocks: Clocks) -> None:
    landing.answers_offsets = False
    look, files = discovery(landing, clocks), known(landing)
    landing.put("in/d", b"x", modified_ns=2)
    landing.put("in/a/late", b"x", modified_ns=2)
    for _ in range(2):
        found = look.look(files, EMPTY, RECORD, HOUR)
        assert (sorted(found.ready["path"]), found.late) == (["in/a/late", "in/d"], 1)
    partial = look.run(files, bound=RECORD.bound)
    assert (partial.bound, partial.ready.height) == ("", 2)


def test_a_time_from_the_future_and_a_clock_that_stands_still_do_not_postpone(landing: Landing, clocks: Clocks) -> None:
    record = WholeListing("s", "c", clocks.wall, "in/b/")
    assert not discovery(landing, clocks).is_due(record, HOUR)
    clocks.wall -= 1
    assert discovery(landing, clocks).is_due(record, HOUR)
    clocks.wall += HOUR * SECOND
    assert not discovery(landing, clocks).is_due(record, HOUR)
    clocks.wall += 1
    assert discovery(landing, clocks).is_due(record, HOUR)
    clocks.wall -= 1
    process = discovery(landing, clocks)
    assert not process.is_due(record, HOUR)
    clocks.steady += HOUR
    assert process.is_due(record, HOUR)


# -- streams that live -------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the package catches it."""


TABLE = TableName("workspace", "01_bronze", "things")
SCHEMA = pa.schema([("path", pa.string()), ("size", pa.int64()), ("modified_ns", pa.int64())])


class Writer:
    """Makes one row of each file: its path and facts."""

    def __init__(self, landing: Volume, lakehouse: MemoryLakehouse) -> None:
        self._landing = landing
        self._lakehouse = lakehouse

    def create_table(
        self, stream: FileStream, name: TableName, files: tuple[FileEntry, ...], properties: dict[str, str]
    ) -> Table:
        return self._lakehouse.create(name, SCHEMA, "", properties)

    def write(
        self,
        stream: FileStream,
        table: Table,
        plan: Plan,
        attempt: str,
        stream_id: str,
        publish: Callable[[Result], None],
        on_step: Callable[[str], None],
        progress: ProgressListener,
    ) -> Commit:
        on_step("reading")
        info = {ATTEMPT_INFO: attempt, DIGEST_INFO: plan.digest}
        return table.append(SCHEMA, [self._read(plan, attempt, publish)], stream_id, plan.batch_id, info)

    def rewrite(
        self,
        stream: FileStream,
        table: Table,
        plan: Plan,
        attempt: str,
        positions: dict[str, int],
        publish: Callable[[Result], None],
        on_step: Callable[[str], None],
        progress: ProgressListener,
    ) -> Commit:
        return table.overwrite(SCHEMA, [self._read(plan, attempt, publish)], positions, {ATTEMPT_INFO: attempt})

    def _read(self, plan: Plan, attempt: str, publish: Callable[[Result], None]) -> pa.RecordBatch:
        there = [self._landing.stat(file.path) == file for file in plan.files]
        rows = [(f.path, f.size, f.modified_ns) for f, same in zip(plan.files, there, strict=True) if same]
        states = [
            FileResult(f.path, "INGESTED" if same else "LEFT", rows=int(same))
            for f, same in zip(plan.files, there, strict=True)
        ]
        publish(Result(plan.batch_id, attempt, tuple(states), (), ()))
        columns = list(zip(*rows, strict=True)) or [(), (), ()]
        return pa.record_batch([pa.array(c, t) for c, t in zip(columns, SCHEMA.types, strict=True)], schema=SCHEMA)


class World:
    """One stream of date folders, its table, and processes that come and go."""

    def __init__(self, **options: Any) -> None:
        self.landing = Landing()
        self.lakehouse = MemoryLakehouse()
        self.clocks = Clocks()
        self.stream = FileStream("things", "json", "in", "things", TableContract("."), options)  # type: ignore[arg-type]
        self.checkpoint = Checkpoint(self.landing, "things")
        self.files: dict[str, tuple[int, int]] = {}
        self._times = itertools.count(1)

    def put(self, name: str, size: int = 1) -> None:
        path, when = f"in/{name}", next(self._times)
        self.landing.put(path, b"x" * size, modified_ns=when)
        self.files[path] = (size, when)

    def process(self, on_step: Callable[[str], None] | None = None) -> StreamLoader:
        return StreamLoader(
            self.stream,
            TABLE,
            self.landing,
            self.lakehouse,
            Writer(self.landing, self.lakehouse),
            settle_seconds=0,
            incomplete_seconds=0,
            on_step=on_step,
            clock=lambda: self.clocks.wall,
            monotonic=lambda: self.clocks.steady,
            recent_files=4,
        )

    def loaded(self) -> list[tuple[str, int, int]]:
        table = self.lakehouse.open(TABLE)
        return [] if table is None else [tuple(row.values()) for row in table.read().to_pylist()]

    def unloaded(self) -> set[str]:
        """Files that are there, and not in the table (with `allow_overwrites`: not as they stand)."""
        rows = self.loaded()
        if self.stream.options.allow_overwrites:
            return {path for path, facts in self.files.items() if (path, *facts) not in rows}
        return self.files.keys() - {path for path, _, _ in rows}

    def planned(self) -> set[str]:
        """Files of a batch that is not published, although its rows may be in the table."""
        metadata = self.checkpoint.metadata()
        if metadata is None:
            return set()
        last = self.checkpoint.last_commit(metadata)
        plan = self.checkpoint.plan(metadata.first_batch if last is None else last.batch_id + 1)
        return set() if plan is None else {file.path for file in plan.files}

    def whole_scans(self) -> int:
        """How often the folder was listed whole since it was asked last."""
        count = self.landing.scans.count("")
        self.landing.scans.clear()
        return count


def begun(**options: Any) -> World:
    """Six days of files that are loaded; a listing of all of them is recorded."""
    world = World(**{"use_incremental_listing": "true", **options})
    for day in range(1, 7):
        world.put(f"2026/11/{day:02}/a")
        world.put(f"2026/11/{day:02}/b")
    world.process().ingest()
    world.landing.scans.clear()
    return world


def test_a_load_lists_from_the_bound_on_until_a_listing_of_all_is_due() -> None:
    world = begun()
    record = world.checkpoint.whole_listing()
    assert record is not None
    assert (record.bound, record.listed_at_ns) == ("in/2026/11/04/", world.clocks.wall)
    world.put("2026/11/06/c")
    world.put("2026/11/01/late")
    told: list[str] = []
    report = world.process().ingest(progress=lambda progress: told.append(progress.message))
    assert (report.files_ingested, world.whole_scans(), world.unloaded()) == (1, 0, {"in/2026/11/01/late"})
    assert told[0] == "listing in from in/2026/11/04/ on"
    world.clocks.pass_(HOUR)
    assert world.process().ingest().files_ingested == 1
    assert world.whole_scans() == 2
    assert world.process().ingest().files_ingested == 0
    assert world.whole_scans() == 0


def test_files_and_list_whole_and_other_choices_of_files_list_whole() -> None:
    world = begun()
    world.put("2026/11/01/late.json")
    assert [f.path for f in world.process().files("DISCOVERED")] == ["in/2026/11/01/late.json"]
    world.whole_scans()
    world.stream = world.stream.with_options(path_glob_filter="*.json")
    assert world.process().look().files == 1
    assert world.process().ingest().files_ingested == 1
    world.put("2026/11/02/late.json")
    assert world.process().ingest(IngestRequest(list_whole=True)).files_ingested == 1


def test_what_a_whole_listing_leaves_behind_stays_in_sight() -> None:
    """A file that a load could not take may lie below the bound that the names alone would give."""
    world = begun()
    world.put("2026/11/02/restless")
    process = world.process(lambda step: world.put("2026/11/02/restless") if step == "reading" else None)
    world.clocks.pass_(HOUR)
    process.ingest()
    record = world.checkpoint.whole_listing()
    assert record is not None
    assert record.bound == "in/2026/11/02/restless"
    assert world.process().ingest().files_ingested == 1


def test_a_load_that_stops_before_all_is_taken_records_nothing() -> None:
    world = begun(max_files_per_trigger=1)
    before = world.checkpoint.whole_listing()
    world.clocks.pass_(HOUR)
    for number in range(3):
        world.put(f"2026/11/01/late{number}")
    world.process().ingest(IngestRequest(max_files=1))
    assert world.checkpoint.whole_listing() == before
    assert world.process().ingest().files_ingested == 2
    assert world.checkpoint.whole_listing() != before


def test_a_reset_stream_is_listed_whole() -> None:
    world = begun()
    world.process().reset(drop_table=True)
    assert world.checkpoint.whole_listing() is None
    world.process().ingest()
    assert world.unloaded() == set()


@pytest.mark.parametrize(
    "request_",
    [IngestRequest(backfill=Backfill("2026/11/01")), IngestRequest(full_refresh=True)],
    ids=["backfill", "refresh"],
)
def test_a_backfill_and_a_full_refresh_see_what_lies_below_the_bound(request_: IngestRequest) -> None:
    world = begun()
    world.put("2026/11/01/late")
    assert world.process().ingest(request_).files_ingested == (1 if request_.backfill else 13)
    assert world.unloaded() == set()
    world.put("2026/11/01/later")
    world.clocks.pass_(HOUR)
    assert world.process().ingest().files_ingested == 1


def test_of_the_records_one_is_kept_and_a_damaged_one_only_costs_a_listing() -> None:
    world = begun()
    for _ in range(3):
        world.clocks.pass_(HOUR)
        world.process().ingest()
    (name,) = world.landing.names("_checkpoints/things/listings")
    world.landing.put(f"_checkpoints/things/listings/{name}", b'{"format":1,"ki')
    world.put("2026/11/07/a")
    world.put("2026/11/07/b")
    assert world.process().look().files == 2
    assert world.process().ingest().files_ingested == 2
    assert (world.whole_scans() > 0, world.checkpoint.whole_listing() is not None) == (True, True)


def test_streams_whose_names_prove_nothing_record_nothing() -> None:
    world = World(use_incremental_listing="auto")
    for number in range(30):
        world.put(f"{number}")
    world.process().ingest()
    assert world.checkpoint.whole_listing() is None
    world.stream = begun().stream.with_options(use_incremental_listing=False)
    for day in range(1, 7):
        world.put(f"2026/11/{day:02}/a")
    world.process().ingest()
    assert world.checkpoint.whole_listing() is None


def test_a_look_in_the_same_process_lets_the_load_find_what_it_saw() -> None:
    world = begun()
    world.put("2026/11/01/late")
    process = world.process()
    assert (process.look().files, process.look().late) == (1, 1)
    assert process.ingest().files_ingested == 1


NAMES = ["x", "~", "!", "é", "e\u0301", "東京", "🚗", "\uff5e", "a b", "A", "a.b", "a-b", "a/b", "%41", "é/🚗"]
BREAKS = [f"{when} _checkpoints/things/listings" for when in ("before", "after", "delete")]


class Lives(stateful.RuleBasedStateMachine):
    """Any order of landings, looks, loads, deaths and clocks."""

    @stateful.initialize(
        mode=st.sampled_from(["auto", "true"]), overwrites=st.booleans(), batch=st.sampled_from([2, 1000])
    )
    def begin(self, mode: str, overwrites: bool, batch: int) -> None:
        self.world = begun(use_incremental_listing=mode, allow_overwrites=overwrites, max_files_per_trigger=batch)
        self.day = 6
        self.numbers = itertools.count()
        self.sensor = self.world.process()
        self.landed: dict[str, float] = {}
        self.jumped = 0.0
        self.last_look: tuple[WholeListing | None, float, bool] | None = None
        self.seen: dict[str, tuple[int, int]] = {}

    def put(self, name: str, size: int = 1) -> None:
        self.world.put(name, size)
        self.landed[f"in/{name}"] = self.world.clocks.steady

    @stateful.rule(files=st.integers(1, 4), next_day=st.booleans())
    def land_in_order(self, files: int, next_day: bool) -> None:
        self.day += next_day
        for _ in range(files):
            self.put(f"2026/11/{self.day:02}/{next(self.numbers):04}")

    @stateful.rule(day=st.integers(0, 40), name=st.sampled_from(NAMES))
    def land_anywhere(self, day: int, name: str) -> None:
        self.put(f"2026/11/{day:02}/{name}" if day else name)

    @stateful.rule(choice=st.randoms(use_true_random=False), size=st.integers(1, 3))
    def overwrite(self, choice: random.Random, size: int) -> None:
        self.put(choice.choice(sorted(self.world.files)).removeprefix("in/"), size)

    @stateful.rule(seconds=st.sampled_from([1, 600, HOUR - 1, HOUR, 5 * HOUR]))
    def time_passes(self, seconds: int) -> None:
        self.world.clocks.pass_(seconds)

    @stateful.rule(seconds=st.sampled_from([-5 * HOUR, -HOUR, -600, 600, HOUR, 50 * HOUR]))
    def the_clock_jumps(self, seconds: int) -> None:
        self.world.clocks.wall += seconds * SECOND
        self.jumped = self.world.clocks.steady

    @stateful.rule()
    def another_sensor(self) -> None:
        self.sensor = self.world.process()
        self.last_look = None

    @stateful.rule()
    def look(self) -> None:
        self.looked()

    def looked(self) -> PendingFiles:
        world, clocks = self.world, self.world.clocks
        world.landing.scans.clear()
        world.landing.listed.clear()
        record = world.checkpoint.whole_listing()
        pending = self.sensor.look()
        whole = world.whole_scans() > 0
        if self.last_look is not None and record is not None:
            before, at, late = self.last_look
            spared = before == record and not late and clocks.steady - at < HOUR
            assert whole == (not spared)
        planned, left = world.planned(), world.unloaded() | world.planned()
        if whole:
            assert pending.files == len(left)
            self.seen = dict(world.files)
            late = record is not None and any(path < record.bound for path in left)
            self.last_look = (record, clocks.steady, late)
            assert pending.late == sum(record is not None and path < record.bound for path in left)
        else:
            assert record is not None
            assert all(path >= record.bound for path in world.landing.listed), "folders below the bound were listed"
            assert pending.files == len({path for path in left if path >= record.bound} | planned)
            below = {path: facts for path, facts in self.seen.items() if path < record.bound}
            self.seen = below | {path: facts for path, facts in world.files.items() if path >= record.bound}
        assert pending.data_version == version_of(self.seen)
        return pending

    @stateful.rule()
    def tick(self) -> None:
        """A look, and the run that it starts: what was announced is loaded."""
        pending = self.looked()
        before = self.world.unloaded() | self.world.planned()
        if pending.files:
            self.world.process().ingest(IngestRequest(list_whole=pending.late > 0))
            assert len(before - self.world.unloaded()) >= pending.files
            assert not pending.late or not self.world.unloaded()

    @stateful.rule(same_process=st.booleans())
    def load(self, same_process: bool) -> None:
        world, clocks = self.world, self.world.clocks
        record = world.checkpoint.whole_listing()
        due = record is None or not 0 <= clocks.wall - record.listed_at_ns < HOUR * SECOND
        waited = {p for p, at in self.landed.items() if clocks.steady - max(at, self.jumped) >= HOUR}
        (self.sensor if same_process else world.process()).ingest()
        left = world.unloaded()
        assert not due or not left
        # Without a jump of the clock since they landed, an interval is enough.
        assert record is None or record.listed_at_ns > clocks.wall or not left & waited
        assert record is None or not any(path >= record.bound for path in left)

    @stateful.rule(where=st.sampled_from([*STEPS, *BREAKS]), nth=st.integers(1, 2))
    def load_and_die(self, where: str, nth: int) -> None:
        left = nth

        def on(passed: str) -> None:
            nonlocal left
            if passed.startswith(where):
                left -= 1
                if left == 0:
                    raise Killed

        self.world.landing.breaking = on
        try:
            self.world.process(on).ingest()
        except Killed:
            pass
        finally:
            self.world.landing.breaking = lambda path: None

    @stateful.rule(step=st.sampled_from(STEPS), late=st.booleans())
    def two_loads_at_once(self, step: str, late: bool) -> None:
        """A file lands and a load goes from begin to end while another is at a step."""
        done = False

        def on_step(passed: str) -> None:
            nonlocal done
            if passed == step and not done:
                done = True
                self.put(f"2026/11/{1 if late else self.day:02}/{next(self.numbers):04}")
                self.world.process().ingest()

        try:
            self.world.process(on_step).ingest()
        except TransientError:
            return

    @stateful.invariant()
    def nothing_is_doubled_or_made_up(self) -> None:
        if hasattr(self, "world"):
            rows = self.world.loaded()
            assert len(set(rows)) == len(rows)
            if not self.world.stream.options.allow_overwrites:
                assert len({path for path, _, _ in rows}) == len(rows)
            assert len(self.world.landing.names("_checkpoints/things/listings")) <= 2

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.clocks.pass_(2 * HOUR)
            record = self.world.checkpoint.whole_listing()
            if record is not None and record.listed_at_ns > self.world.clocks.wall - HOUR * SECOND:
                self.world.clocks.wall = record.listed_at_ns + HOUR * SECOND
            self.world.process().ingest()
            assert self.world.unloaded() == set()


def version_of(files: dict[str, tuple[int, int]]) -> str:
    """The version of a folder with these files and no others."""
    landing = Landing()
    for path, (size, when) in files.items():
        landing.put(path, b"x" * size, modified_ns=when)
    return discovery(landing, Clocks()).run(EMPTY).data_version


TestLives = Lives.TestCase
TestLives.settings = settings(stateful_step_count=30, max_examples=max(20, settings().max_examples // 2))
