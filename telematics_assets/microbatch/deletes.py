"""Deleted rows: what the source's triggers noted of them, and what only a comparison of keys finds.

Belongs here: reading tombstones, and gathering the keys of both sides.
Does not belong here: the SQL that makes tombstones (`sql.py`), comparing (`keys.py`), Dagster.

A tombstone counts if the source has no row with exactly its key: the row beats it, whichever was first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from telematics_assets.microbatch.extract import Anomalies, extract
from telematics_assets.microbatch.session import Session
from telematics_assets.microbatch.source import SourceTable, quoted
from telematics_assets.microbatch.sql import SCHEMA
from telematics_assets.microbatch.types import ColumnPlan


@dataclass(frozen=True, slots=True)
class Noted:
    """What there is to know of a range.

    Attributes:
        changed: Whether any row changed.
        any: Whether there are tombstones.
        nameless: Whether some name no key (TRUNCATE, or the key is another one now): compare all keys.
        pruned: Whether some may have been pruned: compare all keys.
    """

    changed: bool
    any: bool
    nameless: bool
    pruned: bool


class Tombstones:
    """The tombstones of one table."""

    def __init__(self, session: Session, source: SourceTable, key: Sequence[str]) -> None:
        """Tie them to a transaction.

        Args:
            session: The transaction.
            source: The table.
            key: Columns of its key, in the primary key's order.
        """
        self._session = session
        self._source = source
        self._key = key
        self._root = f"coalesce(pg_partition_root({source.oid}::regclass)::oid, {source.oid}::oid)"

    def noted(self, start: int, end: int, last: int, changed: str | None = None) -> Noted:
        """What there is from `start` on and below `end`, in one question.

        Args:
            start: First position.
            end: Position behind the last.
            last: Where the reader stands: it needs no tombstones below that.
            changed: What tells whether rows changed, as SQL; None if nobody asks for them.
        """
        # The first by its position, for the index's sake: see `Rows.any_between`.
        first = f"(SELECT true FROM {self._range(start, end)} ORDER BY row_xid LIMIT 1) IS NOT NULL"
        (found,) = self._session.rows(
            f"SELECT {changed or 'false'} AS changed, {first} AS any_there, "
            f"{first} AND EXISTS (SELECT FROM {self._range(start, end)} AND {self._is_nameless}) AS nameless, "
            f"EXISTS (SELECT FROM {SCHEMA}.pruned "
            f"WHERE source = {self._root} AND pruned_below > '{last}'::xid8) AS pruned"
        )
        return Noted(found["changed"], found["any_there"], found["nameless"], found["pruned"])

    def keys(self, start: int, end: int, plans: Sequence[ColumnPlan]) -> Iterator[pa.RecordBatch]:
        """Keys that are gone, as bronze has them; each once, without those that bronze can't show.

        Args:
            start: First position.
            end: Position behind the last.
            plans: How the key's columns travel.
        """
        columns = [self._column(number, name) for number, name in enumerate(self._key, 1)]
        same = " AND ".join(
            self._same(number, name, value)
            for number, (name, value) in enumerate(zip(self._key, columns, strict=True), 1)
        )
        texts = ", ".join(self._text(number, name) for number, name in enumerate(self._key, 1))
        keys = (
            f"SELECT {', '.join(f'{c} AS {quoted(n)}' for n, c in zip(self._key, columns, strict=True))} "
            f"FROM (SELECT DISTINCT ARRAY[{texts}] AS key FROM {self._range(start, end)} "
            f"AND NOT {self._is_nameless} OFFSET 0) AS d "
            f"WHERE NOT EXISTS (SELECT FROM {self._source.rows_sql} AS t WHERE {same})"
        )
        # A key that bronze can't show never came to it: the batch that met its row was refused.
        plans = [replace(plan, required=False) for plan in plans]
        for batch in extract(self._session, f"({keys}) AS gone", plans, anomalies=Anomalies()):
            yield batch.drop_null()

    def _same(self, number: int, name: str, value: str) -> str:
        # The first finds the row by its index, the second tells `a` from `A` where the column does not.
        equal = f"t.{quoted(name)} = {value}"
        exactly = f't.{quoted(name)}::text COLLATE "C" = d.key[{number}]'
        if self._is_float(name):
            return equal
        return exactly if self._source.has_own_operators(name) else f"{equal} AND {exactly}"

    def _text(self, number: int, name: str) -> str:
        # Bronze does not tell 0 from -0 in a key, as PostgreSQL does not: they are one key, and deleted once.
        return f"(key[{number}]::float8 + 0)::text" if self._is_float(name) else f"key[{number}]"

    def _is_float(self, name: str) -> bool:
        column = self._source.column(name)
        return column is not None and column.base in ("float4", "float8")

    def _column(self, number: int, name: str) -> str:
        column = self._source.column(name)
        assert column is not None
        return f"(d.key[{number}])::{column.type}"

    def _range(self, start: int, end: int) -> str:
        # Before the first position there is none: the range may begin anywhere below.
        return (
            f"{SCHEMA}.tombstones WHERE source = {self._root} "
            f"AND row_xid >= '{start}'::xid8 AND row_xid < '{end}'::xid8"
        )

    @property
    def _is_nameless(self) -> str:
        return f"(key IS NULL OR cardinality(key) <> {len(self._key)})"


def source_keys(
    session: Session, source: SourceTable, plans: Sequence[ColumnPlan], but: str | None = None
) -> Iterator[pa.RecordBatch]:
    """The keys of all rows, as bronze has them.

    Args:
        session: The transaction.
        source: The table.
        plans: How the key's columns travel.
        but: A condition; without its rows.
    """
    where = None if but is None else f"({but}) IS NOT TRUE"
    return extract(session, source.rows_sql, plans, anomalies=Anomalies(), where=where)


def key_plans(plans: Sequence[ColumnPlan], key: Sequence[str]) -> tuple[ColumnPlan, ...]:
    """The plans of the key's columns, in the key's order."""
    by_name = {plan.source: plan for plan in plans}
    return tuple(replace(by_name[name], comment="") for name in key)
