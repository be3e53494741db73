"""Compaction and VACUUM of a Delta table.

Belongs here: rewriting small files in a commit that nobody overtakes unseen, and the limits of a harmless VACUUM.
Does not belong here: when it is done and what a loader needs first (`autoloader/upkeep.py`), durability (`delta.py`).

Compaction is not delta-rs' own: of two of those at once, each commits, and every row is there twice (deltalake 1.6.6,
also beside the OPTIMIZE of another engine). Here the commit is one log entry, written if absent, after all files that
it replaces were seen in the version before it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, PostCommitHookProperties

from telematics_assets.catalog import TableName, interval_ns
from telematics_assets.errors import CommitConflictError, SchemaError, TableError
from telematics_assets.lakehouse import log
from telematics_assets.lakehouse.data_files import write_data_files
from telematics_assets.lakehouse.rewriting import CHANGE_TYPE
from telematics_assets.lakehouse.statistics import listed_columns
from telematics_assets.lakehouse.stores import TableStore

#: Removed files, and files that no log entry names, stay at least this long: a reader or a killed writer may need them.
RETENTION_HOURS = 7 * 24

_RETENTION_PROPERTY = "delta.deletedFileRetentionDuration"
_HOUR_NS = 3_600_000_000_000
# Expired log entries go only when the loader has noted what was in them.
_NO_CLEANING = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)
_TRIES = 10
_BATCH_ROWS, _BATCH_BYTES = 8_192, 16 << 20
#: A group becomes one file, however large it turns out to be: of two, the next compaction would take one again.
_ONE_FILE_BYTES = 1 << 62


def compact(handle: DeltaTable, name: TableName, path: str, store: TableStore, target_bytes: int) -> bool:
    """Write neighbouring small files together up to a size; rows keep their order and values.

    Args:
        handle: The table; shows the newest version afterwards.
        name: Full name of the table.
        path: Where it is.
        store: The place of the tables.
        target_bytes: Size of a file.

    Returns:
        Whether there was anything to do.

    Raises:
        CommitConflictError: If one of the files was taken out meanwhile, or the table's columns changed.
        TableUnsupportedError: If the table has a feature that this can't be done with.
    """
    if handle.metadata().partition_columns:
        return False
    log.refuse_features(handle, name, replaces=True)
    files = pa.table(handle.get_add_actions()).select(["path", "size_bytes", "num_records"]).to_pylist()
    groups = _groups(files, target_bytes)
    if not groups:
        return False
    adds: list[Mapping[str, Any]] = []
    for group in groups:
        adds += [{**add, "dataChange": False} for add in _rewrite(handle, name, path, store, group)]
    replaced = [file for group in groups for file in group]
    _commit(handle, name, path, store, replaced, adds)
    return True


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
    removed = handle.vacuum(
        retention_hours=hours,
        dry_run=False,
        enforce_retention_duration=False,
        full=True,
        post_commithook_properties=_NO_CLEANING,
    )
    handle.update_incremental()
    return len(removed)


def _groups(files: Sequence[Mapping[str, Any]], target_bytes: int) -> list[list[Mapping[str, Any]]]:
    """Runs of neighbours, in the order in which a table is read, that fit into one file each."""
    groups: list[list[Mapping[str, Any]]] = [[]]
    size = 0
    for file in files:
        if groups[-1] and size + file["size_bytes"] > target_bytes:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file["size_bytes"]
    return [group for group in groups if len(group) > 1]


def _rewrite(
    handle: DeltaTable, name: TableName, path: str, store: TableStore, group: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Write the rows of some files into one, and give the entry for it."""
    schema = pa.schema(handle.schema())
    configuration = handle.metadata().configuration
    properties = {key: value for key, value in configuration.items() if value is not None}
    rows = chain.from_iterable(file_rows(name, path, store, file, schema) for file in group)
    adds = write_data_files(store, path, schema, rows, listed_columns(schema, properties), _ONE_FILE_BYTES)
    expected = sum(file["num_records"] for file in group)
    written = sum(int(json.loads(add["stats"])["numRecords"]) for add in adds)
    if written != expected:
        raise TableError(
            f"Compacting {name} read {written} rows of {expected} that its log counts. Nothing was changed. Keep the "
            "table and its _delta_log as they are and report this."
        )
    return adds


def file_rows(
    name: TableName,
    path: str,
    store: TableStore,
    file: Mapping[str, Any],
    schema: pa.Schema,
    *,
    others: bool = False,
) -> Iterator[pa.RecordBatch]:
    """The rows of a data file in a table's schema, batch by batch, in bounded memory.

    Args:
        name: The table's full name.
        path: Where it is.
        store: The place of the tables.
        file: With `path`.
        schema: The columns; those that the file has not are null.
        others: Whether the file may have others.

    Raises:
        SchemaError: If it has others and may not.
    """
    names = schema.names if others else None
    source = pq.ParquetFile(store.open_file(f"{path}/{unquote(file['path'])}"))
    for number in range(source.metadata.num_row_groups):
        group = source.metadata.row_group(number)
        row_bytes = group.total_byte_size // max(group.num_rows, 1)
        # One row group at a time: values that stand in dictionaries take more memory than its size says.
        for batch in source.iter_batches(max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(row_bytes, 1))), [number], names):
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            # Spark's merges leave it in data files, without a value.
            columns.pop(CHANGE_TYPE, None)
            if not others and not set(columns) <= set(schema.names):
                raise SchemaError(f"{file['path']} of {name} has columns that the table has not. It is left as it is.")
            try:
                whole = [
                    columns[field.name].cast(field.type)
                    if field.name in columns
                    else pa.nulls(batch.num_rows, field.type)
                    for field in schema
                ]
            except pa.ArrowException as error:
                raise SchemaError(
                    f"{file['path']} of {name} can't be rewritten: {error}. It is left as it is."
                ) from None
            yield pa.record_batch(whole, schema=schema)


def _commit(
    handle: DeltaTable,
    name: TableName,
    path: str,
    store: TableStore,
    replaced: Sequence[Mapping[str, Any]],
    adds: Sequence[Mapping[str, Any]],
) -> None:
    """Replace files by others in one log entry, at the version behind one that has them all."""
    began = handle.version()
    columns, protocol = handle.schema().to_json(), repr(handle.protocol())
    now = time.time_ns() // 1_000_000
    gone = log.removals(replaced, now, data_change=False)
    for _ in range(_TRIES):
        there = set(pa.table(handle.get_add_actions()).column("path").to_pylist())
        if not {file["path"] for file in replaced} <= there:
            raise CommitConflictError(
                f"Files of {name} were taken out while they were compacted, after version {began}. Nothing was changed."
            )
        if handle.schema().to_json() != columns or repr(handle.protocol()) != protocol:
            raise CommitConflictError(f"The columns of {name} changed while it was compacted. Nothing was changed.")
        info = log.commit_info(
            "OPTIMIZE",
            handle.version(),
            now,
            operationParameters={"predicate": "[]"},
            operationMetrics={"numAddedFiles": str(len(adds)), "numRemovedFiles": str(len(gone))},
        )
        actions = [info, *gone, *({"add": add} for add in adds)]
        log.require(store, handle, name, path)
        if log.publish(store, path, handle.version() + 1, actions):
            handle.update_incremental()
            return
        # A load was faster with this version: look whether all is still as it was read, and take the next one.
        handle.update_incremental()
    raise CommitConflictError(f"Other writers commit to {name} faster than its compaction can. Nothing was changed.")
