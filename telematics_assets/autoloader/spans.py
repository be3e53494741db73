"""Columns cut out of a block of text by position.

Belongs here: what the readers of text share about Arrow's string columns.
Does not belong here: where values stand (`json_grid.py`, `delimited.py`), Dagster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Ints = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


def cut(text: Any, starts: Ints, ends: Ints, null: Mask | None = None) -> pa.StringArray:
    """Cut spans out of a block and make a column of them.

    Args:
        text: An Arrow buffer of UTF-8.
        starts: Where each span starts, in order.
        ends: Where each span ends, before the next one's start.
        null: Which rows have no value.
    """
    count = len(starts)
    offsets = np.empty(2 * count + 1, np.int32)
    offsets[:-1:2], offsets[1::2], offsets[-1] = starts, ends, text.size
    spans = pa.StringArray.from_buffers(2 * count, pa.py_buffer(offsets), text)
    return spans.take(pa.array(np.arange(0, 2 * count, 2, dtype=np.int32), mask=null))


def is_utf8(data: bytes) -> bool:
    """Whether bytes are UTF-8."""
    if data.isascii():
        return True
    whole = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, len(data)], np.int32)), pa.py_buffer(data))
    try:
        whole.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def replace(values: pa.StringArray, where: Mask, texts: Sequence[str | None] | pa.StringArray) -> pa.StringArray:
    """Put texts into those rows, in order."""
    if not where.any():
        return values
    new = texts if isinstance(texts, pa.StringArray) else pa.array(texts, pa.string())
    return pc.replace_with_mask(values, pa.array(where), new)


def mask(values: pa.BooleanArray) -> Mask:
    """A column of truth values, null being false."""
    return cast(Mask, pc.fill_null(values, False).to_numpy(zero_copy_only=False))


def is_string(type: pa.DataType) -> bool:
    """Whether a column of this type can hold any text as it is."""
    return bool(pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type))
