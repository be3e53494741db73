"""Which columns a table gets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, Schema, write_deltalake

from telematics_assets.autoloader.schema import MAX_COLUMNS, reader_schema, resolve, table_schema
from telematics_assets.catalog import TELEMATICS, TELEMATICS_TEST, Column, FileStream, TableContract
from telematics_assets.errors import SchemaError

US_UTC = pa.timestamp("us", "UTC")
CONTRACT = TableContract("Points.", (Column("vehicle_id", "STRING", "Fleet number."), Column("rpm", "INT", "Speed.")))
PARQUET = FileStream("points", "parquet", "points", "points", CONTRACT)
TEXT_CONTRACT = TableContract("Points.", (Column("vehicle_id", "STRING", "Fleet number."),))
JSON = FileStream("lines", "json", "lines", "lines", TEXT_CONTRACT, options={"raw_record_column": "_raw"})  # type: ignore[arg-type]
RESCUING = PARQUET.with_options(schema_evolution_mode="rescue")
FAILING = PARQUET.with_options(schema_evolution_mode="failOnNewColumns")
NONE = PARQUET.with_options(schema_evolution_mode="none")


def names(fields: list[pa.Field]) -> list[str]:
    return [field.name for field in fields]


@pytest.mark.parametrize("stream", [PARQUET, RESCUING], ids=["addNewColumns", "rescue"])
def test_a_new_table_starts_with_the_contract_and_takes_what_the_first_files_have(stream: FileStream) -> None:
    fields = resolve(stream, None, [("gear", pa.int8()), ("rpm", pa.int64()), ("VEHICLE_ID", pa.string())])
    assert [(field.name, field.type) for field in fields] == [
        ("vehicle_id", pa.string()),
        ("rpm", pa.int32()),
        ("gear", pa.int8()),
    ]
    assert [field.metadata for field in fields] == [{b"comment": b"Fleet number."}, {b"comment": b"Speed."}, None]


def test_an_existing_table_gets_unknown_columns_once() -> None:
    table = table_schema(PARQUET, resolve(PARQUET, None, []))
    found = [
        ("rpm", pa.int32()),
        ("gear", pa.uint8()),
        ("gear", pa.string()),
        ("Gear", pa.int8()),
        ("fuel", pa.float16()),
    ]
    assert resolve(PARQUET, table, found) == [pa.field("gear", pa.int16()), pa.field("fuel", pa.float32())]
    assert resolve(RESCUING, table, found) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("RPM", pa.int32()),
        ("_rescued_data", pa.string()),
        ("_SOURCE_FILE", pa.string()),
        ("_batch_id", pa.int64()),
        ("two words", pa.int64()),
        ("", pa.int64()),
        ("\ud800", pa.int64()),
        ("waited", pa.duration("s")),
        ("nothing", pa.null()),
    ],
)
def test_a_column_that_the_table_could_not_hold_exactly_is_left_to_be_rescued(name: str, kind: pa.DataType) -> None:
    table = table_schema(PARQUET, resolve(PARQUET, None, []))
    assert resolve(PARQUET, table, [(name, kind)]) == []
    assert names(resolve(PARQUET, None, [(name, kind)])) == ["vehicle_id", "rpm"]


def test_of_one_name_the_first_type_that_can_be_held_decides() -> None:
    table = table_schema(PARQUET, resolve(PARQUET, None, []))
    found = [("gear", pa.null()), ("gear", pa.int8()), ("gear", pa.int64())]
    assert resolve(PARQUET, table, found) == [pa.field("gear", pa.int8())]


@pytest.mark.parametrize("stream", [FAILING, NONE], ids=["failOnNewColumns", "none"])
def test_a_mode_that_holds_to_the_contract_gives_a_new_table_nothing_else(stream: FileStream) -> None:
    assert names(resolve(stream, None, [("gear", pa.int8())])) == ["vehicle_id", "rpm"]
    bare = dataclasses.replace(stream, contract=TableContract("Points."))
    assert resolve(bare, None, [("gear", pa.int8())]) == [pa.field("gear", pa.int8())]


def test_mode_none_leaves_an_existing_table_as_it_is() -> None:
    assert resolve(NONE, table_schema(NONE, resolve(NONE, None, [])), [("gear", pa.int8())]) == []


def test_mode_fail_on_new_columns_names_file_and_columns() -> None:
    table = table_schema(FAILING, resolve(FAILING, None, []))
    with pytest.raises(SchemaError, match=r"^points/a\.parquet has .*'points' lacks: gear TINYINT, fuel DOUBLE\. "):
        resolve(FAILING, table, [("gear", pa.int8()), ("rpm", pa.int32()), ("fuel", pa.float64())], "points/a.parquet")
    with pytest.raises(SchemaError, match=r"c19 INT and 5 more\. "):
        resolve(FAILING, table, [(f"c{number}", pa.int32()) for number in range(25)])


def test_mode_fail_on_new_columns_lets_pass_what_could_not_be_a_column() -> None:
    table = table_schema(FAILING, resolve(FAILING, None, []))
    odd = [("RPM", pa.int32()), ("_batch_id", pa.int64()), ("two words", pa.int64()), ("nothing", pa.null())]
    assert resolve(FAILING, table, odd) == []


def test_mode_fail_on_new_columns_adds_what_the_contract_declares_by_now() -> None:
    table = table_schema(FAILING, resolve(FAILING, None, []))
    gear = Column("gear", "INT", "The gear.")
    now = dataclasses.replace(FAILING, contract=TableContract("Points.", (*CONTRACT.columns, gear)))
    (field,) = resolve(now, table, [("gear", pa.int8())])
    assert (field.name, field.type, field.metadata) == ("gear", pa.int32(), {b"comment": b"The gear."})
    with pytest.raises(SchemaError, match="lacks: fuel"):
        resolve(now, table, [("gear", pa.int8()), ("fuel", pa.int8())])


def test_hints_stand_behind_the_contract_and_reach_into_what_was_found() -> None:
    stream = PARQUET.with_options(schema_hints="d.a BIGINT, d.B.x INT, gear INT, rpm INT")
    given = pa.struct([("a", pa.int8()), ("b", pa.int8()), ("c", pa.uint8())])
    held = pa.struct([("a", pa.int64()), ("c", pa.int16()), ("B", pa.struct([("x", pa.int32())]))])
    fields = resolve(stream, None, [("speed", pa.float64()), ("d", given), ("d", pa.string())])
    assert [(field.name, field.type) for field in fields][2:] == [
        ("d", held),
        ("gear", pa.int32()),
        ("speed", pa.float64()),
    ]
    table = table_schema(PARQUET, resolve(PARQUET, None, []))
    assert resolve(stream, table, [("d", pa.int8()), ("gear", pa.null())]) == [
        pa.field("d", pa.struct([("a", pa.int64()), ("B", pa.struct([("x", pa.int32())]))])),
        pa.field("gear", pa.int32()),
    ]


def test_a_declared_column_that_comes_late_has_its_declared_type() -> None:
    late = dataclasses.replace(
        PARQUET, contract=TableContract("Points.", (*CONTRACT.columns, Column("w", "INT", "W.")))
    )
    table = table_schema(PARQUET, resolve(PARQUET, None, []))
    (field,) = resolve(late, table, [("w", pa.int8())])
    assert (field.type, field.metadata) == (pa.int32(), {b"comment": b"W."})


def test_json_columns_are_text() -> None:
    assert resolve(JSON, None, [("gear", None), ("_corrupt_record", None), ("_RAW", None)])[1:] == [
        pa.field("gear", pa.string())
    ]


def test_a_table_has_a_stated_limit_of_columns() -> None:
    flood = [(f"c{number}", pa.int64()) for number in range(MAX_COLUMNS + 5)]
    fields = resolve(PARQUET, None, flood)
    table = table_schema(PARQUET, fields)
    assert len(table) == MAX_COLUMNS
    assert names(fields)[-1] == f"c{MAX_COLUMNS - 8}"
    assert resolve(PARQUET, table, [("one_more", pa.int64())]) == []


def test_a_table_ends_with_the_loaders_own_columns_and_all_have_comments() -> None:
    own = ["_rescued_data", "_source_file", "_source_file_modified_at", "_batch_id", "_ingested_at"]
    assert table_schema(PARQUET, []).names == own
    schema = table_schema(JSON, resolve(JSON, None, []))
    assert schema.names == ["vehicle_id", "_corrupt_record", "_raw", *own]
    assert [field.type for field in schema][-5:] == [pa.string(), pa.string(), US_UTC, pa.int64(), US_UTC]
    assert all(field.metadata[b"comment"].endswith(b".") for field in schema)


def test_readers_know_evolved_columns_wherever_the_table_has_them(tmp_path: Path) -> None:
    schema = table_schema(TELEMATICS, resolve(TELEMATICS, None, []))
    DeltaTable.create(str(tmp_path), Schema.from_arrow(schema))
    write_deltalake(str(tmp_path), pa.table({"gear": pa.array([3], pa.int8())}), mode="append", schema_mode="merge")
    table = pa.schema(DeltaTable(str(tmp_path)).schema().to_arrow())
    assert table.names[-1] == "gear"

    readers = reader_schema(TELEMATICS, table)
    assert readers.names == [*(column.name for column in TELEMATICS.contract.columns), "gear", "_rescued_data"]
    assert readers.field("speed_kmh").metadata == {b"comment": b"Speed over ground, km/h."}
    assert resolve(TELEMATICS, table, [("gear", pa.int8()), ("GEAR", pa.int8())]) == []


def test_json_readers_fill_corrupt_raw_and_rescued() -> None:
    schema = table_schema(TELEMATICS_TEST, resolve(TELEMATICS_TEST, None, []))
    assert reader_schema(TELEMATICS_TEST, schema).names[-4:] == [
        "device",
        "_corrupt_record",
        "_raw_record",
        "_rescued_data",
    ]
