"""What `telematics doctor` says of the database.

Belongs here: looking at the connection and the role, without changing anything.
Does not belong here: causes of errors (`hurdles.py`), wrong settings (`connection.py`), printing (`cli.py`), Dagster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from telematics_assets.engines.base import Finding
from telematics_assets.errors import SupabaseError, SupabaseUnavailableError
from telematics_assets.microbatch.connection import GET_CA, Supabase
from telematics_assets.microbatch.session import transaction

_SUBJECT = "Supabase"
#: Names of tables that one finding lists.
_LISTED = 5
_OWN = "n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'"

_ROLE = """
SELECT current_setting('server_version') AS version, r.rolsuper AS superuser, r.rolbypassrls AS sees_all,
       current_user::text AS role, pg_is_in_recovery() AS replica,
       has_function_privilege('pg_control_system()', 'EXECUTE')
       AND has_function_privilege('pg_control_checkpoint()', 'EXECUTE') AS identifies
FROM pg_roles r WHERE r.rolname = current_user
"""
_TABLES = f"""
SELECT format('%I.%I', n.nspname, c.relname) AS name,
       has_table_privilege(c.oid, 'SELECT') AS readable,
       has_table_privilege(c.oid, 'INSERT, UPDATE, DELETE, TRUNCATE') AS writable,
       c.relrowsecurity AND row_security_active(c.oid) AS filtered
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND {_OWN} AND has_schema_privilege(n.oid, 'USAGE')
ORDER BY 1
"""


def examine(supabase: Supabase) -> Sequence[Finding]:
    """Connect once and look at transport and rights.

    Args:
        supabase: The database.
    """
    try:
        # Whoever asks the doctor wants the answer now: nothing is tried again.
        with transaction(supabase, pauses=()) as session:
            (role,) = session.rows(_ROLE)
            tables = session.rows(_TABLES)
    except (SupabaseError, SupabaseUnavailableError) as error:
        return [Finding("error", _SUBJECT, error.cause, error.fix or None)]
    return [*_transport(supabase, role), *_rights(role, tables)]


def _transport(supabase: Supabase, role: dict[str, Any]) -> Iterator[Finding]:
    replica = ", a replica" if role["replica"] else ""
    yield Finding(
        "ok",
        _SUBJECT,
        f"PostgreSQL {role['version']}{replica} answers at {supabase.place} as {supabase.user}, database "
        f"{supabase.database}. (Lakehouse Federation needs the session pooler, port 5432, instead.)",
    )
    subject = f"{_SUBJECT} TLS"
    if supabase.sslmode == "disable":
        yield Finding("ok", subject, "none, on loopback")
    elif supabase.sslmode == "require":
        yield Finding(
            "warning",
            subject,
            "The connection is encrypted, but whoever answers is trusted.",
            f"{GET_CA} Then SUPABASE_SSLMODE=verify-full.",
        )
    else:
        yield Finding("ok", subject, f"{supabase.sslmode}, CA {supabase.ca or 'of this machine'}")


def _rights(role: dict[str, Any], tables: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    subject, name = f"{_SUBJECT} role", role["role"]
    least = "Use a role that may only read: `telematics supabase sql` prints it."
    if role["superuser"]:
        yield Finding("warning", subject, f"{name} is a superuser.", least)
    elif writable := [table["name"] for table in tables if table["writable"]]:
        yield Finding("warning", subject, f"{name} may change {_listed(writable)}; replication only reads.", least)
    readable = [table["name"] for table in tables if table["readable"]]
    if not readable:
        yield Finding("warning", subject, f"{name} may read no table.", "`telematics supabase sql` prints the grants.")
    else:
        yield Finding("ok", subject, f"{name} may read {_listed(readable)}.")
    if filtered := [table["name"] for table in tables if table["readable"] and table["filtered"]]:
        yield Finding(
            "error",
            f"{_SUBJECT} policies",
            f"Row level security would hide rows of {_listed(filtered)} from {name}; replication refuses them.",
            f"Run as the database's owner: ALTER ROLE {name} BYPASSRLS",
        )
    if not role["identifies"]:
        yield Finding(
            "warning",
            f"{_SUBJECT} identity",
            f"{name} may not ask which database this is (pg_control_system, pg_control_checkpoint): a restored or "
            "recovered one would pass for the same.",
            "`telematics supabase sql` prints the grants, and a table that stands in for them.",
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} table{'s' if len(names) > 1 else ''} ({', '.join(names[:_LISTED])}{more})"
