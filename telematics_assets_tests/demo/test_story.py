"""The demo tells the truth: what it prints is what Dagster's history and the tables hold."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from rich.console import Console

from telematics_assets.automation import STREAM_TAG
from telematics_assets.catalog import FILE_STREAMS, REPLICATED_TABLES, TELEMATICS
from telematics_assets.demo.insurer import NEW_COLUMN
from telematics_assets.demo.story import Summary, _Story, tell
from telematics_assets.engines.embedded import open_engine
from telematics_assets.errors import PermanentError, RunLimitError, VolumeUnavailableError
from telematics_assets.settings import Settings, load_settings


@dataclass
class Told:
    """One telling of the demo."""

    settings: Settings
    summary: Summary
    printed: str
    instance: dg.DagsterInstance


def settings_of(home: Path) -> Settings:
    return load_settings({"TELEMATICS_HOME": str(home)})


def paper() -> Console:
    return Console(file=io.StringIO(), width=10_000)


def read(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    settings = settings_of(tmp_path_factory.mktemp("demo") / "home")
    console = paper()
    summary = tell(settings, console=console, timeout_s=300)
    with dg.DagsterInstance.from_config(summary.dagster_home) as instance:
        yield Told(settings, summary, read(console), instance)


def test_three_waves_become_two_tables_with_every_record_once(told: Told) -> None:
    assert told.summary.waves == 3
    parquet, lines = told.summary.tables
    assert (parquet.table, lines.table) == ("workspace.01_bronze.telematics", "workspace.01_bronze.telematics_test")
    assert (parquet.rows, lines.rows) == (9000, 9000)
    assert (parquet.files, parquet.files_quarantined) == (12, 3)
    assert (lines.files, lines.files_quarantined) == (12, 1)
    assert parquet.rows_rescued == 750 * 3  # text, other case, fractions
    assert lines.rows_rescued == 750  # other case; text is as good as any
    assert lines.rows_corrupt > 0


def test_the_summary_is_what_the_engine_says(told: Told) -> None:
    engine = open_engine(told.settings)
    files = {(table.table, table.rows, table.version) for table in told.summary.tables}
    mirrors = {(mirror.table, mirror.rows, mirror.version) for mirror in told.summary.mirrors}
    assert {(table.table, table.rows, table.version) for table in engine.tables()} == files | mirrors
    for stream in FILE_STREAMS:
        pending = engine.look(stream)
        assert (pending.files, pending.waiting) == (0, 0)


def test_each_wave_is_one_run_per_stream_that_a_sensor_started(told: Told) -> None:
    everything = list(reversed(told.instance.get_runs()))
    assert tuple(run.run_id for run in everything) == told.summary.runs
    assert {run.status for run in everything} == {dg.DagsterRunStatus.SUCCESS}
    runs = everything[:6]
    assert [run.tags[STREAM_TAG] for run in runs] == ["telematics", "telematics_test"] * 3
    assert [run.job_name for run in runs] == ["load_telematics", "load_telematics_test"] * 3
    assert {run.tags["dagster/sensor_name"] for run in runs} == {"telematics_files", "telematics_test_files"}
    assert len({run.tags["dagster/run_key"] for run in runs}) == 6
    assert {run.tags[".dagster/repository"] for run in runs} == {"__repository__@telematics_assets"}


def test_materializations_checks_and_observations_are_in_the_history(told: Told) -> None:
    for stream in FILE_STREAMS:
        bronze, landing = dg.AssetKey(["bronze", stream.table]), dg.AssetKey(["landing", stream.name])
        made = told.instance.fetch_materializations(bronze, limit=10).records
        assert len(made) == 3
        assert made[0].asset_materialization is not None
        assert made[0].asset_materialization.metadata["dagster/row_count"].value == 9000
        seen = told.instance.fetch_observations(landing, limit=20).records
        assert len(seen) >= 3
    evaluated = [
        record
        for run_id in told.summary.runs[:6]
        for record in told.instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
    ]
    assert len(evaluated) == 42


def test_the_insurers_tables_are_mirrored_by_runs_of_the_schedule_and_its_database_is_stopped(told: Told) -> None:
    runs = [told.instance.get_run_by_id(run_id) for run_id in told.summary.runs[6:]]
    assert [run and run.tags.get("dagster/schedule_name") for run in runs] == ["supabase_replication"] * 2
    mirrors = {mirror.source: mirror for mirror in told.summary.mirrors}
    assert list(mirrors) == [table.source for table in REPLICATED_TABLES]
    for mirror in mirrors.values():
        assert mirror.rows == mirror.inserted - mirror.deleted > 0
    assert mirrors["public.policies"].deleted >= 3
    assert min(mirrors["public.policies"].updated, mirrors["public.drivers"].updated) > 0
    policies = open_engine(told.settings).state(told.settings.names.bronze("supabase_policies"))
    assert policies is not None
    assert NEW_COLUMN in [column.name for column in policies.columns]

    assert "supabase 1/2 first look: schedule supabase_replication started run" in told.printed
    assert "workspace.01_bronze.supabase_customers" in told.printed
    assert not (told.settings.local_supabase / "connection.json").exists()
    assert not (told.settings.local_supabase / "postgres" / "data" / "postmaster.pid").exists()


def test_the_example_of_the_docs_joins_what_was_driven_to_who_insures_it(told: Told, repository: Path) -> None:
    page = (repository / "docs" / "supabase.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(import polars.*?)```", page, re.DOTALL)
    made: dict[str, Any] = {}
    exec(example.replace(".telematics/", f"{told.settings.home}/"), made)
    # Two customers left, whosever vehicles theirs are.
    assert 10 <= made["driven"].height <= 12
    assert made["driven"]["points"].min() > 0


def test_a_database_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    settings = load_settings({"TELEMATICS_HOME": str(tmp_path), "SUPABASE_HOST": "127.0.0.1"})
    console = paper()
    summary = tell(settings, console=console, timeout_s=300, streams=())
    assert (summary.mirrors, summary.runs) == ((), ())
    assert "a database of yours is configured" in read(console)
    assert not settings.local_supabase.exists()


def test_one_line_per_phase_then_a_summary_and_the_next_step_last(told: Told) -> None:
    lines = told.printed.splitlines()
    assert [line.split(":")[0] for line in lines[:9]] == [
        f"wave {number}/3 {name}" for number, name in enumerate(("clean", "drifted", "dirty"), 1) for _ in range(3)
    ]
    assert "8 files with 6,000 records landed" in lines[0]
    assert "sensor telematics_files started run" in lines[1]
    assert "3,000 rows added to telematics, version" in lines[1]
    assert "rescued_ratio" in lines[4]
    assert "corrupt_files" in lines[7]
    assert "workspace.01_bronze.telematics_test" in told.printed
    assert lines[-2].strip() == f"export DAGSTER_HOME={told.summary.dagster_home}"
    assert lines[-1].strip() == "make dev"
    assert "warning" not in told.printed.lower()


def test_told_again_it_adds_three_more_waves_to_the_same_tables_and_the_same_history(told: Told) -> None:
    before = len(told.instance.get_runs())
    terminal = Console(file=io.StringIO(), width=200, force_terminal=True)
    again = tell(told.settings, console=terminal, timeout_s=300, streams=(TELEMATICS,), replicated=())
    (table,) = again.tables
    assert (table.rows, table.files, table.files_quarantined) == (18_000, 24, 6)
    assert len(told.instance.get_runs()) == before + 3
    assert not set(again.runs) & set(told.summary.runs)
    # A terminal sees a spinner, but none of the runs' own log lines.
    assert "running job load_telematics" in read(terminal)
    assert "STEP_START" not in read(terminal)


def test_dagster_home_is_respected_when_it_is_set(tmp_path: Path) -> None:
    settings = load_settings({"TELEMATICS_HOME": str(tmp_path / "home"), "DAGSTER_HOME": str(tmp_path / "elsewhere")})
    with pytest.raises(RunLimitError):
        tell(settings, console=paper(), timeout_s=0, replicated=())
    deadline = time.monotonic() + 300
    while not (tmp_path / "elsewhere" / "dagster.yaml").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (tmp_path / "home" / "dagster").exists()


def test_a_failed_run_ends_the_demo_with_the_runs_own_error(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "home")
    table = tmp_path / "home" / "tables" / "workspace" / "01_bronze" / "telematics"
    _somebody_elses_table(table)
    console = paper()
    with pytest.raises(PermanentError) as failure:
        tell(settings, console=console, timeout_s=300, streams=(TELEMATICS,), replicated=())
    assert str(failure.value).startswith("Run ")
    assert "of job load_telematics failed: " in str(failure.value)
    assert "workspace.01_bronze.telematics" in str(failure.value)
    assert "Traceback" not in str(failure.value)
    assert "make dev" not in read(console)


def test_the_hard_limit_says_what_it_was_doing_and_leaves_no_run_in_flight(tmp_path: Path) -> None:
    environment = {**os.environ, "TELEMATICS_HOME": str(tmp_path / "home"), "DAGSTER_HOME": str(tmp_path / "dagster")}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", "from telematics_assets.cli import main; main()", "demo", "--timeout", "2.5", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert time.monotonic() - began < 200
    error = json.loads(done.stdout)["error"]
    assert error.startswith("The demo took longer than 2.5 s. It was ")
    assert error in done.stderr
    with dg.DagsterInstance.from_config(str(tmp_path / "dagster")) as instance:
        assert all(run.is_finished for run in instance.get_runs())


def test_giving_up_ends_the_run_in_flight_and_tells_its_last_error(tmp_path: Path) -> None:
    @dg.op(retry_policy=dg.RetryPolicy(max_retries=1))
    def fails() -> None:
        raise VolumeUnavailableError("the landing folder did not answer")

    @dg.job
    def broken() -> None:
        fails()

    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path)) as instance:
        story = _Story(settings_of(tmp_path), paper(), FILE_STREAMS)
        assert story.abandon("Nothing had begun.") is None

        run = instance.create_run_for_job(broken, status=dg.DagsterRunStatus.STARTED)
        story._instance, story._run_id = instance, run.run_id
        assert story.abandon("Time was over.") is None
        ended = instance.get_run_by_id(run.run_id)
        assert ended is not None
        assert ended.status == dg.DagsterRunStatus.FAILURE

        failed = broken.execute_in_process(instance=instance, raise_on_error=False)
        story._run_id = failed.run_id
        told = story.abandon("Time was over.")
        assert told is not None
        assert told.startswith(f"Run {failed.run_id[:8]} had failed with: ")
        assert told.endswith("VolumeUnavailableError: the landing folder did not answer")


def _somebody_elses_table(path: Path) -> None:
    import pyarrow as pa
    from deltalake import write_deltalake

    path.mkdir(parents=True)
    write_deltalake(str(path), pa.table({"a": [1]}))
