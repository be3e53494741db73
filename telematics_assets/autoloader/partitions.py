"""Columns that a file's folders name: `…/date=2026-01-31/hour=07/f.parquet`.

Belongs here: the `key=value` parts of a path, their values as exact column values, and filling them into the rows that
a reader yields.
Does not belong here: which columns a table gets (`schema.py`), reading (`formats.py`), Dagster.

Only the columns that the stream's option names are taken. The folder's value stands in every row of the file; a value
that the column's type can't hold exactly is null there and rescued as text. Where the file has a column of that name
too, its values are compared in the file's own type, and those that differ are rescued in place of the folder's text,
which the path tells anyway. Of several folders with one key the innermost counts. A name that differs by case is not
the same name: its text is rescued, as a file's column would be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, date, datetime
from decimal import Decimal, InvalidOperation
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from telematics_assets.autoloader.chunks import Chunk
from telematics_assets.autoloader.rescue import rescued_json
from telematics_assets.catalog import FileStream
from telematics_assets.lakehouse.types import fits, plain

#: How Hive and Spark write null into a path.
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"

_FILE_PATH = "_file_path"
_WHOLE = re.compile(r"[+-]?[0-9]{1,40}")
_NUMBER = re.compile(r"[+-]?([0-9]{1,400}(\.[0-9]{0,400})?|\.[0-9]{1,400})([eE][+-]?[0-9]{1,3})?")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_MOMENT = re.compile(_DATE.pattern + r"[T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?(Z|[+-][0-9]{2}:[0-9]{2})?")


def partition_values(stream: FileStream, path: str) -> dict[str, str | None]:
    """What the folders of a file say of the stream's partition columns.

    Args:
        stream: The stream.
        path: The file's path relative to the Volume.

    Returns:
        Text by column name, as the folder spells the name; null is None. Columns of which the path says nothing are
        left out. Values are URL-decoded; one that decodes to no UTF-8 stays as it stands in the path.
    """
    wanted = {name.lower() for name in stream.options.partition_names}
    if not wanted or not path.startswith(f"{stream.folder}/"):
        return {}
    values: dict[str, str | None] = {}
    for part in path[len(stream.folder) + 1 :].split("/")[:-1]:
        key, equals, value = part.partition("=")
        if equals and (name := _decoded(key)).lower() in wanted:
            values[name] = None if value == HIVE_NULL else _decoded(value)
    return values


def exact_scalar(text: str, kind: pa.DataType) -> Any | None:
    """A text as a value of a type, or None if it is none that the type holds exactly.

    Args:
        text: As it stands in a path, decoded: `07`, `2026-01-31`, `true`.
        kind: A type of a column.
    """
    try:
        value = _value(text, kind)
        return None if value is None else pa.scalar(value, kind)
    except (pa.ArrowException, ValueError, OverflowError, InvalidOperation):
        return None


def filled(
    values: Mapping[str, str | None],
    stream: FileStream,
    target: pa.Schema,
    file_path: str,
    read: Callable[[Callable[[pa.Schema], pa.Schema] | pa.Schema], Iterator[Chunk]],
) -> Iterator[Chunk]:
    """The rows of a file with the columns that its folders name.

    Args:
        values: What `partition_values` gave; at least one.
        stream: What the file belongs to.
        target: The columns to yield.
        file_path: How the rescued data names the file.
        read: Reads the file into a schema, or into what a function makes of the file's own schema (Parquet).
    """
    named = set(stream.options.partition_names)
    # A column that is only spelled alike is the file's own.
    values = {name: text for name, text in values.items() if name in named or name not in target.names}
    filling = _Filling(values, named, target, stream.options.rescued_data_column, file_path)
    for chunk in read(filling.of_text() if stream.format != "parquet" else filling.of_file):
        yield filling.fill(chunk)


def first_difference(values: Mapping[str, str | None], table: pa.Table) -> str | None:
    """The first column of text rows that contradicts what the folders say, or None."""
    for name, text in values.items():
        if name in table.schema.names and _differing(table[name].combine_chunks(), text).true_count:
            return name
    return None


def partition_problem(stream: FileStream, path: str, types: Mapping[str, pa.DataType]) -> str | None:
    """Why the loader would not take all that a path's folders say, or None.

    Args:
        stream: The stream.
        path: Where the file goes, relative to the Volume.
        types: Types of the declared columns.
    """
    for name, text in partition_values(stream, path).items():
        if name not in stream.options.partition_names:
            (meant,) = [own for own in stream.options.partition_names if own.lower() == name.lower()]
            return f"folder {name!r} differs from the partition column {meant!r} by case only; rename it"
        kind = types.get(name, pa.string())
        if text is not None and exact_scalar(text, kind) is None:
            return f"folder {name}={text!r} is no value of its column's type ({kind})"
    return None


class _Filling:
    """How the rows of one file are completed."""

    def __init__(
        self, values: Mapping[str, str | None], named: set[str], target: pa.Schema, rescued_column: str, file_path: str
    ) -> None:
        self._values, self._target = values, target
        self._rescued_column, self._file_path = rescued_column, file_path
        self._scalars: dict[str, Any] = {}
        #: Texts that no column holds.
        self._unheld: dict[str, str] = {}
        for name, text in values.items():
            held = target.field(name).type if name in named and name in target.names else None
            scalar = None if text is None or held is None else exact_scalar(text, held)
            if held is not None:
                self._scalars[name] = pa.scalar(None, held) if scalar is None else scalar
            if text is not None and scalar is None:
                self._unheld[name] = text
        #: The file's own columns of these names.
        self._own: dict[str, pa.DataType] = {}

    def of_text(self) -> pa.Schema:
        """What a reader of text produces: the file's own values of the filled columns are text."""
        self._own = dict.fromkeys(self._values, pa.string())
        return self._inner()

    def of_file(self, schema: pa.Schema) -> pa.Schema:
        """What a reader of typed columns produces: the file's own values keep their type; nested ones it rescues."""
        there = [field for field in schema if field.name in self._values]
        self._own = {field.name: kind for field in there if (kind := _bare(field.type)) is not None}
        for field in there:
            if field.name not in self._own and not pa.types.is_null(field.type):
                # What the reader rescues under this name must not stand beside the folder's text.
                self._unheld.pop(field.name, None)
        return self._inner()

    def _inner(self) -> pa.Schema:
        rest = [field for field in self._target if field.name not in self._values]
        return pa.schema([*(pa.field(name, kind) for name, kind in self._own.items()), *rest])

    def fill(self, chunk: Chunk) -> Chunk:
        """Complete some rows."""
        rows = chunk.table.num_rows
        columns = dict(zip(chunk.table.schema.names, chunk.table.columns, strict=True))
        left_over = columns[self._rescued_column].combine_chunks()
        texts = {name: _repeated(pa.scalar(text), rows) for name, text in self._unheld.items()}
        others: dict[str, pa.Array] = {}
        for name in self._own:
            own = columns.pop(name).combine_chunks()
            differing = _differing(own, self._values[name])
            if differing.true_count:
                # The folder's text is in the path; the file's value is nowhere else.
                others[name] = pc.if_else(differing, own, pa.scalar(None, own.type))
            if name in texts:
                # Of what no Delta column holds the reader leaves null, and rescues it under this name.
                key = f"{json.dumps(name, ensure_ascii=False)}:"
                theirs = pc.and_(own.is_null(), pc.fill_null(pc.match_substring(left_over, key), False))
                texts[name] = pc.if_else(pc.or_(differing, theirs), pa.scalar(None, pa.string()), texts[name])
        for name, scalar in self._scalars.items():
            columns[name] = _repeated(scalar, rows)
        rescued_rows = chunk.rescued_rows
        if texts or others:
            for ours in (others, texts):
                left_over = self._joined(rescued_json(ours, self._file_path, rows), left_over)
            columns[self._rescued_column] = left_over
            rescued_rows = rows - left_over.null_count
        table = pa.table([columns[name] for name in self._target.names], schema=self._target)
        return Chunk(table, rescued_rows=rescued_rows, corrupt_rows=chunk.corrupt_rows)

    def _joined(self, ours: pa.Array, theirs: pa.Array) -> pa.Array:
        """Two objects per row as one; each ends with the path."""
        if theirs.null_count == len(theirs):
            return ours
        end = f',"{_FILE_PATH}":{json.dumps(self._file_path, ensure_ascii=False)}}}'
        members = pc.utf8_slice_codeunits(ours, 0, -len(end))
        both = pc.binary_join_element_wise(members, pc.utf8_slice_codeunits(theirs, 1), ",")
        return pc.coalesce(both, ours, theirs)


def _differing(own: pa.Array, text: str | None) -> pa.Array:
    """Per value of a file's column: is it there, and not what the folder says?"""
    expected = None if text is None else exact_scalar(text, own.type)
    if expected is None:
        return own.is_valid()
    return pc.fill_null(pc.not_equal(own, expected), False)


def _bare(kind: pa.DataType) -> pa.DataType | None:
    """The type of a file's column without extension, dictionary or view; None if its values can't be compared."""
    bare = plain(pa.nulls(0, kind)).type
    return bare if not pa.types.is_nested(bare) and not pa.types.is_null(bare) and fits(kind, bare) else None


def _repeated(value: Any, rows: int) -> pa.Array:
    # `pa.repeat` appends row by row.
    index = pa.array(np.zeros(rows, np.int8))
    return pa.DictionaryArray.from_arrays(index, pa.repeat(value, 1)).dictionary_decode()


def _decoded(text: str) -> str:
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        return text


def _value(text: str, kind: pa.DataType) -> Any | None:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return text
    if pa.types.is_binary(kind):
        return text.encode()
    if pa.types.is_boolean(kind):
        return {"true": True, "false": False}.get(text.lower())
    if pa.types.is_integer(kind):
        return int(text) if _WHOLE.fullmatch(text) else None
    if pa.types.is_decimal(kind):
        return Decimal(text) if _NUMBER.fullmatch(text) else None
    if pa.types.is_floating(kind):
        return _floating(text, kind)
    if pa.types.is_date(kind):
        return date.fromisoformat(text) if _DATE.fullmatch(text) else None
    if pa.types.is_timestamp(kind) and _MOMENT.fullmatch(text):
        moment = datetime.fromisoformat(text)
        zoned: Any = kind
        if zoned.tz is None:
            return moment if moment.tzinfo is None else None
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return None


def _floating(text: str, kind: pa.DataType) -> Any | None:
    """The number whose shortest text says the same number."""
    if not _NUMBER.fullmatch(text):
        return None
    value: Any = np.dtype(f"f{kind.bit_width // 8}").type(text)
    return value if np.isfinite(value) and Decimal(str(value)) == Decimal(text) else None
