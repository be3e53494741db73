"""Whatever lands, its state says what became of it: all of it is in the table verbatim, or none with a reason.

Belongs here: kinds of content. Damage that comes while a file is read or written stands in `test_failing_reads.py` and
`test_damaged_files.py`.
"""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import subprocess
import sys
import zipfile
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest

from telematics_assets_tests.conformance.platforms import Platform
from telematics_assets_tests.conformance.samples import csv_stream, json_stream, lines, parquet, parquet_stream

TEXT = '{"n":"Zürich"}\n{"n":"東京"}\n'
PLAIN = b'{"n":"1"}\n{"n":"2"}\n'


def zipped(name: str, data: bytes) -> bytes:
    """A zip archive with one file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, data)
    return buffer.getvalue()


class _Keys(pe.KmsClient):  # type: ignore[misc]
    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
        return base64.b64encode(key_bytes)


def encrypted(*, plaintext_footer: bool) -> bytes:
    """A Parquet file whose second column is encrypted, and perhaps its footer."""
    keys = pe.EncryptionConfiguration(footer_key="f", column_keys={"c": ["n"]}, plaintext_footer=plaintext_footer)
    factory = pe.CryptoFactory(lambda _: _Keys())
    properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), keys)
    buffer = io.BytesIO()
    pq.write_table(pa.table({"open": [1], "n": [1]}), buffer, encryption_properties=properties)
    return buffer.getvalue()


def raw(platform: Platform, stream: Any) -> dict[str, list[bytes]]:
    """The bytes of every row's record, by file, in order of the file."""
    found: dict[str, list[bytes]] = {}
    for row in platform.rows(stream, "_source_file", "_raw_record", "_corrupt_record"):
        text = row["_raw_record"]
        is_encoded = row["_corrupt_record"] is not None and text.startswith("base64:")
        line = base64.b64decode(text[7:]) if is_encoded else text.encode()
        found.setdefault(row["_source_file"].rpartition("/")[2], []).append(line)
    return found


def test_what_is_no_readable_parquet_is_quarantined_by_its_own_reason(platform: Platform) -> None:
    stream = parquet_stream()
    good = parquet(n=[1, 2])
    bad = {
        "archive.parquet": (zipped("a.parquet", good), "not Parquet"),
        "error.parquet": (b"<!DOCTYPE html><html><body>503 Service Unavailable</body></html>", "not Parquet"),
        "table.parquet": (b"n\n1\n", "not Parquet"),
        "packed.parquet": (gzip.compress(good), "not Parquet"),
        "footer_encrypted.parquet": (encrypted(plaintext_footer=False), "encrypted"),
        "column_encrypted.parquet": (encrypted(plaintext_footer=True), "encrypted"),
        "middle_gone.parquet": (good[:30] + good[60:], "damaged Parquet"),
        "children.parquet": (
            b"PAR1\x15\x02\x19\x1c\x48\x06schema\x15\xfe\xff\xff\xff\x0f\x00\x16\x00\x19\x0c\x00\x17\0\0\0PAR1",
            "damaged Parquet",
        ),
    }
    for name, (data, _) in bad.items():
        platform.volume_put(f"parquet/{name}", data)
    platform.volume_put("parquet/good.parquet", good)
    report = platform.engine.ingest(stream)
    assert (report.rows, report.files_ingested, report.files_skipped) == (2, 1, len(bad))
    assert platform.states(stream) == {"good.parquet": "INGESTED", **dict.fromkeys(bad, "SKIPPED_CORRUPTED")}
    for name, (_, reason) in bad.items():
        assert reason in platform.reason(stream, name)
    assert [row["n"] for row in platform.rows(stream, "n")] == [1, 2]


#: JSON files, and how many rows and corrupt ones of them each brings.
LINES: dict[str, tuple[bytes, int, int]] = {
    "utf16_le_bom": (b"\xff\xfe" + TEXT.encode("utf-16-le"), 3, 3),
    "utf16_le": (TEXT.encode("utf-16-le"), 3, 3),
    "utf16_be_bom": (b"\xfe\xff" + TEXT.encode("utf-16-be"), 2, 2),
    "utf16_be": (TEXT.encode("utf-16-be"), 2, 2),
    "utf32": (TEXT.encode("utf-32"), 3, 3),
    "utf8_bom": (b"\xef\xbb\xbf" + TEXT.encode(), 2, 0),
    "latin1": ('{"n":"Zürich"}\n{"n":"plain"}\n'.encode("latin-1"), 2, 1),
    "surrogates": (lines('{"n":"\\ud800"}', b'{"n":"\xed\xa0\x80"}', '{"n":"\\ud83d\\ude80"}'), 3, 2),
    "nul": (lines("\x00", '{"n":"\x00"}', '{"n":"\\u0000"}', "\x00" * 100), 4, 3),
    "nul_only": (bytes(5000), 1, 1),
    "deep": (lines('{"n":' + "[" * 10_000 + "]" * 10_000 + "}", '{"n":' + '{"m":' * 10_000 + "1" + "}" * 10_001), 2, 2),
    "deep_open": (lines("[" * 1_000_000), 1, 1),
    "duplicate_keys": (lines('{"n":1,"n":2}', '{"n":1,"\\u006e":2}', '{"n":{"m":1,"m":2}}'), 3, 2),
    "bare_cr": (b'{"n":1}\r{"n":2}\r{"n":3}', 1, 1),
    "mixed_ends": (b'{"n":1}\r\n{"n":2}\n\r\n\r{"n":3}\r\r\n{"n":4}\r', 4, 0),
    "blank_lines": (b"\n\r\n \n\t\n\n", 0, 0),
    "one_line": (b'{"n":1}', 1, 0),
    "one_cut_line": (b'{"n":', 1, 1),
    "document": (b'[\n{"n":1},\n{"n":2}\n]\n', 4, 3),
    "html": (b"<html>\n<body>\n</html>\n", 3, 3),
    "parquet": (parquet(n=[1, 2]).replace(b"\n", b"\r").replace(b"\r\r", b"\r "), 1, 1),
    "concatenated": (b'{"n":1}{"n":2}\n{"n":3}\n', 2, 1),
    "constants": (lines('{"n":NaN}', '{"n":-Infinity}', '{"n":1e999}'), 3, 2),
}


def test_every_line_of_any_text_is_a_row_verbatim(platform: Platform) -> None:
    stream = json_stream("n", raw_record_column="_raw_record")
    for name, (data, _, _) in LINES.items():
        platform.volume_put(f"json/{name}", data)
    report = platform.engine.ingest(stream)
    assert report.files_skipped == 0
    assert set(platform.states(stream).values()) == {"INGESTED"}
    assert {f.path.removeprefix("json/"): f.rows for f in platform.engine.files(stream)} == {
        name: rows for name, (_, rows, _) in LINES.items()
    }
    found = raw(platform, stream)
    for name, (data, _, _) in LINES.items():
        ends = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        given = [line.removesuffix(b"\r") for line in ends[:-1]] + ends[-1:]
        assert sorted(found.get(name, [])) == sorted(line for line in given if line.strip(b" \t\r")), name
    corrupt = [row for row in platform.rows(stream, "_source_file", "_corrupt_record") if row["_corrupt_record"]]
    assert len(corrupt) == report.rows_corrupt == sum(count for _, _, count in LINES.values())
    for name, (_, _, count) in LINES.items():
        assert sum(row["_source_file"].endswith(f"/{name}") for row in corrupt) == count, name


def test_packed_text_is_read_to_its_end_or_quarantined_whole(platform: Platform) -> None:
    stream = json_stream("n")
    pack: dict[str, Callable[[bytes], bytes]] = {
        "gzip": gzip.compress,
        "bzip2": bz2.compress,
        "zstd": lambda data: bytes(pa.compress(data, "zstd", asbytes=True)),
    }
    content = b"".join(b'{"n":"%d"}\n' % n for n in range(500))
    bad = []
    for kind, packed in pack.items():
        whole = packed(content)
        platform.volume_put(f"json/{kind}", whole)
        platform.volume_put(f"json/{kind}_twice", whole + packed(PLAIN))
        for name, data in (
            ("cut", whole[: len(whole) // 2]),
            ("short", whole[:-1]),
            ("garbage", whole + b"garbage"),
            ("zeros", whole + bytes(600)),
            ("flipped", whole[:40] + bytes([whole[40] ^ 0x10]) + whole[41:]),
        ):
            if (kind, name) == ("zstd", "flipped"):
                continue  # pyarrow writes no checksum, and without one it can't be told from other content
            if (kind, name) != ("gzip", "zeros"):
                bad.append(f"{kind}_{name}")
            platform.volume_put(f"json/{kind}_{name}", data)
    report = platform.engine.ingest(stream)
    states = platform.states(stream)
    assert sorted(name for name, state in states.items() if state == "SKIPPED_CORRUPTED") == sorted(bad)
    # Zeros behind a gzip file are padding, as gzip itself has it.
    assert report.rows == 3 * (500 + 502) + 500
    assert all("can't be unpacked to its end" in platform.reason(stream, name) for name in bad)


def test_a_packed_bomb_is_quarantined_when_a_line_passes_the_limit(platform: Platform) -> None:
    stream = json_stream("n")
    platform.volume_put("json/bomb", gzip.compress(b'{"n":"' + bytes(1 << 20)) + gzip.compress(b"x" * (1 << 20)) * 4096)
    platform.volume_put("json/good", PLAIN)
    report = platform.engine.ingest(stream)
    assert (report.rows, report.files_skipped) == (2, 1)
    assert "longer than 16777216 bytes" in platform.reason(stream, "bomb")


def test_delimited_text_of_other_encodings_is_kept_verbatim(platform: Platform) -> None:
    stream = csv_stream("n", raw_record_column="_raw_record", header=False)
    files = {
        "utf16": "1\n2\n".encode("utf-16"),
        "latin1": "Zürich\nplain\n".encode("latin-1"),
        "nul": b"\x00\n1\x002\n",
        "html": b"<html>\n</html>\n",
    }
    for name, data in files.items():
        platform.volume_put(f"csv/{name}", data)
    assert platform.engine.ingest(stream).files_skipped == 0
    found = raw(platform, stream)
    for name, data in files.items():
        assert sorted(found[name]) == sorted(line for line in data.split(b"\n") if line), name


_HUGE = """
import gzip, io, resource, sys
from telematics_assets.catalog import Column, FileStream, TableContract
from telematics_assets.testing import MemoryEngine

engine = MemoryEngine()
contract = TableContract("Rows.", (Column("n", "STRING", "N."),))
stream = FileStream("events", "json", "json", "events", contract, {"multi_line": sys.argv[1] == "document"})
record = b'{"n":"' + b"x" * 200_000_000 + b'"}'
if sys.argv[1] == "packed":
    record = gzip.compress(record, 1)
engine.volume.put("json/good", b'{"n":1}')
engine.ingest(stream)
engine.volume.put("json/a", record)
engine.volume.put("json/b", b'{"n":1}')
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = engine.ingest(stream)
(bad,) = engine.files(stream, "SKIPPED_CORRUPTED")
assert (report.rows, bad.path) == (1, "json/a")
assert "16777216 bytes" in bad.reason, bad.reason
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.parametrize("kind", ["plain", "packed", "document"])
def test_a_single_record_of_200_mb_quarantines_its_file_in_bounded_memory(kind: str) -> None:
    done = subprocess.run([sys.executable, "-c", _HUGE, kind], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150, f"{done.stdout} MiB"
