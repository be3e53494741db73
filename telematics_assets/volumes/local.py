"""A Volume that is a local folder.

Belongs here: walking, reading and publishing files on a local disk, and what makes a publication atomic and durable
there.
Does not belong here: what the files mean.

Publication is temporary file, fsync, `link()`, fsync of the folder: `rename()` would replace a file silently,
`link()` never
does. Listing is `os.scandir`, because one odd name (a tab, bytes that are not UTF-8) must not stop the rest.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import stat as stat_module
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import polars as pl

from telematics_assets.errors import FileMissingError, VolumeError, VolumeUnavailableError
from telematics_assets.volumes.base import FileEntry, Listing, Problem, check_path

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PERMANENT = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.ELOOP,
}
#: Something else may stand where a file was listed: a link is not followed, and a pipe does not block.
_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_GONE = (FileNotFoundError, NotADirectoryError)


class LocalVolume:
    """A Volume that mirrors `/Volumes/<catalog>/<schema>/<volume>` in a local folder."""

    def __init__(self, root: Path, location: str) -> None:
        """Use a folder as a Volume; it is created at the first write.

        Args:
            root: The folder.
            location: The Volume's name as a path.
        """
        self._root = os.path.abspath(root)
        self.location = location

    @property
    def uri(self) -> str:
        """The folder's absolute path."""
        return self._root

    def scan(self, folder: str, from_path: str = "") -> Listing:
        """See `Volume.scan`. Symbolic links and special files are named as problems, not followed."""
        check_path(folder)
        paths: list[str] = []
        sizes: list[int] = []
        times: list[int] = []
        inodes: list[int] = []
        problems: list[Problem] = []
        # Millions of turns: what can be looked up before the loop is.
        add_path, add_size, add_time, add_inode = paths.append, sizes.append, times.append, inodes.append
        is_regular = stat_module.S_ISREG
        pending = [folder]
        while pending:
            current = pending.pop()
            prefix = f"{current}/"
            try:
                with os.scandir(os.path.join(self._root, current)) as entries:
                    for entry in entries:
                        name = entry.name
                        if name[0] in "_.":
                            continue
                        path = prefix + name
                        try:
                            if entry.is_dir(follow_symlinks=False):
                                inside = f"{path}/"
                                # Every path in there begins with `inside`.
                                if inside > from_path or from_path.startswith(inside):
                                    pending.append(path)
                                continue
                            if path < from_path:
                                continue
                            info = entry.stat(follow_symlinks=False)
                        except _GONE:
                            continue
                        if not is_regular(info.st_mode):
                            kind = "a symbolic link" if stat_module.S_ISLNK(info.st_mode) else "a special file"
                            reason = f"{kind} is not read as data; land a copy of the file"
                            problems.append(Problem(_shown(path), reason))
                            continue
                        add_path(path)
                        add_size(info.st_size)
                        add_time(info.st_mtime_ns)
                        add_inode(info.st_ino)
            except _GONE as error:
                if current == folder and isinstance(error, NotADirectoryError):
                    raise VolumeError(
                        f"{self._at(folder)} is a file. A stream reads a folder; move the file into one."
                    ) from None
            except PermissionError as error:
                if current == folder:
                    raise translate(error, self._at(current)) from None
                problems.append(Problem(_shown(current), "permission denied; let the loader's user read this folder"))
            except OSError as error:
                if current == folder or error.errno not in _PERMANENT:
                    raise translate(error, _shown(os.path.join(self._root, current))) from error
                problems.append(Problem(_shown(current), f"it can't be listed ({error.strerror}); rename or move it"))
        try:
            column = pl.Series("path", paths, pl.String)
        except UnicodeEncodeError:
            good = [i for i, path in enumerate(paths) if _is_utf8(path)]
            problems += [
                Problem(_shown(path), "the name is not UTF-8, so no table can hold it; rename the file")
                for path in paths
                if not _is_utf8(path)
            ]
            paths, sizes, times, inodes = ([values[i] for i in good] for values in (paths, sizes, times, inodes))  # type: ignore[assignment]
            column = pl.Series("path", paths, pl.String)
        files = pl.DataFrame(
            {
                "path": column,
                "size": pl.Series(sizes, dtype=pl.Int64),
                "modified_ns": pl.Series(times, dtype=pl.Int64),
                "etag": pl.Series(inodes, dtype=pl.UInt64).cast(pl.String),
            }
        )
        return Listing(files, tuple(problems))

    def names(self, folder: str) -> list[str]:
        """See `Volume.names`."""
        check_path(folder)
        try:
            with os.scandir(os.path.join(self._root, folder)) as entries:
                return sorted(entry.name for entry in entries if entry.is_file(follow_symlinks=False))
        except _GONE:
            return []
        except OSError as error:
            raise translate(error, self._at(folder)) from error

    def stat(self, path: str) -> FileEntry | None:
        """See `Volume.stat`."""
        try:
            info = os.stat(self._at(path), follow_symlinks=False)
        except _GONE:
            return None
        except OSError as error:
            raise translate(error, self._at(path)) from error
        if not stat_module.S_ISREG(info.st_mode):
            return None
        return FileEntry(path, info.st_size, info.st_mtime_ns, str(info.st_ino))

    @contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        """See `Volume.open`."""
        with io.BufferedReader(_File(self._at(path))) as handle:
            yield handle

    def read(self, path: str) -> bytes:
        """See `Volume.read`."""
        with self.open(path) as handle:
            return handle.read()

    def read_unchanged(self, files: Sequence[FileEntry]) -> list[bytes | None]:
        """See `Volume.read_unchanged`."""
        return [self._unchanged(file) for file in files]

    def create(self, path: str, data: bytes) -> bool:
        """See `Volume.create`."""
        with self._published(path) as (handle, publish):
            handle.write(data)
            return publish(None)

    def upload(self, path: str, source: BinaryIO, *, modified_ns: int | None = None) -> bool:
        """See `Volume.upload`."""
        with self._published(path) as (handle, publish):
            shutil.copyfileobj(source, handle, 1 << 20)
            return publish(modified_ns)

    def delete(self, path: str) -> None:
        """See `Volume.delete`."""
        try:
            os.unlink(self._at(path))
        except _GONE:
            return
        except OSError as error:
            raise translate(error, self._at(path)) from error

    def remove(self, file: FileEntry) -> bool:
        """See `Volume.remove`.

        The file is moved aside before it is compared for the last time: what is written under its name meanwhile is
        then another file. A process that dies in between leaves it aside under a hidden name that the next call knows.
        """
        path = self._at(file.path)
        folder, name = os.path.split(path)
        aside = os.path.join(folder, f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.removing")
        try:
            if not os.path.lexists(aside):
                if self.stat(file.path) != file:
                    return False
                os.rename(path, aside)
            info = os.stat(aside, follow_symlinks=False)
            ours = (info.st_size, info.st_mtime_ns, str(info.st_ino)) == (file.size, file.modified_ns, file.etag)
            if not ours:
                # What stands under its name by now came later, and would have replaced it there.
                with suppress(FileExistsError):
                    os.link(aside, path)
            os.unlink(aside)
            sync_folder(folder)
            return ours
        except _GONE:
            return False
        except OSError as error:
            raise translate(error, path) from error

    def _unchanged(self, file: FileEntry) -> bytes | None:
        try:
            descriptor = os.open(self._at(file.path), _READ_FLAGS)
        except OSError:
            return None
        try:
            # The open file is the one that was listed: what stands under its name afterwards is another one.
            data = os.read(descriptor, file.size + 1) if _is_still(descriptor, file) else b""
            return data if len(data) == file.size and _is_still(descriptor, file) else None
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def _at(self, path: str) -> str:
        return os.path.join(self._root, check_path(path))

    @contextmanager
    def _published(self, path: str) -> Iterator[tuple[BinaryIO, Callable[[int | None], bool]]]:
        target = self._at(path)
        folder = os.path.dirname(target)
        temporary = os.path.join(folder, f".{uuid.uuid4().hex}.tmp")
        try:
            _make_folder(folder)
            with open(temporary, "xb") as handle:

                def publish(modified_ns: int | None) -> bool:
                    handle.flush()
                    if modified_ns is not None:
                        os.utime(handle.fileno(), ns=(modified_ns, modified_ns))
                    os.fsync(handle.fileno())
                    try:
                        os.link(temporary, target)
                    except FileExistsError:
                        return False
                    except PermissionError as error:
                        raise VolumeError(
                            f"{_shown(target)} can't be published: {error.strerror}. The file system may have "
                            "no hard links "
                            "(exFAT and some network mounts have none); put TELEMATICS_HOME on another disk."
                        ) from error
                    sync_folder(folder)
                    return True

                yield handle, publish
        except OSError as error:
            raise translate(error, target) from error
        finally:
            # Left behind it is hidden, and hidden names are not data.
            with suppress(OSError):
                os.unlink(temporary)


def _is_still(descriptor: int, file: FileEntry) -> bool:
    info = os.fstat(descriptor)
    if not stat_module.S_ISREG(info.st_mode):
        return False
    return (info.st_size, info.st_mtime_ns, str(info.st_ino)) == (file.size, file.modified_ns, file.etag)


class _File(io.FileIO):
    """A file open for reading; what the disk refuses is one of the package's own errors, whoever reads."""

    def __init__(self, path: str) -> None:
        self._path = path
        with _translating(path, reading=True):
            super().__init__(path, opener=_open_file)

    def readinto(self, buffer: Buffer) -> int:
        with _translating(self._path):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with _translating(self._path):
            return super().readall()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with _translating(self._path):
            return super().seek(offset, whence)

    def tell(self) -> int:
        with _translating(self._path):
            return super().tell()


@contextmanager
def _translating(path: str, *, reading: bool = False) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise translate(error, path, reading=reading) from error


def _open_file(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | _READ_FLAGS)
    if stat_module.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is no regular file")


def sync_folder(folder: str) -> None:
    """Make a folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: str) -> None:
    missing: list[str] = []
    current = folder
    while not os.path.isdir(current):
        missing.append(current)
        current = os.path.dirname(current)
    for path in reversed(missing):
        try:
            os.mkdir(path)
        except FileExistsError:
            continue
        sync_folder(os.path.dirname(path))


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def translate(error: OSError, path: str, *, reading: bool = False) -> VolumeError | VolumeUnavailableError:
    """The package's own error for what the operating system said of a path."""
    shown = _shown(path)
    if isinstance(error, FileNotFoundError) or (reading and isinstance(error, NotADirectoryError)):
        return FileMissingError(f"{shown} does not exist. List the folder to see what is there.")
    if error.errno in _PERMANENT:
        return VolumeError(f"{shown}: {error.strerror}. Check the path and the permissions of the loader's user.")
    return VolumeUnavailableError(f"{shown}: {error.strerror or error}. It may go through later.")
