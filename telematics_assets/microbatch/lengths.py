"""Rows that are too long to be carried are refused before they leave the server, by their name.

Belongs here: how long rows may be, and the question whether one is longer.
Does not belong here: reading rows (`extract.py`), when it is asked (`replicate.py`), Dagster.

The driver, the merge and the change data feed each hold a row several times: one of 200 MB took 2.7 GiB. The question
is cheap: a table without TOAST has no long rows, of text the server knows the length without reading it, and of other
types it writes only those out whose stored form is large enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from telematics_assets.errors import ReplicationError
from telematics_assets.microbatch.session import Session
from telematics_assets.microbatch.source import SourceColumn, SourceTable, quoted
from telematics_assets.microbatch.types import ColumnPlan

#: Bytes of all values of one row, as text. A batch of longer ones would take more than 1 GiB of memory.
LONGEST_ROW_BYTES = 16 << 20
#: Rows up to so long are read by several connections at once, each of which holds some batches of them.
SHORT_ROW_BYTES = 1 << 20
#: How many times as long as its stored form the best compression lets a value be.
_COMPRESSION = 256
#: Types whose length the server knows without reading the value.
_OF_KNOWN_LENGTH = ("text", "varchar", "bpchar", "bytea")
#: Types that are text in bronze, and short.
_SHORT = (
    "uuid",
    "enum",
    "name",
    "inet",
    "cidr",
    "macaddr",
    "macaddr8",
    "money",
    "time",
    "timetz",
    "interval",
    "numeric",
)
_LONGEST_KEY = 100


def refuse_long_rows(
    session: Session, source: SourceTable, plans: Sequence[ColumnPlan], key: Sequence[str], where: str | None
) -> None:
    """Raise if one of the rows is too long, in one question.

    Args:
        session: The transaction that reads them.
        source: The table.
        plans: The columns that travel.
        key: Columns that identify a row.
        where: Their condition; None for all rows.

    Raises:
        ReplicationError: The message names the row, its length and its longest column.
    """
    columns = _long_columns(source, plans)
    for row in _longer(session, source, columns, key, where, LONGEST_ROW_BYTES):
        sizes = {column.name: int(row[f"n{number}"]) for number, column in enumerate(columns)}
        longest = max(sizes, key=lambda name: sizes[name])
        named = ", ".join(f"{name}={row[f'k{number}']}"[:_LONGEST_KEY] for number, name in enumerate(key))
        raise ReplicationError(
            f"The row {named} of {source.schema}.{source.name} has {sum(sizes.values()):,} bytes, {sizes[longest]:,} "
            f"of them in column {longest}, and a row may have {LONGEST_ROW_BYTES:,}: it is held in memory several "
            f"times. Nothing of this batch was read. List {longest!r} under exclude, or shorten the value."
        )


def are_short(session: Session, source: SourceTable, plans: Sequence[ColumnPlan], where: str | None) -> bool:
    """Whether no row is longer than `SHORT_ROW_BYTES`, in one question; see `refuse_long_rows`."""
    return not _longer(session, source, _long_columns(source, plans), (), where, SHORT_ROW_BYTES)


def _long_columns(source: SourceTable, plans: Sequence[ColumnPlan]) -> list[SourceColumn]:
    return [column for plan in plans if (column := source.column(plan.source)) and _may_be_long(column, plan)]


def _longer(
    session: Session,
    source: SourceTable,
    columns: Sequence[SourceColumn],
    key: Sequence[str],
    where: str | None,
    longest: int,
) -> list[dict[str, Any]]:
    """A row that is longer, if there is one: its key, and the lengths of these columns."""
    if not columns:
        return []
    lengths = [_length(column, longest) for column in columns]
    texts = [f"{quoted(name)}::text AS k{number}" for number, name in enumerate(key)]
    told = [f"({length})::int8 AS n{number}" for number, length in enumerate(lengths)]
    conditions = [
        _has_toast(source),
        *([f"({where})"] if where else []),
        f"({' + '.join(lengths)}) > {longest}",
    ]
    return session.rows(
        f"SELECT {', '.join([*texts, *told])} FROM {source.rows_sql} WHERE {' AND '.join(conditions)} LIMIT 1"
    )


def _may_be_long(column: SourceColumn, plan: ColumnPlan) -> bool:
    travels_as = plan.arrow
    is_wide = pa.types.is_string(travels_as) or pa.types.is_binary(travels_as) or pa.types.is_list(travels_as)
    return is_wide and column.base not in _SHORT


def _length(column: SourceColumn, longest: int) -> str:
    name = quoted(column.name)
    if column.base in _OF_KNOWN_LENGTH:
        return f"coalesce(octet_length({name}), 0)"
    stored = f"pg_column_size({name})"
    large = longest // _COMPRESSION
    return f"coalesce(CASE WHEN {stored} > {large} THEN octet_length({name}::text) ELSE {stored} END, 0)"


def _has_toast(source: SourceTable) -> str:
    if source.kind not in ("table", "partitioned table", "materialized view"):
        # A view may make its rows of anything.
        return "true"
    # Asked once, before any row is looked at.
    return (
        "(SELECT coalesce(sum(pg_relation_size(c.reltoastrelid)), 0) > 0 FROM pg_class c WHERE c.reltoastrelid <> 0 "
        f"AND (c.oid = {source.oid} OR c.oid IN (SELECT relid FROM pg_partition_tree({source.oid}))))"
    )
