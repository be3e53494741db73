"""The rescued data column of files with typed columns: what does not fit the table, as JSON text.

Belongs here: Arrow values as JSON text that loses nothing, and the object of one row's rescued columns.
Does not belong here: deciding what fits (`lakehouse/types.py`), JSON files (their values have a text already), Dagster.

How values look: integers and decimals with all their digits; floating-point numbers as the shortest text that reads
back as the same number; `NaN`, `Infinity` and `-Infinity` as strings; dates and times as ISO 8601 strings with all
their digits (`Z` if the type has a time zone; they are shown in UTC); durations and intervals as numbers with units
(`1500 ms`, `1 months 2 days 3 ns`); binary as base64; lists as arrays, structs as objects, maps as arrays of
`{"key":…,"value":…}`; of a union the value. Text that is no UTF-8 is `base64:…`. A date or time that no calendar shows
is its number with its unit (`4611686018427387904 us since 1970-01-01`).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from telematics_assets.autoloader.json_exact import BASE64, rescued_keys
from telematics_assets.lakehouse.types import entries, plain

_FILE_PATH = "_file_path"
_SPECIAL = '[\\x00-\\x1f"\\\\]'
#: The backslash is first: every other escape brings one.
_ESCAPES = {char: json.dumps(char)[1:-1] for char in ("\\", '"', *map(chr, range(0x20)))}


def rescued_json(columns: Mapping[str, pa.Array], file_path: str, rows: int) -> pa.Array:
    """One JSON object per row: its rescued values that are not null, then `_file_path`.

    Args:
        columns: Rescued values by column name, each of length `rows`. A column that is called `_file_path` itself gets
            underscores in front until its name is free.
        file_path: The file that the rows come from.
        rows: How many rows there are.

    Returns:
        A string array; null where a row has nothing rescued.
    """
    if not columns:
        return pa.nulls(rows, pa.string())
    members = []
    nothing = pa.repeat(pa.scalar(True), rows)
    for key, values in zip(rescued_keys(list(columns), _FILE_PATH), columns.values(), strict=True):
        text = json_text(values)
        if text.null_count == rows:
            continue
        nothing = pc.and_(nothing, pc.is_null(text))
        members.append(pc.binary_join_element_wise(_quoted(key) + ":", text, ""))
    if not members:
        return pa.nulls(rows, pa.string())
    path = pa.scalar(f"{_quoted(_FILE_PATH)}:{_quoted(file_path)}", pa.string())
    body = pc.binary_join_element_wise(*members, path, ",", null_handling="skip")
    return pc.if_else(nothing, pa.scalar(None, pa.string()), _wrapped("{", body, "}"))


def json_text(array: pa.Array) -> pa.Array:
    """Each value as JSON text; null stays null.

    Args:
        array: Values of any Arrow type.
    """
    array = plain(array)
    kind = array.type
    if pa.types.is_null(kind):
        return array.cast(pa.string())
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind):
        return array.cast(pa.string())
    if pa.types.is_floating(kind):
        return _floating(array)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _string(array)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        encoded = pl.Series(pl.from_arrow(array.cast(pa.large_binary()))).bin.encode("base64")
        return _wrapped('"', encoded.to_arrow().cast(pa.string()), '"')
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_time(kind):
        return _calendar(array)
    if pa.types.is_duration(kind):
        return _wrapped('"', array.view(pa.int64()).cast(pa.string()), f' {kind.unit}"')
    if pa.types.is_struct(kind):
        return _object(array)
    if pa.types.is_map(kind):
        return _list(entries(array))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _list(array)
    if pa.types.is_interval(kind):
        return pa.array([_interval(item.as_py()) for item in array], pa.string())
    if pa.types.is_union(kind):
        values = [item.value for item in array]
        return pa.array([None if v is None else json_text(pa.repeat(v, 1))[0].as_py() for v in values], pa.string())
    return pa.array([None if not item.is_valid else _quoted(str(item.as_py())) for item in array], pa.string())


def _interval(value: tuple[int, int, int] | None) -> str | None:
    return None if value is None else '"{} months {} days {} ns"'.format(*value)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _wrapped(before: str, text: pa.Array, after: str) -> pa.Array:
    return pc.binary_join_element_wise(before, text, after, "")


def _floating(array: pa.Array) -> pa.Array:
    wide = array.cast(pa.float32()) if pa.types.is_float16(array.type) else array
    text = wide.cast(pa.string())
    # Without the fraction a reader takes 1.0 for an integer, and -0.0 loses its sign.
    text = pc.if_else(pc.match_substring_regex(text, "^-?[0-9]+$"), pc.binary_join_element_wise(text, ".0", ""), text)
    if pc.all(pc.is_finite(wide)).as_py() in (True, None):
        return text
    special = pc.case_when(pc.make_struct(pc.is_nan(wide), pc.greater(wide, 0)), '"NaN"', '"Infinity"', '"-Infinity"')
    return pc.if_else(pc.is_finite(wide), text, pc.if_else(pc.is_null(wide), pa.scalar(None, pa.string()), special))


def _string(array: pa.Array) -> pa.Array:
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        raw = array.cast(pa.large_binary() if pa.types.is_large_string(array.type) else pa.binary()).to_pylist()
        array = pa.array([_decoded(value) for value in raw], pa.string())
    text = array.cast(pa.string())
    if pc.any(pc.match_substring_regex(text, _SPECIAL)).as_py():
        for char, escape in _ESCAPES.items():
            text = pc.replace_substring(text, char, escape)
    return _wrapped('"', text, '"')


def _decoded(value: bytes | None) -> str | None:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return BASE64 + base64.b64encode(value).decode()


def _calendar(array: pa.Array) -> pa.Array:
    """Dates, times, timestamps. With a time zone Arrow shows far years wrongly: it never sees the zone."""
    kind: Any = array.type
    unit, since, zone = "days", "1970-01-01", ""
    if pa.types.is_timestamp(kind):
        unit, zone = kind.unit, "Z" if kind.tz else ""
        array = array.view(pa.timestamp(kind.unit))
    elif pa.types.is_date64(kind):
        unit = "ms"
        array = array.view(pa.timestamp("ms"))
    elif pa.types.is_time(kind):
        unit, since = kind.unit, "midnight"
    text = pc.replace_substring(array.cast(pa.string()), " ", "T")
    shown = pc.binary_join_element_wise(text, zone, "")
    beyond = pc.starts_with(text, "<")
    if pc.any(beyond).as_py():
        numbers = array.view(pa.int32() if array.type.bit_width == 32 else pa.int64()).cast(pa.string())
        shown = pc.if_else(beyond, pc.binary_join_element_wise(numbers, f" {unit} since {since}", ""), shown)
    return _wrapped('"', shown, '"')


def _object(array: pa.StructArray) -> pa.Array:
    members = [
        _wrapped(_quoted(array.type.field(index).name) + ":", pc.fill_null(json_text(child), "null"), "")
        for index, child in enumerate(array.flatten())
    ]
    body = pc.binary_join_element_wise(*members, ",") if members else pa.repeat(pa.scalar(""), len(array))
    return pc.if_else(pc.is_null(array), pa.scalar(None, pa.string()), _wrapped("{", body, "}"))


def _list(array: pa.Array) -> pa.Array:
    lengths = pc.fill_null(pc.list_value_length(array), 0).cast(pa.int32())
    offsets = pa.concat_arrays([pa.array([0], pa.int32()), pc.cumulative_sum(lengths)])
    items = pa.ListArray.from_arrays(offsets, pc.fill_null(json_text(array.flatten()), "null"))
    return pc.if_else(pc.is_null(array), pa.scalar(None, pa.string()), _wrapped("[", pc.binary_join(items, ","), "]"))
