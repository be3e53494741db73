"""What a person sees of a load: counts, schema, preview, picture; readable and small."""

from __future__ import annotations

import base64
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest

from telematics_assets.catalog import TELEMATICS, TELEMATICS_TEST, FileStream, TableContract, TableName
from telematics_assets.engines.base import PendingFiles
from telematics_assets.errors import VolumeUnavailableError
from telematics_assets.metadata import listing, load_metadata, pending_metadata, picture, preview
from telematics_assets.testing import MemoryEngine, json_bytes
from telematics_assets_tests.orchestra import json_points, parquet_points

EVENT_LOG_LIMIT = 60_000


def loaded(engine: MemoryEngine, stream: FileStream) -> dict[str, Any]:
    return load_metadata(engine, stream, engine.ingest(stream))


def positions(rows: int) -> pa.Table:
    spread = [math.sin(number * number) for number in range(rows)]
    return pa.table(
        {
            "longitude": [11.5 + value for value in spread],
            "latitude": [48.1 + value**3 for value in spread],
            "speed_kmh": [abs(value) * 130 for value in spread],
        }
    )


def test_a_load_shows_counts_schema_preview_and_picture() -> None:
    engine = MemoryEngine()
    engine.volume.put("parquet/a.parquet", parquet_points(5))
    metadata = loaded(engine, TELEMATICS)
    assert metadata["rows"] == metadata["dagster/row_count"] == 5
    assert metadata["delta_version"] == 1
    columns = {column.name: column for column in metadata["dagster/column_schema"].columns}
    assert columns["speed_kmh"].type == "double"
    assert columns["speed_kmh"].description == "Speed over ground, km/h."
    assert "_source_file" in columns
    assert "vehicle-0" in metadata["preview"].value
    assert metadata["picture"].value.startswith("![Positions and speeds](data:image/png;base64,")


def test_the_text_columns_of_json_are_drawn_as_well() -> None:
    engine = MemoryEngine()
    engine.volume.put("json/a.json", json_points(5, {"latitude": "somewhere", "longitude": None}))
    assert _size(loaded(engine, TELEMATICS_TEST)["picture"].value) == (640, 256)


def test_quarantined_files_and_new_columns_are_listed() -> None:
    engine = MemoryEngine()
    engine.volume.put("parquet/a.parquet", parquet_points(2))
    loaded(engine, TELEMATICS)
    engine.volume.put("parquet/b.parquet", parquet_points(2, tyre_pressure_bar=[2.1, 2.2]))
    engine.volume.put("parquet/zero.parquet", b"")
    metadata = loaded(engine, TELEMATICS)
    (skipped,) = metadata["skipped_files"].records
    assert skipped.data["path"] == "parquet/zero.parquet"
    assert skipped.data["reason"]
    (added,) = metadata["columns_added"].records
    assert added.data == {"column": "tyre_pressure_bar", "type": "DOUBLE"}


def test_widened_columns_are_listed_with_both_types() -> None:
    engine = MemoryEngine()
    stream = TELEMATICS.with_options(schema_evolution_mode="addNewColumnsWithTypeWidening")
    engine.volume.put("parquet/a.parquet", parquet_points(1, cell=pa.array([1], pa.int16())))
    assert "columns_widened" not in loaded(engine, stream)
    engine.volume.put("parquet/b.parquet", parquet_points(1, cell=pa.array([70_000], pa.int32())))
    metadata = loaded(engine, stream)
    (widened,) = metadata["columns_widened"].records
    assert widened.data == {"column": "cell", "from": "SMALLINT", "to": "INT"}
    assert "columns_added" not in metadata


def test_an_empty_load_has_neither_batches_nor_a_picture() -> None:
    engine = MemoryEngine()
    assert loaded(engine, TELEMATICS)["rows"] == 0
    engine.volume.put("parquet/a.parquet", parquet_points(2))
    loaded(engine, TELEMATICS)
    metadata = loaded(engine, TELEMATICS)
    assert metadata["dagster/row_count"] == 2
    assert not {"first_batch", "last_batch", "picture"} & metadata.keys()


def test_a_load_that_left_the_rest_to_another_loader_says_so() -> None:
    engine = MemoryEngine()
    report = replace(engine.ingest(TELEMATICS), yielded=True)
    assert "faster" in load_metadata(engine, TELEMATICS, report)["yielded"]


def test_a_stream_without_positions_has_no_picture() -> None:
    engine = MemoryEngine()
    engine.volume.put("trips/a.json", json_bytes([{"trip_id": "1", "latitude": "48"}]))
    assert "picture" not in loaded(engine, FileStream("trips", "json", "trips", "trips", TableContract("One trip.")))


def test_a_load_does_not_fail_for_what_it_cannot_show() -> None:
    class Unreadable(MemoryEngine):
        def read(
            self,
            table: TableName,
            columns: Sequence[str] | None = None,
            limit: int | None = None,
            since_batch: int | None = None,
        ) -> pa.Table:
            raise VolumeUnavailableError("the table did not answer")

    engine = Unreadable()
    engine.volume.put("parquet/a.parquet", parquet_points(2))
    metadata = loaded(engine, TELEMATICS)
    assert metadata["rows"] == 2
    assert metadata["not_shown"] == "the table did not answer"


def test_a_picture_of_many_points_is_small_enough_for_the_event_log() -> None:
    image = picture(positions(5_000))
    assert len(image) < EVENT_LOG_LIMIT
    assert _size(image) == (640, 256)


def test_wild_values_do_not_squeeze_the_picture() -> None:
    wild = pa.table({"longitude": [1e300, math.nan, 11.5], "latitude": [0.0, 1.0, None], "speed_kmh": [math.inf] * 3})
    clean = positions(50)
    assert picture(pa.concat_tables([clean, wild])) == picture(clean)


def test_without_matplotlib_the_metadata_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert 'pip install "telematics_assets[plots]"' in picture(positions(3))


def test_a_preview_keeps_its_table_whatever_the_values_are() -> None:
    nasty = ["a|b", "line\nbreak", "`code`", "<script>", "x" * 500, None, "back\\slash|"]
    text = preview(pa.table({"odd | name": nasty, "bytes": [b"\xff|"] * 7}))
    lines = text.split("\n")
    assert len(lines) == 2 + len(nasty)
    assert {_cells(line) for line in lines} == {2}
    assert "<script>" not in text
    assert max(map(len, lines)) < 120


def test_a_preview_shows_times_that_python_does_not_know() -> None:
    times = pa.array([2**62, 0], pa.int64()).cast(pa.timestamp("us", "UTC"))
    assert "17036-07-06" not in preview(pa.table({"at": times.slice(1)}))
    assert "17036-07-06" in preview(pa.table({"at": times}))
    nested = pa.ListArray.from_arrays([0, 2], times)
    assert "(not shown)" in preview(pa.table({"at": nested}))


@pytest.mark.parametrize(("lines", "shown", "last"), [(1, 1, "f0"), (50, 50, "f49"), (51, 51, "… and 1 more")])
def test_a_long_listing_is_cut_and_counted(lines: int, shown: int, last: str) -> None:
    records = listing([{"path": f"f{number}", "rows": number} for number in range(lines)]).records
    assert len(records) == shown
    assert records[-1].data["path"] == last


def test_an_observation_tells_how_old_the_oldest_file_is() -> None:
    pending = PendingFiles("s", 1, 10, "f", 0, 0, 0, "v", oldest_modified_ns=1_700_000_000_000_000_000)
    assert pending_metadata(pending)["oldest_pending"] == dg.MetadataValue.timestamp(1_700_000_000.0)


def _size(markdown: str) -> tuple[int, int]:
    from PIL import Image

    encoded = markdown.partition("base64,")[2].removesuffix(")")
    return Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))).size


def _cells(line: str) -> int:
    """Cells of a Markdown table's line, by the bars that are not escaped."""
    assert line.startswith("| ")
    assert line.endswith(" |")
    plain = line.replace("\\\\", "").replace("\\|", "")
    return plain.count("|") - 1
