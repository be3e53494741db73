"""The statistics of a data file in the Delta log, by which readers skip files.

Belongs here: which columns have some, what is true of them, and how it is spelled.
Does not belong here: writing files or the log, the property at a table's creation (`types.py`).

A false bound hides rows, so whatever can't be told truly to every reader is not told. The readers differ: Spark takes
NaN for the largest number, Arrow for none; deltalake's Arrow dataset takes a bound that is missing beside others for
one that nothing fulfils, and only a file with no statistics but its count for one of which nothing is known. So a file
with a NaN in a listed column has the count alone. Timestamps are told to the millisecond: a smallest one is cut, a
largest one rounded up. The protocol cuts both, and its readers add one, which deltalake forgets in some far years.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from telematics_assets.lakehouse.types import EXACT_STATISTICS_DIGITS, STATISTICS_PROPERTY

#: Characters of a text that stand in the log; of a longer one its beginning bounds it.
TEXT_CHARS = 32

_FIRST_COLUMNS_PROPERTY = "delta.dataSkippingNumIndexedCols"
_FIRST_COLUMNS = 32
#: Texts up to this size are bounded by the file's own footer, as its library does.
_FOOTER_BYTES = 4_096
_EPOCH = datetime.datetime(1970, 1, 1)
_EPOCH_ORDINAL = datetime.date(1970, 1, 1).toordinal()
#: From here on a reader that adds a millisecond would be in the year 10000.
_LAST_MILLISECOND_US = 253_402_300_799_999_000


def listed_columns(schema: pa.Schema, properties: Mapping[str, str]) -> Sequence[Any] | None:
    """The fields that have statistics; None if files of the table can only be counted.

    Args:
        schema: The table's columns.
        properties: The table's.
    """
    named = properties.get(STATISTICS_PROPERTY)
    if named is None:
        fields = _first(schema, int(properties.get(_FIRST_COLUMNS_PROPERTY, _FIRST_COLUMNS)))
    else:
        names = [name.strip() for name in named.split(",")]
        there = set(schema.names)
        if any("." in name or "`" in name for name in names if name not in there):
            return None
        fields = [schema.field(name) for name in names if name in there]
    if any(_is_never_true(field.type) for field in fields):
        return None
    return [field for field in fields if not pa.types.is_nested(field.type)]


def _first(schema: pa.Schema, leaves: int) -> list[Any]:
    """The fields of the first so many leaves; all of them if the number is negative."""
    if leaves < 0:
        return list(schema)
    fields = []
    for field in schema:
        if leaves <= 0:
            break
        fields.append(field)
        leaves -= _leaves(field.type)
    return fields


def _leaves(kind: Any) -> int:
    if pa.types.is_struct(kind):
        return sum(_leaves(kind.field(index).type) for index in range(kind.num_fields))
    return 1


def _is_never_true(kind: Any) -> bool:
    # Decimals with more digits are read as floating-point numbers, and structs as bounds that nothing fulfils.
    return bool(pa.types.is_struct(kind) or (pa.types.is_decimal(kind) and kind.precision > EXACT_STATISTICS_DIGITS))


class Statistics:
    """What is true of all rows of one data file."""

    def __init__(self, fields: Sequence[Any] | None) -> None:
        """Begin without rows.

        Args:
            fields: As `listed_columns` gives them.
        """
        self._fields = fields
        self._rows = 0
        self._nulls: dict[str, int] = {}
        self._bounds: dict[str, tuple[Any, Any]] = {}
        self._groups = 0
        self._in_footer: list[tuple[int, str]] = []

    def add(self, table: pa.Table) -> None:
        """Take more rows into account, as the next row group."""
        self._rows += table.num_rows
        self._groups += 1
        there = set(table.column_names)
        for field in self._fields or ():
            if field.name not in there:
                self._nulls[field.name] = self._nulls.get(field.name, 0) + table.num_rows
                continue
            column = table.column(field.name)
            self._nulls[field.name] = self._nulls.get(field.name, 0) + column.null_count
            if pa.types.is_binary(field.type) or column.null_count == len(column):
                continue
            # By a name with a dot the footer may mean what is inside of another column.
            is_text = pa.types.is_string(field.type) and "." not in field.name
            if is_text and pc.max(pc.binary_length(column)).as_py() <= _FOOTER_BYTES:
                self._in_footer.append((self._groups - 1, field.name))
            else:
                self._widen(field.name, _bounds(column))

    def add_footer(self, footer: Any) -> None:
        """Take over what the finished file's own statistics tell of texts: finding it again took as long as reading."""
        places = {footer.schema.column(index).path: index for index in range(len(footer.schema))}
        for group, name in self._in_footer if self._fields is not None else ():
            found = footer.row_group(group).column(places[name]).statistics
            self._widen(name, _text_bounds(found.min, found.max))

    def _widen(self, name: str, bounds: tuple[Any, Any] | None) -> None:
        if bounds is None:
            self._fields = None
            return
        smallest, largest = self._bounds.get(name, bounds)
        self._bounds[name] = min(smallest, bounds[0]), max(largest, bounds[1])

    def json(self) -> str:
        """The text for the log."""
        count = f'"numRecords":{self._rows}'
        if self._fields is None:
            return f"{{{count}}}"
        kinds = {field.name: field.type for field in self._fields}
        smallest = {name: _spelled(low, kinds[name]) for name, (low, _) in self._bounds.items()}
        largest = {name: _spelled(high, kinds[name], end=True) for name, (_, high) in self._bounds.items()}
        nulls = {name: str(count) for name, count in self._nulls.items()}
        return (
            f'{{{count},"minValues":{_object(smallest)},"maxValues":{_object(largest)},"nullCount":{_object(nulls)}}}'
        )


def _object(members: Mapping[str, str]) -> str:
    return "{" + ",".join(f"{json.dumps(name, ensure_ascii=False)}:{text}" for name, text in members.items()) + "}"


def _bounds(column: pa.ChunkedArray) -> tuple[Any, Any] | None:
    """The least and the greatest value, as what can be compared; None if there is no telling."""
    kind = column.type
    if pa.types.is_floating(kind) and pc.any(pc.is_nan(column)).as_py():
        return None
    ends = pc.min_max(column)
    low, high = ends["min"], ends["max"]
    if pa.types.is_string(kind):
        return _text_bounds(low.as_py(), high.as_py())
    if pa.types.is_date32(kind):
        ordinals = low.value + _EPOCH_ORDINAL, high.value + _EPOCH_ORDINAL
        inside = ordinals[0] >= 1 and ordinals[1] <= datetime.date.max.toordinal()
        return ordinals if inside else None
    if pa.types.is_timestamp(kind):
        try:
            _moment(low.value), _moment(high.value)
        except OverflowError:
            return None
        return low.value, high.value
    if pa.types.is_floating(kind):
        # Zero has two signs, which are equal here and may not be to a reader.
        return low.as_py() or -0.0, high.as_py() or 0.0
    return low.as_py(), high.as_py()


def _text_bounds(low: str, high: str) -> tuple[str, str] | None:
    if len(high) <= TEXT_CHARS:
        return low[:TEXT_CHARS], high
    # A text behind all that begin like the largest one: the last character that has a successor is replaced by it.
    kept = high[:TEXT_CHARS].rstrip("\U0010ffff")
    if not kept:
        return None
    following = ord(kept[-1]) + 1
    return low[:TEXT_CHARS], kept[:-1] + chr(0xE000 if following == 0xD800 else following)


def _moment(microseconds: int) -> datetime.datetime:
    return _EPOCH + datetime.timedelta(microseconds=microseconds)


def _spelled(value: Any, kind: Any, *, end: bool = False) -> str:
    """A bound as JSON."""
    if pa.types.is_timestamp(kind):
        precise = end and value >= _LAST_MILLISECOND_US
        if end and not precise:
            value = -(-value // 1_000) * 1_000
        text = _moment(value).isoformat(timespec="microseconds" if precise else "milliseconds")
        return f'"{text}Z"' if kind.tz else f'"{text}"'
    if pa.types.is_date32(kind):
        return f'"{datetime.date.fromordinal(value).isoformat()}"'
    if pa.types.is_decimal(kind):
        # With an exponent readers take it for none.
        return f"{value:f}"
    if value in (float("inf"), float("-inf")):
        return '"Infinity"' if value > 0 else '"-Infinity"'
    return json.dumps(value, ensure_ascii=False)
