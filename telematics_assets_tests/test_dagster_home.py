"""Preparing DAGSTER_HOME: complete, once, without touching what is there, by however many processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from telematics_assets.dagster_home import prepare_dagster_home
from telematics_assets.errors import SettingsError

DATABASES = ("history/runs.db", "history/runs/index.db", "schedules/schedules.db")


def test_a_fresh_home_is_complete(tmp_path: Path) -> None:
    home = prepare_dagster_home(tmp_path / "deep" / "dagster", ["load_telematics"])
    assert home.is_absolute()
    assert all((home / name).is_file() for name in DATABASES)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        limits = {limit.name: limit for limit in instance.event_log_storage.get_pool_limits()}
        assert limits["load_telematics"].limit == 1
        assert not limits["load_telematics"].from_default
        assert instance.run_monitoring_enabled
        assert not instance.telemetry_enabled
        assert not instance.run_retries_enabled
        assert instance.global_op_concurrency_default_limit == 1


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert prepare_dagster_home(Path("dagster")) == tmp_path / "dagster"


def test_what_a_user_changed_stays(tmp_path: Path) -> None:
    prepare_dagster_home(tmp_path, ["load_telematics"])
    config = tmp_path / "dagster.yaml"
    config.write_text("telemetry:\n  enabled: false\n")
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        instance.event_log_storage.set_concurrency_slots("load_telematics", 3)
    prepare_dagster_home(tmp_path, ["load_telematics", "load_trips"])
    assert config.read_text() == "telemetry:\n  enabled: false\n"
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        limits = {limit.name: limit.limit for limit in instance.event_log_storage.get_pool_limits()}
    assert limits == {"load_telematics": 3, "load_trips": 1}


def test_two_processes_at_once_leave_it_whole(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from telematics_assets.dagster_home import prepare_dagster_home; "
        "prepare_dagster_home(Path(sys.argv[1]), ['load_telematics'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code, str(tmp_path / "home")]
    both = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(2)]
    for process in both:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said.decode()
    with dg.DagsterInstance.from_config(str(tmp_path / "home")) as instance:
        assert instance.get_runs_count() == 0


def test_a_home_that_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"DAGSTER_HOME='.*file/dagster' can't be used.*local disk"):
        prepare_dagster_home(tmp_path / "file" / "dagster")
