"""The Spark engine: our loader plans, Spark reads the files and writes the tables.

Belongs here: which volume, tables, writer and session belong together.
Does not belong here: how a session comes to be (`session.py`), writing (`writer.py`, `tables.py`), other engines,
Dagster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from telematics_assets.autoloader.loader import BatchWriter
from telematics_assets.catalog import Names
from telematics_assets.engines.checkpointed import CheckpointEngine
from telematics_assets.engines.spark.tables import SparkLakehouse
from telematics_assets.engines.spark.writer import SparkWriter
from telematics_assets.volumes.base import Volume

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


class SparkEngine(CheckpointEngine):
    """Executes everything on Apache Spark. See `engines.base.Engine`."""

    name = "spark"

    def __init__(
        self, volume: Volume, lakehouse: SparkLakehouse, names: Names, session: Callable[[], SparkSession], **more: Any
    ) -> None:
        """Tie the engine to a Volume, tables and a session.

        Args:
            volume: The landing Volume; Spark's executors must reach it, too.
            lakehouse: The tables.
            names: Catalog, schemas and Volume name.
            session: Gives the session; called at the first row.
            **more: See `CheckpointEngine`.
        """
        super().__init__(volume, lakehouse, names, **more)
        self._tables = lakehouse
        self._session = session

    def _writer(self) -> BatchWriter:
        return SparkWriter(self._volume, self._tables, self._session)
