"""The database as a resource: configured by the environment, looked up at run time, its secrets shown nowhere."""

import json
import traceback
from pathlib import Path
from urllib.parse import quote

import dagster as dg
import pytest
from dagster._core.remote_representation.external_data import RepositorySnap
from dagster_shared.serdes import serialize_value
from typer.testing import CliRunner

from telematics_assets.cli import app
from telematics_assets.definitions import build_definitions
from telematics_assets.errors import SettingsError, SupabaseError
from telematics_assets.microbatch.connection import PARTS, Supabase
from telematics_assets.microbatch.session import transaction
from telematics_assets.resources import SupabaseResource
from telematics_assets.settings import load_settings
from telematics_assets_tests.databases import Database

SECRET = "hush %41/@'ü\""
FORMS = (SECRET, "hush", quote(SECRET, safe=""))


@dg.asset(required_resource_keys={"supabase"})
def counted(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
    supabase: Supabase | None = context.resources.supabase
    context.log.info(f"The database is {supabase!r}.")
    assert supabase is not None
    with transaction(supabase, pauses=()) as session:
        return dg.MaterializeResult(metadata={"one": session.value("SELECT 1")})


def run(resource: SupabaseResource, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    return dg.materialize([counted], resources={"supabase": resource}, instance=instance, raise_on_error=False)


def everything_kept(instance: dg.DagsterInstance) -> str:
    """What the UI could show of all runs: their configuration, their jobs, their events with all error reports."""
    kept = []
    for record in instance.get_run_records():
        kept.append(serialize_value(record.dagster_run))
        kept.append(json.dumps(record.dagster_run.run_config))
        assert record.dagster_run.job_snapshot_id is not None
        kept.append(serialize_value(instance.get_job_snapshot(record.dagster_run.job_snapshot_id)))
        kept += [serialize_value(event) for event in instance.all_logs(record.dagster_run.run_id)]
    return "\n".join(kept)


@pytest.mark.parametrize("given", ["url", "parts"])
def test_the_password_is_in_nothing_that_anybody_is_shown(
    database: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    given: str,
) -> None:
    port, user = str(database.pooler.port), database.supabase.user
    environment = {"SUPABASE_SSLMODE": "disable"}
    if given == "url":
        url = f"postgresql://{user}:{quote(SECRET, safe='')}@127.0.0.1:{port}/{database.name}"
        environment |= {"SUPABASE_DB_URL": url}
    else:
        environment |= {"SUPABASE_HOST": "127.0.0.1", "SUPABASE_PORT": port, "SUPABASE_USER": user}
        environment |= {"SUPABASE_PASSWORD": SECRET, "SUPABASE_DATABASE": database.name}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    shown = []

    settings = load_settings()
    resource = SupabaseResource.from_settings(settings)
    shown += [repr(settings), str(settings), repr(resource), str(resource)]
    definitions = build_definitions(settings=settings)
    shown.append(serialize_value(RepositorySnap.from_def(definitions.get_repository_def())))

    with dg.instance_for_test() as instance:
        # The password is wrong, so that every kind of report has its chance.
        assert not run(resource, instance).success
        shown.append(everything_kept(instance))
    assert "is wrong" in shown[-1]

    resolved = resource.process_config_and_initialize()
    assert resolved.password == SECRET
    shown += [repr(resolved)]
    try:
        with transaction(settings.require_supabase()):
            pass
    except SupabaseError:
        shown.append(traceback.format_exc())
    for options in ([], ["--json"]):
        answer = CliRunner().invoke(app, ["doctor", *options], env={"TELEMATICS_HOME": str(tmp_path)})
        assert "is wrong" in answer.output
        shown += [answer.output, answer.stderr]
    shown += [*capfd.readouterr(), caplog.text]

    for text in shown:
        assert [form for form in FORMS if form in text or json.dumps(form)[1:-1] in text] == []


def test_the_ui_sees_the_names_of_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPABASE_DB_URL", f"postgresql://u.x:{quote(SECRET, safe='')}@localhost/postgres")
    monkeypatch.setenv("SUPABASE_SSLMODE", "disable")

    repository = build_definitions(settings=load_settings()).get_repository_def()

    assert "SUPABASE_DB_URL" in serialize_value(RepositorySnap.from_def(repository))


def test_a_run_reads_the_database_that_the_environment_names(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    supabase = database.supabase
    for part, variable in PARTS.items():
        if part not in ("url", "ca"):
            monkeypatch.setenv(variable, str(getattr(supabase, part)))
    resource = SupabaseResource.from_settings(load_settings())

    with dg.DagsterInstance.ephemeral() as instance:
        result = run(resource, instance)

    assert result.success


def test_what_is_wrong_with_the_settings_stops_who_needs_the_database_and_nobody_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SUPABASE_HOST", "https://abcdefghijklmnopqrst.supabase.co")
    settings = load_settings()

    assert settings.supabase is None
    assert build_definitions(settings=settings).get_repository_def()
    with pytest.raises(SettingsError, match="lacks SUPABASE_USER and SUPABASE_PASSWORD"):
        settings.require_supabase()
    with dg.DagsterInstance.ephemeral() as instance:
        result = run(SupabaseResource.from_settings(settings), instance)
    assert not result.success
    answer = CliRunner().invoke(app, ["doctor", "--json"], env={"TELEMATICS_HOME": str(tmp_path)})
    assert answer.exit_code == 1
    (finding,) = [found for found in json.loads(answer.stdout) if found["subject"] == "Supabase"]
    assert finding["level"] == "error"
    assert "lacks SUPABASE_USER" in finding["message"]


def test_nothing_configured_is_fine(tmp_path: Path) -> None:
    settings = load_settings({})

    assert settings.supabase is None
    with pytest.raises(SettingsError, match="Set SUPABASE_DB_URL"):
        settings.require_supabase()
    assert SupabaseResource.from_settings(settings).create_resource(dg.build_init_resource_context()) is None
    answer = CliRunner().invoke(app, ["doctor", "--json"], env={"TELEMATICS_HOME": str(tmp_path)})
    (finding,) = [found for found in json.loads(answer.stdout) if found["subject"] == "Supabase"]
    assert finding["level"] == "ok"
    assert "Set SUPABASE_DB_URL" in finding["message"]


def test_a_code_location_may_bring_its_database_along(supabase: Supabase) -> None:
    definitions = build_definitions(settings=load_settings({}), supabase=supabase)

    assert definitions.get_repository_def().get_top_level_resources().keys() == {"engine", "landing", "supabase"}
    result = dg.materialize([counted], resources={"supabase": definitions.resources["supabase"]})  # type: ignore[index]
    assert result.success


def test_loading_connects_to_nothing_and_needs_no_driver(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, variable in PARTS.items():
        if part not in ("url", "ca"):
            monkeypatch.setenv(variable, str(getattr(database.supabase, part)))
    before = database.pooler.logins

    build_definitions(settings=load_settings()).get_repository_def()

    assert database.pooler.logins == before


def test_a_misspelt_variable_is_told_another_tools_is_not() -> None:
    names = ("SUPABASE_HOSTS", "SUPABASE_DBURL", "SUPABASE_URL", "SUPABASE_ANON_KEY", "SUPABASE_SERVICE_ROLE_KEY")

    assert load_settings(dict.fromkeys(names, "x")).unknown == {
        "SUPABASE_HOSTS": "SUPABASE_HOST",
        "SUPABASE_DBURL": "SUPABASE_DB_URL",
    }
