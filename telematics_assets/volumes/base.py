"""The landing store as one small protocol.

Belongs here: what every store can do, in terms that a REST files API can serve too, and the rules for paths.
Does not belong here: a store itself (`local.py`, `memory.py`), what files mean (`autoloader/`), Dagster.

Paths are relative to the Volume's root, separated by `/`, never start with `/` and never contain `.` or `..` parts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, Protocol, runtime_checkable

from telematics_assets.errors import DbfsDisabledError, VolumeError

if TYPE_CHECKING:
    import polars as pl

#: Columns of `Listing.files`: path relative to the Volume, bytes, modification time in nanoseconds since the epoch
#: (UTC), and the store's own version tag of the content (an ETag; null where the store has none).
LISTING_COLUMNS = ("path", "size", "modified_ns", "etag")

_NO_NAME = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file as the store describes it.

    Attributes:
        path: Path relative to the Volume's root.
        size: Bytes.
        modified_ns: Modification time, nanoseconds since the epoch (UTC).
        etag: The store's version tag of the content, or None.
    """

    path: str
    size: int
    modified_ns: int
    etag: str | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    r"""Something below a folder that can't be listed as a file, and why.

    Attributes:
        path: The path, with bytes that are not UTF-8 shown as `\xNN`.
        reason: Why it can't be data.
    """

    path: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """All files below a folder at one moment.

    Attributes:
        files: A polars DataFrame of `LISTING_COLUMNS` (String, Int64, Int64, String), sorted by nothing.
        problems: Entries that can't be read as files; one odd name never stops the rest.
    """

    files: pl.DataFrame
    problems: tuple[Problem, ...] = field(default=())


@runtime_checkable
class Volume(Protocol):
    """A Unity Catalog Volume, or something that mirrors one.

    All methods raise `VolumeError` (permanent) or `VolumeUnavailableError` (transient); a path that does not exist
    raises `FileMissingError` unless said otherwise.
    """

    @property
    def location(self) -> str:
        """The Volume's name as a path: `/Volumes/<catalog>/<schema>/<volume>`; the same on every engine."""
        ...

    @property
    def uri(self) -> str:
        """Where the Volume really is: a local path, or a URL."""
        ...

    def scan(self, folder: str, from_path: str = "") -> Listing:
        """List every file below `folder`, at any depth.

        Names that start with `_` or `.`, of files or folders, are not data and are left out. A folder that does not
        exist gives an empty listing.

        Args:
            folder: Relative to the Volume.
            from_path: Files whose path sorts before this one, by its UTF-8 bytes, may be left out to save work; those
                that sort behind it, and itself, are listed. "" lists all. Problems before it may be left out too.
        """
        ...

    def names(self, folder: str) -> list[str]:
        """The names of the files directly in `folder` (hidden ones too), sorted; empty if there is no such folder."""
        ...

    def stat(self, path: str) -> FileEntry | None:
        """Describe one file, or None if there is none."""
        ...

    def open(self, path: str) -> AbstractContextManager[BinaryIO]:
        """Open a file for reading; the stream can seek, and raises the same errors as the methods here."""
        ...

    def read(self, path: str) -> bytes:
        """The whole content of a file."""
        ...

    def read_unchanged(self, files: Sequence[FileEntry]) -> list[bytes | None]:
        """The whole contents of small files that still are these: size, modification time and version tag.

        Returns:
            By file; None for one that is another one by now, before or after it was read, and for one that can't be
            opened. What is the matter with it, `stat` and `open` say.
        """
        ...

    def create(self, path: str, data: bytes) -> bool:
        """Publish a new file atomically and durably, never replacing one.

        Returns:
            True if the file is there now by this call; False if one was there already (it is untouched).
        """
        ...

    def upload(self, path: str, source: BinaryIO, *, modified_ns: int | None = None) -> bool:
        """Like `create`, streamed: readers see the whole file or none.

        Args:
            path: Where to publish.
            source: Read to its end from where it stands.
            modified_ns: Modification time to give the file where the store allows it; now if None.

        Returns:
            False if a file was there already (it is untouched).
        """
        ...

    def delete(self, path: str) -> None:
        """Delete a file; none there is no error."""
        ...

    def remove(self, file: FileEntry) -> bool:
        """Delete a file only if it still is this one: size, modification time and version tag.

        Returns:
            False if there is none, or another one, which is untouched.
        """
        ...


def read_if_unchanged(volume: Volume, file: FileEntry) -> bytes | None:
    """What `Volume.read_unchanged` gives of one file, by three calls."""
    try:
        if volume.stat(file.path) != file:
            return None
        with volume.open(file.path) as source:
            data = source.read()
        return data if volume.stat(file.path) == file else None
    except VolumeError:
        return None


def check_path(path: str) -> str:
    """Validate a path relative to a Volume and return it.

    Args:
        path: For example `parquet/2026/a.parquet`.

    Raises:
        DbfsDisabledError: For `dbfs:/`, `/dbfs/` and `/mnt/` paths.
        VolumeError: For absolute paths, empty ones, parts `.` or `..`, and names that are not UTF-8 or hold a NUL.
    """
    refuse_dbfs(path)
    if _NO_NAME.search(path):
        raise VolumeError(f"{path!r} is not a path of a Volume: it is not UTF-8, or holds a NUL. Rename the file.")
    if not path or path.startswith("/") or any(part in ("", ".", "..") for part in path.split("/")):
        raise VolumeError(
            f"{path!r} is not a path inside the Volume. Give it relative to the Volume's root, "
            "such as 'parquet/2026/a.parquet', without '.', '..' or empty parts."
        )
    return path


def refuse_dbfs(path: str) -> None:
    """Raise `DbfsDisabledError` if `path` is a DBFS or mount path."""
    lowered = path.lower()
    if lowered.startswith(("dbfs:", "/dbfs/", "/mnt/")) or lowered in ("/dbfs", "/mnt"):
        raise DbfsDisabledError(path)


def as_files(files: pl.DataFrame) -> list[FileEntry]:
    """The files of a listing one by one (for a few; columns are faster for many).

    Args:
        files: A frame with `LISTING_COLUMNS`, and perhaps more.
    """
    return [FileEntry(*row) for row in files.select(LISTING_COLUMNS).iter_rows()]
