"""Whatever a file is called and however old it is, it is data or it is said why not."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from telematics_assets_tests.conformance.platforms import LOCATION, DeltaPlatform, Platform
from telematics_assets_tests.conformance.samples import json_stream, lines, parquet, parquet_stream

ODD = [
    "with space.parquet",
    "100%.parquet",
    "%41.parquet",
    "a%2Fb.parquet",
    "#1.parquet",
    "q?x=1&y=2.parquet",
    "it's.parquet",
    'a "quoted" name.parquet',
    "new\nline.parquet",
    "tab\t.parquet",
    "back\\slash.parquet",
    "Zürich🚗.parquet",
    "e\u0301.parquet",
    "\u00e9.parquet",
    " leading.parquet",
    "trailing ",
    "-rf",
    "*.parquet",
    "[a].parquet",
    "{a}.parquet",
    "a=b.parquet",
    "day=2026-03-01/a.parquet",
    "no_ending",
    "a.b.c",
    "UPPER.PARQUET",
    "folder.parquet/inside.parquet",
    "x" * 200,
    "https:/example.com/a.parquet",
    "s3:/bucket/key.parquet",
    "file:a.parquet",
    "a%2F..%2Fb.parquet",
    "%2e%2e/a.parquet",
    "%00.parquet",
    "a\x01\x1b[31m\x7f.parquet",
    "a\r.parquet",
    "a\u2028\u202e.parquet",
    "\ufeff.parquet",
    "a../b",
    "NUL",
    "~",
    "$HOME.parquet",
    "/".join(["deep"] * 60),
]


def test_files_of_any_name_are_loaded_under_their_name(platform: Platform) -> None:
    stream = parquet_stream()
    for number, name in enumerate(ODD):
        platform.volume_put(f"parquet/{name}", parquet(n=[number]))
    report = platform.engine.ingest(stream)
    assert (report.files_ingested, report.files_skipped) == (len(ODD), 0)
    assert platform.rows(stream, "n", "_source_file") == [
        {"n": number, "_source_file": f"{LOCATION}/parquet/{name}"} for number, name in enumerate(ODD)
    ]
    assert platform.states(stream) == dict.fromkeys(ODD, "INGESTED")
    assert platform.restart().ingest(stream).batches == ()


def test_odd_names_are_named_in_the_rescued_data_too(platform: Platform) -> None:
    stream = json_stream("n", schema_evolution_mode="rescue")
    platform.volume_put("json/a.json", lines('{"n":0}'))
    platform.engine.ingest(stream)
    platform.volume_put('json/new\nline "q" \\.json', lines('{"x":1}'))
    platform.engine.ingest(stream)
    row = platform.rows(stream, "n", "_rescued_data")[0]
    assert row["_rescued_data"] == f'{{"x":1,"_file_path":"{LOCATION}/json/new\\nline \\"q\\" \\\\.json"}}'


def test_names_that_start_with_a_dot_or_an_underscore_are_no_data(platform: Platform) -> None:
    stream = parquet_stream()
    for name in (".hidden.parquet", "_SUCCESS", "_temporary/a.parquet", ".tmp/a.parquet", "day/_a.parquet", "..x"):
        platform.volume_put(f"parquet/{name}", parquet(n=[0]))
    platform.volume_put("parquet/a_b.c.parquet", parquet(n=[1]))
    assert platform.engine.ingest(stream).files_ingested == 1
    assert platform.states(stream) == {"a_b.c.parquet": "INGESTED"}


def test_only_the_streams_own_folder_is_read(platform: Platform) -> None:
    stream = parquet_stream()
    platform.volume_put("parquet2/a.parquet", parquet(n=[1]))
    platform.volume_put("a.parquet", parquet(n=[2]))
    platform.volume_put("json/a.json", lines('{"n":3}'))
    assert platform.engine.ingest(stream).batches == ()
    assert platform.engine.ingest(json_stream()).rows == 1


def test_an_old_modification_time_never_hides_a_file(platform: Platform) -> None:
    stream = parquet_stream()
    platform.volume_put("parquet/new.parquet", parquet(n=[1]))
    platform.engine.ingest(stream)
    year_ns = 365 * 86_400_000_000_000
    platform.volume_put("parquet/old.parquet", parquet(n=[2]), time.time_ns() - 30 * year_ns)
    platform.volume_put("parquet/epoch.parquet", parquet(n=[3]), 0)
    assert platform.engine.ingest(stream).files_ingested == 2
    assert [row["n"] for row in platform.rows(stream, "n")] == [1, 2, 3]


def test_nothing_outside_of_the_folder_is_read_and_nothing_blocks(delta_platform: DeltaPlatform) -> None:
    stream = parquet_stream()
    delta_platform.volume_put("parquet/a.parquet", parquet(n=[1]))
    delta_platform.volume_put("elsewhere/secret.parquet", parquet(n=[2]))
    folder, outside = delta_platform.at("parquet"), delta_platform.home / "outside"
    outside.mkdir()
    (outside / "secret.parquet").write_bytes(parquet(n=[3]))
    (folder / "file.parquet").symlink_to(outside / "secret.parquet")
    (folder / "outside").symlink_to(outside, target_is_directory=True)
    (folder / "sideways").symlink_to("../elsewhere", target_is_directory=True)
    (folder / "one").symlink_to("two")
    (folder / "two").symlink_to("one")
    (folder / "parent").symlink_to("..", target_is_directory=True)
    (folder / "device.parquet").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.parquet")
    listener = socket.socket(socket.AF_UNIX)
    with listener, contextlib.chdir(folder):
        listener.bind("socket.parquet")
    (folder / "folder.parquet").mkdir()
    os.link(outside / "secret.parquet", folder / "hard.parquet")
    report = delta_platform.engine.ingest(stream)
    # A hard link is the file itself.
    assert (report.files_ingested, report.rows) == (2, 2)
    refused = ("file.parquet", "outside", "sideways", "one", "two", "parent", "device.parquet")
    assert delta_platform.states(stream) == {
        "a.parquet": "INGESTED",
        "hard.parquet": "INGESTED",
        **dict.fromkeys((*refused, "pipe.parquet", "socket.parquet"), "SKIPPED_CORRUPTED"),
    }
    assert all("symbolic link" in delta_platform.reason(stream, name) for name in refused)
    assert "special file" in delta_platform.reason(stream, "pipe.parquet")
    assert delta_platform.restart(incomplete_seconds=300).ingest(stream).batches == ()


_AS_NOBODY = """
import os, sys
from pathlib import Path
from telematics_assets.engines.embedded import open_engine
from telematics_assets.errors import TelematicsError
from telematics_assets.settings import Settings
from telematics_assets_tests.conformance.samples import json_stream

engine = open_engine(Settings(home=Path(sys.argv[1]), settle_seconds=0, incomplete_seconds=0))
stream = json_stream("n")
if os.getuid() == 0:  # root may read everything
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    print(engine.ingest(stream).rows)
except TelematicsError as error:
    print(type(error).__name__, error)
print({f.path: (f.state, f.reason) for f in engine.files(stream)})
print(engine.read(engine.names.bronze("events"), ["n"]).to_pylist())
"""


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A temporary folder that every user can reach; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)
        yield Path(folder)


def test_what_the_loaders_user_may_not_read_is_named_and_loaded_once_it_may(open_path: Path) -> None:
    home = open_path / "home"
    platform = DeltaPlatform(home)
    stream = json_stream("n")
    for name in ("open.json", "closed.json", "folder/inside.json", "z.json"):
        platform.volume_put(f"json/{name}", lines(f'{{"n":"{name}"}}'))
    (home / "tables").mkdir()
    for path in (home, *home.rglob("*")) if os.getuid() == 0 else ():
        os.chown(path, 65534, 65534)
    closed, folder = platform.at("json/closed.json"), platform.at("json/folder")
    os.chmod(closed, 0)
    os.chmod(folder, 0)

    def load() -> list[str]:
        command = [sys.executable, "-c", _AS_NOBODY, str(home)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    for _ in range(2):
        said, states, rows = load()
        assert said.startswith("VolumeError 1 files of stream 'events' could not be opened; all others are loaded.")
        assert "json/closed.json" in said
        assert "'json/folder': ('SKIPPED_CORRUPTED', \"permission denied" in states
        assert rows == "[{'n': 'open.json'}, {'n': 'z.json'}]"
    os.chmod(closed, 0o600)
    os.chmod(folder, 0o700)
    assert load()[0] == "2"
    assert platform.engine.ingest(stream).batches == ()


def test_entries_that_are_no_files_are_named_and_stop_nobody(delta_platform: DeltaPlatform) -> None:
    stream = parquet_stream()
    delta_platform.volume_put("parquet/a.parquet", parquet(n=[1]))
    folder = delta_platform.at("parquet")
    (folder / "empty.parquet").mkdir()
    (folder / "link.parquet").symlink_to(folder / "a.parquet")
    (folder / "nowhere.parquet").symlink_to(folder / "gone")
    (folder / "loop").symlink_to(folder)
    with open(bytes(folder) + b"/\xff.parquet", "wb") as file:
        file.write(parquet(n=[2]))
    report = delta_platform.engine.ingest(stream)
    assert (report.files_ingested, report.rows) == (1, 1)
    assert delta_platform.states(stream) == {
        "a.parquet": "INGESTED",
        "link.parquet": "SKIPPED_CORRUPTED",
        "nowhere.parquet": "SKIPPED_CORRUPTED",
        "loop": "SKIPPED_CORRUPTED",
        "\\xff.parquet": "SKIPPED_CORRUPTED",
    }
    assert "not UTF-8" in delta_platform.reason(stream, "\\xff.parquet")
    assert "symbolic link" in delta_platform.reason(stream, "link.parquet")
