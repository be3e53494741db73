"""A replication stays below 1 GiB of memory, however long its rows are: in a process of its own, killed beyond that."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from telematics_assets.catalog import Names, ReplicatedTable
from telematics_assets.errors import ReplicationError
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.microbatch import lengths
from telematics_assets.microbatch.replicate import Replicator
from telematics_assets.microbatch.session import connected
from telematics_assets_tests.cages import LIMIT_MIB
from telematics_assets_tests.databases import Database

#: Replicates the table in HOME, and tells what it did and the peak of the memory it held.
REPLICATE = """
import json, re, sys
from pathlib import Path
from telematics_assets.catalog import Names, ReplicatedTable
from telematics_assets.engines.base import ReplicateRequest
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.microbatch.connection import Supabase
from telematics_assets.microbatch.replicate import Replicator
from telematics_assets.microbatch.session import connected

table = ReplicatedTable("public.documents", "xmin")
with connected(Supabase(**json.loads(sys.argv[2]))) as connection:
    replicator = Replicator(table, Names().bronze(table.target), DeltaLakehouse(Path(sys.argv[1])), connection)
    done = replicator.replicate(ReplicateRequest(full=sys.argv[3] == "full", sweep=sys.argv[3] == "sweep"))
peak = int(re.search(r"VmHWM:\\s*([0-9]+) kB", Path("/proc/self/status").read_text())[1]) // 1024
print(json.dumps({"rows": [done.inserted, done.updated, done.deleted], "peak": peak}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_rows_of_a_megabyte_are_copied_merged_and_compared_in_less_than_a_gibibyte(
    tmp_path: Path, caged: list[str], database: Database, soak_factor: int
) -> None:
    rows = 64 if soak_factor == 1 else 2_500
    database.run(
        "CREATE TABLE public.documents (id int8 PRIMARY KEY, body jsonb)",
        f"INSERT INTO public.documents SELECT n, jsonb_build_object('n', n, 'text', repeat('telematics {{}}', 75000)) "
        f"FROM generate_series(1, {rows}) n",
    )

    def replicated(kind: str) -> list[int]:
        command = [*caged, sys.executable, "-c", REPLICATE, str(tmp_path), json.dumps(asdict(database.supabase)), kind]
        told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        # The peak counts pages of libraries too, which the kernel does not count against the group.
        assert caged or told["peak"] < LIMIT_MIB, told
        found: list[int] = told["rows"]
        return found

    assert replicated("first") == [rows, 0, 0]
    if soak_factor > 1:
        database.run("UPDATE public.documents SET body = body || '{\"n\": 0}'")
        assert replicated("sweep") == [0, rows, 0]
    database.run(
        "UPDATE public.documents SET body = body || '{\"n\": 1}' WHERE id % 2 = 0",
        "DELETE FROM public.documents WHERE id = 1",
    )
    assert replicated("full") == [0, rows // 2, 1]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("text", "repeat('x', 2000000)"),
        ("bytea", "convert_to(repeat('x', 2000000), 'UTF8')"),
        ("jsonb", "to_jsonb(repeat('x', 2000000))"),
        ("text[]", "array_fill(repeat('x', 1000), ARRAY[2000])"),
    ],
)
def test_a_row_that_is_too_long_is_refused_by_its_name_before_it_is_read(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch, kind: str, value: str
) -> None:
    monkeypatch.setattr(lengths, "LONGEST_ROW_BYTES", 1_000_000)
    database.run(
        f"CREATE TABLE public.documents (id int8, part text, body {kind}, PRIMARY KEY (id, part))",
        "INSERT INTO public.documents SELECT n, 'a', NULL FROM generate_series(1, 3) n",
    )

    def replicate(table: ReplicatedTable) -> int:
        with connected(database.supabase) as connection:
            lakehouse = DeltaLakehouse(tmp_path)
            return Replicator(table, Names().bronze(table.target), lakehouse, connection).replicate().inserted

    table = ReplicatedTable("public.documents", "xmin")
    assert replicate(table) == 3
    database.run(f"INSERT INTO public.documents VALUES (4, 'b', {value})")
    with pytest.raises(ReplicationError, match=r"id=4, part=b of public\.documents has 2,0.* column body.*exclude"):
        replicate(table)
    database.run("UPDATE public.documents SET body = NULL WHERE id = 4")
    assert replicate(table) == 1
