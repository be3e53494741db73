"""Asking Spark something in SQL, and answers and errors that people can read.

Belongs here: a session with the lake's catalogs, one statement with a bounded answer, what Spark's errors mean.
Does not belong here: how an answer is printed (`cli.py`), which catalogs there are (`catalogs.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from telematics_assets.catalog import Names
from telematics_assets.engines.spark.catalogs import FOREIGN, catalog_settings, tables_uri, unlock
from telematics_assets.engines.spark.session import SparkOptions, session
from telematics_assets.errors import QueryError
from telematics_assets.microbatch.connection import Supabase

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

#: Where a message of Spark ends and positions, plans and stacks begin.
_END = re.compile(r"(?<=SQLSTATE: \w{5})|\n\n|\n== |\n\tat |\nJVM stacktrace")
_POSITION = re.compile(r"\(line (\d+), pos(?:ition)? (\d+)\)|line (\d+) pos (\d+)")
_JAVA_CLASS = re.compile(r"^(?:[a-z_]\w*\.)+[A-Z]\w*: ")
_LOOK = {
    "TABLE_OR_VIEW_NOT_FOUND": "`SHOW TABLES IN {bronze}` lists what is there.",
    "SCHEMA_NOT_FOUND": "`SHOW SCHEMAS IN {catalog}` lists what is there.",
    "REQUIRES_SINGLE_PART_NAMESPACE": "No catalog has this name; {catalog} holds the tables, {foreign} the database.",
    "INVALID_STATEMENT_OR_CLAUSE": "Databricks may know this statement; Spark itself does not.",
    "MISSING_CATALOG_ABILITY": "CREATE TEMP VIEW makes a view for as long as this session lasts.",
    "FAILED_JDBC": "`telematics doctor` says what is in the way to the database.",
}
#: Sentences of Spark that take up a line and help nobody here.
_NOISE = re.compile(r"Search path: \[.*?\]\.|If you did not qualify .*?catalog\.|To tolerate the error on drop .*?\.")


def open_session(
    options: SparkOptions, home: Path | str, names: Names, supabase: Supabase | None = None
) -> SparkSession:
    """This process's session, with the lake's catalogs in it.

    On a Spark Connect server the database is left to the server's own settings: its password would go over the network
    into settings that everybody reads.

    Args:
        options: What the deployment chose about Spark.
        home: Where its tables are.
        names: Catalog and schemas.
        supabase: The database, if one is configured.

    Raises:
        TelematicsError: As `session` does, and if Hadoop has no name for the home.
    """
    database = supabase if options.remote is None else None
    spark = session(options, catalog_settings(tables_uri(home), names, database, options.conf))
    if database is not None:
        unlock(spark, database)
    return spark


def ask(spark: SparkSession, text: str, names: Names, limit: int) -> pa.Table:
    """Execute one statement.

    Args:
        spark: Any session.
        text: Spark SQL; a semicolon at its end does no harm.
        names: For what a message points at.
        limit: At most this many rows; what comes behind them is not computed.

    Returns:
        The rows; a table without columns where the statement answers nothing.

    Raises:
        QueryError: If Spark refuses it, or fails with it.
    """
    import pyarrow as pa
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        answer = spark.sql(text.strip().rstrip(";"))
        if not answer.columns:
            return pa.table({})
        if twice := [name for name, times in Counter(answer.columns).items() if times > 1]:
            raise QueryError(f"Two columns of the answer are called {twice[0]!r}. Name one of them with AS.")
        return _rows(answer.limit(limit))
    except (PySparkException, Py4JError) as error:
        raise QueryError(explain(error, names)) from error


def _rows(answer: DataFrame) -> pa.Table:
    import pyarrow as pa

    try:
        return answer.toArrow()
    except pa.ArrowInvalid:
        # pyspark can't hold nested values of which the plan knows more than the answer's schema says: as JSON it can.
        from pyspark.sql import functions as f
        from pyspark.sql.types import ArrayType, MapType, StructType

        nested = (ArrayType, MapType, StructType)
        columns = [
            f.to_json(answer[field.name]).alias(field.name)
            if isinstance(field.dataType, nested)
            else answer[field.name]
            for field in answer.schema
        ]
        return answer.select(columns).toArrow()


def explain(error: Exception, names: Names) -> str:
    """One readable line about an error of Spark: the cause, where it is, and what to do next.

    Args:
        error: What pyspark raised.
        names: For what the line points at.
    """
    condition = getattr(error, "getCondition", lambda: None)() or ""
    whole = _told(error)
    cause = " ".join(_NOISE.sub("", _END.split(whole, 1)[0].replace("\n", " ")).split()).rstrip("; ")
    cause = _JAVA_CLASS.sub("", cause)
    if (found := _POSITION.search(whole)) and found[0] not in cause:
        line, column = (part for part in found.groups() if part is not None)
        cause += f" (line {line}, position {column})"
    bronze = f"{names.catalog}.`{names.bronze_schema}`"
    look = _LOOK.get(condition.partition(".")[0], "").format(bronze=bronze, catalog=names.catalog, foreign=FOREIGN)
    return f"{cause.rstrip('.')}. {look}".strip()


def _told(error: Exception) -> str:
    """The message of the innermost cause that has one: what failed in a task is wrapped in the job's failure."""
    told = getattr(error, "java_exception", None)
    if told is None:
        return str(error)
    message = str(told.getMessage() or told)
    while (cause := told.getCause()) is not None:
        told = cause
        message = str(told.getMessage() or told)
    inner = re.search(r"Lost task .*?: ([\w.$]+(?:Exception|Error): .*)", message)
    return inner[1] if inner else message
