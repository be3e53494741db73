"""`supabase_data` in Spark: the tables of a database behind a pooler, to be read only."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from telematics_assets.catalog import Names
from telematics_assets.engines.spark.catalogs import catalog_settings, unlock
from telematics_assets.engines.spark.queries import ask
from telematics_assets.errors import QueryError
from telematics_assets_tests.databases import Database

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark

NAMES = Names()
TABLE = "supabase_data.public.policies"


@pytest.fixture
def federated(spark: SparkSession, database: Database) -> SparkSession:
    """A session whose role might write, so that what holds it back is the catalog."""
    database.run(
        "CREATE TABLE public.policies (id int8 PRIMARY KEY, premium numeric(12, 2), name text)",
        "INSERT INTO public.policies SELECT i, i * 1.5, 'n' || i FROM generate_series(1, 100) i",
        f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {database.role}",
        f"GRANT ALL ON SCHEMA public TO {database.role}",
    )
    # The catalog is made at its first use and then stays: each test has a session, and with it a catalog, of its own.
    own = spark.newSession()
    for key, value in catalog_settings("/nowhere", NAMES, database.supabase).items():
        own.conf.set(key, value)
    unlock(own, database.supabase)
    return own


def rows(spark: SparkSession, text: str) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in ask(spark, text, NAMES, 1000).to_pylist()]


def test_the_database_is_asked_in_its_own_words(federated: SparkSession) -> None:
    assert ("public", "policies", False) in rows(federated, "SHOW TABLES IN supabase_data.public")
    asked = f"SELECT name, count(*) AS n FROM {TABLE} WHERE id > 98 GROUP BY name ORDER BY name"
    assert rows(federated, asked) == [("n100", 1), ("n99", 1)]
    (plan,) = rows(federated, f"EXPLAIN FORMATTED SELECT max(premium) FROM {TABLE} WHERE id > 98")
    assert 'SELECT MAX("premium") FROM "public"."policies"  WHERE' in plan[0]
    (plan,) = rows(federated, f"EXPLAIN FORMATTED SELECT id FROM {TABLE} ORDER BY id LIMIT 3")
    assert 'ORDER BY "id" ASC NULLS FIRST LIMIT 3' in plan[0]


def test_each_question_is_a_read_only_transaction_without_named_statements(
    federated: SparkSession, database: Database
) -> None:
    database.run(
        "CREATE VIEW public.here AS SELECT current_setting('transaction_read_only') AS read_only, "
        "(SELECT count(*) FROM pg_prepared_statements) AS prepared",
        f"GRANT SELECT ON public.here TO {database.role}",
    )
    for _ in range(6):
        assert rows(federated, "SELECT read_only, prepared FROM supabase_data.public.here") == [("on", 0)]


def test_no_way_of_writing_reaches_the_database(federated: SparkSession, database: Database) -> None:
    first = federated.table(TABLE).limit(1)
    statements = [
        f"INSERT INTO {TABLE} VALUES (1000, 1, 'x')",
        f"INSERT OVERWRITE {TABLE} SELECT * FROM {TABLE} WHERE id = 1",
        f"UPDATE {TABLE} SET name = 'x'",
        f"DELETE FROM {TABLE} WHERE id = 1",
        f"MERGE INTO {TABLE} t USING (SELECT 1 AS id) s ON t.id = s.id WHEN MATCHED THEN DELETE",
        f"TRUNCATE TABLE {TABLE}",
        f"DROP TABLE {TABLE}",
        f"ALTER TABLE {TABLE} ADD COLUMN more INT",
        f"ALTER TABLE {TABLE} RENAME TO supabase_data.public.other",
        f"COMMENT ON TABLE {TABLE} IS 'x'",
        f"CREATE INDEX i ON {TABLE} (name)",
        "CREATE TABLE supabase_data.public.new (id INT)",
        "CREATE TABLE supabase_data.public.new AS SELECT 1 AS id",
        f"CREATE OR REPLACE TABLE {TABLE} AS SELECT 1 AS id",
        "CREATE SCHEMA supabase_data.new",
        "DROP SCHEMA supabase_data.public CASCADE",
    ]
    ways: list[Callable[[], object]] = [
        *(lambda statement=statement: ask(federated, statement, NAMES, 1) for statement in statements),
        lambda: first.write.insertInto(TABLE),
        lambda: first.write.insertInto(TABLE, overwrite=True),
        lambda: first.write.mode("append").saveAsTable(TABLE),
        lambda: first.write.mode("overwrite").saveAsTable(TABLE),
        lambda: first.writeTo(TABLE).append(),
        lambda: first.writeTo(TABLE).overwritePartitions(),
        lambda: first.writeTo(TABLE).overwrite(first["id"] > 0),
        lambda: first.writeTo("supabase_data.public.new").create(),
    ]
    for way in ways:
        with pytest.raises(Exception, match=r"TELEMATICS_SUPABASE_IS_READ_ONLY|not support truncates|not supported in"):
            way()
    with database.connect() as connection:
        found = connection.execute("SELECT count(*), count(DISTINCT name), sum(id) FROM public.policies").fetchone()
        assert found == (100, 100, 5050)
        tables = connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone()
        assert tables == (1,)


def test_the_password_is_in_no_setting_plan_or_error(federated: SparkSession, database: Database) -> None:
    told = [
        str(rows(federated, "SET -v")),
        str(federated.sparkContext.getConf().getAll()),
        *(str(rows(federated, f"EXPLAIN {how} SELECT * FROM {TABLE} WHERE id > 3")) for how in ("EXTENDED", "CODEGEN")),
        str(rows(federated, f"DESCRIBE EXTENDED {TABLE}")),
    ]
    database.run(f"ALTER ROLE {database.role} PASSWORD 'changed'")
    database.pooler.stop()
    with pytest.raises(QueryError, match="telematics doctor") as refused:
        ask(federated, f"SELECT count(*) FROM {TABLE}", NAMES, 1)
    assert database.password not in "".join([*told, str(refused.value), repr(refused.value.__cause__)])


def test_values_that_jdbc_shows_as_others(federated: SparkSession, database: Database) -> None:
    database.run(
        "CREATE TABLE public.odd (bare numeric, wide numeric(50, 10), at time, day date)",
        "INSERT INTO public.odd VALUES (1e-25, 123.456, '10:11:12.123456', 'infinity')",
    )
    (found,) = rows(
        federated,
        "SELECT bare = 0, wide = 123, date_format(at, 'HH:mm:ss.SSSSSS'), string(day) FROM supabase_data.public.odd",
    )
    assert found == (True, True, "10:11:12.123000", "9999-12-31")
