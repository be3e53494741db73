"""An interactive Python shell with a session.

Belongs here: what is at hand in it, its greeting, running code that was given beforehand.
Does not belong here: the session (`queries.py`), the command (`cli.py`).
"""

from __future__ import annotations

import code
import sys
from typing import TYPE_CHECKING, Any

from telematics_assets.catalog import Names
from telematics_assets.engines.spark.catalogs import FOREIGN
from telematics_assets.engines.spark.queries import explain

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def greeting(names: Names, *, supabase: bool) -> str:
    """What the shell says first: three queries to begin with.

    Args:
        names: Catalog and schemas.
        supabase: Whether a database is configured.
    """
    bronze = f"{names.catalog}.`{names.bronze_schema}`"
    third = f"{FOREIGN}.public.policies" if supabase else f"{bronze}.telematics_test"
    return "\n".join(
        (
            "`spark` is a Spark session with the lake's tables. Try:",
            f'  spark.sql("SHOW TABLES IN {bronze}").show()',
            f'  spark.sql("SELECT * FROM {bronze}.telematics LIMIT 5").show()',
            f'  spark.table("{third}").count()',
        )
    )


def run(spark: SparkSession, source: str) -> None:
    """Run code with `spark` at hand; an expression's value is printed.

    Args:
        spark: The session.
        source: Python.
    """
    scope = _scope(spark)
    try:
        compiled = compile(source, "<command>", "single" if "\n" not in source.strip() else "exec")
    except SyntaxError:
        compiled = compile(source, "<command>", "exec")
    exec(compiled, scope)


def interact(spark: SparkSession, names: Names, *, supabase: bool) -> None:
    """Read, evaluate, print, until the end of the input: in IPython where it is installed.

    Args:
        spark: The session.
        names: Catalog and schemas.
        supabase: Whether a database is configured.
    """
    said = greeting(names, supabase=supabase)
    try:
        from IPython import start_ipython
    except ImportError:
        _Console(_scope(spark), names).interact(said, "")
        return
    sys.stderr.write(f"{said}\n")
    start_ipython(argv=["--no-banner"], user_ns=_scope(spark))


class _Console(code.InteractiveConsole):
    """Python's own console; an error of Spark is one line in it."""

    def __init__(self, scope: dict[str, Any], names: Names) -> None:
        super().__init__(scope)
        self._names = names

    def showtraceback(self) -> None:
        from py4j.protocol import Py4JError
        from pyspark.errors import PySparkException

        error = sys.exc_info()[1]
        if isinstance(error, PySparkException | Py4JError):
            self.write(f"Error: {explain(error, self._names)}\n")
        else:
            super().showtraceback()


def _scope(spark: SparkSession) -> dict[str, Any]:
    return {"__name__": "__main__", "spark": spark}
