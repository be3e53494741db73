"""Staging from URLs: the same promises as for local files, whatever a server does."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

import fsspec
import obstore
import pytest
from fsspec.implementations.github import GithubFileSystem
from hypothesis import given
from hypothesis import strategies as st

from telematics_assets.catalog import TELEMATICS, TELEMATICS_TEST
from telematics_assets.demo.fleet import FleetPlan, json_bytes, parquet_bytes, points
from telematics_assets.errors import DbfsDisabledError, TelematicsError, UnknownNameError
from telematics_assets.remote import Limits, name_problem
from telematics_assets.remote_faults import shown
from telematics_assets.staging import StageReport, stage
from telematics_assets.volumes.base import as_files
from telematics_assets.volumes.local import LocalVolume
from telematics_assets.volumes.memory import MemoryVolume
from telematics_assets.volumes.objects import open_store
from telematics_assets_tests.stores import servers
from telematics_assets_tests.stores.proxy import Fault, proxied
from telematics_assets_tests.web import Web, pointer, serving

POINTS = points(FleetPlan(vehicles=2, files=1, rows=20))
PARQUET = parquet_bytes(POINTS)
JSON = json_bytes(POINTS)
LIMITS = Limits(attempts=3, backoff_seconds=0.01, connect_seconds=0.5, read_seconds=0.5, total_seconds=5)
SECRETS = ("hunter2", "s3cret", "sigsigsig")


@pytest.fixture
def web() -> Iterator[Web]:
    with serving() as web:
        yield web


@pytest.fixture
def volume() -> MemoryVolume:
    return MemoryVolume()


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Temporary files have a folder of their own, and none is left in it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def github(web: Web) -> Iterator[Web]:
    """GitHub's implementation in fsspec implementation, told to ask the server on loopback."""

    class Loopback(GithubFileSystem):  # type: ignore[misc]
        url = web.url("repos/{org}/{repo}/git/trees/{sha}")
        content_url = web.url("repos/{org}/{repo}/contents/{path}?ref={sha}")

    fsspec.register_implementation("github", Loopback, clobber=True)
    yield web
    fsspec.register_implementation("github", GithubFileSystem, clobber=True)


def landed(volume: MemoryVolume) -> dict[str, bytes]:
    return {e.path: volume.read(e.path) for folder in ("parquet", "json") for e in as_files(volume.scan(folder).files)}


def stage_json(url: str, volume: MemoryVolume, limits: Limits = LIMITS) -> StageReport:
    return stage([url], TELEMATICS_TEST, volume, limits=limits)


def refusal(report: StageReport) -> tuple[str, bool]:
    """The reason of the one file that was refused, and whether it may go through later."""
    assert report.staged == ()
    (refused,) = report.refused
    return refused.reason, refused.transient


# -- what is there -----------------------------------------------------------------------------------------------------


def test_a_file_a_listed_folder_and_local_paths_are_staged_in_one_call(
    web: Web, volume: MemoryVolume, tmp_path: Path
) -> None:
    web.files = {
        "one.json": JSON,
        "many/a b.json": JSON,
        "many/day=1/über&co.json": JSON,
        "many/_part/c.json": JSON,
        "many/.hidden.json": JSON,
        "elsewhere/d.json": JSON,
    }
    (tmp_path / "local.json").write_bytes(JSON)
    (tmp_path / "by url.json").write_bytes(JSON)
    sources: list[Path | str] = [
        web.url("one.json"),
        web.url("many/"),
        tmp_path / "local.json",
        f"file://{tmp_path}/by%20url.json",
    ]
    report = stage(sources, TELEMATICS_TEST, volume, limits=LIMITS)
    assert report.refused == ()
    assert [file.path for file in report.staged] == [
        "json/one.json",
        "json/a b.json",
        "json/day=1/über&co.json",
        "json/local.json",
        "json/by url.json",
    ]
    assert [file.source for file in report.staged][:3] == [
        web.url("one.json"),
        web.url("many/a b.json"),
        web.url("many/day=1/über&co.json"),
    ]
    assert set(landed(volume).values()) == {JSON}
    again = stage(sources, TELEMATICS_TEST, volume, limits=LIMITS)
    assert [file.already_there for file in again.staged] == [True] * 5
    assert again.refused == ()


def test_parquet_whose_end_is_read_first_is_fetched_once(web: Web, volume: MemoryVolume) -> None:
    web.files = {"a.parquet": PARQUET}
    report = stage([web.url("a.parquet")], TELEMATICS, volume, limits=LIMITS)
    assert landed(volume) == {"parquet/a.parquet": PARQUET}
    assert report.refused == ()
    assert [method for method, _, _ in web.asked].count("GET") == 1


def test_nothing_is_overwritten_and_what_does_not_fit_is_named_while_the_rest_lands(
    web: Web, volume: MemoryVolume
) -> None:
    volume.put("json/b.json", b"somebody else's")
    web.files = {"x/a.json": b"[]\n", "x/b.json": JSON, "x/c.json": JSON}
    report = stage_json(web.url("x/"), volume)
    assert [file.path for file in report.staged] == ["json/c.json"]
    assert {refused.source: refused.reason.partition(";")[0] for refused in report.refused} == {
        web.url("x/a.json"): "line 1 is no JSON object: []",
        web.url("x/b.json"): "json/b.json exists with other content",
    }
    assert not any(refused.transient for refused in report.refused)


def test_links_may_be_absolute_and_other_links_of_a_page_are_no_files(web: Web, volume: MemoryVolume) -> None:
    web.files = {"x/a.json": JSON, "x/http_log.json": JSON, "x/q.json": JSON}
    web.pages["x/"] = (
        f'<A class=f HREF="{web.url("x/a.json")}">a</A> <a href=http_log.json>b</a> '
        '<a href="/x/q.json?v=1&amp;w=2">c</a>'
        '<a href="/">home</a> <a href="https://example.com/x/e.json">e</a> <a href="mailto:a@b">m</a>'
        '<a href="#top">t</a> <a href="?C=M">s</a> <a href="..">up</a> <a href="http://[bad/">g</a>'
    )
    report = stage_json(web.url("x/"), volume)
    assert report.refused == ()
    assert sorted(file.path for file in report.staged) == ["json/a.json", "json/http_log.json", "json/q.json"]
    assert any(path == "/x/q.json?v=1&w=2" for _, path, _ in web.asked)


@pytest.mark.parametrize(
    "link",
    [
        "../../x.json",
        "a/../../../x.json",
        "%2e%2e/x.json",
        "%2e%2e%2fx.json",
        "..%2fx.json",
        "x%00.json",
        "x%1b[2J.json",
    ],
)
def test_a_listed_name_that_leads_elsewhere_is_refused_and_never_asked_for(
    web: Web, volume: MemoryVolume, link: str
) -> None:
    web.files = {"x/y/good.json": JSON, "x.json": JSON}
    web.pages["x/y/"] = f'<a href="{link}">a</a><a href="good.json">b</a>'
    report = stage_json(web.url("x/y/"), volume)
    assert landed(volume) == {"json/good.json": JSON}
    (refused,) = report.refused
    assert refused.reason.startswith("its name ")
    assert refused.source.isprintable()
    assert {path for _, path, _ in web.asked} == {"/x/y/", "/x/y/good.json"}


@pytest.mark.parametrize("name", ["%2e%2e", "a%2fb.json", "a%0a.json", "_hidden.json", ".hidden.json", "bad%ff.json"])
def test_a_files_own_name_is_held_to_the_same(web: Web, volume: MemoryVolume, name: str) -> None:
    reason, transient = refusal(stage_json(web.url(f"x/{name}"), volume))
    assert "name" in reason
    assert not transient
    assert web.asked == []


def test_a_folder_without_an_end_is_left_off_by_name(web: Web, volume: MemoryVolume) -> None:
    class Mirror(dict[str, str]):
        def __contains__(self, path: object) -> bool:
            return str(path).endswith("/")

        def __getitem__(self, path: str) -> str:
            return '<a href="again/">a</a><a href="more/">b</a>'

    web.pages = Mirror()
    limits = Limits(attempts=1, depth=3, folders=10)
    deep = stage_json(web.url("x/"), volume, limits)
    assert {refused.reason for refused in deep.refused} >= {"its folders are more than 3 deep"}
    assert len(web.asked) <= 10
    assert "it has more than 4 folders" in [
        refused.reason for refused in stage_json(web.url("x/"), volume, Limits(attempts=1, folders=4)).refused
    ]


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("404", "it does not exist there"),
        ("410", "it does not exist there"),
        ("401", "the server refused access (401)"),
        ("403", "the server refused access (403)"),
        ("418", "the server answered 418"),
        ("loop", "it is redirected without end"),
        ("endless", "it is larger than 100,000 bytes, or has no end"),
        ("huge", "it is larger than 100,000 bytes, or has no end"),
    ],
)
@pytest.mark.parametrize("path", ["a.json", "folder/"])
def test_what_a_server_refuses_for_good_is_the_reason_and_is_not_asked_for_again(
    web: Web, volume: MemoryVolume, fault: str, reason: str, path: str
) -> None:
    web.files = {"a.json": JSON, "folder/a.json": JSON}
    web.fail(fault, None)
    limits = Limits(attempts=2, backoff_seconds=100, file_bytes=100_000, page_bytes=100_000)
    began = time.monotonic()
    told, transient = refusal(stage_json(web.url(path), volume, limits))
    assert told.startswith(reason)
    assert not transient
    assert time.monotonic() - began < 100
    assert landed(volume) == {}


@pytest.mark.parametrize("fault", ["429", "500", "503", "cut", "long", "hang"])
@pytest.mark.parametrize("path", ["a.json", "folder/"])
def test_what_passes_is_tried_again_and_then_called_transient(
    web: Web, volume: MemoryVolume, fault: str, path: str
) -> None:
    web.files = {"a.json": JSON, "folder/a.json": JSON}
    web.fail(fault, 2)
    assert stage_json(web.url(path), volume).refused == ()
    assert landed(volume) == {"json/a.json": JSON}
    web.fail(fault, None)
    reason, transient = refusal(stage_json(web.url(path), MemoryVolume()))
    assert "(3 attempts). It may go through later" in reason
    assert transient


def test_a_file_that_drips_in_for_ever_is_given_up(web: Web, volume: MemoryVolume) -> None:
    web.files = {"a.json": JSON}
    web.fail("drip", None)
    began = time.monotonic()
    limits = Limits(attempts=2, backoff_seconds=0.01, read_seconds=0.5, total_seconds=1)
    assert refusal(stage_json(web.url("a.json"), volume, limits))[1]
    assert time.monotonic() - began < 60


def test_a_server_that_is_not_there_is_transient_and_a_host_that_is_not_is_for_good(volume: MemoryVolume) -> None:
    with serving() as gone:
        url = gone.url("a.json")
    assert refusal(stage_json(url, volume))[1]
    reason, transient = refusal(stage_json("http://no-such-host.invalid/a.json", volume))
    assert (reason, transient) == ("there is no host of that name", False) or transient


def test_a_server_that_answers_no_head_requests_will_do(web: Web, volume: MemoryVolume) -> None:
    web.files = {"a.json": JSON}
    web.fail("405", None, "HEAD")
    assert stage_json(web.url("a.json"), volume).refused == ()
    assert landed(volume) == {"json/a.json": JSON}


def test_a_redirect_is_followed_and_takes_no_credentials_to_another_server(web: Web, volume: MemoryVolume) -> None:
    web.files = {"b.json": JSON}
    with serving() as first:
        first.user = "me:hunter2"
        first.fault = lambda method, path: f"to {web.url('b.json')}"
        report = stage_json(first.url("a.json", user="me:hunter2"), volume)
    assert report.refused == ()
    assert landed(volume) == {"json/a.json": JSON}
    assert web.asked
    assert not any("Authorization" in headers for _, _, headers in web.asked)


def test_a_file_that_changes_on_its_server_is_refused_and_never_seen(web: Web, volume: MemoryVolume) -> None:
    web.files = {"a.json": JSON}

    def change(method: str, path: str) -> None:
        if method == "GET":
            web.versions["a.json"] = 1

    web.fault = change
    reason, transient = refusal(stage_json(web.url("a.json"), volume))
    assert "it changed while it was being staged" in reason
    assert transient
    assert landed(volume) == {}


class _Full(io.BytesIO):
    def write(self, data: Any) -> int:
        raise OSError(28, "No space left on device")


def test_a_full_temporary_folder_is_said(web: Web, volume: MemoryVolume, monkeypatch: pytest.MonkeyPatch) -> None:
    web.files = {"a.json": JSON}
    monkeypatch.setattr(tempfile, "TemporaryFile", _Full)
    reason, transient = refusal(stage_json(web.url("a.json"), volume))
    assert "No space left on device" in reason
    assert transient


# -- credentials -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [None, "401", "404", "500", "cut", "loop"])
@pytest.mark.parametrize("path", ["a.json", "folder/", "_a.json", "folder/../%2e%2e"])
def test_credentials_in_a_url_are_used_and_never_shown(
    web: Web, volume: MemoryVolume, fault: str | None, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    web.files = {"a.json": JSON, "folder/a.json": JSON}
    web.user = "hunter2:s3cret"
    if fault:
        web.fail(fault, None)
    told: list[str] = []
    url = web.url(path, user="hunter2:s3cret") + "?sig=sigsigsig"
    with caplog.at_level("INFO"):
        report = stage([url], TELEMATICS_TEST, volume, limits=LIMITS, progress=told.append)
    if fault is None and path in ("a.json", "folder/"):
        assert landed(volume) == {"json/a.json": JSON}
        assert all("sig=sigsigsig" in asked for _, asked, _ in web.asked)
    else:
        assert report.refused
    assert report.staged or report.refused
    said = f"{report}{told}{caplog.text}"
    assert not any(secret in said for secret in SECRETS)
    assert "…@127.0.0.1" in said


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("https://user:pw@host/a.json?sig=x#f", "https://…@host/a.json?…"),
        ("https://token@host/a", "https://…@host/a"),
        ("https://host/a@b.json", "https://host/a@b.json"),
        ("github://owner:repo@main/folder", "github://owner:repo@main/folder"),
        ("abfss://container@account.dfs.core.windows.net/a", "abfss://container@account.dfs.core.windows.net/a"),
        ("zip://a/b.json::https://u:p@host/a.zip?t=1", "zip://a/b.json::https://…@host/a.zip?…"),
        ("https://user:pa/ss@host/a", "https://…"),
        ("https://user:pa?ss@host/a", "https://…"),
        ("http://[::1]:8080/a", "http://[::1]:8080/a"),
        ("https://host/\x1b[2J", "https://host/\\x1b[2J"),
    ],
)
def test_a_url_is_shown_without_what_may_be_a_secret(url: str, safe: str) -> None:
    assert shown(url) == safe


@pytest.mark.parametrize(
    "url",
    [
        "nosuch://hunter2:s3cret@host/a?sig=sigsigsig",
        "https://hunter2:s3cret@:80/a?sig=sigsigsig",
        "s3://bucket?sig=sigsigsig",
        "https://me:hunter2/s3cret@host/a",
        "https://[bad/a?sig=sigsigsig",
    ],
)
def test_errors_before_anything_is_asked_for_show_no_secret_either(url: str, volume: MemoryVolume) -> None:
    with pytest.raises(TelematicsError) as raised:
        stage_json(url, volume)
    assert not any(secret in "".join(traceback.format_exception(raised.value)) for secret in SECRETS)


# -- other kinds -------------------------------------------------------------------------------------------------------


def test_a_folder_of_a_repository_is_staged_small_files_large_ones_and_pointers(
    github: Web, volume: MemoryVolume
) -> None:
    large = json_bytes(points(FleetPlan(vehicles=2, files=1, rows=2000)))
    assert len(large) > 100_000
    github.repository["v1"] = {
        "samples/a.json": JSON,
        "samples/day/large.json": large,
        "samples/.github/x.json": JSON,
        "README.md": b"#",
    }
    report = stage_json("github://fleet:samples@v1/samples", volume)
    assert report.refused == ()
    assert landed(volume) == {"json/a.json": JSON, "json/day/large.json": large}
    assert report.staged[0].source == "github://fleet:samples@v1/samples/a.json"
    assert [f.already_there for f in stage_json("github://fleet:samples@v1/samples", volume).staged] == [True, True]
    single = stage_json("github://fleet:samples@v1/samples/a.json", MemoryVolume())
    assert [file.path for file in single.staged] == ["json/a.json"]


def test_a_pointer_of_a_repository_is_followed_and_its_content_compared(github: Web, volume: MemoryVolume) -> None:
    content = b"LFS" + JSON
    github.repository["v1"] = {"a.json": content}
    assert "line 1 is no JSON object: LFS" in refusal(stage_json("github://fleet:samples@v1/", volume))[0]
    assert pointer(content).startswith(b"version https://git-lfs")


def test_a_branch_that_moves_while_it_is_staged_is_seen(github: Web, volume: MemoryVolume) -> None:
    github.repository["main"] = {"a.json": JSON, "b.json": JSON}

    def push(method: str, path: str) -> None:
        if "contents/b.json" in path:
            github.repository["main"]["b.json"] = JSON * 2

    github.fault = push
    report = stage_json("github://fleet:samples@main/", volume)
    assert landed(volume) == {"json/a.json": JSON}
    (refused,) = report.refused
    assert "the branch moved" in refused.reason
    assert refused.transient


@pytest.mark.parametrize(
    ("url", "fault", "transient"),
    [
        ("github://fleet:samples@gone/", None, False),
        ("github://fleet:samples@v1/nothing", None, False),
        ("github://nobody:samples@v1/", None, False),
        ("github://fleet:samples@v1/", "403", False),
        ("github://fleet:samples@v1/", "429", True),
        ("github://fleet:samples@v1/", "502", True),
        ("github://fleet:samples@v1/", "cut", True),
        ("github://fleet:samples@v1/", "loop", False),
    ],
)
def test_what_a_repository_refuses_is_the_reason(
    github: Web, volume: MemoryVolume, url: str, fault: str | None, transient: bool
) -> None:
    github.repository["v1"] = {"a.json": JSON}
    if fault:
        github.fail(fault, None)
    assert refusal(stage_json(url, volume))[1] is transient
    assert landed(volume) == {}


def test_memory_and_archives_near_and_far_are_sources_like_any_other(
    web: Web, volume: MemoryVolume, tmp_path: Path
) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/staging/day/a.json": JSON, "/staging/_b.json": JSON})
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("in/z.json", JSON)
        archive.writestr("in/sub/y.json", JSON)
        archive.writestr("../../x.json", JSON)
    (tmp_path / "near.zip").write_bytes(packed.getvalue())
    web.files = {"far.zip": packed.getvalue()}
    sources = ["memory://staging", f"zip://in::{tmp_path}/near.zip", f"zip://in/z.json::{web.url('far.zip')}?t=s3cret"]
    report = stage(sources, TELEMATICS_TEST, volume, limits=LIMITS)
    memory.rm("/staging", recursive=True)
    assert [(file.path, file.already_there) for file in report.staged] == [
        ("json/day/a.json", False),
        ("json/z.json", False),
        ("json/sub/y.json", False),
        ("json/z.json", True),
    ]
    assert report.refused == ()
    assert "s3cret" not in str(report)
    assert landed(volume) == {f"json/{name}.json": JSON for name in ("day/a", "z", "sub/y")}
    whole = stage_json(f"zip://::{tmp_path}/near.zip", MemoryVolume())
    assert sorted(file.path for file in whole.staged) == ["json/in/sub/y.json", "json/in/z.json"]
    assert [refused.reason for refused in whole.refused] == ["its name leads out of its folder; rename it"]


def test_a_file_in_memory_that_changes_while_it_is_fetched_is_refused(volume: MemoryVolume) -> None:
    memory = fsspec.filesystem("memory")

    class Changing(type(memory)):  # type: ignore[misc]
        protocol = "changing"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            stripped: str = super()._strip_protocol(path.removeprefix("changing://"))
            return stripped

        def _open(self, path: str, mode: str = "rb", **options: Any) -> IO[bytes]:
            opened: IO[bytes] = super()._open(path, mode, **options)
            if mode == "rb":
                self.pipe_file(path, JSON * 2)
            return opened

    fsspec.register_implementation("changing", Changing, clobber=True)
    memory.pipe("/a.json", JSON)
    assert "it changed" in refusal(stage_json("changing:///a.json", volume))[0]
    memory.rm("/a.json")


@pytest.mark.parametrize("store", sorted(servers.PLACES))
def test_objects_of_a_store_are_staged_with_the_credentials_of_the_environment(
    store: str, volume: MemoryVolume
) -> None:
    place = servers.PLACES[store]()
    for name in ("in/a.json", "in/day/b.json", "in/_c.json"):
        obstore.put(open_store(place), name, JSON)
    report = stage([f"{place}/in", f"{place}/in/day/b.json"], TELEMATICS_TEST, volume, limits=LIMITS)
    assert report.refused == ()
    assert sorted(landed(volume)) == ["json/a.json", "json/b.json", "json/day/b.json"]
    reason, transient = refusal(stage_json(f"{place}/nothing", volume))
    assert "no such object" in reason
    assert not transient


@pytest.mark.parametrize(("fault", "transient"), [("503", True), ("cut", True), ("403", False)])
@pytest.mark.parametrize("path", ["in", "in/a.json"])
def test_a_store_that_does_not_give_its_objects_is_a_reason_while_the_rest_lands(
    volume: MemoryVolume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, fault: Fault, transient: bool
) -> None:
    place = servers.s3()
    obstore.put(open_store(place), "in/a.json", JSON)
    (tmp_path / "local.json").write_bytes(JSON)
    with proxied(servers.port_of("s3")) as proxy:
        for name, value in servers.s3_environment(proxy.port).items():
            monkeypatch.setenv(name, value)
        proxy.fail(fault, None)
        report = stage([f"{place}/{path}", tmp_path / "local.json"], TELEMATICS_TEST, volume, limits=LIMITS)
    assert landed(volume) == {"json/local.json": JSON}
    (refused,) = report.refused
    assert refused.transient is transient


# -- usage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["dbfs:/a", "dbfs://a/b.json", "/dbfs/a", "/mnt/a", "file:///mnt/a", "zip://a::dbfs:/b.zip"]
)
def test_sources_on_dbfs_are_refused(source: str, volume: MemoryVolume) -> None:
    with pytest.raises(DbfsDisabledError, match="DBFS_DISABLED"):
        stage_json(source, volume)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nosuch://a/b", "'nosuch' is no kind of URL"),
        ("http:///a.json", "names no host"),
        ("s3://bucket", "names no file or folder"),
        ("file://other-host/a.json", "is on another machine"),
        ("file:///no/such/file", "no file or folder"),
    ],
)
def test_a_source_that_makes_no_sense_stops_before_anything_is_uploaded(
    url: str, said: str, volume: MemoryVolume, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_bytes(JSON)
    with pytest.raises(UnknownNameError, match=said):
        stage([tmp_path / "a.json", url], TELEMATICS_TEST, volume)
    assert landed(volume) == {}


def test_a_missing_library_of_another_kind_is_named_as_fsspec_does(volume: MemoryVolume) -> None:
    fsspec.register_implementation("far", "no_such_module.Far", errtxt="Install no_such_module", clobber=True)
    with pytest.raises(
        UnknownNameError, match=r"far:// needs a library that is not installed\. Install no_such_module"
    ):
        stage_json("far://a/b", volume)


@pytest.mark.parametrize(
    ("missing", "url"),
    [
        ("aiohttp", "https://host/a.json"),
        ("requests", "github://o:r@ref/a"),
        ("fsspec", "memory://a"),
        ("obstore", "s3://bucket/a"),
    ],
)
def test_a_missing_library_is_named_with_the_way_to_install_it(missing: str, url: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from telematics_assets.errors import MissingExtraError\n"
        "from telematics_assets.remote import Limits, open_source\n"
        f"try: open_source({url!r}, Limits())\n"
        "except MissingExtraError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True).stdout
    assert f'pip install "telematics_assets[{"objects" if missing == "obstore" else "urls"}]"' in said


@given(st.text())
def test_a_name_that_is_accepted_is_one_part_of_a_path_on_any_disk(name: str) -> None:
    if name_problem(name) is None:
        assert os.path.basename(os.path.normpath(f"/a/{name}")) == name
        assert name.encode().decode().isprintable() or not any(char < " " for char in name)


def test_on_a_local_disk_a_fetched_file_is_there_whole_or_not_at_all(web: Web, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    class Watched(LocalVolume):
        def upload(self, path: str, source: BinaryIO, *, modified_ns: int | None = None) -> bool:
            seen.append(sorted(entry.name for entry in (tmp_path / "volume").rglob("*")))
            return super().upload(path, source, modified_ns=modified_ns)

    web.files = {"x/a.json": JSON, "x/b.json": JSON}
    volume = Watched(tmp_path / "volume", "/Volumes/workspace/00_landing/telematics")
    faulty: Callable[[str, str], str | None] = lambda method, path: "cut" if path == "/x/a.json" else None  # noqa: E731
    web.fault = faulty
    report = stage([web.url("x/")], TELEMATICS_TEST, volume, limits=LIMITS)
    assert [file.path for file in report.staged] == ["json/b.json"]
    assert seen == [[]]
    assert sorted(path.name for path in (tmp_path / "volume").rglob("*") if path.is_file()) == ["b.json"]
