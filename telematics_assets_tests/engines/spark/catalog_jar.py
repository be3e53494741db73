"""Builds the jar of the Spark catalogs: `make catalog-jar`.

Belongs here: compiling the Java source, and a jar that is the same byte for byte whenever the same compiler made it.
Does not belong here: the source (`telematics_assets/engines/spark/jvm/`), other jars.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from telematics_assets.engines.spark.catalogs import JAR
from telematics_assets.engines.spark.jars import check, default_folder

SOURCES = JAR.parent / "jvm"
#: The oldest Java that Spark 4.2 runs on.
RELEASE = "17"
_MANIFEST = "META-INF/MANIFEST.MF"


def source_digest() -> str:
    """What the whole source hashes to."""
    digest = hashlib.sha256()
    for file in _sources():
        digest.update(f"{file.relative_to(SOURCES).as_posix()}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def compiler() -> str | None:
    """The compiler's version, or None if there is no compiler."""
    try:
        told = subprocess.run(["javac", "-version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return (told.stdout + told.stderr).split()[-1]


def compiled(class_path: Sequence[Path]) -> dict[str, bytes]:
    """The classes of the source as it is now, by their names in the jar.

    Args:
        class_path: Jars of Spark and of Delta.
    """
    with tempfile.TemporaryDirectory() as folder:
        warnings = "-Xlint:all,-classfile,-overrides,-path,-processing"
        path = os.pathsep.join(map(str, class_path))
        command = ["javac", "--release", RELEASE, warnings, "-Werror", "-cp", path, "-d", folder]
        subprocess.run([*command, *map(str, _sources())], check=True)
        found = sorted(Path(folder).rglob("*.class"))
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


def in_jar() -> tuple[dict[str, bytes], dict[str, str]]:
    """The classes of the shipped jar, and what its manifest says of them."""
    with zipfile.ZipFile(JAR) as jar:
        files = {name: jar.read(name) for name in jar.namelist()}
    manifest = re.findall(r"^([\w-]+): (.*?)\r?$", files.pop(_MANIFEST).decode(), re.MULTILINE)
    return files, dict(manifest)


def write_jar(classes: Mapping[str, bytes]) -> None:
    """Replace the shipped jar.

    Args:
        classes: Bytes by name.
    """
    manifest = f"Manifest-Version: 1.0\r\nCreated-By: {compiler()}\r\nSource-SHA256: {source_digest()}\r\n\r\n"
    with zipfile.ZipFile(JAR, "w") as jar:
        for name, content in {_MANIFEST: manifest.encode(), **classes}.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            jar.writestr(entry, content)


def spark_jars() -> list[Path]:
    """The jars of the installed pyspark."""
    spec = importlib.util.find_spec("pyspark")
    assert spec is not None
    assert spec.origin is not None
    return sorted((Path(spec.origin).parent / "jars").glob("*.jar"))


def _sources() -> list[Path]:
    return sorted(SOURCES.rglob("*.java"))


if __name__ == "__main__":
    write_jar(compiled([*spark_jars(), *check(default_folder())]))
