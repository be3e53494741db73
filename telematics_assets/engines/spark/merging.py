"""One merge by primary key, as a `MERGE` in Spark SQL.

Belongs here: the source of a merge, its statement, and the settings that its commit takes.
Does not belong here: what is merged, the proof that it was (`tables.py`), Dagster.

Settings of a commit (its transaction, its texts) can be given to a `MERGE` only as settings of a session, where they
would hold for whatever else the session writes meanwhile: Spark would leave that out without a word. So each merge has
a session of its own, which costs milliseconds.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING

import pyarrow as pa

from telematics_assets.engines.spark.tasks import unless_there
from telematics_assets.lakehouse.merging import Changes, gathered

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_TRANSACTION = "spark.databricks.delta.write.txn"
_TEXTS = "spark.databricks.delta.commitInfo.userMetadata"


def merge(
    spark: SparkSession,
    path: str,
    changes: Changes,
    mine: pa.Schema,
    transaction: tuple[str, int],
    info: Mapping[str, str],
    entry: str,
) -> None:
    """Merge; whether it was committed is to be read from the log.

    Args:
        spark: A session; it stays as it is.
        path: Where the table is.
        changes: What is merged.
        mine: The table's schema.
        transaction: The application and its new position; where it is there already, Spark does nothing.
        info: Texts for the commit info.
        entry: A log entry that must not be there while the source is read, which is within the transaction.
    """
    from telematics_assets.engines.spark.tables import parallelism, spark_schema

    source, marker = gathered(changes, mine)
    columns = spark_schema(source.schema)
    # Made by the other session: whoever makes a frame becomes the active one, which must not have these settings.
    rows = spark.createDataFrame(source, columns).coalesce(parallelism(spark)).mapInArrow(unless_there(entry), columns)
    view = f"telematics_{uuid.uuid4().hex}"
    # Over Spark Connect there is no empty session to be had, but a copy.
    own: SparkSession = getattr(spark, "newSession" if hasattr(spark, "newSession") else "cloneSession")()
    app_id, version = transaction
    settings = {
        f"{_TRANSACTION}AppId": app_id,
        f"{_TRANSACTION}Version": str(version),
        _TEXTS: json.dumps(dict(info)),
        "spark.sql.session.timeZone": "UTC",
        # Others read Spark's own form, INT96, as nanoseconds, which reach from 1677 to 2262.
        "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    }
    for setting, value in settings.items():
        own.conf.set(setting, value)
    rows.createGlobalTempView(view)
    try:
        own.sql(statement(path, changes, mine, source.schema.names, marker, f"global_temp.{view}"))
    finally:
        spark.catalog.dropGlobalTempView(view)


def statement(path: str, changes: Changes, mine: pa.Schema, names: list[str], marker: str, view: str) -> str:
    """The statement, over a view of the source.

    Args:
        path: Where the table is.
        changes: What is merged.
        mine: The table's schema.
        names: Columns of the source.
        marker: The one of them that says that a row is gone.
        view: The view of the source.
    """
    compared, added = changes.compared(mine), changes.added(mine)
    differs = [f"NOT ({_of('t', name)} <=> {_of('s', name)})" for name in compared]
    # Nothing else tells 0.0 from -0.0.
    differs += [
        f"({_of('t', name)} = 0 AND CAST({_of('t', name)} AS STRING) <> CAST({_of('s', name)} AS STRING))"
        for name in compared
        if pa.types.is_floating(mine.field(name).type)
    ]
    differs += [f"{_of('s', name)} IS NOT NULL" for name in added]
    stored = [name for name in names if name != marker]
    same = " AND ".join(f"{_of('t', name)} = {_of('s', name)}" for name in changes.key)
    is_gone = _of("s", marker)
    # Without the words for it, Spark refuses columns to add; with them, it reads more of the table's schema.
    words = ["MERGE WITH SCHEMA EVOLUTION" if added else "MERGE"]
    words.append(f"INTO delta.{quoted(path)} AS t USING {view} AS s ON {same}")
    if changes.gone.num_rows:
        words.append(f"WHEN MATCHED AND {is_gone} THEN DELETE")
    if changes.rows.num_rows:
        if differs:
            values = ", ".join(f"{quoted(name)} = {_of('s', name)}" for name in stored)
            words.append(f"WHEN MATCHED AND NOT {is_gone} AND ({' OR '.join(differs)}) THEN UPDATE SET {values}")
        into, values = ", ".join(map(quoted, stored)), ", ".join(_of("s", name) for name in stored)
        words.append(f"WHEN NOT MATCHED AND NOT {is_gone} THEN INSERT ({into}) VALUES ({values})")
    return "\n".join(words)


def _of(table: str, name: str) -> str:
    return f"{table}.{quoted(name)}"


def quoted(name: str) -> str:
    """A name in backticks."""
    return f"`{name.replace('`', '``')}`"
