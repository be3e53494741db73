"""Compaction and VACUUM of a Delta table.

Belongs here: rewriting small files in a commit that nobody overtakes unseen, and the limits of a harmless VACUUM.
Does not belong here: when it is done and what a loader needs first (`autoloader/upkeep.py`), durability (`delta.py`).

Compaction is not delta-rs' own: of two of those at once, each commits, and every row is there twice (deltalake 1.6.6,
also beside the OPTIMIZE of another engine). Here the commit is one log entry, written if absent, after all files that
it replaces were seen in the version before it.
"""

from __future__ import annotations

import io
import json
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, PostCommitHookProperties, convert_to_deltalake

from telematics_assets.catalog import TableName, interval_ns
from telematics_assets.errors import CommitConflictError, SchemaError, TableError, TableUnsupportedError
from telematics_assets.lakehouse.stores import TableStore
from telematics_assets.lakehouse.types import STATISTICS_PROPERTY

#: Removed files, and files that no log entry names, stay at least this long: a reader or a killed writer may need them.
RETENTION_HOURS = 7 * 24

_RETENTION_PROPERTY = "delta.deletedFileRetentionDuration"
_HOUR_NS = 3_600_000_000_000
# Expired log entries go only when the loader has noted what was in them.
_NO_CLEANING = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)
#: Features of a table whose files can be replaced by a plain entry.
_PLAIN_FEATURES = {
    "appendOnly",
    "invariants",
    "checkConstraints",
    "timestampNtz",
    "v2Checkpoint",
    "vacuumProtocolCheck",
    # An entry that changes no data has no changes to feed.
    "changeDataFeed",
}
#: Tables that list no features have all up to this writer version: change data feed, and generated columns, which are
#: rewritten as they are.
_PLAIN_WRITER_VERSION = 4
_TRIES = 10
_BATCH_ROWS = 8_192
_ROW_GROUP_BYTES = 64 << 20


def compact(
    handle: DeltaTable, name: TableName, path: str, store: TableStore, target_bytes: int, row_group_rows: int
) -> bool:
    """Write neighbouring small files together up to a size; rows keep their order and values.

    Args:
        handle: The table; shows the newest version afterwards.
        name: Full name of the table.
        path: Where it is.
        store: The place of the tables.
        target_bytes: Size of a file.
        row_group_rows: Rows of a row group.

    Returns:
        Whether there was anything to do.

    Raises:
        CommitConflictError: If one of the files was taken out meanwhile, or the table's columns changed.
        TableUnsupportedError: If the table has a feature that this can't be done with.
    """
    protocol = handle.protocol()
    features = {*(protocol.writer_features or ()), *(protocol.reader_features or ())} - _PLAIN_FEATURES
    if features or (protocol.min_writer_version > _PLAIN_WRITER_VERSION and not protocol.writer_features):
        named = ", ".join(sorted(features)) or f"writer version {protocol.min_writer_version}"
        raise TableUnsupportedError(
            f"{name} has table features that this engine can't maintain it with: {named}. Maintain it with the engine "
            "that set them, or drop them."
        )
    if handle.metadata().partition_columns:
        return False
    files = pa.table(handle.get_add_actions()).select(["path", "size_bytes", "num_records"]).to_pylist()
    groups = _groups(files, target_bytes)
    if not groups:
        return False
    folder = f"compacted-{uuid.uuid4().hex}"
    adds: list[dict[str, Any]] = []
    for number, group in enumerate(groups):
        scratch = f"{folder}/{number}"
        written = _rewrite(handle, name, path, store, group, f"{path}/{scratch}", row_group_rows)
        adds += [{**add, "path": f"{scratch}/{add['path']}", "dataChange": False} for add in written]
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
    handle: DeltaTable,
    name: TableName,
    path: str,
    store: TableStore,
    group: Sequence[Mapping[str, Any]],
    scratch: str,
    row_group_rows: int,
) -> list[dict[str, Any]]:
    """Write the rows of some files as a table of its own, whose log gives the entries for the new files."""
    schema = pa.schema(handle.schema())
    properties = handle.metadata().configuration
    buffer = io.BytesIO()
    # Not delta-rs' writer: it takes the batches of a stream in turns, so that rows change their order.
    with pq.ParquetWriter(buffer, schema, compression="snappy", store_schema=False) as writer:
        for part in _gathered(_batches(name, path, store, group, schema), schema, row_group_rows):
            writer.write_table(part)
    store.make_room(scratch)
    store.publish(f"{scratch}/part-{uuid.uuid4().hex}.snappy.parquet", buffer.getvalue())
    statistics = {key: properties[key] for key in (STATISTICS_PROPERTY,) if key in properties}
    convert_to_deltalake(scratch, configuration=statistics, storage_options=store.options)
    lines = store.read_log(f"{scratch}/_delta_log/{0:020d}.json").split(b"\n")
    actions = [json.loads(line) for line in lines if line.strip()]
    adds: list[dict[str, Any]] = [action["add"] for action in actions if "add" in action]
    expected = sum(file["num_records"] for file in group)
    rows = sum(int(json.loads(add["stats"])["numRecords"]) for add in adds)
    if rows != expected:
        raise TableError(
            f"Compacting {name} read {rows} rows of {expected} that its log counts. Nothing was changed. Keep the "
            "table and its _delta_log as they are and report this."
        )
    store.drop(f"{scratch}/_delta_log")
    return adds


def _gathered(batches: Iterable[pa.RecordBatch], schema: pa.Schema, rows: int) -> Iterator[pa.Table]:
    """Batches put together to row groups, by rows and by bytes."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        if sum(b.num_rows for b in held) >= rows or sum(b.nbytes for b in held) >= _ROW_GROUP_BYTES:
            yield pa.Table.from_batches(held, schema)
            held = []
    if held:
        yield pa.Table.from_batches(held, schema)


def _batches(
    name: TableName,
    path: str,
    store: TableStore,
    group: Iterable[Mapping[str, Any]],
    schema: pa.Schema,
) -> Iterator[pa.RecordBatch]:
    for file in group:
        source = pq.ParquetFile(io.BytesIO(store.read_log(f"{path}/{unquote(file['path'])}")))
        for batch in source.iter_batches(_BATCH_ROWS):
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            if not set(columns) <= set(schema.names):
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
    gone = [
        {
            "path": file["path"],
            "dataChange": False,
            "deletionTimestamp": now,
            "extendedFileMetadata": True,
            "partitionValues": {},
            "size": file["size_bytes"],
        }
        for file in replaced
    ]
    for _ in range(_TRIES):
        there = set(pa.table(handle.get_add_actions()).column("path").to_pylist())
        if not {file["path"] for file in replaced} <= there:
            raise CommitConflictError(
                f"Files of {name} were taken out while they were compacted, after version {began}. Nothing was changed."
            )
        if handle.schema().to_json() != columns or repr(handle.protocol()) != protocol:
            raise CommitConflictError(f"The columns of {name} changed while it was compacted. Nothing was changed.")
        info = {
            "timestamp": now,
            "operation": "OPTIMIZE",
            "operationParameters": {"predicate": "[]"},
            "readVersion": handle.version(),
            "engineInfo": "telematics_assets",
            "operationMetrics": {"numAddedFiles": str(len(adds)), "numRemovedFiles": str(len(gone))},
        }
        actions = [{"commitInfo": info}, *({"remove": file} for file in gone), *({"add": dict(add)} for add in adds)]
        text = "\n".join(json.dumps(action, separators=(",", ":")) for action in actions)
        entry = f"{path}/_delta_log/{handle.version() + 1:020d}.json"
        if store.publish(entry, f"{text}\n".encode()):
            handle.update_incremental()
            return
        # A load was faster with this version: look whether all is still as it was read, and take the next one.
        handle.update_incremental()
    raise CommitConflictError(f"Other writers commit to {name} faster than its compaction can. Nothing was changed.")
