"""Discovery: which files of a folder are new, which changed, which may still be being written.

Belongs here: comparing a listing with the ledger, the settle rule, the completeness rule, and what a look remembers of
its last listing of the whole folder.
Does not belong here: publishing plans (`loader.py`), choosing a bound (`incremental.py`), reading rows, Dagster.

Old modification times never hide a file: only the ledger decides what is known. A partial listing sees the files from a
bound on. What the look makes of it, it makes of the whole folder, with what it saw below the bound last time.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import polars as pl

from telematics_assets.autoloader.checkpoint import WholeListing
from telematics_assets.autoloader.formats import completeness
from telematics_assets.catalog import FileFormat, FileStreamOptions
from telematics_assets.errors import FileMissingError, VolumeError
from telematics_assets.volumes.base import FileEntry, Listing, Problem, Volume, as_files
from telematics_assets.volumes.globs import name_pattern

#: How many young files a look opens to see whether they are complete; beyond, they count as complete.
LOOK_OPENS = 256


@dataclass(frozen=True)
class Discovered:
    """A folder compared with the ledger.

    Attributes:
        ready: Files that a batch may take, oldest first (columns of a listing).
        waiting: Files that may still be being written, with the reason.
        changed: Known files with another size or modification time (columns of a listing).
        problems: Entries that can't be data.
        known: Files in the ledger.
        data_version: Hash of the listing.
        listed_at_ns: When the listing began, nanoseconds since the epoch.
        bound: The listing saw the files from this path on; "": all.
        late: Files of `ready` that a partial listing would not have seen.
    """

    ready: pl.DataFrame
    waiting: tuple[tuple[FileEntry, str], ...]
    changed: pl.DataFrame
    problems: tuple[Problem, ...]
    known: int
    data_version: str
    listed_at_ns: int
    bound: str = ""
    late: int = 0

    @property
    def young(self) -> pl.DataFrame:
        """`waiting` with the columns of a listing."""
        rows = [(file.path, file.size, file.modified_ns, file.etag) for file, _ in self.waiting]
        return pl.DataFrame(rows, schema=self.ready.schema, orient="row")

    def first_left(self) -> str | None:
        """The lowest path of the files that are ready or waiting, or None if there are none."""
        left = [*self.ready.select(pl.col("path").min())["path"], *(file.path for file, _ in self.waiting)]
        return min((path for path in left if path is not None), default=None)


@dataclass(frozen=True)
class _Below:
    """What a look saw below the bound when it listed the whole folder."""

    record: WholeListing
    tick: float
    rows: int
    hashes: int
    changed: pl.DataFrame
    late: bool


class Discovery:
    """Lists a stream's folder; remembers when it first saw young files."""

    def __init__(
        self,
        volume: Volume,
        folder: str,
        format: FileFormat,
        settle_seconds: float,
        incomplete_seconds: float,
        clock: Callable[[], int] = time.time_ns,
        monotonic: Callable[[], float] = time.monotonic,
        options: FileStreamOptions | None = None,
    ) -> None:
        """Discover files of one folder.

        Args:
            volume: The landing Volume.
            folder: The stream's folder.
            format: The stream's format.
            settle_seconds: Files older than this pass at once; younger ones, and those from the future, need two equal
                listings this far apart.
            incomplete_seconds: How long a file without its end may still be growing; after that it is read as it is.
            clock: Wall clock, nanoseconds.
            monotonic: Clock that never goes back, seconds.
            options: The stream's options.
        """
        self._volume = volume
        self._folder = folder
        self._options = options or FileStreamOptions()
        self._complete = completeness(format, self._options)
        self._settle = settle_seconds
        self._incomplete = incomplete_seconds
        self._clock = clock
        self._monotonic = monotonic
        self._sightings: dict[tuple[str, int, int, str | None], float] = {}
        self._below: _Below | None = None
        self._recorded: tuple[WholeListing, float] | None = None

    def run(
        self,
        ledger: pl.DataFrame,
        superseded: pl.DataFrame | None = None,
        opens: int | None = None,
        bound: str = "",
    ) -> Discovered:
        """List the folder and compare it with the ledger.

        Args:
            ledger: The known files.
            superseded: Versions of files that were ingested before those that the ledger tells of.
            opens: Open at most this many young files to see whether they are complete; all if None.
            bound: List only the files from this path on; "": all.
        """
        began = self._clock()
        return self._compared(began, *self._listed(bound), ledger, superseded, opens)

    def look(self, ledger: pl.DataFrame, superseded: pl.DataFrame, record: WholeListing, seconds: float) -> Discovered:
        """Answer for the whole folder, listing only the part from a recorded bound on where that will do.

        The whole folder is listed at the first look, when a load has listed it since, when `seconds` have passed on the
        clock that never goes back, and as long as it has files to load below the bound: so it announces them until a
        load took them.

        Args:
            ledger: The known files.
            superseded: See `run`.
            record: The last listing of the whole folder by a load.
            seconds: Longest time between two listings of the whole folder.
        """
        began, tick, bound = self._clock(), self._monotonic(), record.bound
        below = self._below
        if below is not None and below.record == record and not below.late and tick - below.tick < seconds:
            part, bound = self._listed(bound)
            if bound:
                found = self._compared(began, part, bound, ledger, superseded, LOOK_OPENS)
                rows, hashes = _hashed(part.files)
                changed = found.changed
                # Comparing nothing with a large ledger would take longer than the rest.
                if not below.changed.is_empty():
                    still = compare(Listing(below.changed), ledger, superseded)[1]
                    changed = pl.concat([changed, still])
                return replace(
                    found,
                    changed=changed,
                    data_version=_version(below.rows + rows, below.hashes + hashes),
                )
            listing, bound = part, record.bound
        else:
            listing = self._listed("")[0]
        found = self._compared(began, listing, "", ledger, superseded, LOOK_OPENS)
        under = pl.col("path") < bound
        late = found.ready.filter(under).height
        first = found.first_left()
        self._below = _Below(
            record,
            tick,
            *_hashed(listing.files.filter(under)),
            found.changed.filter(under),
            late=first is not None and first < bound,
        )
        return replace(found, late=late)

    def is_due(self, record: WholeListing, seconds: float) -> bool:
        """Whether a load has to list the whole folder again.

        Args:
            record: The last time that a load did.
            seconds: Longest time between two.
        """
        if self._recorded is None or self._recorded[0] != record:
            self._recorded = record, self._monotonic()
        age = (self._clock() - record.listed_at_ns) / 1e9
        # A time from the future says nothing; and the wall clock may stand still or go back while this process lives.
        return not 0 <= age < seconds or self._monotonic() - self._recorded[1] >= seconds

    @property
    def sees_late_files(self) -> bool:
        """Whether the last look saw files to load that a partial listing does not see."""
        return self._below is not None and self._below.late

    def _listed(self, bound: str) -> tuple[Listing, str]:
        """A listing, and the bound that it really has."""
        if bound:
            listing = choose(self._volume.scan(self._folder, bound), self._options)
            files = listing.files.filter(pl.col("path") >= bound)
            # A bound has files behind it. Stores are known that answer an offset with nothing, whatever there is.
            if not files.is_empty():
                return Listing(files, listing.problems), bound
        return choose(self._volume.scan(self._folder), self._options), ""

    def _compared(
        self,
        began: int,
        listing: Listing,
        bound: str,
        ledger: pl.DataFrame,
        superseded: pl.DataFrame | None,
        opens: int | None,
    ) -> Discovered:
        known = ledger.height
        if bound:
            ledger = ledger.filter(pl.col("path") >= bound)
        new, changed = compare(listing, ledger, superseded)
        if self._options.allow_overwrites:
            new, changed = pl.concat([new, changed]), changed.clear()
        ready, waiting = self._settled(new, opens)
        return Discovered(
            ready.sort("modified_ns", "path"),
            tuple(waiting),
            changed,
            listing.problems,
            known,
            _version(*_hashed(listing.files)),
            began,
            bound,
        )

    def _settled(self, new: pl.DataFrame, opens: int | None) -> tuple[pl.DataFrame, list[tuple[FileEntry, str]]]:
        now = self._clock()
        tick = self._monotonic()
        age = (now - pl.col("modified_ns")) / 1e9
        # The grace bounds both rules: only files younger than it (or from the future) are looked at one by one.
        old = new.filter((age >= self._settle) & (age >= self._incomplete))
        young = as_files(new.filter(~((age >= self._settle) & (age >= self._incomplete))))
        sightings: dict[tuple[str, int, int, str | None], float] = {}
        passed: list[FileEntry] = []
        waiting: list[tuple[FileEntry, str]] = []
        opened = 0
        for file in young:
            key = (file.path, file.size, file.modified_ns, file.etag)
            first = sightings[key] = self._sightings.get(key, tick)
            seconds = (now - file.modified_ns) / 1e9
            if seconds < self._settle and tick - first < self._settle:
                waiting.append((file, "it may still be being written: its modification time is too recent"))
                continue
            patience = self._incomplete - max(seconds, tick - first)
            if patience > 0 and (opens is None or opened < opens):
                opened += 1
                if not self._is_complete(file):
                    waiting.append((file, f"its end is missing; it is read as it is in {patience:.0f} s"))
                    continue
            passed.append(file)
        self._sightings = sightings
        if not passed:
            return old, waiting
        rows = [(f.path, f.size, f.modified_ns, f.etag) for f in passed]
        return pl.concat([old, pl.DataFrame(rows, schema=old.schema, orient="row")]), waiting

    def _is_complete(self, file: FileEntry) -> bool:
        try:
            with self._volume.open(file.path) as source:
                return self._complete(source, file.size)
        except FileMissingError:
            return False
        except VolumeError:
            # Reading it will say why it can't be opened, by name.
            return True


def choose(listing: Listing, options: FileStreamOptions) -> Listing:
    """The files of a listing that a stream sees at all, by name and modification time."""
    files = listing.files
    after, before = options.modified_bounds
    if after is not None:
        files = files.filter(pl.col("modified_ns") > after)
    if before is not None:
        files = files.filter(pl.col("modified_ns") < before)
    if options.path_glob_filter is not None:
        name = pl.col("path").str.extract("([^/]*)$")
        files = files.filter(name.str.contains(name_pattern(options.path_glob_filter)))
    return Listing(files, listing.problems)


def choice_of(folder: str, options: FileStreamOptions) -> str:
    """What decides which files a stream sees: after another choice, files may be new wherever they lie."""
    return repr((folder, options.path_glob_filter, *options.modified_bounds, options.allow_overwrites))


def compare(
    listing: Listing, ledger: pl.DataFrame, superseded: pl.DataFrame | None = None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Split a listing into new and changed files; what is neither is known as it stands.

    A file is new if the ledger does not know it, if it was missing before, or if it was unreadable and changed since.
    It is changed if its rows are in the table, or it was there before the stream began, and its size or modification
    time is another one now. A version that was ingested once is known for ever, whatever came after it.

    Returns:
        Two frames with the listing's columns.
    """
    files = listing.files
    exact = ["path", "size", "modified_ns"]
    decided = ledger.filter(pl.col("state") != "SKIPPED_MISSING")
    other = files.join(decided, on=exact, how="anti")
    if superseded is not None and not superseded.is_empty():
        # Versions known from table rows have no sizes, and times in microseconds.
        rebuilt = superseded.filter(pl.col("size").is_null())
        microseconds = pl.col("modified_ns") // 1000
        other = other.join(superseded, on=exact, how="anti").join(
            rebuilt, left_on=["path", microseconds], right_on=["path", microseconds], how="anti"
        )
    if other.is_empty():
        return other, other
    known = other.join(
        decided.select("path", "state", known_size="size", known_ns="modified_ns"), on="path", how="left"
    )
    settled = pl.col("state").is_in(["INGESTED", "SKIPPED_EXISTING"])
    # A ledger made from table rows has no sizes, and times in microseconds.
    same = pl.col("known_size").is_null() & (pl.col("modified_ns") // 1000 == pl.col("known_ns") // 1000)
    new = known.filter(~settled.fill_null(False))
    changed = known.filter(settled & ~same.fill_null(False))
    return new.select(files.columns), changed.select(files.columns)


def fingerprint(files: pl.DataFrame) -> str:
    """Hash of a set of files by path, size and modification time; "" for none."""
    if files.is_empty():
        return ""
    digest = hashlib.sha256()
    ordered = files.sort("path")
    for name in ("path", "size", "modified_ns"):
        digest.update("\0".join(ordered[name].cast(pl.String)).encode())
        digest.update(b"\1")
    return digest.hexdigest()[:32]


def _hashed(files: pl.DataFrame) -> tuple[int, int]:
    """How many files, and the sum of their hashes: it needs no sorting, and parts can be added up."""
    if files.is_empty():
        return 0, 0
    return files.height, int(files.select("path", "size", "modified_ns").hash_rows(seed=7).sum())


def _version(rows: int, hashes: int) -> str:
    return f"{rows}-{hashes % 2**64:016x}" if rows else "empty"
