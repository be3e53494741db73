"""Writing rows into data files of a Delta table, in bounded memory and in their order.

Belongs here: row groups, the size of files, encodings, and what the log says of each file.
Does not belong here: the log (`log.py`), where files are kept (`stores.py`), what rows mean, Dagster.

Rows are encoded in a thread of their own, one row group while the next is gathered: memory holds those two, each as
large as `GROUP_BYTES` or one batch, and the pages of one column. A file that was not finished, or that no log entry
names, is nobody's; VACUUM takes it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from telematics_assets.lakehouse.statistics import Statistics
from telematics_assets.lakehouse.stores import TableStore

#: Rows of a row group, and its values: those of a table with many columns have fewer rows.
GROUP_ROWS, GROUP_VALUES = 131_072, 4_194_304
#: Memory that the rows of a row group take.
GROUP_BYTES = 32 << 20
#: Where rows take more than this, the next ones are gathered only when they are written.
LONG_ROW_BYTES = 4 << 20
#: With more columns than this none has a dictionary: of 1,900 columns they took 300 MiB.
PLAIN_COLUMNS = 256
#: A column's dictionary in a row group is given up at this size. With the library's mebibyte no eight-byte column of
#: such a row group ever gives it up, and looking every value up took twice the time of the rest, for larger files.
DICTIONARY_BYTES = 131_072
#: Rows in which a column must repeat half of its values to get a dictionary at all.
_SAMPLE_ROWS = 8_192
_PAGE_BYTES = 1 << 20
#: How many values are encoded between two looks at the size of a page.
_PAGE_LOOK_ROWS = 1_024


def write_data_files(
    store: TableStore,
    path: str,
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    listed: Sequence[Any] | None,
    target_bytes: int,
) -> list[Mapping[str, Any]]:
    """Write rows into new files of a table, in their order; no file if there are no rows.

    Args:
        store: The place of the tables.
        path: Where the table is.
        schema: Schema of the rows in the files.
        batches: The rows; pulled one by one. Text may come in any of Arrow's string types.
        listed: The fields that have statistics; see `statistics.listed_columns`.
        target_bytes: A file that has become so large is the last but for the next.

    Returns:
        What the log is to say of each file (`add`), in order.

    Raises:
        OSError: If a file can't be written; and whatever the batches raise. No file is left behind then.
    """
    files = DataFiles(store, path, pa.schema([pa.field(f.name, f.type) for f in schema]), listed, target_bytes)
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="parquet-writer") as pool:
            encoding: Future[None] | None = None
            for group in _row_groups(batches, len(schema), min(GROUP_BYTES, target_bytes)):
                if encoding is not None:
                    encoding.result()
                encoding = pool.submit(files.write, group)
                if group.nbytes > group.num_rows * LONG_ROW_BYTES:
                    encoding.result()
                # Not kept until the next one is gathered.
                del group
            if encoding is not None:
                encoding.result()
        files.finish()
    except BaseException:
        files.discard()
        raise
    return files.adds


def _row_groups(batches: Iterable[pa.RecordBatch], columns: int, group_bytes: int) -> Iterator[pa.Table]:
    """Batches put together, or cut, to row groups of the right size."""
    group_rows = max(1, min(GROUP_ROWS, GROUP_VALUES // max(columns, 1)))
    held: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        for part in _parts(batch, group_rows, group_bytes):
            if held and (rows + part.num_rows > group_rows or size + part.nbytes > group_bytes):
                yield pa.Table.from_batches(held)
                held, rows, size = [], 0, 0
            held.append(part)
            rows += part.num_rows
            size += part.nbytes
    if held:
        yield pa.Table.from_batches(held)


def _parts(batch: pa.RecordBatch, group_rows: int, group_bytes: int) -> Iterator[pa.RecordBatch]:
    count = max(-(-batch.num_rows // group_rows), -(-batch.nbytes // group_bytes))
    if count <= 1:
        if batch.num_rows:
            yield batch
        return
    rows = -(-batch.num_rows // count)
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)


class DataFiles:
    """The files of one write, one after another. Used by one thread at a time."""

    def __init__(
        self,
        store: TableStore,
        path: str,
        schema: pa.Schema,
        listed: Sequence[Any] | None,
        target_bytes: int,
        folder: str = "",
    ) -> None:
        """Begin without a file; see `write_data_files`.

        Args:
            store: The place of the tables.
            path: Where the table is.
            schema: Schema of the rows in the files.
            listed: The fields that have statistics.
            target_bytes: A file that has become so large is the last but for the next.
            folder: Folder below the table, ending in `/`.
        """
        self.adds: list[Mapping[str, Any]] = []
        self._store = store
        self._path = path
        self._schema = schema
        self._listed = listed
        self._target_bytes = target_bytes
        self._folder = folder
        self._write_id = uuid.uuid4()
        self._names: list[str] = []
        self._open: tuple[AbstractContextManager[Any], Any, pq.ParquetWriter] | None = None
        self._statistics = Statistics(listed)
        self._footers: list[Any] = []

    def write(self, group: pa.Table) -> None:
        """Write a row group, into a new file if the last one is large enough."""
        group = group.cast(self._schema)
        _, sink, writer = self._open or self._begin(group)
        self._statistics.add(group)
        writer.write_table(group, row_group_size=group.num_rows)
        if sink.tell() >= self._target_bytes:
            self.finish()

    def _begin(self, group: pa.Table) -> tuple[AbstractContextManager[Any], Any, pq.ParquetWriter]:
        name = f"{self._folder}part-{len(self._names):05d}-{self._write_id}-c000.snappy.parquet"
        self._names.append(name)
        kept = self._store.write_file(f"{self._path}/{name}")
        sink = kept.__enter__()
        row_bytes = max(column.nbytes for column in group.columns) // group.num_rows
        writer = pq.ParquetWriter(
            sink,
            self._schema,
            compression="snappy",
            use_dictionary=_with_dictionary(group),
            dictionary_pagesize_limit=DICTIONARY_BYTES,
            data_page_size=_PAGE_BYTES,
            write_batch_size=max(1, min(_PAGE_LOOK_ROWS, _PAGE_BYTES // max(row_bytes, 1))),
            store_decimal_as_integer=True,
            store_schema=False,
            metadata_collector=self._footers,
        )
        self._open = kept, sink, writer
        return self._open

    def finish(self) -> None:
        """End the file that is open, if one is, and note what the log is to say of it."""
        if self._open is None:
            return
        kept, sink, writer = self._open
        writer.close()
        size = sink.tell()
        self._open = None
        kept.__exit__(None, None, None)
        self._statistics.add_footer(self._footers.pop())
        self.adds.append(
            {
                "path": self._names[-1],
                "partitionValues": {},
                "size": size,
                "modificationTime": time.time_ns() // 1_000_000,
                "dataChange": True,
                "stats": self._statistics.json(),
            }
        )
        self._statistics = Statistics(self._listed)

    def discard(self) -> None:
        """Leave none of the files behind, as far as possible."""
        failed = RuntimeError("the write has failed")
        if self._open is not None:
            kept, _, writer = self._open
            self._open = None
            with suppress(Exception):
                writer.close()
            with suppress(Exception):
                kept.__exit__(type(failed), failed, None)
        for name in self._names:
            self._store.discard(f"{self._path}/{name}")


def _with_dictionary(group: pa.Table) -> list[str] | bool:
    """The leaves that are worth a dictionary, by their paths in the file."""
    if group.num_columns > PLAIN_COLUMNS:
        return False
    paths: list[str] = []
    sample = group.slice(0, _SAMPLE_ROWS)
    for field, column in zip(sample.schema, sample.columns, strict=True):
        if pa.types.is_nested(field.type):
            paths += _leaf_paths(field.name, field.type)
        elif 2 * pc.count_distinct(column).as_py() <= max(len(column), 2):
            paths.append(field.name)
    return paths


def _leaf_paths(path: str, kind: Any) -> Iterator[str]:
    if pa.types.is_struct(kind):
        for index in range(kind.num_fields):
            yield from _leaf_paths(f"{path}.{kind.field(index).name}", kind.field(index).type)
    elif pa.types.is_map(kind):
        yield from _leaf_paths(f"{path}.key_value.key", kind.key_type)
        yield from _leaf_paths(f"{path}.key_value.value", kind.item_type)
    elif pa.types.is_nested(kind):
        yield from _leaf_paths(f"{path}.list.element", kind.value_type)
    else:
        yield path
