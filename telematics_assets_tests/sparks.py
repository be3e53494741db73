"""One Spark session for all tests of a process.

Belongs here: its options, and fixtures that hand it out. Each worker that meets such a test starts one JVM.
Does not belong here: sessions with other options: a process has one, so they need a process of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from telematics_assets.engines.spark.session import SparkOptions, session
from telematics_assets.settings import load_settings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

#: Small enough for several workers on one machine, and quick from the start: what compiles longest pays off late.
OPTIONS = SparkOptions(
    master="local[2]",
    conf={
        "spark.driver.memory": "1g",
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
        # Compiling a plan takes longer than running it over a few rows; what it computes is the same.
        "spark.sql.adaptive.enabled": "false",
        "spark.sql.codegen.wholeStage": "false",
        "spark.sql.codegen.factoryMode": "NO_CODEGEN",
        "spark.sql.shuffle.partitions": "1",
        "spark.databricks.delta.snapshotPartitions": "1",
        # After each commit Delta would work out what the table holds, for a file that only it reads.
        "spark.databricks.delta.writeChecksumFile.enabled": "false",
        "spark.databricks.delta.allFilesInCrc.enabled": "false",
        "spark.databricks.delta.incremental.commit.enabled": "false",
        "spark.python.daemon.module": "telematics_assets_tests.conformance.warm",
    },
    java_home=load_settings().spark.java_home,
)


@pytest.fixture(scope="session")
def spark() -> SparkSession:
    """The session; it ends with the process."""
    return session(OPTIONS)
