"""The marks of JSON text: brackets, commas and colons outside of strings.

Belongs here: where the marks stand in a block of bytes, and how deep each is.
Does not belong here: what is cut at them (`json_documents.py`, `json_nested.py`), proving that text is JSON, Dagster.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from telematics_assets.autoloader.json_exact import WHITE_SPACE
from telematics_assets.autoloader.spans import Mask

_QUOTE, _BACKSLASH = b'"\\'

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

#: By how much each byte changes the depth.
STEP = np.zeros(256, np.int8)
STEP[list(b"[{")] = 1
STEP[list(b"]}")] = -1


def byte_set(members: bytes) -> Mask:
    """A table of all bytes that is true for the given ones."""
    table = np.zeros(256, bool)
    table[list(members)] = True
    return table


IS_SPACE = byte_set(WHITE_SPACE)


def outer_marks(text: Bytes, among: Mask) -> tuple[Ints, npt.NDArray[np.int32]]:
    """Where marks stand outside of strings, and the depth behind each.

    Args:
        text: JSON text that begins outside of a string.
        among: The marks (`byte_set`); brackets, braces and the quote must be among them.
    """
    marks = np.flatnonzero(among[text])
    kinds = text[marks]
    is_quote = kinds == _QUOTE
    ends_string = is_quote
    slashes = np.flatnonzero(text == _BACKSLASH)
    if len(slashes):
        order = np.arange(len(slashes))
        run_starts = np.maximum.accumulate(np.where(np.diff(slashes, prepend=-2) > 1, order, 0))
        escaped = np.zeros(len(text) + 1, bool)
        escaped[slashes[(order - run_starts) % 2 == 0] + 1] = True  # slashes of a run escape in pairs
        ends_string = is_quote & ~escaped[marks]
    outside = ((np.cumsum(ends_string, dtype=np.uint8) & 1) == 0) & ~is_quote
    return marks[outside], np.cumsum(STEP[kinds[outside]], dtype=np.int32)
