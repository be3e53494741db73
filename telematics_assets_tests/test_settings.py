"""The environment: defaults, and an error that names the variable, the value and what is accepted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from telematics_assets.catalog import Names
from telematics_assets.engines.spark.session import SparkOptions
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
            "TELEMATICS_SPARK_MASTER": "spark://one:7077,two:7077",
            "TELEMATICS_SPARK_JARS": str(tmp_path / "jars"),
            "TELEMATICS_SPARK_REPOSITORY": "https://mirror.example:8443/m2",
            "TELEMATICS_SPARK_CONF": "spark.driver.memory=9g 'spark.driver.extraJavaOptions=-Da=1 -Db=2'",
            "JAVA_HOME": str(tmp_path / "jvm"),
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
        spark=SparkOptions(
            master="spark://one:7077,two:7077",
            jars=tmp_path / "jars",
            repository="https://mirror.example:8443/m2",
            conf={"spark.driver.memory": "9g", "spark.driver.extraJavaOptions": "-Da=1 -Db=2"},
            java_home=tmp_path / "jvm",
        ),
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


def test_spark_is_an_engine_on_this_machine_unless_told_otherwise() -> None:
    settings = load_settings({"TELEMATICS_ENGINE": "spark"})
    assert (settings.engine, settings.spark) == ("spark", SparkOptions())
    assert settings.spark.local
    remote = load_settings({"TELEMATICS_SPARK_REMOTE": "sc://host:15002"}).spark
    assert (remote.remote, remote.local) == ("sc://host:15002", False)


@pytest.mark.parametrize(
    "master", ["local", "local[4]", "local[*,3]", "local-cluster[2,1,1024]", "yarn", "k8s://https://host:6443"]
)
def test_masters_of_spark_are_taken(master: str) -> None:
    assert load_settings({"TELEMATICS_SPARK_MASTER": master}).spark.master == master


@pytest.mark.parametrize("master", ["local[0]", "local[x]", "spark://host", "mesos://host:1", "sc://host", "Yarn"])
def test_another_master_is_refused_with_those_that_are_taken(master: str) -> None:
    with pytest.raises(SettingsError, match="spark://host:7077") as refused:
        load_settings({"TELEMATICS_SPARK_MASTER": master})
    assert f"TELEMATICS_SPARK_MASTER={master!r}" in str(refused.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"TELEMATICS_SPARK_REMOTE": "https://host/?token=hush"}, "Give a Spark Connect URL"),
        ({"TELEMATICS_SPARK_REMOTE": "sc://host", "TELEMATICS_SPARK_MASTER": "yarn"}, "unset one"),
        ({"TELEMATICS_SPARK_REPOSITORY": "https://user:hush@mirror/m2"}, "spark.jars.ivySettings"),
        ({"TELEMATICS_SPARK_REPOSITORY": "https://mirror/m2?key=hush"}, "spark.jars.ivySettings"),
        ({"TELEMATICS_SPARK_CONF": "spark.a=1 hush"}, "setting 2 is no spark.key=value"),
        ({"TELEMATICS_SPARK_CONF": "fs.azure.account.key=hush"}, "setting 1 is no spark.key=value"),
        ({"TELEMATICS_SPARK_CONF": "spark.a='hush"}, "No closing quotation"),
        ({"TELEMATICS_SPARK_CONF": "spark.a=hush spark.a=2"}, "spark.a stands there twice"),
        ({"TELEMATICS_SPARK_CONF": "spark.master=local"}, "set TELEMATICS_SPARK_MASTER"),
    ],
)
def test_what_spark_can_not_be_told_is_refused_without_showing_secrets(given: dict[str, str], told: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(told)) as refused:
        load_settings(given)
    assert any(name in str(refused.value) for name in given)
    assert "hush" not in str(refused.value)


def test_values_of_spark_settings_are_not_shown() -> None:
    assert "hush" not in repr(load_settings({"TELEMATICS_SPARK_CONF": "spark.hadoop.fs.key=hush"}))


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
