"""The code location as a whole: what it holds, what it needs to load, and how a user extends it.

`python -m telematics_assets_tests.test_definitions` writes the snapshot of all asset specs anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from telematics_assets.catalog import FILE_STREAMS, Column, FileStream, Names, ReplicatedTable, TableContract
from telematics_assets.definitions import build_definitions
from telematics_assets.settings import Settings
from telematics_assets.testing import MemoryEngine, json_bytes
from telematics_assets_tests.orchestra import definitions_of, load

SNAPSHOT = Path(__file__).with_name("asset_specs.json")

TRIPS = FileStream(
    name="trips",
    format="json",
    folder="trips",
    table="trips",
    contract=TableContract("One row per trip.", (Column("trip_id", "STRING", "Number of the trip."),)),
)


def described(definitions: dg.Definitions) -> str:
    """Everything that the graph says of its assets, checks, jobs and sensors, as text that reads well in a diff."""
    graph = definitions.resolve_asset_graph()
    repository = definitions.get_repository_def()
    assets = {
        spec.key.to_user_string(): {
            "description": spec.description,
            "group": spec.group_name,
            "deps": sorted(dep.asset_key.to_user_string() for dep in spec.deps),
            "kinds": sorted(spec.kinds),
            "owners": list(spec.owners),
            "tags": dict(spec.tags),
            "code_version": spec.code_version,
            "metadata": {name: _plain(value) for name, value in spec.metadata.items()},
        }
        for spec in definitions.resolve_all_asset_specs()
    }
    checks = {
        key.to_user_string(): {"blocking": spec.blocking, "description": spec.description}
        for key in graph.asset_check_keys
        for spec in [graph.get_check_spec(key)]
    }
    sensors = {
        sensor.name: {
            "jobs": [target.job_name for target in sensor.targets],
            "interval": sensor.minimum_interval_seconds,
            "default": sensor.default_status.value,
        }
        for sensor in repository.sensor_defs
        if sensor.name in {"supabase_changes", *(f"{stream.name}_files" for stream in FILE_STREAMS)}
    }
    schedules = {
        schedule.name: {
            "job": schedule.job_name,
            "cron": schedule.cron_schedule,
            "default": schedule.default_status.value,
        }
        for schedule in repository.schedule_defs
    }
    jobs = sorted(name for name in repository.job_names if not name.startswith("__"))
    everything = {"assets": assets, "checks": checks, "sensors": sensors, "schedules": schedules, "jobs": jobs}
    return json.dumps(everything, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dg.TableSchema):
        return [f"{column.name} {column.type}: {column.description}" for column in value.columns]
    if isinstance(value, dg.MetadataValue):
        return _plain(value.value)
    return value


def test_every_asset_spec_is_as_reviewed() -> None:
    assert described(build_definitions(settings=Settings())) == SNAPSHOT.read_text(encoding="utf-8"), (
        "The graph changed. If that is meant: python -m telematics_assets_tests.test_definitions"
    )


def test_every_asset_says_whose_it_is_and_what() -> None:
    for spec in build_definitions(settings=Settings()).resolve_all_asset_specs():
        assert spec.owners
        assert spec.kinds
        assert spec.description
        assert spec.group_name in ("landing", "supabase", "bronze")
        assert spec.code_version


def test_loading_warns_of_nothing(tmp_path: Path) -> None:
    _python("import telematics_assets.definitions", tmp_path, "-W", "error")


def test_loading_touches_no_disk(tmp_path: Path) -> None:
    _python("import telematics_assets.definitions", tmp_path, "-B")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("TELEMATICS_ENGINE", "embeded", "Did you mean 'embedded'?"),
        ("TELEMATICS_HOME", "dbfs:/telematics", "DBFS_DISABLED"),
        ("TELEMATICS_SENSOR_SECONDS", "often", "Give a number of seconds"),
    ],
)
def test_a_setting_that_is_not_accepted_fails_the_load_with_its_name(
    tmp_path: Path, variable: str, value: str, says: str
) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        _python("import telematics_assets.definitions", tmp_path, **{variable: value})
    last = caught.value.stderr.strip().splitlines()[-1]
    assert says in last
    assert value in last


def test_the_names_of_a_deployment_reach_the_metadata() -> None:
    settings = Settings(names=Names(catalog="lake", bronze_schema="raw"))
    specs = build_definitions(settings=settings, tables=[ReplicatedTable("public.orders")]).resolve_all_asset_specs()
    tables = [spec.metadata["dagster/table_name"] for spec in specs if spec.group_name == "bronze"]
    assert sorted(tables) == ["lake.raw.supabase_orders", "lake.raw.telematics", "lake.raw.telematics_test"]


def test_a_stream_of_ones_own_gets_everything_that_the_shipped_ones_have() -> None:
    engine = MemoryEngine()
    definitions = build_definitions([*FILE_STREAMS, TRIPS], Settings(), engine, engine.volume)
    assert {"landing/trips", "bronze/trips"} < {key.to_user_string() for key in definitions.resolve_all_asset_keys()}
    engine.volume.put("trips/a.json", json_bytes([{"trip_id": "1"}, {"trip_id": "2"}]))
    sensor = definitions.resolve_sensor_def("trips_files")
    with dg.DagsterInstance.ephemeral() as instance:
        tick = sensor.evaluate_tick(dg.build_sensor_context(instance, resources={"engine": engine}))
        assert tick.run_requests is not None
        (request,) = tick.run_requests
        result = definitions.resolve_job_def("load_trips").execute_in_process(instance=instance, tags=request.tags)
    assert result.success
    assert {evaluation.check_name for evaluation in result.get_asset_check_evaluations()} == {
        "contract",
        "reconciliation",
        "corrupt_files",
        "changed_files",
        "duplicate_files",
        "rescued_ratio",
    }
    state = engine.state(engine.names.bronze("trips"))
    assert state is not None
    assert state.rows == 2


def test_two_streams_cannot_have_one_table() -> None:
    twice = [TRIPS, FileStream("more_trips", "json", "more", "trips", TRIPS.contract)]
    with pytest.raises(dg.DagsterInvalidDefinitionError, match="trips"):
        build_definitions(twice, Settings()).resolve_asset_graph()


def test_the_settings_choose_an_engine_that_is_made_when_it_is_needed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    definitions = build_definitions(settings=Settings(home=home, settle_seconds=0))
    landing = home / "Volumes/workspace/00_landing/telematics/json/a.json"
    assert not home.exists()
    landing.parent.mkdir(parents=True)
    landing.write_bytes(json_bytes([{"vehicle_id": "v1"}]))
    os.utime(landing, (1_700_000_000, 1_700_000_000))
    with dg.DagsterInstance.ephemeral() as instance:
        for _ in range(2):
            job = definitions.resolve_job_def("load_telematics_test")
            assert job.execute_in_process(instance=instance).success
        look = dg.define_asset_job("look", selection=dg.AssetSelection.assets(["landing", "telematics_test"]))
        both = dg.Definitions.merge(definitions, dg.Definitions(jobs=[look]))
        result = both.resolve_job_def("look").execute_in_process(instance=instance)
    assert (home / "tables/workspace/01_bronze/telematics_test/_delta_log").is_dir()
    (seen,) = result.asset_observations_for_node("observe_telematics_test")
    assert seen.metadata["dagster/uri"].value == str(landing.parent)
    assert seen.metadata["files_known"].value == 1


def test_an_engine_is_opened_once_in_a_process(tmp_path: Path) -> None:
    resources = [build_definitions(settings=Settings(home=tmp_path)).resources or {} for _ in range(2)]
    with dg.build_resources(resources[0]) as first, dg.build_resources(resources[1]) as second:
        assert first.engine is second.engine
        assert first.landing is first.engine.volume


def test_the_tools_find_the_code_location_under_one_name(repository: Path) -> None:
    """Sensor cursors carry over between `dagster dev` and `dg dev` only if both call it the same."""
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["dg"]["project"]
    workspace = (repository / "workspace.yaml").read_text(encoding="utf-8")
    assert f"location_name: {project['code_location_name']}\n" in workspace
    assert f"module_name: {project['root_module']}.definitions\n" in workspace


def test_runs_execute_in_one_process() -> None:
    assert definitions_of(MemoryEngine()).executor is dg.in_process_executor


def test_a_run_needs_no_disk_when_the_engine_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    engine = MemoryEngine()
    engine.volume.put("json/a.json", json_bytes([{"vehicle_id": "v1"}]))
    with dg.DagsterInstance.ephemeral() as instance:
        assert load(engine, instance, "telematics_test").success
    assert not list(tmp_path.iterdir())


def _python(code: str, folder: Path, *options: str, **variables: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **variables}
    subprocess.run(
        [sys.executable, *options, "-c", code], cwd=folder, env=environment, check=True, capture_output=True, text=True
    )


if __name__ == "__main__":
    SNAPSHOT.write_text(described(build_definitions(settings=Settings())), encoding="utf-8")
