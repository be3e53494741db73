"""The Spark engine: our loader plans, Spark reads the files and writes the tables.

Belongs here: which volume, tables, writer and session belong together.
Does not belong here: how a session comes to be (`session.py`), writing (`writer.py`, `tables.py`), other engines,
Dagster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from telematics_assets.autoloader.loader import BatchWriter
from telematics_assets.catalog import FileStream, Names
from telematics_assets.engines.base import Finding
from telematics_assets.engines.checkpointed import CheckpointEngine, open_volume, options_of, tables_root
from telematics_assets.engines.spark.doctor import findings
from telematics_assets.engines.spark.queries import open_session
from telematics_assets.engines.spark.tables import SparkLakehouse
from telematics_assets.engines.spark.writer import SparkWriter
from telematics_assets.settings import Settings
from telematics_assets.volumes.base import Volume

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def open_engine(settings: Settings) -> SparkEngine:
    """The Spark engine of a deployment; no session is made yet."""

    def spark() -> SparkSession:
        return open_session(settings.spark, settings.home, settings.names, settings.supabase)

    return SparkEngine(
        open_volume(settings),
        SparkLakehouse(tables_root(settings), spark),
        settings.names,
        spark,
        checks=lambda: findings(settings.spark),
        **options_of(settings),
    )


class SparkEngine(CheckpointEngine):
    """Executes everything on Apache Spark. See `engines.base.Engine`."""

    name = "spark"

    def __init__(
        self,
        volume: Volume,
        lakehouse: SparkLakehouse,
        names: Names,
        session: Callable[[], SparkSession],
        checks: Callable[[], Sequence[Finding]] | None = None,
        **more: Any,
    ) -> None:
        """Tie the engine to a Volume, tables and a session.

        Args:
            volume: The landing Volume; Spark's executors must reach it, too.
            lakehouse: The tables.
            names: Catalog, schemas and Volume name.
            session: Gives the session; called at the first row.
            checks: What `doctor` asks beyond Volume, tables and streams.
            **more: See `CheckpointEngine`.
        """
        super().__init__(volume, lakehouse, names, **more)
        self._tables = lakehouse
        self._session = session
        self._checks = checks

    def doctor(self, streams: Sequence[FileStream] = ()) -> Sequence[Finding]:
        """See `Engine.doctor`."""
        return [*super().doctor(streams), *(self._checks() if self._checks else ())]

    def _writer(self) -> BatchWriter:
        return SparkWriter(self._volume, self._tables, self._session, self._clock)
