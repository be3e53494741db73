"""What `telematics doctor` says of Spark.

Belongs here: looking at all that a session needs, without making one unless that is asked for.
Does not belong here: the looking itself (`java.py`, `jars.py`, `session.py`), streams and tables, printing (`cli.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata

from telematics_assets.engines.base import Finding
from telematics_assets.engines.spark import jars
from telematics_assets.engines.spark.java import find_java
from telematics_assets.engines.spark.session import SparkOptions, brings_own_delta, reach, session
from telematics_assets.errors import MissingExtraError, SparkError, SparkUnavailableError

_SPARK = "4.2"


def findings(options: SparkOptions, more: Mapping[str, str] | None = None, *, start: bool = False) -> Sequence[Finding]:
    """Look at packages, Java, jars and whether the cluster answers.

    Args:
        options: What the deployment chose.
        more: Further settings of ours, for the session.
        start: Make a session too, if nothing else is wrong: that takes seconds.
    """
    found = [*_packages(options)]
    if options.remote is None:
        found.append(_asked("Java", lambda: _java(options)))
        found.append(_asked("Spark jars", lambda: _jars(options)))
    if options.remote is not None or options.master.startswith("spark://"):
        found.append(_asked("Spark", lambda: Finding("ok", "Spark", f"{reach(options)} answers")))
    elif not options.local:
        found.append(Finding("ok", "Spark", f"master {options.master}; only a session shows whether it answers"))
    if start and not any(finding.level == "error" for finding in found):
        found.append(_asked("Spark session", lambda: _session(options, more)))
    return found


def _packages(options: SparkOptions) -> Iterator[Finding]:
    versions = {}
    for package in ("pyspark", "delta-spark", "pandas"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield Finding("error", package, "It is not installed.", str(MissingExtraError("The Spark engine", "spark")))
    pinned = {"pyspark": _SPARK, "delta-spark": jars.DELTA}
    wrong = {name: versions[name] for name in pinned if name in versions and not _is_of(versions[name], pinned[name])}
    if wrong and not brings_own_delta(options):
        told = " and ".join(f"{name} {version}" for name, version in wrong.items())
        yield Finding(
            "error",
            "Spark packages",
            f"{told} installed; the jars are for pyspark {_SPARK} and delta-spark {jars.DELTA}.",
            f'pip install "pyspark[connect]=={_SPARK}.*" delta-spark=={jars.DELTA}',
        )
    elif len(versions) == 3:
        yield Finding("ok", "Spark packages", ", ".join(f"{name} {version}" for name, version in versions.items()))


def _is_of(version: str, release: str) -> bool:
    return f"{version}.".startswith(f"{release}.")


def _java(options: SparkOptions) -> Finding:
    java = find_java(options.java_home)
    return Finding("ok", "Java", f"{java.major}, {java.program}")


def _jars(options: SparkOptions) -> Finding:
    if brings_own_delta(options):
        return Finding("ok", "Spark jars", "those that TELEMATICS_SPARK_CONF names")
    if options.jars is not None:
        return Finding("ok", "Spark jars", f"{len(jars.check(options.jars))} in {options.jars}")
    folder = jars.default_folder()
    if absent := jars.missing(folder):
        return Finding(
            "warning",
            "Spark jars",
            f"{len(absent)} of {len(jars.JARS)} are not in {folder} yet; the first session fetches them from "
            f"{options.repository or 'Maven Central'}.",
            f"To have them now: {jars.fetch_command(folder)}",
        )
    return Finding("ok", "Spark jars", f"{len(jars.JARS)} in {folder}")


def _session(options: SparkOptions, more: Mapping[str, str] | None) -> Finding:
    spark = session(options, more)
    (row,) = spark.range(1).collect()
    return Finding("ok", "Spark session", f"Spark {spark.version} counts from {row[0]}")


def _asked(subject: str, look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except (SparkError, SparkUnavailableError) as error:
        return Finding("error", subject, error.cause, error.fix or None)
    except MissingExtraError as error:
        return Finding("error", subject, str(error))
