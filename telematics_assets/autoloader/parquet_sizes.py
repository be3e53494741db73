"""How long the values of a Parquet file are that it holds once for many rows.

Belongs here: the one size that no footer tells. Does not belong here: what is made of it (`parquet.py`), Dagster.

A dictionary holds a value once, and a row names it in a few bits: ten values of a megabyte and a million rows are a
file of ten megabytes, and a terabyte when they are decoded. So dictionaries are looked at before rows are. Texts that
say how much they share with the one before them do the same, and are passed over in small batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

#: What the rows of a row group may take at most without a look, if each were as large as the whole of it.
_HARMLESS_BYTES = 64 << 20
_COLUMNS_AT_ONCE = 64
_LONG_BYTES = 1 << 20
#: How many values a list is taken to have if they are long.
_LIST_VALUES = 16
#: Values that share their beginnings are passed over in batches of so much, if each were as large as their column; ...
_PASSED_BYTES = 256 << 20
#: ... of a large column in so many rows, or it would take too long.
_PASSED_ROWS = 16
_SHARED = "DELTA_BYTE_ARRAY"


def dictionary_bytes(
    metadata: Any, rows_at_once: int, reader: Callable[[list[str]], Any], leaves: Callable[[pa.Array], Iterator[Any]]
) -> int:
    """What the longest values of a row group's dictionaries take together; 0 if they can't be harmful.

    Args:
        metadata: The file's footer.
        rows_at_once: How many rows are decoded at a time at most.
        reader: Opens the file so that these leaves keep their dictionaries.
        leaves: The leaf arrays of a column.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    harmful = [
        number
        for number, group in enumerate(groups)
        if min(group.num_rows, rows_at_once) * group.total_byte_size > _HARMLESS_BYTES
    ]
    schema = metadata.schema
    columns = [schema.column(index) for index in range(len(schema))] if harmful else []
    places = {column.path: index for index, column in enumerate(columns) if column.physical_type == "BYTE_ARRAY"}
    paths = list(places)
    fixed = sum(int(column.length) for column in columns if column.physical_type == "FIXED_LEN_BYTE_ARRAY")
    if not paths:
        return fixed
    file, plain = reader(paths), reader([])
    longest = 0
    for number in harmful:
        here = 0
        for start in range(0, len(paths), _COLUMNS_AT_ONCE):
            for some, first in _first_rows(file, plain, number, paths[start : start + _COLUMNS_AT_ONCE]):
                # Asked only once they are decoded: details of a damaged footer can end the process.
                chunks = {name: groups[number].column(places[name]) for name in some}
                for name, column in zip(first.schema.names, first.columns, strict=True):
                    size = _longest(column, leaves)
                    if size > _LONG_BYTES and name in chunks and not _has_dictionary(chunks[name]):
                        # The reader made the dictionary itself, of the first row's value: that is in the average.
                        continue
                    here += size
                here += sum(
                    _longest_passed(plain, number, name, chunk.total_uncompressed_size, leaves)
                    for name, chunk in chunks.items()
                    if _SHARED in chunk.encodings
                )
        longest = max(longest, here)
    return longest + fixed


def _first_rows(file: Any, plain: Any, number: int, paths: list[str]) -> Iterator[tuple[list[str], pa.RecordBatch]]:
    """The first row of some leaves, with their dictionaries where the decoder can keep them."""

    def row(reader: Any) -> pa.RecordBatch:
        # The whole dictionary comes with the first row.
        return next(reader.iter_batches(batch_size=1, row_groups=[number], columns=paths, use_threads=False))

    try:
        yield paths, row(file)
    except (NotImplementedError, OSError):
        # It can keep none of a leaf whose values are coded by what they differ in. What is damaged fails again.
        if len(paths) == 1:
            yield paths, row(plain)
            return
        middle = len(paths) // 2
        for half in (paths[:middle], paths[middle:]):
            yield from _first_rows(file, plain, number, half)


def _longest_passed(
    file: Any, number: int, path: str, unpacked: int, leaves: Callable[[pa.Array], Iterator[Any]]
) -> int:
    """The longest value of a leaf whose values share their beginnings."""
    rows = max(_PASSED_ROWS, _PASSED_BYTES // max(unpacked, 1))
    longest = 0
    for batch in file.iter_batches(batch_size=rows, row_groups=[number], columns=[path], use_threads=False):
        for leaf in leaves(batch.column(0)):
            if isinstance(leaf, pa.StringArray | pa.BinaryArray):
                longest = max(longest, int(pc.max(pc.binary_length(leaf)).as_py() or 0))
    return longest * (_LIST_VALUES if pa.types.is_nested(batch.column(0).type) else 1)


def _has_dictionary(chunk: Any) -> bool:
    return any("DICTIONARY" in encoding for encoding in chunk.encodings)


def _longest(column: pa.Array, leaves: Callable[[pa.Array], Iterator[Any]]) -> int:
    lengths = [
        int(pc.max(pc.binary_length(leaf.dictionary)).as_py() or 0)
        for leaf in leaves(column)
        if isinstance(leaf, pa.DictionaryArray)
    ]
    return sum(lengths) * (1 if isinstance(column, pa.DictionaryArray) else _LIST_VALUES)
