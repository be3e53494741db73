"""Entries of a Delta log, written by ourselves.

Belongs here: the actions of an entry, its publication if there is none of that version, and which tables may be written
so.
Does not belong here: when a commit is tried again (`delta.py`, `upkeep.py`), data files (`data_files.py`).

The entry of a version is there once or not at all (`TableStore.publish`): of two writers one gets it. What the other
does then depends on what the entry says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, Schema

from telematics_assets.catalog import TableName
from telematics_assets.errors import TableMovedError, TableUnsupportedError
from telematics_assets.lakehouse.stores import TableStore

Action = Mapping[str, Any]

_NTZ = "timestampNtz"
#: Features of writer versions before there were names for them, by the version that brought them.
_OF_VERSION = {
    2: ("appendOnly", "invariants"),
    3: ("checkConstraints",),
    4: ("changeDataFeed", "generatedColumns"),
    5: ("columnMapping",),
    6: ("identityColumns",),
}
#: What a table may be able to do; what it does of that is looked at by `refuse_what_rows_must_obey`.
_KNOWN = {
    *(feature for features in _OF_VERSION.values() for feature in features),
    _NTZ,
    "deletionVectors",
    "v2Checkpoint",
    "vacuumProtocolCheck",
}
_LAST_VERSION = 7
#: A column that can hold anything, in a table's schema.
_VARIANT = re.compile(r'"(?:type|elementType|valueType)"\s*:\s*"variant"')
#: Metadata of a column that a writer must obey.
_RULES = {
    "delta.invariants": "an invariant",
    "delta.generationExpression": "a generated value",
    "delta.identity.start": "an identity",
}


def entry_path(path: str, version: int) -> str:
    """Where the entry of a version is."""
    return f"{path}/_delta_log/{version:020d}.json"


def publish(store: TableStore, path: str, version: int, actions: Sequence[Action]) -> bool:
    """Write the entry of a version if there is none; whether it is there by this call."""
    # Of characters that JSON escapes in two halves some readers make two others.
    text = "\n".join(json.dumps(action, ensure_ascii=False, separators=(",", ":")) for action in actions)
    return store.publish(entry_path(path, version), f"{text}\n".encode())


def require(store: TableStore, handle: DeltaTable, name: TableName, path: str) -> None:
    """Raise if the table is not there any more: an entry would be without a beginning, or in another table.

    Args:
        store: The place of the tables.
        handle: The table.
        name: Its full name.
        path: Where it is.

    Raises:
        TableMovedError: If its log is gone, or is that of a table which was created in its place.
    """
    version = handle.version()
    if not _is_there(store, path, version):
        raise TableMovedError(
            f"{name} at {path} has lost its log: version {version} is not there. Nothing was written. Restore it, or "
            "start the stream anew (telematics reset)."
        )
    try:
        # A table that was created meanwhile has its beginning still.
        begun = _table_id(store.read_log(entry_path(path, 0)))
    except FileNotFoundError:
        return
    mine = str(handle.metadata().id)
    if begun in (mine, None):
        return
    # A later version may have replaced it, also before the handle was opened.
    newest = str(DeltaTable(path, storage_options=store.options).metadata().id)
    if newest != mine:
        raise TableMovedError(
            f"{name} at {path} is another table by now, with the id {newest}. Nothing was written. Run again; if its "
            "stream does not take it, start the stream anew (telematics reset)."
        )


def _is_there(store: TableStore, path: str, version: int) -> bool:
    for entry in (entry_path(path, version), f"{path}/_delta_log/{version:020d}.checkpoint.parquet"):
        try:
            store.read_log(entry)
        except FileNotFoundError:
            continue
        return True
    return False


def _table_id(entry: bytes) -> str | None:
    for line in entry.splitlines():
        if b'"metaData"' in line and (found := json.loads(line).get("metaData")):
            return str(found["id"])
    return None


def commit_info(operation: str, read_version: int, now_ms: int, **more: Any) -> Action:
    """The action that says who commits what."""
    info = {"timestamp": now_ms, "operation": operation, "readVersion": read_version, "engineInfo": "telematics_assets"}
    return {"commitInfo": {**info, **more}}


def transactions(positions: Mapping[str, int]) -> list[Action]:
    """The actions that move positions, by application id."""
    return [{"txn": {"appId": app, "version": position}} for app, position in positions.items()]


def removals(files: Sequence[Mapping[str, Any]], now_ms: int, *, data_change: bool) -> list[Action]:
    """The actions that take files out.

    Args:
        files: With `path` and `size_bytes`, as the table's handle gives them.
        now_ms: The time, milliseconds.
        data_change: Whether their rows go with them.
    """
    return [
        {
            "remove": {
                "path": file["path"],
                "dataChange": data_change,
                "deletionTimestamp": now_ms,
                "extendedFileMetadata": True,
                "partitionValues": {},
                "size": file["size_bytes"],
            }
        }
        for file in files
    ]


def schema_change(handle: DeltaTable, schema: pa.Schema, *, replace: bool) -> list[Action]:
    """The actions that make a table's schema another one; none if it is that already.

    Args:
        handle: The table.
        schema: The columns to have, without those that stay as they are if `replace` is false.
        replace: Whether the columns of the table go.
    """
    before = json.loads(handle.schema().to_json())
    there = set() if replace else {field["name"] for field in before["fields"]}
    given = json.loads(Schema.from_arrow(pa.schema(list(schema))).to_json())["fields"]
    new = [field for field in given if field["name"] not in there]
    after = {**before, "fields": new if replace else before["fields"] + new}
    if after == before:
        return []
    actions: list[Action] = [_metadata(handle, after, handle.metadata().configuration)]
    if any(map(_has_naive_timestamp, new)):
        actions = _with_naive_timestamps(handle) + actions
    return actions


def property_change(handle: DeltaTable, key: str, value: str) -> Action:
    """The action that sets a property; one that asks nothing of readers and writers."""
    return _metadata(handle, json.loads(handle.schema().to_json()), {**handle.metadata().configuration, key: value})


def _metadata(handle: DeltaTable, schema: Mapping[str, Any], configuration: Mapping[str, str | None]) -> Action:
    metadata = handle.metadata()
    return {
        "metaData": {
            "id": str(metadata.id),
            "name": metadata.name,
            "description": metadata.description,
            "format": {"provider": "parquet", "options": {}},
            "schemaString": json.dumps(schema, separators=(",", ":")),
            "partitionColumns": list(metadata.partition_columns),
            "createdTime": metadata.created_time,
            "configuration": {key: value for key, value in configuration.items() if value is not None},
        }
    }


def _has_naive_timestamp(field: Any) -> bool:
    return "timestamp_ntz" in json.dumps(field["type"])


def _with_naive_timestamps(handle: DeltaTable) -> list[Action]:
    protocol = handle.protocol()
    writer = protocol.writer_features
    if writer is not None and _NTZ in writer:
        return []
    if writer is None:
        writer = [f for version, names in _OF_VERSION.items() if version <= protocol.min_writer_version for f in names]
    reader = protocol.reader_features
    if reader is None:
        reader = ["columnMapping"] if protocol.min_reader_version > 1 else []
    raised = {
        "minReaderVersion": 3,
        "minWriterVersion": _LAST_VERSION,
        "readerFeatures": sorted({*reader, _NTZ}),
        "writerFeatures": sorted({*writer, _NTZ}),
    }
    return [{"protocol": raised}]


def refuse_features(handle: DeltaTable, name: TableName, *, replaces: bool) -> None:
    """Raise for a table with features that these entries don't honour.

    Args:
        handle: The table.
        name: Its full name.
        replaces: Whether files are taken out too.

    Raises:
        TableUnsupportedError: The message names them.
    """
    protocol = handle.protocol()
    features = {*(protocol.writer_features or ()), *(protocol.reader_features or ())} - _KNOWN
    if not _VARIANT.search(handle.schema().to_json()):
        # delta-rs gives it to every table with features whose properties it sets.
        features.discard("variantType")
    if replaces:
        # What is removed must be named with its vector.
        features |= {"deletionVectors"} & {*(protocol.reader_features or ())}
    if protocol.min_writer_version > _LAST_VERSION:
        features.add(f"writer version {protocol.min_writer_version}")
    if handle.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        features.add("columnMapping")
    if features:
        raise TableUnsupportedError(
            f"{name} has table features that this engine can't write it with: {', '.join(sorted(features))}. Drop "
            "them, or use the engine that set them."
        )
    if handle.metadata().partition_columns:
        raise TableUnsupportedError(
            f"{name} is partitioned by {', '.join(handle.metadata().partition_columns)}, which this engine doesn't "
            "write. Use the engine that made it, or load into a table of its own."
        )


def refuse_what_rows_must_obey(handle: DeltaTable, name: TableName, *, replaces: bool) -> None:
    """Raise for a table with rules for its rows that nobody here checks.

    Args:
        handle: The table.
        name: Its full name.
        replaces: Whether its columns go, and their rules with them.

    Raises:
        TableUnsupportedError: The message names them.
    """
    prefix = "delta.constraints."
    rules = [f"the constraint {key.removeprefix(prefix)}" for key in _properties(handle) if key.startswith(prefix)]
    for field in () if replaces else json.loads(handle.schema().to_json())["fields"]:
        text = json.dumps(field)
        rules += [f"{rule} of column {field['name']!r}" for key, rule in _RULES.items() if f'"{key}"' in text]
        if _is_strict_inside(field["type"]):
            rules.append(f"NOT NULL inside of column {field['name']!r}")
    if rules:
        raise TableUnsupportedError(
            f"{name} has rules for its rows: {', '.join(rules)}. Drop them: bronze keeps all records."
        )


def _properties(handle: DeltaTable) -> Mapping[str, Any]:
    configuration: Mapping[str, Any] = handle.metadata().configuration
    return configuration


def _is_strict_inside(kind: Any) -> bool:
    if isinstance(kind, str):
        return False
    if kind["type"] == "struct":
        return any(not field["nullable"] or _is_strict_inside(field["type"]) for field in kind["fields"])
    if kind["type"] == "array":
        return not kind["containsNull"] or _is_strict_inside(kind["elementType"])
    return not kind["valueContainsNull"] or _is_strict_inside(kind["keyType"]) or _is_strict_inside(kind["valueType"])
