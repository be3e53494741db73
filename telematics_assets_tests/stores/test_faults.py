"""Object stores and networks that misbehave: every fault has its error, and nothing is lost or doubled."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import unquote

import boto3
import obstore
import pyarrow as pa
import pytest

from telematics_assets.catalog import TableName
from telematics_assets.engines.checkpointed import open_volume
from telematics_assets.engines.embedded import EmbeddedEngine, open_engine
from telematics_assets.errors import (
    FileChangedError,
    MissingExtraError,
    TelematicsError,
    TransientError,
    VolumeError,
    VolumeUnavailableError,
)
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.settings import Settings
from telematics_assets.volumes import objects
from telematics_assets.volumes.base import as_files
from telematics_assets.volumes.objects import ObjectVolume, open_store
from telematics_assets_tests.stores import servers
from telematics_assets_tests.stores.books import LOCATION, STREAM, books, engine_of, land
from telematics_assets_tests.stores.proxy import PASSING, Fault, Proxy, every, proxied
from telematics_assets_tests.turns import in_turn

PATIENCE_SECONDS = 1.5
#: Whole loads under faults take long: over both stores with `--soak`.
SLOW = pytest.mark.parametrize("store", ["azure", pytest.param("s3", marks=pytest.mark.soak)], indirect=True)


@pytest.fixture(params=sorted(servers.PLACES))
def store(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def place(store: str) -> str:
    """An empty place, reached directly."""
    return servers.PLACES[store]()


@pytest.fixture
def proxy(store: str, place: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """From here on the place is reached through this proxy, with little patience."""
    monkeypatch.setattr(objects, "READ_SECONDS", 0.5)
    monkeypatch.setattr(objects, "TABLE_REQUEST_SECONDS", 2.0)
    with proxied(servers.port_of(store)) as proxy:
        environment = servers.azure_environment if store == "azure" else servers.s3_environment
        for name, value in environment(proxy.port).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def volume(place: str, proxy: Proxy) -> ObjectVolume:
    return ObjectVolume(place, LOCATION, patience_seconds=PATIENCE_SECONDS)


# -- one call ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "store"), in_turn(PASSING, sorted(servers.PLACES)), indirect=["store"])
def test_a_publication_that_meets_a_fault_is_told_as_what_it_was(
    volume: ObjectVolume, proxy: Proxy, fault: Fault
) -> None:
    proxy.fail(fault, 1, "PUT")
    assert volume.create("offsets/1", b"mine")
    assert proxy.faults == 1
    proxy.fail(fault, 1, "PUT")
    assert not volume.create("offsets/1", b"another's")
    assert volume.read("offsets/1") == b"mine"
    proxy.fail(fault, 1, "PUT")
    assert volume.upload("json/a", io.BytesIO(b"x" * 300_000))
    assert volume.names("json") == ["a"]


def test_two_writers_of_the_same_text_are_told_apart(volume: ObjectVolume, proxy: Proxy) -> None:
    proxy.fail("cut after", 1, "PUT")
    assert [volume.create("offsets/1", b"same") for _ in range(3)] == [True, False, False]


@SLOW
@pytest.mark.parametrize(
    "fault", ["429", "hang", *(pytest.param(f, marks=pytest.mark.soak) for f in ("500", "503", "cut"))]
)
def test_a_store_that_stays_away_is_transient_and_soon_given_up(
    volume: ObjectVolume, place: str, proxy: Proxy, fault: Fault
) -> None:
    volume.create("json/a", b"1")
    proxy.fail(fault, None)
    hasty = ObjectVolume(place, LOCATION, patience_seconds=0.2)
    for call in (
        lambda: hasty.scan("json"),
        lambda: hasty.names("json"),
        lambda: hasty.stat("json/a"),
        lambda: hasty.read("json/a"),
        lambda: hasty.create("json/b", b"2"),
        lambda: hasty.delete("json/a"),
    ):
        began = time.monotonic()
        with pytest.raises(VolumeUnavailableError, match="It may go through later"):
            call()
        assert time.monotonic() - began < 60
    proxy.choose = lambda method, path: None
    assert [entry.path for entry in as_files(volume.scan("json").files)] == ["json/a"]


@pytest.mark.parametrize(("fault", "store"), in_turn(PASSING, sorted(servers.PLACES)), indirect=["store"])
def test_readers_listings_and_descriptions_outlive_a_fault(volume: ObjectVolume, proxy: Proxy, fault: Fault) -> None:
    content = bytes(range(256)) * 40_000
    volume.upload("json/a", io.BytesIO(content))
    with volume.open("json/a") as source:
        proxy.fail(fault, 1, "GET")
        assert source.read() == content
    proxy.fail(fault, 1)
    assert len(list(as_files(volume.scan("json").files))) == 1
    proxy.fail(fault, 1)
    entry = volume.stat("json/a")
    assert entry is not None
    assert entry.size == len(content)
    proxy.fail(fault, 1)
    volume.delete("json/a")
    assert volume.stat("json/a") is None


@pytest.mark.parametrize("fault", ["403", "expired"])
def test_refused_or_expired_credentials_name_the_variables_and_no_value(
    volume: ObjectVolume, proxy: Proxy, place: str, store: str, fault: Fault
) -> None:
    volume.create("json/a", b"1")
    proxy.fail(fault, None)
    lakehouse = DeltaLakehouse(place)
    for call in (
        lambda: volume.scan("json"),
        lambda: volume.read("json/a"),
        lambda: volume.stat("json/a"),
        lambda: volume.create("json/b", b"2"),
        lambda: lakehouse.tables("workspace", "01_bronze"),
        lambda: lakehouse.open(TableName("workspace", "01_bronze", "t")),
        lambda: lakehouse.create(TableName("workspace", "01_bronze", "t"), pa.schema([("n", pa.int64())]), "", {}),
    ):
        with pytest.raises(VolumeError, match="refused the credentials") as refused:
            call()
        told = str(refused.value)
        assert ("AZURE_STORAGE_ACCOUNT_KEY" if store == "azure" else "AWS_SECRET_ACCESS_KEY") in told
        assert not any(secret in told for secret in (servers.KEY, "test-secret", "Signature"))


def test_a_file_that_is_replaced_under_its_reader_is_seen(volume: ObjectVolume, place: str) -> None:
    volume.upload("json/a", io.BytesIO(b"1" * 10_000_000))
    with volume.open("json/a") as source:
        assert source.read(10) == b"1" * 10
        obstore.put(open_store(place), "json/a", b"2" * 10_000_000, use_multipart=False)
        with pytest.raises(FileChangedError, match="json/a changed"):
            source.read()


def test_a_container_that_is_not_there_is_said(store: str, place: str) -> None:
    nowhere = place.replace(servers.CONTAINER, "nowhere", 1)
    volume = ObjectVolume(nowhere, LOCATION, patience_seconds=PATIENCE_SECONDS)
    for call in (lambda: volume.scan("json"), lambda: volume.names("json"), lambda: volume.create("json/a", b"")):
        with pytest.raises(VolumeError, match=r"does not exist\. Create it"):
            call()


def test_a_name_that_no_store_takes_is_refused(place: str) -> None:
    with pytest.raises(VolumeError, match="no control characters"):
        ObjectVolume(place, LOCATION).create("json/a\tb", b"")


def put_by_boto(place: str, path: str) -> None:
    """Put an empty object into S3 under a key that obstore can't name."""
    key = place.removeprefix(f"s3://{servers.CONTAINER}/")
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{servers.port_of('s3')}")
    client.put_object(Bucket=servers.CONTAINER, Key=f"{key}/{path}", Body=b"")


def test_a_name_that_cant_be_listed_stops_loudly_and_is_told() -> None:
    place = servers.s3()
    put_by_boto(place, "json/tab\there")
    volume = ObjectVolume(place, LOCATION)
    volume.create("json/good", b"1")
    with pytest.raises(VolumeError, match=r"tab\shere"):
        volume.scan("json")


def test_a_marker_of_a_folder_is_no_file() -> None:
    place = servers.s3()
    put_by_boto(place, "json/folder/")
    volume = ObjectVolume(place, LOCATION)
    volume.create("json/empty", b"")
    for _ in range(2):
        assert [entry.path for entry in as_files(volume.scan("json").files)] == ["json/empty"]


# -- tables and whole loads --------------------------------------------------------------------------------------------


def engine(place: str) -> EmbeddedEngine:
    return engine_of(place, patience_seconds=PATIENCE_SECONDS)


@SLOW
@pytest.mark.parametrize("fault", ["cut after", "hang after"])
def test_a_commit_whose_answer_is_lost_is_there_once(place: str, proxy: Proxy, fault: Fault) -> None:
    land(place, 0, files=3)
    engine(place).ingest(STREAM)
    land(place, 1, files=3)
    proxy.fail(fault, 1, "PUT", "_delta_log/00000000000000000002.json")
    with suppress(TransientError):
        engine(place).ingest(STREAM)
    assert proxy.faults == 1
    engine(place).ingest(STREAM)
    landed, loaded = books(place)
    assert landed == loaded
    assert len(landed) == 30
    assert engine(place).ingest(STREAM).batches == ()


def kind_of(method: str, path: str) -> str:
    """What a request is for: its method and the part of a deployment that it touches."""
    path = unquote(path)
    parts = ("_delta_log", "metadata", "offsets", "results", "commits", "ledger", "/json/", "tables")
    part = next((part for part in parts if part in path), "other")
    return f"{method} {'list of ' if 'list' in path else ''}{part}"


@SLOW
@pytest.mark.parametrize(
    "fault", ["500", "cut after", *(pytest.param(fault, marks=pytest.mark.soak) for fault in ("cut body", *PASSING))]
)
def test_every_kind_of_request_outlives_a_fault(place: str, proxy: Proxy, fault: Fault) -> None:
    land(place, 0)
    seen: set[str] = set()

    def first_of_its_kind(method: str, path: str) -> Fault | None:
        kind = kind_of(method, path)
        if kind in seen:
            return None
        seen.add(kind)
        return fault

    proxy.choose = first_of_its_kind
    for _ in range(12):
        try:
            engine(place).ingest(STREAM)
            break
        except TransientError:
            continue
    else:
        raise AssertionError(f"it never went through {sorted(seen)}")
    assert {"PUT offsets", "PUT results", "PUT commits", "PUT _delta_log", "PUT tables", "GET /json/"} <= seen
    proxy.choose = lambda method, path: None
    landed, loaded = books(place)
    assert landed == loaded
    assert engine(place).ingest(STREAM).batches == ()


KINDS = ("PUT offsets", "GET /json/", "PUT tables", "PUT _delta_log", "PUT results", "PUT commits")
REFUSALS = [("500", "PUT _delta_log"), ("expired", "PUT tables"), ("403", "PUT commits"), ("expired", "GET /json/")]


@SLOW
@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        *REFUSALS,
        *(pytest.param(fault, kind, marks=pytest.mark.soak) for fault in ("500", "403", "expired") for kind in KINDS),
    ],
)
def test_a_store_that_refuses_one_kind_of_request_for_ever_is_told_and_nothing_is_lost(
    place: str, proxy: Proxy, fault: Fault, kind: str
) -> None:
    land(place, 0, files=3)
    engine(place).ingest(STREAM)
    land(place, 1, files=3)
    proxy.choose = lambda method, path: fault if kind_of(method, path) == kind else None
    with pytest.raises(TransientError if fault == "500" else VolumeError) as told:
        engine(place).ingest(STREAM)
    assert not any(secret in str(told.value) for secret in (servers.KEY, "test-secret", "Signature"))
    proxy.choose = lambda method, path: None
    engine(place).ingest(STREAM)
    landed, loaded = books(place)
    assert landed == loaded
    assert len(landed) == 30


@SLOW
def test_one_object_that_may_not_be_read_is_named_and_the_others_land(place: str, proxy: Proxy) -> None:
    land(place, 0, files=4)
    proxy.choose = lambda method, path: "403" if "w0-2.json" in path and method == "GET" else None
    with pytest.raises(VolumeError, match=r"1 files of stream 's' could not be opened.*w0-2\.json"):
        engine(place).ingest(STREAM)
    proxy.choose = lambda method, path: None
    assert {r.path: r.state for r in engine(place).files(STREAM)}["json/w0-2.json"] == "DISCOVERED"
    assert engine(place).ingest(STREAM).rows == 5
    landed, loaded = books(place)
    assert landed == loaded


@SLOW
@pytest.mark.parametrize("nth", [7, pytest.param(11, marks=pytest.mark.soak)])
def test_loads_under_faults_without_end_lose_and_double_nothing(place: str, proxy: Proxy, nth: int) -> None:
    faults: tuple[Fault, ...] = ("500", "cut", "429", "cut after", "503", "403")
    for wave in range(2):
        land(place, wave)
        proxy.choose = every(nth, faults)
        for _ in range(2):
            with suppress(TelematicsError):
                engine(place).ingest(STREAM)
        proxy.choose = lambda method, path: None
    engine(place).ingest(STREAM)
    landed, loaded = books(place)
    assert proxy.faults > 5
    assert landed == loaded
    assert len(landed) == 60
    assert {record.state for record in engine(place).files(STREAM)} == {"INGESTED"}


# -- a deployment ------------------------------------------------------------------------------------------------------


def test_a_home_in_an_object_store_is_a_whole_deployment(place: str) -> None:
    settings = Settings(home=place, settle_seconds=0, incomplete_seconds=0)
    opened = open_engine(settings)
    assert [finding.level for finding in opened.doctor()] == ["ok", "ok"]
    volume = open_volume(settings)
    assert volume.uri == f"{place}{LOCATION}"
    volume.create("json/a.json", b'{"n": 1}\n')
    report = opened.ingest(STREAM)
    assert report.rows == 1
    (state,) = opened.tables()
    assert (state.uri, state.rows) == (f"{place}/tables/workspace/01_bronze/s", 1)
    opened.reset(STREAM, drop_table=True)
    assert list(opened.tables()) == []
    assert opened.ingest(STREAM).rows == 1


def test_a_store_that_does_not_answer_is_a_finding(store: str, place: str, proxy: Proxy) -> None:
    proxy.fail("403", None)
    findings = open_engine(Settings(home=place)).doctor()
    assert [finding.level for finding in findings] == ["error", "error"]
    assert all("refused the credentials" in finding.message for finding in findings)


def test_without_obstore_the_way_to_install_it_is_told(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, "telematics_assets.volumes.objects")
    with pytest.raises(MissingExtraError, match=r"telematics_assets\[objects\]"):
        open_volume(Settings(home=place))


def test_an_unsafe_setting_for_other_stores_does_not_make_commits_unsafe(monkeypatch: pytest.MonkeyPatch) -> None:
    place = servers.s3()
    monkeypatch.setenv("AWS_S3_ALLOW_UNSAFE_RENAME", "true")
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    land(place, 0)
    with ThreadPoolExecutor(4) as pool:
        for loading in [pool.submit(engine_of(place).ingest, STREAM) for _ in range(4)]:
            with suppress(TransientError):
                loading.result()
    engine_of(place).ingest(STREAM)
    landed, loaded = books(place)
    assert landed == loaded
