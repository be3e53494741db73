"""Small Parquet files that are read at once: what comes out is what reading one after another gives, or nothing."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from telematics_assets.autoloader import parquet_together
from telematics_assets.autoloader.lockstep import padded
from telematics_assets.autoloader.parquet import parquet_schema, read_parquet
from telematics_assets.autoloader.parquet_together import Run, SmallFiles, first_of_each
from telematics_assets.errors import UnreadableFileError

RESCUED = "_rescued_data"
START = datetime(2026, 1, 31, 12, tzinfo=UTC)
TARGET = pa.schema(
    [
        ("vehicle", pa.string()),
        ("n", pa.int64()),
        ("speed", pa.float64()),
        ("on", pa.bool_()),
        ("at", pa.timestamp("us", "UTC")),
        ("day", pa.date32()),
        ("raw", pa.binary()),
        ("price", pa.decimal128(12, 2)),
        ("place", pa.struct([("lat", pa.float64()), ("lon", pa.float64())])),
        (RESCUED, pa.string()),
    ]
)


def columns(rows: int, seed: int) -> dict[str, pa.Array]:
    """Columns of many kinds; some fit the target, some partly, some not at all."""
    rng = random.Random(seed)

    def some(make: Callable[[int], Any], kind: pa.DataType, nulls: float = 0.2) -> pa.Array:
        share = rng.choice([0, nulls, 1])
        return pa.array([None if rng.random() < share else make(n) for n in range(rows)], kind)

    return {
        "vehicle": some(lambda n: f"V{n % 7}é", pa.string()),
        "n": some(lambda n: n, rng.choice([pa.int64(), pa.int32(), pa.int16(), pa.uint32(), pa.uint64()]), 0)
        if seed % 3
        else some(lambda n: n * 2**33, pa.int64()),
        "speed": some(lambda n: rng.choice([n / 3, float("inf"), -0.0]), pa.float64()),
        "on": some(lambda n: n % 3 == 0, pa.bool_()),
        "at": some(
            lambda n: START + timedelta(microseconds=n), pa.timestamp(rng.choice(["us", "ms", "ns", "us"]), "UTC")
        ),
        "day": some(lambda n: date(1969, 12, 1) + timedelta(n), pa.date32()),
        "raw": some(lambda n: bytes([n % 256]) * (n % 5), pa.binary()),
        "price": some(lambda n: Decimal(n) / 4, pa.decimal128(12, 2)),
        "place": some(lambda n: {"lat": n / 7, "lon": None}, pa.struct([("lat", pa.float64()), ("lon", pa.float64())])),
        "extra": some(lambda n: f"more {n}", pa.string()),
        "many": some(lambda n: list(range(n % 3)), pa.list_(pa.int32())),
        "kind": pa.array([f"k{n % 2}" for n in range(rows)]).dictionary_encode(),
    }


def parquet(table: pa.Table | dict[str, Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), buffer, **options)
    return buffer.getvalue()


def alone(contents: Sequence[bytes], target: pa.Schema) -> list[pa.Table | None]:
    """Each file read by itself; None if it can't be read."""
    found: list[pa.Table | None] = []
    for number, content in enumerate(contents):
        try:
            chunks = read_parquet(io.BytesIO(content), target, rescued_column=RESCUED, file_path=f"/{number}")
            found.append(pa.concat_tables([target.empty_table(), *(chunk.table for chunk in chunks)]))
        except UnreadableFileError:
            found.append(None)
    return found


def together(contents: Sequence[bytes], target: pa.Schema = TARGET) -> list[Run]:
    paths = [f"/{number}" for number in range(len(contents))]
    return list(SmallFiles(contents).runs(target, rescued_column=RESCUED, file_paths=paths))


def taken(contents: Sequence[bytes], target: pa.Schema = TARGET) -> set[int]:
    """Which files were read together, and proof that they gave what they give alone."""
    expected = alone(contents, target)
    runs = together(contents, target)
    done = -1
    files: set[int] = set()
    for run in runs:
        assert run.first > done
        assert run.table.schema == target
        assert run.table.num_rows == sum(run.rows)
        at = 0
        for number, (rows, rescued) in enumerate(zip(run.rows, run.rescued, strict=True), run.first):
            there = expected[number]
            assert there is not None, number
            found = run.table.slice(at, rows)
            assert found.num_rows == there.num_rows
            assert shown(found) == shown(there)
            assert rescued == rows - found[RESCUED].null_count
            schema = parquet_schema(io.BytesIO(contents[number]))
            assert run.columns == list(zip(schema.names, schema.types, strict=True))
            at += rows
            files.add(number)
            done = number
    return files


def shown(table: pa.Table) -> dict[str, Any]:
    # NaN and the sign of zero count; a string that is no UTF-8 can't be shown as text.
    return {
        name: [
            repr(value) for value in column.cast(pa.binary() if column.type == pa.string() else column.type).to_pylist()
        ]
        for name, column in zip(table.schema.names, table.columns, strict=True)
    }


def flat(rows: int, seed: int = 1) -> dict[str, pa.Array]:
    """Columns that fit, built alike whatever the seed."""
    numbers = range(seed, seed + rows)
    return {
        "vehicle": pa.array([f"V{n % 7}é" for n in numbers]),
        "speed": pa.array([None if n % 5 == seed % 5 + 1 else n / 3 for n in numbers], pa.float64()),
        "on": pa.array([n % 3 == 0 for n in numbers]),
        "place": pa.array([{"lat": n / 7, "lon": 1.5} for n in numbers]),
    }


WRITERS: list[dict[str, Any]] = [
    {"compression": "zstd"},
    {"compression": "zstd", "write_page_checksum": True},
    {"compression": "zstd", "use_dictionary": False, "data_page_size": 100},
    {"compression": "zstd", "data_page_version": "2.0"},
    {"compression": {"vehicle": "zstd", "speed": "snappy"}},
    {"compression": "snappy", "write_page_checksum": True},
    {"compression": "gzip", "write_statistics": False},
    {"compression": "none", "store_schema": False},
    {"compression": "lz4", "column_encoding": {"speed": "BYTE_STREAM_SPLIT"}, "use_dictionary": ["vehicle"]},
    {"compression": "brotli", "version": "1.0"},
]


@pytest.mark.parametrize("options", WRITERS, ids=str)
def test_files_of_one_writer_are_read_together(options: dict[str, Any]) -> None:
    contents = [parquet(flat(rows, seed=rows), **options) for rows in (1, 100, 7, 33, 250, 2)]
    assert taken(contents) == set(range(6))


def test_files_of_several_writers_stay_in_order() -> None:
    contents = [
        parquet({"vehicle": [f"V{number}"], **({"more": [number]} if number % 3 else {})}, compression=codec)
        for number, codec in enumerate(["zstd", "snappy"] * 12)
    ]
    assert taken(contents) == set(range(24))
    runs = together(contents)
    assert [run.first for run in runs] == sorted(run.first for run in runs)
    assert [len(run.columns) for run in runs] == [1 if run.first % 3 == 0 else 2 for run in runs]


def test_notes_of_a_writer_that_differ_by_file_do_not_part_the_files() -> None:
    tables = [pa.table({"n": [number]}).replace_schema_metadata({"written": str(number)}) for number in range(20)]
    assert taken([parquet(table) for table in tables]) == set(range(20))


def test_columns_that_are_null_in_some_files_do_not_part_the_files() -> None:
    contents = [
        parquet({name: pa.array([None if bits >> at & 1 else "x"], pa.string()) for at, name in enumerate("abcdef")})
        for bits in range(64)
    ]
    assert taken(contents) == set(range(64))


def test_what_has_no_place_is_rescued_under_the_path_of_its_file() -> None:
    contents = [parquet({"n": [number, 2], "other": ["x", None]}) for number in range(6)]
    assert taken(contents) == set(range(6))
    (run,) = together(contents)
    assert run.rescued == [1] * 6
    assert [value for value in run.table[RESCUED].to_pylist() if value] == [
        f'{{"other":"x","_file_path":"/{number}"}}' for number in range(6)
    ]


@pytest.mark.parametrize(
    "odd",
    [
        b"",
        b"PAR1PAR1",
        b"PAR1" + bytes(40) + b"PAR1",
        b"PAR1" + bytes(40) + b"\x20\0\0\0PAR1",
        b"PAR1" + bytes(40) + b"\xff\xff\xff\x7fPAR1",
        parquet({"l": [[1, 2]]}),
        parquet({"n": range(10)}, row_group_size=5),
        parquet({"n": pa.array([], pa.int64())}),
        parquet({"at": pa.array([1], pa.timestamp("ns"))}, use_deprecated_int96_timestamps=True),
        parquet({"n": [1]})[:-1],
    ],
    ids=range(10),
)
@pytest.mark.parametrize("at", [0, 5, 9])
def test_what_is_odd_is_left_to_be_read_alone_and_holds_up_no_other(odd: bytes, at: int) -> None:
    contents = [parquet(flat(20, seed)) for seed in (1, 2, 4, 5, 7, 8, 10, 11, 13)]
    contents.insert(at, odd)
    assert taken(contents) == set(range(10)) - {at}
    assert at in first_of_each(contents)
    assert len(first_of_each(contents)) < 10


def test_an_index_beyond_a_files_own_dictionary_is_no_value_of_another_file() -> None:
    names = pa.array(["k0", "k1"] * 16).dictionary_encode()
    good = parquet({"kind": names}, compression="none", write_statistics=False)
    # Arrow keeps one of two equal words: there is no second one then.
    changed = good.replace(b"k1", b"k0", 1)
    assert alone([changed], TARGET) == [None]
    assert 3 not in taken([good, good, good, changed, good, good, good])


@pytest.mark.parametrize("compression", ["zstd", "snappy", "none"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_with_checksums_a_damaged_page_is_found_and_only_its_file_left_out(compression: str, version: str) -> None:
    options: dict[str, Any] = {"compression": compression, "data_page_version": version, "write_page_checksum": True}
    good = [parquet(flat(60, seed=1), **options) for _ in range(9)]
    column = pq.ParquetFile(io.BytesIO(good[0])).metadata.row_group(0).column(0)
    for place in (column.data_page_offset - 2, column.data_page_offset + column.total_compressed_size // 2):
        damaged = bytearray(good[4])
        damaged[place] ^= 1
        contents = [*good[:4], bytes(damaged), *good[5:]]
        assert alone(contents, TARGET)[4] is None
        assert taken(contents) == set(range(9)) - {4}


def test_counts_that_contradict_each_other_are_left_to_be_read_alone() -> None:
    content = parquet({"n": pa.array(range(100), pa.int32())}, write_statistics=False, use_dictionary=False)
    footer = len(content) - 8 - int(struct.unpack("<I", content[-8:-4])[0])
    hundred, fewer = bytes([0xC8, 0x01]), bytes([0xC6, 0x01])
    places = [at for at in range(len(content) - 8) if content[at : at + 2] == hundred]
    left_out = []
    for place in places:
        contents = [content] * 7
        contents[3] = content[:place] + fewer + content[place + 2 :]
        files = taken(contents)
        assert {0, 1, 2, 4, 5, 6} <= files
        left_out += [] if 3 in files else [place]
    assert len([place for place in left_out if place > footer]) == 3
    assert min(left_out) < footer


def test_a_short_page_is_not_made_up_for_by_the_next_file() -> None:
    # One file's page counts a value less, another's one more: together they count what the footers count.
    content = parquet(
        {"n": pa.array(range(100), pa.int32()), "m": pa.array(range(100), pa.int32())},
        write_statistics=False,
        use_dictionary=False,
        compression="none",
    )
    first = content.index(bytes([0xC8, 0x01]))
    contents = [content] * 8
    for number, count in ((3, 0xC6), (4, 0xCA)):
        contents[number] = content[:first] + bytes([count]) + content[first + 1 :]
    assert taken(contents) == {0, 1, 2, 5, 6, 7}


def test_what_unpacks_to_too_much_is_left_to_be_read_alone() -> None:
    small = [parquet({"t": ["x"]}, compression="zstd") for _ in range(8)]
    bomb = parquet({"t": ["x" * (20 << 20)]}, compression="zstd")
    repeated = parquet({"t": ["x" * (1 << 20)] * 100}, compression="zstd")
    nothing = parquet({"t": pa.nulls(5_000_000, pa.string())}, compression="zstd")
    assert max(map(len, (bomb, repeated, nothing))) < 1 << 20
    runs = together([*small, bomb, repeated, nothing], pa.schema([("t", pa.string()), (RESCUED, pa.string())]))
    assert sum(len(run.rows) for run in runs) == 8


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_texts_that_repeat_what_is_before_them_are_left_to_be_read_alone(version: str) -> None:
    options = {"use_dictionary": False, "column_encoding": {"t": "DELTA_BYTE_ARRAY"}, "data_page_version": version}
    small = [parquet({"t": ["x", f"x{n}"]}, **options) for n in range(8)]
    bomb = parquet({"t": ["x" * 100_000] * 2_000}, **options)
    runs = together([*small, bomb], pa.schema([("t", pa.string()), (RESCUED, pa.string())]))
    assert [len(run.rows) for run in runs] == [8]


def test_files_beyond_the_memory_of_one_call_take_several(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [parquet(flat(50, seed)) for seed in range(1, 60, 3)]
    monkeypatch.setattr(parquet_together, "_WINDOW_BYTES", 20_000)
    assert taken(contents) == set(range(20))
    assert len(together(contents)) > 3


def test_padded_numbers_are_the_protocols_own() -> None:
    for value in (0, 1, 63, 64, 2**13, 2**31, 2**34 - 1):
        found = 0
        for place, byte in enumerate(padded(np.array([value], np.int64))[0].tolist()):
            found |= (byte & 0x7F) << 7 * place
            assert (byte > 0x7F) == (place < 4)
        assert found == 2 * value


@st.composite
def groups(draw: st.DrawFn) -> list[bytes]:
    """Files of a few writers, some damaged or foreign."""
    names = draw(st.lists(st.sampled_from(sorted(columns(0, 0))), min_size=1, max_size=5, unique=True))
    writers = draw(st.lists(st.sampled_from(WRITERS), min_size=1, max_size=2))
    contents = []
    for _ in range(draw(st.integers(5, 14))):
        there = columns(draw(st.sampled_from([0, 1, 5, 20, 60])), draw(st.integers(0, 30)))
        writer = dict(draw(st.sampled_from(writers)))
        writer.pop("column_encoding", None)
        if isinstance(codecs := writer["compression"], dict):
            writer["compression"] = {name: codec for name, codec in codecs.items() if name in names}
        names_here = names if draw(st.integers(0, 9)) else draw(st.permutations(names))
        content = parquet({name: there[name] for name in names_here}, **writer)
        if draw(st.integers(0, 3)) == 0:
            content = draw(damaged(content))
        contents.append(content)
    return contents


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with other bytes in its pages or its footer, or without some of them."""
    footer = len(content) - 8 - int(struct.unpack("<I", content[-8:-4])[0])
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        low, high = draw(st.sampled_from([(0, len(content) - 1), (4, max(footer - 1, 4)), (footer, len(content) - 9)]))
        place = draw(st.integers(low, high))
        kind = draw(st.integers(0, 4))
        if kind == 0:
            changed[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1:
            changed[place] = draw(st.integers(0, 255))
        elif kind == 2:
            changed[place] = (changed[place] + draw(st.sampled_from([1, 2, 254, 255]))) % 256
        elif kind == 3:
            del changed[place : place + draw(st.integers(1, 4))]
        else:
            changed[place:place] = draw(st.binary(min_size=1, max_size=4))
        if len(changed) < len(content):
            changed += bytes(len(content) - len(changed))
        del changed[len(content) :]
    return bytes(changed)


@given(groups())
def test_whatever_the_files_are_together_gives_what_alone_gives(contents: list[bytes]) -> None:
    taken(contents)
    first = first_of_each(contents)
    shown_columns = {
        tuple(zip(schema.names, schema.types, strict=True))
        for number in first
        if (schema := _schema(contents[number])) is not None
    }
    for content in contents:
        if (schema := _schema(content)) is not None:
            assert tuple(zip(schema.names, schema.types, strict=True)) in shown_columns


def _schema(content: bytes) -> pa.Schema | None:
    try:
        return parquet_schema(io.BytesIO(content))
    except UnreadableFileError:
        return None
