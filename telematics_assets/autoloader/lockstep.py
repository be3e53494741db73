"""Thrift's compact protocol, read from many places at once: as columns, not one by one.

Belongs here: a cursor over many structures that are built alike, and which of them are not.
Does not belong here: what the structures are (`parquet_pages.py`), Dagster.

Files of one writer differ in the values of their footers, hardly ever in what is there. The first structure leads:
whatever stands otherwise in another one takes that one out, and its values mean nothing from there on.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
Marks = npt.NDArray[np.bool_]

#: Types of the protocol.
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
#: Bytes that must follow the last structure.
PADDING = 16
_NUMBERS = (I16, I32, I64)
_DEEPEST = 8
_SHIFTS, _MORE = np.array([0, 7, 14, 21, 28]), np.array([0x80, 0x80, 0x80, 0x80, 0])


class OddError(Exception):
    """The leading structure is not one that is read here."""


class Lockstep:
    """Cursors that move through structures together.

    Attributes:
        at: Where the cursors stand.
        alike: Which structures are built like the first, as far as they were read.
    """

    def __init__(self, data: bytes, starts: Numbers) -> None:
        """Place the cursors.

        Args:
            data: All bytes, with `PADDING` behind them.
            starts: Where the structures begin; at least one.
        """
        self._bytes = data
        self._data = np.frombuffer(data, np.uint8)
        self._end = len(data) - PADDING
        self.at = np.minimum(starts, self._end)
        self.alike: Marks = np.ones(len(starts), np.bool_)

    def byte(self) -> int:
        """The next byte, which must be the same everywhere."""
        found = self._data[self.at]
        first = found[0]
        self.alike &= found == first
        self.at = np.minimum(self.at + 1, self._end)
        return int(first)

    def number(self) -> Numbers:
        """The next number without a sign. One of more than 62 bits takes its structure out."""
        found = self._data[self.at]
        value = (found & 0x7F).astype(np.int64)
        self.at = self.at + 1
        more = found > 0x7F
        shift = 7
        while more.any() and shift < 63:
            found = self._data[np.minimum(self.at, self._end)]
            value |= np.where(more, (found & 0x7F).astype(np.int64) << shift, 0)
            self.at += more
            more &= found > 0x7F
            shift += 7
        self.alike &= ~more & (value >= 0)
        self.at = np.minimum(self.at, self._end)
        return value

    def signed(self) -> Numbers:
        """The next number with a sign."""
        value = self.number()
        return (value >> 1) ^ -(value & 1)

    def same(self) -> int:
        """The next number with a sign, which must be the same everywhere."""
        value = self.signed()
        self.alike &= value == value[0]
        return int(value[0])

    def fields(self) -> Iterator[tuple[int, int]]:
        """The fields of a structure: number and type. Whoever takes one reads or skips its value."""
        last = 0
        while (header := self.byte()) != 0:
            if header < 0x10:
                raise OddError
            last += header >> 4
            yield last, header & 0x0F

    def items(self) -> tuple[int, int]:
        """The head of a list: how many items, and their type."""
        header = self.byte()
        count = header >> 4
        if count == 0x0F:
            sizes = self.number()
            self.alike &= sizes == sizes[0]
            count = int(sizes[0])
        if count > 100_000:
            raise OddError
        return count, header & 0x0F

    def skip(self, kind: int, depth: int = 0) -> None:
        """Pass a value over."""
        if kind in _NUMBERS:
            self.number()
        elif kind == BINARY:
            self._pass(self.number())
        elif kind == STRUCT and depth < _DEEPEST:
            for _, inner in self.fields():
                self.skip(inner, depth + 1)
        elif kind == LIST and depth < _DEEPEST:
            count, inner = self.items()
            for _ in range(count):
                # In a list a truth value takes a byte.
                self.skip(BYTE if inner in (TRUE, FALSE) else inner, depth + 1)
        elif kind == BYTE:
            self._pass(np.ones_like(self.at))
        elif kind == DOUBLE:
            self._pass(np.full_like(self.at, 8))
        elif kind not in (TRUE, FALSE):
            raise OddError

    def skip_loose(self) -> None:
        """Pass over a structure of numbers, texts and truth values of which each may hold other ones."""
        open_ = np.ones(len(self.at), np.bool_)
        for _ in range(16):
            header = self._data[self.at]
            if open_.all() and (header == header[0]).all() and header[0]:
                kinds = int(header[0])
                self.at = np.minimum(self.at + 1, self._end)
                if kinds < 0x10 or kinds & 0x0F in (LIST, SET, MAP, STRUCT):
                    raise OddError
                self.skip(kinds & 0x0F)
                continue
            self.at = np.minimum(self.at + open_, self._end)
            open_ &= header != 0
            if not open_.any():
                return
            kind = np.where(open_, header & 0x0F, TRUE)
            text, plain = kind == BINARY, np.isin(kind, _NUMBERS)
            self.alike &= (text | plain | (kind == TRUE) | (kind == FALSE)) & (~open_ | (header >= 0x10))
            before = self.at
            value = self.number()
            self.at = np.where(text | plain, self.at, before)
            self._pass(np.where(text, value, 0))
        self.alike &= ~open_

    def same_bytes(self, starts: Numbers) -> Marks:
        """Where everything since `starts` is, byte by byte, what it is in the first structure."""
        lead = self.since(starts, 0)
        spans = zip(starts.tolist(), self.at.tolist(), strict=True)
        return np.array([self._bytes[start:end] == lead for start, end in spans], np.bool_)

    def since(self, starts: Numbers, number: int) -> bytes:
        """What stands in one structure since `starts`."""
        return self._bytes[int(starts[number]) : int(self.at[number])]

    def _pass(self, lengths: Numbers) -> None:
        fits = (lengths >= 0) & (lengths <= self._end - self.at)
        self.alike &= fits
        self.at = np.minimum(self.at + np.where(fits, lengths, 0), self._end)


def padded(values: Numbers) -> npt.NDArray[np.uint8]:
    """Numbers from 0 to 2^34 as signed ones of the protocol, each in five bytes along a new last axis."""
    parts: npt.NDArray[np.int64] = (values << 1)[..., None] >> _SHIFTS & 0x7F | _MORE
    return parts.astype(np.uint8)
