"""Embedded and Spark take turns over one replicated table, and die: nothing is lost, doubled or replaced by older rows.

Belongs here: what one engine leaves for the other. Does not belong here: kills of one engine (`test_kills.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from telematics_assets.catalog import Names, ReplicationMode, TableName
from telematics_assets.engines.spark.tables import SparkLakehouse, SparkTable
from telematics_assets.errors import TableMovedError
from telematics_assets.lakehouse.base import POSITIONS_INFO, Commit, Table
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.microbatch.position import NOTE_INFO, generation, standing
from telematics_assets_tests.conformance.spark import spark as session
from telematics_assets_tests.databases import Database
from telematics_assets_tests.exactly_once.test_kills import Killed, kill, stop_at
from telematics_assets_tests.microbatch.replicate_process import replicate, table_of
from telematics_assets_tests.microbatch.test_kills import assert_mirrored, change

MODE: ReplicationMode = "row_xid"
NAME = Names().bronze(table_of(MODE).target)


class MortalTable(SparkTable):
    """Its process dies behind a merge, before all positions are set."""

    def _positioned(self, schema: pa.Schema, positions: Mapping[str, int], info: Mapping[str, str]) -> Commit:
        raise Killed


class MortalLakehouse(SparkLakehouse):
    """Its tables are mortal."""

    def _table(self, name: TableName, path: str, handle: Any) -> MortalTable:
        return MortalTable(name, path, handle, self._store, self._session)


def opened(home: Path) -> Table:
    """The bronze table."""
    table = DeltaLakehouse(home / "tables").open(NAME)
    assert table is not None
    return table


@pytest.mark.spark
def test_engines_that_take_turns_and_die_leave_the_table_as_the_source_is(tmp_path: Path, policies: Database) -> None:
    table, home = table_of(MODE), tmp_path / "tables"
    embedded, spark, mortal = DeltaLakehouse(home), SparkLakehouse(home, session), MortalLakehouse(home, session)
    replicate(embedded, policies.supabase, table)
    for wave, (dies, step, goes_on) in enumerate(
        (
            (mortal, None, embedded),
            (spark, "committed", embedded),
            (embedded, "committed", spark),
            (mortal, None, spark),
            (spark, "made_durable", embedded),
        ),
        1,
    ):
        change(policies, wave)
        with pytest.raises(Killed):
            replicate(dies, policies.supabase, table, stop_at(step, 1, kill) if step else None)
        if dies is mortal:
            assert POSITIONS_INFO in opened(tmp_path).commits(-1)[-1].info
            for number in range(5):
                # Behind so many entries the positions are only found by the one that was set.
                opened(tmp_path).set_property(f"remark{number}", str(wave))
        report = replicate(goes_on, policies.supabase, table)
        assert not report.yielded
        assert_mirrored(tmp_path, policies, MODE)
    assert any(commit.operation == "MERGE" and POSITIONS_INFO in commit.info for commit in opened(tmp_path).commits(-1))


@pytest.mark.spark
def test_a_table_that_was_written_together_meanwhile_is_merged_into_again_and_a_foreign_append_is_refused(
    tmp_path: Path, policies: Database
) -> None:
    table, home = table_of(MODE), tmp_path / "tables"
    replicate(DeltaLakehouse(home), policies.supabase, table)
    optimized = 0

    def session_of_a_busy_table() -> Any:
        # Asked for right before the merge.
        nonlocal optimized
        if not optimized:
            optimized += opened(tmp_path).compact()
        return session()

    change(policies, 1)
    report = replicate(SparkLakehouse(home, session_of_a_busy_table), policies.supabase, table)
    assert (optimized, report.yielded) == (1, False)
    assert_mirrored(tmp_path, policies, MODE)

    foreign = opened(tmp_path)
    one = foreign.read().slice(0, 1).cast(foreign.schema)

    def session_of_a_table_that_others_fill() -> Any:
        opened(tmp_path).append(foreign.schema, one.to_batches(), "foreign", opened(tmp_path).version, {})
        return session()

    change(policies, 2)
    with pytest.raises(TableMovedError, match="changed by somebody else"):
        replicate(SparkLakehouse(home, session_of_a_table_that_others_fill), policies.supabase, table)


def test_positions_that_were_only_noted_count(tmp_path: Path, policies: Database) -> None:
    lakehouse = DeltaLakehouse(tmp_path / "tables")
    replicate(lakehouse, policies.supabase, table_of(MODE))
    table = opened(tmp_path)
    (begun,) = {app.split("/")[1] for app in table.commits(-1)[-1].transactions if app.startswith("telematics/")}
    before = standing(table, begun)
    assert before is not None
    after = replace(before, generation=before.generation + 1, position=before.position + 5, version=table.version + 1)
    # As Spark leaves them: the first is set, and all are noted.
    noted = after.transactions()
    first = next(iter(noted))
    texts = json.dumps({NOTE_INFO: "{}", POSITIONS_INFO: json.dumps(noted)})
    actions = [
        {"commitInfo": {"operation": "MERGE", "userMetadata": texts}},
        {"txn": {"appId": first, "version": noted[first]}},
    ]
    entry = Path(table.uri) / "_delta_log" / f"{after.version:020d}.json"
    entry.write_text("\n".join(map(json.dumps, actions)))
    for _ in range(6):
        assert standing(opened(tmp_path), begun) == after
        assert generation(opened(tmp_path)) == after.generation
        opened(tmp_path).set_property("remark", "x")
