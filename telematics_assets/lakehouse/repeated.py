"""Keys that a table holds more than once.

Belongs here: finding them in bounded memory, whatever the table's size.
Does not belong here: which columns are a key, what follows from it (`replica_checks.py`), Dagster.

Keys are hashed and counted in passes, so that a pass holds a bounded number of hashes; only rows whose hash is there
twice are then compared by their keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from telematics_assets.lakehouse.base import Table

#: Hashes of one pass: 128 MB, and as much again to sort them.
PASS_ROWS = 16_000_000
#: Keys that are compared in full; a table with more of them is broken anyway.
MOST_COMPARED = 100_000
_EXAMPLES = 5


def repeated(table: Table, key: Sequence[str], pass_rows: int = PASS_ROWS) -> tuple[int, tuple[str, ...]]:
    """How many keys are there more than once, and some of them as text.

    Args:
        table: The table.
        key: Columns of the key.
        pass_rows: Hashes that one pass may hold, about.
    """
    passes = -(-table.count() // pass_rows) or 1
    found: list[np.ndarray[tuple[int], np.dtype[np.uint64]]] = []
    for number in range(passes):
        parts = []
        for rows in table.stream(key):
            hashes = pl.DataFrame(rows).hash_rows(seed=0).to_numpy()
            parts.append(hashes[hashes % passes == number] if passes > 1 else hashes)
        hashes = np.sort(np.concatenate(parts)) if parts else np.array([], np.uint64)
        found.append(np.unique(hashes[1:][hashes[1:] == hashes[:-1]]))
    suspects = np.concatenate(found)
    if not len(suspects):
        return 0, ()
    compared = pl.Series(suspects[:MOST_COMPARED]).implode()
    frames = map(pl.DataFrame, table.stream(key))
    alike = pl.concat([frame.filter(frame.hash_rows(seed=0).is_in(compared)) for frame in frames])
    twice = alike.group_by(list(key)).len().filter(pl.col("len") > 1)
    examples = tuple(", ".join(map(str, row)) for row in twice.head(_EXAMPLES).select(list(key)).iter_rows())
    # Beyond what is compared, every suspect counts: two keys of one hash are a rare accident.
    return twice.height + max(len(suspects) - MOST_COMPARED, 0), examples
