"""A replication without end, as a process of its own that somebody kills; run by `test_random_kills.py`.

`python -m … HOME PARAMETERS MODE`; PARAMETERS is the connection as JSON. It says `ready` once it begins.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from telematics_assets.catalog import ReplicatedTable, ReplicationMode
from telematics_assets.errors import TransientError
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.microbatch.connection import Supabase
from telematics_assets_tests.microbatch.replicate_process import replicate

#: One batch in so many is a whole snapshot.
FULL_EVERY = 5


def items(mode: ReplicationMode) -> ReplicatedTable:
    """The business' table; keys are compared in every batch."""
    return ReplicatedTable("public.items", mode, f"items_{mode}", lag_seconds=2.0, sweep_hours=0)


def main() -> None:
    """Replicate until killed; what passes by itself is no reason to end."""
    home, parameters, mode = sys.argv[1:]
    supabase, table = Supabase(**json.loads(parameters)), items(mode)  # type: ignore[arg-type]
    lakehouse = DeltaLakehouse(Path(home) / "tables")
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    parent = os.getppid()
    for number in itertools.count(1):
        if os.getppid() != parent:
            # Whoever should have killed it was killed.
            break
        with suppress(TransientError):
            replicate(lakehouse, supabase, table, full=number % FULL_EVERY == 0)


if __name__ == "__main__":
    main()
