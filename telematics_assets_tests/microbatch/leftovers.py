"""What one client of a pooler leaves to the next.

Belongs here: how the next client looks at the session it is lent. Does not belong here: test cases.
"""

from __future__ import annotations

from typing import Any

import psycopg

from telematics_assets.microbatch.connection import Supabase

_SETTINGS = "SELECT name, setting FROM pg_settings WHERE name NOT LIKE 'transaction_%' ORDER BY name"
_TRANSACTION = "SELECT name, setting FROM pg_settings WHERE name LIKE 'transaction_%' ORDER BY name"
_LEFT = {
    "prepared statements": "SELECT count(*) FROM pg_prepared_statements",
    "cursors": "SELECT count(*) FROM pg_cursors WHERE name <> ''",
    "advisory locks": "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
    "temporary tables": "SELECT count(*) FROM pg_class WHERE relpersistence = 't'",
    "listeners": "SELECT count(*) FROM pg_listening_channels()",
    "open transactions": "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
    "AND backend_type = 'client backend' AND state LIKE 'idle in transaction%'",
    "locks on tables": "SELECT count(*) FROM pg_locks l JOIN pg_class c ON c.oid = l.relation "
    "WHERE c.oid >= 16384 AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())",
}


def session_seen(supabase: Supabase) -> dict[str, Any]:
    """The session that a fresh client is lent: every setting, and the number of everything that may be left in it."""
    with psycopg.connect(supabase.uri(), autocommit=True, prepare_threshold=None) as client:
        seen: dict[str, Any] = dict(client.execute(_SETTINGS).fetchall())
        seen |= dict(client.execute(_TRANSACTION).fetchall())
        for what, query in _LEFT.items():
            row = client.execute(query).fetchone()
            assert row is not None
            seen[what] = row[0]
    # It belongs to the client, not to the session.
    del seen["application_name"]
    return seen


def backend(supabase: Supabase) -> int:
    """Which process of the server a fresh client is lent."""
    with psycopg.connect(supabase.uri(), autocommit=True, prepare_threshold=None) as client:
        row = client.execute("SELECT pg_backend_pid()").fetchone()
    assert row is not None
    return int(row[0])
