"""Guessing the types of columns from values, for streams with `infer_column_types`.

Belongs here: what sampled values have in common, the type that holds all of them exactly, and the sample of the first
files.
Does not belong here: what fits a type (`typed.py`), hints and the table's columns (`schema.py`), Dagster.

A column gets the first type that every sampled value fits by the rules of `typed.py`, and STRING if there is none:

* JSON: BIGINT, DOUBLE for numbers, BOOLEAN, STRUCT for objects, ARRAY for arrays, their insides in the same way. A
  string stays one, whatever it looks like. A mix is STRING; so are objects without any key, with a key that a Delta
  column can't have, with two keys that differ by case only, or with more than `MAX_FIELDS` keys; and so is what holds
  a string that is no text, and what nests deeper than `MAX_DEPTH`.
* csv: BIGINT, DOUBLE, BOOLEAN, DATE, TIMESTAMP, by the text.

Where every sampled value is null, the column is STRING. A later value that does not fit is rescued, never changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from telematics_assets.autoloader.chunks import Chunk
from telematics_assets.autoloader.codecs import read_up_to, unpacked
from telematics_assets.autoloader.json_nested import array_elements, firsts, object_members, strings
from telematics_assets.autoloader.schema import MAX_COLUMNS
from telematics_assets.autoloader.typed import typed
from telematics_assets.catalog import CORRUPT_RECORD, RESCUED_PATH
from telematics_assets.lakehouse.ddl import holdable

#: Keys of an object that becomes a STRUCT.
MAX_FIELDS = 200
#: Levels of objects and arrays inside of a column that become types.
MAX_DEPTH = 16

#: What values may be, the first that all of them are counts.
_SCALARS: dict[str, pa.DataType] = {
    "BIGINT": pa.int64(),
    "DOUBLE": pa.float64(),
    "BOOLEAN": pa.bool_(),
    "DATE": pa.date32(),
    "TIMESTAMP": pa.timestamp("us", "UTC"),
}
_OF_JSON = {ord("t"): ("BOOLEAN",), ord("f"): ("BOOLEAN",), **dict.fromkeys(b"-0123456789", ("BIGINT", "DOUBLE"))}
_STRUCT, _ARRAY = "STRUCT", "ARRAY"
_FIRST_BYTES = 64

#: What JSON records are read as for `Sample.add_json`, the last two being the raw and the rescued data column.
RAW_COLUMN, RESCUED_COLUMN = "record", "rescued"
JSON_TARGET = pa.schema([(name, pa.string()) for name in (CORRUPT_RECORD, RAW_COLUMN, RESCUED_COLUMN)])


@dataclass
class Seen:
    """What is known of a column's values.

    Attributes:
        possible: The types that all of them fit; None as long as all are null.
        fields: If they may be STRUCTs, what is known of their fields, in order of appearance.
        element: If they may be ARRAYs, what is known of their elements.
    """

    possible: frozenset[str] | None = None
    fields: dict[str, Seen] = field(default_factory=dict)
    element: Seen | None = None

    def merge(self, other: Seen) -> None:
        """Add what is known of more values."""
        if other.possible is None:
            return
        self.possible = other.possible if self.possible is None else self.possible & other.possible
        if _STRUCT in self.possible:
            for name, seen in other.fields.items():
                self.fields.setdefault(name, Seen()).merge(seen)
            if len(self.fields) > MAX_FIELDS:
                self.possible, self.fields = frozenset(), {}
        if _ARRAY in self.possible and other.element is not None:
            self.element = self.element or Seen()
            self.element.merge(other.element)

    def type(self) -> pa.DataType:
        """The type that holds all values."""
        possible = self.possible or frozenset()
        for name, kind in _SCALARS.items():
            if name in possible:
                return kind
        if _ARRAY in possible:
            return pa.list_(pa.field("element", (self.element or Seen()).type()))
        distinct = len({name.lower() for name in self.fields}) == len(self.fields)
        if _STRUCT in possible and self.fields and distinct and all(map(holdable, self.fields)):
            return pa.struct([pa.field(name, seen.type()) for name, seen in self.fields.items()])
        return pa.string()


def seen_json(values: pa.StringArray, depth: int = 1) -> Seen:
    """What is known of JSON values.

    Args:
        values: Their source texts, or null.
        depth: The level of nesting that they stand on.
    """
    values = values.drop_null()
    if not len(values):
        return Seen()
    starts = [int(start) for start in np.unique(firsts(values))]
    if starts == [ord("{")] and depth <= MAX_DEPTH:
        fields = _by_key(values, MAX_FIELDS)
        if fields is None or not _are_texts(values, fields.values()):
            return Seen(frozenset())
        return Seen(frozenset([_STRUCT]), {name: seen_json(found, depth + 1) for name, found in fields.items()})
    if starts == [ord("[")] and depth <= MAX_DEPTH:
        inside = array_elements(values).values
        if not _are_texts(values, [inside]):
            return Seen(frozenset())
        return Seen(frozenset([_ARRAY]), element=seen_json(inside, depth + 1))
    candidates = {_OF_JSON.get(start, ()) for start in starts}
    return Seen(_fitting(values, candidates.pop(), is_json=True) if len(candidates) == 1 else frozenset())


def seen_text(values: pa.StringArray) -> Seen:
    """What is known of texts.

    Args:
        values: The texts, or null.
    """
    values = values.drop_null()
    return Seen(_fitting(values, tuple(_SCALARS), is_json=False)) if len(values) else Seen()


def seen_rescued(rescued: pa.StringArray, names: Sequence[str], *, is_json: bool) -> list[tuple[str, pa.DataType]]:
    """The types of columns that a chunk has in its rescued data only.

    Args:
        rescued: The chunk's rescued data column.
        names: The columns.
        is_json: Whether they are JSON values; in csv all are texts.
    """
    # The rescued data may call a column like the file's path by another name.
    wanted = frozenset(name for name in names if not RESCUED_PATH.fullmatch(name))
    found = _by_key(rescued.drop_null(), None, wanted) or {}
    texts = {name: values if is_json else strings(values)[0] for name, values in found.items()}
    return [(name, _seen(texts[name], is_json=is_json).type() if name in texts else pa.string()) for name in names]


class Sample:
    """What the first files of a stream tell of their columns."""

    def __init__(self, files: int, size: int) -> None:
        """Begin a sample.

        Args:
            files: How many files it takes.
            size: How many bytes of them, unpacked.
        """
        self._files = files
        self._bytes = size
        self._columns: dict[str, Seen] = {}

    @property
    def is_full(self) -> bool:
        """Whether it takes no further file."""
        return self._files < 1 or self._bytes < 1

    def head(self, source: BinaryIO) -> Head:
        """As much of a file as the sample still takes."""
        self._files -= 1
        return Head(unpacked(source), self._bytes)

    def add_json(self, head: Head, chunks: Iterator[Chunk]) -> None:
        """Add a file's records.

        Args:
            head: The start of the file.
            chunks: Its records, as read for `JSON_TARGET`.
        """
        columns: dict[str, Seen] = {}
        for chunk in chunks:
            lines = _one(chunk.table[RAW_COLUMN]).filter(pc.is_null(chunk.table[CORRUPT_RECORD]).combine_chunks())
            found = _by_key(pc.ascii_trim_whitespace(lines), None) or {}
            for name, values in found.items():
                if name in columns or len(columns) < MAX_COLUMNS:
                    columns.setdefault(name, Seen()).merge(seen_json(values))
        self._add(head, columns)

    def add_csv(self, head: Head, names: Sequence[str], chunks: Iterator[Chunk]) -> None:
        """Add a file's records.

        Args:
            head: The start of the file.
            names: Its columns.
            chunks: Its records, as texts.
        """
        columns = {name: Seen() for name in names}
        last: pa.Table | None = None
        records = 0
        for chunk in chunks:
            if last is not None:
                _merge_texts(columns, last)
            last = chunk.table
            records += chunk.table.num_rows
        if last is not None:
            # The sample may end within the last record.
            _merge_texts(columns, last.slice(0, last.num_rows - 1) if head.is_cut else last)
        # Columns of which no value was seen are typed when their file is read.
        self._add(head, {} if head.is_cut and records < 2 else columns)

    def columns(self) -> list[tuple[str, pa.DataType]]:
        """The columns of all files, in order of appearance, with their types."""
        return [
            (name, pa.string() if RESCUED_PATH.fullmatch(name) else seen.type()) for name, seen in self._columns.items()
        ]

    def _add(self, head: Head, columns: Mapping[str, Seen]) -> None:
        self._bytes -= head.taken
        for name, seen in columns.items():
            self._columns.setdefault(name, Seen()).merge(seen)


class Head:
    """The start of a file's content, as a file to read."""

    def __init__(self, opened: BinaryIO, limit: int) -> None:
        self._opened = opened
        self._limit = limit
        #: A reader looks at the first bytes and goes back.
        self._first = read_up_to(opened, min(limit, _FIRST_BYTES))
        self._at = 0
        self._taken = len(self._first)

    @property
    def taken(self) -> int:
        """Bytes that were read."""
        return self._taken

    @property
    def is_cut(self) -> bool:
        """Whether the limit was reached."""
        return self._taken >= self._limit

    def tell(self) -> int:
        """Where it stands."""
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go back within the first bytes."""
        self._at = offset
        return offset

    def read(self, size: int) -> bytes:
        """At most so many of the next bytes."""
        data = self._first[self._at : self._at + size]
        if not data:
            data = self._opened.read(min(size, self._limit - self._taken))
            self._taken += len(data)
        self._at += len(data)
        return data


def _are_texts(values: pa.StringArray, inside: Iterable[pa.StringArray]) -> bool:
    """Whether the strings right inside of values are texts: only an escape can make one that is none."""
    if not pc.any(pc.match_substring(values, "\\u")).as_py():
        return True
    return all(
        texts.null_count + is_string.sum() == len(texts) for texts, is_string in (strings(part) for part in inside)
    )


def _seen(values: pa.StringArray, *, is_json: bool) -> Seen:
    return seen_json(values) if is_json else seen_text(values)


def _fitting(values: pa.StringArray, names: Sequence[str], *, is_json: bool) -> frozenset[str]:
    return frozenset(name for name in names if not typed(values, _SCALARS[name], is_json=is_json).null_count)


def _merge_texts(columns: dict[str, Seen], table: pa.Table) -> None:
    for name, seen in columns.items():
        if seen.possible is None or seen.possible:
            seen.merge(seen_text(_one(table[name])))


def _by_key(
    objects: pa.StringArray, most: int | None, wanted: frozenset[str] | None = None
) -> dict[str, pa.StringArray] | None:
    """The values of objects by key, in order of appearance.

    Args:
        objects: Their source texts.
        most: How many keys there may be, or None.
        wanted: The keys that are asked for; None: all.

    Returns:
        None if there are too many keys, one that is no text, or one that stands twice in an object.
    """
    if not len(objects):
        return {}
    members = object_members(objects)
    encoded = members.keys.dictionary_encode()
    names = encoded.dictionary.to_pylist()
    if encoded.null_count or (most is not None and len(names) > most):
        return None
    codes = cast(Any, encoded.indices.to_numpy())
    pairs = np.sort(members.owners * len(names) + codes)
    if (pairs[1:] == pairs[:-1]).any():
        return None
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(names) + 1))
    return {
        name: members.values.take(pa.array(order[bounds[code] : bounds[code + 1]]))
        for code, name in enumerate(names)
        if wanted is None or name in wanted
    }


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
