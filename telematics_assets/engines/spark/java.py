"""Which Java a Spark driver would run on.

Belongs here: finding it as Spark's own scripts do, and its version.
Does not belong here: starting Spark (`session.py`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from telematics_assets.errors import JavaMissingError

#: Major versions that Spark 4.2 is documented to run on.
SUPPORTED = (17, 21)
#: How long `java -version` may take, seconds: far longer than on the busiest machine.
_LIMIT = 60
_GET_JAVA = (
    "Debian, Ubuntu: apt install openjdk-17-jre-headless. macOS: brew install openjdk@17. conda: conda install -c "
    "conda-forge openjdk=17. Then put it first on PATH, or set JAVA_HOME to its folder."
)
_VERSION = re.compile(r'version "(?:1\.)?(\d+)[^"]*"', re.ASCII)


@dataclass(frozen=True, slots=True)
class Java:
    """A Java that Spark runs on.

    Attributes:
        program: The `java` program.
        major: Its major version.
    """

    program: Path
    major: int


def find_java(java_home: Path | None = None) -> Java:
    """The Java that Spark's scripts will start: that of `JAVA_HOME`, else the first on `PATH`.

    Args:
        java_home: `JAVA_HOME` as set, or None.

    Raises:
        JavaMissingError: If there is none, or of another version.
    """
    needed = " or ".join(map(str, SUPPORTED))
    if java_home is not None:
        program, place = java_home / "bin" / "java", f"JAVA_HOME={java_home}"
        if not program.is_file():
            raise JavaMissingError(f"Spark needs Java {needed}; {place} has no bin/java.", _GET_JAVA)
    else:
        found = shutil.which("java")
        if found is None:
            raise JavaMissingError(
                f"Spark needs Java {needed}; no java is on PATH and JAVA_HOME is not set.", _GET_JAVA
            )
        program, place = Path(found), f"{found}, the first on PATH,"
    try:
        told = subprocess.run([program, "-version"], capture_output=True, text=True, errors="replace", timeout=_LIMIT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise JavaMissingError(f"Spark needs Java {needed}; {place} can't be run ({error}).", _GET_JAVA) from None
    version = _VERSION.search(told.stderr + told.stdout)
    if version is None:
        # macOS has a java that only says where to get one.
        raise JavaMissingError(f"Spark needs Java {needed}; {place} does not tell its version.", _GET_JAVA)
    if (major := int(version[1])) not in SUPPORTED:
        raise JavaMissingError(f"Spark needs Java {needed}; {place} is Java {major}.", _GET_JAVA)
    return Java(program, major)
