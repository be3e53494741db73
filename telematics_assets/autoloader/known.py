"""Every file of a stream with its state, in columns.

Belongs here: what ledger, listing, pending plan and `clean_source` say of a file, brought together for a reader.
Does not belong here: deciding any of it, listing (`discovery.py`), Dagster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from telematics_assets.autoloader.checkpoint import Plan
from telematics_assets.autoloader.discovery import Discovered
from telematics_assets.engines.base import FileState

if TYPE_CHECKING:
    import pyarrow as pa

#: The fields of a `FileRecord`, in order.
RECORD_SCHEMA = {
    "path": pl.String,
    "state": pl.String,
    "reason": pl.String,
    "size": pl.Int64,
    "modified_ns": pl.Int64,
    "batch_id": pl.Int64,
    "rows": pl.Int64,
}


def file_table(
    ledger: pl.DataFrame,
    found: Discovered,
    plan: Plan | None,
    cleaned: pl.DataFrame,
    state: FileState | None,
    limit: int | None,
) -> pa.Table:
    """One row per file, by path.

    Args:
        ledger: The known files.
        found: The folder compared with the ledger.
        plan: The plan that is not committed yet, or None.
        cleaned: What `clean_source` did (`SourceCleaner.reasons`).
        state: Only files in this state; all if None.
        limit: Only the first so many; all if None.
    """
    later = _later(ledger, found, plan)
    changed = _changed(ledger, found.changed)
    known = ledger if state is None else ledger.filter(pl.col("state") == state)
    for decided in (changed, later):
        if not decided.is_empty():
            known = known.join(decided, on="path", how="anti")
    if not later.is_empty():
        changed = changed.join(later, on="path", how="anti")
    parts = [_told(known, cleaned), changed, later]
    whole = pl.concat([part.select(list(RECORD_SCHEMA)) for part in parts])
    if state is not None:
        whole = whole.filter(pl.col("state") == state)
    whole = whole.sort("path") if limit is None else whole.bottom_k(limit, by="path").sort("path")
    return whole.to_arrow(compat_level=pl.CompatLevel.oldest())


def _changed(ledger: pl.DataFrame, changed: pl.DataFrame) -> pl.DataFrame:
    """Known files that have other content now, which is not loaded."""
    now = changed.select("path", now_size="size", now_ns="modified_ns")
    return ledger.join(now, on="path").with_columns(
        state=pl.lit("CHANGED"),
        reason=pl.when(pl.col("batch_id").is_null())
        .then(pl.lit("changed after the stream began, when it was left out; its new content is not loaded"))
        .otherwise(
            pl.format(
                "changed after batch {} took it: {} bytes now; its new content is not loaded", "batch_id", "now_size"
            )
        ),
        size="now_size",
        modified_ns="now_ns",
    )


def _later(ledger: pl.DataFrame, found: Discovered, plan: Plan | None) -> pl.DataFrame:
    """Files that wait for a batch, and entries that can't be files."""
    before = ledger.filter(pl.col("state").is_in(["INGESTED", "SKIPPED_EXISTING"])).select("path", again=True)
    again = pl.lit("it was overwritten; its new rows will stand beside the old ones")
    ready = (
        found.ready.join(before, on="path", how="left") if found.ready.height else found.ready.with_columns(again=None)
    )
    waiting = [(file.path, "DISCOVERED", reason, file.size, file.modified_ns) for file, reason in found.waiting]
    if plan is not None:
        planned = f"planned in batch {plan.batch_id}, which is not committed yet"
        waiting += [(file.path, "DISCOVERED", planned, file.size, file.modified_ns) for file in plan.files]
    problems = [(problem.path, "SKIPPED_CORRUPTED", problem.reason, None, None) for problem in found.problems]
    schema = {name: RECORD_SCHEMA[name] for name in ("path", "state", "reason", "size", "modified_ns")}
    parts = [
        ready.select(
            "path",
            "size",
            "modified_ns",
            state=pl.lit("DISCOVERED"),
            reason=pl.when(pl.col("again").cast(pl.Boolean)).then(again).otherwise(pl.lit(None, pl.String)),
        ).select(list(schema)),
        pl.DataFrame([*waiting, *problems], schema=schema, orient="row"),
    ]
    undecided = pl.concat(parts).unique("path", keep="last")
    return undecided.with_columns(batch_id=pl.lit(None, pl.Int64), rows=pl.lit(None, pl.Int64))


def _told(known: pl.DataFrame, cleaned: pl.DataFrame) -> pl.DataFrame:
    """The known files, with what became of their sources as their reason."""
    if cleaned.is_empty():
        return known
    told = known.join(cleaned.select("path", "batch_id", "cleaned"), on=["path", "batch_id"], how="left")
    # A ledger made from table rows has batch numbers of its own, no sizes, and times in microseconds.
    time = pl.col("modified_ns") // 1000
    by_time = cleaned.select("path", time.alias("time"), rebuilt="cleaned").unique(["path", "time"], keep="last")
    told = told.with_columns(time=pl.when(pl.col("size").is_null()).then(time))
    told = told.join(by_time, on=["path", "time"], how="left")
    return told.with_columns(
        reason=pl.when(pl.col("state") == "INGESTED")
        .then(pl.coalesce("cleaned", "rebuilt", "reason"))
        .otherwise("reason")
    )
