"""The environment: defaults, and an error that names the variable, the value and what is accepted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from telematics_assets.catalog import Names
from telematics_assets.errors import DbfsDisabledError, SettingsError
from telematics_assets.settings import VARIABLES, Settings, load_settings

ROOT = Path(__file__).parent.parent


def test_an_empty_environment_gives_the_documented_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings({})
    assert settings == Settings()
    assert settings == Settings(home=tmp_path / ".telematics")
    assert settings.default_dagster_home == tmp_path / ".telematics" / "dagster"


def test_empty_and_blank_values_are_defaults() -> None:
    assert load_settings(dict.fromkeys(VARIABLES, "")) == load_settings(dict.fromkeys(VARIABLES, "  ")) == Settings()


def test_the_documented_default_of_each_variable_is_its_default() -> None:
    assert load_settings({name: default for name, (default, _) in VARIABLES.items()}) == Settings()


def test_every_variable_is_read(tmp_path: Path) -> None:
    settings = load_settings(
        {
            "TELEMATICS_HOME": str(tmp_path / "my home ü#1"),
            "TELEMATICS_ENGINE": " embedded ",
            "TELEMATICS_CATALOG": "main",
            "TELEMATICS_LANDING_SCHEMA": "land",
            "TELEMATICS_BRONZE_SCHEMA": "raw",
            "TELEMATICS_VOLUME": "fleet",
            "TELEMATICS_SETTLE_SECONDS": "0.25",
            "TELEMATICS_INCOMPLETE_SECONDS": "0",
            "TELEMATICS_SENSOR_SECONDS": "30",
            "TELEMATICS_MAX_RUN_SECONDS": "7200",
            "TELEMATICS_DEMO_CHANGE_SECONDS": "0.5",
            "DAGSTER_HOME": str(tmp_path / "dagster"),
            "UNRELATED": "x",
        }
    )
    assert settings == Settings(
        home=tmp_path / "my home ü#1",
        engine="embedded",
        names=Names("main", "land", "raw", "fleet"),
        settle_seconds=0.25,
        incomplete_seconds=0.0,
        sensor_seconds=30,
        max_run_seconds=7200,
        demo_change_seconds=0.5,
        dagster_home=tmp_path / "dagster",
    )


def test_the_process_environment_is_read_unless_another_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TELEMATICS_CATALOG", "main")
    assert load_settings().names.catalog == "main"
    assert load_settings({}).names.catalog == "workspace"


def test_the_home_is_absolute_whatever_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    assert load_settings({"TELEMATICS_HOME": "here/../there"}).home == tmp_path / "there"
    assert load_settings({"TELEMATICS_HOME": "~/fleet"}).home == tmp_path / "user" / "fleet"


@pytest.mark.parametrize("engine", ["spork", "Embedded", "duckdb", "embeded"])
def test_an_unknown_engine_names_the_known_ones(engine: str) -> None:
    with pytest.raises(SettingsError, match="Use one of: embedded") as refused:
        load_settings({"TELEMATICS_ENGINE": engine})
    assert f"TELEMATICS_ENGINE={engine!r}" in str(refused.value)


def test_a_misspelt_engine_is_answered_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match="Did you mean 'embedded'"):
        load_settings({"TELEMATICS_ENGINE": "embeded"})


SECONDS = [name for name in VARIABLES if name.endswith("_SECONDS")]


@pytest.mark.parametrize("name", SECONDS)
@pytest.mark.parametrize("value", ["x", "-1", "nan", "inf", "-inf", "1e9", "1,5", "5s", "0x10"])
def test_a_number_that_is_none_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match="Give a number of seconds from") as refused:
        load_settings({name: value})
    assert f"{name}={value!r}" in str(refused.value)


@pytest.mark.parametrize("name", ["TELEMATICS_SENSOR_SECONDS", "TELEMATICS_MAX_RUN_SECONDS"])
def test_intervals_are_at_least_a_second(name: str) -> None:
    with pytest.raises(SettingsError, match="from 1"):
        load_settings({name: "0.5"})


@pytest.mark.parametrize(
    "home", ["dbfs:/telematics", "DBFS:/x", "/dbfs/telematics", "/mnt/lake", "/mnt", " /mnt/lake "]
)
def test_a_home_on_dbfs_or_a_mount_is_refused_with_the_way_out(home: str) -> None:
    with pytest.raises(DbfsDisabledError, match="DBFS_DISABLED") as refused:
        load_settings({"TELEMATICS_HOME": home})
    assert home.strip() in str(refused.value)
    assert "/Volumes/<catalog>/<schema>/<volume>/" in str(refused.value)


@pytest.mark.parametrize(
    "home", ["s3://bucket/x", "abfss://c@a.dfs.core.windows.net/x/y", "az://container", "gs://bucket/a=b/c_d"]
)
def test_a_home_may_be_an_object_store_and_dagster_stays_local(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings({"TELEMATICS_HOME": f" {home}/ "})
    assert settings.home == home
    assert settings.default_dagster_home == tmp_path / ".telematics" / "dagster"


@pytest.mark.parametrize(
    "home",
    [
        "file:///x",
        "https://account.blob.core.windows.net/c",
        "s3://",
        "s3://bucket/a b",
        "s3://bucket/a%20b",
        "s3://bucket/a//b",
        "s3://bucket/../b",
        "s3://bucket/ü",
    ],
)
def test_another_url_is_no_home(home: str) -> None:
    with pytest.raises(SettingsError, match="Give a local folder") as refused:
        load_settings({"TELEMATICS_HOME": home})
    assert home in str(refused.value)


@pytest.mark.parametrize("home", ["s3://user:hush@bucket/x", "az://container/x?sv=1&sig=hush"])
def test_a_secret_in_the_home_is_refused_and_not_told(home: str) -> None:
    with pytest.raises(SettingsError, match="Give a local folder") as refused:
        load_settings({"TELEMATICS_HOME": home})
    assert "hush" not in str(refused.value)


def test_a_home_that_delta_would_look_for_elsewhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="two hex digits"):
        load_settings({"TELEMATICS_HOME": "/data/a%20b"})
    folder = tmp_path / "100%25"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(SettingsError, match="100%25"):
        load_settings({})
    assert load_settings({"TELEMATICS_HOME": "/data/100%"}).home == Path("/data/100%")


@pytest.mark.parametrize(
    "name", ["TELEMATICS_CATALOG", "TELEMATICS_LANDING_SCHEMA", "TELEMATICS_BRONZE_SCHEMA", "TELEMATICS_VOLUME"]
)
@pytest.mark.parametrize("value", ["two words", "a/b", "..", "a.b", "`a`"])
def test_a_name_that_is_none_is_told_with_its_variable(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name}: ") as refused:
        load_settings({name: value})
    assert repr(value) in str(refused.value)


def test_misspelt_variables_are_kept_with_the_nearest_known_one() -> None:
    unknown = load_settings({"TELEMATICS_HOMES": "x", "TELEMATICS_XYZZY_FROBNICATE_QQ": "x", "OTHER": "x"}).unknown
    assert unknown["TELEMATICS_HOMES"] == "TELEMATICS_HOME"
    assert set(unknown) == {"TELEMATICS_HOMES", "TELEMATICS_XYZZY_FROBNICATE_QQ"}


def test_the_example_environment_lists_every_variable_with_its_default() -> None:
    example = (ROOT / ".env.example").read_text()
    listed = dict(re.findall(r"^#?\s*((?:TELEMATICS|SUPABASE)_[A-Z_]+)=(.*)$", example, re.MULTILINE))
    assert {name: value.strip() for name, value in listed.items()} == {
        name: default for name, (default, _) in VARIABLES.items()
    }
