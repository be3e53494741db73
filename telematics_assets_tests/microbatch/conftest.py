"""What several tests of replication begin with.

Belongs here: fixtures of this room. Does not belong here: the server and the pooler (`databases.py`).
"""

from __future__ import annotations

import pytest

from telematics_assets.microbatch.sql import TableSetup, setup_sql
from telematics_assets_tests.databases import Database


@pytest.fixture
def policies(database: Database) -> Database:
    """A table of a hundred rows: three pieces of a snapshot."""
    database.run(
        "CREATE TABLE policies (id int8 PRIMARY KEY, name text, updated_at timestamptz DEFAULT clock_timestamp())"
    )
    database.run(setup_sql([TableSetup("public", "policies", ("id",))], role=database.role))
    database.run("INSERT INTO policies SELECT i, repeat('row ' || i, 10) FROM generate_series(1, 100) i")
    return database
