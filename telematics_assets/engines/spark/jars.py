"""The jars that a Spark driver of ours needs beside Spark's own: which, whether they are there, where to get them.

Belongs here: the pinned list by Maven coordinates and content, checking a folder, filling it through Ivy, which pyspark
brings. A folder is filled once: resolving at every start would cost seconds each time.
Does not belong here: handing them to a session (`session.py`), jars of the user's own (settings of theirs).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import quoteattr

from telematics_assets.engines.spark.java import Java
from telematics_assets.errors import MissingExtraError, SparkJarsError, SparkUnavailableError

#: How long fetching all of them may take, seconds.
_LIMIT = 900
#: What Ivy says where a server was not reached, or cut a download short; elsewhere it only misses files.
_FAULT = re.compile(r"(Server access error|SERVER ERROR|FAILED DOWNLOADS).*?(?:\((.*)\))?$", re.MULTILINE)
_CONFIGURED = "spark.jars.ivySettings=FILE in TELEMATICS_SPARK_CONF: Ivy settings of your own, with a password or proxy"


@dataclass(frozen=True, slots=True)
class Jar:
    """One pinned jar.

    Attributes:
        group: Its group in Maven's terms.
        artifact: Its name there.
        version: Its version.
        sha256: What its bytes hash to.
    """

    group: str
    artifact: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        """Its name in a folder, which is that of every Maven repository."""
        return f"{self.artifact}-{self.version}.jar"


DELTA = "4.4.0"
#: Delta and what of its dependencies Spark does not bring itself, and PostgreSQL's driver.
JARS = (
    Jar(
        "io.delta",
        "delta-spark_4.2_2.13",
        DELTA,
        "27d4fd8b1f879535c573ed1c718177d6a27f24d3e626ba02e216369725721ead",
    ),
    Jar(
        "io.delta",
        "delta-storage",
        DELTA,
        "c46735481fa8e326b0957be02b4420cbcab4b325bb08009b7f2045a95133f1cc",
    ),
    Jar(
        "io.delta",
        "delta-kernel-api",
        DELTA,
        "ee9b5a14ac3b7efdff4d61a58478fe8eb0e5a3fbca43889dca7290795fe79a11",
    ),
    Jar(
        "io.delta",
        "delta-kernel-defaults",
        DELTA,
        "225c975199e4718b38ee5b7e6da7f19e9585024262b2cec2656b32151a856b0b",
    ),
    Jar(
        "io.delta",
        "delta-kernel-unitycatalog",
        DELTA,
        "cea22dfb4ac562b3cd27bf652697750e8336009d73fb06631363aaaad5345ffa",
    ),
    Jar(
        "io.unitycatalog",
        "unitycatalog-client",
        "0.6.0",
        "48257499a86b801a3e2372cec55ac226ca1c1c7eabe5c118e7302f29a1fdbc19",
    ),
    Jar(
        "io.unitycatalog",
        "unitycatalog-hadoop",
        "0.6.0",
        "c47b63c961c87102b9e1d63809a0915ba4c86b7652f57c8d39ca3a05b441a150",
    ),
    Jar(
        "org.postgresql",
        "postgresql",
        "42.7.8",
        "2a32a9dcbc42d67a50ad3a0de5efd102c8d2be46720045f2cbd6689f160ab7c7",
    ),
)


def default_folder() -> Path:
    """Where the jars are kept if nothing says otherwise: one folder for all projects of a user."""
    return Path.home() / ".cache" / "telematics_assets" / "jars"


def fetch_command(folder: Path) -> str:
    """The command that fills a folder.

    Args:
        folder: Any folder.
    """
    return f"telematics spark jars {shlex.quote(str(folder))}"


def missing(folder: Path, jars: Sequence[Jar] = JARS) -> Sequence[Jar]:
    """The jars that a folder does not hold, or not whole.

    Args:
        folder: Any folder, which need not exist.
        jars: Which ones.
    """
    return [jar for jar in jars if _digest(folder / jar.file) != jar.sha256]


def check(folder: Path, jars: Sequence[Jar] = JARS) -> Sequence[Path]:
    """The paths of the jars in a folder.

    Args:
        folder: A folder that somebody filled.
        jars: Which ones.

    Raises:
        SparkJarsError: If one is missing or is not what it is called.
    """
    wrong = missing(folder, jars)
    if wrong:
        names = ", ".join(jar.file + (" (cut short, or another one)" * (folder / jar.file).exists()) for jar in wrong)
        raise SparkJarsError(
            f"Jars that Spark needs are missing in {folder}: {names}.",
            f"Run where the network reaches a Maven repository: {fetch_command(folder)}",
        )
    return [folder / jar.file for jar in jars]


def fetch(
    folder: Path,
    java: Java,
    repository: str | None = None,
    ivy_settings: str | None = None,
    jars: Sequence[Jar] = JARS,
) -> Sequence[Path]:
    """Bring the jars into a folder, those that are missing; others may do so at the same time.

    Args:
        folder: The folder, made if need be.
        java: What runs Ivy.
        repository: URL of a Maven repository or mirror; Maven Central if None.
        ivy_settings: File with the user's own Ivy settings, instead.
        jars: Which ones.

    Raises:
        MissingExtraError: If pyspark, which brings Ivy, is not installed.
        SparkJarsError: If the repository has not all of them, or the folder can't be written.
        SparkUnavailableError: If the repository did not answer this time.
    """
    wanted = missing(folder, jars)
    if wanted:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Beside the others, so that a whole jar is moved into its place at once.
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
                told = _run_ivy(Path(scratch), java, repository, ivy_settings, wanted)
                for jar in wanted:
                    if _digest(Path(scratch) / jar.file) == jar.sha256:
                        os.replace(Path(scratch) / jar.file, folder / jar.file)
        except OSError as error:
            raise SparkJarsError(f"Jars can't be kept in {folder}: {error}.", "Give a folder that is yours.") from None
        if left := missing(folder, wanted):
            raise _not_had(left, repository, ivy_settings, told)
    return [folder / jar.file for jar in jars]


def _run_ivy(scratch: Path, java: Java, repository: str | None, ivy_settings: str | None, jars: Sequence[Jar]) -> str:
    spec = importlib.util.find_spec("pyspark")
    if spec is None or spec.origin is None:
        raise MissingExtraError("Spark", "spark")
    dependencies = "".join(
        f"<dependency org={quoteattr(jar.group)} name={quoteattr(jar.artifact)} rev={quoteattr(jar.version)} "
        'transitive="false" conf="default->master"/>'
        for jar in jars
    )
    (scratch / "ivy.xml").write_text(
        '<ivy-module version="2.0"><info organisation="telematics" module="jars"/><configurations><conf '
        f'name="default"/></configurations><dependencies>{dependencies}</dependencies></ivy-module>',
        encoding="utf-8",
    )
    # Without a root Ivy asks Maven Central.
    root = "" if repository is None else f"root={quoteattr(repository.rstrip('/') + '/')}"
    (scratch / "settings.xml").write_text(
        '<ivysettings><settings defaultResolver="maven"/><resolvers>'
        f'<ibiblio name="maven" m2compatible="true" {root}/></resolvers></ivysettings>',
        encoding="utf-8",
    )
    # Ivy alone: Spark's other jars would only cost time.
    ivy = ":".join(map(str, (Path(spec.origin).parent / "jars").glob("ivy-*.jar")))
    command = [
        *(str(java.program), "-cp", ivy, "org.apache.ivy.Main"),
        *("-settings", ivy_settings or str(scratch / "settings.xml"), "-ivy", str(scratch / "ivy.xml")),
        *("-cache", str(scratch / "cache"), "-confs", "default", "-types", "jar", "bundle"),
        *("-retrieve", f"{scratch}/[artifact]-[revision].[ext]"),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        return f"Server access error: not done within {_LIMIT} s"
    return done.stdout + done.stderr


def _not_had(
    jars: Sequence[Jar], repository: str | None, ivy_settings: str | None, told: str
) -> SparkJarsError | SparkUnavailableError:
    place = f"the repositories of {ivy_settings}" if ivy_settings else repository or "Maven Central"
    names = ", ".join(f"{jar.group}:{jar.artifact}:{jar.version}" for jar in jars)
    if fault := _FAULT.search(told):
        return SparkUnavailableError(
            f"Jars that Spark needs could not be fetched from {place} this time ({fault[2] or fault[1]}): {names}.",
            f"Set TELEMATICS_SPARK_REPOSITORY to a mirror that this machine reaches, or {_CONFIGURED}.",
        )
    return SparkJarsError(
        f"{place} has not, or not unchanged, what Spark needs: {names}.",
        f"Set TELEMATICS_SPARK_REPOSITORY to a repository that has them, or {_CONFIGURED}.",
    )


def _digest(file: Path) -> str | None:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return None
