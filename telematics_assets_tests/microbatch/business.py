"""A business that writes as badly as databases allow, and the books by which a mirror of it is judged.

Belongs here: overlapping slow writers over one table, the comparison of that table with a bronze one, and of a bronze
table with its own change data feed.
Does not belong here: test cases; anything of the replicator's: the comparison shares no code with it.
"""

from __future__ import annotations

import collections
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deltalake
import psycopg
import pyarrow as pa
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from telematics_assets_tests.databases import Connection

#: The table that is written to: `value` is another one at every write, `updated_at` the start of its transaction.
TABLE = """
CREATE TABLE public.items (id int8 PRIMARY KEY, value int8 NOT NULL, note text, updated_at timestamptz NOT NULL)
"""
#: No server takes longer to come back, however busy the machine is.
LIMIT_SECONDS = 180.0
#: A writer that waits for another one gives up: two of them may wait for each other.
_PATIENCE = "SET lock_timeout = '150ms'"
_LOST = (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected, psycopg.errors.UniqueViolation)


@dataclass
class Written:
    """What is known of the committed writes.

    Attributes:
        durations: How long the transaction was open that wrote a value, seconds.
        gone: Keys that were deleted, or changed into others.
        commits: Transactions that were committed.
        undone: Transactions that were not.
    """

    durations: dict[int, float] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    commits: int = 0
    undone: int = 0


class Business:
    """Writers that overlap, dawdle, change their minds, and leave transactions prepared for somebody else to end."""

    def __init__(
        self, connect: Callable[[], Connection], *, writers: int = 5, seed: int = 0, slowest: float = 0.8
    ) -> None:
        """Describe it; `running` starts it.

        Args:
            connect: Opens a connection of the database's owner, in autocommit.
            writers: How many write at the same time.
            seed: Of what they do.
            slowest: How long the slowest transactions dawdle before they end, seconds.
        """
        self.written = Written()
        self._connect = connect
        self._writers = writers
        self._seed = seed
        self._slowest = slowest
        self._ids = itertools.count(1)
        self._values = itertools.count(1)
        self._stop = threading.Event()
        self._lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Everybody writes; afterwards everything is committed or rolled back, and nothing is open."""
        with ThreadPoolExecutor(self._writers) as pool:
            writers = [pool.submit(self._write, number) for number in range(self._writers)]
            try:
                yield
            finally:
                self._stop.set()
            for writer in writers:
                writer.result()
        with self._connect() as connection:
            # A server that was killed may have prepared what nobody was told of.
            left = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
            for (gid,) in connection.execute(left).fetchall():
                connection.execute(f"ROLLBACK PREPARED '{gid}'")

    def _write(self, number: int) -> None:
        rng = random.Random(f"{self._seed}-{number}")
        connection: Connection | None = None
        while not self._stop.is_set():
            try:
                if connection is None:
                    connection = self._connect()
                    connection.execute(_PATIENCE)
                self._transact(connection, rng, f"w{number}_{rng.getrandbits(60):x}")
            except psycopg.OperationalError:
                # The server went away; whether the last commit went through is for the table itself to say.
                if connection is not None:
                    connection.close()
                connection = None
                time.sleep(0.05)
        if connection is not None:
            connection.close()

    def _transact(self, connection: Connection, rng: random.Random, name: str) -> None:
        began = time.monotonic()
        values: list[int] = []
        gone: set[int] = set()
        connection.execute("BEGIN")
        try:
            for _ in range(rng.randint(1, 3)):
                if rng.random() < 0.25:
                    connection.execute("SAVEPOINT s")
                    self._change(connection, rng, [], set())
                    connection.execute("ROLLBACK TO s")
                self._change(connection, rng, values, gone)
                self._stop.wait(rng.random() * 0.02)
        except _LOST:
            connection.execute("ROLLBACK")
            self.written.undone += 1
            return
        if rng.random() < 0.15:
            self._stop.wait(self._slowest * (0.5 + rng.random() / 2))
        ending = rng.random()
        if ending < 0.12:
            connection.execute("ROLLBACK")
            self.written.undone += 1
            return
        if ending < 0.27:
            connection.execute(f"PREPARE TRANSACTION '{name}'")
            self._stop.wait(rng.random() * 0.3)
            done = "COMMIT" if ending < 0.24 else "ROLLBACK"
            self._end_prepared(f"{done} PREPARED '{name}'")
            if done == "ROLLBACK":
                self.written.undone += 1
                return
        else:
            connection.execute("COMMIT")
        with self._lock:
            self.written.durations.update(dict.fromkeys(values, time.monotonic() - began))
            self.written.gone |= gone
            self.written.commits += 1

    def _end_prepared(self, statement: str) -> None:
        """A transaction that is prepared outlives its session and the server: it is ended by and by."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while True:
            try:
                with self._connect() as connection:
                    connection.execute(statement)
                return
            except psycopg.errors.UndefinedObject:
                # The answer to the try before was lost.
                return
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def _change(self, connection: Connection, rng: random.Random, values: list[int], gone: set[int]) -> None:
        kind = rng.random()
        value = next(self._values)
        if kind < 0.4:
            connection.execute(
                "INSERT INTO public.items VALUES (%s, %s, %s, now())",
                [next(self._ids), value, "x" * rng.randint(0, 40)],
            )
            values.append(value)
            return
        found = connection.execute("SELECT id FROM public.items OFFSET %s LIMIT 1", [rng.randint(0, 60)]).fetchone()
        if found is None:
            return
        (key,) = found
        if kind < 0.65:
            done = connection.execute(
                "UPDATE public.items SET value = %s, updated_at = now() WHERE id = %s", [value, key]
            )
            values += [value] * done.rowcount
        elif kind < 0.75:
            new = next(self._ids)
            statement = "UPDATE public.items SET id = %s, value = %s, updated_at = now() WHERE id = %s"
            if connection.execute(statement, [new, value, key]).rowcount:
                values.append(value)
                gone.add(key)
        elif connection.execute("DELETE FROM public.items WHERE id = %s", [key]).rowcount:
            gone.add(key)
            if kind > 0.92:
                connection.execute("INSERT INTO public.items VALUES (%s, %s, 'again', now())", [key, value])
                values.append(value)


@dataclass(frozen=True)
class Books:
    """How far a bronze table is from its source, by keys.

    Attributes:
        missing: Keys that only the source has.
        stale: Keys whose rows differ.
        undeleted: Keys that only bronze has.
        doubled: Rows of bronze beyond one per key.
        rows: Rows of the source.
        values: The source's values, by key.
    """

    missing: frozenset[int]
    stale: frozenset[int]
    undeleted: frozenset[int]
    doubled: int
    rows: int
    values: dict[int, int]

    @property
    def balanced(self) -> bool:
        """Whether bronze is what the source is."""
        return not (self.missing or self.stale or self.undeleted or self.doubled)


def books(connection: Connection, table: Path) -> Books:
    """Compare `public.items` with a Delta table, row by row.

    Args:
        connection: Of the database's owner, while nobody writes.
        table: The Delta table's folder.
    """
    source = {key: (value, note) for key, value, note in connection.execute("SELECT id, value, note FROM public.items")}
    columns = deltalake.DeltaTable(str(table)).to_pyarrow_table(columns=["id", "value", "note"]).to_pydict()
    keys = columns["id"]
    bronze = dict(zip(keys, zip(columns["value"], columns["note"], strict=True), strict=True))
    return Books(
        missing=frozenset(source.keys() - bronze.keys()),
        stale=frozenset(key for key in source.keys() & bronze.keys() if source[key] != bronze[key]),
        undeleted=frozenset(bronze.keys() - source.keys()),
        doubled=len(keys) - len(bronze),
        rows=len(source),
        values={key: value for key, (value, _) in source.items()},
    )


def replayed(table: Path, columns: Sequence[str]) -> list[tuple[Any, ...]]:
    """A Delta table's rows in order, after its change data feed from the beginning has led to the same rows.

    Args:
        table: The Delta table's folder.
        columns: The columns to look at.
    """
    handle = deltalake.DeltaTable(str(table))
    names = [*columns, "_change_type"]
    feed = pa.table(handle.load_cdf(starting_version=0, columns=[*names, "_commit_version"]).read_all())
    balance: collections.Counter[tuple[Any, ...]] = collections.Counter()
    for *row, kind in zip(*(feed[name].to_pylist() for name in names), strict=True):
        balance[tuple(row)] += 1 if kind in ("insert", "update_postimage") else -1
    # Not deltalake's own file system, which is Python's: Arrow's threads call back into it when they close files, and a
    # process that ends soon after aborts.
    files = SubTreeFileSystem(str(table), LocalFileSystem())
    rows = handle.to_pyarrow_table(columns=list(columns), filesystem=files)
    there = collections.Counter(zip(*(rows[name].to_pylist() for name in columns), strict=True))
    assert {row: count for row, count in balance.items() if count} == there, "the change data feed tells other rows"
    return sorted(there.elements())
