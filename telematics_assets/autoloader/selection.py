"""Which of the files that are there a request takes: all that are new, some to read again, those of a folder or time.

Belongs here: what `retry` and `backfill` mean in terms of a ledger and a listing, and how a user names files.
Does not belong here: listing and comparing (`discovery.py`), loading (`loader.py`), Dagster.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import polars as pl

from telematics_assets.catalog import FileStream, FileStreamOptions
from telematics_assets.engines.base import Backfill, FileRecord, FileState, IngestRequest
from telematics_assets.errors import OptionError, UnknownNameError
from telematics_assets.volumes.base import check_path

_READ_AGAIN = ("SKIPPED_CORRUPTED", "SKIPPED_MISSING")

#: Why a retry leaves a file in such a state alone.
_LEFT_ALONE: dict[FileState, str] = {
    "INGESTED": "its rows are in the table already",
    "CHANGED": "its rows are in the table already, and it changed since: land new content under a new name, or set "
    "allow_overwrites",
    "DISCOVERED": "it was never skipped: `telematics load {stream}` takes it",
    "SKIPPED_EXISTING": "it was there before the stream began and is left out: `telematics backfill {stream}` loads it",
    "SKIPPED_MISSING": "it is still missing",
}


@dataclass(frozen=True)
class Selection:
    """What a request takes of a stream's files.

    Attributes:
        ledger: The files that count as known.
        wanted: Which files of a listing are taken.
    """

    ledger: pl.DataFrame
    wanted: pl.Expr


def select(request: IngestRequest, stream: FileStream, location: str, ledger: pl.DataFrame) -> Selection:
    """What a request takes.

    Args:
        request: The request, whose retried files are paths relative to the Volume.
        stream: The stream.
        location: The Volume's name as a path.
        ledger: The known files.
    """
    if request.retry_files:
        skipped = pl.col("path").is_in(list(request.retry_files)) & pl.col("state").is_in(_READ_AGAIN)
        return Selection(ledger.filter(~skipped), pl.col("path").is_in(ledger.filter(skipped)["path"].to_list()))
    if request.backfill is None:
        return Selection(ledger, pl.lit(True))
    folder, (after, before) = request.backfill.folder, _bounds(request.backfill)
    wanted = pl.lit(True)
    if folder is not None:
        wanted &= pl.col("path").str.starts_with(f"{candidates(folder, stream, location)[0]}/")
    if after is not None:
        wanted &= pl.col("modified_ns") > after
    if before is not None:
        wanted &= pl.col("modified_ns") < before
    return Selection(ledger.filter(pl.col("state") != "SKIPPED_EXISTING"), wanted)


def checked(request: IngestRequest, stream: FileStream, location: str) -> IngestRequest:
    """The request, if it makes sense.

    Raises:
        OptionError: If it asks for nothing, or for several things at once.
        VolumeError: If its folder is not in the Volume.
    """
    if request.max_files is not None and request.max_files < 1:
        raise OptionError(f"max_files={request.max_files} is not accepted. Use a whole number from 1, or none.")
    asked = [
        name
        for name, given in (
            ("full_refresh", request.full_refresh),
            ("retry_files", bool(request.retry_files)),
            ("backfill", request.backfill is not None),
        )
        if given
    ]
    if len(asked) > 1:
        raise OptionError(f"{' and '.join(asked)} exclude each other. Ask for them one after the other.")
    if request.force and not request.full_refresh:
        raise OptionError("force is for a full refresh alone. Leave it out, or ask for full_refresh too.")
    if request.full_refresh and request.max_files is not None:
        raise OptionError("A full refresh takes all files in one commit, so max_files is not accepted with it.")
    backfill = request.backfill
    if backfill is not None:
        if backfill == Backfill():
            raise OptionError(
                f"A backfill needs a folder or a time range. The folder {stream.folder!r} "
                "stands for all that was left out: `telematics backfill "
                f"{stream.name} --folder {stream.folder}`, or backfill_folder in the run config."
            )
        _bounds(backfill)
        if backfill.folder is not None:
            candidates(backfill.folder, stream, location)
    return request


def named(paths: tuple[str, ...], stream: FileStream, location: str, records: Container[str]) -> tuple[str, ...]:
    """Paths as a user gave them, relative to the Volume, each once.

    Args:
        paths: Relative to the Volume or to the stream's folder, or with the Volume's name before them.
        stream: The stream.
        location: The Volume's name as a path.
        records: The stream's files.

    Raises:
        UnknownNameError: If one of them is none of the stream's files.
    """
    found: list[str] = []
    unknown: list[str] = []
    for path in paths:
        match = [name for name in candidates(path, stream, location) if name in records]
        found += match[:1]
        unknown += [] if match else [path]
    if unknown:
        raise UnknownNameError(
            f"Stream {stream.name!r} has no file {', '.join(map(repr, unknown[:5]))}"
            f"{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}. Nothing was done. Give paths as "
            f"`telematics files {stream.name}` lists them."
        )
    return tuple(dict.fromkeys(found))


def candidates(path: str, stream: FileStream, location: str) -> list[str]:
    """What a path may mean, relative to the Volume, the likeliest first.

    Raises:
        DbfsDisabledError: For DBFS paths.
        VolumeError: If it can't be in the Volume.
    """
    inside = path.removeprefix(f"{location}/").rstrip("/") or path
    check_path(inside)
    below = f"{stream.folder}/{inside}"
    return [inside, below] if f"{inside}/".startswith(f"{stream.folder}/") else [below]


def left_alone(stream: FileStream, before: FileRecord, after: FileRecord) -> str:
    """Why a retry did not read a file."""
    reason = _LEFT_ALONE.get(before.state) or after.reason or "it may still be being written"
    return reason.format(stream=stream.name)


def _bounds(backfill: Backfill) -> tuple[int | None, int | None]:
    options = FileStreamOptions(modified_after=backfill.modified_after, modified_before=backfill.modified_before)
    return options.modified_bounds
