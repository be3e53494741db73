"""Counting the rows of a batch.

Belongs here: what tables answer alike whose rows polars can see. Does not belong here: where the rows are.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from telematics_assets.catalog import SOURCE_FILE


def brought(rows: pl.LazyFrame, names: Sequence[str], marks: Sequence[str]) -> pl.LazyFrame:
    """Counts of rows by file. See `Table.brought`.

    Args:
        rows: The batch's rows.
        names: Their columns.
        marks: See there.
    """
    there = set(names)
    return rows.group_by(SOURCE_FILE).agg(
        pl.len().cast(pl.Int64).alias("rows"),
        *((pl.col(name).count() if name in there else pl.lit(0)).cast(pl.Int64).alias(name) for name in marks),
    )
