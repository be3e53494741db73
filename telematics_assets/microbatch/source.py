"""What there is in the database: tables, columns, keys, and which database it is at all.

Belongs here: introspection through the system catalogs, and the identity of a source.
Does not belong here: what becomes of a type (`types.py`), reading rows (`extract.py`), SQL that users run (`sql.py`),
Dagster.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from telematics_assets.errors import ReplicationError

if TYPE_CHECKING:
    from telematics_assets.microbatch.session import Session


@dataclass(frozen=True, slots=True)
class SourceColumn:
    """One column of a table in PostgreSQL.

    Attributes:
        name: Its name.
        number: `attnum`; a column that was dropped and added again has another one.
        type: As PostgreSQL spells it with its modifier, such as `numeric(12,2)` or `public.policy_state`.
        base: Name of the type in `pg_catalog`, of the base type for domains: `numeric`, `int4`, `_text`; `enum`,
            `composite`, `range`, `multirange` for those kinds; schema and name for others, of extensions for example.
        element: For arrays, the same of its elements; else None.
        dimensions: How many dimensions an array was declared with, which PostgreSQL does not enforce; else 0.
        modifier: `atttypmod`; -1 if there is none.
        not_null: Whether it is declared so.
        comment: Its comment, or None.
        generated: The expression that a generated column is computed by; else None.
        members: Labels of an enum by their OIDs, or attributes of a composite type, as JSON; also an array's elements'.
    """

    name: str
    number: int
    type: str
    base: str
    element: str | None
    dimensions: int
    modifier: int
    not_null: bool
    comment: str | None
    generated: str | None = None
    members: str | None = None


@dataclass(frozen=True, slots=True)
class SourceTable:
    """A table in PostgreSQL.

    Attributes:
        schema: Its schema.
        name: Its name.
        oid: Its OID; another one after it was dropped and created again.
        kind: `table`, `partitioned table`, `view`, `materialized view` or `foreign table`.
        columns: Its columns, in order.
        key: Columns of its primary key, in order; empty if it has none.
        comment: Its comment, or None.
        rows: The planner's estimate of its rows.
        row_security: Whether policies filter what roles see.
        unique_keys: Other sets of columns that identify a row: unique, and none of them nullable.
        children: Tables that inherit from a plain table. Their rows are theirs: its keys do not cover them.
    """

    schema: str
    name: str
    oid: int
    kind: str
    columns: tuple[SourceColumn, ...]
    key: tuple[str, ...]
    comment: str | None
    rows: int
    row_security: bool
    unique_keys: tuple[tuple[str, ...], ...] = ()
    children: int = 0

    @property
    def rows_sql(self) -> str:
        """What to select its rows from: without those of tables that inherit from it, but with all partitions."""
        return f"ONLY {self.sql}" if self.kind == "table" else self.sql

    @property
    def sql(self) -> str:
        """The quoted name."""
        return f"{quoted(self.schema)}.{quoted(self.name)}"

    def column(self, name: str) -> SourceColumn | None:
        """The column of that name, or None."""
        return next((column for column in self.columns if column.name == name), None)

    def has_own_operators(self, name: str) -> bool:
        """Whether a column's type brings operators of its own, which the reader's search_path does not find.

        Either there are none then, or those of another type take their place: of `text` for `citext`.
        """
        column = self.column(name)
        return column is not None and "." in column.base


def quoted(name: str) -> str:
    """A name as SQL text."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A text as SQL text."""
    escaped = text.replace("'", "''")
    if "\\" in text:
        doubled = escaped.replace("\\", "\\\\")
        return f"E'{doubled}'"
    return f"'{escaped}'"


def partitions(session: Session, table: SourceTable) -> int:
    """Another number for other partitions, small enough for a position; 0 for a table that has none.

    Rows of one that is attached or detached are not written, and no trigger sees it.
    """
    if table.kind != "partitioned table":
        return 0
    # By the transaction's own snapshot: the functions that PostgreSQL has for it see what was attached since.
    found = session.value(_PARTITIONS.format(oid=table.oid))
    return int.from_bytes(hashlib.sha256(str(found).encode()).digest()[:7], "big") if found else 0


_PARTITIONS = """
WITH RECURSIVE parts AS (
    SELECT inhrelid FROM pg_inherits WHERE inhparent = {oid}
  UNION ALL
    SELECT i.inhrelid FROM parts p JOIN pg_inherits i ON i.inhparent = p.inhrelid
)
SELECT string_agg(inhrelid::oid::text, ' ' ORDER BY inhrelid) FROM parts
"""
_KINDS = {"r": "table", "p": "partitioned table", "v": "view", "m": "materialized view", "f": "foreign table"}
#: Kinds whose keys the database knows and keeps.
_WITH_KEYS = ("table", "partitioned table", "materialized view")

#: One row for each column, the table's own facts in each of them.
_DESCRIBE = """
WITH RECURSIVE t AS (
    SELECT c.oid, c.relkind, c.reltuples, c.relrowsecurity,
           has_table_privilege(c.oid, 'SELECT') AS readable, obj_description(c.oid, 'pg_class') AS comment,
           (SELECT count(*) FROM pg_inherits i WHERE i.inhparent = c.oid AND c.relkind = 'r') AS children{asked}
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = {schema} AND c.relname = {name} AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
), base AS (
    SELECT a.attnum, a.atttypid AS type, a.atttypmod AS modifier, a.attndims::int4 AS dimensions
    FROM t JOIN pg_attribute a ON a.attrelid = t.oid WHERE a.attnum > 0 AND NOT a.attisdropped
  UNION ALL
    SELECT b.attnum, y.typbasetype, CASE WHEN y.typtypmod >= 0 THEN y.typtypmod ELSE b.modifier END,
           GREATEST(b.dimensions, y.typndims)
    FROM base b JOIN pg_type y ON y.oid = b.type WHERE y.typtype = 'd'
), named AS (
    SELECT b.attnum, b.modifier, b.dimensions, {label} AS base,
           CASE WHEN e.oid IS NOT NULL THEN {element} END AS element,
           coalesce(
               (SELECT json_object_agg(l.oid::text, l.enumlabel ORDER BY l.oid) FROM pg_enum l
                WHERE l.enumtypid IN (y.oid, e.oid)),
               (SELECT json_agg(format('%s %s', p.attnum, format_type(p.atttypid, p.atttypmod)) ORDER BY p.attnum)
                FROM pg_attribute p WHERE p.attrelid IN (NULLIF(y.typrelid, 0), NULLIF(e.typrelid, 0))
                AND p.attnum > 0 AND NOT p.attisdropped)
           )::text AS members
    FROM base b JOIN pg_type y ON y.oid = b.type
    LEFT JOIN pg_type e ON e.oid = y.typelem AND e.typarray = y.oid
    WHERE y.typtype <> 'd'
), keys AS (
    SELECT i.indexrelid, i.indisprimary, array_agg(a.attname::text ORDER BY k.place) AS columns
    FROM t JOIN pg_index i ON i.indrelid = t.oid
    CROSS JOIN LATERAL unnest(i.indkey::int2[]) WITH ORDINALITY AS k(number, place)
    LEFT JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = k.number AND a.attnotnull
    WHERE i.indisunique AND i.indisvalid AND i.indpred IS NULL AND k.place <= i.indnkeyatts
    GROUP BY i.indexrelid, i.indisprimary HAVING bool_and(a.attname IS NOT NULL)
)
SELECT t.oid::int8 AS oid, t.relkind::text AS kind, t.comment AS table_comment, t.readable, t.children,
       GREATEST(t.reltuples, 0)::int8 AS rows, t.relrowsecurity AS row_security,
       getdatabaseencoding()::text AS encoding,
       (SELECT json_agg(columns ORDER BY indexrelid)::text FROM keys WHERE indisprimary) AS primary_key,
       (SELECT json_agg(columns ORDER BY indexrelid)::text FROM keys WHERE NOT indisprimary) AS unique_keys,
       a.attname::text AS name, a.attnum::int4 AS number, format_type(a.atttypid, a.atttypmod) AS type,
       n.base::text AS base, n.element::text AS element, n.dimensions::int4 AS dimensions,
       n.modifier::int4 AS modifier, a.attnotnull AS not_null, col_description(t.oid, a.attnum) AS comment,
       CASE WHEN a.attgenerated <> '' THEN pg_get_expr(d.adbin, d.adrelid) END AS generated, n.members{answered}
FROM t LEFT JOIN named n ON true LEFT JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = n.attnum
LEFT JOIN pg_attrdef d ON d.adrelid = t.oid AND d.adnum = a.attnum
ORDER BY a.attnum
"""
_LABEL = (
    "CASE {0}.typtype WHEN 'e' THEN 'enum' WHEN 'c' THEN 'composite' WHEN 'r' THEN 'range' WHEN 'm' THEN 'multirange' "
    "WHEN 'd' THEN 'domain' ELSE CASE WHEN {0}.typnamespace = 'pg_catalog'::regnamespace THEN {0}.typname::text "
    "ELSE {0}.typnamespace::regnamespace::text || '.' || {0}.typname END END"
)
_COLUMN = tuple(field.name for field in fields(SourceColumn))


#: What tells which database it is: see `database_identity`.
IDENTITY_QUESTIONS: Mapping[str, str] = {
    "control": "(has_function_privilege('pg_control_system()', 'EXECUTE') "
    "AND has_function_privilege('pg_control_checkpoint()', 'EXECUTE'))",
    "marker": "(to_regclass('telematics.source_identity') IS NOT NULL)",
    "database": "(SELECT oid::int8 FROM pg_database WHERE datname = current_database())",
}


def describe(session: Session, source: str) -> SourceTable:
    """Look a table up: `described` without further questions."""
    return described(session, source, {})[0]


def described(session: Session, source: str, questions: Mapping[str, str]) -> tuple[SourceTable, Mapping[str, Any]]:
    """Look a table up, and ask for other things along with it, in one question: each takes a round trip by itself.

    Args:
        session: An open transaction.
        source: Schema and table, such as `public.policies`; names as they are, not quoted, so that neither has a dot.
        questions: SQL of further values by their names; `c` is the table's row in `pg_class`.

    Returns:
        The table, and the further values by their names.

    Raises:
        ReplicationError: If there is no such table, the role may not read it, or the database says nothing about how
            its text is encoded.
    """
    schema, name = source.split(".")
    given = {"schema": literal(schema), "name": literal(name)}
    rows = session.rows(
        _DESCRIBE.format(
            **given,
            label=_LABEL.format("y"),
            element=_LABEL.format("e"),
            asked="".join(f", {sql} AS asked_{name}" for name, sql in questions.items()),
            answered="".join(f", t.asked_{name}" for name in questions),
        )
    )
    if not rows:
        raise ReplicationError(
            f"There is no table {source} in the database. `telematics supabase discover` lists those there are; "
            "correct the declaration, or take it out."
        )
    table = rows[0]
    if not isinstance(table["kind"], str):
        # The driver looks the server's types up when it connects, and misses them all then.
        raise ReplicationError(
            "The connection has quote_all_identifiers on, with which the driver can't tell types apart. Run ALTER ROLE "
            "… RESET quote_all_identifiers, or look for who leaves it set in the pooler's sessions."
        )
    if not table["readable"]:
        raise ReplicationError(
            f"The role may not read {source}. `telematics supabase sql` prints the grants that it needs; run them as "
            "the table's owner."
        )
    if table["encoding"] == "SQL_ASCII":
        raise ReplicationError(
            f"The database has the encoding SQL_ASCII, so nobody knows what the bytes of its text mean and {source} "
            "can't be replicated exactly. Move it to a database with the encoding UTF8."
        )
    (key,) = json.loads(table["primary_key"] or "[[]]")
    looked_up = SourceTable(
        schema=schema,
        name=name,
        oid=table["oid"],
        kind=_KINDS[table["kind"]],
        columns=tuple(SourceColumn(**{part: row[part] for part in _COLUMN}) for row in rows if row["number"]),
        key=tuple(key),
        unique_keys=tuple(map(tuple, json.loads(table["unique_keys"] or "[]"))),
        comment=table["table_comment"],
        rows=table["rows"],
        row_security=table["row_security"],
        children=table["children"],
    )
    return looked_up, {name: table[f"asked_{name}"] for name in questions}


def checked_key(table: SourceTable, given: Sequence[str] | None = None) -> tuple[str, ...]:
    """The columns that identify a row: the primary key, or given ones that the database keeps unique and not null.

    A view has no keys that could be checked; given ones are believed there.

    Raises:
        ReplicationError: If there is no such key.
    """
    source = f"{table.schema}.{table.name}"
    if given is None:
        if table.key:
            return table.key
        choices = [f"key={key!r}" for key in table.unique_keys]
        hint = (
            f"Declare one of its unique keys: {' or '.join(choices)}."
            if choices
            else "Add one (ALTER TABLE … ADD PRIMARY KEY), or declare key=(…) with columns of a view."
            if table.kind in _WITH_KEYS
            else "Declare key=(…) with the columns that identify a row."
        )
        raise ReplicationError(f"{source} ({table.kind}) has no primary key, so its rows can't be told apart. {hint}")
    if unknown := [name for name in given if table.column(name) is None]:
        raise ReplicationError(f"{source} has no column {', '.join(unknown)}, which its declaration lists under key.")
    if table.kind in _WITH_KEYS and not any({*key} == {*given} for key in (table.key, *table.unique_keys)):
        raise ReplicationError(
            f"key={tuple(given)!r} of {source} is no key in the database: two rows may have the same one, or none. "
            f"Add a unique index over columns that are not null, or use {table.key or table.unique_keys!r}."
        )
    return tuple(given)


def database_identity(session: Session, found: Mapping[str, Any] | None = None) -> str:
    """Which database this is: system identifier, timeline and the database's OID.

    A restored, recovered, cloned or recreated database has another one. Where the functions that tell it are refused to
    the role, it is the marker that our SQL leaves in the database; a recovered or cloned server has the same marker.

    Args:
        session: An open transaction.
        found: Its answers to `IDENTITY_QUESTIONS`; without them they are asked here.

    Raises:
        ReplicationError: If there is neither.
    """
    if found is None:
        asked = ", ".join(f"{sql} AS {name}" for name, sql in IDENTITY_QUESTIONS.items())
        (found,) = session.rows(f"SELECT {asked}")
    if found["control"]:
        server = session.value(
            "SELECT format('%s-%s', s.system_identifier, c.timeline_id) "
            "FROM pg_control_system() s, pg_control_checkpoint() c"
        )
    else:
        server = session.value("SELECT identity::text FROM telematics.source_identity") if found["marker"] else None
    if server is None:
        raise ReplicationError(
            "The role may not call pg_control_system() and pg_control_checkpoint(), and there is no marker in "
            "telematics.source_identity, so a restored or cloned database could not be told from this one. "
            "`telematics supabase sql` prints both ways out."
        )
    return f"{server}-{found['database']}"
