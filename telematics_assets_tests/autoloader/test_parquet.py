"""Parquet files become chunks of the table's schema: every value in its column exactly, or in the rescued data."""

from __future__ import annotations

import base64
import datetime as dt
import io
import json
import math
import struct
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import IO, Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telematics_assets.autoloader import parquet as parquet_module
from telematics_assets.autoloader.chunks import Chunk
from telematics_assets.autoloader.parquet import is_complete_parquet, parquet_schema, read_parquet
from telematics_assets.autoloader.schema import reader_schema, resolve, table_schema
from telematics_assets.catalog import TELEMATICS
from telematics_assets.errors import FileChangedError, UnreadableFileError, VolumeUnavailableError
from telematics_assets_tests.turns import examples

FILE = "/Volumes/workspace/00_landing/telematics/parquet/a.parquet"
RESCUED = "_rescued_data"
US_UTC = pa.timestamp("us", "UTC")
TARGET = pa.schema(
    [
        pa.field("vehicle_id", pa.string(), metadata={"comment": "Fleet number."}),
        ("recorded_at", US_UTC),
        ("speed_kmh", pa.float64()),
        ("rpm", pa.int32()),
        (RESCUED, pa.string()),
    ]
)


def parquet(columns: Mapping[str, Any] | pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), buffer, **options)
    return buffer.getvalue()


def chunks(data: bytes, target: pa.Schema = TARGET, **options: Any) -> list[Chunk]:
    return list(read_parquet(io.BytesIO(data), target, rescued_column=RESCUED, file_path=FILE, **options))


def read(data: bytes, target: pa.Schema = TARGET) -> pa.Table:
    parts = chunks(data, target)
    for part in parts:
        assert part.table.schema.equals(target, check_metadata=True)
        assert part.rescued_rows == part.table.num_rows - part.table[RESCUED].null_count
        part.table.validate(full=True)
    return pa.concat_tables([part.table for part in parts]) if parts else target.empty_table()


def rescued(table: pa.Table) -> list[dict[str, Any] | None]:
    found = [None if text is None else json.loads(text) for text in table[RESCUED].to_pylist()]
    for row in found:
        assert row is None or (list(row)[-1] == "_file_path" and row.pop("_file_path") == FILE)
    return found


@pytest.fixture(scope="module", autouse=True, params=["read whole", "read in parts"])
def _both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small files are read whole, large ones in parts: every story here holds both ways."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "read in parts":
            patch.setattr(parquet_module, "_WHOLE_BYTES", 0)
        yield


# --- Rows -------------------------------------------------------------------------------------------------------------


def test_a_file_that_fits_goes_into_its_columns() -> None:
    at = dt.datetime(2024, 7, 1, tzinfo=dt.UTC)
    table = read(parquet({"vehicle_id": ["V1", None], "recorded_at": [at, None], "speed_kmh": [1.5, None]}))
    assert table.to_pylist() == [
        {"vehicle_id": "V1", "recorded_at": at, "speed_kmh": 1.5, "rpm": None, RESCUED: None},
        {"vehicle_id": None, "recorded_at": None, "speed_kmh": None, "rpm": None, RESCUED: None},
    ]


def test_columns_that_have_no_place_are_rescued_where_they_hold_something() -> None:
    data = parquet(
        {
            "rpm": pa.array([1, 2], pa.int32()),
            "RPM": pa.array([3, None], pa.int32()),
            "gear": [None, "low"],
            "_rescued_data": ["from elsewhere", None],
            "_source_file": [None, None],
            "two words": [True, None],
        }
    )
    table = read(data)
    assert table["rpm"].to_pylist() == [1, 2]
    assert rescued(table) == [{"RPM": 3, "_rescued_data": "from elsewhere", "two words": True}, {"gear": "low"}]


def test_polars_would_fail_the_whole_file_on_an_extra_column() -> None:
    """The reason for reading by name: one file's new column must not stop the others."""
    files: list[IO[bytes]] = [io.BytesIO(parquet({"rpm": [1]})), io.BytesIO(parquet({"rpm": [2], "gear": [3]}))]
    with pytest.raises(pl.exceptions.PolarsError):
        pl.scan_parquet(files).collect()


@pytest.mark.parametrize(
    ("name", "values", "shown"),
    [
        ("rpm", pa.array([2.5]), 2.5),
        ("rpm", pa.array([2**31]), 2**31),
        ("rpm", pa.array([7], pa.int64()), 7),
        ("rpm", pa.array(["7"]), "7"),
        ("speed_kmh", pa.array([2**53 + 1]), 2**53 + 1),
        ("speed_kmh", pa.array([Decimal("0.10")]), 0.1),
        ("vehicle_id", pa.array([17]), 17),
        ("vehicle_id", pa.array([b"\xff"]), "/w=="),
        ("recorded_at", pa.array([dt.datetime(2024, 7, 1)], pa.timestamp("us")), "2024-07-01T00:00:00.000000"),
        ("recorded_at", pa.array([1_719_792_000]), 1_719_792_000),
        ("recorded_at", pa.array(["2024-07-01"]), "2024-07-01"),
    ],
    ids=lambda value: str(getattr(value, "type", value)),
)
def test_a_retyped_column_is_rescued_and_never_cast(name: str, values: pa.Array, shown: object) -> None:
    table = read(parquet({name: values}))
    assert table[name].to_pylist() == [None]
    assert rescued(table) == [{name: shown}]


def test_a_narrower_column_is_widened() -> None:
    table = read(
        parquet(
            {
                "vehicle_id": pa.array(["V1", "V1"]).dictionary_encode(),
                "recorded_at": pa.array([0, 1], pa.timestamp("ms", "America/New_York")),
                "speed_kmh": pa.array([0.1, -0.0], pa.float32()),
                "rpm": pa.array([255, 0], pa.uint8()),
            }
        )
    )
    assert table["vehicle_id"].to_pylist() == ["V1", "V1"]
    assert table["recorded_at"].cast(pa.int64()).to_pylist() == [0, 1_000]
    assert repr(table["speed_kmh"].to_pylist()) == "[0.10000000149011612, -0.0]"
    assert table["rpm"].to_pylist() == [255, 0]
    assert table[RESCUED].null_count == 2


def test_only_the_timestamps_that_microseconds_cannot_hold_are_rescued() -> None:
    table = read(parquet({"recorded_at": pa.array([1_000, 1_001, None], pa.timestamp("ns", "UTC"))}))
    assert table["recorded_at"].cast(pa.int64()).to_pylist() == [1, None, None]
    assert rescued(table) == [None, {"recorded_at": "1970-01-01T00:00:00.000001001Z"}, None]


def test_text_that_is_no_utf8_is_rescued_as_bytes() -> None:
    data = parquet({"vehicle_id": ["good", "xyzXYZ"]}, compression="none", use_dictionary=False, write_statistics=False)
    table = read(data.replace(b"xyzXYZ", b"xyz\xff\xfe\xfd"))
    assert table["vehicle_id"].to_pylist() == ["good", None]
    assert rescued(table) == [None, {"vehicle_id": "base64:" + base64.b64encode(b"xyz\xff\xfe\xfd").decode()}]


def test_a_year_that_no_reader_shows_is_rescued() -> None:
    table = read(parquet({"recorded_at": pa.array([2**62, 0], US_UTC)}))
    assert table["recorded_at"].to_pylist() == [None, dt.datetime(1970, 1, 1, tzinfo=dt.UTC)]
    assert rescued(table) == [{"recorded_at": "4611686018427387904 us since 1970-01-01"}, None]


def test_a_nested_column_fits_a_table_that_has_it() -> None:
    target = pa.schema(
        [("device", pa.struct([("sim", pa.string()), ("slots", pa.list_(pa.int64()))])), TARGET.field(4)]
    )
    known = pa.array([{"slots": [1, None]}, None], pa.struct([("slots", pa.list_(pa.int32()))]))
    assert read(parquet({"device": known}), target)["device"].to_pylist() == [{"sim": None, "slots": [1, None]}, None]
    grown = pa.array([{"sim": "a", "slots": [], "esim": True}])
    table = read(parquet({"device": grown}), target)
    assert table["device"].to_pylist() == [None]
    assert rescued(table) == [{"device": {"sim": "a", "slots": [], "esim": True}}]


# --- INT96 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store_schema", [True, False], ids=["arrow", "foreign"])
def test_int96_timestamps_are_instants_in_all_years(store_schema: bool) -> None:
    years = [
        dt.datetime(1, 1, 1),
        dt.datetime(2024, 7, 1, 0, 0, 0, 7),
        None,
        dt.datetime(9999, 12, 31, 23, 59, 59, 999999),
    ]
    data = parquet(
        {"recorded_at": pa.array(years, pa.timestamp("us")), "rpm": pa.array(range(4), pa.int32())},
        use_deprecated_int96_timestamps=True,
        store_schema=store_schema,
    )
    assert parquet_schema(io.BytesIO(data)).field("recorded_at").type == US_UTC
    table = read(data)
    assert table["recorded_at"].to_pylist() == [year and year.replace(tzinfo=dt.UTC) for year in years]
    assert table[RESCUED].null_count == 4


def test_nanoseconds_of_int96_are_rescued_and_not_cut() -> None:
    data = parquet({"recorded_at": pa.array([1_001, 2_000], pa.timestamp("ns"))}, use_deprecated_int96_timestamps=True)
    table = read(data)
    assert table["recorded_at"].cast(pa.int64()).to_pylist() == [None, 2]
    assert rescued(table) == [{"recorded_at": "1970-01-01T00:00:00.000001001Z"}, None]


def test_int96_within_nested_columns_keeps_its_instants() -> None:
    year = dt.datetime(9999, 12, 31)
    kind = pa.struct([("n", pa.int64()), ("t", pa.map_(pa.string(), pa.list_(pa.timestamp("us"))))])
    data = parquet(
        {"a": pa.array([{"n": 1, "t": [("k", [year, None])]}, None], kind)}, use_deprecated_int96_timestamps=True
    )
    target = pa.schema(
        [("a", pa.struct([("n", pa.int64()), ("t", pa.map_(pa.string(), pa.list_(US_UTC)))])), TARGET[-1]]
    )
    assert parquet_schema(io.BytesIO(data)).field("a").type == target.field("a").type
    assert read(data, target)["a"].to_pylist() == [{"n": 1, "t": [("k", [year.replace(tzinfo=dt.UTC), None])]}, None]


def test_int96_that_no_type_holds_makes_the_file_unreadable_by_name() -> None:
    data = parquet(
        {"recorded_at": pa.array([1, 0], pa.timestamp("ns"))},
        use_deprecated_int96_timestamps=True,
        use_dictionary=False,
        compression="none",
        write_statistics=False,
    )
    ancient = struct.pack("<qI", 0, 1_721_426)
    data = data.replace(struct.pack("<qI", 0, 2_440_588), ancient)
    with pytest.raises(UnreadableFileError, match="INT96 timestamps of column 'recorded_at'"):
        read(data)


# --- Chunks -----------------------------------------------------------------------------------------------------------


def test_chunks_keep_the_order_of_rows_and_stay_small() -> None:
    data = parquet({"rpm": pa.array(range(1_000), pa.int32())}, row_group_size=300)
    parts = chunks(data, batch_rows=128)
    assert max(part.table.num_rows for part in parts) <= 128
    assert [value for part in parts for value in part.table["rpm"].to_pylist()] == list(range(1_000))


def test_wide_rows_make_short_chunks() -> None:
    target = pa.schema([*((f"c{n}", pa.int64()) for n in range(1_500)), TARGET.field(RESCUED)])
    data = parquet({"c0": pa.array(range(10_000), pa.int64())})
    assert max(part.table.num_rows for part in chunks(data, target)) < 3_000


def test_long_values_of_a_dictionary_make_short_chunks() -> None:
    values = pa.array([letter * 20_000 for letter in "abcd"])
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 3] * 10_000, pa.int32()), values)
    data = parquet({"vehicle_id": column}, store_schema=False)
    assert len(data) < 200_000
    first = next(read_parquet(io.BytesIO(data), TARGET, rescued_column=RESCUED, file_path=FILE))
    assert first.table.nbytes < 18 << 20
    assert first.table["vehicle_id"][:5].to_pylist() == [*values.to_pylist(), "a" * 20_000]


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
@pytest.mark.parametrize("within", ["", "list", "struct"])
def test_texts_that_are_coded_by_what_they_differ_in_are_read(encoding: str, within: str) -> None:
    texts = [f"vehicle {n}" for n in range(20_000)]
    values = {"": texts, "list": [[text] for text in texts], "struct": [{"a": text} for text in texts]}[within]
    path = {"": "t", "list": "t.list.element", "struct": "t.a"}[within]
    table = pa.table({"t": values, "n": [str(n) for n in range(20_000)]})
    data = parquet(table, use_dictionary=False, column_encoding={path: encoding})
    found = read(data, pa.schema([*table.schema, ("_rescued_data", pa.string())]))
    assert found.select(["t", "n"]).to_pydict() == table.to_pydict()


def test_long_texts_that_share_their_beginnings_make_short_chunks() -> None:
    data = parquet({"t": ["x" * 100_000] * 1_000}, use_dictionary=False, column_encoding={"t": "DELTA_BYTE_ARRAY"})
    assert len(data) < 200_000
    found = chunks(data, pa.schema([("t", pa.string()), ("_rescued_data", pa.string())]))
    assert sum(chunk.table.num_rows for chunk in found) == 1_000
    assert max(chunk.table.nbytes for chunk in found) < 20 << 20


def test_memory_does_not_grow_with_the_file() -> None:
    column = pa.array(range(400_000), pa.float64())
    data = parquet({"speed_kmh": column, "x": column}, row_group_size=20_000, compression="none", use_dictionary=False)
    before, peak = pa.total_allocated_bytes(), 0
    target = pa.schema([("speed_kmh", pa.float64()), ("x", pa.float64()), (RESCUED, pa.string())])
    for _ in read_parquet(io.BytesIO(data), target, rescued_column=RESCUED, file_path=FILE, batch_rows=10_000):
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert 0 < peak < len(data) // 4


def test_a_file_without_rows_gives_no_chunks() -> None:
    data = parquet({"rpm": pa.array([], pa.int32())})
    assert parquet_schema(io.BytesIO(data)) == pa.schema([("rpm", pa.int32())])
    assert chunks(data) == []


def test_a_files_schema_is_free_of_the_writers_notes() -> None:
    schema = pa.schema([pa.field("rpm", pa.int32(), nullable=False, metadata={"x": "y"})], metadata={"pandas": "{}"})
    found = parquet_schema(io.BytesIO(parquet(pa.table({"rpm": pa.array([1], pa.int32())}, schema=schema))))
    assert found.equals(pa.schema([("rpm", pa.int32())]), check_metadata=True)


def test_the_source_stays_open() -> None:
    source = io.BytesIO(parquet({"rpm": [1]}))
    parquet_schema(source)
    list(read_parquet(source, TARGET, rescued_column=RESCUED, file_path=FILE))
    assert not source.closed


# --- Bad files --------------------------------------------------------------------------------------------------------

GOOD = parquet({"vehicle_id": [f"V{n % 9}" for n in range(500)], "speed_kmh": [n / 3 for n in range(500)]})
TWINS = pa.table([pa.array([1]), pa.array([2])], names=["rpm", "rpm"])
NAMED_BADLY = parquet({"aXb": [1]}, store_schema=False).replace(b"aXb", b"a\xffb")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"not Parquet: the file is empty \(0 bytes\)"),
        (b"vehicle_id,speed_kmh\nV1,50\n", "not Parquet: the file does not start with PAR1"),
        (b"PAR1", "cut short"),
        (b"PAR1PAR1", "cut short"),
        (GOOD[:-1], "cut short"),
        (GOOD[: len(GOOD) // 2], "cut short"),
        (b"PAR1" + bytes(4) + b"PAR1", "damaged Parquet file"),
        (b"PAR1" + b"\xff" * 40 + struct.pack("<I", 40) + b"PAR1", "damaged Parquet file"),
        (GOOD[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1", "damaged Parquet file"),
        (b"PARE" + GOOD[4:-4] + b"PARE", "encrypted"),
        (parquet(TWINS), "two columns of the same name: 'rpm'"),
        (parquet(pa.table({"rpm": [1]}).select([])), "without columns"),
        (NAMED_BADLY, "column name that is no UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_says_why_in_one_line(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableFileError, match=reason) as by_schema:
        parquet_schema(io.BytesIO(data))
    with pytest.raises(UnreadableFileError, match=reason) as by_rows:
        read(data)
    assert str(by_schema.value) == str(by_rows.value)
    assert "\n" not in str(by_rows.value)
    assert len(str(by_rows.value)) < 300


class _Keys(pe.KmsClient):  # type: ignore[misc]
    """A key store that wraps nothing."""

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
        return base64.b64encode(key_bytes)


def _keys(_: object) -> pe.KmsClient:
    return _Keys()


@pytest.mark.parametrize("plaintext_footer", [True, False])
def test_an_encrypted_file_says_that_it_is_encrypted(plaintext_footer: bool) -> None:
    configuration = pe.EncryptionConfiguration(
        footer_key="f", column_keys={"c": ["rpm"]}, plaintext_footer=plaintext_footer
    )
    keys = pe.CryptoFactory(_keys).file_encryption_properties(pe.KmsConnectionConfig(), configuration)
    data = parquet({"rpm": [1]}, encryption_properties=keys)
    assert is_complete_parquet(io.BytesIO(data), len(data))
    with pytest.raises(UnreadableFileError, match="encrypted"):
        read(data)


def test_a_damaged_page_in_the_middle_fails_the_file() -> None:
    data = bytearray(
        parquet(
            {"vehicle_id": [f"V{n}" for n in range(2_000)]},
            row_group_size=500,
            compression="none",
            use_dictionary=False,
            write_page_checksum=True,
        )
    )
    at = data.index(b"V1234")
    data[at] ^= 1
    with pytest.raises(UnreadableFileError, match="damaged Parquet file"):
        read(bytes(data))


def test_a_footer_that_counts_fewer_rows_than_there_are_fails_the_file() -> None:
    data = parquet({"rpm": pa.array([1, 2, 3], pa.int32())}, store_schema=False)
    short = _with_footer_counts(data, 3, 2)
    assert pq.read_table(io.BytesIO(short)).num_rows == 2
    with pytest.raises(UnreadableFileError, match="counts 2 rows, its columns 3"):
        read(short)


def _with_footer_counts(data: bytes, old: int, new: int) -> bytes:
    """The same file whose footer and row group count other rows (`num_rows`: an i64 field with a zigzag number)."""
    size = struct.unpack("<I", data[-8:-4])[0]
    footer = bytearray(data[-8 - size : -8])
    zigzag, other = bytes([0x16, old * 2]), bytes([0x16, new * 2])
    # The first is the file's count behind the schema list, the last the row group's, behind its size.
    first, last = footer.index(zigzag), footer.rindex(zigzag)
    footer[first : first + 2] = other
    footer[last : last + 2] = other
    return data[: -8 - size] + bytes(footer) + data[-8:]


@settings(max_examples=examples(60), deadline=None)
@given(
    at=st.integers(0, len(GOOD) - 1),
    bit=st.integers(0, 7),
    tail=st.booleans(),
    length=st.one_of(st.none(), st.integers(0, len(GOOD))),
)
def test_damage_anywhere_gives_all_rows_or_one_error(at: int, bit: int, tail: bool, length: int | None) -> None:
    damaged = bytearray(GOOD)
    damaged[len(GOOD) - 1 - at // 4 if tail else at] ^= 1 << bit
    try:
        table = read(bytes(damaged[:length]))
    except UnreadableFileError:
        return
    assert table.num_rows == 500


@pytest.mark.parametrize(
    ("data", "complete"),
    [
        (GOOD, True),
        (GOOD[:-3], False),
        (GOOD[3:], False),
        (b"PARE" + bytes(8) + b"PARE", True),
        (b"PAR1" + bytes(8) + b"PARE", False),
        (b"PAR1PAR1", False),
        (b"", False),
    ],
)
def test_a_finished_file_has_its_marks_at_both_ends(data: bytes, complete: bool) -> None:
    assert is_complete_parquet(io.BytesIO(data), len(data)) is complete


class _Failing(io.BytesIO):
    """A source that stops answering after some reads."""

    def __init__(self, data: bytes, error: Exception, reads: int) -> None:
        super().__init__(data)
        self.error, self.left = error, reads

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().read(size)


@pytest.mark.parametrize("reads", [0, 2])
def test_a_store_that_stops_answering_is_not_the_files_fault(reads: int) -> None:
    def load(error: Exception) -> None:
        list(read_parquet(_Failing(GOOD, error, reads), TARGET, rescued_column=RESCUED, file_path=FILE))

    with pytest.raises(VolumeUnavailableError, match="Input/output error"):
        load(OSError(5, "Input/output error"))
    with pytest.raises(FileChangedError):
        load(FileChangedError("changed"))
    with pytest.raises(ZeroDivisionError):
        load(ZeroDivisionError("a fault of ours"))


# --- Everything is somewhere ------------------------------------------------------------------------------------------

TABLE_TYPES = [
    pa.string(),
    pa.int64(),
    pa.int32(),
    pa.int8(),
    pa.float64(),
    pa.float32(),
    pa.bool_(),
    US_UTC,
    pa.timestamp("us"),
    pa.date32(),
    pa.binary(),
    pa.decimal128(20, 0),
    pa.decimal128(12, 4),
]
INTEGERS = {
    pa.int8(): (-(2**7), 2**7 - 1),
    pa.int16(): (-(2**15), 2**15 - 1),
    pa.int32(): (-(2**31), 2**31 - 1),
    pa.int64(): (-(2**63), 2**63 - 1),
    pa.uint8(): (0, 2**8 - 1),
    pa.uint32(): (0, 2**32 - 1),
    pa.uint64(): (0, 2**64 - 1),
}
MOMENTS = [pa.timestamp(unit, zone) for unit in ("ms", "us", "ns") for zone in (None, "UTC")]
DECIMALS = [pa.decimal128(5, 2), pa.decimal128(20, 0), pa.decimal128(30, 5)]
VALUES: dict[pa.DataType, st.SearchStrategy[Any]] = {
    **{kind: st.integers(*limits) for kind, limits in INTEGERS.items()},
    **{kind: st.integers(-(2**63), 2**63 - 1) | st.integers(-5_000, 5_000) for kind in MOMENTS},
    **{kind: st.decimals(-999, 999, places=kind.scale, allow_nan=False) for kind in DECIMALS},
    pa.float32(): st.floats(width=32),
    pa.float64(): st.floats(),
    pa.bool_(): st.booleans(),
    pa.string(): st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    pa.large_string(): st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    pa.binary(): st.binary(max_size=5),
    pa.date32(): st.integers(-(2**31), 2**31 - 1) | st.integers(-5_000, 5_000),
}
_DAY_NS = 86_400 * 10**9
NAMES = st.sampled_from(["a", "A", "b", "c", "two words", "_file_path", RESCUED, "_batch_id"])


@st.composite
def drifted(draw: st.DrawFn) -> tuple[pa.Table, pa.Schema]:
    rows = draw(st.integers(1, 6))
    columns = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=5, unique=True)):
        kind = draw(st.sampled_from(list(VALUES)))
        columns[name] = pa.array(draw(st.lists(st.none() | VALUES[kind], min_size=rows, max_size=rows)), kind)
    names = draw(st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=4, unique=True))
    fields = [pa.field(name, draw(st.sampled_from(TABLE_TYPES))) for name in names]
    return pa.table(columns), pa.schema([*fields, pa.field(RESCUED, pa.string())])


@settings(max_examples=examples(60), deadline=None)
@given(drifted())
def test_every_value_is_in_its_column_exactly_or_in_the_rescued_data(case: tuple[pa.Table, pa.Schema]) -> None:
    file, target = case
    table = read(parquet(file), target)
    shown = rescued(table)
    assert table.num_rows == file.num_rows
    rescued_names = {"_file_path": "__file_path"}
    for name in file.column_names:
        kind = file.schema.field(name).type
        placed: list[Any] = [None] * file.num_rows
        if name in target.names and name != RESCUED:
            placed = _said(table[name])
        for original, held, row in zip(_said(file[name]), placed, shown, strict=True):
            text = (row or {}).pop(rescued_names.get(name, name), None)
            assert held is None or text is None
            if text is not None:
                held = _read_back(text, kind)
            assert held == original
    assert not any(shown), "rescued data holds what no file had"
    for name in set(target.names) - set(file.column_names) - {RESCUED}:
        assert table[name].null_count == table.num_rows


def _said(column: pa.ChunkedArray) -> list[Any]:
    """What values say, comparable across types: moments as nanoseconds, numbers as numbers, other floats as text."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        factor = {"ms": 10**6, "us": 10**3, "ns": 1}[kind.unit]
        zone = "Z" if kind.tz else ""
        return [None if v is None else (zone, v * factor) for v in column.cast(pa.int64()).to_pylist()]
    if pa.types.is_date32(kind):
        # A date is the same moment as its midnight in a column without a zone.
        return [None if v is None else ("", v * _DAY_NS) for v in column.cast(pa.int32()).to_pylist()]
    if pa.types.is_floating(kind):
        return [None if v is None else _number(v) for v in column.to_pylist()]
    return list(column.to_pylist())


def _number(value: float) -> object:
    return repr(value) if not math.isfinite(value) or (value == 0 and math.copysign(1, value) < 0) else value


def _read_back(value: Any, kind: pa.DataType) -> Any:
    """What a reader of the rescued JSON makes of it, told the type that the file had."""
    if pa.types.is_timestamp(kind):
        zone = "Z" if kind.tz else ""
        if " " in value:
            return zone, int(value.split()[0]) * {"ms": 10**6, "us": 10**3, "ns": 1}[kind.unit]
        assert value.endswith("Z") == bool(zone)
        second, _, fraction = value.removesuffix("Z").partition(".")
        return zone, _seconds(second) * 10**9 + int(fraction.ljust(9, "0"))
    if pa.types.is_date32(kind):
        days = int(value.split()[0]) if " " in value else _seconds(value + "T00:00:00") // 86_400
        return "", days * _DAY_NS
    if pa.types.is_floating(kind):
        number = float(value)
        return _number(struct.unpack("f", struct.pack("f", number))[0] if pa.types.is_float32(kind) else number)
    if pa.types.is_decimal(kind):
        return Decimal(str(value))
    return base64.b64decode(value) if pa.types.is_binary(kind) else value


def _seconds(text: str) -> int:
    """Seconds since 1970 of an ISO text of any year; the calendar repeats every 400 years."""
    year, month, rest = text.rsplit("-", 2)
    cycles = (int(year) - 2000) // 400
    moment = dt.datetime.fromisoformat(f"{int(year) - cycles * 400:04}-{month}-{rest}+00:00")
    return int(moment.timestamp()) + cycles * 146_097 * 86_400


def test_the_shipped_stream_takes_a_drifted_file_end_to_end() -> None:
    data = parquet({"vehicle_id": ["V1"], "engine_rpm": [2.5], "battery_v": pa.array([12.5], pa.float32())})
    found = parquet_schema(io.BytesIO(data))
    fields = resolve(TELEMATICS, None, list(zip(found.names, found.types, strict=True)))
    table = read(data, reader_schema(TELEMATICS, table_schema(TELEMATICS, fields)))
    assert (table["vehicle_id"][0].as_py(), table["battery_v"][0].as_py()) == ("V1", 12.5)
    assert table["engine_rpm"].to_pylist() == [None]
    assert rescued(table) == [{"engine_rpm": 2.5}]


def test_files_that_differ_in_the_name_of_a_struct_only_are_told_apart() -> None:
    struct = pa.struct([("x", pa.int64())])
    target = pa.schema([("a", struct), ("b", struct), (RESCUED, pa.string())])
    for name in ("a", "b", "a"):
        # Without a stored schema, the leaves of these files are equal.
        data = parquet({name: pa.array([{"x": 1}], struct)}, store_schema=False)
        heard: list[list[str]] = []
        (chunk,) = chunks(data, target, on_columns=lambda columns: heard.append([n for n, _ in columns]))  # noqa: B023
        assert heard == [[name]]
        assert chunk.table.to_pylist() == [{"a": None, "b": None, RESCUED: None} | {name: {"x": 1}}]


def test_each_file_of_one_schema_names_itself_and_fits_the_table_of_its_time() -> None:
    data = parquet({"rpm": pa.array([1], pa.int32()), "extra": ["e"]})
    for target in (TARGET, pa.schema([*list(TARGET)[:-1], ("extra", pa.string()), TARGET.field(RESCUED)]), TARGET):
        for path in ("a.parquet", "b.parquet"):
            (chunk,) = read_parquet(io.BytesIO(data), target, rescued_column=RESCUED, file_path=path)
            rescued = None if "extra" in target.names else {"extra": "e", "_file_path": path}
            assert json.loads(chunk.table[RESCUED][0].as_py() or "null") == rescued
