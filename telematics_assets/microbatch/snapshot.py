"""The whole of a table in pieces: ranges of its key, in the key's own order; and what is read at once in parts.

Belongs here: where a piece ends, and the conditions that its rows and those of its parts fulfil.
Does not belong here: when a snapshot is taken and what becomes of its rows (`replicate.py`), who reads which part
(`parallel.py`), Dagster.

The order is the source's, by the key's index: bronze need not know how a collation sorts. Types of extensions sort by
their text instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from telematics_assets.microbatch.session import Session
from telematics_assets.microbatch.source import SourceTable, literal, quoted

#: A table smaller than this is read by one connection: it takes a second or two.
LEAST_BYTES = 100 << 20
#: About how many parts there are.
_PARTS = 16
# Before version 14 each range of blocks went through the whole table. Other kinds of storage number rows as they like.
_HEAP = """
SELECT pg_relation_size(c.oid) / current_setting('block_size')::int8 AS blocks,
       current_setting('block_size')::int8 AS block_bytes
FROM pg_class c JOIN pg_am a ON a.oid = c.relam
WHERE c.oid = {oid} AND a.amname = 'heap' AND current_setting('server_version_num')::int4 >= 140000
  AND has_function_privilege('pg_catalog.pg_export_snapshot()', 'EXECUTE')
"""


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of keys.

    Attributes:
        where: Its rows; None for all.
        end: The first key behind it, as text; None if nothing comes behind it.
        parts: The same rows, each in one of several smaller ranges; empty if it is not divided.
    """

    where: str | None
    end: tuple[str, ...] | None
    parts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Heap:
    """A table that can be read block by block.

    Attributes:
        blocks: How many it has.
        block_bytes: How long one is.
    """

    blocks: int
    block_bytes: int

    @property
    def size(self) -> int:
        """Its bytes, without long values that lie elsewhere."""
        return self.blocks * self.block_bytes

    def parts(self) -> tuple[str, ...]:
        """Conditions that divide its rows by the blocks where they lie; empty if it is too small for that.

        The first range begins before all rows and the last ends behind them, whatever was written meanwhile.
        """
        if self.size < LEAST_BYTES:
            return ()
        # Some for each connection, lest all wait for the last.
        blocks = range(0, self.blocks, max(self.blocks // _PARTS, 1))
        bounds = [None, *(f"'({block},0)'::tid" for block in blocks[1:]), None]
        return tuple(_between("ctid", low, high) for low, high in pairwise(bounds))


def heap_of(session: Session, source: SourceTable) -> Heap | None:
    """A plain table's blocks; None for what has none, and where several transactions can't share a snapshot.

    Args:
        session: The transaction that reads it; all rows that it sees lie in the blocks that are there now.
        source: The table.
    """
    if source.kind != "table":
        return None
    for row in session.rows(_HEAP.format(oid=source.oid)):
        return Heap(int(row["blocks"]), int(row["block_bytes"]))
    return None


def next_piece(
    session: Session,
    source: SourceTable,
    key: Sequence[str],
    start: Sequence[str] | None,
    rows: int,
    heap: Heap | None = None,
) -> Piece:
    """The next range of a table.

    Args:
        session: The transaction that reads it.
        source: The table.
        key: Columns that identify a row.
        start: Its first key, as text; None for the first range.
        rows: About how many rows a range has.
        heap: The table's blocks, if it may be read in parts.
    """
    if start is None and 0 < source.rows <= rows:
        # Going through the index to find that out takes as long as reading a tenth of the rows.
        return Piece(None, None, heap.parts() if heap else ())
    names = ", ".join(_ordered(source, name) for name in key)
    texts = ", ".join(f"{quoted(name)}::text AS k{number}" for number, name in enumerate(key))
    bounds = [None if start is None else _row(source, key, start)]
    end: tuple[str, ...] | None = None
    for step in _steps(source, key, rows, heap):
        behind = _between(names, bounds[-1], None)
        found = session.rows(
            f"SELECT {texts} FROM {source.rows_sql}{f' WHERE {behind}' if behind else ''} "
            f"ORDER BY {names} OFFSET {step} LIMIT 1"
        )
        end = tuple(str(value) for value in found[0].values()) if found else None
        bounds.append(_row(source, key, end) if end else None)
        if end is None:
            break
    parts = tuple(_between(names, low, high) for low, high in pairwise(bounds))
    return Piece(_between(names, bounds[0], bounds[-1]) or None, end, parts if len(parts) > 1 else ())


def _steps(source: SourceTable, key: Sequence[str], rows: int, heap: Heap | None) -> list[int]:
    """In which steps to go through the keys of a piece: the way through an index is no longer in several."""
    is_indexed = tuple(key) in (source.key, *source.unique_keys) and not any(map(source.has_own_operators, key))
    if heap is None or not is_indexed or heap.size * min(1.0, rows / (source.rows or rows)) < LEAST_BYTES:
        return [rows]
    step = rows // _PARTS
    return [*[step] * (_PARTS - 1), rows - step * (_PARTS - 1)]


def _between(value: str, low: str | None, high: str | None) -> str:
    """A range as a condition; nothing where it has no end at all."""
    return " AND ".join([*([f"({value}) >= {low}"] if low else []), *([f"({value}) < {high}"] if high else [])])


def _row(source: SourceTable, key: Sequence[str], texts: Sequence[str]) -> str:
    values = []
    for name, text in zip(key, texts, strict=True):
        column = source.column(name)
        assert column is not None
        values.append(literal(text) if source.has_own_operators(name) else f"{literal(text)}::{column.type}")
    return f"({', '.join(values)})"


def _ordered(source: SourceTable, name: str) -> str:
    # ORDER BY would find the type's own order by itself, and a comparison another type's: ranges with gaps.
    return f'{quoted(name)}::text COLLATE "C"' if source.has_own_operators(name) else quoted(name)
