"""Time-outs and silence: a batch is not cut off by limits that are meant for others, and does not wait for ever."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from telematics_assets.errors import SupabaseUnavailableError
from telematics_assets.microbatch.session import connected, transaction
from telematics_assets_tests.databases import Database

ROWS = "SELECT g, repeat('x', 1000) AS body FROM generate_series(1, 60000) g"


@pytest.mark.parametrize(
    "limit", ["statement_timeout", "transaction_timeout", "idle_in_transaction_session_timeout", "idle_session_timeout"]
)
def test_a_limit_that_the_role_has_does_not_cut_a_batch_off(database: Database, limit: str) -> None:
    database.run(f"ALTER ROLE {database.role} SET {limit} = '500ms'")
    try:
        with transaction(database.supabase, pauses=()) as session:
            with session.stream("SELECT g, pg_sleep(0.3)::text AS slept FROM generate_series(1, 2) g") as reader:
                assert reader.read_all().num_rows == 2
            time.sleep(0.6)
            assert session.value("SELECT 1") == 1
    finally:
        database.run(f"ALTER ROLE {database.role} RESET {limit}")


def test_a_connection_that_falls_silent_amid_the_rows_is_given_up(database: Database) -> None:
    supabase = replace(database.supabase, silence_seconds=0.5)

    def read() -> None:
        with transaction(supabase) as session, session.stream(ROWS) as reader:
            database.pooler.silent_after = 20_000_000
            reader.read_all()

    begun = time.monotonic()
    with pytest.raises(SupabaseUnavailableError, match=r"said nothing for 0\.5 seconds"):
        read()
    assert time.monotonic() - begun < 60

    database.pooler.silent_after = None
    with transaction(supabase) as session:
        assert session.value("SELECT 1") == 1


def test_ending_a_connection_that_was_not_opened_yet_ends_no_other(database: Database) -> None:
    with transaction(database.supabase) as session:
        session.beside().cut()
        assert session.value("SELECT 1") == 1


def test_a_pooler_that_answers_nothing_any_more_is_given_up(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("telematics_assets.microbatch.session._ASKING_SECONDS", 1.0)
    supabase = replace(database.supabase, silence_seconds=0.5)
    with connected(supabase, ()) as connection:
        with connection.transaction() as session:
            assert session.value("SELECT 1") == 1
        database.pooler.silent_after = 0
        begun = time.monotonic()
        for _ in range(2):
            # First on the open connection, then on a new one.
            with pytest.raises(SupabaseUnavailableError, match="said nothing"), connection.transaction():
                pass
        assert time.monotonic() - begun < 60
        database.pooler.silent_after = None
        with connection.transaction() as session:
            assert session.value("SELECT 1") == 1


def test_a_server_that_works_for_long_without_a_word_is_waited_for(database: Database) -> None:
    supabase = replace(database.supabase, silence_seconds=0.4)
    with transaction(supabase, pauses=()) as session:
        assert session.value("SELECT 1 FROM pg_sleep(1.5)") == 1


@pytest.mark.parametrize("hard", [False, True])
def test_a_connection_that_is_cut_amid_the_rows_is_told_as_lost(database: Database, hard: bool) -> None:
    database.pooler.cut_hard = hard

    def read() -> None:
        with transaction(database.supabase) as session, session.stream(ROWS) as reader:
            database.pooler.cut_after = 20_000_000
            reader.read_all()

    with pytest.raises(SupabaseUnavailableError, match="was lost"):
        read()
