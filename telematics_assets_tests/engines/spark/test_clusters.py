"""The engine on a real cluster: what it loads there is what the embedded engine loads, whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable

from telematics_assets_tests.engines.spark.clusters import connect_server, executors, standalone

pytestmark = pytest.mark.spark
LIMIT_SECONDS = 400
#: The same words from every engine.
COMMAND = [sys.executable, "-c", "from telematics_assets.cli import main; main()"]
STREAMS = ("telematics", "telematics_test")


def environment(home: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "TELEMATICS_HOME": str(home), "TELEMATICS_SETTLE_SECONDS": "0", **more}


def telematics(home: Path, *arguments: str, **more: str) -> str:
    """What a command prints."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        env=environment(home, **more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def landed(home: Path, rows: int = 600) -> None:
    """Three waves: plain, drifted, and dirty."""
    for seed, kind in enumerate(([], ["--drift"], ["--dirty"]), 1):
        size = ["--vehicles", "3", "--files", "3", "--rows", str(rows)]
        telematics(home, "simulate", *size, "--seed", str(seed), *kind)


def outcome(home: Path) -> dict[str, Any]:
    """What a deployment holds: every row but for when it came, and every file's state."""
    found: dict[str, Any] = {}
    for stream in STREAMS:
        table = DeltaTable(home / "tables/workspace/01_bronze" / stream).to_pyarrow_table()
        kept = sorted(set(table.column_names) - {"_ingested_at", "_source_file_modified_at", "_batch_id"})
        rows = sorted(json.dumps(row, default=str, sort_keys=True) for row in table.select(kept).to_pylist())
        files = json.loads(telematics(home, "files", stream, "--json"))
        found[stream] = rows, sorted((file["path"], file["state"], file["reason"]) for file in files)
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the embedded engine makes of the three waves."""
    home = tmp_path_factory.mktemp("embedded")
    landed(home)
    telematics(home, "load", "--json")
    return outcome(home)


def test_a_standalone_cluster_loads_what_the_embedded_engine_loads(tmp_path: Path, expected: dict[str, Any]) -> None:
    home = tmp_path / "home"
    landed(home)
    with standalone(tmp_path / "cluster") as master:
        telematics(home, "load", "--json", **on(master))
    assert outcome(home) == expected


def test_a_connect_server_loads_what_the_embedded_engine_loads(tmp_path: Path, expected: dict[str, Any]) -> None:
    home = tmp_path / "home"
    landed(home)
    with connect_server(tmp_path / "server") as remote:
        telematics(home, "load", "--json", TELEMATICS_ENGINE="spark", TELEMATICS_SPARK_REMOTE=remote)
    assert outcome(home) == expected


def test_an_executor_that_is_killed_in_a_batch_loses_and_doubles_nothing(tmp_path: Path) -> None:
    home, files, many = tmp_path / "home", 4, 60_000
    size = ["--vehicles", "2", "--files", str(files), "--rows", str(files * many)]
    telematics(home, "simulate", *size, "--seed", "5")
    with standalone(tmp_path / "cluster") as master:
        load = subprocess.Popen(
            [*COMMAND, "load", "telematics_test", "--json"],
            env=environment(home, **on(master)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            killed = kill_one_that_works(load, home, tmp_path / "cluster")
            said, complained = load.communicate(timeout=LIMIT_SECONDS)
        finally:
            load.kill()
            load.wait()
    assert killed
    assert load.returncode == 0, complained
    (report,) = json.loads(said)
    table = DeltaTable(home / "tables/workspace/01_bronze/telematics_test").to_pyarrow_table()
    by_file = table.group_by("_source_file").aggregate([([], "count_all")])
    assert report["rows"] == table.num_rows == files * many
    assert by_file["count_all"].to_pylist() == [many] * files
    assert pc.count_distinct(table["_raw_record"]).as_py() == files * many


def on(master: str) -> dict[str, str]:
    """A deployment on that master, with executors that start quickly."""
    conf = "spark.executor.memory=600m spark.executor.extraJavaOptions=-XX:TieredStopAtLevel=1 spark.cores.max=2"
    conf += f" spark.pyspark.python={sys.executable} spark.driver.host=127.0.0.1 spark.driver.memory=1g"
    conf += " spark.ui.enabled=false spark.sql.shuffle.partitions=2 spark.databricks.delta.snapshotPartitions=2"
    return {"TELEMATICS_ENGINE": "spark", "TELEMATICS_SPARK_MASTER": master, "TELEMATICS_SPARK_CONF": conf}


def kill_one_that_works(load: subprocess.Popen[str], home: Path, cluster: Path) -> bool:
    """Kill an executor once data files are being written; whether there was one."""
    deadline = time.monotonic() + LIMIT_SECONDS
    table = home / "tables/workspace/01_bronze/telematics_test"
    while load.poll() is None and time.monotonic() < deadline:
        if table.exists() and any(path.suffix == ".parquet" for path in table.iterdir()):
            for process in executors(cluster):
                os.kill(process, signal.SIGKILL)
                return True
        time.sleep(0.02)
    return False
