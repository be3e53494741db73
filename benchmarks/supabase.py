"""How close replication is to its floor here: `python -m benchmarks.supabase [--quick] [--small] [MEASURE…]`.

Belongs here: the measures of reading from PostgreSQL through the transaction pooler, each beside a floor that does the
least that could be done. Does not belong here: assertions; a ratio is to be read, not to fail.

The server is real, from pip's binaries, and runs with the pooler in this process's care; every timed piece runs in a
process of its own, ours and the floor in turn. The pooler is Debian's PgBouncer where that is installed, else the small
one for tests (`--small` takes that anyway): both sides go through the same one, and what it costs is theirs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.files import show, timed
from telematics_assets.microbatch.connection import Supabase

if TYPE_CHECKING:
    import pyarrow as pa

    from telematics_assets.engines.base import ReplicateReport
    from telematics_assets.microbatch.replicate import Replicator
    from telematics_assets.microbatch.session import Connection, Session
    from telematics_assets.microbatch.types import ColumnPlan
    from telematics_assets.testing.postgres import LocalPostgres

ROUNDS = 3
LOOKS = 50
TABLE = "public.policies"
_CREATE = """
CREATE TABLE public.policies (id int8 PRIMARY KEY, number uuid, holder text, premium numeric(12,2), bought timestamptz,
                              terms jsonb, active bool, risk float8)
"""
_FILL = """
INSERT INTO public.policies
SELECT g, gen_random_uuid(), 'Holder ' || g, (g % 1000000) / 7.0, '2020-01-01'::timestamptz + g * interval '61.01 s',
       jsonb_build_object('cover', g % 7, 'tags', jsonb_build_array('a', 'b'), 'excess', g % 500), g % 3 = 0, random()
FROM generate_series(1, {rows}) g
"""


@dataclass(frozen=True)
class Measure:
    """One line of the table: what is timed, against what, the ratio that is aimed at, and both sides' work."""

    name: str
    title: str
    floor: str
    goal: float
    ours: Callable[[Supabase, Path], int]
    least: Callable[[Supabase, Path], int]


def planned(session: Session) -> tuple[str, tuple[ColumnPlan, ...]]:
    """What the table is read by."""
    from telematics_assets.microbatch.source import describe
    from telematics_assets.microbatch.types import plan_columns

    table = describe(session, TABLE)
    return table.rows_sql, plan_columns(table)


def work_extract(supabase: Supabase, home: Path) -> int:
    """Ours: every row in bronze types, batch by batch."""
    from telematics_assets.microbatch.cut import locking
    from telematics_assets.microbatch.extract import Anomalies, extract
    from telematics_assets.microbatch.parallel import read_together
    from telematics_assets.microbatch.session import transaction
    from telematics_assets.microbatch.snapshot import heap_of
    from telematics_assets.microbatch.source import describe
    from telematics_assets.microbatch.types import plan_columns

    def extracted() -> int:
        with transaction(supabase) as session:
            table = describe(session, TABLE)
            plans, anomalies, heap = plan_columns(table), Anomalies(), heap_of(session, table)

            def read(session: Session, part: str | None) -> Generator[pa.RecordBatch, None, None]:
                return extract(session, table.rows_sql, plans, anomalies=anomalies, where=part)

            if heap is not None and heap.parts():
                batches = read_together(session, heap.parts(), read, lock=f"{locking(TABLE)} NOWAIT")
            else:
                batches = read(session, None)
            return sum(batch.num_rows for batch in batches)

    return timed(extracted)


def work_replicate(supabase: Supabase, home: Path) -> int:
    """Ours: a whole first replication, and what comes after it."""
    return timed(lambda: replicated(supabase, home).inserted)


def replicated(supabase: Supabase, home: Path) -> ReplicateReport:
    """Replicate the table as far as it goes."""
    from telematics_assets.microbatch.session import connected

    with connected(supabase) as connection:
        return replicator(connection, home).replicate()


def replicator(connection: Connection, home: Path) -> Replicator:
    """What replicates the table into a home."""
    from telematics_assets.catalog import Names, ReplicatedTable
    from telematics_assets.lakehouse.delta import DeltaLakehouse
    from telematics_assets.microbatch.replicate import Replicator

    declared = ReplicatedTable(TABLE)
    return Replicator(declared, Names().bronze(declared.target), DeltaLakehouse(home), connection)


def changed(supabase: Supabase, home: Path) -> None:
    """A bronze table behind a source in which every hundredth row has changed since."""
    import psycopg

    replicated(supabase, home)
    parameters: dict[str, Any] = supabase.parameters()
    with psycopg.connect(**parameters, prepare_threshold=None) as connection:
        connection.execute(f"UPDATE {TABLE} SET premium = premium + 1 WHERE id % 100 = 42")


def work_merge(supabase: Supabase, home: Path) -> int:
    """Ours: the batch that brings them."""
    changed(supabase, home)
    return timed(lambda: replicated(supabase, home).updated)


def floor_merge(supabase: Supabase, home: Path) -> int:
    """Floor: deltalake's merge of the same rows, which are in memory already."""
    import pyarrow as pa
    from deltalake import DeltaTable

    from telematics_assets.catalog import Names
    from telematics_assets.microbatch.extract import Anomalies, extract
    from telematics_assets.microbatch.session import transaction

    changed(supabase, home)
    with transaction(supabase) as session:
        source, plans = planned(session)
        found = extract(session, source, plans, anomalies=Anomalies(), where="id % 100 = 42")
        rows = pa.Table.from_batches(list(found))
    table = DeltaTable(str(home / Names().bronze("supabase_policies").location))
    values = {name: f"source.{name}" for name in rows.schema.names}

    def merged() -> int:
        merger = table.merge(rows, "target.id = source.id", source_alias="source", target_alias="target")
        done = merger.when_matched_update(values).when_not_matched_insert(values).execute()
        return int(done["num_target_rows_updated"])

    return timed(merged)


def work_empty(supabase: Supabase, home: Path) -> int:
    """Ours: batches that find nothing new, on an open connection."""
    from telematics_assets.microbatch.session import connected

    with connected(supabase) as connection:
        replicator(connection, home).replicate()

        def looked() -> int:
            return sum(replicator(connection, home).replicate().batches for _ in range(LOOKS))

        return timed(looked)


def floor_empty(supabase: Supabase, home: Path) -> int:
    """Floor: the time that the contract allows them, 20 ms each."""

    def waited() -> int:
        time.sleep(0.02 * LOOKS)
        return 0

    return timed(waited)


def floor_copy(supabase: Supabase, home: Path) -> int:
    """Floor: raw ADBC COPY."""
    return timed(lambda: copied(supabase, lambda reader: sum(batch.num_rows for batch in reader)))


def floor_copy_and_write(supabase: Supabase, home: Path) -> int:
    """Floor: raw ADBC COPY and one Delta write, of whatever ADBC makes of the values."""
    import pyarrow as pa
    from deltalake import write_deltalake

    from telematics_assets.lakehouse.types import plain

    def written(reader: pa.RecordBatchReader) -> int:
        schema = pa.schema([pa.field(f.name, getattr(f.type, "storage_type", f.type)) for f in reader.schema])
        counted = Counted(
            pa.RecordBatch.from_arrays([plain(column) for column in batch.columns], schema=schema) for batch in reader
        )
        write_deltalake(str(home / "table"), pa.RecordBatchReader.from_batches(schema, counted), mode="append")
        return counted.rows

    return timed(lambda: copied(supabase, written))


def copied(supabase: Supabase, use: Callable[[Any], int]) -> int:
    """The table by ADBC's COPY, as it comes."""
    from telematics_assets.microbatch.session import transaction

    with transaction(supabase) as session, session.stream(f"SELECT * FROM {TABLE}") as reader:
        return use(reader)


def floor_fetchmany(supabase: Supabase, home: Path) -> int:
    """Not a floor but the usual way to the same batches: a cursor's fetchmany, and Arrow made of its tuples.

    Values are asked for as psycopg gives them, but JSON as its text: of parsed values the same could not be had back.
    """
    import psycopg
    import pyarrow as pa
    from psycopg.types.json import set_json_loads

    from telematics_assets.microbatch.session import transaction
    from telematics_assets.microbatch.types import arrow_schema

    with transaction(supabase) as session:
        _, plans = planned(session)
    schema = arrow_schema(plans)
    made: dict[str, Callable[[tuple[Any, ...]], Iterable[Any]]] = {
        "uuid": lambda column: map(str, column),
        "xid8": lambda column: (None if value is None else int(value) for value in column),
    }
    parameters: dict[str, Any] = supabase.parameters()

    def fetched() -> int:
        rows = 0
        with (
            psycopg.connect(**parameters, prepare_threshold=None) as connection,
            connection.cursor("rows") as cursor,
        ):
            set_json_loads(lambda text: text if isinstance(text, str) else text.decode(), cursor)
            cursor.execute(f"SELECT * FROM {TABLE}".encode())
            while tuples := cursor.fetchmany(10_000):
                columns = [
                    pa.array(made.get(plan.form, tuple)(column), field.type)
                    for column, plan, field in zip(zip(*tuples, strict=True), plans, schema, strict=True)
                ]
                rows += pa.RecordBatch.from_arrays(columns, schema=schema).num_rows
        return rows

    return timed(fetched)


class Counted:
    """Batches that are counted as they go by."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self.rows = 0

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for batch in self._batches:
            self.rows += batch.num_rows
            yield batch


MEASURES = (
    Measure("extract", "2 M rows through the pooler, bronze types", "raw ADBC COPY", 1.25, work_extract, floor_copy),
    Measure("fetchmany", "the same", "psycopg's fetchmany, to Arrow", 0.1, work_extract, floor_fetchmany),
    Measure("replicate", "whole replication", "COPY, one Delta write", 1.25, work_replicate, floor_copy_and_write),
    Measure("merge", "1 % of them changed", "deltalake's bare merge", 1.5, work_merge, floor_merge),
    Measure("empty", "50 batches without a change", "20 ms each", 1.0, work_empty, floor_empty),
)


def run(name: str, side: int, supabase: Supabase, home: Path) -> dict[str, float]:
    """One side of a measure in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.supabase", "--child", name, str(side), str(home)]
    place = json.dumps(astuple(supabase))
    output = subprocess.run(command, check=True, input=place, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def measure(what: Measure, supabase: Supabase) -> None:
    """Run both sides in turn, print the line."""
    ours: list[dict[str, float]] = []
    floor: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="telematics-bench-") as temporary:
        for _ in range(ROUNDS):
            for side, results in enumerate((ours, floor)):
                home = Path(temporary) / "home"
                results.append(run(what.name, side, supabase, home))
                shutil.rmtree(home, ignore_errors=True)
    show(what.name, what.title, what.floor, what.goal, ours, floor)


@contextmanager
def pooled(server: LocalPostgres, folder: Path, *, small: bool) -> Iterator[Supabase]:
    """The way to a server through a transaction pooler; says through which."""
    from telematics_assets.testing.pooler import TransactionPooler
    from telematics_assets_tests.pgbouncer import bouncing, pgbouncer

    program = None if small else pgbouncer()
    if program is None:
        print("Pooler: telematics_assets.testing.TransactionPooler", flush=True)
        with TransactionPooler(lambda: server.port) as pooler:
            user = pooler.user("postgres")
            yield Supabase(pooler.host, user, server.password, pooler.port, "postgres", "disable")
        return
    print(f"Pooler: {program}, as Debian sets it up", flush=True)
    # The server takes passwords in clear, and is the one that judges them.
    passwords = {"postgres": server.password}
    with bouncing(program, folder, server.port, passwords, {"auth_type": "plain"}) as port:
        yield Supabase("127.0.0.1", "postgres", server.password, port, "postgres", "disable")


def main() -> None:
    """Run the named measures, or all."""
    if sys.argv[1:2] == ["--child"]:
        name, side, home = sys.argv[2:]
        chosen = next(what for what in MEASURES if what.name == name)
        (chosen.ours, chosen.least)[int(side)](Supabase(*json.load(sys.stdin)), Path(home))
        return
    import psycopg

    from telematics_assets.microbatch.sql import TableSetup, setup_sql
    from telematics_assets.testing.postgres import LocalPostgres

    names = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    wanted = [what for what in MEASURES if not names or what.name in names]
    if not wanted:
        return
    rows = 200_000 if "--quick" in sys.argv else 2_000_000
    with (
        tempfile.TemporaryDirectory(prefix="telematics-bench-") as temporary,
        LocalPostgres(Path(temporary) / "postgres") as server,
        pooled(server, Path(temporary), small="--small" in sys.argv) as supabase,
    ):
        with psycopg.connect(server.url(), autocommit=True) as admin:
            admin.execute(_CREATE)
            admin.execute(_FILL.format(rows=rows).encode())
            admin.execute(setup_sql([TableSetup("public", "policies", ("id",))]).encode())
            admin.execute("VACUUM ANALYZE public.policies")
        for what in wanted:
            measure(what, supabase)


if __name__ == "__main__":
    main()
