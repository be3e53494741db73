"""Spark's daemon of Python workers, with all that tasks need in memory: a worker is a fork of it.

Belongs here: what is imported before the first fork. Does not belong here: tasks.

A task that fails takes its worker with it, and passes fail often in the cases: each worker would import for a second.
"""

from __future__ import annotations

import importlib

NEEDED = (
    "pyspark.worker",
    "telematics_assets.autoloader.reading",
    "telematics_assets.engines.spark.tasks",
    "telematics_assets_tests.conformance.served",
)

if __name__ == "__main__":
    from pyspark.daemon import manager

    for module in NEEDED:
        importlib.import_module(module)
    manager()
