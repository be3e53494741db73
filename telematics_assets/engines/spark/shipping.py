"""How this package gets to the executors of a cluster.

Belongs here: the archive of the package, and handing it to a session. Does not belong here: which session.

Executors read files by this package's own code. Its libraries (pyarrow, polars, numpy and what they need) are too large
to ship with every session and must be installed where executors run; the package itself goes along.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import telematics_assets

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_KEPT = {".py", ".typed"}


def archive(folder: Path) -> Path:
    """Write the package as an archive that Python imports from.

    Args:
        folder: Where to write it.
    """
    package = Path(telematics_assets.__file__).parent
    path = folder / "telematics_assets.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for source in sorted(package.rglob("*")):
            if source.suffix in _KEPT or source.name == "py.typed":
                file.write(source, source.relative_to(package.parent))
    return path


def ship(spark: SparkSession, folder: Path, *, connect: bool) -> None:
    """Let the session's Python workers import this package.

    Args:
        spark: The session.
        folder: Where the archive is kept meanwhile.
        connect: Whether it is one of Spark Connect.
    """
    path = str(archive(folder))
    if connect:
        spark.addArtifacts(path, pyfile=True)
    else:
        spark.sparkContext.addPyFile(path)
