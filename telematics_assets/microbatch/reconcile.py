"""Do source and bronze have the same keys, as far as both must agree?

Belongs here: which keys are comparable, and counting what is missing on either side.
Does not belong here: replication (`replicate.py`), Dagster.

The source goes on while bronze stands at its position. A key is comparable if its row's position is below it, and no
tombstone is at or above it: what changed later was another row before, which the source does not have any more.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from telematics_assets.engines.base import Reconciliation
from telematics_assets.lakehouse.base import Table
from telematics_assets.microbatch.cut import Rows
from telematics_assets.microbatch.deletes import Tombstones, source_keys
from telematics_assets.microbatch.keys import Keys, differences, parts_of, without
from telematics_assets.microbatch.session import Session
from telematics_assets.microbatch.source import SourceTable
from telematics_assets.microbatch.types import ColumnPlan

_LAST = 2**63 - 1
_EXAMPLES = 5


def reconcile(
    session: Session,
    table: Table,
    source: SourceTable,
    rows: Rows,
    plans: Sequence[ColumnPlan],
    position: int,
    tombstones: Tombstones | None,
) -> Reconciliation:
    """Compare the keys of both sides.

    Args:
        session: A transaction on the source.
        table: The bronze table.
        source: The source table.
        rows: Conditions on its rows.
        plans: How the key's columns travel.
        position: Where bronze stands.
        tombstones: The table's tombstones, or None if it has none.
    """
    key = [plan.name for plan in plans]
    parts = parts_of(max(source.rows, table.count()))
    later = rows.between(position, None)
    with Keys(key, parts) as ours, Keys(key, parts) as theirs, Keys(key, parts) as since:
        for batch in source_keys(session, source, plans, later):
            ours.add(pa.Table.from_batches([batch]))
        for batch in source_keys(session, source, plans, f"({later}) IS NOT TRUE"):
            since.add(pa.Table.from_batches([batch]))
        if tombstones is not None:
            for batch in tombstones.keys(position, _LAST, plans):
                since.add(pa.Table.from_batches([batch]))
        for there in table.stream(key):
            theirs.add(there)
        # After a TRUNCATE nobody knows which keys went.
        emptied = tombstones is not None and tombstones.noted(position, _LAST, position).nameless
        missing = extra = later_rows = 0
        examples: list[str] = []
        for number in range(parts):
            changed = since.part(number)
            bronze = theirs.part(number)
            if changed is not None and bronze is not None:
                later_rows += bronze.join(changed, on=key, how="semi").height
        for difference in differences(ours, theirs):
            lacking = difference.left.select(key)
            beyond = difference.right.slice(0, 0) if emptied else without(difference.right, since)
            missing, extra = missing + lacking.num_rows, extra + beyond.num_rows
            for what, found in (("missing", lacking), ("extra", beyond)):
                for row in found.slice(0, _EXAMPLES - len(examples)).to_pylist():
                    examples.append(f"{what}: {', '.join(str(value) for value in row.values())}")
        return Reconciliation(ours.rows, theirs.rows - later_rows, missing, extra, tuple(examples))
