"""JSON files, plain or packed, read exactly and column by column.

Belongs here: cutting a file into lines, the columns of many lines at once, rescue, and the two cheap looks at a file
(is it complete, which keys does it have). A document is read in the same way, its elements being the lines.
Does not belong here: what a record is (`json_exact.py`), which lines may skip the exact parser (`json_shapes.py`),
where a document's elements are (`json_documents.py`), unpacking (`codecs.py`), schema decisions, Dagster.

A block of whole lines is read, lines of known shape are proven by one pattern per shape, and their values are cut out
by position; every other line takes the exact parser, one by one. Both ways give the same rows.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from operator import itemgetter
from threading import Lock
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from telematics_assets.autoloader.chunks import MAX_RECORD_BYTES, Chunk, RecordTooLongError
from telematics_assets.autoloader.codecs import codec, is_complete_packed, read_up_to, unpacked
from telematics_assets.autoloader.json_documents import Elements, elements, is_complete_document
from telematics_assets.autoloader.json_exact import (
    WHITE_SPACE,
    Value,
    is_json_value,
    line_text,
    parse_record,
    rescued_keys,
)
from telematics_assets.autoloader.json_grid import Block, Ints, cut_fields, matching, proven, source_texts
from telematics_assets.autoloader.json_shapes import Shape, learn
from telematics_assets.autoloader.ordered import in_order
from telematics_assets.autoloader.spans import cut, is_string, replace
from telematics_assets.catalog import CORRUPT_RECORD
from telematics_assets.errors import UnreadableFileError

#: How much of a file is parsed at a time.
CHUNK_BYTES = 2 * 1024 * 1024

#: Values of one chunk, null ones too: short records of many columns make small chunks.
CHUNK_VALUES = 1_000_000

#: How far back from a file's end its last line is looked for, before a closing brace has to do.
TAIL_BYTES = 1024 * 1024

_BOM = b"\xef\xbb\xbf"
#: What an allocator of the C library is shown to be a usual size, just below the largest that it takes for one.
_USUAL_BYTES = 31 * 1024 * 1024

_LINE_FEED = b"\n"[0]
_FILE_PATH = "_file_path"

#: Fewer lines than this are parsed exactly before a shape is learned for them, or a known one tried on them.
_WORTH_LEARNING = 64
_WORTH_KEEPING = 16

#: Lines of a block are looked at for new shapes until so many gave shapes that few others have, or so many were seen.
_LEARN_MISSES = 4
_LEARN_LOOKS = 500
_MAX_SHAPES = 64

_EXACT = -1
_BLANK = -2


def read_json(
    source: BinaryIO,
    target: pa.Schema,
    *,
    rescued_column: str,
    raw_column: str | None,
    file_path: str,
    multi_line: bool = False,
    verbatim: Collection[str] = (),
    chunk_bytes: int = CHUNK_BYTES,
    on_unknown: Callable[[Sequence[str]], None] | None = None,
) -> Iterator[Chunk]:
    """Read a file of JSON lines, or a JSON document, in file order and in bounded memory.

    Args:
        source: The file, plain or packed; it can seek.
        target: The columns to yield: data columns, `_corrupt_record`, the raw column if any, the rescued column. A data
            column that is no string column is not filled: its key is rescued. `pa.string()` needs no conversion.
        rescued_column: Name of the rescued data column.
        raw_column: Name of the column for the line as it stands in the file, or None.
        file_path: How the rescued data names the file.
        multi_line: The file is a document: its elements are read as lines are (`json_documents.elements`).
        verbatim: String columns that show each value's source text, strings in their quotes; `null` is null as well.
        chunk_bytes: How much is parsed at a time; the rows are the same with any.
        on_unknown: Called before a chunk is yielded, with those keys of its records that name no column of `target`, in
            order of appearance.

    Yields:
        Chunks with at least one row each.

    Raises:
        UnreadableFileError: If the file is packed and can't be unpacked to its end, or a line is longer than
            `MAX_RECORD_BYTES`; rows before that place may have been yielded.
    """
    _keep_freed_pages()
    layout = _Layout.of(target, rescued_column, raw_column, file_path, verbatim)
    shapes = _Shapes()
    lines_before = 0
    opened = unpacked(source, repr(file_path))
    blocks: Iterator[bytes | Elements] = _blocks(opened, chunk_bytes)
    if multi_line:
        blocks = elements(opened, chunk_bytes)
    parts = _short(blocks, max(1, CHUNK_VALUES // len(target)))
    results = in_order(lambda part: _read_block(part, layout, shapes), parts)
    try:
        for result in results:
            if result.too_long is not None:
                raise RecordTooLongError(result.too_long)
            lines_before += result.lines
            if result.unknown and on_unknown is not None:
                on_unknown(result.unknown)
            if result.chunk.table.num_rows:
                yield result.chunk
    except RecordTooLongError as error:
        kind, remedy = (
            ("Element", "Make smaller records") if multi_line else ("Line", "Put one JSON object on each line")
        )
        raise UnreadableFileError(
            f"{kind} {lines_before + error.record + 1} of {file_path!r} is longer than {MAX_RECORD_BYTES} bytes, "
            f"the longest record that is read. {remedy}, then upload the file again."
        ) from None
    finally:
        results.close()


@cache
def _keep_freed_pages() -> None:
    """Free a large piece of memory once: glibc then keeps freed pages for the next block, up to twice that size.

    Without it every block gives its pages back and faults them in again: half a million faults in 2 M lines, which
    threads wait for each other at. The pages of this piece are never touched.
    """
    bytes(_USUAL_BYTES)


def json_keys(source: BinaryIO, limit_bytes: int, *, multi_line: bool = False) -> list[str]:
    """The top-level keys at the start of a file, for schema inference.

    Args:
        source: The file, plain or packed.
        limit_bytes: How much to look at (unpacked). Only whole lines within it count.
        multi_line: The file is a document.

    Returns:
        The keys of its records, each once, in order of appearance; lines that are no record have none.

    Raises:
        UnreadableFileError: If the file is packed and can't be unpacked so far.
    """
    opened = unpacked(source)
    head = read_up_to(opened, limit_bytes)
    cut = opened.read(1) not in (b"", b"\n")
    nothing = _Layout.of(pa.schema([]), "", None, "")
    if multi_line:
        # An element that the limit cuts has no end, and thereby is no record.
        parts = [Block.of(part) for part in elements(io.BytesIO(head), limit_bytes)]
    else:
        parts = [Block((head[: head.rfind(b"\n") + 1] if cut else head).removeprefix(_BOM))]
    return list(dict.fromkeys(key for part in parts for key in _keys_in_order(_prove(part, _Shapes(), nothing))))


def is_complete_json(source: BinaryIO, size: int, *, multi_line: bool = False) -> bool:
    """Whether a file that may still be being written has its end.

    A plain file has it if it ends with a line feed, or if its last line is one whole JSON value; of a last line longer
    than `TAIL_BYTES` only the closing brace is asked for. A document has it if it is closed; of one larger than
    `TAIL_BYTES` only the closing bracket is asked for. A packed file has it if it unpacks to its end and its content
    has it, within the limits of `codecs.py`.

    Args:
        source: The file; it can seek.
        size: Its size in bytes.
        multi_line: The file is a document.

    Returns:
        False for a file without content.
    """
    source.seek(0)
    if codec(source) is not None:
        return is_complete_packed(source, size, is_complete_document if multi_line else _is_complete_lines)
    if multi_line and size <= TAIL_BYTES:
        return is_complete_document(iter([read_up_to(source, size)]))
    source.seek(max(0, size - TAIL_BYTES))
    tail = read_up_to(source, min(size, TAIL_BYTES))
    return tail.rstrip(WHITE_SPACE).endswith((b"}", b"]")) if multi_line else _is_complete_tail(tail, size > TAIL_BYTES)


def _is_complete_lines(pieces: Iterator[bytes]) -> bool:
    tail, total = b"", 0
    for piece in pieces:
        total += len(piece)
        tail = (tail + piece)[-TAIL_BYTES:]
    return _is_complete_tail(tail, total > TAIL_BYTES)


def _is_complete_tail(tail: bytes, cut: bool) -> bool:
    """Whether a file that ends with `tail` has its end; `cut` says that more stands before it."""
    if tail.endswith(b"\n"):
        return True
    _, line_feed, line = tail.rpartition(b"\n")
    if cut and not line_feed:
        return line.rstrip(WHITE_SPACE).endswith(b"}")
    line = line if line_feed else line.removeprefix(_BOM)
    if not line.strip(WHITE_SPACE):
        return bool(line_feed)
    return is_json_value(line.decode(errors="replace"))


def _blocks(source: BinaryIO, chunk_bytes: int) -> Iterator[bytes]:
    """Cut a file into pieces of whole lines. The last line of the last piece may lack its line feed."""
    pieces: list[bytes | memoryview] = []
    open_bytes = 0
    first = True
    data = source.read(chunk_bytes)
    while data:
        following = source.read(chunk_bytes)
        cut = data.rfind(b"\n") + 1 if following else len(data)
        if cut:
            pieces.append(memoryview(data)[:cut])
            block = b"".join(pieces)
            yield block.removeprefix(_BOM) if first else block
            first = False
            pieces, open_bytes = [], 0
        pieces.append(data[cut:])
        open_bytes += len(data) - cut
        if open_bytes > MAX_RECORD_BYTES + len(_BOM) + 1:
            raise RecordTooLongError
        data = following


def _short(blocks: Iterator[bytes | Elements], lines: int) -> Iterator[bytes | Elements]:
    """Cut blocks into parts of so many lines at most."""
    for block in blocks:
        if isinstance(block, Elements):
            for start in range(0, len(block.offsets) - 1, lines):
                offsets = block.offsets[start : start + lines + 1]
                yield Elements(block.data[offsets[0] : offsets[-1]], offsets - offsets[0])
            continue
        feeds = np.frombuffer(block, np.uint8) == _LINE_FEED
        if np.count_nonzero(feeds) <= lines:
            yield block
        else:
            ends = np.flatnonzero(feeds)[lines - 1 :: lines] + 1
            for start, end in pairwise([0, *ends.tolist(), len(block)]):
                if start < end:
                    yield block[start:end]


class _Shapes:
    """The shapes that a file's lines have had so far. Threads share it: what it holds changes speed, never rows."""

    def __init__(self) -> None:
        self._lines: dict[str, int] = {}
        self._shapes: dict[str, Shape] = {}
        self._lock = Lock()

    def likely(self) -> list[Shape]:
        """The known shapes, the most frequent first."""
        with self._lock:
            return [self._shapes[key] for key in sorted(self._shapes, key=lambda key: -self._lines[key])]

    def count(self, shape: Shape, lines: int) -> None:
        """Remember that so many more lines had that shape."""
        with self._lock:
            self._shapes[shape.pattern] = shape
            self._lines[shape.pattern] = self._lines.get(shape.pattern, 0) + lines
            if len(self._shapes) > _MAX_SHAPES:
                del self._shapes[min(self._shapes, key=lambda key: self._lines[key])]


@dataclass
class _Proof:
    """What is known of each line of a block.

    Attributes:
        block: The lines.
        kinds: By line: the index of its shape, or `_EXACT`, or `_BLANK`.
        shapes: Shapes that lines of this block have.
        exact: What came of the other lines, in order.
        exact_keys: The keys of the other lines, with the line of their first appearance.
    """

    block: Block
    kinds: npt.NDArray[np.int16]
    shapes: list[Shape] = field(default_factory=list)
    exact: list[_ExactRow] = field(default_factory=list)
    exact_keys: dict[str, int] = field(default_factory=dict)


class _ExactRow(NamedTuple):
    """A line that took the exact parser.

    Attributes:
        values: The values of the accepted columns.
        rescued: The rescued data.
        corrupt: The line as text, if it is no record.
    """

    values: tuple[str | None, ...]
    rescued: str | None
    corrupt: str | None


def _prove(block: Block, shapes: _Shapes, layout: _Layout) -> _Proof:
    """Find out which lines have a known shape, learn shapes from those that have none, and parse the rest exactly."""
    proof = _Proof(block, np.full(block.lines, _EXACT, np.int16))
    proof.kinds[block.starts == block.ends] = _BLANK
    todo = np.flatnonzero(proof.kinds == _EXACT)
    if len(todo) >= _WORTH_LEARNING:
        for check in (proven, matching):
            for shape in shapes.likely():
                if len(todo) < _WORTH_KEEPING:
                    break
                todo = _mark(proof, todo, check(block, todo, shape), shape, shapes)
        misses = 0
        for index in todo[:_LEARN_LOOKS].tolist():
            if len(todo) < _WORTH_LEARNING or misses == _LEARN_MISSES:
                break
            if proof.kinds[index] != _EXACT:
                continue
            text, record = _parse(block.line(index))
            if record is None:
                continue
            before = len(todo)
            learned = learn(text, record)
            if learned is not None:
                for check in (proven, matching):
                    todo = _mark(proof, todo, check(block, todo, learned), learned, shapes)
            misses += before - len(todo) < _WORTH_KEEPING
    for index in todo.tolist():
        line = block.line(index)
        if not line.strip(WHITE_SPACE):
            proof.kinds[index] = _BLANK
            continue
        text, record = _parse(line)
        proof.exact.append(layout.row(text, record))
        for key in record or ():
            if key not in proof.exact_keys:
                proof.exact_keys[key] = index
    return proof


def _mark(proof: _Proof, todo: Ints, found: Ints, shape: Shape, shapes: _Shapes) -> Ints:
    """Mark those lines that have the shape, and return the others."""
    if not len(found):
        return todo
    if shape not in proof.shapes:
        proof.shapes.append(shape)
    proof.kinds[found] = proof.shapes.index(shape)
    shapes.count(shape, len(found))
    return cast(Ints, todo[proof.kinds[todo] == _EXACT])


def _parse(line: bytes) -> tuple[str, dict[str, Value] | None]:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return line_text(line), None
    record = parse_record(text)
    return (line_text(line), None) if record is None else (text, record)


def _keys_in_order(proof: _Proof) -> list[str]:
    """The keys of all records of a block, in order of appearance."""
    seen = [(index, key) for key, index in proof.exact_keys.items()]
    for kind, shape in enumerate(proof.shapes):
        first = int(np.argmax(proof.kinds == kind))
        seen += [(first, part.key) for part in shape.fields]
    return list(dict.fromkeys(key for _, key in sorted(seen, key=itemgetter(0))))


@dataclass(frozen=True)
class _Layout:
    """The columns to fill, and how.

    Attributes:
        target: All columns.
        accepted: The keys that fill a column of their name, with their position in `_ExactRow.values`.
        rescued_column: Name of the rescued data column.
        raw_column: Name of the raw column, or None.
        after_rescued: JSON text behind the last rescued value.
        no_values: The values of a record without accepted keys.
        verbatim: Columns that show each value's source text.
    """

    target: pa.Schema
    accepted: dict[str, int]
    rescued_column: str
    raw_column: str | None
    after_rescued: str
    no_values: tuple[None, ...]
    verbatim: frozenset[str]

    @classmethod
    def of(
        cls,
        target: pa.Schema,
        rescued_column: str,
        raw_column: str | None,
        file_path: str,
        verbatim: Collection[str] = (),
    ) -> _Layout:
        own = {CORRUPT_RECORD, rescued_column, raw_column}
        names = [column.name for column in target if column.name not in own and is_string(column.type)]
        accepted = {name: position for position, name in enumerate(names)}
        after = f',"{_FILE_PATH}":{_json(file_path)}}}'
        return cls(target, accepted, rescued_column, raw_column, after, (None,) * len(names), frozenset(verbatim))

    def before_rescued(self, keys: Sequence[str]) -> list[str]:
        """JSON text before each rescued value of a record with these unknown keys."""
        names = rescued_keys(keys, _FILE_PATH)
        return [("," if i else "{") + _json(name) + ":" for i, name in enumerate(names)]

    def row(self, text: str, record: dict[str, Value] | None) -> _ExactRow:
        """What becomes of a line that was parsed exactly."""
        if record is None:
            return _ExactRow(self.no_values, None, text)
        values = [record[name].text if name in record else None for name in self.accepted]
        for name in self.verbatim & record.keys():
            value = record[name]
            values[self.accepted[name]] = None if value.text is None else text[value.start : value.end]
        unknown = [key for key in record if key not in self.accepted]
        rescued = None
        if unknown:
            sources = [text[record[key].start : record[key].end] for key in unknown]
            befores = self.before_rescued(unknown)
            pieces = [before + source for before, source in zip(befores, sources, strict=True)]
            rescued = "".join(pieces) + self.after_rescued
        return _ExactRow(tuple(values), rescued, None)


@dataclass(frozen=True)
class _Result:
    """What a block became.

    Attributes:
        chunk: Its rows.
        lines: Its lines, blank ones too.
        unknown: Keys that name no target column, in order of appearance.
        too_long: The first line beyond the limit, from 0; its block has no rows then.
    """

    chunk: Chunk
    lines: int
    unknown: list[str] = field(default_factory=list)
    too_long: int | None = None


def _read_block(part: bytes | Elements, layout: _Layout, shapes: _Shapes) -> _Result:
    block = Block.of(part)
    too_long = np.flatnonzero(block.ends - block.starts > MAX_RECORD_BYTES)
    if len(too_long):
        return _Result(Chunk(layout.target.empty_table()), block.lines, too_long=int(too_long[0]))
    proof = _prove(block, shapes, layout)
    unknown = [key for key in _keys_in_order(proof) if key not in layout.target.names]
    return _Result(_Rows(proof, layout).chunk(), block.lines, unknown)


class _Rows:
    """The rows of a block: every line that is not blank, column by column."""

    def __init__(self, proof: _Proof, layout: _Layout) -> None:
        self._layout = layout
        self._block = proof.block
        self._lines = np.flatnonzero(proof.kinds != _BLANK)
        kinds = proof.kinds[self._lines]
        self._is_exact = kinds == _EXACT
        self._corrupt_texts = [row.corrupt for row in proof.exact if row.corrupt is not None]
        self._corrupt = np.zeros(len(self._lines), bool)
        self._corrupt[self._is_exact] = [row.corrupt is not None for row in proof.exact]
        places = [np.flatnonzero(kinds == kind) for kind in range(len(proof.shapes))]
        self._groups: list[_Group] = [
            _Group.of_shape(self._block, self._lines[rows], shape, layout)
            for shape, rows in zip(proof.shapes, places, strict=True)
        ]
        if proof.exact or not self._groups:
            self._groups.append(_Group.of_exact(proof.exact, layout))
            places.append(np.flatnonzero(self._is_exact))
        #: By row, its place among the rows of all groups, group by group; None if that is the same.
        self._order = None
        if len(self._groups) > 1:
            order = np.empty(len(self._lines), np.int32)
            order[np.concatenate(places)] = np.arange(len(order), dtype=np.int32)
            self._order = pa.array(order)

    def chunk(self) -> Chunk:
        columns = []
        rescued_rows = 0
        for column in self._layout.target:
            if column.name == CORRUPT_RECORD:
                values = replace(pa.nulls(len(self._lines), pa.string()), self._corrupt, self._corrupt_texts)
            elif column.name == self._layout.raw_column:
                values = self._raw_column()
            elif column.name == self._layout.rescued_column:
                values = self._in_order([group.rescued for group in self._groups])
                rescued_rows = len(values) - values.null_count
            elif any(column.name in group.columns for group in self._groups):
                values = self._in_order([group.column(column.name) for group in self._groups])
            else:
                values = pa.nulls(len(self._lines), column.type)
            columns.append(values if values.type == column.type else values.cast(column.type))
        table = pa.Table.from_arrays(columns, schema=self._layout.target)
        return Chunk(table, rescued_rows, len(self._corrupt_texts))

    def _raw_column(self) -> pa.StringArray:
        lines = cut(self._block.buffer, self._block.starts[self._lines], self._block.ends[self._lines])
        return replace(lines, self._corrupt, self._corrupt_texts)

    def _in_order(self, parts: list[pa.StringArray]) -> pa.StringArray:
        return parts[0] if self._order is None else pa.concat_arrays(parts).take(self._order)


@dataclass(frozen=True)
class _Group:
    """The rows of a block that have one shape, or of those that have none.

    Attributes:
        rows: How many there are.
        columns: Columns by name; others are null.
        rescued: The rescued data.
    """

    rows: int
    columns: dict[str, pa.StringArray]
    rescued: pa.StringArray

    def column(self, name: str) -> pa.StringArray:
        """One column."""
        return self.columns[name] if name in self.columns else pa.nulls(self.rows, pa.string())

    @classmethod
    def of_exact(cls, exact: list[_ExactRow], layout: _Layout) -> _Group:
        """Lines that took the exact parser."""
        columns = zip(*(row.values for row in exact), strict=True)
        named = {name: pa.array(values, pa.string()) for name, values in zip(layout.accepted, columns, strict=False)}
        return cls(len(exact), named, pa.array([row.rescued for row in exact], pa.string()))

    @classmethod
    def of_shape(cls, block: Block, lines: Ints, shape: Shape, layout: _Layout) -> _Group:
        """Lines that are proven to have a shape."""
        known = [part for part in shape.fields if part.key in layout.accepted]
        unknown = [part for part in shape.fields if part.key not in layout.accepted]
        rows = len(lines)
        # What is rescued keeps its source text, as a verbatim column does; only that `null` is a text there.
        values = cut_fields(block, lines, shape, known, [part.key in layout.verbatim for part in known])
        rescued = pa.nulls(rows, pa.string())
        if unknown:
            sources = source_texts(block, lines, shape, unknown)
            befores = layout.before_rescued([part.key for part in unknown])
            pieces = [piece for before, source in zip(befores, sources, strict=True) for piece in (before, source)]
            rescued = pc.binary_join_element_wise(*pieces, layout.after_rescued, "")
        return cls(rows, {part.key: column for part, column in zip(known, values, strict=True)}, rescued)


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
