"""Text of JSON and csv files as typed columns, exactly or not at all.

Belongs here: which text a type can hold, the typed columns of a reader's chunk, and the rescue of what does not fit.
Does not belong here: reading text (`json_lines.py`, `delimited.py`), which type a column has (`schema.py`), guessing
types (`inference.py`), Dagster.

Readers give typed columns as text (JSON: each value's source text). A text becomes a value only if the value says the
same as the text; otherwise the column is null in that row, and the text goes verbatim into the rescued data column:

* BIGINT, INT, SMALLINT, TINYINT: digits without leading zeros, fraction, exponent or a minus before zero, in range.
* DOUBLE, FLOAT: a JSON number, if the shortest text that reads back as the same floating-point number is the same
  decimal number: `0.1`, `1.10` and `1e3` fit, `12345678901234567890123`, `0.1234567890123456789` and `1e400` do not.
* DECIMAL(p,s): a JSON number that has its value with at most s digits behind the point and p - s before it, however
  written; no minus before zero.
* BOOLEAN: `true` and `false`.
* DATE: `2026-01-31`. TIMESTAMP: `2026-01-31T12:00`, with seconds and up to six digits of them (more if they are zeros),
  a blank in place of `T`, `Z` or an offset such as `+02:00`; UTC if there is none. TIMESTAMP_NTZ: the same without `Z`
  or offset. From year 1 to 9999. In JSON these are strings.
* STRING inside of a nested value: a string's text; of any other value the source text, as in a column.
* ARRAY, STRUCT, MAP (JSON only): all that is inside must fit. A STRUCT takes no key that it lacks, not in another case
  either, and no key twice; a MAP no key twice. A key that is missing is null.

Each type is a few column operations that prove what they made; only numbers that they can't judge (exponents, 16 digits
and more) are looked at one by one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, cast

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from telematics_assets.autoloader.chunks import Chunk
from telematics_assets.autoloader.json_nested import Members, array_elements, object_members, strings
from telematics_assets.autoloader.rescue import json_text
from telematics_assets.autoloader.spans import Mask, is_string, mask, replace

_INTEGER = "^(?:0|-?[1-9][0-9]{0,18})$"
_NUMBER = r"^-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?$"
_NUMBER_PARTS = re.compile(r"(-?)([0-9]+)(?:\.([0-9]+))?(?:[eE]([+-]?)0*([0-9]*))?", re.ASCII)
_DATE = "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"
_USUAL_INSTANT = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?Z?$"
_INSTANT = (
    r"^(?<date>[0-9]{4}-[0-9]{2}-[0-9]{2})[T ](?<minutes>[0-9]{2}:[0-5][0-9])"
    r"(?:(?<seconds>:[0-5][0-9])(?:(?<fraction>\.[0-9]{1,6})0*)?)?"
    r"(?<zone>Z|(?<sign>[+-])(?<hours>0[0-9]|1[0-8]):(?<rest>[0-5][0-9]))?$"
)
_FIRST_US, _LAST_US = -62_135_596_800_000_000, 253_402_300_799_999_999
_FIRST_DAY, _LAST_DAY = -719_162, 2_932_896

#: Floating type -> decimal digits that it always gives back, if the exponent has so many digits at most.
_SURE_DIGITS = {pa.float64(): (15, 2), pa.float32(): (6, 1)}
#: Nested text is taken apart so many bytes at a time: positions cost many times what the text does.
_NESTED_BYTES = 1 << 20
#: Exponents with more digits are beyond every type.
_EXPONENT_DIGITS = 6
_POLARS: dict[pa.DataType, Any] = {
    pa.int64(): pl.Int64,
    pa.int32(): pl.Int32,
    pa.int16(): pl.Int16,
    pa.int8(): pl.Int8,
    pa.float64(): pl.Float64,
    pa.float32(): pl.Float32,
}


class Typing:
    """The typed columns of one file's chunks."""

    def __init__(self, target: pa.Schema, rescued_column: str, file_path: str, *, is_json: bool) -> None:
        """Prepare for chunks.

        Args:
            target: The columns to yield.
            rescued_column: Name of the rescued data column.
            file_path: How the rescued data names the file.
            is_json: Whether readers give JSON source texts, not plain texts.
        """
        self._target = target
        self._rescued_column = rescued_column
        self._is_json = is_json
        self._tail = f',"_file_path":{json.dumps(file_path, ensure_ascii=False)}}}'
        #: The columns that readers give as text. Of others that are no text readers rescue the values.
        self.columns = [f.name for f in target if not is_string(f.type) and _has_text(f.type, is_json=is_json)]

    @property
    def is_nested(self) -> bool:
        """Whether a typed column is nested: then a chunk is large in memory, and several at a time are too many."""
        return any(pa.types.is_nested(self._target.field(name).type) for name in self.columns)

    @property
    def reader_target(self) -> pa.Schema:
        """The target with text in place of other types: what readers are asked for."""
        typed = set(self.columns)
        return pa.schema([field.with_type(pa.string()) if field.name in typed else field for field in self._target])

    def apply(self, chunk: Chunk) -> Chunk:
        """Give a reader's chunk its types."""
        if not self.columns:
            return chunk
        arrays = {name: _one(column) for name, column in zip(chunk.table.schema.names, chunk.table, strict=True)}
        misfits: dict[str, Mask] = {}
        for name in self.columns:
            texts = arrays[name]
            kind = self._target.field(name).type
            parts = [typed(part, kind, is_json=self._is_json) for part in _parts(texts, kind)]
            arrays[name] = values = parts[0] if len(parts) == 1 else pa.concat_arrays(parts)
            if values.null_count > texts.null_count:
                misfits[name] = mask(pc.and_(pc.is_valid(texts), pc.is_null(values)))
        if misfits:
            given = {name: _one(chunk.table[name]) for name in misfits}
            arrays[self._rescued_column] = self._rescued(arrays[self._rescued_column], given, misfits)
        table = pa.Table.from_arrays(list(arrays.values()), schema=self._target)
        rescued = chunk.table.num_rows - arrays[self._rescued_column].null_count
        return Chunk(table, rescued, chunk.corrupt_rows)

    def _rescued(self, before: pa.Array, given: dict[str, pa.Array], misfits: dict[str, Mask]) -> pa.Array:
        rows = np.flatnonzero(np.logical_or.reduce(list(misfits.values())))
        members = []
        for name, misfit in misfits.items():
            values = given[name].take(pa.array(rows, mask=~misfit[rows]))
            shown = values if self._is_json else json_text(values)
            members.append(pc.binary_join_element_wise(f"{json.dumps(name, ensure_ascii=False)}:", shown, ""))
        added = pc.binary_join_element_wise(*members, ",", null_handling="skip")
        others = before.take(pa.array(rows))
        # What readers rescue ends with the file's path: the new members go in front of it.
        others = pc.utf8_slice_codeunits(others, 0, -len(self._tail))
        start = pc.if_else(pc.is_null(others), "{", pc.binary_join_element_wise(pc.fill_null(others, ""), ",", ""))
        where = np.zeros(len(before), bool)
        where[rows] = True
        return replace(before, where, pc.binary_join_element_wise(start, added, self._tail, ""))


def typed(texts: pa.StringArray, kind: pa.DataType, *, is_json: bool) -> pa.Array:
    """Texts as values of a type.

    Args:
        texts: JSON source texts, each a whole value that is not `null`; or plain texts. Null where there is no value.
        kind: The type; any that a Delta table has, BINARY and keys of maps other than STRING left out.
        is_json: Which of both the texts are.

    Returns:
        The values; null also where the type can't hold exactly what the text says.
    """
    if texts.null_count == len(texts):
        return pa.nulls(len(texts), kind)
    if pa.types.is_list(kind):
        return _lists(texts, kind)
    if pa.types.is_struct(kind):
        return _structs(texts, kind)
    if pa.types.is_map(kind):
        return _maps(texts, kind)
    if is_string(kind):
        return _strings(texts) if is_json else texts
    if pa.types.is_temporal(kind):
        plain = _series(strings(texts)[0] if is_json else texts)
        return _dates(plain) if pa.types.is_date(kind) else _timestamps(plain, kind)
    return _plain(kind)(_series(texts), kind)


def _parts(texts: pa.StringArray, kind: pa.DataType) -> Iterator[pa.StringArray]:
    """A column of nested text piece by piece, any other in one piece."""
    if not pa.types.is_nested(kind) or texts.nbytes <= _NESTED_BYTES:
        yield texts
        return
    offsets = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1]
    start = 0
    while start < len(texts):
        stop = int(np.searchsorted(offsets, offsets[start] + _NESTED_BYTES, side="right")) - 1
        stop = max(start + 1, min(stop, len(texts)))
        yield texts.slice(start, stop - start)
        start = stop


def _has_text(kind: pa.DataType, *, is_json: bool) -> bool:
    """Whether text can be values of a type."""
    if pa.types.is_nested(kind):
        if not is_json or not (pa.types.is_list(kind) or pa.types.is_struct(kind) or pa.types.is_map(kind)):
            return False
        if pa.types.is_map(kind) and not is_string(kind.key_type):
            return False
        return all(_has_text(kind.field(index).type, is_json=True) for index in range(kind.num_fields))
    if is_string(kind) or pa.types.is_date32(kind) or pa.types.is_decimal128(kind) or pa.types.is_boolean(kind):
        return True
    return kind in _POLARS or (pa.types.is_timestamp(kind) and kind.unit == "us")


def _plain(kind: pa.DataType) -> Callable[[pl.Series, pa.DataType], pa.Array]:
    if pa.types.is_integer(kind):
        return _integers
    if pa.types.is_floating(kind):
        return _floats
    return _decimals if pa.types.is_decimal(kind) else _booleans


def _integers(texts: pl.Series, kind: pa.DataType) -> pa.Array:
    return _only(texts, texts.str.contains(_INTEGER)).cast(_POLARS[kind], strict=False).to_arrow()


def _floats(texts: pl.Series, kind: pa.DataType) -> pa.Array:
    texts = _only(texts, texts.str.contains(_NUMBER))
    values = texts.cast(_POLARS[kind], strict=False)
    values = _only(values, values.is_finite())
    digits, exponent = _SURE_DIGITS[kind]
    plain = texts.str.replace(f"[eE][+-]?[0-9]{{1,{exponent}}}$", "")
    length, has_point = plain.str.len_bytes(), plain.str.contains(".", literal=True)
    # Numbers of so few digits differ in this type, so that each is the shortest text of its own.
    sure = (length <= digits + has_point.cast(pl.UInt32)) & ~plain.str.contains("[eE]")
    open_rows = (~sure & values.is_not_null()).fill_null(False).arg_true()
    if not len(open_rows):
        return values.to_arrow()
    given = texts.gather(open_rows)
    shown = pl.Series(values.gather(open_rows).to_arrow().cast(pa.string()))
    unlike = open_rows.filter(given != shown)
    wrong = [
        row
        for row, text, other in zip(
            unlike.to_list(),
            given.filter(given != shown).to_list(),
            shown.filter(given != shown).to_list(),
            strict=True,
        )
        if _number(text) != _number(other)
    ]
    return values.scatter(wrong, None).to_arrow() if wrong else values.to_arrow()


def _decimals(texts: pl.Series, kind: pa.DataType) -> pa.Array:
    whole, scale = kind.precision - kind.scale, kind.scale
    before = f"(?:0|[1-9][0-9]{{0,{whole - 1}}})" if whole else "0"
    behind = rf"(?:\.[0-9]{{1,{scale}}})?" if scale else ""
    sure = texts.str.contains(f"^-?{before}{behind}$") & ~texts.str.contains(r"^-0(?:\.0+)?$")
    values = _only(texts, sure).to_arrow().cast(pa.string()).cast(kind)
    others = (~sure & texts.str.contains(_NUMBER)).fill_null(False)
    if not others.any():
        return values
    found = [_decimal(text, whole, scale) for text in texts.filter(others).to_list()]
    return pc.replace_with_mask(values, others.to_arrow(), pa.array(found, kind))


def _decimal(text: str, whole: int, scale: int) -> Decimal | None:
    number = _number(text)
    if number is None:
        return None
    negative, digits, exponent = number
    if not digits:
        return None if negative else Decimal(0)
    if -exponent > scale or len(digits) + exponent > whole:
        return None
    return Decimal((negative, tuple(map(int, digits)), exponent))


def _number(text: str) -> tuple[bool, str, int] | None:
    """Sign, digits without zeros at either end, and exponent of a number; None if that exponent is beyond all types."""
    found = _NUMBER_PARTS.fullmatch(text)
    if found is None:
        return None
    fraction = found[3] or ""
    digits = (found[2] + fraction).lstrip("0")
    short = digits.rstrip("0")
    if not short:
        return bool(found[1]), "", 0
    if len(found[5] or "") > _EXPONENT_DIGITS:
        return None
    return bool(found[1]), short, int(f"{found[4] or ''}{found[5] or 0}") - len(fraction) + len(digits) - len(short)


def _booleans(texts: pl.Series, kind: pa.DataType) -> pa.Array:
    return _only(texts == "true", texts.is_in(["true", "false"])).to_arrow()


def _dates(texts: pl.Series) -> pa.Array:
    days = _only(texts, texts.str.contains(_DATE)).str.to_date("%Y-%m-%d", strict=False).to_physical()
    return _only(days, days.is_between(_FIRST_DAY, _LAST_DAY)).to_arrow().view(pa.date32())


def _timestamps(texts: pl.Series, kind: pa.DataType) -> pa.Array:
    usual = texts.str.contains(_USUAL_INSTANT if kind.tz else f"{_USUAL_INSTANT[:-3]}$")
    values = _microseconds(_only(texts, usual).str.strip_suffix("Z"))
    others = (~usual).fill_null(False).arg_true()
    if len(others):
        values = values.scatter(others, _unusual(texts.gather(others), kind))
    return _only(values, values.is_between(_FIRST_US, _LAST_US)).to_arrow().view(kind)


def _unusual(texts: pl.Series, kind: pa.DataType) -> pl.Series:
    """Timestamps in any accepted form, as microseconds in UTC."""
    parts = texts.str.extract_groups(_INSTANT).struct.unnest()
    local = parts.select(
        pl.format(
            "{}T{}{}{}",
            "date",
            "minutes",
            pl.col("seconds").fill_null(":00"),
            pl.col("fraction").fill_null(""),
        )
    ).to_series()
    values = _microseconds(local)
    if kind.tz is None:
        return _only(values, parts["zone"].is_null())
    east = (parts["hours"].cast(pl.Int64) * 60 + parts["rest"].cast(pl.Int64)) * 60_000_000
    return values - pl.select(pl.when(parts["sign"] == "-").then(-east).otherwise(east).fill_null(0)).to_series()


def _microseconds(local: pl.Series) -> pl.Series:
    return local.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f", time_unit="us", strict=False).to_physical()


def _strings(values: pa.StringArray) -> pa.Array:
    texts, is_text = strings(values)
    return pc.if_else(pa.array(is_text), texts, values)


def _lists(texts: pa.StringArray, kind: pa.DataType) -> pa.Array:
    rows = _starting(texts, "[")
    elements = array_elements(texts.take(pa.array(rows)))
    values = typed(elements.values, kind.value_type, is_json=True)
    bad = np.zeros(len(rows), bool)
    bad[elements.owners[_misfits(elements.values, values)]] = True
    kept = ~bad[elements.owners]
    offsets, null = _offsets(len(texts), rows, bad, elements.owners)
    return pa.ListArray.from_arrays(offsets, values.filter(pa.array(kept)), type=kind, mask=null)


def _maps(texts: pa.StringArray, kind: pa.DataType) -> pa.Array:
    rows = _starting(texts, "{")
    members = object_members(texts.take(pa.array(rows)))
    keys, _ = _codes(members)
    values = typed(members.values, kind.item_type, is_json=True)
    bad = _with_bad_keys(members, keys, len(rows))
    bad[members.owners[_misfits(members.values, values)]] = True
    kept = pa.array(~bad[members.owners])
    offsets, null = _offsets(len(texts), rows, bad, members.owners)
    return pa.MapArray.from_arrays(offsets, members.keys.filter(kept), values.filter(kept), type=kind, mask=null)


def _structs(texts: pa.StringArray, kind: pa.DataType) -> pa.Array:
    rows = _starting(texts, "{")
    members = object_members(texts.take(pa.array(rows)))
    fields = [kind.field(index) for index in range(kind.num_fields)]
    known = pc.index_in(members.keys, pa.array([field.name for field in fields], pa.string()))
    codes = pc.fill_null(known, -1).to_numpy()
    bad = _with_bad_keys(members, codes, len(rows))
    children = []
    for code, field in enumerate(fields):
        here = np.flatnonzero(codes == code)
        places = np.full(len(rows), -1)
        places[members.owners[here]] = here
        given = members.values.take(pa.array(places, mask=places < 0))
        values = typed(given, field.type, is_json=True)
        bad |= _misfits(given, values)
        children.append(values)
    places = np.full(len(texts), -1)
    places[rows[~bad]] = np.flatnonzero(~bad)
    null = places < 0
    spread = pa.array(places, mask=null)
    return pa.StructArray.from_arrays([child.take(spread) for child in children], fields=fields, mask=pa.array(null))


def _codes(members: Members) -> tuple[Any, pa.Array]:
    """A number for each key, -1 for one that is no text; and the keys by number."""
    encoded = members.keys.dictionary_encode()
    return pc.fill_null(encoded.indices, -1).to_numpy(), encoded.dictionary


def _with_bad_keys(members: Members, codes: Any, count: int) -> Mask:
    """Which objects have a key without a number, or a key twice."""
    bad = np.zeros(count, bool)
    bad[members.owners[codes < 0]] = True
    pairs = members.owners * (int(codes.max(initial=0)) + 1) + codes
    order = np.argsort(pairs, kind="stable")
    again = order[1:][pairs[order][1:] == pairs[order][:-1]]
    bad[members.owners[again]] = True
    return bad


def _offsets(count: int, rows: Any, bad: Mask, owners: Any) -> tuple[pa.Array, pa.Array]:
    """Offsets and nulls of a column of lists, in which some rows are good lists."""
    sizes = np.zeros(count, np.int64)
    sizes[rows] = np.where(bad, 0, np.bincount(owners, minlength=len(rows)))
    offsets = np.zeros(count + 1, np.int32)
    np.cumsum(sizes, out=offsets[1:])
    null = np.ones(count, bool)
    null[rows[~bad]] = False
    return pa.array(offsets), pa.array(null)


def _starting(texts: pa.StringArray, bracket: str) -> Any:
    return np.flatnonzero(mask(pc.starts_with(texts, bracket)))


def _misfits(given: pa.Array, values: pa.Array) -> Mask:
    return mask(pc.and_(pc.is_valid(given), pc.is_null(values)))


def _only(values: pl.Series, where: pl.Series) -> pl.Series:
    """The values where something holds, null elsewhere."""
    return pl.select(pl.when(where).then(values)).to_series()


def _series(texts: pa.StringArray) -> pl.Series:
    return cast(pl.Series, pl.from_arrow(texts))


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
