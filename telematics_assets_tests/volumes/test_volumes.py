"""The store protocol: one suite that every store passes, then what only a local folder can meet.

A further store plugs in by one more entry in `STORES`.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from telematics_assets.errors import (
    DbfsDisabledError,
    FileMissingError,
    TransientError,
    VolumeError,
    VolumeUnavailableError,
)
from telematics_assets.volumes.base import LISTING_COLUMNS, FileEntry, Listing, Volume, as_files
from telematics_assets.volumes.local import LocalVolume
from telematics_assets.volumes.memory import MemoryVolume
from telematics_assets.volumes.objects import ObjectVolume
from telematics_assets_tests.stores import servers

LOCATION = "/Volumes/workspace/00_landing/telematics"

STORES: dict[str, Callable[[Path], Volume]] = {
    "local": lambda folder: LocalVolume(folder / "volume", LOCATION),
    "memory": lambda folder: MemoryVolume(LOCATION),
    "azure": lambda folder: ObjectVolume(servers.azure(), LOCATION),
    "s3": lambda folder: ObjectVolume(servers.s3(), LOCATION),
}

#: Names that shells, URLs, globs and tables trip over; all of them are data.
ODD_NAMES = [
    "two words.parquet",
    "100%.parquet",
    "%41.parquet",
    "%2F.parquet",
    "a#b?c=d&e.parquet",
    'it\'s "quoted".parquet',
    "`tick`;$(x).parquet",
    "back\\slash.parquet",
    "line\nbreak.parquet",
    "carriage\rreturn.parquet",
    "tab\tstop.parquet",
    "star*[a].parquet",
    " leading and trailing .parquet ",
    "dot.in.the.middle",
    "..two-dots-are-hidden-but-this-is-not"[2:],
    "Zürich-東京-🚗.parquet",
    "e\u0301.parquet",
    "é.parquet",
    "x" * 200,
]


def can_be_named(volume: Volume, name: str) -> bool:
    """Object stores take fewer names than disks."""
    unfit = "\\" if volume.uri.startswith("abfss:") else ""
    return not (isinstance(volume, ObjectVolume) and any(char < " " or char in unfit for char in name))


@pytest.fixture(params=sorted(STORES))
def volume(request: pytest.FixtureRequest, tmp_path: Path) -> Volume:
    return STORES[request.param](tmp_path)


@pytest.fixture
def local(tmp_path: Path) -> LocalVolume:
    return LocalVolume(tmp_path / "volume", LOCATION)


def paths(listing: Listing) -> list[str]:
    return sorted(entry.path for entry in as_files(listing.files))


def land(local: LocalVolume, path: str | bytes, data: bytes = b"x") -> bytes:
    """Write a file the way an outside process would."""
    target = os.path.join(os.fsencode(local.uri), os.fsencode(path))
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open(target, "wb") as handle:
        handle.write(data)
    return target


class Broken(io.RawIOBase):
    """A source that gives some bytes and then fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error
        self._given = False

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        if self._given or size is None or size < 0:
            raise self._error
        self._given = True
        return b"half of"


# -- every store -------------------------------------------------------------------------------------------------------


def test_a_store_is_a_volume_and_knows_its_name(volume: Volume) -> None:
    assert isinstance(volume, Volume)
    assert volume.location == LOCATION
    assert volume.uri


def test_nothing_there_is_an_empty_listing_not_an_error(volume: Volume) -> None:
    listing = volume.scan("parquet")
    assert listing.files.columns == list(LISTING_COLUMNS)
    assert (listing.files.height, listing.problems) == (0, ())
    assert volume.names("parquet") == []
    assert volume.stat("parquet/a") is None
    volume.delete("parquet/a")


def test_a_published_file_is_listed_described_and_read(volume: Volume) -> None:
    before = time.time_ns()
    assert volume.create("parquet/2026/a.parquet", b"content")
    (entry,) = as_files(volume.scan("parquet").files)
    assert (entry.path, entry.size) == ("parquet/2026/a.parquet", 7)
    assert before - 2_000_000_000 < entry.modified_ns <= time.time_ns()
    assert volume.stat("parquet/2026/a.parquet") == entry
    assert volume.read("parquet/2026/a.parquet") == b"content"
    with volume.open("parquet/2026/a.parquet") as source:
        assert source.read(3) == b"con"
        source.seek(-2, io.SEEK_END)
        assert source.read() == b"nt"


def test_listings_have_the_same_types_whether_empty_or_not(volume: Volume) -> None:
    empty = volume.scan("parquet").files.schema
    volume.create("parquet/a", b"1")
    assert volume.scan("parquet").files.schema == empty


def test_a_file_is_never_replaced(volume: Volume) -> None:
    assert volume.create("parquet/a", b"first")
    before = volume.stat("parquet/a")
    assert not volume.create("parquet/a", b"second")
    assert not volume.upload("parquet/a", io.BytesIO(b"third"), modified_ns=1)
    assert volume.read("parquet/a") == b"first"
    assert volume.stat("parquet/a") == before
    assert volume.names("parquet") == ["a"]


def test_of_eight_racing_writers_one_wins_and_its_content_is_whole(volume: Volume) -> None:
    contents = [bytes([65 + number]) * 300_000 for number in range(8)]
    for round_ in range(5):
        start = threading.Barrier(8)

        def write(number: int, path: str = f"offsets/{round_}", start: threading.Barrier = start) -> bool:
            start.wait()
            if number % 2:
                return volume.create(path, contents[number])
            return volume.upload(path, io.BytesIO(contents[number]))

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(write, range(8)))
        assert won.count(True) == 1
        assert volume.read(f"offsets/{round_}") == contents[won.index(True)]
    assert volume.names("offsets") == ["0", "1", "2", "3", "4"]


def test_an_upload_carries_its_modification_time_and_reads_from_where_the_source_stands(volume: Volume) -> None:
    source = io.BytesIO(b"skipped|kept")
    source.seek(8)
    assert volume.upload("parquet/a", source, modified_ns=1_600_000_000_123_456_789)
    entry = volume.stat("parquet/a")
    assert entry is not None
    assert entry.size == 4
    if isinstance(volume, ObjectVolume):
        # Object stores give every file its time themselves.
        assert abs(entry.modified_ns - time.time_ns()) < 5e9
    else:
        assert entry.modified_ns == 1_600_000_000_123_456_789
    assert volume.read("parquet/a") == b"kept"


@pytest.mark.parametrize("error", [RuntimeError("source broke"), OSError(errno.EIO, "source broke")])
def test_a_source_that_fails_half_way_leaves_nothing(volume: Volume, error: Exception) -> None:
    with pytest.raises((RuntimeError, OSError, TransientError), match="source broke"):
        volume.upload("parquet/a", Broken(error))  # type: ignore[arg-type]
    assert volume.stat("parquet/a") is None
    assert volume.names("parquet") == []
    assert volume.scan("parquet").files.is_empty()
    assert volume.upload("parquet/a", io.BytesIO(b"whole"))


def test_empty_files_are_files(volume: Volume) -> None:
    assert volume.create("parquet/empty", b"")
    (entry,) = as_files(volume.scan("parquet").files)
    assert (entry.size, volume.read("parquet/empty")) == (0, b"")


def test_odd_names_are_data_like_any_other(volume: Volume) -> None:
    names = [name for name in ODD_NAMES if can_be_named(volume, name)]
    for number, name in enumerate(names):
        assert volume.create(f"parquet/{name}", str(number).encode())
        assert volume.create(f"json/{name}/inside", b"x")
    listing = volume.scan("parquet")
    assert listing.problems == ()
    assert paths(listing) == sorted(f"parquet/{name}" for name in names)
    assert paths(volume.scan("json")) == sorted(f"json/{name}/inside" for name in names)
    for number, name in enumerate(names):
        assert volume.read(f"parquet/{name}") == str(number).encode()
        entry = volume.stat(f"parquet/{name}")
        assert isinstance(entry, FileEntry)
        assert entry.path == f"parquet/{name}"


def test_hidden_names_are_no_data_at_any_depth_but_can_be_asked_for(volume: Volume) -> None:
    for path in ("parquet/.a", "parquet/_b", "parquet/_deep/c", "parquet/x/.d/e", "parquet/x/y_.z", "parquet/seen"):
        volume.create(path, b"1")
    assert paths(volume.scan("parquet")) == ["parquet/seen", "parquet/x/y_.z"]
    assert volume.names("parquet") == [".a", "_b", "seen"]
    assert volume.read("parquet/_deep/c") == b"1"
    assert paths(volume.scan("parquet/_deep")) == ["parquet/_deep/c"]


def test_a_scan_from_a_path_on_leaves_out_nothing_that_sorts_behind_it_by_bytes(volume: Volume) -> None:
    names = [name for name in ODD_NAMES if can_be_named(volume, name)]
    names += ["\uff5e", "\U0001f697", "a", "a-b", "a.b", "A", "~", "\u00e9t\u00e9", "2026-11-23", "2026-11-2"]
    everything = [f"parquet/{name}{rest}" for name in names for rest in (".x", "/1", "/deep/2", "-d/3")]
    for path in everything:
        assert volume.create(path, b"x")
    starts = [*everything, *(f"parquet/{name}/" for name in names), "parquet/a0", "parquet/", "parquet/\U0010ffff"]
    for start in starts[:: 5 if isinstance(volume, ObjectVolume) else 1]:
        behind = {path for path in everything if path.encode() >= start.encode()}
        found = volume.scan("parquet", start)
        assert behind <= set(paths(found)) <= set(everything), start
    # It must spare something, too.
    assert len(paths(volume.scan("parquet", max(everything)))) < len(everything) / 4


def test_a_scan_stays_in_its_folder(volume: Volume) -> None:
    for path in ("parquet/a", "parquet2/b", "json/c", "d"):
        volume.create(path, b"1")
    assert paths(volume.scan("parquet")) == ["parquet/a"]
    assert volume.names("parquet2") == ["b"]


def test_what_is_not_there_is_missing_by_name(volume: Volume) -> None:
    volume.create("parquet/file", b"1")
    for path in ("parquet/a", "nowhere/a", "parquet/file/below"):
        with pytest.raises(FileMissingError, match=path):
            volume.read(path)
        with pytest.raises(FileMissingError, match=path), volume.open(path):
            pass
        assert volume.stat(path) is None
        volume.delete(path)


def test_a_folder_is_no_file(volume: Volume) -> None:
    volume.create("parquet/looks_like.parquet/inside.parquet", b"1")
    assert volume.stat("parquet/looks_like.parquet") is None
    assert volume.names("parquet") == []
    assert paths(volume.scan("parquet")) == ["parquet/looks_like.parquet/inside.parquet"]
    with pytest.raises(VolumeError):
        volume.read("parquet/looks_like.parquet")


def test_a_deleted_file_is_gone_and_its_name_is_free(volume: Volume) -> None:
    volume.create("parquet/a", b"1")
    volume.delete("parquet/a")
    assert volume.scan("parquet").files.is_empty()
    assert volume.create("parquet/a", b"2")


def test_another_content_of_one_name_has_another_tag_or_time(volume: Volume) -> None:
    volume.upload("parquet/a", io.BytesIO(b"1"), modified_ns=1)
    before = volume.stat("parquet/a")
    volume.delete("parquet/a")
    volume.upload("parquet/a", io.BytesIO(b"2"), modified_ns=2)
    assert volume.stat("parquet/a") != before


def test_small_files_are_read_at_once_where_they_are_still_the_same(volume: Volume) -> None:
    for name in ("a", "b", "gone", "other"):
        volume.create(f"data/{name}", name.encode())
    volume.create("data/empty", b"")
    entries = {file.path: file for file in as_files(volume.scan("data").files)}
    a, b, gone, other, empty = (entries[f"data/{name}"] for name in ("a", "b", "gone", "other", "empty"))
    volume.delete("data/gone")
    volume.delete("data/other")
    volume.create("data/other", b"longer than before")
    touched = replace(b, modified_ns=b.modified_ns - 1_000_000_000)
    longer = replace(a, size=2)
    found = volume.read_unchanged([b, gone, a, touched, other, longer, empty])
    assert found == [b"b", None, b"a", None, None, None, b""]
    assert volume.read_unchanged([]) == []


@pytest.mark.parametrize(
    "path", ["", "/", "/parquet/a", "parquet//a", "parquet/", "./a", "a/./b", "a/..", "../a", ".", "a\0b", "a/\udcff"]
)
def test_paths_outside_the_volume_are_refused_everywhere(volume: Volume, path: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: volume.scan(path),
        lambda: volume.names(path),
        lambda: volume.stat(path),
        lambda: volume.read(path),
        lambda: volume.open(path).__enter__(),
        lambda: volume.create(path, b""),
        lambda: volume.upload(path, io.BytesIO()),
        lambda: volume.delete(path),
    ]
    for call in calls:
        with pytest.raises(VolumeError) as refused:
            call()
        assert type(refused.value) is VolumeError
        assert repr(path) in str(refused.value)


@pytest.mark.parametrize("path", ["dbfs:/x", "dbfs:x", "DBFS:/x/y", "/dbfs/x", "/dbfs", "/mnt/x", "/mnt", "/MNT/x"])
def test_dbfs_and_mounts_are_refused_with_the_way_out(volume: Volume, path: str) -> None:
    for call in (volume.scan, volume.names, volume.stat, volume.read, volume.delete):
        with pytest.raises(DbfsDisabledError, match="DBFS_DISABLED") as refused:
            call(path)
        assert path in str(refused.value)
        assert "/Volumes/<catalog>/<schema>/<volume>/" in str(refused.value)


def test_names_that_only_resemble_mounts_are_fine(volume: Volume) -> None:
    for path in ("mnt/a", "dbfs/a", "parquet/dbfs:a", "parquet/mnt/a"):
        assert volume.create(path, b"1")


# -- a local folder ----------------------------------------------------------------------------------------------------


def test_names_that_are_not_utf8_are_named_as_problems_and_stop_nothing(local: LocalVolume) -> None:
    land(local, b"parquet/good.parquet")
    land(local, b"parquet/bad-\xff.parquet")
    land(local, b"parquet/folder-\xe9/inside.parquet")
    land(local, b"parquet/deep/good.parquet")
    listing = local.scan("parquet")
    assert paths(listing) == ["parquet/deep/good.parquet", "parquet/good.parquet"]
    assert sorted(problem.path for problem in listing.problems) == [
        "parquet/bad-\\xff.parquet",
        "parquet/folder-\\xe9/inside.parquet",
    ]
    assert all("UTF-8" in problem.reason for problem in listing.problems)


def test_links_and_special_files_are_named_as_problems_and_never_opened(
    local: LocalVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(local.uri) / "parquet"
    land(local, "parquet/real.parquet")
    land(local, "elsewhere/outside.parquet")
    (root / "link.parquet").symlink_to(root / "real.parquet")
    (root / "dangling.parquet").symlink_to(root / "nowhere")
    (root / "folder").symlink_to(root.parent / "elsewhere", target_is_directory=True)
    (root / "loop").symlink_to(root, target_is_directory=True)
    os.mkfifo(root / "pipe.parquet")
    listener = socket.socket(socket.AF_UNIX)
    with listener:
        monkeypatch.chdir(root)  # the absolute path may be too long for a socket
        listener.bind("socket.parquet")
        listing = local.scan("parquet")
    assert paths(listing) == ["parquet/real.parquet"]
    reasons = {problem.path.removeprefix("parquet/"): problem.reason for problem in listing.problems}
    assert set(reasons) == {"link.parquet", "dangling.parquet", "folder", "loop", "pipe.parquet", "socket.parquet"}
    assert all("symbolic link" in reasons[name] for name in ("link.parquet", "dangling.parquet", "folder", "loop"))
    assert all("special file" in reasons[name] for name in ("pipe.parquet", "socket.parquet"))
    assert local.stat("parquet/link.parquet") is None
    assert local.stat("parquet/pipe.parquet") is None
    assert local.names("parquet") == ["real.parquet"]


def test_the_streams_folder_may_itself_be_a_link(local: LocalVolume) -> None:
    land(local, "elsewhere/a.parquet")
    os.symlink(os.path.join(local.uri, "elsewhere"), os.path.join(local.uri, "parquet"))
    assert paths(local.scan("parquet")) == ["parquet/a.parquet"]


def test_a_file_where_the_streams_folder_should_be_is_said(local: LocalVolume) -> None:
    land(local, "parquet")
    with pytest.raises(VolumeError, match="is a file"):
        local.scan("parquet")
    with pytest.raises(VolumeError, match=r"parquet/a.*Not a directory"):
        local.create("parquet/a", b"1")


def refusing(
    monkeypatch: pytest.MonkeyPatch, refused: Path, error: OSError, entries: Callable[[], None] = lambda: None
) -> None:
    """Let listing one folder fail, as it does for a user without rights (root has them all)."""
    real = os.scandir

    def scandir(path: str | int) -> object:
        if not isinstance(path, int) and Path(path) == refused:
            entries()
            raise error
        return real(path)

    monkeypatch.setattr("telematics_assets.volumes.local.os.scandir", scandir)


def test_folders_before_the_path_that_a_scan_begins_at_are_not_opened(
    local: LocalVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    for day in ("2025/12/31", "2026/10/31", "2026/11/01", "2026/11/02"):
        land(local, f"parquet/{day}/a")
    real, opened = os.scandir, []

    def scandir(path: str) -> object:
        opened.append(os.path.relpath(path, local.uri))
        return real(path)

    monkeypatch.setattr("telematics_assets.volumes.local.os.scandir", scandir)
    assert paths(local.scan("parquet", "parquet/2026/11/02/")) == ["parquet/2026/11/02/a"]
    assert sorted(opened) == ["parquet", "parquet/2026", "parquet/2026/11", "parquet/2026/11/02"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENAMETOOLONG])
def test_a_sub_folder_that_cant_be_listed_is_a_problem_and_the_rest_is_there(
    local: LocalVolume, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    land(local, "parquet/closed/a")
    land(local, "parquet/open/b")
    land(local, "parquet/c")
    refusing(monkeypatch, Path(local.uri, "parquet", "closed"), OSError(code, os.strerror(code)))
    listing = local.scan("parquet")
    assert paths(listing) == ["parquet/c", "parquet/open/b"]
    assert [problem.path for problem in listing.problems] == ["parquet/closed"]


def test_a_streams_folder_that_cant_be_listed_is_an_error(local: LocalVolume, monkeypatch: pytest.MonkeyPatch) -> None:
    land(local, "parquet/a")
    folder = Path(local.uri, "parquet")
    refusing(monkeypatch, folder, PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(VolumeError, match=r"parquet: Permission denied\. Check"):
        local.scan("parquet")
    with pytest.raises(VolumeError, match="Permission denied"):
        local.names("parquet")


def test_a_disk_that_does_not_answer_is_transient_and_hides_no_file(
    local: LocalVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    land(local, "parquet/flaky/a")
    land(local, "parquet/b")
    refusing(monkeypatch, Path(local.uri, "parquet", "flaky"), OSError(errno.EIO, "Input/output error"))
    with pytest.raises(VolumeUnavailableError, match="Input/output error"):
        local.scan("parquet")


def test_folders_and_files_that_vanish_during_a_scan_are_just_not_there(
    local: LocalVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    land(local, "parquet/vanishing/a")
    land(local, "parquet/b")
    folder = Path(local.uri, "parquet", "vanishing")
    gone = FileNotFoundError(errno.ENOENT, "gone")
    refusing(monkeypatch, folder, gone, lambda: shutil.rmtree(folder))
    listing = local.scan("parquet")
    assert (paths(listing), listing.problems) == (["parquet/b"], ())


def test_scans_beside_a_busy_writer_fail_never_and_miss_no_settled_file(local: LocalVolume) -> None:
    for number in range(50):
        land(local, f"parquet/settled/{number}")
    stop = threading.Event()

    def churn() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            target = land(local, f"parquet/busy/{number % 7}/{number % 13}")
            if number % 3:
                os.unlink(target)
            if number % 11 == 0:
                shutil.rmtree(os.path.join(local.uri, "parquet", "busy"))

    writer = threading.Thread(target=churn)
    writer.start()
    try:
        for _ in range(60):
            listing = local.scan("parquet")
            assert sum(path.startswith("parquet/settled/") for path in paths(listing)) == 50
            assert listing.problems == ()
    finally:
        stop.set()
        writer.join()


def test_very_deep_folders_are_walked(local: LocalVolume) -> None:
    deep = "parquet/" + "/".join(["d"] * 300)
    land(local, f"{deep}/a")
    assert paths(local.scan("parquet")) == [f"{deep}/a"]


def test_readers_never_see_a_half_written_upload(local: LocalVolume) -> None:
    seen: list[list[str]] = []
    content = b"x" * (3 << 20)

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            seen.append(paths(local.scan("parquet")))
            assert local.stat("parquet/a") is None
            return super().read(size)

    assert local.upload("parquet/a", Slow(content))
    assert len(seen) > 2
    assert seen == [[]] * len(seen)
    assert local.read("parquet/a") == content
    assert os.listdir(os.path.join(local.uri, "parquet")) == ["a"]


def test_a_reader_keeps_what_it_opened_when_the_file_is_deleted_under_it(local: LocalVolume) -> None:
    local.create("parquet/a", b"content")
    with local.open("parquet/a") as source:
        local.delete("parquet/a")
        assert source.read() == b"content"


def test_errors_of_the_readers_body_pass_unchanged(volume: Volume) -> None:
    volume.create("parquet/a", b"1")
    with pytest.raises(OSError, match="mine"), volume.open("parquet/a"):
        raise OSError("mine")


_FULL_DISK = """
import io, resource, sys
from pathlib import Path
from telematics_assets.errors import VolumeUnavailableError
from telematics_assets.volumes.local import LocalVolume

volume = LocalVolume(Path(sys.argv[1]), "/Volumes/a/b/c")
volume.create("parquet/before", b"x")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for write in (
    lambda: volume.create("parquet/large", b"x" * 200_000),
    lambda: volume.upload("parquet/large", io.BytesIO(b"x" * 200_000)),
    lambda: volume.upload("parquet/large", io.BytesIO(b"x" * (3 << 20))),
):
    try:
        write()
    except VolumeUnavailableError as error:
        assert "large" in str(error), error
        assert volume.stat("parquet/large") is None
        assert volume.names("parquet") == ["before"], volume.names("parquet")
    else:
        sys.exit("the disk took it")
assert volume.create("parquet/small", b"x")
"""


def test_a_disk_that_takes_no_more_is_transient_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, VolumeUnavailableError),
        (errno.EDQUOT, VolumeUnavailableError),
        (errno.EIO, VolumeUnavailableError),
        (errno.EROFS, VolumeError),
        (errno.EACCES, VolumeError),
    ],
)
def test_what_the_disk_says_decides_whether_it_is_worth_trying_again(
    local: LocalVolume, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception]
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    local.create("parquet/before", b"1")
    monkeypatch.setattr("telematics_assets.volumes.local.os.fsync", refuse)
    with pytest.raises(kind, match=os.strerror(code)):
        local.create("parquet/a", b"1")
    assert local.names("parquet") == ["before"]
    assert local.stat("parquet/a") is None


def test_content_and_folder_are_synced_before_success_is_told(
    local: LocalVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr("telematics_assets.volumes.local.os.fsync", fsync)
    assert local.create("a/b/c", b"1")
    root = Path(local.uri)
    assert synced == [path.stat().st_ino for path in (root.parent, root, root / "a", root / "a/b/c", root / "a/b")]


def test_what_a_killed_upload_left_behind_is_no_data(local: LocalVolume) -> None:
    land(local, "parquet/.0123456789abcdef.tmp", b"half of")
    assert local.scan("parquet").files.is_empty()
    assert local.create("parquet/a", b"1")


def entries(volume: LocalVolume) -> list[FileEntry]:
    return as_files(volume.scan("parquet").files)


def test_a_file_replaced_by_another_of_equal_size_and_time_has_another_tag(local: LocalVolume) -> None:
    first = land(local, "parquet/a", b"1")
    os.utime(first, ns=(5, 5))
    (before,) = entries(local)
    second = land(local, "parquet/.b", b"2")
    os.utime(second, ns=(5, 5))
    os.replace(second, first)
    (after,) = entries(local)
    assert (after.size, after.modified_ns) == (before.size, before.modified_ns)
    assert after.etag != before.etag


def dead_descriptor() -> int:
    """A descriptor that nothing can be read from, and that can't seek."""
    other_end, descriptor = os.pipe()
    os.close(other_end)
    return descriptor


def test_a_disk_that_fails_under_a_reader_is_transient_and_names_the_file(local: LocalVolume) -> None:
    land(local, "parquet/a", b"x" * 100_000)
    dead = dead_descriptor()
    for use in (
        lambda source: source.read(),
        lambda source: source.read(50_000),
        lambda source: source.seek(0, os.SEEK_END),
        lambda source: io.BytesIO().write(source.read(90_000)),
    ):
        with local.open("parquet/a") as source:
            assert source.read(10) == b"x" * 10
            os.dup2(dead, source.fileno())
            with pytest.raises(VolumeUnavailableError, match=r"parquet/a: .*It may go through later"):
                use(source)
    os.close(dead)


def test_what_took_a_files_place_since_it_was_listed_is_not_followed_and_blocks_nobody(local: LocalVolume) -> None:
    land(local, "secret", b"outside of the folder")
    root = Path(local.uri) / "parquet"
    root.mkdir()
    (root / "link").symlink_to(root.parent / "secret")
    os.mkfifo(root / "pipe")
    (root / "folder").mkdir()
    for name in ("link", "pipe", "folder"):
        with pytest.raises(VolumeError, match=f"parquet/{name}: "), local.open(f"parquet/{name}") as source:
            source.read()
        info = os.stat(root / name)
        listed = FileEntry(f"parquet/{name}", info.st_size, info.st_mtime_ns, str(info.st_ino))
        assert local.read_unchanged([listed]) == [None]
