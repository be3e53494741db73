"""A Spark session: which Java and jars it takes, whose settings win, and that there is one for each process."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from telematics_assets.engines.spark import jars
from telematics_assets.engines.spark.doctor import findings
from telematics_assets.engines.spark.jars import JARS, Jar, check, fetch, missing
from telematics_assets.engines.spark.java import find_java
from telematics_assets.engines.spark.session import SparkOptions, reach, session, settings_of
from telematics_assets.errors import JavaMissingError, SparkError, SparkJarsError, SparkUnavailableError
from telematics_assets_tests.sparks import OPTIONS

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark
DROPPED = {"artifacts", "derby.log", "metastore_db", "spark-warehouse"}


def fake_java(folder: Path, told: str) -> Path:
    """A `java` that only tells a version, on stderr as the real one does; answers its home."""
    program = folder / "bin" / "java"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{told}\nEND\n")
    program.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("told", "major"),
    [
        ('openjdk version "17.0.15" 2025-04-15\nOpenJDK Runtime Environment (build 17.0.15+6-Debian-1deb12u1)', 17),
        ('java version "21.0.3" 2024-04-16 LTS\nJava(TM) SE Runtime Environment', 21),
        ('openjdk version "17" 2021-09-14', 17),
        ('Picked up JAVA_TOOL_OPTIONS: -Xmx1g\nopenjdk version "17-ea" 2021-09-14', 17),
    ],
)
def test_a_java_that_spark_runs_on_is_taken(tmp_path: Path, told: str, major: int) -> None:
    home = fake_java(tmp_path / "my java", told)
    assert find_java(home).major == major


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ('openjdk version "1.8.0_392"', "is Java 8"),
        ('openjdk version "11.0.2" 2019-01-15', "is Java 11"),
        ('openjdk version "26-ea" 2026-03-17', "is Java 26"),
        ("The operation couldn't be completed. Unable to locate a Java Runtime.", "does not tell its version"),
    ],
)
def test_another_java_is_refused_with_the_way_to_the_right_one(tmp_path: Path, told: str, named: str) -> None:
    with pytest.raises(JavaMissingError, match="Java 17 or 21") as refused:
        find_java(fake_java(tmp_path / "jvm", told))
    assert named in str(refused.value)
    for way in (str(tmp_path / "jvm"), "apt install openjdk-17", "brew install openjdk@17", "conda-forge openjdk=17"):
        assert way in str(refused.value)


def test_java_home_goes_before_path_as_in_the_scripts_of_spark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path = fake_java(tmp_path / "path", 'openjdk version "17.0.1"')
    monkeypatch.setenv("PATH", f"{on_path / 'bin'}:{os.environ['PATH']}")
    assert find_java().program == on_path / "bin" / "java"
    assert find_java(fake_java(tmp_path / "home", 'openjdk version "21.0.1"')).major == 21
    with pytest.raises(JavaMissingError, match="has no bin/java"):
        find_java(tmp_path / "nowhere")


def test_no_java_at_all_is_said_before_spark_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(JavaMissingError, match="no java is on PATH and JAVA_HOME is not set"):
        find_java()


def test_a_java_that_can_not_be_run_is_named(tmp_path: Path) -> None:
    home = fake_java(tmp_path / "jvm", "")
    (home / "bin" / "java").write_bytes(b"\x7fELF no program")
    with pytest.raises(JavaMissingError, match="can't be run"):
        find_java(home)


def sample_jars() -> Iterator[tuple[Jar, bytes]]:
    for name in ("one", "two"):
        content = f"jar {name}".encode()
        yield Jar("org.example", f"sample-{name}_2.13", "1.0", hashlib.sha256(content).hexdigest()), content


def put_into_repository(root: Path, jar: Jar, content: bytes) -> None:
    folder = root / jar.group.replace(".", "/") / jar.artifact / jar.version
    folder.mkdir(parents=True, exist_ok=True)
    (folder / jar.file).write_bytes(content)
    (folder / jar.file.replace(".jar", ".pom")).write_text(
        f"<project><modelVersion>4.0.0</modelVersion><groupId>{jar.group}</groupId>"
        f"<artifactId>{jar.artifact}</artifactId><version>{jar.version}</version></project>"
    )


def test_every_missing_or_damaged_jar_of_a_folder_is_named_with_the_command_that_fetches_it(tmp_path: Path) -> None:
    folder = tmp_path / "offline jars"
    with pytest.raises(SparkJarsError) as refused:
        check(folder)
    assert all(jar.file in str(refused.value) for jar in JARS)
    assert f"telematics spark jars '{folder}'" in str(refused.value)
    folder.mkdir()
    wanted = list(sample_jars())
    for jar, content in wanted:
        (folder / jar.file).write_bytes(content)
    samples = [jar for jar, _ in wanted]
    assert check(folder, samples) == [folder / jar.file for jar in samples]
    (folder / samples[1].file).write_bytes(wanted[1][1][:-1])
    with pytest.raises(SparkJarsError, match="cut short") as refused:
        check(folder, samples)
    assert samples[0].file not in str(refused.value)


def test_a_folder_is_filled_from_a_mirror_with_what_it_has_unchanged(tmp_path: Path) -> None:
    mirror, folder = tmp_path / "mirror", tmp_path / "jars"
    wanted = list(sample_jars())
    samples = [jar for jar, _ in wanted]
    put_into_repository(mirror, *wanted[0])
    put_into_repository(mirror, wanted[1][0], b"something else")
    java = find_java(OPTIONS.java_home)
    with pytest.raises(SparkJarsError, match=re.escape("org.example:sample-two_2.13:1.0")) as refused:
        fetch(folder, java, mirror.as_uri(), jars=samples)
    assert "sample-one" not in str(refused.value)
    assert [file.name for file in folder.iterdir()] == [samples[0].file]
    put_into_repository(mirror, *wanted[1])
    assert fetch(folder, java, mirror.as_uri(), jars=samples) == [folder / jar.file for jar in samples]
    assert missing(folder, samples) == []
    assert sorted(file.name for file in folder.iterdir()) == sorted(jar.file for jar in samples)


def test_a_repository_that_does_not_answer_may_do_so_later(tmp_path: Path) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        place = f"http://127.0.0.1:{unheard.getsockname()[1]}/m2"
        with pytest.raises(SparkUnavailableError, match="TELEMATICS_SPARK_REPOSITORY") as refused:
            fetch(tmp_path, find_java(OPTIONS.java_home), place, jars=[next(sample_jars())[0]])
    assert place in str(refused.value)
    assert "Connection refused" in str(refused.value)


def test_the_settings_of_the_user_win() -> None:
    conf = {
        "spark.driver.memory": "9g",
        "spark.sql.session.timeZone": "Asia/Tokyo",
        "spark.jars": "/mine.jar",
        "spark.sql.extensions": "org.example.Mine",
        "spark.driver.extraJavaOptions": "-Duser.timezone=Asia/Tokyo",
    }
    settings = settings_of(SparkOptions(conf=conf), {"spark.driver.memory": "3g"}, "file:/ours.jar")
    assert settings["spark.driver.memory"] == "9g"
    assert settings["spark.sql.session.timeZone"] == "Asia/Tokyo"
    assert settings["spark.jars"] == "file:/ours.jar,/mine.jar"
    assert settings["spark.sql.extensions"] == "io.delta.sql.DeltaSparkSessionExtension,org.example.Mine"
    # A JVM takes the last of two.
    assert settings["spark.driver.extraJavaOptions"].endswith(" -Duser.timezone=Asia/Tokyo")


def test_a_catalog_that_the_user_names_is_wholly_the_users() -> None:
    more = {
        "spark.sql.catalog.workspace": "ours",
        "spark.sql.catalog.workspace.root": "/ours",
        "spark.sql.catalog.supabase_data": "jdbc",
        "spark.sql.catalog.supabase_data.url": "ours",
    }
    conf = {"spark.sql.catalog.workspace": "unity", "spark.sql.catalog.supabase_data.url": "theirs"}
    settings = settings_of(SparkOptions(conf=conf), more)
    assert settings["spark.sql.catalog.workspace"] == "unity"
    assert "spark.sql.catalog.workspace.root" not in settings
    assert settings["spark.sql.catalog.supabase_data"] == "jdbc"
    assert settings["spark.sql.catalog.supabase_data.url"] == "theirs"
    assert settings["spark.sql.catalog.spark_catalog"] == "org.apache.spark.sql.delta.catalog.DeltaCatalog"


def test_a_cluster_and_a_connect_server_get_only_what_belongs_there() -> None:
    here = settings_of(SparkOptions(master="local[3]"), {})
    cluster = settings_of(SparkOptions(master="spark://host:7077"), {}, "file:/ours.jar")
    remote = settings_of(SparkOptions(remote="sc://host"), {})
    assert set(remote) < set(cluster)
    machine = {"spark.driver.bindAddress", "spark.driver.host", "spark.driver.memory", "spark.sql.shuffle.partitions"}
    assert machine < set(here)
    assert not machine & set(cluster)
    assert cluster["spark.jars"] == "file:/ours.jar"
    assert {"spark.sql.extensions", "spark.driver.extraJavaOptions"} < set(cluster)
    # A server's own settings can't be set from outside: what is left changes answers, and nothing else.
    assert all(name.startswith("spark.sql.") for name in remote)
    assert "spark.sql.extensions" not in remote
    assert remote["spark.sql.session.timeZone"] == here["spark.sql.session.timeZone"] == "UTC"


def test_a_master_or_server_that_does_not_answer_is_said_at_once() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{server.getsockname()[1]}"
        for options in (SparkOptions(remote=f"sc://{place}/;token=hush"), SparkOptions(master=f"spark://{place}")):
            with pytest.raises(SparkUnavailableError, match=f"does not answer at {place}") as refused:
                reach(options)
            assert "hush" not in str(refused.value)
        server.listen()
        assert reach(SparkOptions(remote=f"sc://{place}/;token=hush")) == place
        # One master of several is enough.
        assert reach(SparkOptions(master=f"spark://127.0.0.1:1,{place}")) == place
    assert reach(SparkOptions()) is None
    assert reach(SparkOptions(master="yarn")) is None


def test_the_doctor_names_what_is_missing_and_how_to_mend_it(tmp_path: Path) -> None:
    options = SparkOptions(master="spark://127.0.0.1:1", jars=tmp_path, java_home=tmp_path)
    found = {finding.subject: finding for finding in findings(options, start=True)}
    assert "Spark session" not in found
    assert {subject for subject, finding in found.items() if finding.level == "error"} == {
        "Java",
        "Spark jars",
        "Spark",
    }
    assert "openjdk-17" in (found["Java"].fix or "")
    assert "telematics spark jars" in (found["Spark jars"].fix or "")


def test_the_doctor_says_that_the_first_session_will_fetch_jars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = {finding.subject: finding for finding in findings(SparkOptions(repository="https://mirror.example/m2"))}
    assert found["Spark jars"].level == "warning"
    assert "https://mirror.example/m2" in found["Spark jars"].message
    brought = SparkOptions(conf={"spark.jars.packages": "io.delta:delta-spark_4.2_2.13:4.4.0"})
    found = {finding.subject: finding for finding in findings(brought)}
    assert found["Spark jars"].level == "ok"


def test_a_session_writes_and_reads_delta_in_utc_and_leaves_nothing_in_the_current_folder(
    spark: SparkSession, tmp_path: Path
) -> None:
    table = tmp_path / "Größe 1%20,x"
    spark.sql("SELECT TIMESTAMP'2026-01-02 03:04:05' AS at, 'é' AS text").write.save(str(table))
    assert (table / "_delta_log" / "00000000000000000000.json").is_file()
    assert spark.read.load(str(table)).selectExpr("unix_micros(at)", "text").first() == (1767323045000000, "é")
    jvm = spark.sparkContext._jvm
    assert jvm is not None
    assert jvm.java.util.TimeZone.getDefault().getID() == "UTC"
    assert not DROPPED & set(os.listdir(jvm.java.lang.System.getProperty("user.dir")))


def test_a_process_has_one_session_and_refuses_another(spark: SparkSession) -> None:
    same = replace(OPTIONS, conf=dict(OPTIONS.conf))
    assert session(same) is session(same, {}) is spark
    with pytest.raises(SparkError, match="only one"):
        session(SparkOptions(master="local[1]"))
    with pytest.raises(SparkError, match="only one"):
        session(same, {"spark.sql.catalog.other": "org.example.Catalog"})


def test_functions_run_in_this_interpreter(spark: SparkSession) -> None:
    def where(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import pyarrow

        for _ in batches:
            yield pyarrow.RecordBatch.from_pydict({"program": [sys.executable]})

    assert spark.range(1).mapInArrow(where, "program string").first() == (sys.executable,)


def test_the_doctor_makes_the_session_if_asked(spark: SparkSession) -> None:
    found = findings(OPTIONS, start=True)
    assert [finding.message for finding in found if finding.level == "error"] == []
    assert found[-1].subject == "Spark session"
    assert spark.version in found[-1].message


PROCESS = """
import json, sys, tempfile
from pathlib import Path
tempfile.tempdir = sys.argv[1]
from telematics_assets.engines.spark.session import SparkOptions, session
from telematics_assets.errors import SparkError, SparkUnavailableError
conf = {
    "spark.driver.memory": "512m",
    "spark.local.dir": sys.argv[3],
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -Djava.io.tmpdir=" + sys.argv[3],
}
options = SparkOptions(master="local[1]", conf=conf, jars=Path(sys.argv[2]))
spark = session(options)
spark.stop()
from pyspark.sql import SparkSession
foreign = SparkSession.builder.master("local[1]").getOrCreate()
try:
    session(options)
except SparkError as error:
    refused = str(error)
foreign.stop()
again = session(options)
told = {"refused": refused, "again": again is not spark and again.range(3).count()}
jvm = again.sparkContext._gateway.proc
jvm.kill()
jvm.wait()
try:
    session(options)
except SparkUnavailableError as error:
    print(json.dumps({**told, "killed": str(error)}))
"""


def test_a_process_has_a_clean_stdout_an_empty_folder_and_no_session_of_others(
    tmp_path: Path, repository: Path
) -> None:
    folder, scratch, local = tmp_path / "cwd", tmp_path / "tmp", tmp_path / "local"
    for each in (folder, scratch, local):
        each.mkdir()
    offline = jars.default_folder()
    fetch(offline, find_java(OPTIONS.java_home))
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, str(scratch), str(offline), str(local)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert "something else made" in told["refused"]
    assert told["again"] == 3
    assert "has ended" in told["killed"]
    assert "WARN " not in done.stderr
    assert list(folder.iterdir()) == []
    assert list(scratch.iterdir()) == []
