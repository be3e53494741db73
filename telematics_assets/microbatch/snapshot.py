"""The whole of a table in pieces: ranges of its key, in the key's own order.

Belongs here: where a piece ends, and the condition that its rows fulfil.
Does not belong here: when a snapshot is taken and what becomes of its rows (`replicate.py`), Dagster.

The order is the source's, by the key's index: bronze need not know how a collation sorts. Types of extensions sort by
their text instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from telematics_assets.microbatch.session import Session
from telematics_assets.microbatch.source import SourceTable, literal, quoted


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of keys.

    Attributes:
        where: Its rows; None for all.
        end: The first key behind it, as text; None if nothing comes behind it.
    """

    where: str | None
    end: tuple[str, ...] | None


def next_piece(
    session: Session, source: SourceTable, key: Sequence[str], start: Sequence[str] | None, rows: int
) -> Piece:
    """The next range of a table.

    Args:
        session: The transaction that reads it.
        source: The table.
        key: Columns that identify a row.
        start: Its first key, as text; None for the first range.
        rows: About how many rows a range has.
    """
    if start is None and 0 < source.rows <= rows:
        # Going through the index to find that out takes as long as reading a tenth of the rows.
        return Piece(None, None)
    names = ", ".join(_ordered(source, name) for name in key)
    behind = None if start is None else f"({names}) >= {_row(source, key, start)}"
    texts = ", ".join(f"{quoted(name)}::text AS k{number}" for number, name in enumerate(key))
    found = session.rows(
        f"SELECT {texts} FROM {source.rows_sql}{f' WHERE {behind}' if behind else ''} "
        f"ORDER BY {names} OFFSET {rows} LIMIT 1"
    )
    end = tuple(str(value) for value in found[0].values()) if found else None
    before = f"({names}) < {_row(source, key, end)}" if end else None
    return Piece(" AND ".join(condition for condition in (behind, before) if condition) or None, end)


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
