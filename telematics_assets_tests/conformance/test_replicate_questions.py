"""What triggers and checks ask of a source and its bronze tables, and the tables' maintenance."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from telematics_assets.catalog import ReplicatedTable
from telematics_assets.engines.base import SourceDrift
from telematics_assets.errors import TableNotOursError, TelematicsError
from telematics_assets_tests.conformance.replicas import ReplicaPlatform

POLICIES = ReplicatedTable("public.policies")
CLAIMS = ReplicatedTable("public.claims", deletes="sweep")


@pytest.fixture
def insurer(replica_platform: ReplicaPlatform) -> ReplicaPlatform:
    """Two tables with rows, of which nothing is replicated yet."""
    for name in ("policies", "claims"):
        replica_platform.made(name, "id int8 PRIMARY KEY, name text")
        replica_platform.run(f"INSERT INTO {name} SELECT n, 'row ' || n FROM generate_series(1, 5) AS n")
    return replica_platform


def pending(insurer: ReplicaPlatform) -> list[str]:
    """The tables that a sensor would replicate."""
    return [each.source for each in insurer.engine.source_positions([POLICIES, CLAIMS]) if each.pending]


def test_a_source_that_answers_is_ready(insurer: ReplicaPlatform) -> None:
    assert insurer.engine.source_status().state == "ready"


def test_a_session_is_one_connection_for_all_questions(insurer: ReplicaPlatform) -> None:
    engine, pooler = insurer.engine, insurer.database.pooler
    with engine.source_session():
        assert pooler.logins == 0, "nothing was asked yet"
        assert engine.source_status().state == "ready"
        # The driver logs in more than once for a connection.
        once = pooler.logins
        for table in (POLICIES, CLAIMS):
            # Whoever is called in between may open one as well.
            with engine.source_session():
                insurer.replicate(table)
            assert not engine.reconcile(table).missing
            assert engine.repeated_keys(table) is not None
        assert not engine.source_drift([POLICIES, CLAIMS])
        assert pending(insurer) == []
    assert pooler.logins == once
    insurer.replicate(POLICIES)
    assert pooler.logins == 2 * once


def test_a_connection_that_is_lost_between_two_tables_is_opened_anew(insurer: ReplicaPlatform) -> None:
    engine, pooler = insurer.engine, insurer.database.pooler
    with engine.source_session():
        insurer.replicate(POLICIES)
        pooler.restart()
        insurer.replicate(CLAIMS)
        pooler.restart()
        # Asked once only: what was lost long ago does not mean that nobody answers.
        assert engine.source_status().state == "ready"
        pooler.stop()
        assert engine.source_status().state == "unreachable"
        pooler.start()
        assert engine.source_status().state == "ready"
    insurer.assert_mirrored(CLAIMS, "id", "name")


def test_a_table_that_fails_leaves_the_next_one_a_sound_connection(insurer: ReplicaPlatform) -> None:
    insurer.run("DROP TRIGGER zz_telematics_position ON public.policies", "ALTER TABLE policies DROP COLUMN row_xid")
    with insurer.engine.source_session():
        with pytest.raises(TelematicsError):
            insurer.replicate(POLICIES)
        insurer.replicate(CLAIMS)
    insurer.assert_mirrored(CLAIMS, "id", "name")


def test_threads_do_not_share_a_session(insurer: ReplicaPlatform) -> None:
    with insurer.engine.source_session(), ThreadPoolExecutor(2) as threads:
        insurer.replicate(POLICIES)
        once = insurer.database.pooler.logins
        asked = [threads.submit(insurer.engine.source_status) for _ in range(4)]
        assert {each.result().state for each in asked} == {"ready"}
    assert insurer.database.pooler.logins == 5 * once


def test_positions_tell_which_tables_moved_on(insurer: ReplicaPlatform) -> None:
    assert pending(insurer) == ["public.policies", "public.claims"]
    for table in (POLICIES, CLAIMS):
        insurer.replicate(table)
    assert pending(insurer) == []
    insurer.run("UPDATE claims SET name = 'changed' WHERE id = 1")
    assert pending(insurer) == ["public.claims"]
    insurer.replicate(CLAIMS)
    assert pending(insurer) == []


def test_a_delete_moves_a_table_on_where_tombstones_tell(insurer: ReplicaPlatform) -> None:
    for table in (POLICIES, CLAIMS):
        insurer.replicate(table)
    insurer.run("DELETE FROM policies WHERE id = 5", "DELETE FROM claims WHERE id = 5")
    assert pending(insurer) == ["public.policies"]
    insurer.replicate(POLICIES)
    assert pending(insurer) == []


def test_what_an_open_transaction_holds_back_stays_pending(insurer: ReplicaPlatform) -> None:
    insurer.replicate(POLICIES)
    with insurer.database.connect() as slow:
        slow.execute("BEGIN")
        slow.execute("INSERT INTO claims VALUES (6, 'slow')")
        insurer.run("INSERT INTO policies VALUES (6, 'fast')")
        report = insurer.replicate(POLICIES)
        assert report.inserted == 0
        assert report.blocker is not None
        assert "public.policies" in pending(insurer)
        slow.execute("COMMIT")
    insurer.replicate(POLICIES)
    assert "public.policies" not in pending(insurer)


def test_a_table_without_rows_is_not_pending(insurer: ReplicaPlatform) -> None:
    insurer.made("empty", "id int8 PRIMARY KEY")
    empty = ReplicatedTable("public.empty")
    insurer.replicate(empty)
    (position,) = insurer.engine.source_positions([empty])
    assert position.highest is None
    assert not position.pending
    assert not insurer.engine.source_positions([])


def test_drift_names_what_a_declaration_says_wrongly_and_what_nobody_declared(insurer: ReplicaPlatform) -> None:
    assert insurer.engine.source_drift([POLICIES, CLAIMS]) == []
    table = replace(POLICIES, exclude=("phone",))
    found = insurer.engine.source_drift([table])
    assert [(each.source, each.kind) for each in found] == [
        ("public.policies", "column"),
        ("public.claims", "undeclared"),
    ]
    assert all(isinstance(each, SourceDrift) for each in found)
    assert "phone" in found[0].message


def test_a_key_is_in_bronze_once(insurer: ReplicaPlatform) -> None:
    assert insurer.engine.repeated_keys(POLICIES) is None
    insurer.replicate(POLICIES)
    found = insurer.engine.repeated_keys(POLICIES)
    assert found is not None
    assert (found.columns, found.rows, found.keys, found.examples) == (("id",), 5, 0, ())


def test_maintenance_keeps_rows_position_and_what_replication_needs(insurer: ReplicaPlatform) -> None:
    insurer.replicate(POLICIES)
    for number in range(3):
        insurer.run(f"INSERT INTO policies VALUES ({10 + number}, 'later')")
        insurer.replicate(POLICIES)
    before = insurer.engine.state(insurer.engine.names.bronze(POLICIES.target))
    assert before is not None
    for _ in range(2):
        report = insurer.engine.maintain(POLICIES)
        assert (report.stream, report.table) == ("public.policies", "workspace.01_bronze.supabase_policies")
        assert report.notes == ()
        insurer.assert_mirrored(POLICIES, "id", "name")
    unchanged = insurer.replicate(POLICIES)
    assert (unchanged.batches, unchanged.snapshot) == (0, None)
    insurer.run("DELETE FROM policies WHERE id = 1", "UPDATE policies SET name = 'new' WHERE id = 2")
    report_after = insurer.replicate(POLICIES)
    assert (report_after.updated, report_after.deleted, report_after.snapshot) == (1, 1, None)
    insurer.assert_mirrored(POLICIES, "id", "name")


def test_a_table_that_is_not_there_yet_needs_no_maintenance(insurer: ReplicaPlatform) -> None:
    report = insurer.engine.maintain(POLICIES)
    assert (report.table_version, report.notes) == (None, ("there is no table yet",))


def test_a_table_of_another_source_is_not_maintained(insurer: ReplicaPlatform) -> None:
    insurer.replicate(POLICIES)
    with pytest.raises(TableNotOursError, match=r"public\.policies, not of public\.claims"):
        insurer.engine.maintain(replace(CLAIMS, table="supabase_policies"))


def test_drift_names_columns_that_are_not_what_they_were_when_they_were_replicated(insurer: ReplicaPlatform) -> None:
    insurer.run("ALTER TABLE policies ADD premium numeric(12,2), ADD note varchar(10)")
    insurer.replicate(POLICIES)
    assert insurer.engine.source_drift([POLICIES, CLAIMS]) == []
    insurer.run("ALTER TABLE policies ALTER premium TYPE numeric(14,4), ALTER note TYPE varchar(20)")
    found = [each.message for each in insurer.engine.source_drift([POLICIES, CLAIMS])]
    assert len(found) == 2
    assert "premium is DECIMAL(14,4)" in found[0]
    assert "was DECIMAL(12,2)" in found[0]
    assert "--full" in found[0]
    assert "note was character varying(10) and is character varying(20)" in found[1]
    insurer.replicate(POLICIES, full=True)
    assert insurer.engine.source_drift([POLICIES, CLAIMS]) == []
