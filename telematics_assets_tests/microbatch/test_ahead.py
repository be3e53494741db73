"""One batch is read ahead, never two, and whoever stops early leaves no thread behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import count

import pytest

from telematics_assets.errors import SupabaseUnavailableError
from telematics_assets.microbatch.ahead import one_ahead
from telematics_assets.microbatch.session import connected, transaction
from telematics_assets_tests.databases import Database

#: Some batches of 8 MiB.
LONG = "SELECT g, repeat('x', 1000) AS body FROM generate_series(1, 60000) g"
PATIENCE = 60.0


def unwanted() -> None:
    pytest.fail("nothing waits that would have to be interrupted")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_items_come_in_order_and_end() -> None:
    source = iter([1, 2, 3])
    with one_ahead(lambda: next(source, None), unwanted) as items:
        assert list(items) == [1, 2, 3]
        assert list(items) == []


def test_exactly_one_item_is_pulled_ahead_and_none_before_the_first_is_wanted() -> None:
    pulled: list[int] = []
    numbers = count()

    def pull() -> int:
        pulled.append(next(numbers))
        return pulled[-1]

    with one_ahead(pull, unwanted) as items:
        time.sleep(0.05)
        assert pulled == []
        for number in range(3):
            assert next(items) == number
            until(lambda n=number: len(pulled) == n + 2)  # type: ignore[misc]
            time.sleep(0.05)
            assert len(pulled) == number + 2


def test_a_failure_comes_after_the_items_before_it_and_stays() -> None:
    calls: list[int] = []

    def pull() -> int:
        calls.append(1)
        if len(calls) == 2:
            raise SupabaseUnavailableError("lost", "Try again.")
        return len(calls)

    with one_ahead(pull, unwanted) as items:
        assert next(items) == 1
        for _ in range(2):
            with pytest.raises(SupabaseUnavailableError, match="lost"):
                next(items)
    assert len(calls) == 2


def test_whoever_stops_while_a_pull_waits_has_it_interrupted() -> None:
    interrupted, threads = threading.Event(), threading.active_count()
    pulls = count()

    def pull() -> int | None:
        if next(pulls):
            assert interrupted.wait(PATIENCE)
            raise OSError("the connection was closed")
        return 1

    with one_ahead(pull, interrupted.set) as items:
        assert next(items) == 1

    assert interrupted.is_set()
    assert threading.active_count() == threads


def test_a_reader_that_stops_early_does_not_wait_for_a_server_that_works_on(database: Database) -> None:
    slow = (
        "SELECT g, repeat('x', 1000) AS body FROM generate_series(1, 20000) g WHERE g < 10000 OR pg_sleep(600) IS NULL"
    )
    begun = time.monotonic()
    with connected(database.supabase) as connection:
        with connection.transaction() as session, session.stream(slow) as reader:
            assert reader.read_next_batch().num_rows
        with connection.transaction() as session:
            assert session.value("SELECT 1") == 1, "the next transaction has a connection of its own"
    assert time.monotonic() - begun < PATIENCE


def test_a_reader_that_fails_tells_its_own_trouble_and_leaves_no_thread(database: Database) -> None:
    threads = threading.active_count()

    def read() -> None:
        with transaction(database.supabase) as session, session.stream(LONG) as reader:
            for _ in reader:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read()
    until(lambda: threading.active_count() <= threads)


def test_a_connection_that_is_lost_ahead_is_told_when_its_batch_is_wanted(database: Database) -> None:
    def read() -> int:
        rows = 0
        with transaction(database.supabase) as session, session.stream(LONG) as reader:
            database.pooler.cut_after = 20_000_000
            for batch in reader:
                rows += batch.num_rows
                time.sleep(0.1)
        return rows

    with pytest.raises(SupabaseUnavailableError):
        read()
