"""A database in memory: replicated tables in tests that have no PostgreSQL.

Belongs here: source tables as Arrow tables, and a replication that compares them with the bronze tables.
Does not belong here: positions, transactions, types of PostgreSQL: `testing.postgres` and `testing.pooler` start a real
server and a real pooler, and the real replicator works on them.

Whatever its mode, a table is compared whole, as in mode `snapshot`: what a test sees of the assets, the checks and the
triggers is what they do in production, what it sees of cuts and lags is not.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from telematics_assets.catalog import Names, ReplicatedTable
from telematics_assets.engines.base import (
    Reconciliation,
    RepeatedKeys,
    ReplicateReport,
    ReplicateRequest,
    SchemaChange,
    SourceDrift,
    SourcePosition,
    SourceStatus,
)
from telematics_assets.errors import OptionError, ReplicationError
from telematics_assets.lakehouse.base import Lakehouse, Table
from telematics_assets.lakehouse.types import delta_type
from telematics_assets.microbatch.position import SOURCE_PROPERTY

_APP = "memory"
_Rows = dict[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class _Relation:
    rows: pa.Table
    key: tuple[str, ...]


class MemorySource:
    """Tables by schema and name, such as `public.policies`.

    Attributes:
        status: What the engine answers when it is asked whether the database is there.
    """

    def __init__(self) -> None:
        """A database without tables."""
        self._relations: dict[str, _Relation] = {}
        self.status = SourceStatus("ready", "A database in memory.")

    def put(self, source: str, rows: pa.Table | Mapping[str, Any], key: str | tuple[str, ...] = "id") -> None:
        """Make a table, or replace all its rows.

        Args:
            source: Schema and table.
            rows: All rows, of types that a Delta table can hold.
            key: Its primary key.

        Raises:
            OptionError: If two rows have the same key.
        """
        relation = _Relation(
            rows if isinstance(rows, pa.Table) else pa.table(dict(rows)), (key,) if isinstance(key, str) else key
        )
        if len(_by_key(relation.rows, relation.key)) != relation.rows.num_rows:
            raise OptionError(f"Two rows of {source} have the same key ({', '.join(relation.key)}). Give each its own.")
        self._relations[source] = relation

    def drop(self, source: str) -> None:
        """Drop a table."""
        del self._relations[source]

    def replicate(
        self, table: ReplicatedTable, request: ReplicateRequest, names: Names, lakehouse: Lakehouse
    ) -> ReplicateReport:
        """See `Engine.replicate`."""
        began = time.monotonic()
        self.status.require()
        relation = self._relation(table)
        rows = _shown(table, relation.rows)
        target = lakehouse.open(names.bronze(table.target))
        snapshot = "first" if target is None else "asked for" if request.full else None
        if target is None:
            target = lakehouse.create(
                names.bronze(table.target), rows.schema, table.contract.comment, {SOURCE_PROPERTY: table.source}
            )
        bronze = target.read()
        before, after = _by_key(bronze, relation.key), _by_key(rows, relation.key)
        kept = before.keys() - after.keys() if table.deletes == "none" else set()
        deleted = before.keys() - after.keys() - kept
        updated = [key for key in before.keys() & after.keys() if before[key] != after[key]]
        added = [name for name in rows.schema.names if name not in bronze.schema.names]
        if deleted or updated or added or after.keys() - before.keys():
            stay = pa.Table.from_pylist([before[key] for key in kept], rows.schema)
            batches = pa.concat_tables([rows, stay]).to_batches()
            target.overwrite(rows.schema, batches, {_APP: target.version + 1}, {})
        return ReplicateReport(
            source=table.source,
            table=str(target.name),
            mode=table.mode,
            inserted=len(after.keys() - before.keys()),
            updated=len(updated),
            deleted=len(deleted),
            batches=int(bool(deleted or updated or added or after.keys() - before.keys())),
            lag_seconds=0.0,
            snapshot=snapshot,
            swept=request.sweep,
            schema_changes=tuple(SchemaChange(name, delta_type(rows.schema.field(name).type)) for name in added),
            table_version=target.version,
            table_rows=target.count(),
            seconds=time.monotonic() - began,
        )

    def reconcile(self, table: ReplicatedTable, bronze: Table) -> Reconciliation:
        """See `Engine.reconcile`."""
        self.status.require()
        relation = self._relation(table)
        there, here = _by_key(relation.rows, relation.key), _by_key(bronze.read(), relation.key)
        missing, extra = there.keys() - here.keys(), here.keys() - there.keys()
        examples = tuple(str(key) for key in [*missing, *extra][:5])
        return Reconciliation(len(there), len(here), len(missing), len(extra), examples)

    def positions(self, tables: Sequence[ReplicatedTable], names: Names, lakehouse: Lakehouse) -> list[SourcePosition]:
        """See `Engine.source_positions`; the position is 1 as long as anything differs."""
        self.status.require()
        found = []
        for table in tables:
            bronze = lakehouse.open(names.bronze(table.target))
            rows = _shown(table, self._relation(table).rows)
            key = self._relation(table).key
            same = bronze is not None and _by_key(bronze.read(), key) == _by_key(rows, key)
            found.append(SourcePosition(table.source, None if same else 1, None if bronze is None else 1))
        return found

    def drift(self, tables: Sequence[ReplicatedTable]) -> list[SourceDrift]:
        """See `Engine.source_drift`."""
        self.status.require()
        found = []
        for table in tables:
            if table.source not in self._relations:
                found.append(SourceDrift(table.source, "missing", "It is declared and not in the database."))
                continue
            there = self._relations[table.source].rows.schema.names
            declared = [*(column.name for column in table.contract.columns), *table.exclude, *table.hash]
            if gone := [name for name in declared if name not in there]:
                found.append(SourceDrift(table.source, "column", f"{', '.join(gone)} is not there."))
        new = sorted(self._relations.keys() - {table.source for table in tables})
        return [*found, *(SourceDrift(name, "undeclared", "It is not declared.") for name in new)]

    def repeated_keys(self, table: ReplicatedTable, bronze: Table) -> RepeatedKeys:
        """See `Engine.repeated_keys`."""
        key = self._relation(table).key
        rows = bronze.count()
        return RepeatedKeys(key, rows, rows - len(_by_key(bronze.read(), key)))

    def _relation(self, table: ReplicatedTable) -> _Relation:
        if table.source not in self._relations:
            raise ReplicationError(f"There is no table {table.source} in the database. Put it into the source first.")
        return self._relations[table.source]


def _by_key(rows: pa.Table, key: tuple[str, ...]) -> _Rows:
    return {tuple(row[name] for name in key): row for row in rows.to_pylist()}


def _shown(table: ReplicatedTable, rows: pa.Table) -> pa.Table:
    """The columns as they arrive in the bronze table."""
    rows = rows.drop_columns([name for name in table.exclude if name in rows.schema.names])
    for name in table.hash:
        digests = [None if v is None else hashlib.sha256(f"{v}".encode()).hexdigest() for v in rows[name].to_pylist()]
        rows = rows.set_column(rows.schema.get_field_index(name), name, pa.array(digests, pa.string()))
    return rows
