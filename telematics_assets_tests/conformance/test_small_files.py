"""Many small Parquet files, which are read together: all is as if each had been read alone, odd ones among them too."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telematics_assets.autoloader import reading
from telematics_assets.catalog import Column, FileStream, Names
from telematics_assets.engines.embedded import EmbeddedEngine
from telematics_assets.errors import SchemaError
from telematics_assets.testing import MemoryLakehouse, MemoryVolume
from telematics_assets.volumes.local import LocalVolume
from telematics_assets_tests.conformance.platforms import LOCATION, CheckpointPlatform, Moment
from telematics_assets_tests.conformance.samples import parquet, parquet_stream

CROWD = 20
WHEN = 1_700_000_000_000_000_000


def damaged() -> bytes:
    """A file with a page whose checksum is wrong."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"n": [1, 2, 3]}), buffer, write_page_checksum=True, use_dictionary=False)
    content = bytearray(buffer.getvalue())
    metadata = pq.ParquetFile(io.BytesIO(bytes(content))).metadata.row_group(0).column(0)
    content[metadata.data_page_offset + metadata.total_compressed_size - 1] ^= 1
    return bytes(content)


#: Contents of files: alike, drifted in some way, or none that can be read.
KINDS: dict[str, bytes] = {
    "plain": parquet(n=[1, 2], text=["a", None]),
    "more rows": parquet(n=range(50), text=["b"] * 50),
    "null": parquet(n=[3], text=pa.nulls(1, pa.string())),
    "new column": parquet(n=[4], text=["c"], extra=[1.5]),
    "other type": parquet(n=["five"], text=["d"]),
    "wider": parquet(n=[2.5], text=["e"]),
    "other case": parquet(N=[6], text=["f"]),
    "nested": parquet(n=[7], list=[[1, 2]]),
    "nanoseconds": parquet(n=[8], at=pa.array([1, 2000], pa.timestamp("ns", "UTC")).slice(0, 1)),
    "no rows": parquet(n=pa.array([], pa.int64())),
    "empty": b"",
    "cut short": parquet(n=[9], text=["g"])[:-3],
    "no file at all": b"PAR1 is no file PAR1",
    "bad checksum": damaged(),
}
ALIKE = ["plain", "more rows", "null"]
DRIFT = [name for name in KINDS if name not in ALIKE]
MODES = ["addNewColumns", "rescue", "failOnNewColumns", "none"]
EXAMPLES = max(10, settings().max_examples // 4)


def loaded(stream: FileStream, waves: list[list[str]], *, together: bool) -> Any:
    """The table, what it looks like, and the state of each file, after some loads."""
    volume = MemoryVolume(LOCATION)
    engine = EmbeddedEngine(volume, MemoryLakehouse(), Names(), settle_seconds=0, incomplete_seconds=0)
    reports: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "TOGETHER_LEAST", 2 if together else 1_000_000)
        for wave, kinds in enumerate(waves):
            for number, kind in enumerate(kinds):
                volume.put(f"parquet/{wave}-{number:03}", KINDS[kind], modified_ns=WHEN + number)
            try:
                report = engine.ingest(stream)
                reports.append((report.rows, report.rows_rescued, report.files_ingested, report.files_skipped))
            except SchemaError as error:
                reports.append(str(error))
    state = engine.state(Names().bronze(stream.table))
    if state is None:
        return reports
    table = engine.read(Names().bronze(stream.table)).drop_columns("_ingested_at")
    files = [(f.path, f.state, f.reason, f.batch_id) for f in engine.files(stream)]
    return reports, table.to_pylist(), state.columns, sorted(files)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", DRIFT)
def test_what_stands_among_files_that_are_alike_is_the_same_alone(kind: str, mode: str) -> None:
    waves = [["plain", kind, "more rows", "plain", "null", *[kind] * 5, "plain"], ["plain"] * 5]
    stream = parquet_stream(schema_evolution_mode=mode)
    assert loaded(stream, waves, together=True) == loaded(stream, waves, together=False)


@settings(max_examples=EXAMPLES)
@given(
    st.lists(
        st.lists(st.one_of(st.sampled_from(ALIKE), st.sampled_from(DRIFT)), min_size=5, max_size=16),
        min_size=1,
        max_size=2,
    ),
    st.sampled_from(MODES),
    st.booleans(),
)
def test_read_together_or_alone_all_is_the_same(waves: list[list[str]], mode: str, declared: bool) -> None:
    columns = (Column("n", "BIGINT", "A number."), Column("text", "STRING", "A text.")) if declared else ()
    stream = parquet_stream(*columns, schema_evolution_mode=mode)
    assert loaded(stream, waves, together=True) == loaded(stream, waves, together=False)


class Watching(LocalVolume):
    """A folder that notes which of the landed files are opened by themselves."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, LOCATION)
        self.opened: list[str] = []

    @contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        if path.startswith("parquet/"):
            self.opened.append(path)
        with super().open(path) as source:
            yield source


def test_only_what_is_odd_in_a_crowd_is_opened_by_itself(tmp_path: Path) -> None:
    volume = Watching(tmp_path)
    engine = EmbeddedEngine(volume, MemoryLakehouse(), Names(), settle_seconds=0, incomplete_seconds=0)
    for number in range(CROWD):
        volume.create(f"parquet/{number:02}", KINDS["nested" if number == 9 else "plain"])
    stream = parquet_stream(Column("n", "BIGINT", "A number."))
    assert engine.ingest(stream).files_ingested == CROWD
    assert set(volume.opened) == {"parquet/00", "parquet/09"}


def began(platform: CheckpointPlatform, **odd: bytes) -> FileStream:
    """One load has made the table; a crowd of alike files has landed since, and some others among them."""
    stream = parquet_stream()
    platform.volume_put("parquet/0", parquet(n=[-1]))
    platform.engine.ingest(stream)
    for number in range(CROWD):
        name = f"f{number:02}"
        platform.volume_put(f"parquet/{name}", odd.get(name, parquet(n=[number])), WHEN + number)
    return stream


def test_a_crowd_lands_in_order_each_row_with_its_own_file(checkpoint_platform: CheckpointPlatform) -> None:
    stream = began(checkpoint_platform)
    (batch,) = checkpoint_platform.engine.ingest(stream).batches
    assert (batch.files_ingested, batch.rows) == (CROWD, CROWD)
    rows = checkpoint_platform.rows(stream, "n", "_source_file")[1:]
    assert [(row["n"], row["_source_file"][-3:]) for row in rows] == [(n, f"f{n:02}") for n in range(CROWD)]


def test_a_damaged_page_in_a_crowd_is_named_and_holds_up_no_other(checkpoint_platform: CheckpointPlatform) -> None:
    stream = began(checkpoint_platform, f07=damaged(), f12=b"")
    report = checkpoint_platform.engine.ingest(stream)
    assert (report.files_ingested, report.files_skipped, report.rows) == (CROWD - 2, 2, CROWD - 2)
    states = checkpoint_platform.states(stream)
    assert [name for name, state in states.items() if state == "SKIPPED_CORRUPTED"] == ["f07", "f12"]
    assert "checksum" in checkpoint_platform.reason(stream, "f07").lower()


@pytest.mark.parametrize("moment", ["open", "read", "close"])
@pytest.mark.parametrize("drift", [False, True], ids=["", "drift"])
def test_a_file_of_a_crowd_that_changes_meanwhile_leaves_its_batch(
    checkpoint_platform: CheckpointPlatform, moment: Moment, drift: bool
) -> None:
    platform = checkpoint_platform
    stream = began(platform, **({"f15": parquet(n=[15], new=[1])} if drift else {}))
    platform.meddle("parquet/f07", moment, lambda: platform.volume_put("parquet/f07", parquet(n=[7, 77])))
    report = platform.engine.ingest(stream)
    assert (report.files_ingested, report.rows, report.files_skipped) == (CROWD - 1, CROWD - 1, 0)
    assert platform.states(stream)["f07"] == "DISCOVERED"
    assert platform.restart().ingest(stream).rows == 2
    found = [row["n"] for row in platform.rows(stream, "n")]
    assert found == sorted([-1, *range(CROWD), 77])


def test_a_file_of_a_crowd_that_vanishes_is_missing_by_name(checkpoint_platform: CheckpointPlatform) -> None:
    platform = checkpoint_platform
    stream = began(platform)
    platform.meddle("parquet/f07", "read", lambda: platform.remove("parquet/f07"))
    (batch,) = platform.engine.ingest(stream).batches
    assert [(skipped.path, skipped.state) for skipped in batch.skipped] == [("parquet/f07", "SKIPPED_MISSING")]
    assert batch.rows == CROWD - 1


def test_a_crowd_with_a_new_column_is_refused_by_the_name_of_the_first(checkpoint_platform: CheckpointPlatform) -> None:
    stream = began(checkpoint_platform, **{f"f{n:02}": parquet(n=[n], new=[n]) for n in range(10, 20)})
    with pytest.raises(SchemaError, match="parquet/f10"):
        checkpoint_platform.engine.ingest(stream.with_options(schema_evolution_mode="failOnNewColumns"))
