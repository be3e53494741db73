"""How long the values of a Parquet file's dictionaries are.

Belongs here: the one size that no footer tells. Does not belong here: what is made of it (`parquet.py`), Dagster.

A dictionary holds a value once, and a row names it in a few bits: ten values of a megabyte and a million rows are a
file of ten megabytes, and a terabyte when they are decoded. So dictionaries are looked at before rows are.
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
    file = reader(paths)
    longest = 0
    for number in harmful:
        here = 0
        for start in range(0, len(paths), _COLUMNS_AT_ONCE):
            some = paths[start : start + _COLUMNS_AT_ONCE]
            # The whole dictionary comes with the first row.
            first = next(file.iter_batches(batch_size=1, row_groups=[number], columns=some, use_threads=False))
            for name, column in zip(first.schema.names, first.columns, strict=True):
                size = _longest(column, leaves)
                # Asked only once it is decoded: details of a damaged footer can end the process.
                if size > _LONG_BYTES and name in places and not _has_dictionary(groups[number].column(places[name])):
                    # The reader made the dictionary itself, of the first row's value: that is in the average.
                    continue
                here += size
        longest = max(longest, here)
    return longest + fixed


def _has_dictionary(chunk: Any) -> bool:
    return any("DICTIONARY" in encoding for encoding in chunk.encodings)


def _longest(column: pa.Array, leaves: Callable[[pa.Array], Iterator[Any]]) -> int:
    lengths = [
        int(pc.max(pc.binary_length(leaf.dictionary)).as_py() or 0)
        for leaf in leaves(column)
        if isinstance(leaf, pa.DictionaryArray)
    ]
    return sum(lengths) * (1 if isinstance(column, pa.DictionaryArray) else _LIST_VALUES)
