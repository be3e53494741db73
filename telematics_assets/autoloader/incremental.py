"""Incremental listing: from which path on a folder is listed when it is not listed whole.

Belongs here: learning from the ledger whether a stream's names sort like time, and the bound that follows.
Does not belong here: listing and comparing (`discovery.py`), when a whole listing is due (`loader.py`), Dagster.

A bound never decides what is loaded, only when: what lies below it is found by the next listing of the whole folder. So
the worst that a bad bound can do is to let files wait that long, and the worst of a good one is a longer listing.
"""

from __future__ import annotations

import polars as pl

#: The newest files by arrival that the bound is made from: at least so many, and at least this part of all.
RECENT_FILES, RECENT_PART = 500, 50
#: One in so many of them may lie below the bound: a few late files must not pull it down for days.
OUTLIERS = 10
#: One in so many files may contradict the order that "auto" looks for.
EXCEPTIONS = 100
#: Names that are looked at one by one.
_SAMPLE = 10_000


def lower_bound(ledger: pl.DataFrame, folder: str, *, proven: bool, recent: int = RECENT_FILES) -> str:
    """A path below which, going by the ledger, hardly any new file is to be expected; "" if there is none.

    The bound lies one folder before the one that holds (nearly) all of the newest files, or, where all files are in one
    folder, at the first of the newest files. It is "" too where it would spare less than half of the known files.

    Args:
        ledger: The known files.
        folder: The stream's folder.
        proven: Whether the names must prove to sort like time: files that arrived before the newest ones are named
            before them, and numbers in names are of equal width (`9` comes behind `10`).
        recent: See `RECENT_FILES`.
    """
    count = max(recent, ledger.height // RECENT_PART)
    if ledger.height < 2 * count:
        return ""
    arrived = ledger.select("path", pl.col("batch_id").fill_null(-1), "modified_ns")
    paths = arrived.sort("batch_id", "modified_ns", "path")["path"]
    older, newer = paths.head(-count), paths.tail(count)
    low: str = newer.sort()[count // OUTLIERS]
    within = _folder_of(low)
    before = paths.filter(paths < within).max()
    if before is None:
        bound = begin = low
        misplaced = older >= begin
    else:
        assert isinstance(before, str)
        previous = _folder_of(before)
        bound = within if within.startswith(previous) else previous
        misplaced = (older >= within) & ~older.str.starts_with(within)
    if 2 * (paths < bound).sum() < paths.len():
        return ""
    if proven and not (_few(misplaced) and _equally_wide(older, newer, folder)):
        return ""
    return bound


def _folder_of(path: str) -> str:
    return path[: path.rindex("/") + 1]


def _few(exceptions: pl.Series) -> bool:
    return int(exceptions.sum()) * EXCEPTIONS <= exceptions.len()


def _equally_wide(older: pl.Series, newer: pl.Series, folder: str) -> bool:
    """Whether the numbers that the order rests on have two digits or more, and as many in nearly all names."""
    sample = pl.concat([part.gather_every(part.len() // _SAMPLE + 1) for part in (older, newer)])
    rest = sample.str.slice(len(folder) + 1)
    folders = rest.str.extract("^(.*/)")
    if folders.str.contains("[0-9]").fill_null(False).any():
        named = folders.fill_null("")
    else:
        named = rest.str.extract("^([^0-9]*[0-9]*)").fill_null("")
    single = named.str.contains("(?:^|[^0-9])[0-9](?:[^0-9]|$)")
    shapes = named.str.replace_all("[0-9]", "0")
    return _few(single) and _few(shapes != shapes.mode().sort()[0])
