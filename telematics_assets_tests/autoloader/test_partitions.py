"""Values in folder names: what they say, and which of them a column holds exactly."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from urllib.parse import quote

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from telematics_assets.autoloader.partitions import HIVE_NULL, exact_scalar, partition_values
from telematics_assets_tests.conformance.samples import parquet_stream

STREAM = parquet_stream(partition_columns="date,hour")
UTC_US = pa.timestamp("us", "UTC")


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("parquet/date=2026-01-31/hour=07/f.parquet", {"date": "2026-01-31", "hour": "07"}),
        ("parquet/in/date=a%2Fb%20c/date/hour=1%/f.parquet", {"date": "a/b c", "hour": "1%"}),
        (f"parquet/date={HIVE_NULL}/hour=/f.parquet", {"date": None, "hour": ""}),
        ("parquet/date=%C3%BC=x/hour=%FF/f.parquet", {"date": "ü=x", "hour": "%FF"}),
        ("parquet/d%61te=1/date=2/f.parquet", {"date": "2"}),
        ("parquet/Date=1/zone=3/f.parquet", {"Date": "1"}),
        ("parquet/date=1", {}),
        ("json/date=1/f.parquet", {}),
        ("", {}),
    ],
)
def test_what_the_folders_of_a_file_say(path: str, values: dict[str, str | None]) -> None:
    assert partition_values(STREAM, path) == values


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: text != HIVE_NULL))
def test_every_text_that_a_writer_encodes_is_had_back(text: str) -> None:
    assert partition_values(STREAM, f"parquet/date={quote(text, safe='')}/f") == {"date": text}


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("07", pa.int32(), 7),
        ("-128", pa.int8(), -128),
        ("0.1", pa.float64(), 0.1),
        ("1e3", pa.float64(), 1000.0),
        ("0.5", pa.float32(), 0.5),
        ("True", pa.bool_(), True),
        ("2024-02-29", pa.date32(), date(2024, 2, 29)),
        ("2026-01-31 07:30:00", UTC_US, datetime(2026, 1, 31, 7, 30, tzinfo=UTC)),
        ("2026-01-31T07:30:00.123456+01:00", UTC_US, datetime(2026, 1, 31, 6, 30, 0, 123456, UTC)),
        ("2026-01-31T07:30", pa.timestamp("us"), datetime(2026, 1, 31, 7, 30)),
        ("1.5", pa.decimal128(5, 2), Decimal("1.50")),
        ("é", pa.binary(), "é".encode()),
    ],
)
def test_a_text_that_its_type_holds(text: str, kind: pa.DataType, value: object) -> None:
    scalar = exact_scalar(text, kind)
    assert scalar is not None
    assert (scalar.type, scalar.as_py()) == (kind, value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", pa.int32()),
        ("1.0", pa.int32()),
        ("128", pa.int8()),
        ("\u0667", pa.int32()),
        (" 7", pa.int64()),
        ("9007199254740993", pa.float64()),
        ("0.1000000000000000000001", pa.float32()),
        ("1e999", pa.float64()),
        ("nan", pa.float64()),
        ("yes", pa.bool_()),
        ("2026-02-30", pa.date32()),
        ("20260131", pa.date32()),
        ("2026-01-31", UTC_US),
        ("2026-01-31T07:30:00Z", pa.timestamp("us")),
        ("2026-01-31T07:30:00.1234567", UTC_US),
        ("1.234", pa.decimal128(5, 2)),
        ("12345", pa.decimal128(5, 2)),
        ("07:00:00", pa.time64("us")),
    ],
)
def test_a_text_that_its_type_does_not_hold_exactly(text: str, kind: pa.DataType) -> None:
    assert exact_scalar(text, kind) is None
