"""Packed files: gzip, bzip2 and Zstandard by their first bytes; what can't be unpacked whole is quarantined whole."""

from __future__ import annotations

import bz2
import gzip
from collections.abc import Callable

import pyarrow as pa
import pytest

from telematics_assets.catalog import FileStream
from telematics_assets_tests.conformance.platforms import Platform
from telematics_assets_tests.conformance.samples import csv_stream, json_stream
from telematics_assets_tests.turns import SPARINGLY


def zstd(data: bytes) -> bytes:
    packed: bytes = pa.Codec("zstd").compress(data, asbytes=True)
    return packed


PACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "bzip2": bz2.compress, "zstd": zstd}
STREAMS: dict[str, tuple[FileStream, bytes]] = {
    "lines": (json_stream("n"), b'{"n":1}\n{"n":2}\n'),
    "document": (json_stream("n", multi_line=True), b'[{"n":1},\n{"n":2}]'),
    "csv": (csv_stream("n"), b"n\n1\n2\n"),
}


@pytest.mark.parametrize("shape", STREAMS)
def test_a_packed_file_is_read_like_a_plain_one_whatever_its_name(platform: Platform, shape: str) -> None:
    stream, data = STREAMS[shape]
    platform.volume_put(f"{stream.folder}/plain.gz", data)
    for name, pack in PACK.items():
        platform.volume_put(f"{stream.folder}/{name}", pack(data))
        platform.volume_put(f"{stream.folder}/{name}.two", pack(data[:7]) + pack(data[7:]))
    report = platform.engine.ingest(stream)
    assert (report.rows, report.rows_corrupt, report.files_skipped) == (14, 0, 0)
    assert [row["n"] for row in platform.rows(stream, "n")] == ["1"] * 7 + ["2"] * 7


@pytest.mark.parametrize("shape", STREAMS)
def test_a_damaged_packed_file_brings_no_row_and_the_others_land(platform: Platform, shape: str) -> None:
    stream, data = STREAMS[shape]
    for name, pack in PACK.items():
        platform.volume_put(f"{stream.folder}/{name}.cut", pack(data)[:-3])
        platform.volume_put(f"{stream.folder}/{name}.junk", pack(data) + b"junk")
    platform.volume_put(f"{stream.folder}/good", data)
    report = platform.engine.ingest(stream)
    assert (report.rows, report.files_skipped) == (2, 6)
    assert platform.states(stream) == {
        "good": "INGESTED",
        **{f"{name}.{damage}": "SKIPPED_CORRUPTED" for name in PACK for damage in ("cut", "junk")},
    }
    assert "bzip2 file that can't be unpacked to its end" in platform.reason(stream, "bzip2.junk")


@pytest.mark.parametrize("shape", STREAMS)
def test_a_packed_file_that_is_still_being_written_waits(platform: Platform, shape: str) -> None:
    stream, data = STREAMS[shape]
    engine = platform.restart(incomplete_seconds=300)
    for name, pack in PACK.items():
        platform.volume_put(f"{stream.folder}/{name}", pack(data)[:-3])
    report = engine.ingest(stream)
    assert (report.rows, report.files_waiting) == (0, 3)
    for name, pack in PACK.items():
        platform.volume_put(f"{stream.folder}/{name}", pack(data))
    assert engine.ingest(stream).rows == 6


@SPARINGLY
def test_far_more_than_memory_should_hold_is_unpacked_piece_by_piece(platform: Platform) -> None:
    stream = json_stream("n")
    for name, pack in PACK.items():
        # Blank lines are no rows: 192 MiB of them fit into a few kB.
        platform.volume_put(f"json/{name}", pack(b"\n" * (64 << 20)) + pack(b'{"n":1}\n'))
        platform.volume_put(f"json/{name}.long", pack(b" " * (64 << 20)))
    report = platform.engine.ingest(stream)
    assert (report.rows, report.files_ingested, report.files_skipped) == (3, 3, 3)
    assert "16777216 bytes" in platform.reason(stream, "zstd.long")
