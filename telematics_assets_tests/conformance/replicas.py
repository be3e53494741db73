"""Where a case about replicated tables runs: an engine, and a real database behind a transaction pooler.

Belongs here: what the cases may know of both, and one platform per engine.
Does not belong here: cases. They use a platform's public methods and the `Engine` protocol, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from telematics_assets.catalog import Names, ReplicatedTable
from telematics_assets.engines.base import Engine, ReplicateReport, ReplicateRequest
from telematics_assets.engines.embedded import EmbeddedEngine
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.microbatch.sql import TableSetup, setup_sql
from telematics_assets.testing import MemoryEngine
from telematics_assets_tests.databases import Database


class ReplicaPlatform:
    """An engine without tables, and a database that it replicates from."""

    def __init__(self, database: Database, new_engine: Callable[[Database], Engine]) -> None:
        """Start an engine."""
        self.database = database
        self._new_engine = new_engine
        self.engine = new_engine(database)

    def restart(self) -> Engine:
        """Go on with a fresh process, over the same tables."""
        self.engine = self._new_engine(self.database)
        return self.engine

    def run(self, *statements: str) -> None:
        """Execute statements as the database's owner, each in a transaction of its own."""
        self.database.run(*statements)

    def made(self, name: str, columns: str, *, key: Sequence[str] = ("id",), setup: bool = True) -> str:
        """Make a table, ready for mode `row_xid` unless `setup` is false; its source name."""
        self.run(f"CREATE TABLE public.{name} ({columns})")
        if setup:
            self.prepare(name, key)
        return f"public.{name}"

    def prepare(self, name: str, key: Sequence[str] = ("id",), *, partitioned: bool = False) -> None:
        """Run the SQL for mode `row_xid`."""
        self.run(setup_sql([TableSetup("public", name, tuple(key), partitioned)], role=self.database.role))

    def replicate(self, table: ReplicatedTable, *, full: bool = False, sweep: bool = False) -> ReplicateReport:
        """Replicate once."""
        return self.engine.replicate(table, ReplicateRequest(full, sweep))

    def source(self, table: ReplicatedTable, *columns: str) -> list[tuple[Any, ...]]:
        """The source's rows, sorted by the first column."""
        with self.database.connect() as connection:
            query = f"SELECT {', '.join(columns)} FROM {table.source} ORDER BY {columns[0]}"
            return connection.execute(query).fetchall()

    def bronze(self, table: ReplicatedTable, *columns: str) -> list[tuple[Any, ...]]:
        """The bronze table's rows, sorted by the first column."""
        found = self.engine.read(self.engine.names.bronze(table.target), columns).to_pylist()
        return sorted(tuple(row[name] for name in columns) for row in found)

    def assert_mirrored(self, table: ReplicatedTable, *columns: str) -> None:
        """Both sides have the same rows."""
        assert self.bronze(table, *columns) == self.source(table, *columns)

    def columns(self, table: ReplicatedTable) -> dict[str, str]:
        """The bronze table's columns with their types."""
        state = self.engine.state(self.engine.names.bronze(table.target))
        assert state is not None, "there is no table"
        return {column.name: column.type for column in state.columns}


def embedded(tmp_path: Path, database: Database) -> ReplicaPlatform:
    """The embedded engine over Delta tables in a local folder."""
    volume = MemoryEngine().volume
    return ReplicaPlatform(
        database, lambda at: EmbeddedEngine(volume, DeltaLakehouse(tmp_path / "tables"), Names(), supabase=at.supabase)
    )


def memory(tmp_path: Path, database: Database) -> ReplicaPlatform:
    """The engine in memory that users test with."""
    engine = MemoryEngine(supabase=database.supabase)
    return ReplicaPlatform(database, lambda at: engine)


def spark(tmp_path: Path, database: Database) -> ReplicaPlatform:
    """The Spark engine over Delta tables in a local folder."""
    # Only where it is asked for: it needs Spark.
    from telematics_assets.engines.spark.engine import SparkEngine
    from telematics_assets.engines.spark.tables import SparkLakehouse
    from telematics_assets_tests.conformance.spark import spark as session

    volume, lakehouse = MemoryEngine().volume, SparkLakehouse(tmp_path / "tables", session)
    return ReplicaPlatform(database, lambda at: SparkEngine(volume, lakehouse, Names(), session, supabase=at.supabase))


REPLICA_PLATFORMS: dict[str, Callable[[Path, Database], ReplicaPlatform]] = {
    "embedded": embedded,
    "memory": memory,
    "spark": spark,
}
