"""Discovery: only the ledger decides what is known, only two equal looks prove that a young file is finished."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from telematics_assets.autoloader.checkpoint import LEDGER_SCHEMA
from telematics_assets.autoloader.discovery import Discovered, Discovery, choose, compare, fingerprint
from telematics_assets.catalog import FileFormat, FileStreamOptions
from telematics_assets.errors import FileMissingError, VolumeError
from telematics_assets.testing import json_bytes, parquet_bytes
from telematics_assets.volumes.base import FileEntry, Listing, Problem
from telematics_assets.volumes.memory import MemoryVolume

SECOND = 1_000_000_000
NOW = 1_700_000_000 * SECOND
SETTLE, INCOMPLETE = 2.0, 60.0
EMPTY = pl.DataFrame(schema=LEDGER_SCHEMA)
WHOLE = parquet_bytes({"a": [1]})


@dataclass
class Clocks:
    """A wall clock that anybody may set, and one that only goes forward."""

    wall: int = NOW
    steady: float = 1000.0

    def pass_(self, seconds: float) -> None:
        self.wall += int(seconds * SECOND)
        self.steady += seconds

    def set_wall(self, seconds: float) -> None:
        self.wall += int(seconds * SECOND)


class Landing(MemoryVolume):
    """A Volume that counts what is opened, and can refuse to open or lose files after listing them."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.refused: set[str] = set()
        self.vanishing: set[str] = set()
        self.problems: tuple[Problem, ...] = ()

    def scan(self, folder: str, from_path: str = "") -> Listing:
        return Listing(super().scan(folder, from_path).files, self.problems)

    @contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        self.opened.append(path)
        if path in self.vanishing:
            raise FileMissingError(f"{path} does not exist.")
        if path in self.refused:
            raise VolumeError(f"{path}: Permission denied.")
        with super().open(path) as source:
            yield source


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def landing() -> Landing:
    return Landing()


def discovery(
    landing: Landing,
    clocks: Clocks,
    format: FileFormat = "parquet",
    settle: float = SETTLE,
    incomplete: float = INCOMPLETE,
) -> Discovery:
    return Discovery(
        landing, "in", format, settle, incomplete, clock=lambda: clocks.wall, monotonic=lambda: clocks.steady
    )


def ledger(*rows: tuple[str, int | None, int, str]) -> pl.DataFrame:
    full = [(path, size, modified, state, None, 1, 0, 1, None, None) for path, size, modified, state in rows]
    return pl.DataFrame(full, schema=LEDGER_SCHEMA, orient="row")


def listing(*files: tuple[str, int, int]) -> Listing:
    schema = {"path": pl.String, "size": pl.Int64, "modified_ns": pl.Int64, "etag": pl.String}
    return Listing(pl.DataFrame([(*file, "tag") for file in files], schema=schema, orient="row"))


def names(frame: pl.DataFrame) -> list[str]:
    return sorted(frame["path"])


def waiting(found: Discovered) -> list[str]:
    return sorted(file.path for file, _ in found.waiting)


# -- compare -----------------------------------------------------------------------------------------------------------

PATHS = st.sampled_from([f"in/{name}" for name in ("a", "b", "c", "d e", "ü")])
SIZES = st.integers(0, 3)
TIMES = st.sampled_from([-5 * SECOND, 0, 1, 999, 1000, 1001, NOW, 4_000_000_000 * SECOND])
STATES = st.sampled_from(["INGESTED", "SKIPPED_CORRUPTED", "SKIPPED_MISSING"])


def expected(
    files: dict[str, tuple[int, int]], known: dict[str, tuple[int | None, int, str]]
) -> tuple[set[str], set[str]]:
    new: set[str] = set()
    changed: set[str] = set()
    for path, (size, modified) in files.items():
        if path not in known or known[path][2] == "SKIPPED_MISSING":
            new.add(path)
            continue
        known_size, known_modified, state = known[path]
        if known_size is None:
            same = modified // 1000 == known_modified // 1000
        else:
            same = (size, modified) == (known_size, known_modified)
        if not same:
            (changed if state == "INGESTED" else new).add(path)
    return new, changed


@given(
    st.dictionaries(PATHS, st.tuples(SIZES, TIMES)),
    st.dictionaries(PATHS, st.tuples(SIZES, TIMES, STATES)),
    st.sets(PATHS),
)
def test_a_listing_is_split_as_a_dict_would(
    files: dict[str, tuple[int, int]], known: dict[str, tuple[int, int, str]], rebuilt: set[str]
) -> None:
    """Files in `rebuilt` are known from table rows: without size, their time in microseconds."""
    ledgered: dict[str, tuple[int | None, int, str]] = {
        path: (None, modified // 1000 * 1000, "INGESTED") if path in rebuilt else (size, modified, state)
        for path, (size, modified, state) in known.items()
    }
    found = listing(*((path, *facts) for path, facts in files.items()))
    new, changed = compare(found, ledger(*((path, *facts) for path, facts in ledgered.items())))
    assert new.columns == changed.columns == found.files.columns
    assert (set(new["path"]), set(changed["path"])) == expected(files, ledgered)
    assert (len(set(new["path"])), len(set(changed["path"]))) == (new.height, changed.height)
    for path, size, modified, tag in [*new.iter_rows(), *changed.iter_rows()]:
        assert (size, modified, tag) == (*files[path], "tag")


@pytest.mark.parametrize("state", ["INGESTED", "SKIPPED_CORRUPTED"])
def test_what_is_known_as_it_stands_is_neither_new_nor_changed(state: str) -> None:
    new, changed = compare(listing(("in/a", 1, 2)), ledger(("in/a", 1, 2, state)))
    assert (names(new), names(changed)) == ([], [])


def test_a_quarantined_file_is_tried_again_once_it_changed() -> None:
    new, changed = compare(listing(("in/a", 2, 2)), ledger(("in/a", 1, 2, "SKIPPED_CORRUPTED")))
    assert (names(new), names(changed)) == (["in/a"], [])


def test_a_missing_file_that_is_back_is_new_even_with_the_old_size_and_time() -> None:
    new, _ = compare(listing(("in/a", 1, 2)), ledger(("in/a", 1, 2, "SKIPPED_MISSING")))
    assert names(new) == ["in/a"]


def test_an_existing_file_is_known_as_it_stands_and_changed_as_an_ingested_one_is() -> None:
    known = ledger(("in/a", 1, 2, "SKIPPED_EXISTING"), ("in/b", 1, 2, "SKIPPED_EXISTING"))
    new, changed = compare(listing(("in/a", 1, 2), ("in/b", 1, 3)), known)
    assert (names(new), names(changed)) == ([], ["in/b"])


@pytest.mark.parametrize("state", ["INGESTED", "SKIPPED_CORRUPTED", "SKIPPED_MISSING"])
def test_a_version_that_was_ingested_once_is_known_whatever_came_after_it(state: str) -> None:
    known = ledger(("in/a", 5, 5_000, state))
    older = ledger(("in/a", 1, 2_000, "INGESTED"), ("in/a", None, 3_000, "INGESTED"), ("in/b", 9, 9_000, "INGESTED"))
    for size, modified in ((1, 2_000), (7, 3_999)):
        new, changed = compare(listing(("in/a", size, modified)), known, older)
        assert (names(new), names(changed)) == ([], [])
    for size, modified in ((2, 2_000), (1, 2_001), (7, 4_000), (9, 9_000)):
        new, changed = compare(listing(("in/a", size, modified)), known, older)
        assert names(pl.concat([new, changed])) == ["in/a"]


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_names_and_times_choose_and_problems_stay() -> None:
    files = listing(("in/a.json", 1, 10_000), ("in/x.json/b.csv", 1, 10_000), ("in/c.json", 1, 5_000), ("in/d", 1, 0))
    found = Listing(files.files, (Problem("in/odd", "why"),))
    options = FileStreamOptions(path_glob_filter="*.json", modified_after="1970-01-01T00:00:00.000005")
    assert names(choose(found, options).files) == ["in/a.json"]
    assert choose(found, options).problems == found.problems
    early = FileStreamOptions(modified_before="1970-01-01T00:00:00.000010")
    assert names(choose(found, early).files) == ["in/c.json", "in/d"]
    ages = FileStreamOptions(modified_after="0001-01-01", modified_before="9999-12-31")
    assert names(choose(found, ages).files) == names(files.files)


def test_an_overwritten_file_settles_like_a_new_one_before_it_is_taken_again(landing: Landing, clocks: Clocks) -> None:
    landing.put("in/a", WHOLE, modified_ns=NOW)
    allowing = Discovery(
        landing,
        "in",
        "parquet",
        SETTLE,
        INCOMPLETE,
        clock=lambda: clocks.wall,
        monotonic=lambda: clocks.steady,
        options=FileStreamOptions(allow_overwrites=True),
    )
    known = ledger(("in/a", 1, NOW - 1, "INGESTED"))
    assert waiting(allowing.run(known)) == ["in/a"]
    clocks.pass_(SETTLE)
    found = allowing.run(known)
    assert (names(found.ready), found.changed.height) == (["in/a"], 0)


# -- settling ----------------------------------------------------------------------------------------------------------


def test_old_files_pass_at_once_however_old_they_are(landing: Landing, clocks: Clocks) -> None:
    for number, modified in enumerate((NOW - int(SETTLE * SECOND), NOW - 3600 * SECOND, SECOND, 0, -(10**9) * SECOND)):
        landing.put(f"in/{number}", WHOLE, modified_ns=modified)
    known = ledger(("in/newest", 1, NOW, "INGESTED"))
    found = discovery(landing, clocks).run(known)
    assert (names(found.ready), found.waiting) == ([f"in/{n}" for n in range(5)], ())
    assert found.ready["path"].to_list() == ["in/4", "in/3", "in/2", "in/1", "in/0"], "oldest first"


def test_files_of_one_time_come_by_name(landing: Landing, clocks: Clocks) -> None:
    for name in ("c", "a", "b"):
        landing.put(f"in/{name}", WHOLE, modified_ns=NOW - 3600 * SECOND)
    assert discovery(landing, clocks).run(EMPTY).ready["path"].to_list() == ["in/a", "in/b", "in/c"]


def test_a_young_file_waits_until_it_is_a_settle_time_old(landing: Landing, clocks: Clocks) -> None:
    landing.put("in/a", WHOLE, modified_ns=NOW)
    look = discovery(landing, clocks)
    for _ in range(4):
        found = look.run(EMPTY)
        assert (names(found.ready), waiting(found)) == ([], ["in/a"])
        assert "being written" in found.waiting[0][1]
        clocks.pass_(SETTLE / 4)
    assert names(look.run(EMPTY).ready) == ["in/a"]


def test_a_look_of_another_process_does_not_need_to_see_an_old_file_twice(landing: Landing, clocks: Clocks) -> None:
    landing.put("in/a", WHOLE, modified_ns=NOW)
    clocks.pass_(SETTLE)
    assert names(discovery(landing, clocks).run(EMPTY).ready) == ["in/a"]


@pytest.mark.parametrize("ahead", [0.5, 3600, 10**9])
def test_a_file_from_the_future_needs_two_equal_listings_a_settle_time_apart(
    landing: Landing, clocks: Clocks, ahead: float
) -> None:
    landing.put("in/a", WHOLE, modified_ns=NOW + int(ahead * SECOND))
    look = discovery(landing, clocks, settle=0.25)
    assert waiting(look.run(EMPTY)) == ["in/a"]
    clocks.pass_(0.2)
    assert waiting(look.run(EMPTY)) == ["in/a"]
    clocks.pass_(0.05)
    found = look.run(EMPTY)
    assert (names(found.ready), found.waiting) == (["in/a"], ())


def test_only_the_steady_clock_measures_the_distance_of_two_listings(landing: Landing, clocks: Clocks) -> None:
    landing.put("in/a", WHOLE, modified_ns=NOW + 3600 * SECOND)
    look = discovery(landing, clocks)
    look.run(EMPTY)
    clocks.set_wall(600)
    assert waiting(look.run(EMPTY)) == ["in/a"], "the wall clock went on, but no time passed"
    clocks.set_wall(-1200)
    clocks.steady += SETTLE
    assert names(look.run(EMPTY).ready) == ["in/a"]


def test_a_wall_clock_that_jumps_back_hides_nothing(landing: Landing, clocks: Clocks) -> None:
    landing.put("in/landed_before_the_jump", WHOLE, modified_ns=NOW - 10 * SECOND)
    clocks.set_wall(-86_400)
    look = discovery(landing, clocks)
    look.run(EMPTY)
    landing.put("in/landed_after_the_jump", WHOLE, modified_ns=clocks.wall)
    clocks.pass_(SETTLE)
    found = look.run(EMPTY)
    assert names(found.ready) == ["in/landed_after_the_jump", "in/landed_before_the_jump"]


def test_a_growing_file_keeps_waiting_and_passes_when_it_rests(landing: Landing, clocks: Clocks) -> None:
    look = discovery(landing, clocks, settle=0.25)
    for size in range(1, 20):
        landing.put("in/a", WHOLE * size, modified_ns=NOW + 3600 * SECOND)
        assert waiting(look.run(EMPTY)) == ["in/a"]
        clocks.pass_(0.25)
    assert names(look.run(EMPTY).ready) == ["in/a"]


@pytest.mark.parametrize("change", ["size", "time", "tag"])
def test_two_listings_are_equal_only_in_size_time_and_tag(landing: Landing, clocks: Clocks, change: str) -> None:
    future = NOW + 3600 * SECOND
    landing.put("in/a", WHOLE, modified_ns=future)
    look = discovery(landing, clocks)
    look.run(EMPTY)
    clocks.pass_(SETTLE)
    landing.put("in/a", WHOLE * (2 if change == "size" else 1), modified_ns=future + (change == "time"))
    assert waiting(look.run(EMPTY)) == ["in/a"]


def test_a_file_that_went_and_came_back_starts_waiting_anew(landing: Landing, clocks: Clocks) -> None:
    future = FileEntry("in/a", len(WHOLE), NOW + 3600 * SECOND)
    landing.put(future.path, WHOLE, modified_ns=future.modified_ns)
    look = discovery(landing, clocks)
    look.run(EMPTY)
    landing.delete(future.path)
    look.run(EMPTY)
    clocks.pass_(SETTLE)
    landing.put(future.path, WHOLE, modified_ns=future.modified_ns)
    assert waiting(look.run(EMPTY)) == ["in/a"]


def test_known_files_never_wait(landing: Landing, clocks: Clocks) -> None:
    landing.put("in/a", WHOLE, modified_ns=NOW)
    found = discovery(landing, clocks).run(ledger(("in/a", len(WHOLE), NOW, "INGESTED")))
    assert (found.ready.height, found.waiting, found.changed.height, found.known) == (0, (), 0, 1)


def test_a_known_file_that_changed_is_reported_and_not_loaded_again(landing: Landing, clocks: Clocks) -> None:
    landing.put("in/a", WHOLE, modified_ns=NOW - 3600 * SECOND)
    found = discovery(landing, clocks).run(ledger(("in/a", 1, NOW, "INGESTED")))
    assert (found.ready.height, names(found.changed)) == (0, ["in/a"])


def test_without_settle_time_nothing_waits(landing: Landing, clocks: Clocks) -> None:
    landing.put("in/a", WHOLE[:-1], modified_ns=NOW)
    landing.put("in/b", WHOLE, modified_ns=NOW + 3600 * SECOND)
    found = discovery(landing, clocks, settle=0, incomplete=0).run(EMPTY)
    assert (names(found.ready), found.waiting, landing.opened) == (["in/a", "in/b"], (), [])


# -- completeness ------------------------------------------------------------------------------------------------------

CUT: list[tuple[FileFormat, bytes, bytes]] = [
    ("parquet", WHOLE[:-1], WHOLE),
    ("parquet", b"", WHOLE),
    ("json", b'{"a": 1}\n{"a": ', b'{"a": 1}\n{"a": 2}\n'),
    ("json", json_bytes([{"a": 1}], compressed=True)[:-3], json_bytes([{"a": 1}], compressed=True)),
]


@pytest.mark.parametrize(("format", "cut", "whole"), CUT)
def test_a_settled_file_without_its_end_waits_for_it(
    landing: Landing, clocks: Clocks, format: FileFormat, cut: bytes, whole: bytes
) -> None:
    landing.put("in/a", cut, modified_ns=NOW - 10 * SECOND)
    look = discovery(landing, clocks, format)
    found = look.run(EMPTY)
    assert waiting(found) == ["in/a"]
    assert "its end is missing; it is read as it is in 50 s" in found.waiting[0][1]
    landing.put("in/a", whole, modified_ns=NOW - 10 * SECOND)
    assert names(look.run(EMPTY).ready) == ["in/a"]


@pytest.mark.parametrize("ahead", [-10, 3600])
def test_a_file_whose_end_never_comes_is_read_as_it_is_in_the_end(
    landing: Landing, clocks: Clocks, ahead: float
) -> None:
    landing.put("in/a", WHOLE[:-1], modified_ns=NOW + int(ahead * SECOND))
    look = discovery(landing, clocks)
    patience = 0.0
    while not look.run(EMPTY).ready.height:
        clocks.pass_(1)
        patience += 1
    assert patience == INCOMPLETE + min(ahead, 0)


def test_files_older_than_the_grace_are_not_opened(landing: Landing, clocks: Clocks) -> None:
    for number in range(20):
        landing.put(f"in/{number}", WHOLE[:-1], modified_ns=NOW - int(INCOMPLETE * SECOND))
    assert discovery(landing, clocks).run(EMPTY).ready.height == 20
    assert landing.opened == []


def test_a_look_opens_a_bounded_number_of_files(landing: Landing, clocks: Clocks) -> None:
    for number in range(20):
        landing.put(f"in/{number}", WHOLE, modified_ns=NOW - 10 * SECOND)
    found = discovery(landing, clocks).run(EMPTY, opens=5)
    assert (found.ready.height, len(landing.opened)) == (20, 5)


def test_a_file_that_vanishes_before_it_is_opened_waits(landing: Landing, clocks: Clocks) -> None:
    landing.put("in/a", WHOLE, modified_ns=NOW - 10 * SECOND)
    landing.put("in/b", WHOLE, modified_ns=NOW - 10 * SECOND)
    landing.vanishing = {"in/a"}
    found = discovery(landing, clocks).run(EMPTY)
    assert (names(found.ready), waiting(found)) == (["in/b"], ["in/a"])


def test_a_file_that_cant_be_opened_does_not_stop_the_listing(landing: Landing, clocks: Clocks) -> None:
    """Reading it gives the reason by name; looking must go on."""
    landing.put("in/a", WHOLE, modified_ns=NOW - 10 * SECOND)
    landing.put("in/b", WHOLE, modified_ns=NOW - 10 * SECOND)
    landing.refused = {"in/a"}
    assert names(discovery(landing, clocks).run(EMPTY).ready) == ["in/a", "in/b"]


def test_what_cant_be_data_is_passed_on(landing: Landing, clocks: Clocks) -> None:
    landing.problems = (Problem("in/x", "a symbolic link"),)
    assert discovery(landing, clocks).run(EMPTY).problems == landing.problems


# -- hashes ------------------------------------------------------------------------------------------------------------


def test_the_data_version_depends_on_the_files_alone(landing: Landing, clocks: Clocks) -> None:
    look = discovery(landing, clocks)
    versions = [look.run(EMPTY).data_version]
    for number in range(300):
        landing.put(f"in/{number}", b"1", modified_ns=number)
        versions.append(look.run(EMPTY).data_version)
    assert len(set(versions)) == 301
    shuffled = Landing()
    for number in reversed(range(300)):
        shuffled.put(f"in/{number}", b"1", modified_ns=number)
    assert discovery(shuffled, clocks).run(EMPTY).data_version == versions[-1]
    assert look.run(ledger(("in/1", 1, 1, "INGESTED"))).data_version == versions[-1]
    landing.put("in/7", b"1", modified_ns=8)
    assert look.run(EMPTY).data_version not in versions
    landing.put("in/7", b"12", modified_ns=7)
    assert look.run(EMPTY).data_version not in versions


_IN_ANOTHER_PROCESS = """
from telematics_assets.autoloader.discovery import Discovery
from telematics_assets.autoloader.checkpoint import LEDGER_SCHEMA
from telematics_assets.volumes.memory import MemoryVolume
import polars as pl
volume = MemoryVolume()
for number in range(50):
    volume.put(f"in/Zürich {number}", b"1", modified_ns=number)
print(Discovery(volume, "in", "parquet", 1, 1).run(pl.DataFrame(schema=LEDGER_SCHEMA)).data_version)
"""


def test_the_data_version_is_the_same_in_every_process() -> None:
    command = [sys.executable, "-c", _IN_ANOTHER_PROCESS]
    seen = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(seen) == 1


def test_a_fingerprint_is_of_the_set_and_of_every_fact() -> None:
    files = listing(("in/a", 1, 2), ("in/b", 3, 4)).files
    assert fingerprint(files.head(0)) == ""
    assert fingerprint(files) == fingerprint(files.reverse())
    others = [
        listing(("in/a", 1, 2)).files,
        listing(("in/a", 1, 2), ("in/c", 3, 4)).files,
        listing(("in/a", 1, 2), ("in/b", 4, 4)).files,
        listing(("in/a", 1, 2), ("in/b", 3, 5)).files,
        listing(("in/a", 3, 2), ("in/b", 1, 4)).files,
        listing(("in/a", 1, 4), ("in/b", 3, 2)).files,
    ]
    assert len({fingerprint(files), *map(fingerprint, others)}) == len(others) + 1
