"""The lake's tables under three-level names: found by folder, whoever wrote them, and kept from being deleted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from telematics_assets.catalog import Names
from telematics_assets.engines.spark.catalogs import catalog_settings, tables_uri
from telematics_assets.engines.spark.jars import check, default_folder
from telematics_assets.engines.spark.queries import ask
from telematics_assets.errors import QueryError, SettingsError
from telematics_assets.lakehouse.base import STREAM_ID_PROPERTY
from telematics_assets.microbatch.connection import Supabase
from telematics_assets.microbatch.position import SOURCE_PROPERTY
from telematics_assets_tests.databases import Database
from telematics_assets_tests.engines.spark import catalog_jar

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark


@dataclass
class Lake:
    """A catalog of its own over an empty folder."""

    spark: SparkSession
    names: Names
    root: Path

    def folder(self, table: str, schema: str = "01_bronze") -> Path:
        return self.root / schema / table

    def write(self, table: str, rows: dict[str, list[Any]], **options: Any) -> None:
        """As another process does that knows nothing of Spark."""
        write_deltalake(self.folder(table), pa.table(rows), mode="append", **options)

    def ask(self, text: str) -> list[tuple[Any, ...]]:
        """The rows of one statement, with the catalog and its bronze schema in place of `{c}` and `{b}`."""
        filled = text.format(c=self.names.catalog, b=f"{self.names.catalog}.`01_bronze`")
        return [tuple(row.values()) for row in ask(self.spark, filled, self.names, 1000).to_pylist()]


@pytest.fixture
def lake(spark: SparkSession, tmp_path: Path) -> Lake:
    home, names = tmp_path / "a home#1", Names(catalog=f"lake_{uuid.uuid4().hex[:8]}")
    for key, value in catalog_settings(tables_uri(home), names).items():
        spark.conf.set(key, value)
    return Lake(spark, names, home / "tables" / names.catalog)


def test_tables_that_others_wrote_are_found_by_their_folder(lake: Lake) -> None:
    assert lake.ask("SHOW TABLES IN {b}") == []
    lake.write("points", {"id": [1, 2], "name": ["a", "b"]})
    lake.write("points", {"id": [3], "name": ["c"]})
    lake.folder("no_table").mkdir()
    (lake.folder("killed_at_birth") / "_delta_log").mkdir(parents=True)
    assert lake.ask("SELECT points.name FROM {b}.points WHERE id > 1 ORDER BY id") == [("b",), ("c",)]
    assert lake.ask("SELECT count(*) FROM {b}.points VERSION AS OF 0") == [(2,)]
    assert [name for _, name, _ in lake.ask("SHOW TABLES IN {b}")] == ["points"]
    assert [name.strip("`") for (name,) in lake.ask("SHOW SCHEMAS IN {c}")] == ["00_landing", "01_bronze"]
    assert lake.ask("DESCRIBE {b}.points")[:2] == [("id", "bigint", None), ("name", "string", None)]
    assert [version for version, *_ in lake.ask("DESCRIBE HISTORY {b}.points")] == [1, 0]


def test_names_have_no_case(lake: Lake) -> None:
    lake.write("Points", {"id": [1]})
    assert lake.ask("SELECT id FROM {c}.`01_BRONZE`.pOINTS") == [(1,)]
    with pytest.raises(QueryError, match="already exists"):
        lake.ask("CREATE TABLE {b}.POINTS (id INT)")


def test_what_spark_writes_is_there_for_others(lake: Lake) -> None:
    lake.write("points", {"id": [1, 2], "name": ["a", "b"]})
    lake.ask("ALTER TABLE {b}.points SET TBLPROPERTIES ('delta.enableChangeDataFeed' = 'true')")
    lake.ask("INSERT INTO {b}.points VALUES (3, 'c')")
    lake.ask(
        "MERGE INTO {b}.points t USING (SELECT 1L AS id, 'A' AS name) s ON t.id = s.id "
        "WHEN MATCHED THEN UPDATE SET name = s.name WHEN NOT MATCHED THEN INSERT *"
    )
    lake.ask("ALTER TABLE {b}.points ADD COLUMN more INT COMMENT 'later'")
    ((_, metrics),) = lake.ask("OPTIMIZE {b}.points")
    assert json.loads(metrics)["numFilesAdded"] == 1
    table = DeltaTable(lake.folder("points")).to_pyarrow_table().sort_by("id")
    assert table.to_pydict() == {"id": [1, 2, 3], "name": ["A", "b", "c"], "more": [None] * 3}
    changes = lake.ask("SELECT id, _change_type FROM table_changes('{b}.points', 2) ORDER BY id, _change_type")
    assert changes == [(1, "update_postimage"), (1, "update_preimage"), (3, "insert")]


def test_tables_that_spark_makes_land_in_the_tree(lake: Lake) -> None:
    lake.ask("CREATE TABLE {b}.made (id INT, name STRING) COMMENT 'mine'")
    lake.ask("CREATE TABLE IF NOT EXISTS {b}.made (other INT)")
    lake.ask("CREATE SCHEMA {c}.`02_silver`")
    lake.ask("CREATE TABLE {c}.`02_silver`.copied AS SELECT 7 AS id")
    assert [field.name for field in DeltaTable(lake.folder("made")).schema().fields] == ["id", "name"]
    assert DeltaTable(lake.folder("copied", "02_silver")).to_pyarrow_table().to_pydict() == {"id": [7]}
    lake.ask("CREATE OR REPLACE TABLE {c}.`02_silver`.copied AS SELECT 8 AS n")
    assert lake.ask("SELECT * FROM {c}.`02_silver`.copied") == [(8,)]


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("CREATE TABLE {b}.t (id INT) USING parquet", "TELEMATICS_FORMAT_REFUSED"),
        ("CREATE TABLE {b}.t (id INT) LOCATION '/tmp/elsewhere'", "TELEMATICS_LOCATION_REFUSED"),
        ("CREATE TABLE {b}.`../t` (id INT)", "is no name of a schema or table"),
        ("CREATE TABLE {c}.nowhere.t (id INT)", "SCHEMA_NOT_FOUND"),
        ("CREATE VIEW {b}.v AS SELECT 1", "does not support views.*CREATE TEMP VIEW"),
        ("GRANT SELECT ON TABLE {b}.t TO someone", "Databricks may know this statement"),
        (
            "SELECT * FROM {b}.nope",
            r"SQLSTATE: 42P01 \(line 1, position 14\)\. `SHOW TABLES IN lake_\w+\.`01_bronze`` lists",
        ),
        ("SELECT id FORM {b}.t", r"PARSE_SYNTAX_ERROR.*line 1, pos"),
        ("SELECT * FROM elsewhere.a.b", "No catalog has this name; lake_"),
        ("SELECT 1 AS a, 2 AS a", "Two columns of the answer are called 'a'"),
        ("SELECT 1 / 0", "DIVIDE_BY_ZERO"),
        ("SELECT raise_error('told by ' || id) FROM range(1)", "told by 0"),
    ],
)
def test_what_does_not_work_says_so_in_one_line(lake: Lake, statement: str, why: str) -> None:
    with pytest.raises(QueryError, match=why) as refused:
        lake.ask(statement)
    message = str(refused.value)
    assert "\n" not in message
    assert "at org.apache" not in message
    assert not lake.root.exists() or not list(lake.root.rglob("_delta_log"))


def test_a_table_is_seen_as_another_process_left_it(lake: Lake) -> None:
    lake.write("moving", {"a": [1]})
    assert lake.ask("SELECT a FROM {b}.moving") == [(1,)]
    lake.write("moving", {"a": [2]})
    assert lake.ask("SELECT sum(a) FROM {b}.moving") == [(3,)]
    for column, commits in (("same_version", 2), ("fewer", 1)):
        shutil.rmtree(lake.folder("moving"))
        for _ in range(commits):
            lake.write("moving", {column: [1]})
        assert lake.ask(f"SELECT count({column}) FROM {{b}}.moving") == [(commits,)]
    shutil.rmtree(lake.folder("moving"))
    with pytest.raises(QueryError, match="TABLE_OR_VIEW_NOT_FOUND"):
        lake.ask("SELECT * FROM {b}.moving")


def test_drop_table_deletes_what_nobody_goes_on_writing(lake: Lake) -> None:
    lake.ask("CREATE TABLE {b}.scratch AS SELECT 1 AS id")
    lake.ask("DROP TABLE {b}.scratch")
    assert list((lake.root / "01_bronze").iterdir()) == []
    lake.ask("DROP TABLE IF EXISTS {b}.scratch")
    with pytest.raises(QueryError, match="TABLE_OR_VIEW_NOT_FOUND"):
        lake.ask("DROP TABLE {b}.scratch")
    lake.ask("CREATE TABLE {b}.scratch AS SELECT 'again' AS name")
    assert lake.ask("SELECT * FROM {b}.scratch") == [("again",)]


@pytest.mark.parametrize("owner", [STREAM_ID_PROPERTY, SOURCE_PROPERTY])
def test_a_table_of_a_stream_or_replication_is_not_dropped(lake: Lake, owner: str) -> None:
    lake.ask(f"CREATE TABLE {{b}}.owned (id INT) TBLPROPERTIES ('{owner}' = 'x')")
    with pytest.raises(QueryError, match=r"TELEMATICS_DROP_TABLE_REFUSED.*telematics reset STREAM --drop-table"):
        lake.ask("DROP TABLE {b}.owned")
    assert lake.ask("SELECT count(*) FROM {b}.owned") == [(0,)]


def test_a_schema_is_never_dropped(lake: Lake) -> None:
    lake.write("points", {"id": [1]})
    for schema in ("`01_bronze` CASCADE", "`01_bronze`", "`00_landing`"):
        with pytest.raises(QueryError, match=r"TELEMATICS_DROP_SCHEMA_REFUSED.*would delete the folder"):
            lake.ask(f"DROP SCHEMA {{c}}.{schema}")
    with pytest.raises(QueryError, match="TELEMATICS_RENAME_TABLE_REFUSED"):
        lake.ask("ALTER TABLE {b}.points RENAME TO {b}.other")
    assert lake.ask("SELECT id FROM {b}.points") == [(1,)]


def test_two_sessions_append_at_once(lake: Lake) -> None:
    lake.write("shared", {"id": [0]})
    other = Lake(lake.spark.newSession(), lake.names, lake.root)
    for key, value in catalog_settings(str(lake.root.parent), lake.names).items():
        other.spark.conf.set(key, value)

    def append(number: int) -> None:
        (lake, other)[number % 2].ask(f"INSERT INTO {{b}}.shared VALUES ({number})")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(append, range(1, 5)))
    assert sorted(DeltaTable(lake.folder("shared")).to_pyarrow_table()["id"].to_pylist()) == [0, 1, 2, 3, 4]


def test_a_catalog_of_the_users_own_is_left_alone() -> None:
    supabase = Supabase("127.0.0.1", "reader", "p4ssword", 6543, "my db", "disable")
    ours = catalog_settings("/lake/tables", Names(), supabase)
    assert ours["spark.sql.catalog.workspace.root"] == "/lake/tables/workspace"
    assert ours["spark.sql.catalog.supabase_data.url"] == "jdbc:postgresql://127.0.0.1:6543/my%20db"
    assert "p4ssword" not in str(ours)
    theirs = {"spark.sql.catalog.workspace": "their.Catalog", "spark.sql.catalog.supabase_data": "their.Catalog"}
    assert catalog_settings("/lake/tables", Names(), supabase, theirs) == {}
    assert catalog_settings("/lake/tables", Names(catalog="spark_catalog")) == {}


def test_a_certificate_is_handed_to_the_driver(tmp_path: Path) -> None:
    ca = tmp_path / "ca.crt"
    ca.touch()
    key = "spark.sql.catalog.supabase_data"
    with_ca = catalog_settings("/t", Names(), Supabase("db.example.org", "r.x", "p", ca=ca))
    assert (with_ca[f"{key}.sslmode"], with_ca[f"{key}.sslrootcert"]) == ("verify-full", str(ca))
    of_machine = catalog_settings("/t", Names(), Supabase("db.example.org", "r.x", "p"))
    assert of_machine[f"{key}.sslfactory"] == "org.postgresql.ssl.DefaultJavaSSLFactory"


def test_homes_are_named_as_hadoop_names_them() -> None:
    assert tables_uri(Path("/data/home")) == "/data/home/tables"
    assert tables_uri("s3://bucket/lake") == "s3a://bucket/lake/tables"
    assert tables_uri("abfss://c@a.dfs.core.windows.net/lake") == "abfss://c@a.dfs.core.windows.net/lake/tables"
    with pytest.raises(SettingsError, match="abfss://container@account"):
        tables_uri("az://container/lake")


def test_the_jar_is_what_its_source_says() -> None:
    shipped, manifest = catalog_jar.in_jar()
    assert manifest["Source-SHA256"] == catalog_jar.source_digest(), "run: make catalog-jar"
    if catalog_jar.compiler() == manifest["Created-By"]:
        assert catalog_jar.compiled([*catalog_jar.spark_jars(), *check(default_folder())]) == shipped


SCRIPT = """
import json, pathlib, sys
from typer.testing import CliRunner
from telematics_assets.cli import app
answers = []
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, arguments, input=sys.argv[2])
    answers.append([result.exit_code, result.stdout, result.stderr])
lines = [path.read_text(errors="replace") for path in pathlib.Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
print(json.dumps([answers, lines]))
"""


def test_the_commands_ask_and_tell(tmp_path: Path, database: Database) -> None:
    database.run(
        "CREATE TABLE public.policies (id int8 PRIMARY KEY, name text)",
        "INSERT INTO public.policies VALUES (1, 'first'), (2, 'second')",
    )
    points = tmp_path / "tables/workspace/01_bronze/points"
    write_deltalake(points, pa.table({"Id": [1, 2, 3]}))
    (tmp_path / "events").mkdir()
    events = f"spark.eventLog.enabled=true spark.eventLog.compress=false spark.eventLog.dir={tmp_path}/events"
    supabase = database.supabase
    environ = {
        "TELEMATICS_HOME": str(tmp_path),
        "TELEMATICS_ENGINE": "spark",
        "TELEMATICS_SPARK_MASTER": "local[2]",
        "TELEMATICS_SPARK_CONF": f"spark.driver.memory=1g {events}",
        "SUPABASE_HOST": supabase.host,
        "SUPABASE_PORT": str(supabase.port),
        "SUPABASE_USER": supabase.user,
        "SUPABASE_PASSWORD": supabase.password,
        "SUPABASE_DATABASE": supabase.database,
        "SUPABASE_SSLMODE": "disable",
    }
    join = (
        "SELECT p.id, s.name FROM workspace.`01_bronze`.points p JOIN supabase_data.public.policies s USING (id) "
        "ORDER BY id"
    )
    commands = [
        ["sql", join, "--json"],
        ["sql", "SELECT ID FROM workspace.`01_bronze`.points ORDER BY 1;", "--limit", "2"],
        ["sql", "SELECT * FROM workspace.`01_bronze`.nope", "--json"],
        ["spark-shell", "-c", "spark.table('supabase_data.public.policies').count()"],
        ["spark-shell", "-c", "spark.sql('SELECT * FROM nope').show()"],
        ["spark-shell"],
        ["sql", "-", "--json", "--limit", "100000"],
    ]
    typed = "SET -v\n"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), json.dumps(commands), typed],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (joined, bounded, missing, counted, failed, shell, settings), command_lines = json.loads(
        done.stdout.splitlines()[-1]
    )
    assert joined[0] == 0, joined
    assert json.loads(joined[1]) == [{"id": 1, "name": "first"}, {"id": 2, "name": "second"}]
    assert bounded[0] == 0, bounded
    assert "2 rows, 1 columns" in bounded[1]
    assert "more rows than 2" in bounded[2]
    assert missing[0] == 1
    assert json.loads(missing[1])["error"].count("\n") == 0
    assert "SHOW TABLES IN workspace.`01_bronze`" in missing[2]
    assert "at org.apache" not in missing[2] + failed[2]
    assert (counted[0], counted[1].split()[-1]) == (0, "2")
    assert failed[0] == 1
    assert failed[2].startswith("Error: [TABLE_OR_VIEW_NOT_FOUND]")
    assert (shell[0], shell[2].count("  spark.")) == (0, 3)
    assert settings[0] == 0, settings
    written = [file.read_text(errors="replace") for file in (tmp_path / "events").rglob("*") if file.is_file()]
    assert any("SparkListenerJobStart" in text for text in written)
    assert not any(supabase.password in text for text in [*written, *command_lines, done.stdout, done.stderr])


def test_other_engines_say_which_one_knows_sql(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from telematics_assets.cli import main; main()", "sql", "SELECT 1"],
        env={**os.environ, "TELEMATICS_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "TELEMATICS_ENGINE=spark" in done.stderr
