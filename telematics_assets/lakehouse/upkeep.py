"""Compaction and VACUUM of a Delta table, by delta-rs.

Belongs here: how delta-rs is asked, and the limits that keep it harmless.
Does not belong here: when it is asked and what a loader needs first (`autoloader/upkeep.py`), durability (`delta.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

from deltalake import DeltaTable, PostCommitHookProperties, WriterProperties

from telematics_assets.catalog import interval_ns

#: Removed files, and files that no log entry names, stay at least this long: a reader or a killed writer may need them.
RETENTION_HOURS = 7 * 24

_RETENTION_PROPERTY = "delta.deletedFileRetentionDuration"
_HOUR_NS = 3_600_000_000_000
# Expired log entries go only when the loader has noted what was in them.
_NO_CLEANING = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)


def compact(handle: DeltaTable, target_bytes: int, row_group_rows: int) -> None:
    """Write small files together up to a size; rows keep their order.

    Args:
        handle: The table; shows the newest version afterwards.
        target_bytes: Size of a file.
        row_group_rows: Rows of a row group.
    """
    handle.optimize.compact(
        target_size=target_bytes,
        # Each task holds the row group that it writes.
        max_concurrent_tasks=1,
        writer_properties=WriterProperties(compression="SNAPPY", max_row_group_size=row_group_rows),
        post_commithook_properties=_NO_CLEANING,
    )
    handle.update_incremental()


def vacuum(handle: DeltaTable, properties: Mapping[str, str]) -> int:
    """Delete files that no version within the retention needs, and count them.

    Args:
        handle: The table; shows the newest version afterwards.
        properties: The table's; a retention there counts if it is longer than ours.
    """
    hours = RETENTION_HOURS
    if _RETENTION_PROPERTY in properties:
        hours = max(hours, -(-interval_ns(_RETENTION_PROPERTY, properties[_RETENTION_PROPERTY]) // _HOUR_NS))
    # Not the lite way: it knows only what the log removed, and attempts that were killed are in no log.
    removed = handle.vacuum(retention_hours=hours, dry_run=False, full=True, post_commithook_properties=_NO_CLEANING)
    handle.update_incremental()
    return len(removed)
