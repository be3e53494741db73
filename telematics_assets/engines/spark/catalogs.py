"""The catalogs of a session: the lake's tables and the Supabase database under the names that Databricks has for them.

Belongs here: which Spark settings make `workspace.01_bronze.telematics` and `supabase_data.public.policies` resolve,
how the password gets there, and the jar behind them, whose source is beside this module in `jvm/`.
Does not belong here: starting a session (`session.py`), asking it something (`queries.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from telematics_assets.catalog import Names
from telematics_assets.errors import SettingsError
from telematics_assets.microbatch.connection import Supabase

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

#: The classes behind both catalogs, a few kilobytes; a Spark Connect server needs it on its own class path.
JAR = Path(__file__).with_name("telematics-catalogs.jar")
#: The foreign catalog of the database, as on Databricks.
FOREIGN = "supabase_data"

_PACKAGE = "io.github.telematics_assets"
_SESSION_CATALOG = "spark_catalog"
#: Rows that the driver of PostgreSQL holds at a time; without it it holds the whole answer.
_FETCH = "10000"


def tables_uri(home: Path | str) -> str:
    """Where the tables of a deployment are, as Hadoop writes it.

    Args:
        home: The deployment's home: a folder, or the URL of one in an object store.

    Raises:
        SettingsError: If Hadoop has no name for it.
    """
    if isinstance(home, Path):
        return f"{home}/tables"
    scheme, _, rest = home.partition("://")
    if scheme == "az":
        raise SettingsError(
            f"TELEMATICS_HOME={home!r} does not say which account, and Spark asks for it. Give the same place as "
            "abfss://container@account.dfs.core.windows.net/path."
        )
    return f"{'s3a' if scheme == 's3' else scheme}://{rest}/tables"


def catalog_settings(
    tables: str, names: Names, supabase: Supabase | None = None, conf: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The settings of both catalogs; a catalog that the user's own settings define is left to them.

    The password is not among them: see `unlock`.

    Args:
        tables: Where the tables are, as `tables_uri` writes it.
        names: Catalog and schemas. A catalog called `spark_catalog` is Spark's own, which none of ours replaces.
        supabase: The database, if one is configured.
        conf: The user's own Spark settings.
    """
    settings: dict[str, str] = {}
    given = conf or {}
    if names.catalog != _SESSION_CATALOG and _key(names.catalog) not in given:
        settings[_key(names.catalog)] = f"{_PACKAGE}.LakeCatalog"
        settings[_key(names.catalog, "root")] = f"{tables}/{names.catalog}"
        settings[_key(names.catalog, "schemas")] = f"{names.landing_schema},{names.bronze_schema}"
    if supabase is not None and names.catalog != FOREIGN and _key(FOREIGN) not in given:
        settings[_key(FOREIGN)] = f"{_PACKAGE}.SupabaseCatalog"
        settings |= {_key(FOREIGN, option): value for option, value in _jdbc(supabase).items()}
    return settings


def unlock(spark: SparkSession, supabase: Supabase) -> None:
    """Tell a running driver of ours the database's password, before the catalog is first used.

    It is no setting on purpose: those that a session is started with stand on the command line of its JVM, where every
    user of the machine reads them, and those that it is given later in each job of the event log, unredacted.

    Args:
        spark: The session, not one of Spark Connect.
        supabase: The database.
    """
    jvm = spark._jvm
    assert jvm is not None
    jvm.io.github.telematics_assets.SupabaseCatalog.unlock(FOREIGN, supabase.password)


def _key(catalog: str, option: str = "") -> str:
    return f"spark.sql.catalog.{catalog}" + (f".{option}" if option else "")


def _jdbc(supabase: Supabase) -> dict[str, str]:
    """Options of the catalog and of PostgreSQL's driver below it, on a pooler's terms as in `Supabase.parameters`."""
    options = {
        "url": f"jdbc:postgresql://{supabase.place}/{quote(supabase.database, safe='')}",
        "driver": "org.postgresql.Driver",
        "user": supabase.user,
        "sslmode": supabase.sslmode,
        # Named statements would meet another server connection.
        "prepareThreshold": "0",
        # Every transaction begins READ ONLY; a session that did would leave that to the pooler's next client.
        "readOnly": "true",
        "readOnlyMode": "transaction",
        "gssEncMode": "disable",
        "connectTimeout": str(supabase.connect_seconds),
        "tcpKeepAlive": "true",
        "ApplicationName": "telematics_assets",
        "fetchsize": _FETCH,
    }
    if supabase.sslmode.startswith("verify"):
        if supabase.ca is None:
            options["sslfactory"] = "org.postgresql.ssl.DefaultJavaSSLFactory"
        else:
            options["sslrootcert"] = str(supabase.ca)
    return options
