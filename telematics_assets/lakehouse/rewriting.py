"""One merge by primary key that writes the files with changed rows anew, by ourselves and in bounded memory.

Belongs here: which rows of a file change, its rows afterwards, and the change data feed of it.
Does not belong here: which merges are done so (`delta.py`, `merging.py`), the log (`log.py`), Dagster.

A file is read twice: which of its rows change is known before anything is written, so that files without a change stay
as they are. Memory holds what is merged, one row group, and what the two writers gather.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from telematics_assets.lakehouse.data_files import GROUP_BYTES, DataFiles, write_data_files
from telematics_assets.lakehouse.merging import Changes
from telematics_assets.lakehouse.stores import TableStore

#: The column, and the folder, of the change data feed.
CHANGE_TYPE, CHANGE_FOLDER = "_change_type", "_change_data"
#: What becomes of a row: it stays, it goes, or it is replaced by the new row of this number.
_STAYS, _GOES = -2, -1

Fates = npt.NDArray[np.int64]
#: The rows of a data file, batch by batch and each time the same, in the table's schema with added columns.
Reader = Callable[[Mapping[str, Any]], Iterator[pa.RecordBatch]]


class Rewriting:
    """The merge of some changes into some files: first `look`, then `write`.

    Attributes:
        rows: The rows that are merged, in the table's schema with added columns.
        updated: How many rows are replaced; known after `look`.
        deleted: How many go; known after `look`.
    """

    def __init__(self, changes: Changes, mine: pa.Schema, schema: pa.Schema) -> None:
        """Prepare to look keys up.

        Args:
            changes: What is merged.
            mine: The table's schema.
            schema: The same with added columns.
        """
        self.updated = self.deleted = 0
        self._key = list(changes.key)
        self._schema = schema
        self.rows = _shaped(changes.rows, schema)
        keys = pl.DataFrame(changes.rows.select(self._key)).with_columns(__new=pl.int_range(pl.len(), dtype=pl.Int64))
        gone = pl.DataFrame(changes.gone.select(self._key)).with_columns(__new=pl.lit(_GOES, pl.Int64))
        self._fates = pl.concat([keys, gone])
        self._compared = [*changes.compared(mine), *changes.added(mine)]
        self._is_there = np.zeros(changes.rows.num_rows, bool)
        self._changed: list[tuple[Mapping[str, Any], Fates]] = []

    @property
    def inserted(self) -> pa.Table:
        """The rows whose key no file has."""
        return self.rows if not self._is_there.any() else self.rows.filter(pa.array(~self._is_there))

    def look(self, files: Sequence[Mapping[str, Any]], read: Reader) -> list[Mapping[str, Any]]:
        """Find out which rows change, and give the files that have some.

        Args:
            files: The data files that have any of the keys.
            read: Reads one.
        """
        for file in files:
            fates = np.concatenate([np.empty(0, np.int64), *map(self._fates_of, read(file))])
            if (fates != _STAYS).any():
                self._changed.append((file, fates))
            self.updated += int((fates >= 0).sum())
            self.deleted += int((fates == _GOES).sum())
        return [file for file, _ in self._changed]

    def write(
        self, store: TableStore, path: str, read: Reader, listed: Sequence[Any] | None, target_bytes: int, *, feed: bool
    ) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
        """Write the files that have changed rows anew, and new rows behind them; nothing is committed.

        Args:
            store: The place of the tables.
            path: Where the table is.
            read: Reads a file.
            listed: See `write_data_files`.
            target_bytes: See `write_data_files`.
            feed: Whether there is a change data feed.

        Returns:
            What the log is to say of each data file, and of each file of the feed.
        """
        # A commit that only adds rows is its own feed.
        changes = _Feed(store, path, self._schema, target_bytes) if feed and self._changed else None
        try:
            adds = write_data_files(store, path, self._schema, self._rows(read, changes), listed, target_bytes)
            return adds, [] if changes is None else changes.finish()
        except BaseException:
            if changes is not None:
                changes.discard()
            raise

    def _fates_of(self, batch: pa.RecordBatch) -> Fates:
        fates = np.full(batch.num_rows, _STAYS, np.int64)
        matched = pl.DataFrame(batch.select(self._key)).with_row_index("__row").join(self._fates, on=self._key)
        rows, new = matched["__row"].to_numpy(), matched["__new"].to_numpy()
        fates[rows[new == _GOES]] = _GOES
        rows, new = rows[new != _GOES], new[new != _GOES]
        self._is_there[new] = True
        if len(rows):
            differs = self._differs(batch.take(pa.array(rows)), self.rows.take(pa.array(new)))
            fates[rows[differs]] = new[differs]
        return fates

    def _differs(self, before: pa.RecordBatch, after: pa.Table) -> npt.NDArray[np.bool_]:
        was, now = pl.DataFrame(before.select(self._compared)), pl.DataFrame(after.select(self._compared))
        differs = np.zeros(before.num_rows, bool)
        for name in self._compared:
            differs |= was[name].ne_missing(now[name]).to_numpy()
            if was[name].dtype.is_float():
                # Nothing else tells 0.0 from -0.0.
                zeros = (now[name] == 0) & ((1 / was[name]) != (1 / now[name]))
                differs |= zeros.fill_null(False).to_numpy()
        return differs

    def _rows(self, read: Reader, changes: _Feed | None) -> Iterator[pa.RecordBatch]:
        for file, fates in self._changed:
            start = 0
            for batch in read(file):
                here = fates[start : start + batch.num_rows]
                start += batch.num_rows
                if (here == _STAYS).all():
                    yield batch
                    continue
                after = self.rows.take(pa.array(here[here >= 0]))
                yield batch.filter(pa.array(here == _STAYS))
                yield from after.to_batches()
                if changes is not None:
                    changes.add("update_preimage", batch.filter(pa.array(here >= 0)))
                    changes.add("update_postimage", after)
                    changes.add("delete", batch.filter(pa.array(here == _GOES)))
        inserted = self.inserted
        yield from inserted.to_batches()
        if changes is not None:
            changes.add("insert", inserted)


class _Feed:
    """Files of the change data feed, written as changes are met."""

    def __init__(self, store: TableStore, path: str, schema: pa.Schema, target_bytes: int) -> None:
        store.make_room(f"{path}/{CHANGE_FOLDER}")
        self._schema = pa.schema([*(pa.field(f.name, f.type) for f in schema), (CHANGE_TYPE, pa.string())])
        self._files = DataFiles(store, path, self._schema, None, target_bytes, f"{CHANGE_FOLDER}/")
        self._held: list[pa.Table] = []
        self._size = 0

    def add(self, kind: str, rows: pa.RecordBatch | pa.Table) -> None:
        for batch in rows.to_batches() if isinstance(rows, pa.Table) else [rows]:
            if not batch.num_rows:
                continue
            columns = [*batch.columns, pa.repeat(pa.scalar(kind), batch.num_rows)]
            self._held.append(pa.table(columns, schema=self._schema))
            self._size += batch.nbytes
            if self._size >= GROUP_BYTES:
                self._write()

    def finish(self) -> list[Mapping[str, Any]]:
        self._write()
        self._files.finish()
        said = ("path", "partitionValues", "size")
        return [{**{key: add[key] for key in said}, "dataChange": False} for add in self._files.adds]

    def discard(self) -> None:
        self._files.discard()

    def _write(self) -> None:
        held, self._held, self._size = self._held, [], 0
        if held:
            self._files.write(pa.concat_tables(held))


def _shaped(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = [
        table[f.name].cast(f.type) if f.name in table.schema.names else pa.nulls(table.num_rows, f.type) for f in schema
    ]
    return pa.table(columns, names=schema.names)
