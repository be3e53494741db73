"""Compressed files of text: gzip, bzip2 and Zstandard, told by their first bytes, never by their names.

Belongs here: unpacking piece by piece, and what a file is that can't be unpacked to its end.
Does not belong here: what the content means (`json_lines.py`, `delimited.py`), Parquet (it compresses inside), Dagster.

A file may be several compressed streams one after another. Each is checked to its last byte, by its own checksum where
it has one; what follows the last one and is no such stream is damage, not a remark to pass over.
"""

from __future__ import annotations

import bz2
import gzip
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

import pyarrow as pa

from telematics_assets.autoloader.watched import Watched
from telematics_assets.errors import UnreadableFileError

#: How much of a packed file (as stored) is unpacked to see whether it is complete; a larger one counts as complete.
LOOK_BYTES = 32 * 1024 * 1024

#: How much is unpacked at most for that look.
LOOK_UNPACKED_BYTES = 256 * 1024 * 1024

_PIECE = 1024 * 1024
_MAGIC_BYTES = 10
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")
_ERRORS = (OSError, EOFError, zlib.error, ValueError, RuntimeError, MemoryError, pa.ArrowException)


def codec(source: BinaryIO) -> str | None:
    """How a file is packed, by its first bytes: `gzip`, `bzip2`, `zstd`, or None if it is plain.

    Args:
        source: The file; it can seek, and stays where it is.
    """
    start = source.tell()
    head = read_up_to(source, _MAGIC_BYTES)
    source.seek(start)
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    # Text may start with BZh too: only with the first block's own mark, or the end of an empty stream, it is bzip2.
    if head[:3] == b"BZh" and head[3:4] in tuple(b"%d" % level for level in range(1, 10)) and head[4:] in _BZIP2_BLOCKS:
        return "bzip2"
    if head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F):
        return "zstd"
    return None


def unpacked(source: BinaryIO, name: str = "The file") -> BinaryIO:
    """A file's content from where it stands: `read(size)` gives at most so many bytes, and memory holds little more.

    Args:
        source: The file, packed or plain; it can seek.
        name: How errors name it.

    Returns:
        The source itself if it is plain. Otherwise something to `read` only, which raises `UnreadableFileError` where
        the file can't be unpacked; the source's own errors pass.
    """
    kind = codec(source)
    return source if kind is None else cast(BinaryIO, _Unpacked(source, kind, name))


def read_up_to(source: BinaryIO, size: int) -> bytes:
    """Read `size` bytes, fewer only at the end; a single `read` may stop early."""
    data = source.read(size)
    while data and len(data) < size:
        more = source.read(size - len(data))
        if not more:
            break
        data += more
    return data


def is_complete_packed(source: BinaryIO, size: int, judge: Callable[[Iterator[bytes]], bool]) -> bool:
    """Whether a packed file that may still be being written has its end.

    Args:
        source: The file; it can seek.
        size: Its size in bytes.
        judge: Says of the unpacked content, piece by piece, whether it has its end.

    Returns:
        False if it can't be unpacked to its end. A file beyond `LOOK_BYTES`, or `LOOK_UNPACKED_BYTES` unpacked, counts
        as complete: if it is not, reading it fails by name.
    """
    if size > LOOK_BYTES:
        return True
    source.seek(0)
    try:
        return judge(_pieces(unpacked(source)))
    except _LookTooLongError:
        return True
    except UnreadableFileError:
        return False


class _LookTooLongError(Exception):
    """Raised when a look at a packed file would unpack too much."""


def _pieces(opened: BinaryIO) -> Iterator[bytes]:
    total = 0
    while piece := opened.read(_PIECE):
        total += len(piece)
        if total > LOOK_UNPACKED_BYTES:
            raise _LookTooLongError
        yield piece


class _Unpacked:
    """Unpacks, and tells the errors of the content from those of the source."""

    def __init__(self, source: BinaryIO, kind: str, name: str) -> None:
        self._kind = kind
        self._name = name
        self._watched = Watched(source)
        self._reader = _READERS[kind](self._watched)

    def read(self, size: int) -> bytes:
        try:
            return cast(bytes, self._reader.read(size))
        except _ERRORS as error:
            if self._watched.error is not None:
                raise self._watched.error from None
            raise UnreadableFileError(
                f"{self._name} is a {self._kind} file that can't be unpacked to its end: {error}. "
                "Compress the file again and upload it anew."
            ) from error


class _Bzip2:
    """Unpacks bzip2. The standard library's own file passes over whatever follows the first stream."""

    def __init__(self, source: Watched) -> None:
        self._source = source
        self._stream = bz2.BZ2Decompressor()

    def read(self, size: int) -> bytes:
        while True:
            data = b""
            if self._stream.eof:
                data = self._stream.unused_data or self._source.read(_PIECE)
                if not data:
                    return b""
                self._stream = bz2.BZ2Decompressor()
            elif self._stream.needs_input:
                data = self._source.read(_PIECE)
                if not data:
                    raise EOFError("it ends in the middle of a stream")
            if found := self._stream.decompress(data, size):
                return found


def _zstd(source: Watched) -> Any:
    return pa.CompressedInputStream(pa.PythonFile(source, mode="r"), "zstd")


def _gzip(source: Watched) -> Any:
    return gzip.GzipFile(fileobj=cast(Any, source))


_READERS: dict[str, Any] = {"gzip": _gzip, "bzip2": _Bzip2, "zstd": _zstd}
