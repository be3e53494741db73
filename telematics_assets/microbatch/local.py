"""How processes of one home find the demo's database while it runs: a file that only its owner may read.

Belongs here: writing that file, and reading it as long as the process that wrote it lives.
Does not belong here: starting the database (`demo/local_supabase.py`), whether it is used (`settings.py`), Dagster.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from telematics_assets.errors import SettingsError
from telematics_assets.microbatch.connection import Supabase, resolve
from telematics_assets.processes import is_gone, process_identity

#: Name of the file, in the folder of the database.
CONNECTION_FILE = "connection.json"


@dataclass(frozen=True, slots=True)
class LocalConnection:
    """Where the demo's database is.

    Attributes:
        supabase: The way in through its pooler, as the role that only reads.
        hash_key: The key of its hashed columns; never shown.
        server_port: Where its server listens, past the pooler.
    """

    supabase: Supabase
    hash_key: str = field(repr=False)
    server_port: int


def write_connection(file: Path, connection: LocalConnection) -> None:
    """Say where the database is, for as long as this process lives.

    Args:
        file: Where; only its owner may read it.
        connection: Where the database is.
    """
    supabase = connection.supabase
    write_private(
        file,
        json.dumps(
            {
                "host": supabase.host,
                "port": str(supabase.port),
                "user": supabase.user,
                "password": supabase.password,
                "database": supabase.database,
                "sslmode": supabase.sslmode,
                "hash_key": connection.hash_key,
                "server_port": connection.server_port,
                "process": process_identity(),
            }
        ),
    )


def read_connection(file: Path) -> LocalConnection | None:
    """Where the database is, or None if no process keeps one open.

    Args:
        file: What `write_connection` wrote.
    """
    try:
        said = json.loads(file.read_text())
        if is_gone(said["process"]):
            return None
        supabase = resolve(said)
        return None if supabase is None else LocalConnection(supabase, said["hash_key"], said["server_port"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SettingsError):
        # No file, or none of ours: nothing is configured by it.
        return None


def write_private(file: Path, text: str) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    half = file.with_name(f"{file.name}.half")
    half.unlink(missing_ok=True)
    with os.fdopen(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(text)
    half.replace(file)
