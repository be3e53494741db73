"""What a database has, what could be declared of it, and where declarations and database have drifted apart.

Belongs here: one look at all tables, the declarations that suit them, and the comparison with those there are.
Does not belong here: one table in depth (`source.py`), the SQL that mode `row_xid` needs (`sql.py`), Dagster.

The system catalogs are open to every role: a table is found although the role may not read it yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from telematics_assets.catalog import ReplicatedTable, ReplicationMode
from telematics_assets.errors import ReplicationError, TelematicsError
from telematics_assets.microbatch.session import Session
from telematics_assets.microbatch.sql import FILL_TRIGGER, NOTE_TRIGGER, TRUNCATE_TRIGGER, TableSetup

#: Types that a position column may have.
POSITION_TYPES = ("xid8", "bigint")
#: Schemas of PostgreSQL, of Supabase's services, and ours: nobody's tables.
_NOT_FOR_USERS = """
    'information_schema', 'auth', 'cron', 'extensions', 'graphql', 'graphql_public', 'net', 'pgbouncer', 'pgmq',
    'pgsodium', 'pgsodium_masks', 'pgtle', 'realtime', '_realtime', 'storage', 'supabase_functions',
    'supabase_migrations', '_analytics', '_supavisor', 'telematics', 'vault'
"""
_TABLES = """
SELECT c.oid::int8 AS oid, n.nspname::text AS schema, c.relname::text AS name, c.relkind::text AS kind,
       obj_description(c.oid, 'pg_class') AS comment, GREATEST(c.reltuples, 0)::int8 AS rows,
       c.relrowsecurity AND NOT (r.rolbypassrls OR r.rolsuper) AS filtered, c.relispartition AS is_partition,
       has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT') AS readable,
       (SELECT count(*) FROM pg_catalog.pg_inherits i WHERE i.inhparent = c.oid)::int8 AS children
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
CROSS JOIN (SELECT rolbypassrls, rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) r
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND c.relpersistence <> 't'
  AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname NOT IN ({schemas})
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                  AND d.deptype = 'e')
ORDER BY n.nspname, c.relname
"""
_COLUMNS = """
SELECT a.attrelid::int8 AS oid, a.attname::text AS name, format_type(a.atttypid, a.atttypmod) AS type,
       EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = a.attrelid AND i.indisvalid
               AND i.indkey[0] = a.attnum) AS indexed
FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE a.attnum > 0 AND NOT a.attisdropped AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
  AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname NOT IN ({schemas})
ORDER BY a.attrelid, a.attnum
"""
_KEYS = """
SELECT i.indrelid::int8 AS oid, a.attname::text AS name
FROM pg_catalog.pg_index i CROSS JOIN LATERAL unnest(i.indkey::int2[]) WITH ORDINALITY AS k(number, place)
JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number
WHERE i.indisprimary AND k.place <= i.indnkeyatts ORDER BY i.indrelid, k.place
"""
_TRIGGERS = """
SELECT t.tgrelid::int8 AS oid, t.tgname::text AS name, t.tgenabled::text AS enabled,
       encode(t.tgargs, 'hex') AS arguments
FROM pg_catalog.pg_trigger t WHERE t.tgname IN ({names})
"""
_KINDS = {"r": "table", "p": "partitioned table", "v": "view", "m": "materialized view", "f": "foreign table"}


@dataclass(frozen=True, slots=True)
class FoundColumn:
    """A column: its name, its type as PostgreSQL spells it, and whether an index begins with it."""

    name: str
    type: str
    indexed: bool


@dataclass(frozen=True, slots=True)
class FoundTrigger:
    """A trigger of ours: its name, whether it fires always, and its arguments (the key that it was made for)."""

    name: str
    always: bool
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FoundTable:
    """A table, or what looks like one, in the database.

    Attributes:
        schema: Its schema.
        name: Its name.
        kind: `table`, `partitioned table`, `view`, `materialized view` or `foreign table`.
        columns: Its columns, in order.
        key: Columns of its primary key, in order; empty if it has none.
        rows: The planner's estimate of its rows.
        comment: Its comment, or None.
        readable: Whether the role may read it.
        filtered: Whether policies filter what the role sees.
        is_partition: Whether it is part of another table.
        children: Tables that are part of it, or inherit from it.
        triggers: Those of ours that it has.
    """

    schema: str
    name: str
    kind: str
    columns: tuple[FoundColumn, ...]
    key: tuple[str, ...]
    rows: int
    comment: str | None
    readable: bool
    filtered: bool
    is_partition: bool
    children: int
    triggers: tuple[FoundTrigger, ...]

    @property
    def source(self) -> str:
        """Schema and table, as a declaration names them."""
        return f"{self.schema}.{self.name}"

    def column(self, name: str) -> FoundColumn | None:
        """The column of that name, or None."""
        return next((column for column in self.columns if column.name == name), None)

    def trigger(self, name: str) -> FoundTrigger | None:
        """The trigger of that name, or None."""
        return next((trigger for trigger in self.triggers if trigger.name == name), None)


@dataclass(frozen=True, slots=True)
class Suggestion:
    """What could be declared of a table.

    Attributes:
        source: Schema and table.
        kind: What it is.
        rows: The planner's estimate of its rows.
        key: Columns of its primary key.
        mode: The best mode that the table allows as it is; None if it can't be replicated.
        table: The bronze table, one level.
        declaration: The declaration as Python, or None.
        notes: What a reader should know before using it, one line each.
    """

    source: str
    kind: str
    rows: int
    key: tuple[str, ...]
    mode: ReplicationMode | None
    table: str | None
    declaration: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Drift:
    """One way in which the database and the declarations have drifted apart.

    Attributes:
        source: Schema and table.
        kind: `undeclared`, `missing`, `unreadable`, `filtered`, `key`, `column`, `position` or `tombstones`.
        message: What was found, and what to do about it.
    """

    source: str
    kind: str
    message: str


def find_tables(session: Session) -> tuple[FoundTable, ...]:
    """All tables of the database that are its users', by schema and name; also such that the role may not read."""
    columns: dict[int, list[FoundColumn]] = {}
    for row in session.rows(_COLUMNS.format(schemas=_NOT_FOR_USERS)):
        columns.setdefault(row["oid"], []).append(FoundColumn(row["name"], row["type"], row["indexed"]))
    keys: dict[int, list[str]] = {}
    for row in session.rows(_KEYS):
        keys.setdefault(row["oid"], []).append(row["name"])
    triggers: dict[int, list[FoundTrigger]] = {}
    names = ", ".join(f"'{name}'" for name in (FILL_TRIGGER, NOTE_TRIGGER, TRUNCATE_TRIGGER))
    for row in session.rows(_TRIGGERS.format(names=names)):
        arguments = bytes.fromhex(row["arguments"]).decode().split("\0")[:-1]
        found = FoundTrigger(row["name"], row["enabled"] == "A", tuple(arguments))
        triggers.setdefault(row["oid"], []).append(found)
    return tuple(
        FoundTable(
            schema=row["schema"],
            name=row["name"],
            kind=_KINDS[row["kind"]],
            columns=tuple(columns.get(row["oid"], ())),
            key=tuple(keys.get(row["oid"], ())),
            rows=row["rows"],
            comment=row["comment"],
            readable=row["readable"],
            filtered=row["filtered"],
            is_partition=row["is_partition"],
            children=row["children"],
            triggers=tuple(triggers.get(row["oid"], ())),
        )
        for row in session.rows(_TABLES.format(schemas=_NOT_FOR_USERS))
    )


def suggest(found: Sequence[FoundTable]) -> tuple[Suggestion, ...]:
    """What could be declared of each table; partitions come with the table that they are part of."""
    whole = [table for table in found if not table.is_partition]
    taken = Counter(table.name for table in whole if _has_rows_of_its_own(table))
    return tuple(_suggestion(table, taken[table.name] > 1) for table in whole)


def declarations(suggestions: Sequence[Suggestion]) -> str:
    """The suggestions as a Python module."""
    lines = ["from telematics_assets.catalog import ReplicatedTable", "", "REPLICATED_TABLES = ("]
    for each in suggestions:
        notes = [f"    # {note}" for note in each.notes]
        if each.declaration is None:
            lines += [f"    # {each.source}: no declaration.", *notes]
        else:
            lines += [*notes, f"    {each.declaration},  # about {each.rows:,} rows"]
    return "\n".join([*lines, ")"])


def table_setup(declared: ReplicatedTable, found: Sequence[FoundTable]) -> TableSetup:
    """What a declared table needs in the database.

    Args:
        declared: The table.
        found: All tables of the database.

    Raises:
        ReplicationError: If there is no such table, or it can't have what its mode needs.
    """
    table = next((table for table in found if table.source == declared.source), None)
    if table is None:
        raise ReplicationError(
            f"There is no table {declared.source} in the database. `telematics supabase discover` lists those there "
            "are; correct the declaration, or take it out."
        )
    if declared.mode != "row_xid":
        return TableSetup(table.schema, table.name, table.key, position=None, tombstones=False)
    if not _has_rows_of_its_own(table):
        raise ReplicationError(
            f"{table.source} is a {table.kind}, which has no triggers for mode row_xid. Replicate the tables below it."
        )
    tombstones = declared.delete_handling == "tombstones"
    if not table.key and (tombstones or declared.key is None):
        raise ReplicationError(f"{table.source} has no primary key. {_NO_KEY}")
    if tombstones and (problem := _foreign_key_problem(declared, table)):
        raise ReplicationError(f"{table.source}: {problem}")
    assert declared.position is not None
    if problem := _position_type_problem(declared.position, table):
        raise ReplicationError(f"{table.source}: {problem}")
    return TableSetup(
        schema=table.schema,
        name=table.name,
        key=table.key,
        partitioned=table.kind == "partitioned table",
        position=declared.position,
        tombstones=tombstones,
    )


def drift(declared: Sequence[ReplicatedTable], found: Sequence[FoundTable]) -> tuple[Drift, ...]:
    """Where declarations and database have drifted apart: the worst of each table first, undeclared tables last."""
    tables = {table.source: table for table in found}
    drifts = [each for table in declared for each in _drift_of(table, tables.get(table.source))]
    known = {table.source for table in declared}
    for table in found:
        if _has_rows_of_its_own(table) and not table.is_partition and table.source not in known:
            message = "It is in the database and not declared. `telematics supabase discover` prints its declaration."
            drifts.append(Drift(table.source, "undeclared", message))
    return tuple(drifts)


_NO_KEY = (
    "Add one: ALTER TABLE … ADD PRIMARY KEY (…). Or declare key=(…) with columns that are unique and not null, and "
    "deletes='sweep' in mode row_xid."
)
_AGAIN = "Run what `telematics supabase sql` prints for it (again)."


def _has_rows_of_its_own(table: FoundTable) -> bool:
    return table.kind in ("table", "partitioned table")


def _suggestion(table: FoundTable, ambiguous: bool) -> Suggestion:
    notes = []
    mode: ReplicationMode | None = None
    if not _has_rows_of_its_own(table):
        also = ", or the view itself with key=(…), in mode updated_at or snapshot" if table.kind == "view" else ""
        notes.append(f"It is a {table.kind}, without a primary key. Declare the tables below it{also}.")
    elif not table.key:
        notes.append(f"It has no primary key. {_NO_KEY}")
    else:
        mode = "xmin"
        position = table.column("row_xid")
        if position is not None and position.type in POSITION_TYPES:
            mode = "row_xid"
        else:
            notes.append("Mode row_xid loses nothing and needs no scan: declare it, and run `telematics supabase sql`.")
        changed = [column.name for column in table.columns if column.name in ("updated_at", "modified_at")]
        if mode == "xmin" and changed:
            notes.append(f"{changed[0]} would do for mode updated_at, whose gap is documented.")
    if table.kind == "partitioned table":
        notes.append(f"Its {table.children} partitions come with it.")
    elif table.children:
        notes.append("Other tables inherit from it; their rows are read with it, and need triggers of their own.")
    if not table.readable:
        notes.append("The role may not read it: `telematics supabase sql` prints the grants.")
    elif table.filtered:
        notes.append("Policies filter it, so that reading fails: the role needs BYPASSRLS (`telematics supabase sql`).")
    target = f"supabase_{table.schema}_{table.name}" if ambiguous else None
    declaration = None
    if mode is not None:
        try:
            declared = ReplicatedTable(table.source, mode, target)
        except TelematicsError as error:
            notes.append(" ".join(str(error).split()))
            mode = None
        else:
            parts = [repr(table.source), f"mode={mode!r}", *([f"table={target!r}"] if target else [])]
            declaration = f"ReplicatedTable({', '.join(parts).replace(chr(39), chr(34))})"
            target = declared.target
    return Suggestion(
        source=table.source,
        kind=table.kind,
        rows=table.rows,
        key=table.key,
        mode=mode,
        table=target if mode else None,
        declaration=declaration,
        notes=tuple(notes),
    )


def _drift_of(declared: ReplicatedTable, table: FoundTable | None) -> list[Drift]:
    def drifted(kind: str, message: str) -> Drift:
        return Drift(declared.source, kind, message)

    if table is None:
        return [drifted("missing", "It is declared and not in the database. Correct the declaration, or take it out.")]
    drifts = []
    if not table.readable:
        drifts.append(drifted("unreadable", "The role may not read it: `telematics supabase sql` prints the grants."))
    elif table.filtered:
        drifts.append(drifted("filtered", "Policies filter it, and the role may not pass them by (BYPASSRLS)."))
    if not table.key and declared.key is None:
        drifts.append(drifted("key", f"It has no primary key. {_NO_KEY}"))
    elif gone := [name for name in declared.key or () if table.column(name) is None]:
        drifts.append(drifted("key", f"The declared key has {', '.join(gone)}, which is not there."))
    elif declared.delete_handling == "tombstones" and (problem := _foreign_key_problem(declared, table)):
        drifts.append(drifted("key", problem))
    for option, names in (("exclude", declared.exclude), ("hash", declared.hash)):
        if gone := [name for name in names if table.column(name) is None]:
            message = f"{option} names {', '.join(gone)}, which is not there. A renamed one is not protected."
            drifts.append(drifted("column", message))
    promised = [column.name for column in declared.contract.columns if column.name not in declared.exclude]
    if gone := [name for name in promised if table.column(name) is None]:
        drifts.append(drifted("column", f"The contract promises {', '.join(gone)}, which is not there."))
    hidden = {*declared.exclude, declared.position, "row_xid"}
    if promised and (new := [c.name for c in table.columns if c.name not in promised and c.name not in hidden]):
        drifts.append(drifted("column", f"The contract does not say what {', '.join(new)} means."))
    return [*drifts, *(drifted(kind, message) for kind, message in _position_drift(declared, table))]


def _position_drift(declared: ReplicatedTable, table: FoundTable) -> list[tuple[str, str]]:
    if declared.position is None:
        return []
    column = table.column(declared.position)
    if column is None:
        return [("position", f"It has no column {declared.position}. {_AGAIN}")]
    if declared.mode == "updated_at":
        if not column.type.startswith("timestamp"):
            return [("position", f"{declared.position} is {column.type}, and mode updated_at needs a timestamp.")]
        return [] if column.indexed else [("position", f"No index begins with {declared.position}: batches scan it.")]
    if problem := _position_type_problem(declared.position, table):
        return [("position", problem)]
    found = []
    fill = table.trigger(FILL_TRIGGER)
    if fill is None or not fill.always:
        state = "is missing" if fill is None else "is not enabled ALWAYS"
        found.append(("position", f"The trigger that fills {declared.position} {state}: rows are lost. {_AGAIN}"))
    if not column.indexed:
        found.append(("position", f"No index begins with {declared.position}: batches scan the table. {_AGAIN}"))
    if declared.delete_handling == "tombstones":
        for name in (NOTE_TRIGGER, TRUNCATE_TRIGGER):
            trigger = table.trigger(name)
            if trigger is None or not trigger.always:
                found.append(("tombstones", f"Trigger {name} is missing or not enabled ALWAYS: deletes wait. {_AGAIN}"))
            elif name == NOTE_TRIGGER and trigger.arguments != table.key:
                was = ", ".join(trigger.arguments)
                found.append(("tombstones", f"Deletes are noted by the key {was}, which is not its key now. {_AGAIN}"))
    return found


def _foreign_key_problem(declared: ReplicatedTable, table: FoundTable) -> str | None:
    if declared.key is None or {*declared.key} == {*table.key}:
        return None
    there = ", ".join(table.key) or "none"
    return (
        f"Deletes are noted by the primary key ({there}), and the declared key is {', '.join(declared.key)}. Leave key "
        "out, or declare deletes='sweep'."
    )


def _position_type_problem(name: str, table: FoundTable) -> str | None:
    column = table.column(name)
    if column is None or column.type in POSITION_TYPES:
        return None
    return (
        f"Column {name} is {column.type}, and a position is {' or '.join(POSITION_TYPES)}. Rename it, or declare "
        "another position_column."
    )
