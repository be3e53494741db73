"""The one map between Arrow types and Delta types, and what a Delta column can hold exactly.

Belongs here: Delta's type names, the Arrow type of a new column, which types fit which column, casts that are exact or
say where they are not, and the statistics that Delta can be trusted with.
Does not belong here: how types are spelled (`ddl.py`), which columns a table gets (`autoloader/schema.py`), reading,
writing, Dagster.

Exact means: every value can be had back. A file's `INT` fits a table's `BIGINT`; a `BIGINT` never fits a `DOUBLE`,
because a DOUBLE has 53 bits. Timestamps and dates are held from year 1 to 9999: that is the range which Spark, SQL and
Python readers share, and a date far outside it stops delta-rs from writing the whole batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from telematics_assets.errors import SchemaError
from telematics_assets.lakehouse.ddl import ACCEPTED, MAX_DIGITS, DeltaType, holdable, parse_type, quoted

_TIMESTAMP = pa.timestamp("us", "UTC")
_TIMESTAMP_NTZ = pa.timestamp("us")

_ARROW_OF: dict[str, pa.DataType] = {
    "STRING": pa.string(),
    "BIGINT": pa.int64(),
    "INT": pa.int32(),
    "SMALLINT": pa.int16(),
    "TINYINT": pa.int8(),
    "DOUBLE": pa.float64(),
    "FLOAT": pa.float32(),
    "BOOLEAN": pa.bool_(),
    "TIMESTAMP": _TIMESTAMP,
    "TIMESTAMP_NTZ": _TIMESTAMP_NTZ,
    "DATE": pa.date32(),
    "BINARY": pa.binary(),
}
_DELTA_OF = {arrow: name for name, arrow in _ARROW_OF.items()}

#: Arrow types that become another type on their way into Delta; each holds every value of the first.
_WIDENED: dict[pa.DataType, pa.DataType] = {
    pa.uint8(): pa.int16(),
    pa.uint16(): pa.int32(),
    pa.uint32(): pa.int64(),
    pa.uint64(): pa.decimal128(20, 0),
    pa.float16(): pa.float32(),
    pa.large_string(): pa.string(),
    pa.string_view(): pa.string(),
    pa.large_binary(): pa.binary(),
    pa.binary_view(): pa.binary(),
    pa.date64(): pa.date32(),
}

#: Integer type -> (bits of the magnitude, decimal digits, signed).
_INTEGERS: dict[pa.DataType, tuple[int, int, bool]] = {
    pa.int8(): (7, 3, True),
    pa.int16(): (15, 5, True),
    pa.int32(): (31, 10, True),
    pa.int64(): (63, 19, True),
    pa.uint8(): (8, 3, False),
    pa.uint16(): (16, 5, False),
    pa.uint32(): (32, 10, False),
    pa.uint64(): (64, 20, False),
}
#: Floating type -> bits of the mantissa: integers up to these bits are held exactly.
_FLOATS: dict[pa.DataType, int] = {pa.float16(): 11, pa.float32(): 24, pa.float64(): 53}

_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}
_FIRST_SECOND, _LAST_SECOND = -62_135_596_800, 253_402_300_799
_DAY_S = 86_400

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_]+")
#: A decimal with more digits is read from the log as a rounded number.
EXACT_STATISTICS_DIGITS = 15
#: The table property that names the columns with statistics.
STATISTICS_PROPERTY = "delta.dataSkippingStatsColumns"


def arrow_type(delta: str) -> pa.DataType:
    """The Arrow type of a Delta type in SQL spelling.

    Args:
        delta: For example `BIGINT`, `DECIMAL(10,2)` or `ARRAY<STRUCT<km: DOUBLE>>`; upper or lower case.

    Raises:
        SchemaError: If there is no such type; the message lists the accepted ones.
    """
    try:
        return arrow_of(parse_type(delta))
    except ValueError as error:
        raise SchemaError(f"{delta!r} is not a column type. {ACCEPTED} Here {error}.") from None


def arrow_of(delta: DeltaType) -> pa.DataType:
    """The Arrow type of a Delta type."""
    if delta.digits is not None:
        return pa.decimal128(*delta.digits)
    if delta.name == "STRUCT":
        return pa.struct([pa.field(name, arrow_of(kind)) for name, kind in delta.parts])
    if delta.name == "MAP":
        (_, key), (_, value) = delta.parts
        return pa.map_(arrow_of(key), arrow_of(value))
    if delta.name == "ARRAY":
        return pa.list_(pa.field("element", arrow_of(delta.parts[0][1])))
    return _ARROW_OF[delta.name]


def delta_type(arrow: pa.DataType) -> str:
    """A column's type in SQL spelling, for people to read.

    Args:
        arrow: A type that a Delta table has. Others are shown as Arrow spells them.
    """
    if arrow in _DELTA_OF:
        return _DELTA_OF[arrow]
    if pa.types.is_decimal128(arrow):
        return f"DECIMAL({arrow.precision},{arrow.scale})"
    if _is_list(arrow):
        return f"ARRAY<{delta_type(arrow.value_type)}>"
    if pa.types.is_map(arrow):
        return f"MAP<{delta_type(arrow.key_type)}, {delta_type(arrow.item_type)}>"
    if pa.types.is_struct(arrow):
        return f"STRUCT<{', '.join(f'{quoted(child.name)}: {delta_type(child.type)}' for child in _children(arrow))}>"
    return str(arrow)


def storable(arrow: pa.DataType) -> pa.DataType | None:
    """The type that a new Delta column gets for a file's column type, or None if no Delta type holds it exactly.

    `TIMESTAMP_NTZ` columns raise the table's protocol (feature `timestampNtz`); delta-rs, Spark and polars read it.

    Args:
        arrow: The type in the file.
    """
    if _is_list_view(arrow):
        return storable(pa.list_(arrow.value_field))
    return _storable(arrow)


def _storable(arrow: Any) -> Any | None:
    """The same without list views: within another type Arrow casts them to empty lists."""
    if isinstance(arrow, pa.BaseExtensionType):
        return _storable(arrow.storage_type)
    if pa.types.is_dictionary(arrow):
        return _storable(arrow.value_type)
    if arrow in _DELTA_OF:
        return arrow
    if arrow in _WIDENED:
        return _WIDENED[arrow]
    if pa.types.is_fixed_size_binary(arrow):
        return pa.binary()
    if pa.types.is_timestamp(arrow):
        return _TIMESTAMP if arrow.tz else _TIMESTAMP_NTZ
    if pa.types.is_decimal(arrow):
        # Arrow knows scales below 0 and above the precision, Delta does not.
        scale = max(arrow.scale, 0)
        digits = max(arrow.precision - arrow.scale, 0) + scale
        return pa.decimal128(digits, scale) if digits <= MAX_DIGITS else None
    if _is_list(arrow):
        value = _storable(arrow.value_type)
        return None if value is None else pa.list_(pa.field("element", value))
    if pa.types.is_map(arrow):
        key, item = _storable(arrow.key_type), _storable(arrow.item_type)
        return None if key is None or item is None else pa.map_(key, item)
    if pa.types.is_struct(arrow):
        return _storable_struct(arrow)
    return None


def _storable_struct(arrow: pa.DataType) -> pa.DataType | None:
    fields = []
    for child in _children(arrow):
        held = _storable(child.type)
        if held is None or not holdable(child.name):
            return None
        fields.append(pa.field(child.name, held))
    distinct = {field.name.lower() for field in fields}
    return pa.struct(fields) if fields and len(distinct) == len(fields) else None


def fits(file_type: pa.DataType, table_type: pa.DataType) -> bool:
    """Whether a file's column can go into a table's column without loss.

    True also where single values may not fit (nanoseconds, years beyond 9999): `lossless_cast` finds those.

    Args:
        file_type: The type in the file.
        table_type: The type of the table's column.
    """
    if _is_list_view(file_type):
        file_type = pa.list_(file_type.value_field)
    return _fits(file_type, table_type)


def _fits(file_type: Any, table_type: Any) -> bool:
    if isinstance(file_type, pa.BaseExtensionType):
        return _fits(file_type.storage_type, table_type)
    if pa.types.is_dictionary(file_type):
        return _fits(file_type.value_type, table_type)
    if pa.types.is_null(file_type) or file_type == table_type or _storable(file_type) == table_type:
        return True
    if file_type in _INTEGERS:
        return _integer_fits(file_type, table_type)
    if file_type in _FLOATS:
        return table_type in _FLOATS and _FLOATS[file_type] <= _FLOATS[table_type]
    if pa.types.is_decimal(file_type) and pa.types.is_decimal(table_type):
        whole = file_type.precision - file_type.scale
        return bool(file_type.scale <= table_type.scale and whole <= table_type.precision - table_type.scale)
    if pa.types.is_date32(file_type) and table_type == _TIMESTAMP_NTZ:
        return True
    if _is_list(file_type) and _is_list(table_type):
        return _fits(file_type.value_type, table_type.value_type)
    if pa.types.is_map(file_type) and pa.types.is_map(table_type):
        return _fits(file_type.key_type, table_type.key_type) and _fits(file_type.item_type, table_type.item_type)
    if pa.types.is_struct(file_type) and pa.types.is_struct(table_type):
        known = {child.name: child.type for child in _children(table_type)}
        names = [child.name for child in _children(file_type)]
        # Arrow casts a struct by dropping the fields that the target lacks: only a subset is without loss.
        return len(set(names)) == len(names) and all(
            child.name in known and _fits(child.type, known[child.name]) for child in _children(file_type)
        )
    return False


def _integer_fits(file_type: pa.DataType, table_type: pa.DataType) -> bool:
    bits, digits, signed = _INTEGERS[file_type]
    if table_type in _INTEGERS:
        table_bits, _, table_signed = _INTEGERS[table_type]
        return bits <= table_bits and (table_signed or not signed)
    if table_type in _FLOATS:
        return bits <= _FLOATS[table_type]
    return bool(pa.types.is_decimal(table_type) and digits <= table_type.precision - table_type.scale)


def wider(table_type: pa.DataType, file_type: pa.DataType) -> pa.DataType | None:
    """The least type to which Delta lets a column be widened so that it holds a file's column too.

    Integers widen to larger ones, to DECIMAL, and up to INT to DOUBLE; FLOAT to DOUBLE; DECIMAL to one with more digits
    before or behind the point; DATE to TIMESTAMP_NTZ; and so do the values within lists, maps and structs.

    Args:
        table_type: The type of the table's column.
        file_type: The type in the file.

    Returns:
        None if the column holds the file's already, or if no such type does.
    """
    held = storable(file_type)
    joined = None if held is None else _joined(table_type, held)
    return None if joined == table_type else joined


def _joined(mine: Any, other: Any) -> Any | None:
    if fits(other, mine):
        return mine
    if mine in _INTEGERS and other in _INTEGERS:
        return other
    if pa.types.is_decimal(other) or pa.types.is_decimal(mine):
        return _joined_decimal(mine, other)
    small = {pa.int8(), pa.int16(), pa.int32()}
    if (mine in small and other in _FLOATS) or (mine == pa.float32() and other in {*small, pa.float64()}):
        return pa.float64()
    if pa.types.is_date32(mine) and other == _TIMESTAMP_NTZ:
        return other
    if _is_list(mine) and _is_list(other):
        value = _joined(mine.value_type, other.value_type)
        return None if value is None else pa.list_(mine.value_field.with_type(value))
    if pa.types.is_map(mine) and pa.types.is_map(other):
        key, item = _joined(mine.key_type, other.key_type), _joined(mine.item_type, other.item_type)
        return None if key is None or item is None else pa.map_(key, item)
    if pa.types.is_struct(mine) and pa.types.is_struct(other):
        theirs = {child.name: child.type for child in _children(other)}
        if not theirs.keys() <= {child.name for child in _children(mine)}:
            return None
        fields = [(child, _joined(child.type, theirs.get(child.name, child.type))) for child in _children(mine)]
        return None if any(kind is None for _, kind in fields) else pa.struct([f.with_type(kind) for f, kind in fields])
    return None


def _joined_decimal(mine: Any, other: Any) -> Any | None:
    whole = scale = 0
    for kind in (mine, other):
        if pa.types.is_decimal(kind):
            whole, scale = max(whole, kind.precision - kind.scale), max(scale, kind.scale)
        elif kind in _INTEGERS:
            # Delta asks for this many digits, also of small integers.
            whole = max(whole, 20 if kind == pa.int64() else 10)
        else:
            return None
    return pa.decimal128(whole + scale, scale) if whole + scale <= MAX_DIGITS else None


def is_always_exact(file_type: pa.DataType, table_type: pa.DataType) -> bool:
    """Whether a column needs neither a cast nor a look at its values: every bit pattern of its type is a value."""
    return file_type == table_type and (
        file_type in _INTEGERS or file_type in _FLOATS or pa.types.is_boolean(file_type)
    )


def plain(array: pa.Array) -> pa.Array:
    """The same values without extension type, dictionary, view or run-end encoding."""
    if isinstance(array, pa.ExtensionArray):
        return plain(array.storage)
    if isinstance(array, pa.DictionaryArray):
        return plain(array.dictionary_decode())
    if isinstance(array, pa.RunEndEncodedArray):
        return plain(pc.run_end_decode(array))
    if _is_list_view(array.type):
        # Not a cast: of a slice it makes empty lists.
        offsets = pa.array([0], pa.int32())
        lengths = pc.fill_null(pc.list_value_length(array), 0).cast(pa.int32())
        offsets = pa.concat_arrays([offsets, pc.cumulative_sum(lengths)])
        return pa.ListArray.from_arrays(offsets, array.flatten(), mask=array.is_null())
    if array.type in (pa.string_view(), pa.binary_view()):
        return array.cast(_WIDENED[array.type])
    return array


def lossless_cast(array: pa.Array, table_type: pa.DataType) -> tuple[pa.Array, pa.Array | None]:
    """Cast a column for which `fits` is true, and say which values can't be held exactly.

    Args:
        array: The file's values.
        table_type: The type of the table's column.

    Returns:
        The cast values, and None if all of them are exact; otherwise a boolean mask that is true for each value that is
        not (too fine or too far timestamps, text that is no UTF-8): those are null in the cast values.
    """
    array = plain(array)
    values = _exact(array, table_type)
    if values is not None:
        return values, None
    misfits = _misfits(array, table_type)
    values = pc.if_else(misfits, pa.scalar(None, array.type), array).cast(table_type)
    return values, misfits


def _exact(array: pa.Array, table_type: pa.DataType) -> pa.Array | None:
    """The cast array, or None if any value of it is not exact."""
    try:
        # UTF-8 is proved before the cast too: a cast of text that is no text is not defined.
        array.validate(full=True)
        values = array if array.type == table_type else array.cast(table_type)
    except pa.ArrowInvalid:
        return None
    return None if any(map(_any_out_of_range, _temporal_leaves(values))) else values


def _misfits(array: pa.Array, table_type: pa.DataType) -> pa.Array:
    if _is_temporal(array.type):
        return pc.fill_null(_out_of_range(array), False)
    if _exact(array, table_type) is not None:
        return pa.repeat(pa.scalar(False), len(array))
    if len(array) == 1:
        return pa.array([True])
    half = len(array) // 2
    # The proof of a nested slice looks at all leaves of the whole; a concatenation of one slice has only its own.
    halves = [pa.concat_arrays([part]) for part in (array.slice(0, half), array.slice(half))]
    return pa.concat_arrays([_misfits(part, table_type) for part in halves])


def _any_out_of_range(array: pa.Array) -> bool:
    bounds = _bounds(array.type)
    if bounds is None:
        return bool(pc.any(_out_of_range(array)).as_py())
    ends = pc.min_max(_numbers(array))
    smallest, largest = ends["min"].as_py(), ends["max"].as_py()
    return smallest is not None and not (bounds[0] <= smallest and largest <= bounds[1])


def _out_of_range(array: pa.Array) -> pa.Array:
    """Per value of a timestamp or date32 array: is it outside years 1 to 9999, or finer than its Delta type?"""
    numbers = _numbers(array)
    bounds = _bounds(array.type)
    if bounds is None:
        return pc.not_equal(pc.multiply(pc.divide(numbers, 1_000), 1_000), numbers)
    return pc.or_(pc.less(numbers, bounds[0]), pc.greater(numbers, bounds[1]))


def _bounds(arrow: pa.DataType) -> tuple[int, int] | None:
    """The first and last number within years 1 to 9999; None for nanoseconds, which are all within."""
    if pa.types.is_date32(arrow):
        return _FIRST_SECOND // _DAY_S, _LAST_SECOND // _DAY_S
    if arrow.unit == "ns":
        return None
    per_second = _PER_SECOND[arrow.unit]
    return _FIRST_SECOND * per_second, (_LAST_SECOND + 1) * per_second - 1


def _numbers(array: pa.Array) -> pa.Array:
    return array.view(pa.int32() if pa.types.is_date32(array.type) else pa.int64())


def _temporal_leaves(array: pa.Array) -> Iterator[pa.Array]:
    if _is_temporal(array.type):
        yield array
    elif pa.types.is_struct(array.type):
        for child in array.flatten():
            yield from _temporal_leaves(child)
    elif pa.types.is_map(array.type):
        yield from _temporal_leaves(entries(array).flatten())
    elif _is_list(array.type):
        yield from _temporal_leaves(array.flatten())


def entries(array: pa.MapArray) -> pa.ListArray:
    """A map column as a list of structs `key`, `value` (a map's own child arrays ignore slices)."""
    key, item = array.type.key_type, array.type.item_type
    return array.cast(pa.list_(pa.struct([pa.field("key", key, nullable=False), pa.field("value", item)])))


def statistics_columns(fields: Iterable[Any]) -> str:
    """The value for a new table's property `delta.dataSkippingStatsColumns`: columns with trustworthy statistics.

    delta-rs writes a decimal's smallest and largest value as a floating-point number. Beyond 15 digits that is rounded,
    and readers which skip files by it miss rows. Such columns, nested ones, and columns that a table gets later, have
    no statistics then; every other column keeps them.

    Args:
        fields: The fields of the table at its creation.
    """
    return ",".join(field.name for field in fields if has_true_statistics(field))


def has_true_statistics(field: Any) -> bool:
    """Whether that property can name a field, and what delta-rs then writes of it is true.

    Spark takes numbers, texts and times only: one other column in it, and every change of the schema fails.
    """
    return bool(
        _PLAIN_NAME.fullmatch(field.name)
        and not pa.types.is_nested(field.type)
        and not pa.types.is_boolean(field.type)
        and not pa.types.is_binary(field.type)
        and not (pa.types.is_decimal(field.type) and field.type.precision > EXACT_STATISTICS_DIGITS)
    )


def _is_temporal(arrow: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(arrow) or pa.types.is_date32(arrow))


def _is_list(arrow: pa.DataType) -> bool:
    return bool(pa.types.is_list(arrow) or pa.types.is_large_list(arrow) or pa.types.is_fixed_size_list(arrow))


def _is_list_view(arrow: Any) -> bool:
    return bool(pa.types.is_list_view(arrow) or pa.types.is_large_list_view(arrow))


def _children(struct: pa.DataType) -> list[Any]:
    return [struct.field(index) for index in range(struct.num_fields)]
