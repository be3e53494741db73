"""No file is cleaned unless its rows are committed and old enough and the file unchanged, whatever happens when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telematics_assets.catalog import Column, FileStream, FileStreamOptions, TableContract, interval_ns
from telematics_assets.errors import OptionError
from telematics_assets.testing import MemoryEngine, json_bytes

DAY = 86_400_000_000_000
START = 1_000 * DAY


def stream(**options: Any) -> FileStream:
    """A stream of the folder `json`."""
    contract = TableContract("Rows.", (Column("n", "STRING", "A number."),))
    return FileStream("s", "json", "json", "s", contract, options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "days"),
    [
        ("14 days", 14),
        ("1 day", 1),
        ("0 days", 0),
        ("interval 2 weeks", 14),
        ("24 HOURS", 1),
        ("1 day 24 hours", 2),
    ],
)
def test_intervals_are_read_as_spark_writes_them(text: str, days: int) -> None:
    assert interval_ns("option", text) == days * DAY


@pytest.mark.parametrize("text", ["", "7", "days", "-7 days", "7 days ago", "7.5 days", "1 month", None, 7])
def test_what_is_no_interval_is_named(text: Any) -> None:
    with pytest.raises(OptionError, match=r"clean_source_retention_duration=.*Use an interval"):
        FileStreamOptions(clean_source_retention_duration=text).clean_source_retention_ns  # noqa: B018


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"clean_source": "ON"}, "OFF, DELETE, MOVE"),
        ({"clean_source": "DELETE", "clean_source_retention_duration": "6 days 23 hours"}, "at least '7 days'"),
        ({"clean_source": "DELETE", "clean_source_retention_duration": "soon"}, "Use an interval"),
        ({"clean_source": "MOVE"}, "needs clean_source_move_destination"),
        ({"clean_source": "MOVE", "clean_source_move_destination": "json/done"}, "found again"),
        ({"clean_source": "MOVE", "clean_source_move_destination": "json"}, "found again"),
        ({"clean_source": "MOVE", "clean_source_move_destination": "_checkpoints/s"}, "the loader's own"),
        ({"clean_source": "MOVE", "clean_source_move_destination": "/Volumes/a"}, "inside the Volume"),
        ({"clean_source": "MOVE", "clean_source_move_destination": "a/../json"}, "inside the Volume"),
    ],
)
def test_settings_that_could_lose_a_file_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(Exception, match=says):
        stream(**options)


def test_a_destination_that_holds_the_streams_folder_is_refused() -> None:
    with pytest.raises(OptionError, match="folder 'in/json' is in it"):
        FileStream(
            "s",
            "json",
            "in/json",
            "s",
            TableContract("Rows."),
            {"clean_source": "MOVE", "clean_source_move_destination": "in"},  # type: ignore[arg-type]
        )


def test_accepted_settings() -> None:
    assert stream().options.clean_source == "OFF"
    assert stream(clean_source="DELETE").options.clean_source_retention_ns == 30 * DAY
    moved = {"clean_source_move_destination": "_archive/s", "clean_source_retention_duration": "0 seconds"}
    assert stream(clean_source="MOVE", **moved).options.clean_source_retention_ns == 0


@dataclass
class _Version:
    data: bytes
    modified_ns: int
    loaded_ns: int | None = None


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("land"), st.integers(0, 3), st.integers(-20, 10)),
        st.tuples(st.just("load"), st.just(0), st.just(0)),
        st.tuples(st.just("maintain"), st.just(0), st.just(0)),
        st.tuples(st.just("clock"), st.integers(-15, 20), st.just(0)),
        st.tuples(st.just("remove"), st.integers(0, 3), st.just(0)),
    ),
    min_size=3,
    max_size=14,
)


@given(steps=_STEPS, action=st.sampled_from(["MOVE", "DELETE"]), overwrites=st.booleans())
def test_a_file_is_only_cleaned_when_it_is_committed_old_and_unchanged(
    steps: list[tuple[str, int, int]], action: str, overwrites: bool
) -> None:
    clock = [START]
    engine = MemoryEngine(clock=lambda: clock[0])
    target = {"clean_source_move_destination": "_archive"} if action == "MOVE" else {}
    loaded_by = stream(
        clean_source=action, clean_source_retention_duration="7 days", allow_overwrites=overwrites, **target
    )
    there: dict[str, _Version] = {}
    latest = 0
    number = 0
    for step, value, days in steps:
        if step == "land":
            number += 1
            path, data = f"json/{value}.json", json_bytes([{"n": number}])
            version = _Version(data, clock[0] + days * DAY + number)
            engine.volume.put(path, data, modified_ns=version.modified_ns)
            there[path] = version
        elif step == "clock":
            clock[0] += value * DAY
        elif step == "remove":
            engine.volume.delete(f"json/{value}.json")
            there.pop(f"json/{value}.json", None)
        elif step == "load":
            report = engine.ingest(loaded_by)
            if report.batches:
                latest = max(latest, clock[0])
                rows = engine.read(engine.names.bronze("s"), ["n"]).column("n").to_pylist()
                for version in there.values():
                    if version.loaded_ns is None and any(f'"n": {n}}}'.encode() in version.data for n in rows):
                        version.loaded_ns = latest
        else:
            engine.maintain(loaded_by)
        left = set(engine.volume.scan("json").files["path"])
        for path in set(there) - left:
            version = there.pop(path)
            assert version.loaded_ns is not None, "its rows are in the table"
            assert clock[0] - max(version.loaded_ns, version.modified_ns) >= 7 * DAY, "it is old enough"
            if action == "MOVE":
                names = engine.volume.names("_archive")
                assert version.data in [engine.volume.read(f"_archive/{name}") for name in names]
        for path in left:
            assert engine.volume.read(path) == there[path].data, "what stays is untouched"
