"""Names, stream declarations and contracts: what is accepted, and what a mistake is answered with."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telematics_assets.catalog import (
    FILE_STREAMS,
    TELEMATICS,
    TELEMATICS_TEST,
    Column,
    FileStream,
    FileStreamOptions,
    Names,
    TableContract,
    TableName,
    find_stream,
)
from telematics_assets.errors import DbfsDisabledError, OptionError, PermanentError, UnknownNameError, VolumeError

CONTRACT = TableContract(comment="One row per thing.", columns=(Column("id", "STRING", "Which thing."),))


def stream(**changed: Any) -> FileStream:
    declared: dict[str, Any] = {
        "name": "things",
        "format": "json",
        "folder": "things",
        "table": "things",
        "contract": CONTRACT,
        **changed,
    }
    return FileStream(**declared)


# -- table names -------------------------------------------------------------------------------------------------------


def test_a_table_name_has_three_spellings() -> None:
    name = TableName("workspace", "01_bronze", "telematics")
    assert str(name) == "workspace.01_bronze.telematics"
    assert name.sql == "`workspace`.`01_bronze`.`telematics`"
    assert name.location == "workspace/01_bronze/telematics"


@pytest.mark.parametrize(
    "text",
    ["workspace.01_bronze.t", "`workspace`.`01_bronze`.`t`", "workspace.`01_bronze`.t"],
)
def test_a_full_name_is_parsed_with_or_without_backticks(text: str) -> None:
    assert TableName.parse(text) == TableName("workspace", "01_bronze", "t")


@given(st.tuples(*[st.from_regex(r"[^\x00-\x20/\x7f`.%]{1,12}", fullmatch=True)] * 3))
def test_parsing_undoes_every_spelling(parts: tuple[str, str, str]) -> None:
    name = TableName(*parts)
    assert TableName.parse(str(name)) == TableName.parse(name.sql) == name


@pytest.mark.parametrize("text", ["", "t", "bronze.t", "a.b.c.d", "..", "a..c"])
def test_another_number_of_levels_is_refused(text: str) -> None:
    with pytest.raises(UnknownNameError):
        TableName.parse(text)


@pytest.mark.parametrize("part", ["", "two words", "a/b", "..", "a.b", "tick`", "tab\t", "nul\0", "line\n"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_level_that_would_leave_its_folder_or_its_quotes_is_refused(part: str, level: int) -> None:
    parts = ["a", "b", "c"]
    parts[level] = part
    with pytest.raises(UnknownNameError, match="is not a catalog, schema or table name") as refused:
        TableName(*parts)
    assert repr(part) in str(refused.value)


def test_the_deployments_names_give_locations() -> None:
    assert Names().bronze("t") == TableName("workspace", "01_bronze", "t")
    assert Names().volume_location == "/Volumes/workspace/00_landing/telematics"
    other = Names("main", "land", "raw", "fleet")
    assert other.bronze("t").sql == "`main`.`raw`.`t`"
    assert other.volume_location == "/Volumes/main/land/fleet"


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("max_file_per_trigger", "max_files_per_trigger"),
        ("maxFilesPerTrigger", "max_files_per_trigger"),
        ("cloudFiles.maxFilesPerTrigger", "max_files_per_trigger"),
        ("cloudFiles.schemaEvolutionMode", "schema_evolution_mode"),
        ("rescue_data_column", "rescued_data_column"),
        ("raw_record", "raw_record_column"),
    ],
)
def test_an_unknown_option_is_answered_with_the_nearest_known_one(given: str, near: str) -> None:
    with pytest.raises(OptionError, match="Accepted: schema_evolution_mode") as refused:
        stream(options={given: 1})
    assert repr(given) in str(refused.value)
    assert f"Did you mean {near!r}?" in str(refused.value)


def test_an_option_that_resembles_nothing_is_answered_with_all() -> None:
    with pytest.raises(OptionError) as refused:
        FileStreamOptions.parse({"xyz": 1})
    assert "Did you mean" not in str(refused.value)
    assert "max_files_per_trigger" in str(refused.value)


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        ("schema_evolution_mode", "addNewColumn", "addNewColumns, rescue"),
        ("schema_evolution_mode", None, "addNewColumns, rescue"),
        ("max_files_per_trigger", 0, "a whole number from 1"),
        ("max_files_per_trigger", -1, "a whole number from 1"),
        ("max_files_per_trigger", 1.5, "a whole number from 1"),
        ("max_files_per_trigger", "10", "a whole number from 1"),
        ("max_files_per_trigger", True, "a whole number from 1"),
        ("schema_evolution_mode", "failonnewcolumns", "failOnNewColumns, none"),
        ("partition_columns", "date,,hour", "names separated by commas"),
        ("partition_columns", "date=1", "names separated by commas"),
        ("partition_columns", ["a b"], "names separated by commas"),
        ("partition_columns", "_date", "start with neither '_' nor '.'"),
        ("partition_columns", [3], "names separated by commas"),
        ("partition_columns", 3, "names separated by commas"),
        ("partition_columns", "date, Date", "Name each once"),
        ("max_bytes_per_trigger", 0, "a whole number of bytes from 1"),
        ("max_bytes_per_trigger", "0g", "a whole number of bytes from 1"),
        ("max_bytes_per_trigger", -1, "a whole number of bytes from 1"),
        ("max_bytes_per_trigger", "10 gigabytes", "'512m' or '10g'"),
        ("max_bytes_per_trigger", "1.5g", "'512m' or '10g'"),
        ("max_bytes_per_trigger", "", "'512m' or '10g'"),
        ("max_bytes_per_trigger", True, "'512m' or '10g'"),
        ("path_glob_filter", "", "such as '*.json'"),
        ("path_glob_filter", "day/*.json", "a glob on file names"),
        ("path_glob_filter", "[ab", "a '[' is not closed"),
        ("path_glob_filter", 7, "such as '*.json'"),
        ("modified_after", "yesterday", "'2026-01-31T12:00:00+02:00'"),
        ("modified_after", "2026-02-30", "'2026-01-31'"),
        ("modified_after", "2026-01-31T12:00:00.1234567", "six digits"),
        ("modified_before", "20260131", "'2026-01-31'"),
        ("modified_before", 1767225600, "'2026-01-31'"),
        ("include_existing_files", "false", "True or False"),
        ("use_incremental_listing", "True", "Use one of: auto, true, false"),
        ("use_incremental_listing", None, "Use one of: auto, true, false"),
        ("use_incremental_listing", 1, "Use one of: auto, true, false"),
        *(
            ("backfill_interval", given, "Use an interval")
            for given in ("", "1", "hour", "1hour", "-1 hour", "1.5 hours", "1 hour x", "1 hourss", "0 hours", None, 5)
        ),
        ("clean_source_retention_duration", "1 month", "Use an interval"),
        ("include_existing_files", None, "True or False"),
        ("allow_overwrites", 1, "True or False"),
        ("rescued_data_column", "rescued", "starts with '_'"),
        ("rescued_data_column", "", "starts with '_'"),
        ("rescued_data_column", "_batch_id", "is none of"),
        ("rescued_data_column", "_Batch_ID", "is none of"),
        ("raw_record_column", "_corrupt_record", "is none of"),
        ("raw_record_column", "raw", "starts with '_'"),
        ("raw_record_column", "_Rescued_Data", "Give them two names"),
        ("multi_line", 1, "True or False"),
        ("infer_column_types", "yes", "True or False"),
        ("schema_inference_sample_files", 0, "whole number from 1"),
        ("schema_inference_sample_files", None, "whole number from 1"),
        ("schema_inference_sample_bytes", 0, "such as '512m'"),
        ("schema_inference_sample_bytes", "much", "such as '512m'"),
        ("schema_inference_sample_bytes", None, "such as '512m'"),
        ("multi_line", "true", "True or False"),
        ("header", None, "True or False"),
        ("sep", "", "one ASCII character"),
        ("sep", ",,", "one ASCII character"),
        ("sep", "\n", "one ASCII character"),
        ("sep", "\\t", "a tab is"),
        ("sep", "é", "one ASCII character"),
        ("sep", '"', "two different characters"),
        ("sep", None, "one ASCII character"),
        ("quote", "\r", "one ASCII character"),
        ("quote", "''", "or an empty text"),
    ],
)
def test_an_option_value_that_is_not_accepted_is_shown_with_what_is(option: str, value: object, accepted: str) -> None:
    with pytest.raises(OptionError) as refused:
        stream(options={option: value})
    assert option in str(refused.value)
    assert accepted in str(refused.value)


@pytest.mark.parametrize(
    ("given", "number"),
    [
        (None, None),
        (7, 7),
        ("7", 7),
        ("7b", 7),
        ("3k", 3 << 10),
        ("3KB", 3 << 10),
        ("512m", 512 << 20),
        (" 10GB ", 10 << 30),
        ("2t", 2 << 40),
        ("1p", 1 << 50),
    ],
)
def test_bytes_are_a_number_or_a_text_with_a_unit(given: int | str | None, number: int | None) -> None:
    assert FileStreamOptions(max_bytes_per_trigger=given).batch_bytes == number


@pytest.mark.parametrize(
    ("given", "nanoseconds"),
    [
        ("1970-01-02", 86_400 * 10**9),
        ("1970-01-01T00:00:01", 10**9),
        ("1970-01-01 00:01", 60 * 10**9),
        ("1970-01-01T00:00:00.000001Z", 1_000),
        ("1970-01-01T02:00:00+02:00", 0),
        ("1969-12-31T23:59:59.9", -(10**8)),
        ("9999-12-31T23:59:59.999999", 253_402_300_799_999_999_000),
    ],
)
def test_a_timestamp_is_utc_unless_it_says_otherwise(given: str, nanoseconds: int) -> None:
    assert FileStreamOptions(modified_after=given).modified_bounds == (nanoseconds, None)
    assert FileStreamOptions(modified_before=given).modified_bounds == (None, nanoseconds)


@pytest.mark.parametrize("before", ["2026-01-31", "2026-01-30T23:59:59", "2026-01-31T01:00:00+01:00"])
def test_bounds_that_no_file_lies_between_are_refused(before: str) -> None:
    with pytest.raises(OptionError, match="No file is modified after '2026-01-31'") as refused:
        FileStreamOptions(modified_after="2026-01-31", modified_before=before)
    assert repr(before) in str(refused.value)


@pytest.mark.parametrize("mode", ["rescue", "failOnNewColumns", "none"])
def test_a_table_that_nothing_gives_columns_to_is_refused(mode: str) -> None:
    bare = TableContract("Things.")
    with pytest.raises(OptionError, match="needs a contract with columns") as refused:
        stream(contract=bare, options={"include_existing_files": False, "schema_evolution_mode": mode})
    assert repr(mode) in str(refused.value)
    stream(contract=bare, options={"include_existing_files": False})
    stream(options={"include_existing_files": False, "schema_evolution_mode": mode})


def test_options_may_be_a_mapping_or_an_object() -> None:
    options = FileStreamOptions(schema_evolution_mode="rescue", max_files_per_trigger=7, raw_record_column="_raw")
    declared = {"schema_evolution_mode": "rescue", "max_files_per_trigger": 7, "raw_record_column": "_raw"}
    assert stream(options=declared) == stream(options=options)
    assert stream(options=options).options == options


def test_a_copy_changes_only_what_it_says() -> None:
    small = TELEMATICS_TEST.with_options(max_files_per_trigger=2)
    assert small.options == FileStreamOptions(max_files_per_trigger=2, raw_record_column="_raw_record")
    assert TELEMATICS_TEST.options.max_files_per_trigger == 1000
    with pytest.raises(OptionError, match="Did you mean 'max_files_per_trigger'"):
        TELEMATICS_TEST.with_options(max_files=2)


def test_incremental_listing_is_chosen_by_word_or_bool() -> None:
    chosen = {FileStreamOptions(use_incremental_listing=given).use_incremental_listing for given in (True, "true")}
    assert chosen == {"true"}
    assert FileStreamOptions(use_incremental_listing=False) == FileStreamOptions()
    assert TELEMATICS.with_options(use_incremental_listing=True).with_options(
        backfill_interval="1 day"
    ).options == FileStreamOptions(use_incremental_listing="true", backfill_interval="1 day")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1 second", 1),
        ("90 minutes", 5400),
        ("1 hour 30 minutes", 5400),
        ("INTERVAL  2 Weeks", 1_209_600),
        (" 1 day  0 hours ", 86_400),
    ],
)
def test_an_interval_is_its_parts_added_up(text: str, seconds: int) -> None:
    assert FileStreamOptions(backfill_interval=text).backfill_ns == seconds * 1_000_000_000


# -- streams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "Things", "1things", "_things", "my things", "a/b", "a-b", "ü", "a\n"])
def test_a_stream_name_is_a_plain_word(name: str) -> None:
    with pytest.raises(OptionError, match="is not a stream name"):
        stream(name=name)


@pytest.mark.parametrize("format", ["orc", "JSON", "", "delta"])
def test_an_unknown_format_names_the_known_ones(format: str) -> None:
    with pytest.raises(OptionError, match="Use one of: parquet, json"):
        stream(format=format)


@pytest.mark.parametrize(
    ("folder", "error"),
    [
        ("", VolumeError),
        ("/things", VolumeError),
        ("../things", VolumeError),
        ("things/", VolumeError),
        ("_checkpoints", OptionError),
        ("things/.hidden", OptionError),
        ("dbfs:/things", DbfsDisabledError),
        ("/mnt/things", DbfsDisabledError),
        ("/dbfs/mnt/things", DbfsDisabledError),
    ],
)
def test_a_folder_outside_the_volumes_data_is_refused(folder: str, error: type[PermanentError]) -> None:
    with pytest.raises(error) as refused:
        stream(folder=folder)
    assert repr(folder) in str(refused.value)


def test_own_columns_stand_behind_the_data() -> None:
    end = ("_rescued_data", "_source_file", "_source_file_modified_at", "_batch_id", "_ingested_at")
    assert TELEMATICS.own_columns == end
    assert TELEMATICS_TEST.own_columns == ("_corrupt_record", "_raw_record", *end)
    assert stream(options={"rescued_data_column": "_rest"}).own_columns == ("_corrupt_record", "_rest", *end[1:])


@pytest.mark.parametrize("name", ["id", "ID", "_batch_id", "_Source_File", "_rescued_data", "_CORRUPT_RECORD"])
def test_a_contract_declares_each_column_once_and_none_of_ours(name: str) -> None:
    columns = (*CONTRACT.columns, Column(name, "STRING", "Again."))
    with pytest.raises(OptionError, match="twice, or uses a name of our own") as refused:
        stream(contract=TableContract("One row per thing.", columns))
    assert repr(name) in str(refused.value)


@pytest.mark.parametrize("kind", ["BIGINT", "decimal(10, 2)", "MAP<STRING, ARRAY<DOUBLE>>", "BINARY", "MAP<INT, INT>"])
def test_parquet_columns_have_any_type(kind: str) -> None:
    contract = TableContract("One row per thing.", (Column("n", kind, "A thing."),))
    assert stream(format="parquet", contract=contract).contract is contract
    assert stream(format="parquet", options={"schema_hints": f"n {kind}"}).options.hints[0].path == ("n",)


@pytest.mark.parametrize(
    ("format", "name", "kind", "says"),
    [
        ("json", "n", "TEXT", "is 'TEXT', which is not a column type. Use one of: STRING, BIGINT"),
        ("json", "n", "BINARY", "JSON files hold text only. Declare it as STRING"),
        ("json", "n", "ARRAY<BINARY>", "JSON files hold text only. Declare it as STRING"),
        ("csv", "n", "BINARY", "csv files hold text only"),
        ("csv", "n", "ARRAY<INT>", "a csv field is one text. Declare it as STRING"),
        ("json", "n", "MAP<INT, DOUBLE>", "keys in JSON are text. Use MAP<STRING, DOUBLE>"),
        ("json", "__file_path", "INT", "the rescued data uses this name"),
    ],
)
def test_a_type_that_text_can_not_show_is_refused_with_one_that_it_can(
    format: str, name: str, kind: str, says: str
) -> None:
    with pytest.raises(OptionError) as refused:
        stream(format=format, contract=TableContract("One row per thing.", (Column(name, kind, "A thing."),)))
    assert says in str(refused.value)
    assert repr(name) in str(refused.value)
    if kind != "TEXT":
        with pytest.raises(OptionError) as refused:
            stream(format=format, options={"schema_hints": f"{name} {kind}"})
        assert says in str(refused.value)


@pytest.mark.parametrize(
    ("hints", "says"),
    [
        ("id BIGINT", "the contract declares 'id' as STRING. Give both the same type, or leave the hint out"),
        ("ID STRING", "the contract declares 'id'"),
        ("id.x INT", "the contract declares 'id'"),
        ("_batch_id INT", "a name of our own"),
        ("_Rescued_Data.x INT", "a name of our own"),
        ("n", "no type at its end"),
        ("n TEXT", "no type at 'TEXT'. Give 'path type' or 'path: type'"),
        ("", "a name is missing"),
        ({"n": "INT"}, "it is no text"),
    ],
)
def test_a_hint_that_can_not_be_followed_is_refused(hints: object, says: str) -> None:
    with pytest.raises(OptionError) as refused:
        stream(options={"schema_hints": hints})
    assert says in str(refused.value)


def test_a_hint_may_repeat_what_the_contract_declares() -> None:
    columns = (Column("d", "STRUCT<a: INT, b: STRUCT<c: DATE>>", "A thing."),)
    contract = TableContract("One row per thing.", columns)
    assert len(stream(contract=contract, options={"schema_hints": "d.a INT, d.b.c: date, e INT"}).options.hints) == 3
    for hint in ("d.a BIGINT", "d.x INT", "d.b.c.e INT"):
        with pytest.raises(OptionError, match="Give both the same type"):
            stream(contract=contract, options={"schema_hints": hint})


def test_inference_is_for_text_and_has_limits() -> None:
    with pytest.raises(OptionError, match="infer_column_types needs format='json' or 'csv'"):
        stream(format="parquet", options={"infer_column_types": True})
    options = FileStreamOptions(infer_column_types=True, schema_inference_sample_bytes="2k")
    assert (options.sample_bytes, FileStreamOptions().sample_bytes) == (2048, 32 << 20)


def test_raw_records_need_lines() -> None:
    with pytest.raises(OptionError, match="raw_record_column needs format='json'"):
        stream(format="parquet", options={"raw_record_column": "_raw"})
    assert stream(format="csv", options={"raw_record_column": "_raw"}).own_columns[:2] == ("_corrupt_record", "_raw")


@pytest.mark.parametrize(
    ("option", "value", "formats"),
    [
        ("multi_line", False, {"json", "csv"}),
        ("multi_line", True, {"json", "csv"}),
        ("header", False, {"csv"}),
        ("sep", ";", {"csv"}),
        ("quote", "", {"csv"}),
    ],
)
def test_an_option_of_one_format_is_refused_for_others(option: str, value: object, formats: set[str]) -> None:
    for format in ("parquet", "json", "csv"):
        if format in formats:
            assert getattr(stream(format=format, options={option: value}).options, option) == value
        else:
            with pytest.raises(OptionError, match=f"{option} needs format="):
                stream(format=format, options={option: value})


def test_a_stream_is_found_by_name_or_the_known_ones_are_listed() -> None:
    assert find_stream(FILE_STREAMS, "telematics_test") is TELEMATICS_TEST
    with pytest.raises(UnknownNameError, match="'nope'. Streams: telematics, telematics_test"):  # noqa: RUF043
        find_stream(FILE_STREAMS, "nope")
    with pytest.raises(UnknownNameError, match="Streams: none"):
        find_stream((), "nope")


@pytest.mark.parametrize("shipped", FILE_STREAMS, ids=lambda shipped: shipped.name)
def test_the_shipped_contracts_say_what_everything_is(shipped: FileStream) -> None:
    assert shipped.contract.comment.endswith(").") or shipped.contract.comment.endswith(".")
    assert shipped.contract.owners
    for column in shipped.contract.columns:
        assert column.comment.endswith(".")
        assert column.minimum is None or column.maximum is None or column.minimum < column.maximum
    assert {stream.table for stream in FILE_STREAMS} == {"telematics", "telematics_test"}


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (None, ()),
        ("", ()),
        (" date , hour", ("date", "hour")),
        (["date", "hour"], ("date", "hour")),
        (("a.b", "ü"), ("a.b", "ü")),
    ],
)
def test_partition_columns_are_names(given: Any, names: tuple[str, ...]) -> None:
    options = FileStreamOptions(partition_columns=given)
    assert options.partition_names == names


@pytest.mark.parametrize("name", ["ID", "batch"])
def test_a_partition_column_is_the_contracts_or_a_free_name(name: str) -> None:
    declared = TableContract("Rows.", (Column("id", "STRING", "The id."),))
    options = {"partition_columns": name, "rescued_data_column": "_rescued", "raw_record_column": "_raw"}
    if name == "ID":
        with pytest.raises(OptionError, match=r"by case only\. Name it as they do"):
            FileStream("s", "json", "s", "s", declared, options)  # type: ignore[arg-type]
        return
    made = FileStream("s", "json", "s", "s", declared, options)  # type: ignore[arg-type]
    assert made.options.partition_names == ("batch",)
