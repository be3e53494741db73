"""A disk or a network that fails in the middle of a file: nobody blames the file, and the next load takes all of it."""

from __future__ import annotations

import bz2
import gzip
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import pyarrow as pa
import pytest

from telematics_assets.catalog import FileStream
from telematics_assets.engines.checkpointed import CheckpointEngine
from telematics_assets.errors import VolumeUnavailableError
from telematics_assets.volumes.local import LocalVolume
from telematics_assets_tests.conformance.platforms import LOCATION, DeltaPlatform
from telematics_assets_tests.conformance.samples import csv_stream, json_stream, parquet, parquet_stream

ROWS = 3000
RECORDS = b"".join(b'{"n":"%06d"}\n' % n for n in range(ROWS))
NUMBERS = [f"{n:06}" for n in range(ROWS)]

#: A stream and a file that is longer than what is read at once before the disk dies.
FILES: dict[str, tuple[FileStream, bytes]] = {
    "json": (json_stream("n"), RECORDS),
    "json document": (json_stream("n", multi_line=True), b"[" + RECORDS[:-1].replace(b"\n", b",") + b"]"),
    "gzip": (json_stream("n"), gzip.compress(RECORDS, 0)),
    "bzip2": (json_stream("n"), bz2.compress(RECORDS)),
    "zstd": (json_stream("n"), bytes(pa.compress(RECORDS, "zstd", asbytes=True))),
    "csv": (csv_stream("n"), b"n\n" + RECORDS.replace(b'{"n":"', b"").replace(b'"}', b"")),
    "parquet": (parquet_stream(), parquet(n=NUMBERS)),
}


class DyingVolume(LocalVolume):
    """A disk that dies under a reader: at once, or after it gave the first bytes."""

    at_once = False

    @contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        with super().open(path) as source:
            if not path.startswith("_"):
                if not self.at_once:
                    source.read(1)
                    source.seek(0)
                read_end, write_end = os.pipe()
                os.dup2(write_end, source.fileno())
                os.close(read_end)
                os.close(write_end)
            yield source


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("at_once", [True, False])
def test_a_disk_that_fails_under_a_reader_is_transient_and_nothing_is_lost(
    delta_platform: DeltaPlatform, kind: str, at_once: bool
) -> None:
    stream, data = FILES[kind]
    delta_platform.volume_put(f"{stream.folder}/a", data)
    volume = DyingVolume(delta_platform.at(""), LOCATION)
    volume.at_once = at_once
    dying = delta_platform.engine_over(volume)
    for _ in range(2):
        with pytest.raises(VolumeUnavailableError, match=r"/a: .*It may go through later"):
            dying.ingest(stream)
    report = delta_platform.restart().ingest(stream)
    assert (report.rows, report.files_skipped) == (ROWS, 0)
    assert [row["n"] for row in delta_platform.rows(stream, "n")] == NUMBERS


def test_a_young_file_that_can_not_be_looked_into_is_no_unfinished_one(delta_platform: DeltaPlatform) -> None:
    stream, data = FILES["json"]
    delta_platform.volume_put("json/a", data)
    volume = DyingVolume(delta_platform.at(""), LOCATION)
    volume.at_once = True
    ask: list[Callable[[CheckpointEngine], object]] = [lambda e: e.look(stream), lambda e: e.files(stream)]
    for question in ask:
        engine = delta_platform.engine_over(volume, incomplete_seconds=300)
        with pytest.raises(VolumeUnavailableError):
            question(engine)
