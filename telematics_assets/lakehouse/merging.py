"""One merge by primary key through delta-rs, in bounded memory.

Belongs here: how a merge is asked of delta-rs, and the guards around it.
Does not belong here: the commit's place in the protocol (`delta.py`), what is merged, Dagster.

Facts about delta-rs 1.6: a source that Python makes piece by piece hangs it, so the source is a table in memory; a
column that is null for all rows must be in the source too, once columns are added; `a IS DISTINCT FROM b OR c` is read
as `a IS DISTINCT FROM (b OR c)`; a merge that changes no row commits nothing; and it keeps in memory all rows of every
file that it reads and finds no key in, so that two changed rows in eight million took 3 GiB. Where keys are close
together the merge is told their ranges, and reads few such files. It gathers 8,192 rows in each of its threads, several
times, however long they are; and it plans for a time that grows with the cube of the columns. Where any of that would
take too much, `rewriting.py` merges instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import polars as pl
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, WriterProperties

#: Bytes of data files without a changed row that a merge may read; as rows they take several times as much.
HELD_BYTES = 64 << 20
#: A merge into a table with more columns is not asked of delta-rs: 100 rows of 1,200 columns took it three minutes.
WIDE_COLUMNS = 256
#: Where rows take more than this in a data file, or in what is merged, delta-rs would hold too much of them.
LONG_ROW_BYTES = 512
#: Long rows of up to this size do not matter.
_FEW_BYTES = 8 << 20
#: Column that holds a row's data file while keys are looked for.
FILE = "__file"
_MARKER = "__gone"


@dataclass(frozen=True, slots=True)
class Changes:
    """What is merged; see `lakehouse.base.Table.merge`."""

    rows: pa.Table
    gone: pa.Table
    key: tuple[str, ...]
    unseen: tuple[str, ...]

    @property
    def keys(self) -> pl.DataFrame:
        """All keys."""
        names = list(self.key)
        return pl.concat([pl.DataFrame(self.rows.select(names)), pl.DataFrame(self.gone.select(names))])

    def added(self, mine: pa.Schema) -> list[str]:
        """Columns that a table has not."""
        there = set(mine.names)
        return [name for name in self.rows.schema.names if name not in there]

    def compared(self, mine: pa.Schema) -> list[str]:
        """Columns of a table by which a row is another one."""
        asked = set(mine.names).difference(self.key, self.unseen)
        return [name for name in self.rows.schema.names if name in asked]


@dataclass(frozen=True, slots=True)
class Spread:
    """How the changed rows lie in the table's files.

    Attributes:
        ranges: A condition on the first key column that they all fulfil, as SQL; None if there is none worth saying.
        held: Bytes of files without a changed row that are read all the same.
    """

    ranges: str | None
    held: int


def merge(
    handle: DeltaTable,
    changes: Changes,
    mine: pa.Schema,
    commit: CommitProperties,
    writer: WriterProperties,
    ranges: str | None = None,
) -> dict[str, Any]:
    """Merge, and say delta-rs' own figures of it.

    Args:
        handle: The open table.
        changes: What is merged.
        mine: The table's schema.
        commit: Positions and texts of the commit.
        writer: How data files are written.
        ranges: See `Spread`.
    """
    added = changes.added(mine)
    source, marker = gathered(changes, mine)
    compared = changes.compared(mine)
    differs = [f"(target.{_sql(name)} IS DISTINCT FROM source.{_sql(name)})" for name in compared]
    # Nothing else tells 0.0 from -0.0.
    zeros = [_sql(name) for name in compared if pa.types.is_floating(mine.field(name).type)]
    differs += [f"(target.{zero} = 0 AND 1.0 / target.{zero} <> 1.0 / source.{zero})" for zero in zeros]
    differs += [f"(source.{_sql(name)} IS NOT NULL)" for name in added]
    values = {_sql(name): f"source.{_sql(name)}" for name in source.schema.names if name != marker}
    is_gone = f"source.{_sql(marker)}"
    same = [f"(target.{_sql(name)} = source.{_sql(name)})" for name in changes.key]
    merger = handle.merge(
        source,
        " AND ".join([*same, *([ranges] if ranges else [])]),
        source_alias="source",
        target_alias="target",
        merge_schema=bool(added),
        commit_properties=commit,
        writer_properties=writer,
    )
    if changes.gone.num_rows:
        merger = merger.when_matched_delete(is_gone)
    if changes.rows.num_rows:
        if differs:
            merger = merger.when_matched_update(values, predicate=f"(NOT {is_gone}) AND {_any(differs)}")
        merger = merger.when_not_matched_insert(values, predicate=f"NOT {is_gone}")
    return dict(merger.execute())


def gathered(changes: Changes, mine: pa.Schema) -> tuple[pa.Table, str]:
    """What is merged as one table: the table's columns and those to add, null where they are not given.

    Args:
        changes: What is merged.
        mine: The table's schema.

    Returns:
        The table, and its column that says which rows are to go.
    """
    marker = _MARKER
    taken = {*changes.rows.schema.names, *mine.names}
    while marker in taken:
        marker += "_"
    added = (changes.rows.schema.field(name) for name in changes.added(mine))
    schema = pa.schema([*mine, *added, (marker, pa.bool_())])
    rows = [_shaped(changes.rows, schema, marker, gone=False), _shaped(changes.gone, schema, marker, gone=True)]
    return pa.concat_tables(rows), marker


def find(rows: pl.LazyFrame, changes: Changes) -> pl.LazyFrame:
    """Which files hold keys that change: file, and smallest and largest of the first key column.

    Args:
        rows: The table's rows, with `FILE`.
        changes: What is merged.
    """
    names = list(changes.key)
    first = pl.col(names[0])
    found = rows.select(*names, FILE).join(changes.keys.lazy(), on=names, how="semi")
    return found.group_by(FILE).agg(first.min().alias("low"), first.max().alias("high"))


def are_long(rows: pa.Table) -> bool:
    """Whether rows that are merged are so long that delta-rs would hold too much of them."""
    return bool(rows.nbytes > LONG_ROW_BYTES * rows.num_rows + _FEW_BYTES)


def has_long_rows(adds: pa.Table) -> bool:
    """Whether a table has rows of which its libraries would hold too much.

    Args:
        adds: Its data files, flat.
    """
    files = pl.DataFrame(adds.select(["size_bytes", "num_records"]))
    long = files.filter(pl.col("size_bytes") > LONG_ROW_BYTES * pl.col("num_records").fill_null(0))
    return int(long["size_bytes"].sum()) > _FEW_BYTES


def touched(found: pl.DataFrame, adds: pa.Table) -> list[dict[str, object]]:
    """The data files that hold keys that change, in the table's order.

    Args:
        found: What `find` gave.
        adds: The table's data files, flat.
    """
    return list(adds.select(["path", "size_bytes"]).filter(pa.array(_are_touched(found, adds), pa.bool_())).to_pylist())


def spread(found: pl.DataFrame, changes: Changes, adds: pa.Table) -> Spread:
    """How the changed rows lie in the table's files.

    Args:
        found: What `find` gave.
        changes: What is merged.
        adds: The table's data files, flat, with their statistics.
    """
    name = changes.key[0]
    untouched = pl.DataFrame(adds).filter(~pl.Series(_are_touched(found, adds), dtype=pl.Boolean))
    low, high = f"min.{name}", f"max.{name}"
    kind = changes.rows.schema.field(name).type
    if low not in untouched.columns or not (pa.types.is_integer(kind) or pa.types.is_string(kind)) or found.is_empty():
        return Spread(None, int(untouched["size_bytes"].sum()))
    bounds = list(zip(found["low"].to_list(), found["high"].to_list(), strict=True))
    column = f"target.{_sql(name)}"
    within = [f"({column} >= {_literal(least)} AND {column} <= {_literal(most)})" for least, most in bounds]
    overlaps = pl.any_horizontal(
        *((pl.col(high) >= pl.lit(least)) & (pl.col(low) <= pl.lit(most)) for least, most in bounds)
    )
    read = untouched.filter(overlaps.fill_null(True))
    return Spread(f"({' OR '.join(within)})", int(read["size_bytes"].sum()))


def _are_touched(found: pl.DataFrame, adds: pa.Table) -> list[bool]:
    there = {path.rpartition("/")[2] for path in found[FILE].to_list()}
    return [unquote(path).rpartition("/")[2] in there for path in adds["path"].to_pylist()]


def _shaped(table: pa.Table, schema: pa.Schema, marker: str, *, gone: bool) -> pa.Table:
    rows, there = table.num_rows, set(table.schema.names)
    columns = [
        pa.chunked_array([pa.repeat(pa.scalar(gone), rows)], pa.bool_())
        if field.name == marker
        else table[field.name].cast(field.type)
        if field.name in there
        else pa.chunked_array([pa.nulls(rows, field.type)], field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _any(conditions: Sequence[str]) -> str:
    """Whether one of them is true. In pairs: of six hundred in one row planning took twice as long."""
    if len(conditions) == 1:
        return conditions[0]
    half = len(conditions) // 2
    return f"({_any(conditions[:half])} OR {_any(conditions[half:])})"


def _sql(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(value: object) -> str:
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)
