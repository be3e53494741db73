"""Short questions to the database outside of a batch: does it answer, how far is it ahead, is it as declared.

Belongs here: questions of one transaction each that a schedule, a sensor or a check asks.
Does not belong here: batches, what `telematics doctor` says (`doctor.py`), Dagster.

Nothing is tried again here, but for a connection that was lost while it waited: whoever asks comes back by himself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from telematics_assets.catalog import ReplicatedTable
from telematics_assets.engines.base import SourceDrift, SourcePosition, SourceStatus
from telematics_assets.errors import (
    ReplicationError,
    SettingsError,
    SupabaseError,
    SupabaseUnavailableError,
)
from telematics_assets.lakehouse.base import Table
from telematics_assets.microbatch.deletes import key_plans
from telematics_assets.microbatch.discover import drift, find_tables
from telematics_assets.microbatch.drift import columns_of
from telematics_assets.microbatch.drift import drift as column_drift
from telematics_assets.microbatch.position import identity_of, last_note, standing
from telematics_assets.microbatch.session import Connection, Session
from telematics_assets.microbatch.source import checked_key, database_identity, describe, literal, quoted
from telematics_assets.microbatch.sql import SCHEMA
from telematics_assets.microbatch.types import plan_columns

# The index that mode row_xid has leaves nulls out: the condition lets it be read from its end.
_HIGHEST = """
SELECT {source} AS source, {table_text}::regclass::oid::int8 AS oid, (
    SELECT t.{column}::text::int8 FROM {table} t WHERE t.{column} IS NOT NULL ORDER BY t.{column} DESC LIMIT 1
) AS of_rows, {of_tombstones} AS of_tombstones
"""
_OF_TOMBSTONES = f"""(
    SELECT d.row_xid::text::int8 FROM {SCHEMA}.tombstones d
    WHERE d.source = COALESCE(pg_partition_root({{table_text}}::regclass)::oid, {{table_text}}::regclass::oid)
    ORDER BY d.row_xid DESC LIMIT 1
)"""


def status(connection: Connection) -> SourceStatus:
    """Whether the database answers.

    Args:
        connection: The way to the database.
    """
    try:
        with connection.transaction(pauses=()) as session:
            version = session.value("SELECT current_setting('server_version')")
    except SupabaseError as error:
        return SourceStatus("refused", str(error))
    except SupabaseUnavailableError as error:
        return SourceStatus("unreachable", str(error))
    return SourceStatus("ready", f"PostgreSQL {version} answers at {connection.place}.")


def positions(
    connection: Connection, tables: Sequence[ReplicatedTable], opened: Callable[[ReplicatedTable], Table | None]
) -> Sequence[SourcePosition]:
    """How far the sources of tables of mode `row_xid` are ahead, in one query.

    Args:
        connection: The way to the database.
        tables: The tables.
        opened: Opens a bronze table; None if there is none yet.

    Raises:
        SupabaseError: If it refuses for good.
        SupabaseUnavailableError: If it does not answer.
    """
    if not tables:
        return ()
    with connection.transaction(pauses=()) as session:
        found = {row["source"]: row for row in session.rows(" UNION ALL ".join(map(_highest, tables)))}
        database = database_identity(session)
    answer = []
    for table in tables:
        row, bronze = found[table.source], opened(table)
        stands = None if bronze is None else standing(bronze, identity_of(database, row["oid"], table.mode))
        replicated = stands.position if stands is not None and stands.complete else None
        there = [position for position in (row["of_rows"], row["of_tombstones"]) if position is not None]
        answer.append(SourcePosition(table.source, max(there, default=None), replicated))
    return answer


def key_columns(connection: Connection, table: ReplicatedTable, hash_key: str | None) -> tuple[str, ...]:
    """The columns of a bronze table that identify a row.

    Args:
        connection: The way to the database, which knows the primary key.
        table: The table.
        hash_key: The key of hashed columns.

    Raises:
        ReplicationError: If the table has no key.
        SupabaseError: If the database refuses for good.
        SupabaseUnavailableError: If it does not answer.
    """
    with connection.transaction(pauses=()) as session:
        source = describe(session, table.source)
    key = checked_key(source, table.key)
    plans = plan_columns(source, table.exclude, table.hash, hash_key, key)
    return tuple(plan.name for plan in key_plans(plans, key))


def drifts(
    connection: Connection,
    tables: Sequence[ReplicatedTable],
    opened: Callable[[ReplicatedTable], Table | None],
    hash_key: str | None,
) -> Sequence[SourceDrift]:
    """Where the database has drifted apart from the declarations, and from what was replicated last.

    Args:
        connection: The way to the database.
        tables: The declared tables.
        opened: Opens a bronze table; None if there is none yet.
        hash_key: The key of hashed columns.

    Raises:
        SupabaseError: If it refuses for good.
        SupabaseUnavailableError: If it does not answer.
    """
    with connection.transaction(pauses=()) as session:
        found = find_tables(session)
        readable = {table.source for table in found if table.readable}
        altered = [
            each
            for table in tables
            if table.source in readable and (bronze := opened(table)) is not None
            for each in _altered(session, table, bronze, hash_key)
        ]
    return [*altered, *(SourceDrift(each.source, each.kind, each.message) for each in drift(tables, found))]


def _altered(session: Session, table: ReplicatedTable, bronze: Table, hash_key: str | None) -> Sequence[SourceDrift]:
    try:
        source = describe(session, table.source)
        plans = plan_columns(source, table.exclude, table.hash, hash_key, table.key)
        stands = standing(bronze, identity_of(database_identity(session), source.oid, table.mode))
    except (ReplicationError, SettingsError):
        # The next batch says so, with what to do.
        return []
    note = None if stands is None else last_note(bronze, stands)
    if note is None:
        return []
    columns, known = columns_of(plans, source), note.get("columns")
    before = known if isinstance(known, dict) else None
    differs = column_drift(columns, bronze.schema, before)
    found = [
        SourceDrift(
            table.source,
            "column",
            f"Column {name} is {now} in bronze's terms, and was {was}: batches are refused. `telematics replicate "
            f"{table.source} --full` rewrites the table; or list the column under exclude.",
        )
        for name, was, now in differs.retyped
    ]
    retyped = {name for name, _, _ in differs.retyped}
    for name in differs.altered or ():
        if name not in retyped:
            was, now = ((before or {})[name][1], columns.facts[name][1])
            what = f"was {was} and is {now}" if was != now else f"({now}) is not what it was"
            found.append(
                SourceDrift(table.source, "column", f"Column {name} {what}: the next batch compares all rows.")
            )
    return found


def _highest(table: ReplicatedTable) -> str:
    schema, _, name = table.source.partition(".")
    qualified = f"{quoted(schema)}.{quoted(name)}"
    text = literal(qualified)
    return _HIGHEST.format(
        source=literal(table.source),
        column=quoted(table.position or ""),
        table=qualified,
        table_text=text,
        of_tombstones=(
            _OF_TOMBSTONES.format(table_text=text) if table.delete_handling == "tombstones" else "NULL::int8"
        ),
    )
