"""Folders that name columns: their values stand in every row, and nothing that they or the file say is lost."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from telematics_assets.catalog import Column, FileStream
from telematics_assets.engines.base import SchemaChange
from telematics_assets_tests.conformance.platforms import LOCATION, Platform
from telematics_assets_tests.conformance.samples import csv_stream, json_stream, lines, parquet, parquet_stream

N = Column("n", "BIGINT", "A number.")
DAY = Column("day", "DATE", "The day.")


def rescued(platform: Platform, stream: FileStream) -> list[Any]:
    """What was rescued of every row, without the path."""
    found = [row["_rescued_data"] for row in platform.rows(stream, "n", "_rescued_data")]
    return [text and {k: v for k, v in json.loads(text).items() if k != "_file_path"} for text in found]


STREAMS = [
    (parquet_stream(partition_columns="day,hour"), lambda n: parquet(n=[n])),
    (json_stream(partition_columns=["day", "hour"]), lambda n: lines(f'{{"n":{n}}}')),
    (json_stream(partition_columns=["day", "hour"], multi_line=True), lambda n: f'[{{"n":{n}}}]'.encode()),
    (csv_stream(partition_columns=("day", "hour")), lambda n: lines("n", str(n))),
]


@pytest.mark.parametrize(("stream", "content"), STREAMS)
def test_named_folders_become_columns_of_every_format(platform: Platform, stream: FileStream, content: Any) -> None:
    platform.volume_put(f"{stream.folder}/day=2026-01-31/hour=07/a", content(1), 1)
    platform.volume_put(f"{stream.folder}/x/day=a%2Fb/zone=4/b", content(2), 2)
    platform.volume_put(f"{stream.folder}/day=__HIVE_DEFAULT_PARTITION__/hour=/c", content(3), 3)
    platform.volume_put(f"{stream.folder}/d", content(4), 4)
    assert platform.engine.ingest(stream).rows_rescued == 0
    assert list(platform.columns(stream).items())[:2] == [("day", "STRING"), ("hour", "STRING")]
    assert [list(row.values())[1:] for row in platform.rows(stream, "n", "day", "hour")] == [
        ["2026-01-31", "07"],
        ["a/b", None],
        [None, ""],
        [None, None],
    ]
    assert "zone" not in platform.columns(stream)


TYPES = {
    "BIGINT": ("-07", -7, "7.0"),
    "INT": ("7", 7, "2147483648"),
    "DATE": ("2026-01-31", date(2026, 1, 31), "2026-02-30"),
    "TIMESTAMP": ("2026-01-31T07%3A00%3A00Z", datetime(2026, 1, 31, 7, tzinfo=UTC), "noon"),
    "DOUBLE": ("0.5", 0.5, "9007199254740993"),
    "DECIMAL(5,2)": ("1.5", Decimal("1.50"), "1.234"),
    "BOOLEAN": ("true", True, "1"),
}


@pytest.mark.parametrize(("kind", "example"), TYPES.items())
@pytest.mark.parametrize("format", ["parquet", "json", "csv"])
def test_declared_types_are_held_exactly_or_the_text_is_rescued(
    platform: Platform, format: str, kind: str, example: tuple[str, Any, str]
) -> None:
    fits, value, misfit = example
    key = Column("key", kind, "From the folder.", required=True)
    content = {"parquet": parquet(n=["1"]), "json": lines('{"n":"1"}'), "csv": lines("n", "1")}[format]
    stream = parquet_stream(key, partition_columns="key") if format == "parquet" else json_stream("n")
    if format != "parquet":
        stream = (json_stream if format == "json" else csv_stream)("n")
        contract = type(stream.contract)("Rows.", (*stream.contract.columns, key))
        stream = FileStream("s", stream.format, format, "s", contract, {"partition_columns": "key"})  # type: ignore[arg-type]
    platform.volume_put(f"{format}/key={fits}/a", content, 1)
    platform.volume_put(f"{format}/key={misfit}/b", content, 2)
    report = platform.engine.ingest(stream)
    assert report.rows_rescued == 1
    assert platform.columns(stream)["key"] == kind
    assert platform.rows(stream, "key", "_rescued_data") == [
        {"key": None, "_rescued_data": f'{{"key":"{misfit}","_file_path":"{LOCATION}/{format}/key={misfit}/b"}}'},
        {"key": value, "_rescued_data": None},
    ]


def test_the_folder_wins_over_a_text_file_and_differing_values_are_rescued(platform: Platform) -> None:
    stream = json_stream("n", partition_columns="day", schema_evolution_mode="rescue")
    records = ['{"n":1,"day":"x"}', '{"n":2,"day":"y","more":[1]}', '{"n":3}', '{"n":4,"day":7}', '{"n":5,"day":"x"}']
    platform.volume_put("json/day=x/a", lines(*records, "no record"))
    report = platform.engine.ingest(stream)
    assert (report.rows_rescued, report.rows_corrupt) == (2, 1)
    rows = platform.rows(stream, "n", "day", "more", "_rescued_data")
    assert [row["day"] for row in rows] == ["x"] * 6
    assert [row["more"] for row in rows] == [None, None, "[1]", None, None, None]
    assert rescued(platform, stream) == [None, None, {"day": "y"}, None, {"day": "7"}, None]


def test_what_the_reader_rescued_stays_beside_it(platform: Platform) -> None:
    stream = csv_stream("n", partition_columns="day")
    contract = type(stream.contract)("Rows.", (*stream.contract.columns, DAY))
    stream = FileStream("s", "csv", "csv", "s", contract, {"partition_columns": "day"})  # type: ignore[arg-type]
    platform.volume_put("csv/day=never/a", lines("n,day", '1,"z""é",extra', "2,,extra", "3", "4,never"))
    assert platform.engine.ingest(stream).rows_rescued == 4
    assert [row["day"] for row in platform.rows(stream, "n", "day")] == [None] * 4
    assert rescued(platform, stream) == [
        {"day": 'z"é', "_c2": "extra"},
        {"day": "never", "_c2": "extra"},
        {"day": "never"},
        {"day": "never"},
    ]
    (path,) = {json.loads(row["_rescued_data"])["_file_path"] for row in platform.rows(stream, "_rescued_data")}
    assert path == f"{LOCATION}/csv/day=never/a"


#: A column of a file in the folder `day=7`, and what is rescued of its values.
OWN = [
    (pa.array(["7", "07", None]), [None, "07", None]),
    (pa.array([7, 8, None], pa.int64()), [None, 8, None]),
    (pa.array([7, 8, None], pa.uint64()), [None, 8, None]),
    (pa.array([7.0, 7.5, None], pa.float32()), [None, 7.5, None]),
    (pa.array(["7", "x", None]).dictionary_encode(), [None, "x", None]),
    (pa.array([Decimal("7.00"), Decimal("7.01"), None]), [None, 7.01, None]),
    (pa.array([b"7", b"8", None]), [None, "OA==", None]),
    (pa.array([True, False, None]), [True, False, None]),
    (pa.array([7, 8, None], pa.time32("ms")), ["00:00:00.007", "00:00:00.008", None]),
    (pa.array([[7], [8], None]), [[7], [8], None]),
    (pa.array([None, None, None]), [None, None, None]),
]


@pytest.mark.parametrize(("own", "left"), OWN, ids=[str(own.type) for own, _ in OWN])
@pytest.mark.parametrize("declared", ["STRING", "INT", "DATE"])
def test_the_folder_wins_over_a_typed_column_and_equal_values_are_not_rescued(
    platform: Platform, own: pa.Array, left: list[Any], declared: str
) -> None:
    stream = parquet_stream(Column("day", declared, "The day."), N, partition_columns="day")
    platform.volume_put("parquet/day=7/a", parquet(n=[1, 2, 3], day=own))
    platform.engine.ingest(stream)
    expected = {"STRING": "7", "INT": 7, "DATE": None}[declared]
    assert [row["day"] for row in platform.rows(stream, "n", "day")] == [expected] * 3
    if declared == "DATE" and not pa.types.is_list(own.type):
        # No day: then the folder's text is in no column.
        left = ["7" if value is None else value for value in left]
    assert rescued(platform, stream) == [None if value is None else {"day": value} for value in left]


def test_where_the_path_says_nothing_the_column_is_the_files_own(platform: Platform) -> None:
    stream = parquet_stream(N, DAY, partition_columns="day")
    platform.volume_put("parquet/a", parquet(n=[1], day=pa.array([date(2026, 1, 1)])), 1)
    platform.volume_put("parquet/day=2026-01-02/b", parquet(n=[2]), 2)
    platform.volume_put("parquet/c", parquet(n=[3]), 3)
    assert platform.engine.ingest(stream).rows_rescued == 0
    assert [row["day"] for row in platform.rows(stream, "n", "day")] == [date(2026, 1, 1), date(2026, 1, 2), None]


def test_a_name_in_other_case_is_rescued_as_a_files_column_would_be(platform: Platform) -> None:
    stream = json_stream("n", partition_columns="day")
    platform.volume_put("json/Day=1/a", lines('{"n":1}', '{"n":2,"Day":"1"}', '{"n":3,"Day":"2"}'), 1)
    platform.volume_put("json/Day=1/day=2/b", lines('{"n":4}'), 2)
    platform.engine.ingest(stream)
    assert list(platform.columns(stream)) == ["n", "day"]
    assert [row["day"] for row in platform.rows(stream, "n", "day")] == [None, None, None, "2"]
    assert rescued(platform, stream) == [{"Day": "1"}, {"Day": "1"}, {"Day": "2"}, {"Day": "1"}]


@pytest.mark.parametrize("mode", ["addNewColumns", "failOnNewColumns", "rescue", "none"])
def test_a_partition_column_that_is_named_later(platform: Platform, mode: str) -> None:
    before = parquet_stream(N, schema_evolution_mode=mode)
    platform.volume_put("parquet/day=2026-01-01/a", parquet(n=[1]), 1)
    platform.engine.ingest(before)
    assert platform.columns(before) == {"n": "BIGINT"}
    stream = parquet_stream(N, DAY, schema_evolution_mode=mode, partition_columns="day")
    platform.volume_put("parquet/day=2026-01-02/b", parquet(n=[2]), 2)
    (batch,) = platform.engine.ingest(stream).batches
    if mode in ("rescue", "none"):
        assert (batch.schema_changes, batch.rows_rescued) == ((), 1)
        assert rescued(platform, stream) == [None, {"day": "2026-01-02"}]
        return
    assert (batch.schema_changes, batch.rows_rescued) == ((SchemaChange("day", "DATE"),), 0)
    assert [row["day"] for row in platform.rows(stream, "n", "day")] == [None, date(2026, 1, 2)]


@pytest.mark.parametrize("mode", ["failOnNewColumns", "none"])
def test_naming_it_declares_it(platform: Platform, mode: str) -> None:
    stream = parquet_stream(N, schema_evolution_mode=mode, partition_columns="day")
    platform.volume_put("parquet/day=x/a", parquet(n=[1]))
    platform.engine.ingest(stream)
    assert platform.rows(stream, "n", "day") == [{"n": 1, "day": "x"}]


def test_a_file_without_a_header_has_the_other_columns_in_order(platform: Platform) -> None:
    stream = csv_stream("day", "n", "m", partition_columns="day", header=False)
    platform.volume_put("csv/day=x/a", lines("1,2"))
    platform.engine.ingest(stream)
    assert platform.rows(stream, "n", "m", "day") == [{"n": "1", "m": "2", "day": "x"}]


@pytest.mark.parametrize("format", ["json", "csv"])
def test_a_hint_types_a_partition_column_beside_inferred_ones(platform: Platform, format: str) -> None:
    options = {"partition_columns": "day,hour", "schema_hints": "day DATE", "infer_column_types": True}
    stream = (json_stream if format == "json" else csv_stream)(**options)
    content = lines('{"n":1,"hour":7}') if format == "json" else lines("n,hour", "1,7")
    platform.volume_put(f"{format}/day=2026-01-31/hour=7/a", content)
    assert platform.engine.ingest(stream).rows_rescued == 0
    assert platform.columns(stream) == {"day": "DATE", "hour": "STRING", "n": "BIGINT"}
    assert platform.rows(stream, "n", "day", "hour") == [{"n": 1, "day": date(2026, 1, 31), "hour": "7"}]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (pa.array([2**33, 2**33 + 1, None]), [str(2**33), 2**33 + 1, str(2**33)]),
        (pa.array([str(2**33), "x", None]), [str(2**33), "x", str(2**33)]),
        # The reader itself rescues what no Delta column holds.
        (pa.array([1, 10**7, None], pa.int32()).cast(pa.date32()), ["1970-01-02", "29349-01-26", str(2**33)]),
        (pa.array([[1], [], None]), [[1], [], None]),
    ],
)
def test_a_folder_that_its_column_cannot_hold_is_rescued_whatever_the_file_says(
    platform: Platform, own: pa.Array, expected: list[Any]
) -> None:
    stream = parquet_stream(N, Column("zone", "INT", "A zone."), partition_columns="zone")
    platform.volume_put(f"parquet/zone={2**33}/a", parquet(n=[1, 2, 3], zone=own))
    assert platform.engine.ingest(stream).files_ingested == 1
    assert [row["zone"] for row in platform.rows(stream, "n", "zone")] == [None] * 3
    assert [text and text["zone"] for text in rescued(platform, stream)] == expected
