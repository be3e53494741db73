"""A load stays below 1 GiB of memory, however large its batch is: in a process of its own, which is killed beyond that.

The kernel holds the limit where it lets us make a control group (as root on Linux); elsewhere the peak is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from telematics_assets.catalog import Names
from telematics_assets_tests.cages import LIMIT_MIB

#: Loads the stream named by the second argument, and tells its rows and the peak of the memory it held.
LOAD = """
import json, re, sys
from pathlib import Path
from telematics_assets.catalog import FileStream, FileStreamOptions, TableContract
from telematics_assets.engines.embedded import open_engine
from telematics_assets.settings import Settings

format = sys.argv[2]
options = FileStreamOptions(raw_record_column="_raw_record" if format == "json" else None)
stream = FileStream("points", format, format, "points", TableContract("Points."), options)
engine = open_engine(Settings(home=Path(sys.argv[1]), settle_seconds=0, incomplete_seconds=0))
rows = engine.ingest(stream).rows
peak = int(re.search(r"VmHWM:\\s*([0-9]+) kB", Path("/proc/self/status").read_text())[1]) // 1024
print(json.dumps({"rows": rows, "peak": peak}))
"""


def json_points(path: Path) -> int:
    """A file of 24 MB; its rows take three times as much, with the raw record."""
    rows = 60_000
    with path.open("w") as file:
        for number in range(rows):
            values = {f"value_{column}": number * 31 % (1000 + column) for column in range(20)}
            file.write(json.dumps({"vehicle": f"VH-{number % 200:05d}", "note": "n" * 20, **values}) + "\n")
    return rows


def one_row_group(path: Path) -> int:
    """A file whose one row group takes 100 MB, as numbers and text."""
    rows = 500_000
    numbers = pa.array(range(rows), pa.int64())
    columns = {f"value_{column}": numbers for column in range(20)}
    table = pa.table({"vehicle": numbers.cast(pa.string()), **columns})
    pq.write_table(table, path, row_group_size=rows)
    return rows


def wide(path: Path) -> int:
    """A file of 300 columns, whose row groups take 72 MB."""
    rows = 30_000
    numbers = pa.array(range(rows), pa.int64())
    pq.write_table(pa.table({f"value_{column}": numbers for column in range(300)}), path)
    return rows


def long_json(path: Path) -> int:
    """A file of four records of 15 MB; with the raw record a row takes twice as much."""
    path.write_text("".join(json.dumps({"number": number, "text": "x" * 15_000_000}) + "\n" for number in range(4)))
    return 4


def long_rows(path: Path) -> int:
    """A small file whose rows take 30 MB."""
    texts = [str(number) * 30_000_000 for number in range(4)]
    pq.write_table(pa.table({"text": texts}), path, compression="zstd", use_dictionary=False)
    return 4


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("format", "write", "files"),
    [
        pytest.param("json", json_points, 20, id="json with raw records"),
        pytest.param("parquet", one_row_group, 12, id="parquet"),
        pytest.param("parquet", wide, 14, id="parquet with 300 columns", marks=pytest.mark.soak),
        pytest.param("json", long_json, 5, id="json of long records", marks=pytest.mark.soak),
        pytest.param("parquet", long_rows, 4, id="long rows", marks=pytest.mark.soak),
    ],
)
def test_a_load_of_more_than_a_gibibyte_takes_less(
    tmp_path: Path, caged: list[str], format: str, write: Callable[[Path], int], files: int, soak_factor: int
) -> None:
    folder = tmp_path / Names().volume_location.lstrip("/") / format
    folder.mkdir(parents=True)
    rows = write(folder / "points-0")
    files *= 1 if soak_factor == 1 else 7
    for number in range(1, files):
        os.link(folder / "points-0", folder / f"points-{number}")
    command = [*caged, sys.executable, "-c", LOAD, str(tmp_path), format]
    told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert told["rows"] == rows * files
    # The peak counts pages of libraries too, which the kernel does not count against the group.
    assert caged or told["peak"] < LIMIT_MIB, told
