"""What Spark's tasks do, without Spark: what they refuse to commit behind, and what they tell the driver."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from telematics_assets.autoloader.reading import first_schema
from telematics_assets.engines.spark.tasks import (
    FAILED,
    OVERTAKEN,
    SURPRISED,
    Pass,
    SurpriseError,
    dealt,
    told,
)
from telematics_assets.errors import TableMovedError, TransientError, VolumeUnavailableError
from telematics_assets.lakehouse.base import POSITIONS_INFO
from telematics_assets.testing import MemoryVolume
from telematics_assets.volumes.base import FileEntry
from telematics_assets_tests.conformance.platforms import LOCATION
from telematics_assets_tests.conformance.samples import json_stream, lines

STREAM = json_stream("n")
PATH = "json/a.json"


class Failing(MemoryVolume):
    """A Volume whose disk has died."""

    def stat(self, path: str) -> FileEntry | None:
        raise VolumeUnavailableError(f"{path}: Input/output\nerror")


def run(log: Path, volume: MemoryVolume | None = None) -> list[dict[str, Any]]:
    """Run a pass over one file for version 1 of a table."""
    there = MemoryVolume(LOCATION)
    there.put(PATH, lines('{"n":1}'))
    file = there.stat(PATH)
    assert file is not None
    schema = first_schema(there, STREAM, (file,))
    entry = str(log / f"{1:020d}.json")
    reading = Pass(volume or there, STREAM, schema, schema, 0, 0, {}, (), None, entry, "mine")
    rows: list[dict[str, Any]] = pa.Table.from_batches(reading.rows()(iter(dealt([file], 1).to_batches()))).to_pylist()
    return rows


def log(folder: Path, *behind: dict[str, Any]) -> Path:
    """A log at version 1, and an entry behind it."""
    for version, actions in enumerate([[], [], behind] if behind else [[], []]):
        (folder / f"{version:020d}.json").write_text("".join(json.dumps(action) + "\n" for action in actions))
    return folder


@pytest.mark.parametrize(
    "behind",
    [
        (),
        ({"add": {"path": "x"}}, {"txn": {"appId": "theirs", "version": 9}}, {"commitInfo": {"userMetadata": "hello"}}),
        ({"remove": {"path": "x", "dataChange": False}}, {"commitInfo": {"userMetadata": "[1]"}}),
    ],
    ids=["nothing", "an append", "a compaction"],
)
def test_a_pass_goes_behind_what_takes_nothing_away(tmp_path: Path, behind: tuple[dict[str, Any], ...]) -> None:
    assert [row["n"] for row in run(log(tmp_path, *behind))] == ["1"]


@pytest.mark.parametrize(
    "behind",
    [
        {"remove": {"path": "x", "dataChange": True}},
        {"txn": {"appId": "mine", "version": 9}},
        {"commitInfo": {"userMetadata": json.dumps({POSITIONS_INFO: json.dumps({"theirs": 1, "mine": 9})})}},
    ],
    ids=["rows gone", "same position", "same position beside another"],
)
def test_a_pass_does_not_go_behind_what_concerns_it(tmp_path: Path, behind: dict[str, Any]) -> None:
    with pytest.raises(SurpriseError, match=OVERTAKEN):
        run(log(tmp_path, behind))


def test_a_pass_begins_no_table_where_one_was_dropped(tmp_path: Path) -> None:
    with pytest.raises(SurpriseError) as caught:
        run(tmp_path)
    error = told(f"Job aborted:\n  SurpriseError: {caught.value}\n\tat org.apache.spark")
    assert isinstance(error, TableMovedError)
    assert "is not there any more" in str(error)


def test_an_error_of_a_task_reaches_the_driver_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(SurpriseError) as caught:
        run(log(tmp_path), Failing(LOCATION))
    error = told(f"PythonException: {caught.value}\n  more")
    assert isinstance(error, VolumeUnavailableError)
    assert str(error) == f"{PATH}: Input/output\nerror"
    assert pickle.loads(pickle.dumps(error)).transient


def test_what_is_no_error_of_ours_is_not_taken_for_one() -> None:
    assert told(SURPRISED) is None
    assert told(f"{FAILED}oops") is None
    strange = told(FAILED + json.dumps(["os", True, "gone"]))
    assert (type(strange), str(strange)) == (TransientError, "gone")
