"""Delta tables in local folders, by delta-rs.

Belongs here: opening, creating, appending, reading the log, durability, and the guards around what delta-rs does
silently.
Does not belong here: what the rows mean, checkpoints, Dagster.

Guards: delta-rs casts on append (2.5 becomes 2 in an integer column), so a schema that differs from the table's is
refused
here; it does not fsync, so commits are made durable here; conflicts are only seen through the handle that read the
position.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
from deltalake import CommitProperties, DeltaTable, Transaction, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from telematics_assets.catalog import BATCH_ID, SOURCE_FILE, SOURCE_FILE_MODIFIED_AT, TableName, is_name
from telematics_assets.errors import (
    CommitConflictError,
    SchemaError,
    TableError,
    TableMovedError,
    TableUnsupportedError,
    VolumeUnavailableError,
)
from telematics_assets.lakehouse.base import Commit
from telematics_assets.lakehouse.types import storable
from telematics_assets.volumes.local import sync_folder, translate

#: Size at which a new data file of the same commit is begun.
TARGET_FILE_BYTES = 128 << 20
#: Rows of a row group. The writer holds one in memory: with Delta's default of a million, loading took half a GiB more.
ROW_GROUP_ROWS = 131_072

_OWN_KEYS = {"timestamp", "operation", "operationParameters", "operationMetrics", "engineInfo", "clientVersion"}


class DeltaLakehouse:
    """Delta tables below one local folder, at `<root>/<catalog>/<schema>/<table>`."""

    def __init__(self, root: Path) -> None:
        """Use a folder; it is created at the first write."""
        self._root = Path(os.path.abspath(root))

    @property
    def uri(self) -> str:
        """The folder's absolute path."""
        return str(self._root)

    def tables(self, catalog: str, schema: str) -> Sequence[TableName]:
        """See `Lakehouse.tables`."""
        folder = self._root / catalog / schema
        if not folder.is_dir():
            return []
        names = sorted(p.name for p in folder.iterdir() if (p / "_delta_log").is_dir())
        return [TableName(catalog, schema, name) for name in names if is_name(name)]

    def open(self, name: TableName) -> DeltaLakeTable | None:
        """See `Lakehouse.open`."""
        path = self._path(name)
        if not os.path.isdir(path):
            return None
        try:
            return DeltaLakeTable(name, path, DeltaTable(path))
        except TableNotFoundError:
            return None
        except DeltaError as error:
            raise TableError(
                f"{name} at {path} can't be opened: {_line(error)}. Restore its _delta_log, or move the folder away."
            ) from error

    def drop(self, name: TableName) -> None:
        """See `Lakehouse.drop`."""
        path = self._path(name)
        # Out of sight in one step: a half deleted table is never seen.
        hidden = f"{os.path.dirname(path)}/.{name.table}.{uuid.uuid4().hex}.dropped"
        try:
            os.rename(path, hidden)
        except FileNotFoundError:
            return
        except OSError as error:
            raise translate(error, path) from error
        sync_folder(os.path.dirname(path))
        shutil.rmtree(hidden, ignore_errors=True)

    def create(self, name: TableName, schema: pa.Schema, comment: str, properties: Mapping[str, str]) -> DeltaLakeTable:
        """See `Lakehouse.create`."""
        path = self._path(name)
        try:
            os.makedirs(path, exist_ok=True)
            handle = DeltaTable.create(
                path,
                schema,
                mode="error",
                name=name.table,
                description=comment,
                configuration=dict(properties),
                raise_if_key_not_exists=False,
                # With retries, the one that comes second commits its own identity as version 1.
                commit_properties=CommitProperties(max_commit_retries=0),
            )
        except OSError as error:
            raise translate(error, path) from error
        except DeltaError as error:
            table = self.open(name)
            if table is None:
                raise TableError(f"{name} can't be created at {path}: {_line(error)}.") from error
            return table
        table = DeltaLakeTable(name, path, handle)
        table.make_durable(Commit(0, "CREATE TABLE"))
        current = path
        while current != str(self._root.parent):
            current = os.path.dirname(current)
            sync_folder(current)
        return table

    def _path(self, name: TableName) -> str:
        return str(self._root / name.location)


class DeltaLakeTable:
    """One open handle on a Delta table. See `lakehouse.base.Table`."""

    def __init__(self, name: TableName, path: str, handle: DeltaTable) -> None:
        self._name = name
        self._path = path
        self._handle = handle

    @property
    def name(self) -> TableName:
        """Full name."""
        return self._name

    @property
    def uri(self) -> str:
        """The table's folder."""
        return self._path

    @property
    def id(self) -> str:
        """The Delta table id."""
        return str(self._handle.metadata().id)

    @property
    def version(self) -> int:
        """Delta version of this snapshot."""
        return self._handle.version()

    @property
    def schema(self) -> pa.Schema:
        """Columns with their comments."""
        return pa.schema(self._handle.schema())

    @property
    def comment(self) -> str | None:
        """The table's comment."""
        return self._handle.metadata().description

    @property
    def properties(self) -> Mapping[str, str]:
        """Table properties."""
        return {key: value for key, value in self._handle.metadata().configuration.items() if value is not None}

    def position(self, app_id: str) -> int | None:
        """See `Table.position`."""
        return self._handle.transaction_version(app_id)

    def commits(self, after: int) -> Sequence[Commit]:
        """See `Table.commits`."""
        return [self._commit(version) for version in range(after + 1, self.version + 1)]

    def append(
        self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], app_id: str, version: int, info: Mapping[str, str]
    ) -> Commit:
        """See `Table.append`."""
        self._refuse_casts(schema)
        failure: list[BaseException] = []
        rows = 0

        def watched() -> Iterator[pa.RecordBatch]:
            # delta-rs turns an exception of the stream into text; the original is kept to be raised again.
            nonlocal rows
            try:
                for batch in batches:
                    rows += batch.num_rows
                    yield batch
            except GeneratorExit:
                # delta-rs gave up for a reason of its own, which it raises itself.
                raise
            except BaseException as error:
                failure.append(error)
                raise

        try:
            write_deltalake(
                self._handle,
                pa.RecordBatchReader.from_batches(schema, watched()),
                mode="append",
                schema_mode="merge",
                target_file_size=TARGET_FILE_BYTES,
                writer_properties=WriterProperties(compression="SNAPPY", max_row_group_size=ROW_GROUP_ROWS),
                commit_properties=CommitProperties(
                    custom_metadata=dict(info), app_transactions=[Transaction(app_id, version)]
                ),
            )
        except CommitFailedError as error:
            raise _conflict(self._name, error) from error
        except (DeltaError, OSError) as error:
            if failure:
                raise failure[0] from None
            raise _write_error(self._name, error) from error
        commit = self._commit(self.version)
        if commit.rows != rows or commit.transactions.get(app_id) != version:
            raise TableError(
                f"{self._name} version {commit.version} holds {commit.rows} rows of {rows} that were written. "
                "Keep the table and its _delta_log as they are and report this."
            )
        return commit

    def set_property(self, key: str, value: str) -> None:
        """See `Table.set_property`."""
        try:
            self._handle.alter.set_table_properties({key: value}, raise_if_not_exists=False)
        except CommitFailedError as error:
            raise _conflict(self._name, error) from error
        except (DeltaError, OSError) as error:
            raise _write_error(self._name, error) from error

    def sources(self) -> pa.Table:
        """See `Table.sources`."""
        by_file = self._scan().group_by(SOURCE_FILE)
        frame = by_file.agg(
            pl.col(SOURCE_FILE_MODIFIED_AT).max(), pl.len().cast(pl.Int64).alias("rows"), pl.col(BATCH_ID).max()
        )
        return frame.collect(engine="streaming").to_arrow(compat_level=pl.CompatLevel.oldest())

    def make_durable(self, commit: Commit) -> None:
        """See `Table.make_durable`."""
        try:
            self._sync(commit)
        except OSError as error:
            raise VolumeUnavailableError(
                f"{self._name} version {commit.version} could not be synced to disk: {error}. It is committed; "
                "run again."
            ) from error

    def _sync(self, commit: Commit) -> None:
        folders = {self._path, os.path.join(self._path, "_delta_log")}
        for add in self._adds(commit.version):
            path = os.path.join(self._path, unquote(add["path"]))
            if _sync_file(path) and os.path.getsize(path) == add["size"]:
                folders.add(os.path.dirname(path))
            elif not self._compacted_since(add["path"], commit.version):
                raise TableMovedError(
                    f"{self._name} version {commit.version} names the data file {path}, which is missing or cut short. "
                    "Restore the file, or start the stream anew (telematics reset)."
                )
        _sync_file(self._log_path(commit.version))
        for folder in folders:
            sync_folder(folder)

    def _adds(self, version: int) -> list[dict[str, Any]]:
        return [action["add"] for action in self._actions(version) if "add" in action]

    def _compacted_since(self, path: str, version: int) -> bool:
        """Whether a later version took the file out, as compaction does; VACUUM may have deleted it then."""
        later = range(version + 1, self.version + 1)
        return any(action.get("remove", {}).get("path") == path for v in later for action in self._actions(v))

    def count(self) -> int:
        """See `Table.count`."""
        return int(self._handle.count())

    def size(self) -> tuple[int, int]:
        """See `Table.size`."""
        sizes = pa.table(self._handle.get_add_actions(flatten=True)).column("size_bytes")
        return len(sizes), sum(sizes.to_pylist())

    def read(
        self, columns: Sequence[str] | None = None, limit: int | None = None, since_batch: int | None = None
    ) -> pa.Table:
        """See `Table.read`."""
        names = self.schema.names
        wanted = names if columns is None else [name for name in columns if name in names]
        # Arrow's threads must not call back into Python (deltalake's own file system does): a process that ends soon
        # after a read then aborts, crashes or hangs.
        files = SubTreeFileSystem(self._path, LocalFileSystem())
        dataset = self._handle.to_pyarrow_dataset(filesystem=files)
        rows = None if since_batch is None else ds.field(BATCH_ID) >= since_batch
        if limit is None:
            return dataset.to_table(columns=wanted, filter=rows)
        # Not `dataset.head`: it returns while its threads still read ahead, with the same end.
        parts: list[pa.Table] = []
        for fragment in dataset.get_fragments(filter=rows):
            for group in fragment.split_by_row_group(filter=rows, schema=dataset.schema):
                part = group.to_table(schema=dataset.schema, columns=wanted, filter=rows).slice(0, limit)
                parts.append(part)
                limit -= part.num_rows
                if not limit:
                    return pa.concat_tables(parts)
        return pa.concat_tables(parts) if parts else dataset.schema.empty_table().select(wanted)

    def out_of_range(
        self, column: str, minimum: float | None, maximum: float | None, since_batch: int
    ) -> tuple[int, int, str | None]:
        """See `Table.out_of_range`."""
        value = pl.col(column)
        number = value.cast(pl.Float64, strict=False)
        outside = number.is_null() | number.is_nan()
        if minimum is not None:
            outside |= number < minimum
        if maximum is not None:
            outside |= number > maximum
        rows = self._scan().filter((pl.col(BATCH_ID) >= since_batch) & value.is_not_null())
        result = rows.select(
            checked=pl.len(),
            outside=outside.sum(),
            example=value.filter(outside).first().cast(pl.String),
        ).collect(engine="streaming")
        checked, count, example = result.row(0)
        return int(checked), int(count or 0), example

    def _scan(self) -> pl.LazyFrame:
        # Not `pl.scan_delta`: it takes a path's URL for the path, and finds nothing behind a blank or an umlaut.
        if "deletionVectors" in (self._handle.protocol().reader_features or ()):
            raise TableUnsupportedError(
                f"{self._name} has deletion vectors, which this engine can't read. Drop that table feature."
            )
        schema = pl.DataFrame(self.schema.empty_table()).schema
        paths = pa.table(self._handle.get_add_actions()).column("path").to_pylist()
        if not paths:
            return pl.LazyFrame(schema=schema)
        files = [os.path.join(self._path, unquote(path)) for path in paths]
        return pl.scan_parquet(files, schema=schema, missing_columns="insert", glob=False, hive_partitioning=False)

    def _refuse_casts(self, schema: pa.Schema) -> None:
        mine = self.schema
        for field in schema:
            index = mine.get_field_index(field.name)
            stored = mine.field(index).type if index >= 0 else storable(field.type)
            if stored is None or not _same_storage(field.type, stored):
                raise SchemaError(
                    f"Column {field.name!r} of {self._name} is {stored or 'no type'}, the rows have {field.type}. "
                    "Delta would cast it silently; convert it first or rescue it."
                )

    def _commit(self, version: int) -> Commit:
        operation, info = "", {}
        transactions: dict[str, int] = {}
        rows = files = size = 0
        removes = False
        for action in self._actions(version):
            if "commitInfo" in action:
                entry = action["commitInfo"]
                operation = str(entry.get("operation", ""))
                info = {key: str(value) for key, value in entry.items() if key not in _OWN_KEYS}
            elif "txn" in action:
                transactions[action["txn"]["appId"]] = int(action["txn"]["version"])
            elif "add" in action and action["add"].get("dataChange", True):
                files += 1
                size += int(action["add"]["size"])
                rows += int(json.loads(action["add"].get("stats") or "{}").get("numRecords", 0))
            elif "remove" in action and action["remove"].get("dataChange", True):
                removes = True
        removes = removes or operation.upper() in ("RESTORE", "TRUNCATE")
        return Commit(version, operation, info, transactions, rows, files, size, removes)

    def _actions(self, version: int) -> list[dict[str, Any]]:
        path = self._log_path(version)
        try:
            with open(path, encoding="utf-8") as handle:
                return [json.loads(line) for line in handle if line.strip()]
        except FileNotFoundError:
            raise TableMovedError(
                f"The log of {self._name} no longer holds version {version} ({path}), so it can't be proven "
                "that nobody "
                "changed the rows since. Restore the log entry, or start the stream anew (telematics reset)."
            ) from None
        except OSError as error:
            raise translate(error, path) from error
        except ValueError as error:
            raise TableError(f"The log entry {path} is not readable: {error}. Restore it from a copy.") from error

    def _log_path(self, version: int) -> str:
        return os.path.join(self._path, "_delta_log", f"{version:020d}.json")


def _same_storage(given: pa.DataType, stored: pa.DataType) -> bool:
    texts = (pa.string(), pa.large_string(), pa.string_view())
    return given == stored or (given in texts and stored in texts)


def _sync_file(path: str) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return True


def _conflict(name: TableName, error: Exception) -> CommitConflictError:
    return CommitConflictError(
        f"Another writer committed to {name} first: {_line(error)}. Nothing of this commit is in the table; run again."
    )


def _write_error(name: TableName, error: Exception) -> Exception:
    text = _line(error)
    lowered = text.lower()
    if "permission denied" in lowered or "read-only" in lowered:
        return TableError(f"{name} can't be written: {text}. Check the permissions of the loader's user.")
    if "validation check" in lowered:
        return TableUnsupportedError(f"{name} can't be written: {text}. Drop its constraint: bronze keeps all records.")
    if "feature" in lowered or "unsupported" in lowered:
        return TableUnsupportedError(f"{name} can't be written: {text}. Drop the table feature, or use another engine.")
    return VolumeUnavailableError(f"{name} could not be written: {text}. It may go through later.")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
