"""Many JSON arrays or objects taken apart at once.

Belongs here: where the elements of arrays and the members of objects stand, column by column, and strings decoded.
Does not belong here: proving that texts are JSON (`json_exact.py`, `json_lines.py`), types (`typed.py`), Dagster.

Every text here is one whole JSON value out of a record that the reader has proven. So brackets balance, quotes pair
up, and positions alone tell elements and members apart. What the reader did not look at are keys and strings inside of
values: a key may repeat, and a string may hold a lone surrogate, which is no text.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from telematics_assets.autoloader.json_exact import decode_string
from telematics_assets.autoloader.json_marks import IS_SPACE, Bytes, Ints, byte_set, outer_marks
from telematics_assets.autoloader.spans import Mask, cut, mask, replace

_QUOTE, _COMMA, _COLON, _OPEN_ARRAY, _OPEN_OBJECT = b'",:[{'

#: White space around values is passed over step by step so often, then at once.
_NEAR = 3

_MARKS = byte_set(b'",:[]{}')


class Elements(NamedTuple):
    """The elements of some arrays, in order.

    Attributes:
        owners: Which array each belongs to.
        values: Their source texts; null where an element is `null`.
    """

    owners: Ints
    values: pa.StringArray


class Members(NamedTuple):
    """The members of some objects, in order.

    Attributes:
        owners: Which object each belongs to.
        keys: Their keys; null where one is no text.
        values: Their source texts; null where a value is `null`.
    """

    owners: Ints
    keys: pa.StringArray
    values: pa.StringArray


def array_elements(arrays: pa.StringArray) -> Elements:
    """Take arrays apart.

    Args:
        arrays: Source texts of JSON arrays, from bracket to bracket; none is null.
    """
    text, bounds = _text(arrays)
    starts, ends, _ = _parts(text)
    starts, ends = _stripped(text, starts, ends)
    there = starts < ends
    starts, ends = starts[there], ends[there]
    return Elements(np.searchsorted(bounds, starts, side="right") - 1, _values(text, starts, ends))


def object_members(objects: pa.StringArray) -> Members:
    """Take objects apart.

    Args:
        objects: Source texts of JSON objects, from brace to brace; none is null.
    """
    text, bounds = _text(objects)
    starts, ends, colons = _parts(text)
    starts, ends = _stripped(text, starts, ends)
    there = starts < ends
    starts, ends = starts[there], ends[there]
    _, key_ends = _stripped(text, starts, colons)
    value_starts, _ = _stripped(text, colons + 1, ends)
    keys = cut(pa.py_buffer(text), (starts + 1).astype(np.int32), (key_ends - 1).astype(np.int32))
    owners = np.searchsorted(bounds, starts, side="right") - 1
    return Members(owners, _decoded(keys), _values(text, value_starts, ends))


def strings(values: pa.StringArray) -> tuple[pa.StringArray, Mask]:
    """The texts of those values that are strings.

    Args:
        values: Source texts of JSON values, or null.

    Returns:
        The decoded strings, null where a value is none or is no text; and which values are strings.
    """
    text, bounds = _text(values)
    starts, ends = bounds[:-1], bounds[1:]
    is_string = np.zeros(len(values), bool)
    filled = ends > starts
    is_string[filled] = text[starts[filled]] == _QUOTE
    inside = cut(
        pa.py_buffer(text), (starts + is_string).astype(np.int32), (ends - is_string).astype(np.int32), ~is_string
    )
    return _decoded(inside), is_string


def firsts(values: pa.StringArray) -> Bytes:
    """The first byte of each value; none is null or empty."""
    text, bounds = _text(values)
    return text[bounds[:-1]]


def _text(values: pa.StringArray) -> tuple[Bytes, Ints]:
    """The bytes of a column, and where each value starts, and the last one ends."""
    _, offsets, data = values.buffers()
    bounds = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1].astype(np.int64)
    raw = np.frombuffer(b"" if data is None else data, np.uint8)
    return raw[bounds[0] : bounds[-1]], bounds - bounds[0]


def _parts(text: Bytes) -> tuple[Ints, Ints, Ints]:
    """What stands between the brackets and commas of the outermost values, and the outermost colons."""
    marks, depths = outer_marks(text, _MARKS)
    kinds = text[marks]
    opens = (kinds == _OPEN_ARRAY) | (kinds == _OPEN_OBJECT)
    closes = depths == 0
    edges = closes | ((depths == 1) & (opens | (kinds == _COMMA)))
    places = marks[edges]
    begins = ~closes[edges][:-1]
    return places[:-1][begins] + 1, places[1:][begins], marks[(kinds == _COLON) & (depths == 1)]


def _stripped(text: Bytes, starts: Ints, ends: Ints) -> tuple[Ints, Ints]:
    """Spans without the white space at their ends."""
    if not len(starts):
        return starts, ends
    for _ in range(_NEAR):
        leads = IS_SPACE[text[starts]] & (starts < ends)
        trails = IS_SPACE[text[ends - 1]] & (starts + leads < ends)
        if not leads.any() and not trails.any():
            return starts, ends
        starts, ends = starts + leads, ends - trails
    filled = np.flatnonzero(~IS_SPACE[text])
    first = filled[np.searchsorted(filled, starts)]
    last = filled[np.searchsorted(filled, ends) - 1] + 1
    return np.minimum(first, ends), np.maximum(last, np.minimum(first, ends))


def _values(text: Bytes, starts: Ints, ends: Ints) -> pa.StringArray:
    is_null = text[starts] == ord("n") if len(starts) else np.zeros(0, bool)
    return cut(pa.py_buffer(text), starts.astype(np.int32), ends.astype(np.int32), is_null)


def _decoded(inside: pa.StringArray) -> pa.StringArray:
    """What strings say, by the text between their quotes; null where that is no text."""
    escaped = mask(pc.match_substring(inside, "\\"))
    if not escaped.any():
        return inside
    return replace(inside, escaped, [_as_text(value) for value in inside.filter(pa.array(escaped)).to_pylist()])


def _as_text(inside: str) -> str | None:
    decoded = decode_string(inside)
    try:
        decoded.encode()
    except UnicodeEncodeError:
        return None
    return decoded
