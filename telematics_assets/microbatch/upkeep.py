"""Maintenance of one replicated table.

Belongs here: the order of the steps, and what of the log a replication still needs.
Does not belong here: the steps themselves (`lakehouse/`), when they run, Dagster.

Every step is safe when killed and beside a running replication. One that loses against another writer is tried again,
then left with a note: nothing waits for maintenance.
"""

from __future__ import annotations

import time
from dataclasses import replace

from telematics_assets.catalog import ReplicatedTable, TableName
from telematics_assets.engines.base import MaintenanceReport, Progress, ProgressListener
from telematics_assets.errors import CommitConflictError, OptionError, SchemaError
from telematics_assets.lakehouse.base import Commit, Lakehouse, Table
from telematics_assets.microbatch.position import NOTE_INFO, refuse_foreign

_TRIES = 3


def maintain(
    declared: ReplicatedTable, name: TableName, lakehouse: Lakehouse, tell: ProgressListener
) -> MaintenanceReport:
    """Do all steps for one table. See `Engine.maintain`.

    Args:
        declared: The table.
        name: Full name of its bronze table.
        lakehouse: Where that is.
        tell: Told what is done.
    """
    started = time.monotonic()
    report = MaintenanceReport(declared.source, str(name))
    table = lakehouse.open(name)
    if table is None:
        return replace(report, notes=("there is no table yet",), seconds=time.monotonic() - started)
    refuse_foreign(table, declared)
    notes: list[str] = []
    files, size = table.size()
    report = replace(report, files_before=files, bytes_before=size)

    # First, before entries of maintenance stand behind the replication's own.
    entries = 0
    if newest := _newest_of_ours(table):
        # Whoever made it may have been killed before it was on disk, and what is made now will be.
        table.make_durable(newest)
        tell(Progress("log", f"writing a log checkpoint of {name}"))
        entries = table.trim_log()

    tell(Progress("compact", f"compacting {files} data files of {name}"))
    for left in reversed(range(_TRIES)):
        try:
            table.compact()
            break
        except CommitConflictError as error:
            if not left:
                notes.append(f"compaction is left for the next time: {error}")
            table = lakehouse.open(name) or table
        except SchemaError as error:
            notes.append(f"the table can't be compacted: {error}")
            break
    files, size = table.size()

    tell(Progress("vacuum", f"deleting files that {name} no longer needs"))
    removed = removed_bytes = 0
    try:
        removed, removed_bytes = table.vacuum()
    except (CommitConflictError, OptionError) as error:
        notes.append(f"VACUUM is left for the next time: {error}")
    return replace(
        report,
        table_version=table.version,
        files_after=files,
        bytes_after=size,
        files_removed=removed,
        bytes_removed=removed_bytes,
        log_entries_removed=entries,
        notes=tuple(notes),
        seconds=time.monotonic() - started,
    )


def _newest_of_ours(table: Table) -> Commit | None:
    """The newest entry of the log, if it is the replication's own.

    It reads all entries behind its own again, to see whether somebody else changed the table. Those of a table that
    nothing is replicated into would expire one day, and it would have to stop: they are few, and stay.
    """
    newest = table.commits(table.version - 1, held=True)
    return newest[-1] if newest and NOTE_INFO in newest[-1].info else None
