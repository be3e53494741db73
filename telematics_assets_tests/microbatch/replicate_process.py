"""A replication as a process of its own, which kills itself at a step.

`python -m … HOME PARAMETERS MODE [STEP OCCURRENCE]`; PARAMETERS is the connection as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from telematics_assets.catalog import Names, ReplicatedTable, ReplicationMode
from telematics_assets.engines.base import ReplicateReport, ReplicateRequest
from telematics_assets.lakehouse.base import Lakehouse
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.microbatch.connection import Supabase
from telematics_assets.microbatch.replicate import Replicator
from telematics_assets.microbatch.session import connected
from telematics_assets_tests.exactly_once.loader_process import load_and_perhaps_die

MODES: tuple[ReplicationMode, ...] = ("row_xid", "xmin", "updated_at", "snapshot")
#: Small, so that a few rows make several pieces, and a batch several parts.
PIECE_ROWS, PART_BYTES = 40, 1_500


def table_of(mode: ReplicationMode) -> ReplicatedTable:
    """The table that the kill tests replicate."""
    return ReplicatedTable("public.policies", mode, table=f"kill_{mode}", lag_seconds=0, sweep_hours=0)


def replicate(
    lakehouse: Lakehouse,
    supabase: Supabase,
    table: ReplicatedTable,
    on_step: Callable[[str], None] | None = None,
    *,
    full: bool = False,
) -> ReplicateReport:
    """Replicate once, in small pieces."""
    with connected(supabase) as connection:
        replicator = Replicator(
            table,
            Names().bronze(table.target),
            lakehouse,
            connection,
            on_step=on_step,
            piece_rows=PIECE_ROWS,
            part_bytes=PART_BYTES,
        )
        return replicator.replicate(ReplicateRequest(full))


def main() -> None:
    """Replicate once; SIGKILL at the named step if one is given."""
    home, parameters, mode, *fate = sys.argv[1:]
    supabase = Supabase(**json.loads(parameters))
    lakehouse = DeltaLakehouse(Path(home) / "tables")

    def load(on_step: Callable[[str], None]) -> ReplicateReport:
        return replicate(lakehouse, supabase, table_of(mode), on_step)  # type: ignore[arg-type]

    load_and_perhaps_die(lambda on_step: load(on_step).inserted, fate)


if __name__ == "__main__":
    main()
