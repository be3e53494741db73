"""How this process keeps memory that it has freed.

Belongs here: the one setting of the C library on which a load's memory depends. Does not belong here: anything else.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

_M_ARENA_MAX = -8
_ARENAS = 2


def keep_freed_memory_in_few_places() -> None:
    """Let threads share what the C library keeps of freed memory, as far as they don't share Arrow's and polars' own.

    glibc keeps it per thread, up to eight such places per core, and what one holds another can't use: with four cores a
    load of records of 16 MiB took 1.4 GiB instead of 0.7. Python's lock lets hardly two threads ask at once anyhow.
    Other C libraries have no such setting, and no such places.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS)
