"""How a Spark session comes to be: one for each process, made when it is first asked for.

Belongs here: what a user chooses about Spark, the settings of a session and which of them belong to a local driver
only, and starting it.
Does not belong here: reading the environment (`settings.py`), which catalogs there are (`catalogs.py`), looking for
what is wrong (`doctor.py`).

The resource of dagster-pyspark is not used: it takes whatever session the process has, whatever its settings, knows no
Spark Connect, and engines know no Dagster.
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from telematics_assets.engines.spark import jars
from telematics_assets.engines.spark.catalogs import JAR
from telematics_assets.engines.spark.java import find_java
from telematics_assets.engines.spark.shipping import ship
from telematics_assets.errors import MissingExtraError, SparkError, SparkUnavailableError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

#: More than these cores a driver of our own takes only if it is told to: each holds buffers of its own.
_CORES = 8
#: How long a cluster or a Connect server may take to accept a connection, seconds.
_REACH_LIMIT = 10
_CONNECT_PORT = 15002
_DELTA_CATALOG = "org.apache.spark.sql.delta.catalog.DeltaCatalog"
_JAR_SETTINGS = ("spark.jars", "spark.jars.packages", "spark.driver.extraClassPath")
_UTC = "-Duser.timezone=UTC -Dfile.encoding=UTF-8"

#: What a session's answers depend on, wherever it runs.
_SEMANTICS = {
    "spark.sql.ansi.enabled": "true",
    # Delta drops an append's transaction silently where this is another one.
    "spark.sql.sources.default": "delta",
    "spark.sql.session.timeZone": "UTC",
    # A file's columns may differ in case only; a table's may not.
    "spark.sql.caseSensitive": "true",
    "spark.sql.parquet.datetimeRebaseModeInRead": "CORRECTED",
    "spark.sql.parquet.datetimeRebaseModeInWrite": "CORRECTED",
    "spark.sql.parquet.int96RebaseModeInRead": "CORRECTED",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.execution.arrow.pyspark.enabled": "true",
}
#: What a driver of our own needs for Delta, whether its executors are on this machine or on a cluster.
_DRIVER = {
    "spark.ui.showConsoleProgress": "false",
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": _DELTA_CATALOG,
}
#: What fits one machine: few and small partitions, no server that others could reach.
_LOCAL = {
    "spark.databricks.delta.snapshotPartitions": "2",
    "spark.sql.sources.parallelPartitionDiscovery.parallelism": "2",
    "spark.ui.enabled": "false",
    "spark.driver.memory": "2g",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    "spark.sql.catalogImplementation": "in-memory",
}
_QUIET = """\
rootLogger.level = error
logger.gateway.name = org.apache.spark.api.python.PythonGatewayServer
logger.gateway.level = error
# What a task raises reaches the driver as an exception, and is told there once.
logger.executor.name = org.apache.spark.executor.Executor
logger.executor.level = off
logger.tasks.name = org.apache.spark.scheduler.TaskSetManager
logger.tasks.level = off
logger.writer.name = org.apache.spark.sql.delta.files.DeltaFileFormatWriter
logger.writer.level = off
logger.utils.name = org.apache.spark.util.Utils
logger.utils.level = off
rootLogger.appenderRef.stderr.ref = stderr
appender.stderr.type = Console
appender.stderr.name = stderr
appender.stderr.target = SYSTEM_ERR
appender.stderr.layout.type = PatternLayout
appender.stderr.layout.pattern = %d{HH:mm:ss} %p %c{1}: %m%n%ex
"""


@dataclass(frozen=True, slots=True)
class SparkOptions:
    """What a deployment chose about Spark.

    Attributes:
        master: Spark master: `local[*]` (all cores, eight at most), `local[n]`, `spark://…`, `yarn`, `k8s://…`.
        remote: URL of a Spark Connect server, `sc://host:port`, instead of a driver of our own.
        jars: Folder that holds the jars; None for one of the user's, which is filled at the first start.
        repository: URL of a Maven repository that has the jars; Maven Central if None.
        conf: Further Spark settings; they win over ours.
        java_home: `JAVA_HOME` as set, which Spark's own scripts read as well.
    """

    master: str = "local[*]"
    remote: str | None = None
    jars: Path | None = None
    repository: str | None = None
    conf: Mapping[str, str] = field(default_factory=dict, repr=False)
    java_home: Path | None = None

    @property
    def local(self) -> bool:
        """Whether Spark runs in one process on this machine."""
        return self.remote is None and self.master.partition("[")[0] == "local"


@dataclass(frozen=True, slots=True)
class _Made:
    options: SparkOptions
    more: dict[str, str]
    spark: SparkSession


_lock = threading.Lock()
_made: _Made | None = None


def session(options: SparkOptions, more: Mapping[str, str] | None = None) -> SparkSession:
    """This process's Spark session; the first call starts it, which takes seconds.

    Args:
        options: What the deployment chose.
        more: Further settings of ours, those of catalogs among them; the user's win over them.

    Raises:
        MissingExtraError: If pyspark is not installed.
        JavaMissingError: If there is no Java that Spark runs on.
        SparkJarsError: If jars are missing.
        SparkUnavailableError: If a cluster, a Connect server or a repository does not answer, or the session's JVM has
            ended.
        SparkError: If this process has a session with other options, or Spark refuses these.
    """
    global _made
    asked = dict(more or {})
    with _lock:
        if _made is not None and _is_open(_made.spark):
            if (_made.options, _made.more) != (options, asked):
                raise SparkError(
                    "This process has a Spark session with other options, and a process can have only one.",
                    "Use the same options throughout, or another process.",
                )
            return _made.spark
        _made = _Made(options, asked, _start(options, asked))
        return _made.spark


def settings_of(options: SparkOptions, more: Mapping[str, str], jar_files: str = "") -> dict[str, str]:
    """The settings of a session: ours, then the user's own, which win.

    Args:
        options: What the deployment chose.
        more: Further settings of ours.
        jar_files: URLs of our jars, separated by commas.
    """
    user = dict(options.conf)
    ours = dict(_SEMANTICS)
    if options.remote is None:
        ours |= _DRIVER | {"spark.driver.extraJavaOptions": _UTC, "spark.executor.extraJavaOptions": _UTC}
        if jar_files:
            ours["spark.jars"] = jar_files
    if options.local:
        ours |= _LOCAL | {"spark.sql.shuffle.partitions": str(_cores())}
    ours |= more
    # Where the user names a catalog, all of it is the user's.
    for name in [name for name in user if re.fullmatch(r"spark\.sql\.catalog\.[^.]+", name)]:
        ours = {key: value for key, value in ours.items() if key != name and not key.startswith(f"{name}.")}
    for name in ("spark.jars", "spark.sql.extensions"):
        if name in user and name in ours and ours[name] not in user[name]:
            user[name] = f"{ours[name]},{user[name]}"
    for name in ("spark.driver.extraJavaOptions", "spark.executor.extraJavaOptions"):
        if name in user and name in ours:
            # Of two equal options a JVM takes the last.
            user[name] = f"{ours[name]} {user[name]}"
    return {**ours, **user}


def brings_own_delta(options: SparkOptions) -> bool:
    """Whether the user's settings name jars of Delta: then none of ours are added.

    Args:
        options: What the deployment chose.
    """
    return any("delta-spark" in options.conf.get(name, "") for name in _JAR_SETTINGS)


def require_pyspark() -> None:
    """See to it that pyspark is there.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import pyspark  # noqa: F401
    except ImportError:
        raise MissingExtraError("The Spark engine", "spark") from None


def reach(options: SparkOptions) -> str | None:
    """Connect to the cluster's master or the Connect server, and hang up.

    Args:
        options: What the deployment chose.

    Returns:
        Who answered; None where there is nobody to ask: Spark runs here, or YARN or Kubernetes know where.

    Raises:
        SparkUnavailableError: If nobody did.
    """
    if options.remote is not None:
        what, fix = "The Spark Connect server", "Is it running, and is TELEMATICS_SPARK_REMOTE right?"
        places = [options.remote.removeprefix("sc://").partition("/")[0]]
    elif options.master.startswith("spark://"):
        what, fix = "The Spark master", "Is it running, and is TELEMATICS_SPARK_MASTER right?"
        places = options.master.removeprefix("spark://").split(",")
    else:
        return None
    faults = []
    for place in places:
        host, _, port = place.rpartition(":") if ":" in place else (place, "", str(_CONNECT_PORT))
        try:
            socket.create_connection((host.strip("[]"), int(port)), _REACH_LIMIT).close()
        except OSError as error:
            faults.append(f"{place} ({error})")
        else:
            return place
    raise SparkUnavailableError(f"{what} does not answer at {', '.join(faults)}.", fix)


def _start(options: SparkOptions, more: Mapping[str, str]) -> SparkSession:
    require_pyspark()
    from pyspark.errors import PySparkException
    from pyspark.sql import SparkSession

    if options.remote is not None:
        # Without them pyspark ends the process, and calls that a success.
        if any(importlib.util.find_spec(module) is None for module in ("google", "grpc", "grpc_status", "zstandard")):
            raise MissingExtraError("Spark Connect", "spark")
        reach(options)
        settings = settings_of(options, more)
        try:
            spark = SparkSession.builder.remote(options.remote).config(map={**settings}).getOrCreate()
        except ImportError:
            raise MissingExtraError("Spark Connect", "spark") from None
        except PySparkException as error:
            raise SparkError(f"The Spark Connect server gave no session: {_first_line(error)}") from error
        ship(spark, _own_folder(), connect=True)
        _hush()
        return spark

    from py4j.protocol import Py4JError
    from pyspark import SparkContext

    if SparkContext._active_spark_context is not None:
        raise SparkError(
            "This process has a Spark session that something else made.",
            "Run the Spark engine in a process of its own, or end that session first.",
        )
    java = find_java(options.java_home)
    reach(options)
    files = [JAR]
    if not brings_own_delta(options):
        if options.jars is not None:
            files += jars.check(options.jars)
        else:
            ivy_settings = options.conf.get("spark.jars.ivySettings")
            files += jars.fetch(jars.default_folder(), java, options.repository, ivy_settings)
    settings = settings_of(options, more, ",".join(file.absolute().as_uri() for file in files))
    master = options.master
    if master == "local[*]":
        master = f"local[{_cores()}]"
    folder = _own_folder()
    quiet = f"-Dlog4j2.configurationFile={(folder / 'log4j2.properties').as_uri()}"
    settings["spark.driver.extraJavaOptions"] = f"{quiet} {settings['spark.driver.extraJavaOptions']}"
    if options.local:
        settings.setdefault("spark.sql.warehouse.dir", (folder / "warehouse").as_uri())
    builder = SparkSession.builder.master(master).appName("telematics_assets").config(map={**settings})
    try:
        spark = builder.getOrCreate()
    except (PySparkException, Py4JError, OSError) as error:
        raise SparkError(
            f"Spark did not start: {_first_line(error)}",
            "What it printed on stderr says more; `telematics doctor` looks at Java, jars and settings.",
        ) from error
    if options.local or "spark.pyspark.python" in settings:
        # Functions of this package run in Python processes beside the JVMs, which need its libraries.
        spark.sparkContext.pythonExec = settings.get("spark.pyspark.python", sys.executable)
    if not options.local:
        ship(spark, folder, connect=False)
    _hush()
    return spark


def _hush() -> None:
    """Errors are raised: pyspark's loggers would print each once more on stderr, with the JVM's whole stack."""
    from pyspark.logger import PySparkLogger

    for name in ("DataFrameQueryContextLogger", "SQLQueryContextLogger"):
        PySparkLogger.getLogger(name).setLevel(logging.CRITICAL)


def _own_folder() -> Path:
    """A folder that goes with the process: what Spark would drop into the current one, and how much it says."""
    folder = Path(tempfile.mkdtemp(prefix="telematics-spark-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "log4j2.properties").write_text(_QUIET, encoding="utf-8")
    return folder


def _is_open(spark: SparkSession) -> bool:
    if not hasattr(spark, "_jsparkSession"):
        return not getattr(spark, "is_stopped", False)
    from py4j.protocol import Py4JError

    java_context = spark.sparkContext._jsc
    try:
        # A cluster that gave up on its driver stops the JVM's side alone.
        if java_context is not None and java_context.sc().isStopped():
            spark.stop()
    except (Py4JError, OSError):
        raise SparkUnavailableError(
            "The JVM of this process's Spark session has ended.", "Run again: a new process starts a new one."
        ) from None
    return spark.sparkContext._jsc is not None


def _cores() -> int:
    return min(_CORES, os.cpu_count() or 1)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
