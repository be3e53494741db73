"""What is refused before anything happens, each with what is accepted instead."""

from __future__ import annotations

from typing import Any

import pytest

from telematics_assets.catalog import FileStream, FileStreamOptions, TableContract, TableName
from telematics_assets.errors import (
    DbfsDisabledError,
    OptionError,
    SettingsError,
    TableNotFoundError,
    UnknownNameError,
    VolumeError,
)
from telematics_assets.settings import load_settings
from telematics_assets_tests.conformance.platforms import Platform
from telematics_assets_tests.conformance.samples import json_stream, parquet_stream


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_file_per_trigger": 1}, "Did you mean 'max_files_per_trigger'"),
        ({"cloudFiles.maxFilesPerTrigger": 1}, "Did you mean 'max_files_per_trigger'"),
        ({"schemaEvolutionMode": "rescue"}, "Did you mean 'schema_evolution_mode'"),
        ({"nonsense": 1}, "Accepted: schema_evolution_mode"),
        ({"schema_evolution_mode": "rescued"}, "addNewColumns, rescue"),
        ({"max_files_per_trigger": 0}, "whole number from 1"),
        ({"max_files_per_trigger": "10"}, "whole number from 1"),
        ({"rescued_data_column": "rescued"}, "starts with '_'"),
        ({"rescued_data_column": "_batch_id"}, "none of"),
        ({"raw_record_column": "_Rescued_Data"}, "two names"),
    ],
)
def test_an_unknown_option_or_value_is_refused_with_what_is_accepted(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        json_stream(**options)
    with pytest.raises(OptionError, match=message):
        FileStreamOptions.parse(options)


def test_an_option_of_another_format_is_refused() -> None:
    with pytest.raises(OptionError, match="raw_record_column needs format='json'"):
        parquet_stream(raw_record_column="_raw")


@pytest.mark.parametrize("format", ["orc", "avro", "JSON", ""])
def test_an_unknown_format_is_refused(format: str) -> None:
    with pytest.raises(OptionError, match="parquet, json"):
        FileStream("x", format, "x", "x", TableContract("x"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "folder", ["dbfs:/FileStore/x", "/dbfs/FileStore/x", "/mnt/lake/x", "DBFS:/x", "dbfs:x", "/mnt"]
)
def test_dbfs_and_mount_paths_are_refused_with_the_form_that_is_accepted(folder: str) -> None:
    with pytest.raises(DbfsDisabledError, match=r"DBFS_DISABLED.*/Volumes/<catalog>/<schema>/<volume>/<path>"):
        FileStream("x", "json", folder, "x", TableContract("x"))
    with pytest.raises(DbfsDisabledError, match="DBFS_DISABLED"):
        load_settings({"TELEMATICS_HOME": folder})


@pytest.mark.parametrize("folder", ["", "/absolute", "a//b", "../other", "a/..", "./a", "a/"])
def test_a_folder_outside_the_volume_is_refused(folder: str) -> None:
    with pytest.raises(VolumeError, match="not a path inside the Volume"):
        FileStream("x", "json", folder, "x", TableContract("x"))


@pytest.mark.parametrize("folder", ["_checkpoints", "_checkpoints/x", ".hidden", "json/_tmp"])
def test_a_folder_that_is_never_data_is_refused(folder: str) -> None:
    with pytest.raises(OptionError, match="not data"):
        FileStream("x", "json", folder, "x", TableContract("x"))


@pytest.mark.parametrize(
    ("engine", "message"),
    [("embeded", "Did you mean 'embedded'"), ("duckdb", "Use one of: embedded"), ("Embedded", "embedded")],
)
def test_an_unknown_engine_is_refused_with_those_there_are(engine: str, message: str) -> None:
    with pytest.raises(SettingsError, match=f"TELEMATICS_ENGINE='{engine}'.*{message}"):
        load_settings({"TELEMATICS_ENGINE": engine})


def test_an_unknown_table_is_refused_with_those_there_are(platform: Platform) -> None:
    with pytest.raises(TableNotFoundError, match=r"no table workspace\.01_bronze\.nobody"):
        platform.engine.read(platform.engine.names.bronze("nobody"))
    assert platform.engine.state(TableName("nowhere", "no", "nobody")) is None
    with pytest.raises(UnknownNameError, match="three levels"):
        TableName.parse("telematics")
