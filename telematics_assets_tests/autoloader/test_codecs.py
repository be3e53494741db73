"""Packed files are told by their first bytes, unpacked piece by piece, and never taken for whole when they are not."""

from __future__ import annotations

import bz2
import gzip
import io
import resource
from collections.abc import Callable, Iterator

import pyarrow as pa
import pytest

from telematics_assets.autoloader.codecs import (
    LOOK_BYTES,
    LOOK_UNPACKED_BYTES,
    codec,
    is_complete_packed,
    read_up_to,
    unpacked,
)
from telematics_assets.errors import UnreadableFileError

CONTENT = b"".join(b"%d,%d\n" % (i, i * i % 977) for i in range(50_000))


def zstd(data: bytes) -> bytes:
    packed: bytes = pa.Codec("zstd").compress(data, asbytes=True)
    return packed


PACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "bzip2": bz2.compress, "zstd": zstd}
SKIPPABLE = b"\x5a\x2a\x4d\x18\x04\x00\x00\x00note"


@pytest.fixture(params=PACK)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


class Slow(io.BytesIO):
    """A source that gives a few bytes at a time."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size or 0, 1000) if size and size > 0 else 1000)


def drain(data: bytes, size: int = 10_000) -> bytes:
    opened = unpacked(Slow(data), "'a'")
    pieces = []
    while piece := opened.read(size):
        assert len(piece) <= size
        pieces.append(piece)
    return b"".join(pieces)


def test_a_packed_file_is_told_by_its_first_bytes_and_unpacked(kind: str) -> None:
    packed = PACK[kind](CONTENT)
    source = io.BytesIO(packed)
    assert codec(source) == kind
    assert source.tell() == 0
    assert drain(packed) == CONTENT
    assert drain(PACK[kind](b"")) == b""


def test_several_streams_behind_each_other_are_one_content(kind: str) -> None:
    pack = PACK[kind]
    assert drain(pack(CONTENT) + pack(b"") + pack(b"more")) == CONTENT + b"more"


@pytest.mark.parametrize("data", [b"", b"a,b\n", b"BZh9,1\n", b"BZhx1AY&SY", b"(\xb5", b"P*M", b"\x1f", b"\x1f\x8a"])
def test_what_is_not_packed_is_the_source_itself(data: bytes) -> None:
    source = io.BytesIO(data)
    assert codec(source) is None
    assert unpacked(source) is source
    assert source.read() == data


def test_zstandard_may_hold_frames_to_skip() -> None:
    assert drain(SKIPPABLE + zstd(CONTENT) + SKIPPABLE) == CONTENT


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:-9],
        lambda data: data[: len(data) // 2],
        lambda data: data[:12],
        lambda data: data + b"junk",
        lambda data: data + data[:-5],
        lambda data: data[:12] + b"\xff" * 40 + data[52:],
    ],
)
def test_a_file_that_can_not_be_unpacked_to_its_end_is_unreadable(kind: str, damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(UnreadableFileError, match=f"'a' is a {kind} file that can't be unpacked to its end"):
        drain(damage(PACK[kind](CONTENT)))


def test_an_error_of_the_source_is_no_fault_of_the_file(kind: str) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 500:
                raise ConnectionResetError("gone")
            return super().read(min(size or 100, 100) if size and size > 0 else 100)

    opened = unpacked(Failing(PACK[kind](CONTENT)))
    with pytest.raises(ConnectionResetError, match="gone"):
        list(iter(lambda: opened.read(1000), b""))


def test_a_bomb_is_unpacked_a_piece_at_a_time(kind: str) -> None:
    bomb = PACK[kind](bytes(1 << 20)) * 256
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opened = unpacked(io.BytesIO(bomb))
    total = 0
    while piece := opened.read(1 << 20):
        total += len(piece)
    assert total == 256 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def ends_well(pieces: Iterator[bytes]) -> bool:
    return b"".join(pieces).endswith(b"\n")


def test_a_packed_file_is_complete_if_it_unpacks_to_its_end_and_that_is_one(kind: str) -> None:
    whole, cut = PACK[kind](CONTENT), PACK[kind](CONTENT[:-1])
    assert is_complete_packed(io.BytesIO(whole), len(whole), ends_well)
    assert not is_complete_packed(io.BytesIO(cut), len(cut), ends_well)
    assert not is_complete_packed(io.BytesIO(whole[:-3]), len(whole) - 3, ends_well)


def test_the_look_at_a_packed_file_has_limits() -> None:
    cut = gzip.compress(CONTENT)[:-3]
    assert is_complete_packed(io.BytesIO(cut), LOOK_BYTES + 1, ends_well)
    bomb = gzip.compress(bytes(1 << 20)) * (LOOK_UNPACKED_BYTES // (1 << 20) + 1) + cut
    assert is_complete_packed(io.BytesIO(bomb), len(bomb), lambda pieces: all(pieces))


def test_reading_so_many_bytes_goes_on_after_short_reads() -> None:
    assert read_up_to(Slow(CONTENT), 5000) == CONTENT[:5000]
    assert read_up_to(Slow(b"abc"), 5000) == b"abc"
