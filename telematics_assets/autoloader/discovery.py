"""Discovery: which files of a folder are new, which changed, which may still be being written.

Belongs here: comparing a listing with the ledger, the settle rule and the completeness rule.
Does not belong here: publishing plans (`loader.py`), reading rows, Dagster.

Old modification times never hide a file: only the ledger decides what is known.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

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
    """

    ready: pl.DataFrame
    waiting: tuple[tuple[FileEntry, str], ...]
    changed: pl.DataFrame
    problems: tuple[Problem, ...]
    known: int
    data_version: str


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

    def run(self, ledger: pl.DataFrame, superseded: pl.DataFrame | None = None, opens: int | None = None) -> Discovered:
        """List the folder and compare it with the ledger.

        Args:
            ledger: The known files.
            superseded: Versions of files that were ingested before those that the ledger tells of.
            opens: Open at most this many young files to see whether they are complete; all if None.
        """
        listing = choose(self._volume.scan(self._folder), self._options)
        new, changed = compare(listing, ledger, superseded)
        if self._options.allow_overwrites:
            new, changed = pl.concat([new, changed]), changed.clear()
        ready, waiting = self._settled(new, opens)
        return Discovered(
            ready.sort("modified_ns", "path"),
            tuple(waiting),
            changed,
            listing.problems,
            ledger.height,
            _version(listing),
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


def _version(listing: Listing) -> str:
    files = listing.files
    if files.is_empty():
        return "empty"
    # A sum of row hashes needs no sorting: the order of a listing means nothing.
    return f"{files.height}-{files.select('path', 'size', 'modified_ns').hash_rows(seed=7).sum():016x}"
