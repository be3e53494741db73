"""Parquet files that are damaged, hostile or enormous: one reason in one line, bounded memory, and no changed value.

A flipped bit in a page without a checksum that still decodes can't be told from data; with one it always is.
"""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from telematics_assets.autoloader.parquet import parquet_schema, read_parquet
from telematics_assets.errors import UnreadableFileError

ROWS = 3000
TABLE = pa.table(
    {"text": [f"V{n % 97}" for n in range(ROWS)], "n": pa.array(range(ROWS)), "l": [[n] for n in range(ROWS)]}
)
#: Page kinds: the dictionary pages and data pages of both versions, packed or not.
KINDS = [
    (version, dictionary, packed) for version in ("1.0", "2.0") for dictionary in (True, False) for packed in (1, 0)
]


def parquet(table: pa.Table = TABLE, **options: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **{"row_group_size": 1000, **options})
    return buffer.getvalue()


def read(data: bytes) -> pa.Table:
    target = parquet_schema(io.BytesIO(data)).append(pa.field("_rescued_data", pa.string()))
    chunks = read_parquet(io.BytesIO(data), target, rescued_column="_rescued_data", file_path="f")
    return pa.concat_tables([target.empty_table(), *(chunk.table for chunk in chunks)]).drop_columns("_rescued_data")


def refusal(data: bytes) -> str:
    with pytest.raises(UnreadableFileError) as refused:
        read(data)
    told = str(refused.value)
    assert "\n" not in told
    assert len(told) < 300
    return told


def pages_end(data: bytes) -> int:
    """Where the footer starts."""
    return len(data) - 8 - int(struct.unpack("<I", data[-8:-4])[0])


def with_footer(footer: bytes) -> bytes:
    return b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1"


def number(value: int) -> bytes:
    """A Thrift number."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


@pytest.mark.parametrize(("version", "dictionary", "packed"), KINDS)
def test_with_checksums_no_damaged_page_of_any_kind_changes_a_value(
    version: str, dictionary: bool, packed: int
) -> None:
    data = parquet(
        data_page_version=version,
        use_dictionary=dictionary,
        compression="snappy" if packed else "none",
        write_page_checksum=True,
    )
    good, end, chance = read(data), pages_end(data), random.Random(1)
    seen = 0
    for _ in range(120):
        damaged = bytearray(data)
        damaged[chance.randrange(4, end)] ^= 1 << chance.randrange(8)
        try:
            table = read(bytes(damaged))
        except UnreadableFileError:
            seen += 1
        else:
            # The bit was in a page's header, where it says nothing of the values.
            assert table.equals(good)
    assert seen > 110


@pytest.mark.parametrize(("version", "dictionary", "packed"), KINDS)
def test_without_checksums_damage_is_an_error_or_as_many_rows(version: str, dictionary: bool, packed: int) -> None:
    compression = "snappy" if packed else "none"
    data = parquet(data_page_version=version, use_dictionary=dictionary, compression=compression)
    end, chance = pages_end(data), random.Random(2)
    for _ in range(60):
        damaged = bytearray(data)
        at = chance.randrange(4, end)
        damaged[at : at + 8] = chance.randbytes(8)
        try:
            table = read(bytes(damaged))
        except UnreadableFileError:
            continue
        assert table.num_rows == ROWS


def test_a_middle_that_is_missing_or_empty_is_damage() -> None:
    data = parquet(compression="none")
    third = len(data) // 3
    assert "damaged Parquet" in refusal(data[:third] + data[2 * third :])
    assert "damaged Parquet" in refusal(data[:third] + bytes(third) + data[2 * third :])


@pytest.mark.parametrize("counted", [1, 999, 1001, 2**40])
def test_a_footer_that_counts_other_rows_than_there_are_fails_the_file(counted: int) -> None:
    # The file's own count is the i64 behind the schema, before the list of row groups.
    data = parquet(TABLE.slice(0, 1000).select(["n"]), store_schema=False)
    footer = data[pages_end(data) : -8]
    old = b"\x16" + number(2000) + b"\x19"
    assert footer.count(old) == 1
    assert "counts" in refusal(with_own_footer(data, footer.replace(old, b"\x16" + number(2 * counted) + b"\x19")))


@pytest.mark.parametrize("counted", [1, 999, 1001, 2**40])
def test_a_row_group_that_counts_other_rows_than_it_has_fails_the_file(counted: int) -> None:
    data = parquet(TABLE.slice(0, 1000).select(["n"]), store_schema=False)
    footer = data[pages_end(data) : -8]
    at = footer.rindex(b"\x16" + number(2000))
    changed = footer[:at] + b"\x16" + number(2 * counted) + footer[at + 3 :]
    refusal(with_own_footer(data, changed))


def with_own_footer(data: bytes, footer: bytes) -> bytes:
    return data[: pages_end(data)] + footer + struct.pack("<I", len(footer)) + b"PAR1"


#: A root of the schema with so many children, and a leaf.
ROOT = b"\x48\x06schema\x15%s\x00"
LEAF = b"\x15\x02\x25\x00\x18\x01x\x00"
NO_ROWS = b"\x16\x00\x19\x0c\x00"


@pytest.mark.parametrize(
    "footer",
    [
        *(b"\x15\x02\x19\xfc" + number(count) + bytes(50) for count in (10**6, 10**8, 2**31 - 1)),
        b"\x15\x02\x19\xfc" + number(4_000_000) + bytes(4_000_000) + NO_ROWS,
        *(b"\x15\x02\x19\x1c" + ROOT % number(2 * count) + NO_ROWS for count in (2**20, 2**31 - 1)),
        *(
            b"\x15\x02\x19\xfc"
            + number(depth + 2)
            + ROOT % number(2)
            + b"\x35\x00\x18\x01a\x15\x02\x00" * depth
            + LEAF
            + NO_ROWS
            for depth in (200, 100_000)
        ),
        b"\x18" + number(2**31 - 1),
        b"\x1c" * 100_000,
    ],
    ids=lambda footer: f"{len(footer)} bytes",
)
def test_a_footer_that_is_a_bomb_is_refused_at_once(footer: bytes) -> None:
    began = time.monotonic()
    assert "damaged Parquet file" in refusal(with_footer(footer))
    assert time.monotonic() - began < 30


def test_a_row_beyond_the_limit_is_refused_before_it_is_unpacked() -> None:
    table = pa.table({"text": pa.array([bytes(70 << 20)])})
    data = parquet(table, compression="zstd", use_dictionary=False)
    assert len(data) < 1 << 20
    assert "more than the 33554432 that are read" in refusal(data)


def test_a_long_value_that_many_rows_may_name_counts_beside_the_average() -> None:
    table = pa.table({"text": ["x" * (30 << 20)] * 4})
    assert "with the longest values of its dictionaries" in refusal(parquet(table))
    plain = io.BytesIO(parquet(table, use_dictionary=False))
    target = table.schema.append(pa.field("_rescued_data", pa.string()))
    chunks = read_parquet(plain, target, rescued_column="_rescued_data", file_path="f")
    assert [chunk.table.num_rows for chunk in chunks] == [1, 1, 1, 1]


_PEAK = """
import io, resource, sys
from telematics_assets.autoloader.parquet import parquet_schema, read_parquet
import pyarrow as pa

with open(sys.argv[1], "rb") as file:
    target = parquet_schema(file).append(pa.field("_rescued_data", pa.string()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chunks = read_parquet(file, target, rescued_column="_rescued_data", file_path="f")
    rows = sum(chunk.table.num_rows for chunk in chunks)
print(rows, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def peak(path: Path) -> tuple[int, int]:
    """Rows of a file, and by how many MiB reading it made a process grow."""
    command = [sys.executable, "-c", _PEAK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    rows, grown = done.stdout.split()
    return int(rows), int(grown)


def test_a_small_file_that_unpacks_to_a_huge_column_is_read_in_bounded_memory(tmp_path: Path) -> None:
    part = pa.table({"text": pa.array([bytes(1 << 20)] * 64)})
    with pq.ParquetWriter(tmp_path / "bomb", part.schema, compression="zstd", use_dictionary=False) as writer:
        writer.write_table(pa.concat_tables([part] * 16), row_group_size=1 << 20)
    assert (tmp_path / "bomb").stat().st_size < 100_000
    rows, grown = peak(tmp_path / "bomb")
    assert rows == 1024
    assert grown < 450, f"{grown} MiB for 1 GiB of values"


def test_a_row_group_larger_than_memory_should_hold_is_read_piece_by_piece(tmp_path: Path) -> None:
    numbers = np.random.default_rng(1).random(4_000_000)
    table = pa.table({f"c{column}": numbers for column in range(12)})
    pq.write_table(table, tmp_path / "wide", row_group_size=1 << 30, compression="none", use_dictionary=False)
    assert (tmp_path / "wide").stat().st_size > 360 << 20
    rows, grown = peak(tmp_path / "wide")
    assert rows == 4_000_000
    assert grown < 250, f"{grown} MiB for a row group of 366 MiB"
