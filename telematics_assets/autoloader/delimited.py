"""Delimited files (`csv`), plain or packed, read exactly and column by column.

Belongs here: cutting a file into blocks of whole records, the header, the columns of many records at once, rescue, and
the two cheap looks at a file (is it complete, which columns does it have).
Does not belong here: what a record is (`delimited_exact.py`), unpacking (`codecs.py`), schema decisions, Dagster.

In a block the records are found whose quotes all stand where quotes belong; their values are cut out by position. Every
other record takes the exact parser, one by one. Both ways give the same rows.

Columns are filled by the header's names, all of them text. A name that is empty becomes `_c<position>`, from 0; one
that stands twice gets its position behind it, each time. Without a header columns are named by the caller, those
beyond `_c<position>`. A record with too few fields has nulls at its end; what it has too many is rescued as
`_c<position>`. Empty lines are no records.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from telematics_assets.autoloader import spans
from telematics_assets.autoloader.chunks import MAX_RECORD_BYTES, Chunk, RecordTooLongError
from telematics_assets.autoloader.codecs import LOOK_BYTES, codec, is_complete_packed, read_up_to, unpacked
from telematics_assets.autoloader.delimited_exact import MAX_FIELDS, Dialect, Record, parse_record
from telematics_assets.autoloader.json_exact import line_text, rescued_keys
from telematics_assets.autoloader.ordered import in_order
from telematics_assets.autoloader.rescue import rescued_json
from telematics_assets.catalog import CORRUPT_RECORD
from telematics_assets.errors import UnreadableFileError

#: How much of a file is parsed at a time.
CHUNK_BYTES = 8 * 1024 * 1024

#: Values of one chunk, null ones too: files of short records and many columns make small chunks.
CHUNK_VALUES = 1_000_000

_BOM = b"\xef\xbb\xbf"
_LINE_FEED, _RETURN = b"\n\r"
_FILE_PATH = "_file_path"
_PIECE = 1024 * 1024
#: So many fields beyond the header's are rescued column by column, more of them record by record.
_EXTRA_COLUMNS = 16

_Ints = npt.NDArray[np.int64]


def read_csv(
    source: BinaryIO,
    target: pa.Schema,
    *,
    dialect: Dialect,
    names: Sequence[str],
    rescued_column: str,
    raw_column: str | None,
    file_path: str,
    chunk_bytes: int = CHUNK_BYTES,
    on_unknown: Callable[[Sequence[str]], None] | None = None,
) -> Iterator[Chunk]:
    """Read a delimited file, in file order and in bounded memory.

    Args:
        source: The file, plain or packed; it can seek.
        target: The columns to yield: data columns, `_corrupt_record`, the raw column if any, the rescued column. A data
            column that is no string column is not filled: its values are rescued.
        dialect: How the file is written.
        names: Names of the first columns of a file without a header.
        rescued_column: Name of the rescued data column: JSON of the values that fit no column, empty ones left out.
        raw_column: Name of the column for the record as it stands in the file, or None.
        file_path: How the rescued data names the file.
        chunk_bytes: How much is parsed at a time; the rows are the same with any.
        on_unknown: Called before the first chunk with those of the file's columns that name no column of `target`, in
            order.

    Yields:
        Chunks with at least one row each.

    Raises:
        UnreadableFileError: If the file can't be unpacked to its end, its header is no record, or a record is longer
            than `MAX_RECORD_BYTES`; rows before that place may have been yielded.
    """
    rows = 0
    try:
        blocks = _blocks(unpacked(source, repr(file_path)), dialect, chunk_bytes)
        columns, first = _header(blocks, dialect, names, repr(file_path))
        there = set(target.names)
        unknown = [name for name in columns if name not in there]
        if unknown and on_unknown is not None:
            on_unknown(unknown)
        layout = _Layout.of(columns, target, rescued_column, raw_column, file_path)
        size = max(1, CHUNK_VALUES // (len(target) + len(columns)))
        parts = (part for block in chain(first, blocks) for part in block.parts(size))
        results = in_order(lambda part: _Rows(part, layout).chunk(), parts, lambda part: len(part.data))
        try:
            for chunk in results:
                rows += chunk.table.num_rows
                yield chunk
        finally:
            results.close()
    except RecordTooLongError:
        raise UnreadableFileError(
            f"Record {rows + 1} of {file_path!r} is longer than {MAX_RECORD_BYTES} bytes, the longest record that is "
            "read. Look for a quote that is not closed, then upload the file again."
        ) from None


def csv_keys(source: BinaryIO, *, dialect: Dialect, names: Sequence[str]) -> list[str]:
    """The columns of a delimited file, for schema inference.

    Args:
        source: The file, plain or packed.
        dialect: How the file is written.
        names: Names of the first columns of a file without a header.

    Returns:
        Their names in order; none if the file has no header.

    Raises:
        UnreadableFileError: If the file can't be unpacked so far, or its header is no record.
    """
    try:
        return _header(_blocks(unpacked(source), dialect, _PIECE), dialect, names, "the file")[0]
    except RecordTooLongError:
        raise UnreadableFileError(
            f"The first record is longer than {MAX_RECORD_BYTES} bytes. Look for a quote that is not closed."
        ) from None


def is_complete_csv(source: BinaryIO, size: int, *, dialect: Dialect) -> bool:
    """Whether a file that may still be being written has its end.

    It has it if it ends with a line feed that no quote holds open: without one nobody can tell `2.5` from the start of
    `2.53`. Quotes are counted, so that one too many in a text makes the file wait; of a plain file beyond
    `codecs.LOOK_BYTES` only the line feed is asked for. A packed file must unpack to its end, too, within the limits of
    `codecs.py`.

    Args:
        source: The file; it can seek.
        size: Its size in bytes.
        dialect: How the file is written.

    Returns:
        False for a file without content.
    """
    quote = dialect.quote.encode() if dialect.multi_line else b""

    def is_closed(pieces: Iterator[bytes]) -> bool:
        last, quotes = b"", 0
        for last in pieces:
            quotes += last.count(quote) if quote else 0
        return last.endswith(b"\n") and quotes % 2 == 0

    source.seek(0)
    if codec(source) is not None:
        return is_complete_packed(source, size, is_closed)
    if size > LOOK_BYTES:
        source.seek(size - 1)
        return source.read(1) == b"\n"
    return is_closed(iter(lambda: source.read(_PIECE), b""))


@dataclass(frozen=True)
class _Block:
    """Some whole records of a file, empty lines left out.

    Attributes:
        data: Their bytes.
        dialect: How the file is written.
        starts: Where each record starts.
        stops: Where each record ends, without its line end.
        separators: Where separators stand, outside of quotes.
        exact: Which records need the exact parser.
        end: Where the first record starts that may go on behind `data`.
    """

    data: bytes
    dialect: Dialect
    starts: _Ints
    stops: _Ints
    separators: _Ints
    exact: spans.Mask
    end: int

    def part(self, first: int, last: int | None = None) -> _Block:
        """Some of the records."""
        return replace(self, starts=self.starts[first:last], stops=self.stops[first:last], exact=self.exact[first:last])

    def parts(self, size: int) -> Iterator[_Block]:
        """All records, so many at a time."""
        return (self.part(at, at + size) for at in range(0, len(self.starts), size))

    def record(self, index: int) -> Record:
        """One record, exactly."""
        return parse_record(self.data, int(self.starts[index]), self.dialect)


def _blocks(opened: BinaryIO, dialect: Dialect, chunk_bytes: int) -> Iterator[_Block]:
    """Cut a file into blocks of whole records."""
    data = read_up_to(opened, chunk_bytes + len(_BOM)).removeprefix(_BOM)
    while data:
        following = read_up_to(opened, chunk_bytes)
        block = _cut(data, dialect, final=not following)
        too_long = np.flatnonzero(block.stops - block.starts > MAX_RECORD_BYTES)
        if len(too_long):
            yield block.part(0, int(too_long[0]))
            raise RecordTooLongError
        yield block
        data = data[block.end :]
        if following and len(data) > MAX_RECORD_BYTES:
            raise RecordTooLongError
        data += following


def _cut(data: bytes, dialect: Dialect, *, final: bool) -> _Block:
    """Find the records of some bytes that begin with one."""
    raw = np.frombuffer(data, np.uint8)
    line_ends = np.flatnonzero(raw == _LINE_FEED)
    if final and not data.endswith(b"\n"):
        line_ends = np.append(line_ends, len(data))
    is_quote = raw == ord(dialect.quote) if dialect.quote else np.zeros(len(raw), bool)
    quotes = np.flatnonzero(is_quote)
    separators = np.flatnonzero(raw == ord(dialect.sep))
    if len(quotes):
        odd = (np.cumsum(is_quote, dtype=np.uint8) & 1).astype(bool)
        held = _odd_before(odd, line_ends)
        misplaced = _misplaced(raw, quotes, np.arange(len(quotes)), dialect, final=final)
        unclosed = final and len(quotes) % 2 == 1
        if len(misplaced) or unclosed or (held.any() and not dialect.multi_line):
            return _cut_by_lines(raw, data, line_ends, quotes, separators, odd, dialect, final=final)
        separators = separators[~odd[separators]]
        line_ends = line_ends[~held]
    starts = np.append(np.zeros(1, np.int64), line_ends + 1)
    return _block(raw, data, dialect, starts[:-1], line_ends, separators, None, min(int(starts[-1]), len(data)))


def _cut_by_lines(
    raw: npt.NDArray[np.uint8],
    data: bytes,
    line_ends: _Ints,
    quotes: _Ints,
    separators: _Ints,
    odd: spans.Mask,
    dialect: Dialect,
    *,
    final: bool,
) -> _Block:
    """Find the records where some quotes stand oddly: most lines are records of their own, the others are parsed."""
    starts = np.append(np.zeros(1, np.int64), line_ends + 1)
    lines = len(line_ends)
    if not lines:
        return _block(raw, data, dialect, line_ends, line_ends, separators, None, 0)
    bounds = np.searchsorted(quotes, starts)
    in_lines = quotes[: bounds[-1]]
    of_line = np.repeat(np.arange(lines), np.diff(bounds))
    suspect = np.diff(bounds) % 2 == 1
    suspect[of_line[_misplaced(raw, in_lines, np.arange(len(in_lines)) - bounds[of_line], dialect, final=final)]] = True
    starts = starts[:-1]
    # In a line where no quote starts a field all quotes are text.
    in_fields = (in_lines > starts[of_line]) & (raw[np.maximum(in_lines, 1) - 1] != ord(dialect.sep))
    plain = np.ones(lines, bool)
    plain[of_line[~in_fields]] = False
    suspect &= ~plain
    stops = line_ends.copy()
    kept = np.ones(lines, bool)
    end = int(line_ends[-1]) + 1
    at = 0
    suspects = np.flatnonzero(suspect)
    for line, start, line_end in zip(
        suspects.tolist(), starts[suspects].tolist(), line_ends[suspects].tolist(), strict=True
    ):
        if start < at:
            continue
        record = parse_record(data, start, dialect)
        if not record.ended and not final:
            kept[line:] = False
            end = start
            break
        at = record.end
        if record.ended and at == line_end + 1:
            continue
        following = int(np.searchsorted(starts, at)) if record.ended else lines
        kept[line + 1 : following] = False
        stops[line] = line_ends[following - 1] if record.ended else len(data)
    # Parity counts from the line's start: what came before it is over.
    line_of = np.searchsorted(starts, separators, side="right") - 1
    separators = separators[plain[line_of] | (odd[separators] == _odd_before(odd, starts)[line_of])]
    return _block(raw, data, dialect, starts[kept], stops[kept], separators, suspect[kept], min(end, len(data)))


def _block(
    raw: npt.NDArray[np.uint8],
    data: bytes,
    dialect: Dialect,
    starts: _Ints,
    line_ends: _Ints,
    separators: _Ints,
    exact: spans.Mask | None,
    end: int,
) -> _Block:
    returns = (line_ends > starts) & (line_ends < len(data)) & (raw[np.maximum(line_ends, 1) - 1] == _RETURN)
    stops = line_ends - returns
    there = stops > starts
    exact = np.zeros(len(starts), bool) if exact is None else exact
    return _Block(data, dialect, starts[there], stops[there], separators, exact[there], end)


def _odd_before(odd: spans.Mask, places: _Ints) -> spans.Mask:
    """Whether an odd number of quotes stands before each place."""
    before: spans.Mask = (places > 0) & odd[np.maximum(places, 1) - 1]
    return before


def _misplaced(raw: npt.NDArray[np.uint8], quotes: _Ints, numbers: _Ints, dialect: Dialect, *, final: bool) -> _Ints:
    """Which quotes don't stand where they belong, if those with even numbers open a field and the others close it."""
    quote, sep = ord(dialect.quote), ord(dialect.sep)
    opens = (numbers & 1) == 0
    opening = quotes[opens]
    before = raw[np.maximum(opening, 1) - 1]
    good = np.empty(len(quotes), bool)
    good[opens] = (opening == 0) | (before == sep) | (before == _LINE_FEED) | ((before == quote) & (numbers[opens] > 0))
    closing = quotes[~opens]
    padded = np.append(raw, np.array([_LINE_FEED, _LINE_FEED], np.uint8))
    after, then = padded[closing + 1], padded[closing + 2]
    line_end = (after == _RETURN) & (then == _LINE_FEED)
    if final:
        line_end &= closing + 2 < len(raw)
    good[~opens] = (after == sep) | (after == _LINE_FEED) | (after == quote) | line_end
    return np.flatnonzero(~good)


def _header(
    blocks: Iterator[_Block], dialect: Dialect, names: Sequence[str], file: str
) -> tuple[list[str], list[_Block]]:
    """The names of a file's columns, and the first block, without the header."""
    block = next((block for block in blocks if len(block.starts)), None)
    if block is None:
        return [] if dialect.header else list(names), []
    if dialect.header:
        record = block.record(0)
        if record.fields is None:
            shown = line_text(block.data[int(block.starts[0]) : record.stop])[:120]
            raise UnreadableFileError(
                f"The header of {file} is no record of at most {MAX_FIELDS} fields in UTF-8: {shown!r}. "
                "Mend it, or read the file with other options (sep, quote, header)."
            )
        return _unique(record.fields), [block.part(1)]
    records = (block.record(index) for index in range(len(block.starts)))
    width = next((len(record.fields) for record in records if record.fields is not None), 0)
    return [*names, *_beyond(names, len(names), width)], [block]


def _unique(fields: Sequence[str | None]) -> list[str]:
    """A header's fields as names that differ."""
    given = Counter(fields)
    taken = {field for field in given if field and given[field] == 1}
    names = []
    for index, field in enumerate(fields):
        name = field
        if not field or given[field] > 1:
            name = f"{field or '_c'}{index}"
            while name in taken:
                name += "_"
            taken.add(name)
        names.append(str(name))
    return names


def _beyond(names: Sequence[str], first: int, last: int) -> list[str]:
    """Names for columns that have none."""
    taken = set(names)
    beyond = []
    for index in range(first, last):
        name = f"_c{index}"
        while name in taken:
            name += "_"
        beyond.append(name)
    return beyond


@dataclass(frozen=True)
class _Layout:
    """The columns to fill, and how.

    Attributes:
        columns: The names of the file's columns.
        target: The columns to yield.
        placed: Which of the file's columns fill a column of their name.
        rescued: The other ones' names in the rescued data.
        rescued_column: Name of the rescued data column.
        raw_column: Name of the raw column, or None.
        file_path: How the rescued data names the file.
    """

    columns: Sequence[str]
    target: pa.Schema
    placed: dict[str, int]
    rescued: dict[int, str]
    rescued_column: str
    raw_column: str | None
    file_path: str

    @classmethod
    def of(
        cls, columns: Sequence[str], target: pa.Schema, rescued_column: str, raw_column: str | None, file_path: str
    ) -> _Layout:
        own = {CORRUPT_RECORD, rescued_column, raw_column}
        held = {column.name for column in target if column.name not in own and spans.is_string(column.type)}
        placed = {name: index for index, name in enumerate(columns) if name in held}
        unknown = [index for index, name in enumerate(columns) if name not in held]
        keys = rescued_keys([columns[index] for index in unknown], _FILE_PATH)
        rescued = dict(zip(unknown, keys, strict=True))
        return cls(columns, target, placed, rescued, rescued_column, raw_column, file_path)

    def row(self, fields: Sequence[str | None]) -> str | None:
        """The rescued data of a record that was parsed exactly."""
        found = {key: fields[index] for index, key in self.rescued.items() if index < len(fields)}
        found |= dict(zip(self.extra(len(fields)), fields[len(self.columns) :], strict=True))
        members: dict[str, str] = {key: text for key, text in found.items() if text is not None}
        if not members:
            return None
        return json.dumps({**members, _FILE_PATH: self.file_path}, ensure_ascii=False, separators=(",", ":"))

    def extra(self, width: int) -> list[str]:
        """The names of fields beyond the file's columns, in the rescued data."""
        if width <= len(self.columns):
            return []
        return _beyond([*self.columns, *self.rescued.values()], len(self.columns), width)


class _Rows:
    """The rows of some records, column by column."""

    def __init__(self, block: _Block, layout: _Layout) -> None:
        self._layout = layout
        self._text = pa.py_buffer(block.data)
        self._bytes = np.frombuffer(block.data, np.uint8)
        self._quote = ord(block.dialect.quote) if block.dialect.quote else -1
        self._doubled = block.dialect.quote * 2
        self._starts, self._stops = block.starts.astype(np.int32), block.stops.astype(np.int32)
        first, last = np.searchsorted(block.separators, [block.starts[0], block.stops[-1]])
        self._separators = block.separators[first:last].astype(np.int32)
        self._first = np.searchsorted(self._separators, self._starts)
        self._counts = np.searchsorted(self._separators, self._stops) - self._first + 1
        self._exact = block.exact | (self._counts > min(len(layout.columns) + _EXTRA_COLUMNS, MAX_FIELDS))
        if not spans.is_utf8(block.data[block.starts[0] : block.stops[-1]]):
            high = np.flatnonzero(self._bytes > 0x7F)
            places = np.searchsorted(block.starts, high, side="right") - 1
            self._exact[places[places >= 0]] = True
        records = [block.record(index) for index in np.flatnonzero(self._exact).tolist()]
        self._fields = [record.fields or () for record in records]
        self._corrupt = np.zeros(len(self._starts), bool)
        self._corrupt[self._exact] = [record.fields is None for record in records]
        ends = zip(block.starts[self._corrupt].tolist(), block.stops[self._corrupt].tolist(), strict=True)
        self._corrupt_texts = [line_text(block.data[start:stop]) for start, stop in ends]
        proven = self._counts[~self._exact]
        self._width = int(proven.max()) if len(proven) else 0

    def chunk(self) -> Chunk:
        columns = []
        rescued_rows = 0
        for column in self._layout.target:
            if column.name == CORRUPT_RECORD:
                values = spans.replace(pa.nulls(len(self._starts), pa.string()), self._corrupt, self._corrupt_texts)
            elif column.name == self._layout.raw_column:
                values = spans.cut(self._text, self._starts, np.where(self._corrupt, self._starts, self._stops))
                values = spans.replace(values, self._corrupt, self._corrupt_texts)
            elif column.name == self._layout.rescued_column:
                values = self._rescued_column()
                rescued_rows = len(values) - values.null_count
            elif column.name in self._layout.placed:
                values = self._column(self._layout.placed[column.name])
            else:
                values = pa.nulls(len(self._starts), column.type)
            columns.append(values if values.type == column.type else values.cast(column.type))
        table = pa.Table.from_arrays(columns, schema=self._layout.target)
        return Chunk(table, rescued_rows, len(self._corrupt_texts))

    def _column(self, index: int) -> pa.StringArray:
        texts = [fields[index] if index < len(fields) else None for fields in self._fields]
        return spans.replace(self._proven_column(index), self._exact, texts)

    def _proven_column(self, index: int) -> pa.StringArray:
        if index >= self._width:
            return pa.nulls(len(self._starts), pa.string())
        there = (self._counts > index) & ~self._exact
        # A row without the field keeps an empty span at its start, so that spans stay in order.
        starts = self._starts.copy()
        if index:
            starts[there] = self._separators[self._first[there] + (index - 1)] + 1
        stops = starts.copy()
        followed = there & (self._counts > index + 1)
        stops[followed] = self._separators[self._first[followed] + index]
        last = there & ~followed
        stops[last] = self._stops[last]
        null = starts == stops
        quoted = (self._bytes[np.minimum(starts, len(self._bytes) - 1)] == self._quote) & ~null
        if not quoted.any():
            return spans.cut(self._text, starts, stops, null)
        values = spans.cut(self._text, starts + quoted, stops - quoted, null)
        doubled = quoted & spans.mask(pc.match_substring(values, self._doubled))
        found = pc.replace_substring(values.filter(pa.array(doubled)), self._doubled, self._doubled[0])
        return spans.replace(values, doubled, found)

    def _rescued_column(self) -> pa.StringArray:
        layout = self._layout
        keys = {**layout.rescued, **dict(enumerate(layout.extra(self._width), len(layout.columns)))}
        rescued = {key: self._proven_column(index) for index, key in keys.items() if index < self._width}
        values = rescued_json(rescued, layout.file_path, len(self._starts))
        return spans.replace(values, self._exact, [layout.row(fields) for fields in self._fields])
