"""Lines of one shape as a grid: every separating comma in its place, and values between them.

Belongs here: a block of lines as positions, where the commas of its lines stand, proving whole columns of lines to have
a shape without a pattern, and cutting their values.
Does not belong here: shapes themselves (`json_shapes.py`), lines that have none, rescue, files (`json_lines.py`).

The proof: between two commas a line of the shape has the same text around one scalar. That text is compared for all
lines at once. A number is checked eight bytes at a time. A string is one if it stands in quotes and holds no quote, no
backslash and no control character: the line has no backslash and no control character at all, and as many quotes as
its keys and strings begin and end with. A number that this does not prove, with an exponent say, takes a pattern of its
own. A line with a backslash is left to the shape's pattern; if it is too wide for one, each of its strings takes a
pattern.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import cast

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from telematics_assets.autoloader.json_documents import Elements
from telematics_assets.autoloader.json_exact import decode_string
from telematics_assets.autoloader.json_shapes import NUMBER, STRING, Field, Shape
from telematics_assets.autoloader.spans import Mask, cut, is_utf8, mask, replace

_QUOTE, _BACKSLASH, _COMMA, _MINUS, _ZERO, _NINE, _NULL, _LINE_FEED, _RETURN = b'"\\,-09n\n\r'
_FIRST_PRINTABLE = 0x20

Ints = npt.NDArray[np.intp]
Words = npt.NDArray[np.uint64]


def _eight(byte: int) -> np.uint64:
    return np.uint64(int.from_bytes(bytes([byte]) * 8, "little"))


_HIGH, _LOW, _ZEROS, _DOTS, _OVER_NINE = _eight(0x80), _eight(0x7F), _eight(_ZERO), _eight(b"."[0]), _eight(0x76)
#: By how many bytes of a word count: a mask of them.
_KEEP = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)
_CONSTANTS = [np.uint64(int.from_bytes(text, "little")) for text in (b"true", b"false", b"null", b"{}", b"[]")]
_LONGEST_CONSTANT = 5
#: A number with more characters takes the pattern.
_LONGEST_NUMBER = 32


class Block:
    """Some whole lines of a file, as bytes and as positions."""

    def __init__(self, data: bytes, offsets: npt.NDArray[np.int32] | None = None) -> None:
        """Find the lines.

        Args:
            data: Their bytes.
            offsets: Where each begins and the last ends; None if line feeds tell.
        """
        self.data = data
        raw = np.frombuffer(data, np.uint8)
        self._controls = np.flatnonzero(raw < _FIRST_PRINTABLE)
        if offsets is not None:
            closed = len(offsets) - 1
        else:
            kinds = raw[self._controls]
            feeds = self._controls if (kinds == _LINE_FEED).all() else self._controls[kinds == _LINE_FEED]
            closed = len(feeds)
            offsets = np.empty(closed + (not data.endswith(b"\n") and len(data) > 0) + 1, np.int32)
            offsets[0], offsets[-1] = 0, len(data)
            offsets[1 : closed + 1] = feeds + 1
        self.offsets = offsets
        self.lines = len(offsets) - 1
        self.starts = self.offsets[:-1]
        self.ends = self.offsets[1:].copy()
        self.ends[:closed] -= 1
        returns = (raw[self.ends[:closed] - 1] == _RETURN) & (self.ends[:closed] > self.starts[:closed])
        self.ends[:closed] -= returns
        #: The same bytes, with spaces in place of every line that is no UTF-8: safe to be called text.
        self.text = raw if is_utf8(data) else self._blank_bad_lines(raw)
        self.buffer = pa.py_buffer(self.text)
        self.escapes = b"\\" in data

    @classmethod
    def of(cls, part: bytes | Elements) -> Block:
        """The lines of a part of a file, or of a document."""
        return cls(part) if isinstance(part, bytes) else cls(part.data, part.offsets)

    def line(self, index: int) -> bytes:
        """One line, without its line end."""
        return self.data[self.starts[index] : self.ends[index]]

    def all_lines(self) -> pa.StringArray:
        """All lines, with their line ends."""
        return pa.StringArray.from_buffers(self.lines, pa.py_buffer(self.offsets), self.buffer)

    @cached_property
    def plain(self) -> Mask:
        """Which lines have neither a backslash nor a control character."""
        plain = np.ones(self.lines, bool)
        odd = self._controls[self._controls < self.ends[np.searchsorted(self.starts, self._controls, "right") - 1]]
        if self.escapes:
            odd = np.concatenate([odd, np.flatnonzero(self.text == _BACKSLASH)])
        plain[np.searchsorted(self.starts, odd, "right") - 1] = False
        return plain

    @cached_property
    def quotes(self) -> int:
        """How many quotes there are."""
        return int(np.count_nonzero(self.text == _QUOTE))

    @cached_property
    def quotes_of_lines(self) -> Ints:
        """How many quotes each line has."""
        return np.diff(np.searchsorted(np.flatnonzero(self.text == _QUOTE), self.offsets))

    @cached_property
    def separators(self) -> Separators:
        """Where the commas of its lines stand."""
        return Separators(self)

    def _blank_bad_lines(self, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        text = raw.copy()
        suspects = np.unique(np.searchsorted(self.offsets, np.flatnonzero(raw > 0x7F), side="right") - 1)
        for index in suspects.tolist():
            try:
                self.line(index).decode()
            except UnicodeDecodeError:
                text[self.starts[index] : self.ends[index]] = ord(" ")
        return text


class Separators:
    """The commas of a block's lines: all of them, or those outside of strings."""

    def __init__(self, block: Block) -> None:
        """Take all commas."""
        # Not the block itself, which holds this: memory of a cycle waits for the collector.
        self._text, self._offsets, self._escapes = block.text, block.offsets, block.escapes
        self._starts, self._ends = block.starts, block.ends
        self._are_outside = False
        self._take(np.flatnonzero(block.text == _COMMA))

    def leave_strings(self) -> bool:
        """Drop the commas inside of strings; False if that is done already."""
        if self._are_outside:
            return False
        self._are_outside = True
        self._take(self._commas[~self._inside_strings()])
        return True

    def edges(self, lines: Ints, commas: int) -> Ints:
        """What bounds the values of lines that have so many commas: the byte before a line, each comma, its end."""
        found = np.empty((len(lines), commas + 2), np.intp)
        found[:, 0] = self._starts[lines]
        found[:, 0] -= 1
        found[:, -1] = self._ends[lines]
        if len(lines) and lines[-1] - lines[0] == len(lines) - 1:
            first = self._first[lines[0]]
            found[:, 1:-1] = self._commas[first : first + len(lines) * commas].reshape(len(lines), commas)
        else:
            found[:, 1:-1] = self._commas[self._first[lines, None] + np.arange(commas)]
        return found

    def _take(self, commas: Ints) -> None:
        self._commas = commas
        bounds = np.searchsorted(commas, self._offsets)
        self._first = bounds[:-1]
        #: How many each line has.
        self.counts = np.diff(bounds)

    def _inside_strings(self) -> Mask:
        text = self._text
        quotes = text == _QUOTE
        if self._escapes:
            slashes = np.flatnonzero(text == _BACKSLASH)
            order = np.arange(len(slashes))
            run_starts = np.maximum.accumulate(np.where(np.diff(slashes, prepend=-2) > 1, order, 0))
            escaped = slashes[(order - run_starts) % 2 == 0] + 1  # slashes of a run escape in pairs
            # Behind the last byte of a file that is cut there is nothing to escape.
            quotes[escaped[escaped < text.size]] = False
        odd = (np.cumsum(quotes, dtype=np.uint8) & 1).astype(bool)
        odd_before = np.zeros(len(self._starts), bool)
        odd_before[1:] = odd[self._starts[1:] - 1]
        return cast(Mask, odd[self._commas] != np.repeat(odd_before, self.counts))


def proven(block: Block, lines: Ints, shape: Shape) -> Ints:
    """Those of some lines that have a shape for sure."""
    if not shape.around:
        return lines[:0]
    separators = block.separators
    fit = separators.counts[lines] == shape.commas
    if 2 * np.count_nonzero(fit) < len(lines) and separators.leave_strings():
        fit = separators.counts[lines] == shape.commas
    if shape.pattern:
        fit &= block.plain[lines]
    lines = lines if fit.all() else lines[fit]
    if not len(lines):
        return lines
    edges = separators.edges(lines, shape.commas)
    starts = edges[:, :-1] + _row(1 + len(before) for before, _ in shape.around)
    ends = edges[:, 1:] - _row(len(after) for _, after in shape.around)
    fit = (starts < ends).all(axis=1)
    if not fit.all():
        lines, edges, starts, ends = lines[fit], edges[fit], starts[fit], ends[fit]
    if not len(lines):
        return lines
    fit = _has_texts(block, edges, starts, ends, shape)
    first, last = block.text[starts], block.text[ends - 1]
    strings = first == _QUOTE
    numbers = (first - _ZERO <= _NINE - _ZERO) | (first == _MINUS)
    bad = strings & ((last != _QUOTE) | (ends - starts < 2))
    for chosen, check in ((numbers, _are_numbers), (~(strings | numbers), _are_constants)):
        places = np.flatnonzero(chosen)
        if len(places):
            right = check(block.text, starts.ravel()[places], ends.ravel()[places])
            bad.ravel()[places] = ~right
    odd = ~block.plain[lines]
    for unproven, kind, of, pattern in ((bad.any(), numbers, bad, NUMBER), (odd.any(), strings, odd[:, None], STRING)):
        if unproven:
            places = np.flatnonzero(kind & of & fit[:, None])
            texts = cut(block.buffer, starts.ravel()[places], ends.ravel()[places])
            bad.ravel()[places] = ~mask(pc.match_substring_regex(texts, f"^{pattern}$"))
    if bad.any():
        fit &= ~bad.any(axis=1)
    quotes = sum(before.count(b'"') + after.count(b'"') for before, after in shape.around)
    # No line has fewer than it needs: if all have as many together, each has.
    all_quotes = len(lines) * quotes + 2 * np.count_nonzero(strings)
    if not fit.all() or all_quotes != block.quotes:
        fit &= odd | (block.quotes_of_lines[lines] == quotes + 2 * np.count_nonzero(strings, axis=1))
    return lines if fit.all() else lines[fit]


def matching(block: Block, lines: Ints, shape: Shape) -> Ints:
    """Those of some lines that match the pattern of a shape."""
    if not len(lines) or not shape.pattern:
        return lines[:0]
    texts = cast(pl.Series, pl.from_arrow(block.all_lines()))
    asked = texts if len(lines) == len(texts) else texts.gather(pl.Series(lines))
    return cast(Ints, lines[asked.str.contains(shape.pattern).to_numpy()])


def cut_fields(
    block: Block, lines: Ints, shape: Shape, fields: list[Field], verbatim: list[bool]
) -> list[pa.StringArray]:
    """Cut fields out of lines that have their shape; `null` becomes null, strings are decoded.

    Args:
        block: The lines.
        lines: Which, in order.
        shape: Their shape.
        fields: Some of its fields, in order.
        verbatim: Which of them show strings as they stand in the file.

    Returns:
        A column for each.
    """
    starts, ends = _bounds(block, lines, shape, fields)
    first = block.text[starts]
    quoted = (first == _QUOTE) & ~np.array(verbatim, bool)
    null = first == _NULL
    whole = _taken(block, starts + quoted, ends - quoted, null)
    columns = [whole.slice(number * len(lines), len(lines)) for number in range(len(fields))]
    if not block.escapes:
        return columns
    return [_decoded(column, quoted[:, number]) for number, column in enumerate(columns)]


def source_texts(block: Block, lines: Ints, shape: Shape, fields: list[Field]) -> list[pa.StringArray]:
    """Cut fields out of lines that have their shape, as they stand in the file."""
    whole = _taken(block, *_bounds(block, lines, shape, fields))
    return [whole.slice(number * len(lines), len(lines)) for number in range(len(fields))]


def _bounds(block: Block, lines: Ints, shape: Shape, fields: list[Field]) -> tuple[Ints, Ints]:
    """Where fields start and end, by line."""
    separators = block.separators
    if (separators.counts[lines] != shape.commas).any():
        separators.leave_strings()
    edges = separators.edges(lines, shape.commas)
    starts = edges[:, _row(field.start.comma + 1 for field in fields)]
    ends = edges[:, _row(field.end.comma + 1 for field in fields)]
    starts += _row(1 + field.start.distance for field in fields)
    ends -= _row(field.end.distance for field in fields)
    return starts, ends


def _row(numbers: Iterable[int]) -> Ints:
    return np.fromiter(numbers, np.intp)


def _decoded(values: pa.StringArray, quoted: Mask) -> pa.StringArray:
    escaped = quoted & mask(pc.match_substring(values, "\\"))
    found = values.filter(pa.array(escaped)).to_pylist()
    return replace(values, escaped, [decode_string(text) for text in found])


def _taken(block: Block, starts: Ints, ends: Ints, null: Mask | None = None) -> pa.StringArray:
    """Cut spans out of the text, by line and in order; all of the first column, then all of the second, …."""
    count = starts.size
    offsets = np.empty(2 * count + 1, np.int32)
    offsets[:-1:2], offsets[1::2], offsets[-1] = starts.ravel(), ends.ravel(), block.text.size
    spans = pa.StringArray.from_buffers(2 * count, pa.py_buffer(offsets), block.buffer)
    places = np.arange(0, 2 * count, 2, dtype=np.int32).reshape(starts.shape).T.ravel()
    return spans.take(pa.array(places, mask=null.T.ravel() if null is not None and null.any() else None))


def _has_texts(block: Block, edges: Ints, starts: Ints, ends: Ints, shape: Shape) -> Mask:
    """Which lines have the shape's text around their scalars."""
    count, scalars = starts.shape
    offsets = np.empty((count, 2 * scalars + 2), np.int32)
    offsets[:, 0] = edges[:, 0] + 1
    offsets[:, 1:-1:2] = starts
    offsets[:, 2:-1:2] = ends
    offsets[:, -1] = edges[:, -1]
    closed = np.append(offsets, np.int32(block.text.size))
    gaps = pa.StringArray.from_buffers(offsets.size, pa.py_buffer(closed), block.buffer)
    _, _, found = gaps.take(pa.array(np.arange(0, offsets.size, 2, dtype=np.int32))).buffers()
    text = b",".join([before + after for before, after in shape.around])
    if found.equals(pa.py_buffer(text * count)):
        return np.ones(count, bool)
    each = np.frombuffer(found, np.uint8, count * len(text)).reshape(count, len(text))
    return cast(Mask, (each == np.frombuffer(text, np.uint8)).all(axis=1))


def _words(text: npt.NDArray[np.uint8], places: Ints) -> Words:
    """The eight bytes from each place, the first being the lowest; places ascend, behind the text are zeros."""
    inside = int(np.searchsorted(places, text.size - 8, "right"))
    found = np.empty(len(places), np.uint64)
    if inside:
        found[:inside] = np.ndarray((text.size - 7,), "<u8", text, strides=(1,))[places[:inside]]
    found[inside:] = [int.from_bytes(text[at : at + 8].tobytes(), "little") for at in places[inside:].tolist()]
    return found


def _are_constants(text: npt.NDArray[np.uint8], starts: Ints, ends: Ints) -> Mask:
    lengths = ends - starts
    words = _words(text, starts) & _KEEP[np.minimum(lengths, 8)]
    right = np.zeros(len(words), bool)
    for constant in _CONSTANTS:
        right |= words == constant
    return right & (lengths <= _LONGEST_CONSTANT)


def _are_numbers(text: npt.NDArray[np.uint8], starts: Ints, ends: Ints) -> Mask:
    """Which texts are numbers without an exponent; each begins with a digit or a minus."""
    starts = starts + (text[starts] == _MINUS)
    lengths = ends - starts
    words = _words(text, starts)
    others, bad = _no_digits(words, lengths)
    bad |= others & np.uint64(0x80)
    wrong = bad != 0
    wrong |= ((words & np.uint64(0xFF)) == _ZERO) & (lengths > 1) & ((others & np.uint64(0x8000)) == 0)
    wrong |= text[ends - 1] - _ZERO > _NINE - _ZERO
    wrong |= (lengths < 1) | (lengths > _LONGEST_NUMBER)
    dotted = others != 0
    rest = np.flatnonzero(lengths > 8)
    for at in range(8, _LONGEST_NUMBER, 8):
        if not len(rest):
            break
        others, bad = _no_digits(_words(text, starts[rest] + at), lengths[rest] - at)
        here = others != 0
        wrong[rest] |= (bad != 0) | (here & dotted[rest])
        dotted[rest] |= here
        rest = rest[lengths[rest] > at + 8]
    return cast(Mask, ~wrong)


def _no_digits(words: Words, lengths: Ints) -> tuple[Words, Words]:
    """The high bit of each of so many bytes that is no digit; and not zero if that is not at most one, a dot."""
    apart = words ^ _ZEROS
    others = (((apart & _LOW) + _OVER_NINE) | apart) & _HIGH & _KEEP[np.clip(lengths, 0, 8)]
    whole = (others >> np.uint64(7)) * np.uint64(0xFF)
    wrong = (others & (others - np.uint64(1))) | ((words ^ _DOTS) & whole)
    return cast(Words, others), cast(Words, wrong)
