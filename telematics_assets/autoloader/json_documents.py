"""JSON documents: where the records of a file are that is not made of lines.

Belongs here: cutting a document into its elements, in bounded memory, and whether a document is closed.
Does not belong here: what an element is (`json_exact.py`), rows and columns (`json_rows.py`), Dagster.

A document is one value, or several one after another. A top-level object is one record; of a top-level array every
element is one. Elements are told by brackets, commas and strings alone, so that an element that is no JSON object
becomes a corrupt record of its own and those behind it are read. Where brackets or quotes don't balance, and where
something else stands at top level, the document is broken: everything from there to its end is one corrupt record.
White space around elements, and commas without an element, are no data.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

from telematics_assets.autoloader.chunks import MAX_RECORD_BYTES, RecordTooLongError
from telematics_assets.autoloader.codecs import read_up_to
from telematics_assets.autoloader.json_exact import WHITE_SPACE
from telematics_assets.autoloader.json_marks import IS_SPACE, STEP, Bytes, Ints, byte_set, outer_marks

_BOM = b"\xef\xbb\xbf"
_COMMA, _OPEN, _LINE_FEED = b",{\n"
_PIECE = 1024 * 1024
#: White space around elements is passed over by columns for so many characters, then element by element.
_NEAR = 64

_MARKS = byte_set(b'",[]{}')


@dataclass(frozen=True)
class Elements:
    """Some consecutive elements of a document.

    Attributes:
        data: Their texts, each followed by one line feed.
        offsets: Where each text starts, and the length of `data`.
    """

    data: bytes
    offsets: npt.NDArray[np.int32]


def elements(source: BinaryIO, chunk_bytes: int) -> Generator[Elements, None, bool]:
    """Cut a document into elements.

    Args:
        source: Its bytes; only read.
        chunk_bytes: How much is read at a time; the elements are the same with any.

    Returns:
        Whether the document is closed, and not empty.

    Raises:
        RecordTooLongError: If an element is longer than `MAX_RECORD_BYTES`.
    """
    data = read_up_to(source, chunk_bytes + len(_BOM)).removeprefix(_BOM)
    in_array = found = False
    while True:
        # Here `data` starts where an element may start, and holds no element that is known to go on behind it.
        data = data.lstrip(WHITE_SPACE)
        if not in_array and data:
            found = True
            if data[0] == ord("["):
                in_array, data = True, data[1:]
                continue
            if data[0] != _OPEN:
                break
        raw = np.frombuffer(data, np.uint8)
        starts, ends, after, closed = _in_array(raw) if in_array else _at_top(raw)
        if len(starts):
            yield _gathered(raw, starts, ends)
        data = data[after:]
        if closed:
            in_array = False
            if data.startswith(b"}"):
                break
            data = data[1:]
            continue
        if after and not in_array:
            continue
        more = read_up_to(source, chunk_bytes)
        if not more:
            break
        data = data.lstrip(WHITE_SPACE)
        if len(data) > MAX_RECORD_BYTES:
            raise RecordTooLongError
        data += more
    yield from _rest(data, source)
    return found and not in_array and not data


def is_complete_document(pieces: Iterator[bytes]) -> bool:
    """Whether a document that may still be being written is closed.

    Args:
        pieces: Its bytes.
    """
    parts = elements(cast(BinaryIO, _Pieces(pieces)), _PIECE)
    try:
        while True:
            next(parts)
    except StopIteration as end:
        return bool(end.value)
    except RecordTooLongError:
        return True  # reading it will say so


class _Pieces:
    """Bytes that come in pieces, to be read."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = b""

    def read(self, size: int) -> bytes:
        self._left = self._left or next(self._pieces, b"")
        data, self._left = self._left[:size], self._left[size:]
        return data


def _rest(data: bytes, source: BinaryIO) -> Iterator[Elements]:
    """All that is left, as one element."""
    while len(data) <= MAX_RECORD_BYTES and (more := read_up_to(source, _PIECE)):
        data += more
    data = data.strip(WHITE_SPACE)
    if len(data) > MAX_RECORD_BYTES:
        raise RecordTooLongError
    if data:
        yield Elements(data + b"\n", np.array([0, len(data) + 1], np.int32))


def _in_array(raw: Bytes) -> tuple[Ints, Ints, int, bool]:
    """The elements from somewhere between two elements of an array on.

    Returns:
        Starts, ends, where the first element that may go on starts, and whether the array's end is there instead.
    """
    marks, depths = outer_marks(raw, _MARKS)
    below = np.flatnonzero(depths < 0)
    closed = len(below) > 0
    if closed:
        marks, depths = marks[: below[0] + 1], depths[: below[0] + 1]
    cuts = marks[((raw[marks] == _COMMA) & (depths == 0)) | (depths < 0)]
    if not len(cuts):
        return cuts, cuts, 0, False
    befores = np.empty_like(cuts)
    befores[0], befores[1:] = 0, cuts[:-1] + 1
    starts, ends = _stripped(raw, befores, cuts)
    there = starts < ends
    return starts[there], ends[there], int(cuts[-1]) + (not closed), closed


def _at_top(raw: Bytes) -> tuple[Ints, Ints, int, bool]:
    """The objects that stand one after another; where the first value starts that is none, or may go on."""
    marks, depths = outer_marks(raw, _MARKS)
    ends = marks[(STEP[raw[marks]] < 0) & (depths == 0)] + 1
    if not len(ends):
        return ends, ends, 0, False
    befores = np.empty_like(ends)
    befores[0], befores[1:] = 0, ends[:-1]
    starts, _ = _stripped(raw, befores, ends)
    others = np.flatnonzero(raw[starts] != _OPEN)
    count = int(others[0]) if len(others) else len(ends)
    return starts[:count], ends[:count], int(ends[count - 1]), False


def _stripped(raw: Bytes, starts: Ints, ends: Ints) -> tuple[Ints, Ints]:
    """Spans without the white space at their ends."""
    starts, ends = starts.copy(), ends.copy()
    for _ in range(_NEAR):
        first = (starts < ends) & IS_SPACE[raw[np.minimum(starts, len(raw) - 1)]]
        last = (starts < ends) & IS_SPACE[raw[ends - 1]]
        if not first.any() and not last.any():
            return starts, ends
        starts += first
        ends -= last & (starts < ends)
    for index in np.flatnonzero(starts < ends).tolist():
        span = raw[starts[index] : ends[index]].tobytes()
        starts[index] += len(span) - len(span.lstrip(WHITE_SPACE))
        ends[index] = starts[index] + len(span.strip(WHITE_SPACE))
    return starts, ends


def _gathered(raw: Bytes, starts: Ints, ends: Ints) -> Elements:
    """Put elements one behind the other, a line feed after each."""
    offsets = np.zeros(len(starts) + 1, np.int32)
    np.cumsum(ends - starts + 1, out=offsets[1:])
    if (ends[:-1] == starts[1:]).any():
        # Objects without anything between them leave no room for the line feed.
        texts = [raw[start:end].tobytes() for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        return Elements(b"\n".join([*texts, b""]), offsets)
    size = len(raw) + 2
    edges = np.zeros(size, np.int8)
    edges[starts] += 1
    edges[ends + 1] -= 1
    text = np.empty(size, np.uint8)
    text[: len(raw)] = raw
    text[ends] = _LINE_FEED
    return Elements(text[np.cumsum(edges, dtype=np.int8).astype(bool)].tobytes(), offsets)
