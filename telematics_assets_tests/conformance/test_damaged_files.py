"""Files that are empty, cut, half-written or no data at all: quarantined by name, and the good ones land."""

from __future__ import annotations

import gzip
import time

from telematics_assets.catalog import Column
from telematics_assets.engines.base import SkippedFile
from telematics_assets_tests.conformance.platforms import Platform
from telematics_assets_tests.conformance.samples import json_stream, lines, parquet, parquet_stream

GOOD = parquet(n=[1, 2, 3])
HOUR_NS = 3_600_000_000_000


def test_good_files_of_a_bad_batch_land_and_bad_ones_are_quarantined_by_name(platform: Platform) -> None:
    stream = parquet_stream()
    damaged = bytearray(GOOD)
    damaged[4:40] = b"\xff" * 36
    bad = {
        "empty.parquet": b"",
        "magic.parquet": b"PAR1",
        "no_footer.parquet": GOOD[: len(GOOD) // 2],
        "no_start.parquet": GOOD[8:],
        "one_byte_short.parquet": GOOD[:-1],
        "page.parquet": bytes(damaged),
        "text.parquet": b"vehicle,speed\nv1,10\n",
        "footer.parquet": b"PAR1" + b"\xff" * 100 + (80).to_bytes(4, "little") + b"PAR1",
        "huge_footer.parquet": GOOD[:-8] + b"\xff\xff\xff\x7fPAR1",
    }
    for name, data in bad.items():
        platform.volume_put(f"parquet/{name}", data)
    platform.volume_put("parquet/a.parquet", GOOD)
    platform.volume_put("parquet/z.parquet", parquet(n=[4]))
    report = platform.engine.ingest(stream)
    assert (report.files_ingested, report.rows, report.files_skipped) == (2, 4, len(bad))
    (batch,) = report.batches
    assert {file.path for file in batch.skipped} == {f"parquet/{name}" for name in bad}
    assert all(file.state == "SKIPPED_CORRUPTED" and file.reason for file in batch.skipped)
    assert [row["n"] for row in platform.rows(stream, "n")] == [1, 2, 3, 4]
    assert platform.states(stream) == {
        "a.parquet": "INGESTED",
        "z.parquet": "INGESTED",
        **dict.fromkeys(bad, "SKIPPED_CORRUPTED"),
    }
    assert "zero bytes" in platform.reason(stream, "empty.parquet")
    assert "not Parquet" in platform.reason(stream, "text.parquet")
    assert "cut short" in platform.reason(stream, "no_footer.parquet")
    assert platform.engine.look(stream).files == 0
    assert platform.restart().ingest(stream).batches == ()


def test_a_batch_of_bad_files_only_makes_the_contracts_table(platform: Platform) -> None:
    stream = parquet_stream(Column("n", "BIGINT", "A number."))
    platform.volume_put("parquet/bad.parquet", b"oops")
    report = platform.engine.ingest(stream)
    (batch,) = report.batches
    assert batch.skipped == (
        SkippedFile("parquet/bad.parquet", "SKIPPED_CORRUPTED", platform.reason(stream, "bad.parquet")),
    )
    assert (report.rows, report.table_rows) == (0, 0)
    assert platform.columns(stream) == {"n": "BIGINT"}


def test_a_repaired_file_is_loaded(platform: Platform) -> None:
    stream = parquet_stream()
    platform.volume_put("parquet/a.parquet", GOOD[:-1])
    platform.engine.ingest(stream)
    assert platform.states(stream) == {"a.parquet": "SKIPPED_CORRUPTED"}
    platform.volume_put("parquet/a.parquet", GOOD)
    assert platform.engine.look(stream).files == 1
    assert platform.restart().ingest(stream).rows == 3
    assert platform.states(stream) == {"a.parquet": "INGESTED"}


def test_a_half_written_parquet_file_waits_and_is_loaded_when_it_is_whole(platform: Platform) -> None:
    stream = parquet_stream()
    engine = platform.restart(incomplete_seconds=300)
    platform.volume_put("parquet/good.parquet", GOOD)
    platform.volume_put("parquet/half.parquet", GOOD[:50])
    platform.volume_put("parquet/begun.parquet", b"")
    report = engine.ingest(stream)
    assert (report.files_ingested, report.files_skipped, report.files_waiting) == (1, 0, 2)
    assert platform.states(stream) == {
        "good.parquet": "INGESTED",
        "half.parquet": "DISCOVERED",
        "begun.parquet": "DISCOVERED",
    }
    assert "its end is missing" in platform.reason(stream, "half.parquet")
    pending = engine.look(stream)
    assert (pending.files, pending.waiting) == (0, 2)
    platform.volume_put("parquet/half.parquet", parquet(n=[4]))
    assert engine.ingest(stream).rows == 1
    assert [row["n"] for row in platform.rows(stream, "n")] == [1, 2, 3, 4]


def test_a_parquet_file_that_is_never_finished_is_quarantined_after_the_grace(platform: Platform) -> None:
    stream = parquet_stream()
    platform.volume_put("parquet/half.parquet", GOOD[:50], time.time_ns() - HOUR_NS)
    report = platform.restart(incomplete_seconds=300).ingest(stream)
    assert (report.files_skipped, report.files_waiting) == (1, 0)
    assert platform.states(stream) == {"half.parquet": "SKIPPED_CORRUPTED"}


def test_a_json_file_that_is_cut_in_a_record_waits_and_is_loaded_when_it_is_whole(platform: Platform) -> None:
    stream = json_stream()
    engine = platform.restart(incomplete_seconds=300)
    whole = lines('{"n":1}', '{"n":2}')
    platform.volume_put("json/cut.json", whole[:-3])
    platform.volume_put("json/cut.json.gz", gzip.compress(whole)[:-4])
    platform.volume_put("json/no_last_line_feed.json", whole[:-1])
    report = engine.ingest(stream)
    assert (report.rows, report.files_waiting, report.files_skipped) == (2, 2, 0)
    platform.volume_put("json/cut.json", whole)
    platform.volume_put("json/cut.json.gz", gzip.compress(whole))
    assert engine.ingest(stream).rows == 4
    assert [row["n"] for row in platform.rows(stream, "n")] == ["1", "1", "1", "2", "2", "2"]


def test_a_json_file_that_is_never_finished_keeps_its_last_line_as_corrupt_record(platform: Platform) -> None:
    stream = json_stream()
    platform.volume_put("json/cut.json", b'{"n":1}\n{"n":', time.time_ns() - HOUR_NS)
    report = platform.restart(incomplete_seconds=300).ingest(stream)
    assert (report.rows, report.rows_corrupt, report.files_skipped) == (2, 1, 0)
    assert platform.rows(stream, "n", "_corrupt_record") == [
        {"n": None, "_corrupt_record": '{"n":'},
        {"n": "1", "_corrupt_record": None},
    ]
    assert platform.states(stream) == {"cut.json": "INGESTED"}


def test_compressed_files_that_can_not_be_unpacked_are_quarantined_whole(platform: Platform) -> None:
    stream = json_stream()
    packed = gzip.compress(lines(*[f'{{"n":{i}}}' for i in range(1000)]))
    flipped = bytearray(packed)
    flipped[-6] ^= 1
    bad = {
        "cut.json.gz": packed[:-100],
        "crc.json.gz": bytes(flipped),
        "junk.json.gz": packed + b"junk",
        "magic.gz": b"\x1f\x8b",
    }
    for name, data in bad.items():
        platform.volume_put(f"json/{name}", data)
    platform.volume_put("json/empty.json", b"")
    platform.volume_put("json/good.json", lines('{"n":1}'))
    report = platform.engine.ingest(stream)
    assert (report.rows, report.files_skipped) == (1, 5)
    assert platform.states(stream) == {
        "good.json": "INGESTED",
        "empty.json": "SKIPPED_CORRUPTED",
        **dict.fromkeys(bad, "SKIPPED_CORRUPTED"),
    }


def test_a_file_that_is_damaged_far_behind_its_start_brings_no_row(platform: Platform) -> None:
    # More rows than are held back in memory stand before the damage.
    stream = json_stream("n", "text")
    record = f'{{"n":1,"text":"{"x" * 100_000}"}}\n'.encode()
    packed = gzip.compress(record * 1800, 1)
    platform.volume_put("json/a.json.gz", packed[:-2000], 1)
    platform.volume_put("json/b.json", lines('{"n":2,"text":"y"}'), 2)
    report = platform.engine.ingest(stream)
    assert (report.rows, report.files_skipped) == (1, 1)
    assert platform.rows(stream, "n", "text") == [{"n": "2", "text": "y"}]
    assert platform.states(stream) == {"a.json.gz": "SKIPPED_CORRUPTED", "b.json": "INGESTED"}


def test_a_line_beyond_the_limit_quarantines_its_file(platform: Platform) -> None:
    stream = json_stream("n")
    platform.volume_put("json/long.json", b'{"n":"' + b"x" * (16 << 20) + b'"}\n')
    platform.volume_put("json/longest.json", b'{"n":"' + b"x" * ((16 << 20) - 8) + b'"}\n')
    report = platform.engine.ingest(stream)
    assert (report.rows, report.files_skipped) == (1, 1)
    assert platform.states(stream) == {"long.json": "SKIPPED_CORRUPTED", "longest.json": "INGESTED"}
    assert "16777216 bytes" in platform.reason(stream, "long.json")


def test_young_files_settle_before_they_are_read(platform: Platform) -> None:
    stream = parquet_stream()
    engine = platform.restart(settle_seconds=0.2)
    platform.volume_put("parquet/now.parquet", parquet(n=[1]), time.time_ns())
    platform.volume_put("parquet/future.parquet", parquet(n=[2]), time.time_ns() + HOUR_NS)
    platform.volume_put("parquet/old.parquet", parquet(n=[3]), 0)
    pending = engine.look(stream)
    assert (pending.files, pending.waiting) == (1, 2)
    report = engine.ingest(stream)
    assert (report.files_ingested, report.files_waiting) == (3, 0)
    assert [row["n"] for row in platform.rows(stream, "n")] == [1, 2, 3]


def test_a_young_file_that_grows_is_not_read(platform: Platform) -> None:
    stream = json_stream()
    engine = platform.restart(settle_seconds=600)
    platform.volume_put("json/grows.json", lines('{"n":1}'), time.time_ns())
    assert engine.look(stream).waiting == 1
    assert platform.states(stream) == {"grows.json": "DISCOVERED"}
    assert "modification time is too recent" in platform.reason(stream, "grows.json")
    platform.volume_put("json/grows.json", lines('{"n":1}', '{"n":2}'))
    assert platform.restart(settle_seconds=1).ingest(stream).rows == 2
