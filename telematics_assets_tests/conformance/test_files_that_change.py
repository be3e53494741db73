"""Files that vanish, grow or are overwritten: before they are read, while they are, and after they were ingested."""

from __future__ import annotations

import pytest

from telematics_assets.catalog import FileStream
from telematics_assets.engines.base import SkippedFile
from telematics_assets_tests.conformance.platforms import CheckpointPlatform, DeltaPlatform, Moment, Platform
from telematics_assets_tests.conformance.samples import json_stream, lines, parquet, parquet_stream

#: When a file of a plan changes: before it is opened, after its first bytes were read, after it was closed. If another
#: file of the batch brings a new column, files are read twice.
MOMENTS: list[tuple[str, Moment, int]] = [
    (format, *moment)
    for format in ("json", "parquet")
    for moment in (("open", 1), ("read", 1), ("close", 1), ("close", 2))
]


def stream_of(format: str) -> FileStream:
    """A stream of that format."""
    return parquet_stream() if format == "parquet" else json_stream()


def content(format: str, *values: int, column: str = "n") -> bytes:
    """A file with these values of `n`, or of another column."""
    if format == "parquet":
        return parquet({column: list(values)})
    return lines(*(f'{{"{column}":{value}}}' for value in values))


def began(platform: CheckpointPlatform, format: str, *, drift: bool = False) -> FileStream:
    """One load has made the table; three files have landed since, and one that brings a column if asked for."""
    stream = stream_of(format)
    platform.volume_put(f"{format}/first", content(format, 0))
    platform.engine.ingest(stream)
    for number, name in enumerate("abc", 1):
        platform.volume_put(f"{format}/{name}", content(format, number), number)
    if drift:
        platform.volume_put(f"{format}/drift", content(format, 1, column="new"), 4)
    return stream


def values(platform: Platform, stream: FileStream) -> list[str]:
    """What `n` is in the table's rows, where it is."""
    return [str(row["n"]) for row in platform.rows(stream, "n") if row["n"] is not None]


@pytest.mark.parametrize(("format", "moment", "nth"), MOMENTS)
def test_a_file_that_vanishes_leaves_its_batch_and_is_loaded_when_it_is_back(
    checkpoint_platform: CheckpointPlatform, format: str, moment: Moment, nth: int
) -> None:
    platform = checkpoint_platform
    drift = nth == 2
    stream = began(platform, format, drift=drift)
    platform.meddle(f"{format}/b", moment, lambda: platform.remove(f"{format}/b"), nth)
    report = platform.engine.ingest(stream)
    (batch,) = report.batches
    assert (batch.files_ingested, batch.rows) == (2 + drift, 2 + drift)
    assert batch.skipped == (SkippedFile(f"{format}/b", "SKIPPED_MISSING", platform.reason(stream, "b")),)
    assert "vanished" in platform.reason(stream, "b")
    assert platform.restart().ingest(stream).batches == ()
    platform.volume_put(f"{format}/b", content(format, 2), 2)
    assert platform.engine.ingest(stream).rows == 1
    assert values(platform, stream) == ["0", "1", "2", "3"]
    assert set(platform.states(stream).values()) == {"INGESTED"}


@pytest.mark.parametrize(
    ("format", "moment", "nth", "become"),
    [
        (*moment, become)
        for moment in MOMENTS
        for become in ("other", "longer", "damaged")
        if become == "longer" or moment[1:] == ("close", 1)
    ],
)
def test_a_file_that_is_overwritten_meanwhile_leaves_its_batch_and_is_loaded_as_it_is_then(
    checkpoint_platform: CheckpointPlatform, format: str, moment: Moment, nth: int, become: str
) -> None:
    platform = checkpoint_platform
    drift = nth == 2
    stream = began(platform, format, drift=drift)
    new = {"other": content(format, 9), "longer": content(format, 2, 9), "damaged": b"\x1f\x8bPAR"}[become]
    platform.meddle(f"{format}/b", moment, lambda: platform.volume_put(f"{format}/b", new), nth)
    report = platform.engine.ingest(stream)
    assert (report.files_ingested, report.rows, report.files_skipped) == (2 + drift, 2 + drift, 0)
    assert platform.states(stream)["b"] == "DISCOVERED"
    assert platform.engine.look(stream).files == 1
    again = platform.restart().ingest(stream)
    assert (again.files_ingested, again.files_skipped) == ((0, 1) if become == "damaged" else (1, 0))
    expected = {"other": ["0", "1", "3", "9"], "longer": ["0", "1", "2", "3", "9"], "damaged": ["0", "1", "3"]}[become]
    assert values(platform, stream) == expected


def test_a_large_file_that_changes_after_its_first_rows_were_passed_on_brings_none_of_them(
    checkpoint_platform: CheckpointPlatform,
) -> None:
    platform = checkpoint_platform
    stream = json_stream("n", "text")
    platform.volume_put("json/first", lines('{"n":0}'))
    platform.engine.ingest(stream)
    large = f'{{"n":1,"text":"{"x" * 100_000}"}}\n'.encode() * 1200
    platform.volume_put("json/a", large, 1)
    platform.volume_put("json/b", lines('{"n":2}'), 2)
    platform.meddle("json/a", "close", lambda: platform.volume_put("json/a", lines('{"n":3}')))
    assert platform.engine.ingest(stream).rows == 1
    assert platform.engine.ingest(stream).rows == 1
    assert [row["n"] for row in platform.rows(stream, "n")] == ["0", "2", "3"]


def test_a_file_that_somebody_appends_to_while_it_is_read_brings_all_or_nothing(delta_platform: DeltaPlatform) -> None:
    stream = began(delta_platform, "json")

    def append() -> None:
        with delta_platform.at("json/b").open("ab") as file:
            file.write(content("json", 9))

    delta_platform.meddle("json/b", "read", append)
    assert delta_platform.engine.ingest(stream).rows == 2
    assert values(delta_platform, stream) == ["0", "1", "3"]
    assert delta_platform.restart().ingest(stream).rows == 2
    assert values(delta_platform, stream) == ["0", "1", "2", "3", "9"]


def test_an_ingested_file_that_changes_is_reported_and_not_loaded_again(platform: Platform) -> None:
    stream = parquet_stream()
    for name, value in (("longer", 1), ("touched", 2), ("damaged", 3), ("gone", 4), ("same", 5)):
        platform.volume_put(f"parquet/{name}", parquet(n=[value]), 1_000_000_000)
    assert platform.engine.ingest(stream).files_changed == 0
    platform.volume_put("parquet/longer", parquet(n=[1, 7, 8, 9]), 1_000_000_000)
    platform.volume_put("parquet/touched", parquet(n=[2]), 2_000_000_000)
    platform.volume_put("parquet/damaged", b"oops")
    platform.remove("parquet/gone")
    platform.volume_put("parquet/same", parquet(n=[5]), 1_000_000_000)
    platform.volume_put("parquet/new", parquet(n=[6]))
    report = platform.restart().ingest(stream)
    assert (report.files_ingested, report.files_changed) == (1, 3)
    assert [row["n"] for row in platform.rows(stream, "n")] == [1, 2, 3, 4, 5, 6]
    assert platform.states(stream) == {
        "longer": "CHANGED",
        "touched": "CHANGED",
        "damaged": "CHANGED",
        "gone": "INGESTED",
        "same": "INGESTED",
        "new": "INGESTED",
    }
    assert "its new content is not loaded" in platform.reason(stream, "longer")
    pending = platform.engine.look(stream)
    assert (pending.files, pending.changed) == (0, 3)
    platform.volume_put("parquet/touched", parquet(n=[2]), 1_000_000_000)
    assert platform.states(stream)["touched"] == "INGESTED"


def test_a_file_that_vanished_before_it_was_planned_was_never_there(platform: Platform) -> None:
    stream = json_stream()
    platform.volume_put("json/a.json", lines('{"n":1}'))
    assert platform.engine.look(stream).files == 1
    platform.remove("json/a.json")
    assert platform.engine.ingest(stream).batches == ()
    assert platform.states(stream) == {}


def test_a_file_that_grows_in_place_after_it_was_ingested_is_changed(platform: Platform) -> None:
    stream = json_stream()
    platform.volume_put("json/log.json", lines('{"n":1}'), 1)
    platform.engine.ingest(stream)
    platform.volume_put("json/log.json", lines('{"n":1}', '{"n":2}'), 2)
    platform.restart().ingest(stream)
    assert platform.states(stream) == {"log.json": "CHANGED"}
    assert platform.rows(stream, "n") == [{"n": "1"}]


@pytest.mark.parametrize("format", ["parquet", "json"])
def test_files_that_change_under_a_pending_plan(checkpoint_platform: CheckpointPlatform, format: str) -> None:
    platform = checkpoint_platform
    stream = began(platform, format)

    def die() -> None:
        raise KeyboardInterrupt

    platform.meddle(f"{format}/c", "close", die)
    with pytest.raises(KeyboardInterrupt):
        platform.engine.ingest(stream)
    platform.remove(f"{format}/a")
    platform.volume_put(f"{format}/b", content(format, 2, 9))
    platform.restart()
    assert "planned in batch 1" in platform.reason(stream, "c")
    assert platform.engine.look(stream).files == 3
    report = platform.engine.ingest(stream)
    assert [(b.batch_id, b.files_ingested, len(b.skipped)) for b in report.batches] == [(1, 1, 1)]
    platform.engine.ingest(stream)
    assert values(platform, stream) == ["0", "2", "3", "9"]
    assert platform.states(stream) == {"first": "INGESTED", "a": "SKIPPED_MISSING", "b": "INGESTED", "c": "INGESTED"}
