"""The Spark engine as a platform."""

from __future__ import annotations

import functools
import glob
import os
import sys
from typing import TYPE_CHECKING, Any

from telematics_assets.catalog import Names
from telematics_assets.engines.checkpointed import CheckpointEngine
from telematics_assets.engines.spark.engine import SparkEngine
from telematics_assets.engines.spark.tables import SparkLakehouse
from telematics_assets.volumes.base import Volume
from telematics_assets_tests.conformance.platforms import DeltaPlatform

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@functools.cache
def session() -> SparkSession:
    """A session for experiments."""
    from pyspark.sql import SparkSession

    os.environ["PYSPARK_PYTHON"] = sys.executable
    jars = glob.glob(os.path.expanduser("~/.ivy2.5.2/jars/io.*.jar"))
    builder = SparkSession.builder.master("local[2]").appName("telematics")
    for key, value in {
        "spark.jars": ",".join(jars),
        "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
        "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
        "spark.ui.enabled": "false",
        "spark.databricks.delta.snapshotPartitions": "1",
        "spark.sql.shuffle.partitions": "1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.sql.session.timeZone": "UTC",
        "spark.driver.extraJavaOptions": "-Duser.timezone=UTC",
        "spark.driver.memory": "1g",
        "spark.sql.sources.parallelPartitionDiscovery.parallelism": "2",
    }.items():
        builder = builder.config(key, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("OFF")
    return spark


class SparkPlatform(DeltaPlatform):
    """The Spark engine: a local folder as Volume, Delta tables beside it."""

    def _engine(self, volume: Volume, options: dict[str, Any]) -> CheckpointEngine:
        lakehouse = SparkLakehouse(self.home / "tables", session)
        return SparkEngine(volume, lakehouse, Names(), session, **options)
