"""The rows of a block of JSON lines: which lines have a known shape, what the others are, and the columns of all.

Belongs here: proving and parsing the lines of a block, rescue, what a record's row shows.
Does not belong here: what a record is (`json_exact.py`), shapes themselves (`json_shapes.py`), proving and cutting many
lines of a shape at once (`json_grid.py`), files (`json_lines.py`), schema decisions, Dagster.

Lines of known shape are proven together, and their values are cut out by position; every other line takes the exact
parser, one by one. Both ways give the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import itemgetter
from threading import Lock
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from telematics_assets.autoloader.chunks import MAX_RECORD_BYTES, Chunk
from telematics_assets.autoloader.json_documents import Elements
from telematics_assets.autoloader.json_exact import WHITE_SPACE, Value, line_text, parse_record, rescued_keys
from telematics_assets.autoloader.json_grid import Block, Ints, cut_fields, matching, proven, source_texts
from telematics_assets.autoloader.json_shapes import Shape, learn
from telematics_assets.autoloader.spans import cut, is_string, replace
from telematics_assets.catalog import CORRUPT_RECORD

_FILE_PATH = "_file_path"

#: Fewer lines than this are parsed exactly before a shape is learned for them, or a known one tried on them.
_WORTH_LEARNING = 64
_WORTH_KEEPING = 16
#: Of long lines fewer will do, if they have so many bytes together: but not fewer than these.
_WORTH_BYTES = 65_536
_LEAST_LEARNING = 8
_LEAST_KEEPING = 2

#: Lines of a block are looked at for new shapes until so many gave shapes that few others have, or so many were seen.
_LEARN_MISSES = 4
_LEARN_LOOKS = 500
_MAX_SHAPES = 64

_EXACT = -1
_BLANK = -2


class Shapes:
    """The shapes that a file's lines have had so far. Threads share it: what it holds changes speed, never rows."""

    def __init__(self) -> None:
        self._lines: dict[Shape, int] = {}
        self._lock = Lock()

    def likely(self) -> list[Shape]:
        """The known shapes, the most frequent first."""
        with self._lock:
            return sorted(self._lines, key=lambda shape: -self._lines[shape])

    def count(self, shape: Shape, lines: int) -> None:
        """Remember that so many more lines had that shape."""
        with self._lock:
            self._lines[shape] = self._lines.get(shape, 0) + lines
            if len(self._lines) > _MAX_SHAPES:
                del self._lines[min(self._lines, key=lambda shape: self._lines[shape])]


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


def _prove(block: Block, shapes: Shapes, layout: Layout | None) -> _Proof:
    """Find out which lines have a known shape, learn shapes from those that have none, and parse the rest exactly.

    Args:
        block: The lines.
        shapes: What lines looked like so far.
        layout: What becomes of the rest; None if only keys are asked for.
    """
    proof = _Proof(block, np.full(block.lines, _EXACT, np.int16))
    proof.kinds[block.starts == block.ends] = _BLANK
    todo = np.flatnonzero(proof.kinds == _EXACT)
    few = _WORTH_BYTES * block.lines // max(len(block.data), 1)
    learning = min(_WORTH_LEARNING, max(_LEAST_LEARNING, few))
    keeping = min(_WORTH_KEEPING, max(_LEAST_KEEPING, few // 4))
    if len(todo) >= learning:
        for check in (proven, matching):
            for shape in shapes.likely():
                if len(todo) < keeping:
                    break
                todo = _mark(proof, todo, check(block, todo, shape), shape, shapes)
        misses = 0
        for index in todo[:_LEARN_LOOKS].tolist():
            if len(todo) < learning or misses == _LEARN_MISSES:
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
            misses += before - len(todo) < keeping
    for index in todo.tolist():
        line = block.line(index)
        if not line.strip(WHITE_SPACE):
            proof.kinds[index] = _BLANK
            continue
        text, record = _parse(line)
        if layout is not None:
            proof.exact.append(layout.row(text, record))
        for key in record or ():
            if key not in proof.exact_keys:
                proof.exact_keys[key] = index
    return proof


def _mark(proof: _Proof, todo: Ints, found: Ints, shape: Shape, shapes: Shapes) -> Ints:
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
class Layout:
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
    ) -> Layout:
        """The layout of a file. See `json_lines.read_json`."""
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
class Result:
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


def read_block(part: bytes | Elements, layout: Layout, shapes: Shapes) -> Result:
    """Read a block.

    Args:
        part: Whole lines of a file, or elements of a document.
        layout: The columns to fill.
        shapes: What the file's lines looked like so far; threads may share it.
    """
    block = Block.of(part)
    too_long = np.flatnonzero(block.ends - block.starts > MAX_RECORD_BYTES)
    if len(too_long):
        return Result(Chunk(layout.target.empty_table()), block.lines, too_long=int(too_long[0]))
    proof = _prove(block, shapes, layout)
    there = set(layout.target.names)
    unknown = [key for key in _keys_in_order(proof) if key not in there]
    return Result(_Rows(proof, layout).chunk(), block.lines, unknown)


def record_keys(block: Block) -> list[str]:
    """The keys of all records of a block, in order of appearance."""
    return _keys_in_order(_prove(block, Shapes(), None))


class _Rows:
    """The rows of a block: every line that is not blank, column by column."""

    def __init__(self, proof: _Proof, layout: Layout) -> None:
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
    def of_exact(cls, exact: list[_ExactRow], layout: Layout) -> _Group:
        """Lines that took the exact parser."""
        columns = zip(*(row.values for row in exact), strict=True)
        named = {name: pa.array(values, pa.string()) for name, values in zip(layout.accepted, columns, strict=False)}
        return cls(len(exact), named, pa.array([row.rescued for row in exact], pa.string()))

    @classmethod
    def of_shape(cls, block: Block, lines: Ints, shape: Shape, layout: Layout) -> _Group:
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


@lru_cache(4_096)
def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
