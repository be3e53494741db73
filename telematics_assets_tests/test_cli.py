"""The command line: what each command answers, to eyes and to scripts, and what its exit code says."""

from __future__ import annotations

import base64
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from telematics_assets.catalog import FILE_STREAMS, TELEMATICS
from telematics_assets.cli import _plain, app, exit_code
from telematics_assets.demo.fleet import FleetPlan, json_bytes, points
from telematics_assets.engines.base import FILE_STATES
from telematics_assets.engines.checkpointed import open_volume
from telematics_assets.engines.embedded import open_engine
from telematics_assets.errors import (
    CommitConflictError,
    OptionError,
    SettingsError,
    TableMovedError,
    TableNotFoundError,
    TelematicsError,
    UnknownNameError,
    VolumeUnavailableError,
)
from telematics_assets.settings import load_settings
from telematics_assets_tests.web import serving


@dataclass
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)


Telematics = Callable[..., Answer]


@pytest.fixture
def telematics(tmp_path: Path) -> Telematics:
    """The command line on a home of its own."""

    def run(*arguments: str, **environment: str) -> Answer:
        env = {"TELEMATICS_HOME": str(tmp_path / "lake"), **environment}
        result = CliRunner().invoke(app, list(arguments), env=env)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Answer(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def landed(telematics: Telematics, tmp_path: Path) -> Telematics:
    """The same, with a small dirty wave that landed an hour ago."""
    assert telematics("simulate", "--vehicles", "2", "--files", "2", "--rows", "60", "--dirty").code == 0
    for path in (tmp_path / "lake" / "Volumes").rglob("points-*"):
        os.utime(path, (time.time() - 3600, time.time() - 3600))
    return telematics


@pytest.fixture
def loaded(landed: Telematics) -> Telematics:
    """The same, loaded."""
    assert landed("load").code == 0
    return landed


def test_help_is_quick_because_it_imports_neither_dagster_nor_a_data_library() -> None:
    code = (
        "import sys\n"
        "from telematics_assets.cli import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "heavy = {'dagster', 'polars', 'pyarrow', 'deltalake', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "simulate",
        "stage",
        "load",
        "backfill",
        "retry",
        "files",
        "replicate",
        "maintain",
        "tables",
        "show",
        "reset",
        "doctor",
    ],
)
def test_every_command_teaches_by_example(command: str, telematics: Telematics) -> None:
    answer = telematics(command, "--help")
    assert answer.code == 0
    assert f"telematics {command}" in answer.out
    assert "Example" in answer.out
    assert "--json" in answer.out


def test_without_a_command_the_help_is_shown(telematics: Telematics) -> None:
    answer = telematics()
    assert answer.code == 2
    assert "Usage" in answer.out + answer.err


def test_simulate_names_the_files_it_wrote_by_stream_and_takes_the_next_seed_by_itself(telematics: Telematics) -> None:
    first = telematics("simulate", "--vehicles", "2", "--files", "3", "--rows", "30", "--json")
    assert first.code == 0
    assert first.document["seed"] == 0
    assert first.document["rows"] == 60
    written = first.document["files"]
    assert {stream: len(files) for stream, files in written.items()} == {"telematics": 3, "telematics_test": 3}
    assert written["telematics"][0] | {"size": 0} == {
        "path": "parquet/2026-01-05/points-00000-0000.parquet",
        "rows": 10,
        "size": 0,
        "fault": None,
    }
    assert telematics("simulate", "--rows", "30", "--json").document["seed"] == 1
    again = telematics("simulate", "--seed", "0", "--json")
    assert again.code == 1
    assert "seed 0 was simulated before" in again.document["error"]
    assert "Next: telematics load" in telematics("simulate", "--rows", "30", "--drift", "--dirty").out


def test_a_feed_ends_after_its_time_with_one_document_and_what_it_landed_loads(telematics: Telematics) -> None:
    arguments = ("simulate", "--feed", "600", "--for", "0.25", "--files", "2", "--rows", "20", "--vehicles", "2")
    document = telematics(*arguments, "--json").document
    assert [(stream["stream"], stream["files"], stream["rows"]) for stream in document["streams"]] == [
        ("telematics", 3, 30),
        ("telematics_test", 3, 30),
    ]
    shown = telematics(*arguments)
    assert shown.code == 0
    assert "at 600 files a" in shown.out
    assert "2 to 3" in shown.out
    answer = telematics("load", "--json", TELEMATICS_SETTLE_SECONDS="0")
    assert [report["rows"] for report in answer.document] == [60, 60]


def test_load_reports_each_stream_and_loads_nothing_twice(landed: Telematics) -> None:
    answer = landed("load", "--json")
    assert answer.code == 0
    assert answer.document == [
        {
            "stream": "telematics",
            "table": "workspace.01_bronze.telematics",
            "batches": 1,
            "files_ingested": 2,
            "files_skipped": 3,
            "rows": 60,
            "rows_rescued": 0,
            "rows_corrupt": 0,
            "table_version": 1,
        },
        {
            "stream": "telematics_test",
            "table": "workspace.01_bronze.telematics_test",
            "batches": 1,
            "files_ingested": 2,
            "files_skipped": 1,
            "rows": 60,
            "rows_rescued": 0,
            "rows_corrupt": 8,
            "table_version": 1,
        },
    ]
    again = landed("load", "--json")
    assert again.code == 0
    assert [(report["batches"], report["rows"], report["table_version"]) for report in again.document] == [
        (0, 0, 1)
    ] * 2
    assert "telematics_test" in landed("load").out


def test_load_takes_chosen_streams_and_stops_after_max_files(telematics: Telematics) -> None:
    telematics("simulate", "--vehicles", "2", "--files", "4", "--rows", "40")
    answer = telematics("load", "telematics_test", "telematics_test", "--max-files", "3", "--json")
    assert [(report["stream"], report["files_ingested"]) for report in answer.document] == [("telematics_test", 3)]


def test_one_streams_failure_does_not_keep_the_other_from_loading(telematics: Telematics, tmp_path: Path) -> None:
    telematics("simulate", "--vehicles", "2", "--files", "1", "--rows", "10")
    in_the_way = tmp_path / "lake" / "tables" / "workspace" / "01_bronze" / "telematics" / "_delta_log"
    in_the_way.mkdir(parents=True)
    (in_the_way / f"{0:020}.json").write_text("not a log")
    answer = telematics("load", "--json")
    assert answer.code == 1
    assert [report["stream"] for report in answer.document] == ["telematics_test"]
    assert answer.err.startswith("Error: telematics: ")
    assert "Traceback" not in answer.err


def test_files_list_states_and_reasons_and_can_be_asked_for_one_state(loaded: Telematics) -> None:
    every = loaded("files", "telematics", "--json").document
    assert list(every[0]) == ["path", "state", "reason", "size", "modified_at", "batch_id"]
    assert [file["state"] for file in every] == ["INGESTED"] * 2 + ["SKIPPED_CORRUPTED"] * 3
    for file in every:
        assert datetime.fromisoformat(file["modified_at"]).tzinfo == UTC
        assert file["modified_at"].endswith("Z")
        assert (file["reason"] is None) == (file["state"] == "INGESTED")
    broken = loaded("files", "telematics", "--state", "skipped_corrupted", "--json").document
    assert broken == every[2:]
    assert every[2]["path"] in loaded("files", "telematics").out
    assert loaded("files", "telematics", "--state", "CHANGED").out == "Files of telematics: none.\n"


def test_files_can_be_limited_to_the_first_by_path(loaded: Telematics) -> None:
    every = loaded("files", "telematics", "--json").document
    assert loaded("files", "telematics", "--limit", "2", "--json").document == every[:2]
    assert loaded("files", "telematics", "--state", "SKIPPED_CORRUPTED", "--limit", "1", "--json").document == [
        every[2]
    ]
    shown = loaded("files", "telematics", "--limit", "1").out
    assert every[0]["path"] in shown
    assert every[1]["path"] not in shown
    assert loaded("files", "telematics", "--limit", "0").code == 2


def test_of_many_files_eyes_see_the_first_and_a_script_sees_all(telematics: Telematics, tmp_path: Path) -> None:
    folder = Path(open_volume(load_settings({"TELEMATICS_HOME": str(tmp_path / "lake")})).uri) / "parquet"
    folder.mkdir(parents=True)
    for number in range(1_005):
        (folder / f"{number:05}.parquet").touch()
    answer = telematics("files", "telematics")
    assert "00999.parquet" in answer.out
    assert "01000.parquet" not in answer.out
    assert "only the first 1,000 are shown" in answer.err
    assert len(telematics("files", "telematics", "--json").document) == 1_005
    assert telematics("files", "telematics_test", "--json").document == []


def test_maintain_says_what_it_did_to_each_stream(loaded: Telematics) -> None:
    listed = loaded("maintain", "--json").document
    assert [report["stream"] for report in listed] == ["telematics", "telematics_test"]
    assert listed[0]["files_after"] <= listed[0]["files_before"]
    assert listed[0]["notes"] == []
    assert "telematics_test" in loaded("maintain", "telematics_test").out
    assert loaded("load", "--json").document[0]["batches"] == 0
    assert loaded("maintain", "telematix").code == 2


def test_a_stream_that_can_not_be_maintained_keeps_no_other_from_it(loaded: Telematics, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "lake/tables/workspace/01_bronze/telematics")
    answer = loaded("maintain", "--json")
    assert answer.code == 1
    assert [report["stream"] for report in answer.document] == ["telematics_test"]
    assert "telematics is gone" in answer.err


def test_a_files_modification_time_keeps_its_microseconds(telematics: Telematics, tmp_path: Path) -> None:
    volume = open_volume(load_settings({"TELEMATICS_HOME": str(tmp_path / "lake")}))
    telematics("simulate", "--vehicles", "1", "--files", "1", "--rows", "1")
    (path,) = volume.scan("parquet").files["path"]
    os.utime(Path(volume.uri) / path, ns=(0, 1_767_592_800_123_456_789))
    (file,) = telematics("files", "telematics", "--json").document
    assert file["modified_at"] == "2026-01-05T06:00:00.123456Z"


def test_tables_say_what_their_logs_say(loaded: Telematics) -> None:
    listed = loaded("tables", "--json").document
    assert [(t["table"], t["rows"], t["version"]) for t in listed] == [
        ("workspace.01_bronze.telematics", 60, 1),
        ("workspace.01_bronze.telematics_test", 60, 1),
    ]
    assert all(t["files"] == 1 and t["bytes"] > 0 for t in listed)
    assert set(listed[0]) == {"table", "rows", "files", "bytes", "version"}
    assert "workspace.01_bronze.telematics_test" in loaded("tables").out


def test_before_the_first_load_there_are_no_tables(telematics: Telematics) -> None:
    assert telematics("tables", "--json").document == []
    assert telematics("tables").out == "Tables: none.\n"


@pytest.mark.parametrize("name", ["telematics_test", "workspace.01_bronze.telematics_test"])
def test_show_takes_a_name_of_one_level_or_three(name: str, loaded: Telematics) -> None:
    rows = loaded("show", name, "--limit", "7", "--json").document
    assert len(rows) == 7
    assert {"vehicle_id", "device", "_raw_record", "_source_file", "_batch_id"} <= set(rows[0])
    assert datetime.fromisoformat(rows[0]["_ingested_at"]).tzinfo is not None
    shown = loaded("show", name, "--limit", "2").out
    assert shown.startswith("workspace.01_bronze.telematics_test: 2 rows")
    assert "vehicle_id" in shown


def test_every_value_has_a_form_in_json_that_loses_nothing() -> None:
    values = {
        "when": datetime(2026, 1, 5, 6, 0, 0, 123456, tzinfo=UTC),
        "day": date(2026, 1, 5),
        "price": Decimal("12345678901234567890.10"),
        "bytes": b"\xff\x00",
        "numbers": [1, 1.5, math.nan, -math.inf],
        "nested": {"deep": [date(2026, 1, 5)]},
        "none": None,
        "yes": True,
    }
    plain = _plain(values)
    assert json.loads(json.dumps(plain, allow_nan=False)) == {
        "when": "2026-01-05T06:00:00.123456Z",
        "day": "2026-01-05",
        "price": "12345678901234567890.10",
        "bytes": base64.b64encode(b"\xff\x00").decode(),
        "numbers": [1, 1.5, "nan", "-inf"],
        "nested": {"deep": ["2026-01-05"]},
        "none": None,
        "yes": True,
    }


def test_stage_uploads_what_fits_names_what_does_not_and_the_load_takes_it(
    telematics: Telematics, tmp_path: Path
) -> None:
    (tmp_path / "good.json").write_bytes(json_bytes(points(FleetPlan(vehicles=1, files=1, rows=5))))
    (tmp_path / "bad.json").write_text("[]\n")
    sources = (str(tmp_path / "good.json"), str(tmp_path / "bad.json"))
    answer = telematics("stage", *sources, "--stream", "telematics_test", "--json")
    assert answer.code == 1
    assert [(file["path"], file["already_there"]) for file in answer.document["staged"]] == [("json/good.json", False)]
    (refused,) = answer.document["refused"]
    assert refused == {"source": sources[1], "reason": "line 1 is no JSON object: []", "transient": False}
    assert "bad.json" in answer.err
    again = telematics("stage", sources[0], "-s", "telematics_test")
    assert again.code == 0
    assert "there already" in again.out
    os.utime(tmp_path / "lake/Volumes/workspace/00_landing/telematics/json/good.json", (0, 0))
    assert telematics("load", "telematics_test", "--json").document[0]["rows"] == 5


def test_stage_takes_urls_and_says_75_if_only_what_may_go_through_later_was_refused(
    telematics: Telematics, tmp_path: Path
) -> None:
    (tmp_path / "local.json").write_bytes(json_bytes(points(FleetPlan(vehicles=1, files=1, rows=5))))
    with serving() as web:
        web.files = {"a.json": (tmp_path / "local.json").read_bytes()}
        sources = (web.url("a.json", user="me:hunter2"), str(tmp_path / "local.json"))
        staged = telematics("stage", *sources, "-s", "telematics_test", "--json")
        assert staged.code == 0
        assert [file["path"] for file in staged.document["staged"]] == ["json/a.json", "json/local.json"]
        web.fault = lambda method, path: "503" if "busy" in path else None
        web.files["bad.json"] = b"[]"
        for extra, code in (((), 75), ((web.url("bad.json"),), 1)):
            answer = telematics("stage", web.url("busy.json?sig=s3cret"), *extra, "-s", "telematics_test", "--json")
            assert answer.code == code
            assert answer.document["refused"][0]["transient"]
            assert "s3cret" not in answer.out + answer.err
    refused = telematics("stage", "nosuch://me:hunter2@host/a", "-s", "telematics_test")
    assert refused.code == 2
    assert "hunter2" not in staged.out + staged.err + refused.err


def test_doctor_is_content_where_all_is_well_and_names_what_is_not(loaded: Telematics, tmp_path: Path) -> None:
    well = loaded("doctor", "--json", DAGSTER_HOME=str(tmp_path / "dagster"))
    assert well.code == 0
    assert {finding["level"] for finding in well.document} == {"ok"}
    assert {f"stream {stream.name}" for stream in FILE_STREAMS} <= {finding["subject"] for finding in well.document}

    unset = loaded("doctor", "--json", TELEMATICS_HOEM="/x", TELEMATICS_X_OF_NOBODY_AT_ALL_EVER="1").document
    warnings = {finding["subject"]: finding["fix"] for finding in unset if finding["level"] == "warning"}
    assert warnings == {
        "DAGSTER_HOME": f"export DAGSTER_HOME={tmp_path}/lake/dagster",
        "TELEMATICS_HOEM": "Did you mean TELEMATICS_HOME?",
        "TELEMATICS_X_OF_NOBODY_AT_ALL_EVER": "unset TELEMATICS_X_OF_NOBODY_AT_ALL_EVER",
    }
    assert f"export DAGSTER_HOME={tmp_path}/lake/dagster" in loaded("doctor").out


def test_doctor_fails_on_an_error_and_gives_its_fix(loaded: Telematics, tmp_path: Path) -> None:
    relative = loaded("doctor", "--json", DAGSTER_HOME="somewhere/dagster")
    assert relative.code == 1
    (finding,) = (finding for finding in relative.document if finding["level"] == "error")
    assert finding["fix"] == f"export DAGSTER_HOME={Path('somewhere/dagster').absolute()}"

    checkpoint = tmp_path / "lake/Volumes/workspace/00_landing/telematics/_checkpoints/telematics"
    for path in (checkpoint / "commits").iterdir():
        path.unlink()
    lost = loaded("doctor", "--json", DAGSTER_HOME="/somewhere")
    assert lost.code in (0, 1)
    assert any(finding["subject"] == "stream telematics" for finding in lost.document)


def test_without_matplotlib_doctor_says_how_to_get_it(telematics: Telematics, monkeypatch: pytest.MonkeyPatch) -> None:
    class Without:
        """An import system that has no matplotlib."""

        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            return None

    hidden = [finder for finder in sys.meta_path if "PathFinder" not in repr(finder)]
    monkeypatch.setattr(sys, "meta_path", [*hidden, Without()])
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    answer = telematics("doctor", "--json")
    fixes = {finding["subject"]: finding["fix"] for finding in answer.document}
    assert fixes["matplotlib"] == 'pip install "telematics_assets[plots]"'


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        (("load", "telematix"), {}, "Streams: telematics, telematics_test"),
        (("files", "telematix"), {}, "Streams: telematics, telematics_test"),
        (("files", "telematics", "--state", "LOST"), {}, ", ".join(FILE_STATES)),
        (("maintain", "telematix"), {}, "Streams: telematics, telematics_test. Replicated tables: public.customers"),
        (("stage", "/nowhere", "--stream", "telematics"), {}, "There is no file or folder '/nowhere'"),
        (("show", "telematics"), {}, "There is no table workspace.01_bronze.telematics"),
        (("show", "a.b"), {}, "'a.b' is not a full table name"),
        (("simulate", "--rows", "0"), {}, "rows=0 is not accepted"),
        (("simulate", "--feed", "0"), {}, "feed=0 is not accepted"),
        (("simulate", "--for", "5"), {}, "Give it together with --feed RATE"),
        (("tables",), {"TELEMATICS_ENGINE": "sparc"}, "TELEMATICS_ENGINE='sparc' is not accepted"),
        (("tables",), {"TELEMATICS_HOME": "dbfs:/lake"}, "DBFS_DISABLED"),
        (("doctor",), {"TELEMATICS_SETTLE_SECONDS": "soon"}, "TELEMATICS_SETTLE_SECONDS='soon' is not accepted"),
    ],
)
def test_wrong_usage_and_settings_are_one_clear_line_and_exit_2(
    arguments: tuple[str, ...], environment: dict[str, str], named: str, telematics: Telematics
) -> None:
    answer = telematics(*arguments, **environment)
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.startswith("Error: ")
    assert answer.err.count("\n") == 1
    assert named in answer.err
    scripted = telematics(*arguments, "--json", **environment)
    assert scripted.code == 2
    assert named in scripted.document["error"]
    assert scripted.document["transient"] is False


def test_unknown_options_and_missing_arguments_are_wrong_usage(telematics: Telematics) -> None:
    for arguments in (("load", "--fast"), ("stage", "x"), ("files",), ("lod",), ("load", "--max-files", "0")):
        assert telematics(*arguments).code == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SettingsError("x"), 2),
        (OptionError("x"), 2),
        (UnknownNameError("x"), 2),
        (TableNotFoundError("x"), 2),
        (TableMovedError("x"), 1),
        (CommitConflictError("x"), 75),
        (VolumeUnavailableError("x"), 75),
    ],
)
def test_an_exit_code_says_whether_trying_again_helps(error: TelematicsError, code: int) -> None:
    assert exit_code(error) == code


def test_home_prepares_dagsters_folder_and_prints_where_it_is(telematics: Telematics, tmp_path: Path) -> None:
    assert telematics("home").out == f"{tmp_path}/lake/dagster\n"
    assert (tmp_path / "lake" / "dagster" / "dagster.yaml").is_file()
    assert telematics("home", DAGSTER_HOME=str(tmp_path / "elsewhere")).out == f"{tmp_path}/elsewhere\n"


def test_the_command_line_and_the_engine_see_the_same_home(loaded: Telematics, tmp_path: Path) -> None:
    engine = open_engine(load_settings({"TELEMATICS_HOME": str(tmp_path / "lake")}))
    pending = engine.look(TELEMATICS)
    assert (pending.files, pending.known) == (0, 5)


def test_a_lost_checkpoint_stops_the_load_and_reset_rebuilds_it_from_the_rows(
    loaded: Telematics, tmp_path: Path
) -> None:
    rows = {table["table"]: table["rows"] for table in loaded("tables", "--json").document}
    shutil.rmtree(next((tmp_path / "lake" / "Volumes").rglob("_checkpoints/telematics")))

    stopped = loaded("load", "telematics")
    assert stopped.code == 1
    assert "telematics reset telematics --rebuild" in stopped.err.replace("\n", " ")
    undecided = loaded("reset", "telematics")
    assert undecided.code == 2
    assert "telematics reset telematics --rebuild" in undecided.err

    answer = loaded("reset", "telematics", "--rebuild", "--json")
    assert answer.document["table"] == "workspace.01_bronze.telematics"
    assert loaded("load", "telematics", "--json").document[0]["rows"] == 0
    assert {table["table"]: table["rows"] for table in loaded("tables", "--json").document} == rows


def test_a_titles_line_is_whole_and_skipped_files_are_pointed_to(telematics: Telematics) -> None:
    landed = telematics("simulate", "--vehicles", "2", "--files", "1", "--rows", "20", "--seed", "1", "--dirty")
    assert landed.out.splitlines()[0] == "Landed in /Volumes/workspace/00_landing/telematics (seed 1)"
    done = telematics("load", "telematics")
    assert done.code == 0
    assert "telematics files telematics --state SKIPPED_CORRUPTED" in done.err


def test_reset_drops_a_table_only_if_it_is_told_twice(loaded: Telematics) -> None:
    rows = loaded("load", "telematics_test", "--json").document[0]
    assert rows["rows"] == 0
    refused = loaded("reset", "telematics_test", "--drop-table")
    assert refused.code == 2
    assert "--yes" in refused.err
    assert len(loaded("tables", "--json").document) == 2
    assert loaded("reset", "telematics_test", "--drop-table", "--yes").code == 0
    assert len(loaded("tables", "--json").document) == 1
    assert loaded("load", "telematics_test", "--json").document[0]["rows"] > 0


def test_a_full_refresh_rewrites_the_named_table_and_no_other(loaded: Telematics) -> None:
    rows = {table["table"]: table for table in loaded("tables", "--json").document}
    answer = loaded("load", "telematics_test", "--full-refresh", "--json")
    assert answer.code == 0
    (stream,) = answer.document
    assert (stream["stream"], stream["batches"]) == ("telematics_test", 1)
    now = {table["table"]: table for table in loaded("tables", "--json").document}
    name, other = "workspace.01_bronze.telematics_test", "workspace.01_bronze.telematics"
    assert stream["rows"] == now[name]["rows"] == rows[name]["rows"]
    assert now[name]["version"] > rows[name]["version"]
    assert now[other] == rows[other]
    refused = loaded("load", "--full-refresh", "--json")
    assert refused.code == 2
    assert "name the streams" in refused.document["error"]


def test_a_full_refresh_that_would_lose_rows_is_refused_unless_forced(loaded: Telematics, tmp_path: Path) -> None:
    (gone, *_) = [file["path"] for file in loaded("files", "telematics_test", "--state", "INGESTED", "--json").document]
    next((tmp_path / "lake").rglob(Path(gone).name)).unlink()
    refused = loaded("load", "telematics_test", "--full-refresh")
    assert refused.code == 1
    assert gone in refused.err
    assert "--force" in refused.err
    before = loaded("tables", "--json").document
    assert loaded("load", "telematics_test", "--full-refresh", "--force").code == 0
    assert sum(table["rows"] for table in loaded("tables", "--json").document) < sum(table["rows"] for table in before)
    assert loaded("load", "telematics_test", "--force").code == 2
    assert loaded("load", "telematics_test", "--full-refresh", "--max-files", "1").code == 2


def test_retry_says_of_each_path_what_became_of_it(loaded: Telematics) -> None:
    broken = loaded("files", "telematics", "--state", "SKIPPED_CORRUPTED", "--json").document[0]
    sound = loaded("files", "telematics", "--state", "INGESTED", "--json").document[0]
    answer = loaded("retry", "telematics", broken["path"], sound["path"], "--json")
    assert answer.code == 0
    again, left = answer.document
    assert list(again) == ["path", "before", "after", "reason", "batch_id"]
    assert (again["path"], again["before"], again["after"]) == (broken["path"], *["SKIPPED_CORRUPTED"] * 2)
    assert again["batch_id"] > broken["batch_id"]
    assert (left["path"], left["before"], left["after"]) == (sound["path"], "INGESTED", "INGESTED")
    assert "already" in left["reason"]
    unknown = loaded("retry", "telematics", "nope.parquet")
    assert unknown.code == 2
    assert "nope.parquet" in unknown.err
    assert broken["path"] in loaded("retry", "telematics", broken["path"]).out


def test_backfill_loads_a_folder_and_leaves_the_rest_pending(landed: Telematics, tmp_path: Path) -> None:
    folder = next((tmp_path / "lake" / "Volumes").rglob("parquet"))
    sound = max(folder.rglob("*.parquet"), key=lambda path: path.stat().st_size)
    (folder / "2025").mkdir()
    sound.rename(folder / "2025" / "old.parquet")
    answer = landed("backfill", "telematics", "--folder", "2025", "--json")
    assert answer.code == 0
    assert [(stream["files_ingested"], stream["files_skipped"]) for stream in answer.document] == [(1, 0)]
    ingested = landed("files", "telematics", "--state", "INGESTED", "--json").document
    assert [file["path"] for file in ingested] == ["parquet/2025/old.parquet"]
    nothing = landed("backfill", "telematics", "--modified-after", "2999-01-01")
    assert nothing.code == 0
    assert "nothing to load" in nothing.err
    assert landed("backfill", "telematics").code == 2
    assert landed("backfill", "telematics", "--modified-before", "yesterday").code == 2


@pytest.mark.spark
def test_spark_jars_says_which_jars_a_mirror_does_not_have(telematics: Telematics, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    answer = telematics("spark", "jars", str(tmp_path / "jars"), TELEMATICS_SPARK_REPOSITORY=mirror.as_uri())
    assert answer.code == 1
    assert "org.postgresql:postgresql:42.7.8" in answer.err
    answer = telematics("spark", "jars", str(tmp_path / "jars"), "--json", JAVA_HOME=str(tmp_path))
    assert answer.code == 1
    assert "openjdk-17-jre-headless" in answer.document["error"]
