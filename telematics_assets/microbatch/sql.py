"""SQL that the database's owner runs once: what mode `row_xid` needs, and a role that may read and nothing else.

Belongs here: text, made from declarations and described tables; the names of what it creates in the database.
Does not belong here: running it, looking at the database (`discover.py`), what is read afterwards (`extract.py`),
Dagster.

All that is ours in the database is in the schema `telematics`, apart from the triggers, a column and an index of each
table:

    telematics.tombstones (source oid, row_xid xid8, id bigint, key text[], deleted_at timestamptz)
    telematics.pruned (source oid, pruned_below xid8)
    telematics.source_identity (identity uuid)

- `source` is the OID of the partitioned table at the root for partitions, else the table's own:
  `COALESCE(pg_partition_root(oid), oid)`.
- `key` holds the primary key's columns in the key's order, each as `column::text` under the settings that `session.py`
  makes too (UTC, ISO dates, hex, …). `(key[1])::type` is the value again, and `column::text COLLATE "C" = key[1]`
  compares exactly, where `=` would take `a` for `A` (citext, collations).
- `key` is null where keys can't be named (TRUNCATE, a key column that was renamed): compare all keys, or start anew.
- Tombstones with a position below `pruned_below` may be gone: a reader whose own position is below it compares keys.
- A key that was deleted may be there again, also with a position at or above the cut: a tombstone counts only if the
  source has no row with exactly its key.

https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-INFO-SNAPSHOT
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from telematics_assets.microbatch.source import literal, quoted

#: The schema that everything of ours is in.
SCHEMA = "telematics"
#: The role that reads, unless another one is named.
READER = "telematics_reader"
#: Triggers of a table. They sort behind others, so that nothing changes the position after it was filled.
FILL_TRIGGER = "zz_telematics_position"
NOTE_TRIGGER = "zz_telematics_deleted"
TRUNCATE_TRIGGER = "zz_telematics_truncated"

_OWN_TABLES = tuple(f"{SCHEMA}.{name}" for name in ("tombstones", "pruned", "source_identity"))
_MAX_NAME_BYTES = 63
# What `session.py` sets, so that a key's text is the same on both sides.
_TEXT_SETTINGS = (
    "search_path = pg_catalog, pg_temp",
    "TimeZone = 'UTC'",
    "DateStyle = 'ISO, YMD'",
    "IntervalStyle = 'iso_8601'",
    "extra_float_digits = 1",
    "bytea_output = 'hex'",
    "lc_monetary = 'C'",
)


@dataclass(frozen=True, slots=True)
class TableSetup:
    """What one table needs in the database.

    Attributes:
        schema: The table's schema.
        name: The table's name.
        key: Columns of its primary key, in order.
        partitioned: Whether it is a partitioned table.
        position: Column that a trigger fills, or None for the modes that need nothing but a grant.
        tombstones: Whether a trigger records deleted keys.
    """

    schema: str
    name: str
    key: tuple[str, ...]
    partitioned: bool = False
    position: str | None = "row_xid"
    tombstones: bool = True

    @property
    def sql(self) -> str:
        """The quoted name."""
        return f"{quoted(self.schema)}.{quoted(self.name)}"


def setup_sql(tables: Sequence[TableSetup], *, role: str = READER, bigint: bool = False) -> str:
    """What the owner of these tables runs, once or again: schema, triggers, columns, indexes, role, grants.

    Args:
        tables: The tables.
        role: The role that reads; it is created without a password, with which nobody can log in.
        bigint: Make new position columns `bigint` instead of `xid8`, for readers that don't know that type.
    """
    parts = [
        (
            "-- Run this as the owner of the tables (on Supabase: role postgres, in the SQL editor). It may be run\n"
            "-- again, and should be after a primary key changed. It is one transaction: all of it, or nothing."
        ),
        "BEGIN;\nSET LOCAL lock_timeout = '10s';",
        setup_steps(tables, role=role, bigint=bigint),
        "COMMIT;",
        (
            f"-- Give the role a password of your own, then use it in SUPABASE_DB_URL:\n--   ALTER ROLE {quoted(role)} "
            "PASSWORD '…';\n"
            "-- Let tombstones go after a while; a reader that was away for longer compares keys. With pg_cron:\n"
            "--   SELECT cron.schedule('telematics-prune', '17 3 * * *', "
            f"$$SELECT {SCHEMA}.prune_tombstones('30 days')$$);"
        ),
    ]
    return "\n\n".join(parts) + "\n"


def setup_steps(tables: Sequence[TableSetup], *, role: str = READER, bigint: bool = False) -> str:
    """The same for whoever has a transaction open that it belongs to. See `setup_sql`."""
    return "\n\n".join(
        [
            _SHARED,
            *(_fill_function(column) for column in sorted({table.position for table in tables if table.position})),
            *(_table_setup(table, bigint) for table in tables),
            _role_setup(tables, role),
        ]
    )


def undo_sql(tables: Sequence[TableSetup], *, role: str = READER, everything: bool = False) -> str:
    """What takes it all back; may be run again too.

    Args:
        tables: The tables.
        role: The role that reads.
        everything: Also the role and the schema `telematics`, for which no other table may use them any more.
    """
    parts = ["BEGIN;\nSET LOCAL lock_timeout = '10s';", *(_table_undo(table) for table in tables)]
    if everything:
        functions = [_fill_name(column) for column in sorted({table.position for table in tables if table.position})]
        functions += [f"{SCHEMA}.note_truncate", f"{SCHEMA}.prune_tombstones"]
        parts += [
            "\n".join(f"DROP FUNCTION IF EXISTS {name};" for name in functions),
            "\n".join(f"DROP TABLE IF EXISTS {name};" for name in _OWN_TABLES),
            f"DROP SCHEMA IF EXISTS {SCHEMA};",
        ]
    given_back = []
    if tables:
        given_back.append(f"REVOKE SELECT ON {', '.join(table.sql for table in tables)} FROM {quoted(role)};")
    if everything:
        schemas = ", ".join(sorted({quoted(table.schema) for table in tables}))
        if schemas:
            given_back.append(f"REVOKE USAGE ON SCHEMA {schemas} FROM {quoted(role)};")
        given_back.append(f"DROP ROLE {quoted(role)};")
    body = "\n        ".join(
        [f"BEGIN\n    IF EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = {literal(role)}) THEN", *given_back]
    )
    ending = "\n    END IF;\nEND"
    parts.append(f"DO {_dollars(body + ending)};")
    return "\n\n".join([*parts, "COMMIT;"]) + "\n"


_SHARED = f"""\
CREATE SCHEMA IF NOT EXISTS {SCHEMA};
REVOKE ALL ON SCHEMA {SCHEMA} FROM PUBLIC;
COMMENT ON SCHEMA {SCHEMA} IS 'telematics_assets: what replication needs. `telematics supabase sql --undo` removes it.';

CREATE TABLE IF NOT EXISTS {SCHEMA}.tombstones (
    source oid NOT NULL,
    row_xid xid8 NOT NULL,
    id bigint GENERATED ALWAYS AS IDENTITY,
    key text[],
    deleted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (source, row_xid, id)
);
COMMENT ON TABLE {SCHEMA}.tombstones IS 'Keys of deleted rows, as text; null: some that have no name.';

CREATE TABLE IF NOT EXISTS {SCHEMA}.pruned (
    source oid PRIMARY KEY,
    pruned_below xid8 NOT NULL
);
COMMENT ON TABLE {SCHEMA}.pruned IS 'Below this position tombstones may be gone.';

CREATE TABLE IF NOT EXISTS {SCHEMA}.source_identity (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    identity uuid NOT NULL DEFAULT gen_random_uuid()
);
INSERT INTO {SCHEMA}.source_identity DEFAULT VALUES ON CONFLICT DO NOTHING;
COMMENT ON TABLE {SCHEMA}.source_identity IS 'Which database this is, for readers that may not ask the server.';
REVOKE ALL ON {SCHEMA}.tombstones, {SCHEMA}.pruned, {SCHEMA}.source_identity FROM PUBLIC;

CREATE OR REPLACE FUNCTION {SCHEMA}.note_truncate() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO {SCHEMA}.tombstones (source, row_xid)
    VALUES (coalesce(pg_partition_root(TG_RELID)::oid, TG_RELID), pg_current_xact_id());
    RETURN NULL;
END $$;
REVOKE ALL ON FUNCTION {SCHEMA}.note_truncate FROM PUBLIC;

CREATE OR REPLACE FUNCTION {SCHEMA}.prune_tombstones(keep interval DEFAULT '30 days') RETURNS bigint
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    WITH gone AS (
        DELETE FROM {SCHEMA}.tombstones WHERE deleted_at < clock_timestamp() - keep RETURNING source, row_xid
    ), newest AS (
        SELECT DISTINCT ON (source) source, row_xid::text::bigint + 1 AS next FROM gone ORDER BY source, row_xid DESC
    ), published AS (
        INSERT INTO {SCHEMA}.pruned AS p (source, pruned_below) SELECT source, next::text::xid8 FROM newest
        ON CONFLICT (source) DO UPDATE SET pruned_below = greatest(p.pruned_below, EXCLUDED.pruned_below)
    )
    SELECT count(*) FROM gone
$$;
REVOKE ALL ON FUNCTION {SCHEMA}.prune_tombstones FROM PUBLIC;"""


def _fill_name(column: str) -> str:
    return f"{SCHEMA}.{quoted(_short(f'fill_{column}'))}"


def _fill_function(column: str) -> str:
    # As text the number fits a column of either type.
    body = f"BEGIN\n    NEW.{quoted(column)} := pg_catalog.pg_current_xact_id()::pg_catalog.text;\n    RETURN NEW;\nEND"
    name = _fill_name(column)
    return (
        f"CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS {_dollars(body)};\n"
        f"REVOKE ALL ON FUNCTION {name} FROM PUBLIC;"
    )


def _note_name(table: TableSetup) -> str:
    return f"{SCHEMA}.{quoted(_short(f'note_deleted_{table.schema}.{table.name}'))}"


def _note_function(table: TableSetup) -> str:
    def key_of(row: str) -> str:
        return f"ARRAY[{', '.join(f'{row}.{quoted(column)}::text' for column in table.key)}]"

    # A delete of the owner's must never fail because of us: a key that can't be told is noted as such.
    body = f"""\
DECLARE
    gone text[];
    root oid := coalesce(pg_partition_root(TG_RELID)::oid, TG_RELID);
BEGIN
    BEGIN
        gone := {key_of("OLD")};
        IF TG_OP = 'UPDATE' AND gone = {key_of("NEW")} THEN
            RETURN NULL;
        END IF;
    EXCEPTION WHEN OTHERS THEN
        gone := NULL;
    END;
    INSERT INTO {SCHEMA}.tombstones (source, row_xid, key)
    SELECT root, pg_current_xact_id(), gone
    WHERE gone IS NOT NULL OR NOT EXISTS (
        SELECT FROM {SCHEMA}.tombstones t WHERE t.source = root AND t.row_xid = pg_current_xact_id() AND t.key IS NULL
    );
    RETURN NULL;
END"""
    settings = "\n".join(f"SET {setting}" for setting in _TEXT_SETTINGS)
    name = _note_name(table)
    return (
        f"CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER\n{settings}\n"
        f"AS {_dollars(body)};\nREVOKE ALL ON FUNCTION {name} FROM PUBLIC;"
    )


def _table_setup(table: TableSetup, bigint: bool) -> str:
    if table.position is None:
        return f"-- {table.schema}.{table.name}: nothing but the grant below."
    column, kind = quoted(table.position), "bigint" if bigint else "xid8"
    index = quoted(_short(f"{table.name}_{table.position}_telematics"))
    fill = f"BEFORE INSERT OR UPDATE ON {table.sql} FOR EACH ROW"
    # ALWAYS: also for rows that arrive by logical replication.
    parts = [
        (
            f"-- {table.schema}.{table.name}: what is there keeps a null position, the first snapshot takes it.\n"
            f"ALTER TABLE {table.sql} ADD COLUMN IF NOT EXISTS {column} {kind};\n"
            f"COMMENT ON COLUMN {table.sql}.{column} IS 'telematics_assets: transaction that wrote the row, filled by "
            "a trigger. Don''t drop it alone: `telematics supabase sql --undo`.';\n"
            f"CREATE INDEX IF NOT EXISTS {index} ON {table.sql} ({column}) WHERE {column} IS NOT NULL;"
        ),
        (
            f"CREATE OR REPLACE TRIGGER {FILL_TRIGGER} {fill} EXECUTE FUNCTION {_fill_name(table.position)}();\n"
            f"ALTER TABLE {table.sql} ENABLE ALWAYS TRIGGER {FILL_TRIGGER};"
        ),
    ]
    if table.tombstones:
        # The key as arguments is for readers of the catalogs: it tells a trigger that has fallen behind.
        key = ", ".join(map(literal, table.key))
        note = f"AFTER DELETE OR UPDATE ON {table.sql} FOR EACH ROW"
        truncate = f"EXECUTE FUNCTION {SCHEMA}.note_truncate()"
        parts += [
            _note_function(table),
            (
                f"CREATE OR REPLACE TRIGGER {NOTE_TRIGGER} {note} EXECUTE FUNCTION {_note_name(table)}({key});\n"
                f"ALTER TABLE {table.sql} ENABLE ALWAYS TRIGGER {NOTE_TRIGGER};\n"
                f"CREATE OR REPLACE TRIGGER {TRUNCATE_TRIGGER} AFTER TRUNCATE ON {table.sql} {truncate};\n"
                f"ALTER TABLE {table.sql} ENABLE ALWAYS TRIGGER {TRUNCATE_TRIGGER};"
            ),
        ]
        if table.partitioned:
            parts.append(
                "-- A partition that is truncated by itself fires no trigger of its parent.\n"
                + _for_partitions(
                    table,
                    f"CREATE OR REPLACE TRIGGER {TRUNCATE_TRIGGER} AFTER TRUNCATE ON %1$s {truncate}; "
                    f"ALTER TABLE %1$s ENABLE ALWAYS TRIGGER {TRUNCATE_TRIGGER}",
                )
            )
    return "\n\n".join(parts)


def _table_undo(table: TableSetup) -> str:
    if table.position is None:
        return f"-- {table.schema}.{table.name}: nothing but the grant."
    dropped = []
    if table.tombstones:
        if table.partitioned:
            dropped.append(_for_partitions(table, f"DROP TRIGGER IF EXISTS {TRUNCATE_TRIGGER} ON %1$s"))
        dropped += [f"DROP TRIGGER IF EXISTS {name} ON {table.sql};" for name in (NOTE_TRIGGER, TRUNCATE_TRIGGER)]
    return "\n".join(
        [
            *dropped,
            f"DROP TRIGGER IF EXISTS {FILL_TRIGGER} ON {table.sql};",
            *([f"DROP FUNCTION IF EXISTS {_note_name(table)};"] if table.tombstones else []),
            f"ALTER TABLE IF EXISTS {table.sql} DROP COLUMN IF EXISTS {quoted(table.position)};",
        ]
    )


def _for_partitions(table: TableSetup, statement: str) -> str:
    body = f"""\
DECLARE
    part regclass;
BEGIN
    FOR part IN
        SELECT p.relid FROM pg_catalog.pg_partition_tree(to_regclass({literal(table.sql)})) p
        JOIN pg_catalog.pg_class c ON c.oid = p.relid WHERE p.level > 0 AND c.relkind IN ('r', 'p')
    LOOP
        EXECUTE format({literal(statement)}, part);
    END LOOP;
END"""
    return f"DO {_dollars(body)};"


def _role_setup(tables: Sequence[TableSetup], role: str) -> str:
    name = quoted(role)
    created = (
        f"BEGIN\n    IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = {literal(role)}) THEN\n"
        f"        CREATE ROLE {name} LOGIN;\n    END IF;\nEND"
    )
    listed = ", ".join(f"to_regclass({literal(table.sql)})" for table in tables)
    filtered = (
        f"SELECT FROM pg_catalog.pg_class WHERE oid IN ({listed}) AND relrowsecurity" if tables else "SELECT LIMIT 0"
    )
    message = "Policies filter what the role sees, and it can't be told to pass them by."
    hint = "Run this as a role with BYPASSRLS and CREATEROLE (on Supabase: postgres), or as a superuser."
    bypassed = f"""\
BEGIN
    ALTER ROLE {name} BYPASSRLS;
EXCEPTION WHEN insufficient_privilege THEN
    IF EXISTS ({filtered}) THEN
        RAISE EXCEPTION {literal(message)} USING HINT = {literal(hint)};
    END IF;
END"""
    watching = f"""\
BEGIN
    GRANT pg_read_all_stats TO {name};
EXCEPTION WHEN insufficient_privilege THEN
    RAISE NOTICE {literal(f"{role} can not see which session holds replication back; that is all it lacks.")};
END"""
    schemas = ", ".join(sorted({quoted(table.schema) for table in tables} | {SCHEMA}))
    names = ", ".join(
        [
            *(table.sql for table in tables),
            *(f"{SCHEMA}.{each}" for each in ("tombstones", "pruned", "source_identity")),
        ]
    )
    return "\n".join(
        [
            (
                f"-- The role that reads. It passes policies by: filtered rows would look like deleted ones.\n"
                f"DO {_dollars(created)};"
            ),
            f"DO {_dollars(bypassed)};",
            f"DO {_dollars(watching)};",
            f"GRANT USAGE ON SCHEMA {schemas} TO {name};",
            f"GRANT SELECT ON {names} TO {name};",
        ]
    )


def _dollars(body: str) -> str:
    """A body in dollar quotes that nothing in it ends."""
    tag = "$$"
    while tag in body:
        tag = f"$t{len(tag)}$" if tag == "$$" else f"${tag[1:-1]}x$"
    return f"{tag}\n{body}\n{tag}"


def _short(name: str) -> str:
    """A name that PostgreSQL does not cut: the end of a longer one is told by its hash."""
    if len(name.encode()) <= _MAX_NAME_BYTES:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:10]
    return name.encode()[: _MAX_NAME_BYTES - 11].decode(errors="ignore") + "_" + digest
