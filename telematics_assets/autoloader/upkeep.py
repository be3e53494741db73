"""Maintenance of one stream: its table, its checkpoint and its landing folder.

Belongs here: the order of the steps, and what a loader must have noted before a log entry may go.
Does not belong here: the steps themselves (`lakehouse/`, `checkpoint.py`, `cleaning.py`), when it runs, Dagster.

Every step is safe when killed and beside running loads. One that loses against another writer is tried again, then
left with a note: nothing waits for maintenance.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from telematics_assets.autoloader.checkpoint import Checkpoint, Metadata
from telematics_assets.autoloader.cleaning import Cleaned
from telematics_assets.catalog import FileStream, TableName
from telematics_assets.engines.base import MaintenanceReport, Progress, ProgressListener
from telematics_assets.errors import CommitConflictError, OptionError, SchemaError
from telematics_assets.lakehouse.base import Table

_TRIES = 3


def maintain(
    stream: FileStream,
    name: TableName,
    checkpoint: Checkpoint,
    settled: Callable[[], tuple[Metadata, Table] | None],
    clean: Callable[[], Cleaned],
    tell: ProgressListener,
) -> MaintenanceReport:
    """Do all steps for one stream. See `Engine.maintain`.

    Args:
        stream: The stream.
        name: Full name of its table.
        checkpoint: Its checkpoint.
        settled: Gives its identity and its table, verified; None if the stream never began.
        clean: Lets `clean_source` do all that is due.
        tell: Told what is done.
    """
    started = time.monotonic()
    report = MaintenanceReport(stream.name, str(name))
    there = settled()
    if there is None:
        return replace(report, notes=("the stream has no table yet",), seconds=time.monotonic() - started)
    notes: list[str] = []
    metadata, table = there
    files, size = table.size()
    report = replace(report, files_before=files, bytes_before=size)

    tell(Progress("compact", f"compacting {files} data files of {name}"))
    for left in reversed(range(_TRIES)):
        try:
            table.compact()
            break
        except CommitConflictError as error:
            if not left:
                notes.append(f"compaction is left for the next time: {error}")
            metadata, table = settled() or (metadata, table)
        except SchemaError as error:
            notes.append(f"the table can't be compacted: {error}")
            break
    files, size = table.size()
    report = replace(report, files_after=files, bytes_after=size)

    tell(Progress("vacuum", f"deleting files that {name} no longer needs"))
    try:
        removed, removed_bytes = table.vacuum()
        report = replace(report, files_removed=removed, bytes_removed=removed_bytes)
    except (CommitConflictError, OptionError) as error:
        notes.append(f"VACUUM is left for the next time: {error}")

    tell(Progress("log", f"writing a log checkpoint of {name}"))
    # Verified once more: what the entries say that may go now is noted first.
    metadata, table = settled() or (metadata, table)
    checkpoint.publish_verified(metadata, table.version)
    entries = table.trim_log()

    tell(Progress("ledger", f"merging the ledger of {stream.name}"))
    before, after = checkpoint.merge(metadata)

    tell(Progress("clean", f"looking for files of {stream.name} that clean_source may clean"))
    cleaned = clean()
    return replace(
        report,
        table_version=table.version,
        log_entries_removed=entries,
        ledger_parts_before=before,
        ledger_parts_after=after,
        sources_moved=cleaned.moved,
        sources_deleted=cleaned.deleted,
        notes=tuple(notes),
        seconds=time.monotonic() - started,
    )
