"""The Spark engine as a platform."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from telematics_assets.catalog import Names
from telematics_assets.engines.checkpointed import CheckpointEngine
from telematics_assets.engines.spark.engine import SparkEngine
from telematics_assets.engines.spark.session import session
from telematics_assets.engines.spark.tables import SparkLakehouse
from telematics_assets.volumes.base import Volume
from telematics_assets.volumes.local import LocalVolume
from telematics_assets_tests.conformance.platforms import DeltaPlatform
from telematics_assets_tests.conformance.served import Served
from telematics_assets_tests.sparks import OPTIONS

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def spark() -> SparkSession:
    """The session of all cases of a test process."""
    return session(OPTIONS)


class SparkPlatform(DeltaPlatform):
    """The Spark engine: a local folder as Volume, Delta tables beside it."""

    # A load takes seconds.
    stride = 6

    def _engine(self, volume: Volume, options: dict[str, Any]) -> CheckpointEngine:
        lakehouse = SparkLakehouse(self.home / "tables", spark)
        # Whatever a case has made of its Volume happens in this process.
        reached = volume if type(volume) is LocalVolume else Served(volume)
        return SparkEngine(reached, lakehouse, Names(), spark, **options)
