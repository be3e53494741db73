"""The only reader of the environment.

Belongs here: every environment variable's name, default and validation, read once into one frozen `Settings`.
Does not belong here: what the values are used for.

Every error names the variable, the value given and the values that are accepted.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast, get_args

from telematics_assets.catalog import Names
from telematics_assets.engines.spark.session import SparkOptions
from telematics_assets.errors import SettingsError, TelematicsError
from telematics_assets.microbatch.connection import NOT_CONFIGURED, PARTS, Supabase, resolve
from telematics_assets.microbatch.local import CONNECTION_FILE, read_connection
from telematics_assets.volumes.base import refuse_dbfs

EngineName = Literal["embedded", "spark"]

#: Intervals that a cron line can hold.
_MINUTES = (1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60, 120, 180, 240, 360, 480, 720, 1440)

_SCHEMES = ("abfss", "az", "s3", "gs")
_URL = re.compile(rf"(?:{'|'.join(_SCHEMES)})://[\w.-]+(?:@[\w.-]+)?(?:/[\w.=+-]+)*", re.ASCII)
_SECRET = re.compile(r"(?<=://)[^/@]*:[^/@]*(?=@)|\?.*")
_REPOSITORY = re.compile(r"(?:https?://[\w.:\[\]-]+|file://)/[^\s?#@]*|https?://[\w.:\[\]-]+", re.ASCII)
_ENCODED = re.compile("%[0-9A-Fa-f]{2}")

_HASH_KEY = "SUPABASE_HASH_KEY"
_SPARK_CONF = "TELEMATICS_SPARK_CONF"
_MASTER = re.compile(
    r"local(?:\[(?:\*|[1-9]\d*)(?:,[1-9]\d*)?\])?|local-cluster\[\d+,\d+,\d+\]|spark://[\w.\-\[\]:,]+:\d+|yarn|k8s://\S+",
    re.ASCII,
)

#: Every variable with its default and what it does; `.env.example` and the README list the same.
VARIABLES: Mapping[str, tuple[str, str]] = {
    "TELEMATICS_HOME": ("./.telematics", "Folder or object store URL that mirrors Unity Catalog."),
    "TELEMATICS_ENGINE": ("embedded", "Engine that executes the definitions: embedded, spark."),
    "TELEMATICS_CATALOG": ("workspace", "Unity Catalog catalog."),
    "TELEMATICS_LANDING_SCHEMA": ("00_landing", "Schema of the landing Volume."),
    "TELEMATICS_BRONZE_SCHEMA": ("01_bronze", "Schema of the bronze tables."),
    "TELEMATICS_VOLUME": ("telematics", "Name of the landing Volume."),
    "TELEMATICS_SETTLE_SECONDS": ("1", "A file younger than this waits for two equal listings, seconds."),
    "TELEMATICS_INCOMPLETE_SECONDS": ("300", "How long a file without its end may still be growing, seconds."),
    "TELEMATICS_SENSOR_SECONDS": ("5", "Interval of the landing sensors, seconds."),
    "TELEMATICS_REPLICATE_MINUTES": ("5", "Interval of the schedule that replicates the Supabase tables, minutes."),
    "TELEMATICS_MAX_RUN_SECONDS": ("3600", "A run older than this no longer counts as in flight, seconds."),
    "TELEMATICS_DEMO_CHANGE_SECONDS": ("60", "While make dev runs: time between changes in its database; 0: none."),
    "TELEMATICS_SPARK_MASTER": ("local[*]", "Spark master: local[n], spark://host:port, yarn, k8s://…."),
    "TELEMATICS_SPARK_REMOTE": ("", "Spark Connect server instead of a master: sc://host:port."),
    "TELEMATICS_SPARK_JARS": ("", "Folder with the jars that `telematics spark jars` fetched, for a machine offline."),
    "TELEMATICS_SPARK_REPOSITORY": ("", "Maven repository or mirror to fetch the jars from; Maven Central if empty."),
    _SPARK_CONF: ("", "Spark settings that win over ours, key=value with spaces between, quoted as in a shell."),
    "SUPABASE_DB_URL": (
        "",
        "Supabase's transaction pooler, postgresql://role.project-ref:password@host:6543/postgres.",
    ),
    "SUPABASE_HOST": ("", "Host of the pooler, instead of the URL."),
    "SUPABASE_PORT": ("", "Port of the pooler; 6543 if nothing says otherwise."),
    "SUPABASE_USER": ("", "User at the pooler: role.project-ref."),
    "SUPABASE_PASSWORD": ("", "The user's password, as it is."),
    "SUPABASE_DATABASE": ("", "Database; postgres if nothing says otherwise."),
    "SUPABASE_SSLMODE": ("", "verify-full if nothing says otherwise; verify-ca, require; disable on loopback only."),
    "SUPABASE_CA": ("", "File with the certificate of the project's CA, for verify-full."),
    "SUPABASE_CONNECTIONS": (
        "",
        "Connections of the pooler that read a large table together; 4, or one for each processor, if nothing is said.",
    ),
    _HASH_KEY: ("", "Secret key of hashed columns, 16 random characters or more; the same for ever."),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What a deployment chose.

    Attributes:
        home: What mirrors Unity Catalog: an absolute folder, or the URL of a folder in an object store, as text.
        engine: Which engine executes.
        names: Catalog, schemas and Volume.
        settle_seconds: Settle time of young files, seconds.
        incomplete_seconds: Grace of files whose end is missing, seconds.
        sensor_seconds: Interval of the landing sensors, seconds.
        replicate_minutes: Interval of the schedule of the replicated tables, minutes.
        max_run_seconds: Age at which a run no longer counts as in flight, seconds.
        demo_change_seconds: Time between two changes in the demo's database while `make dev` runs, or 0 for none.
        dagster_home: `DAGSTER_HOME` as set, or None.
        spark: How the engine `spark` gets its session.
        supabase: The database to replicate, or None if none is configured, or wrongly. Where nothing is configured it
            is the demo's, while that runs.
        supabase_parts: Keys of the parts (`url`, `host` …, `hash_key`) that the environment gives, by their variables.
        supabase_problem: What is wrong with them, or None.
        hash_key: The key of hashed columns, or None; never shown.
        unknown: Set variables that look like ours and are no setting, with the nearest known name or "".
    """

    home: Path | str = field(default_factory=lambda: Path(".telematics").absolute())
    engine: EngineName = "embedded"
    names: Names = field(default_factory=Names)
    settle_seconds: float = 1.0
    incomplete_seconds: float = 300.0
    sensor_seconds: int = 5
    replicate_minutes: int = 5
    max_run_seconds: int = 3600
    demo_change_seconds: float = 60.0
    dagster_home: Path | None = None
    spark: SparkOptions = field(default_factory=SparkOptions)
    supabase: Supabase | None = None
    supabase_parts: Mapping[str, str] = field(default_factory=dict)
    supabase_problem: str | None = None
    hash_key: str | None = field(default=None, repr=False)
    unknown: Mapping[str, str] = field(default_factory=dict)

    @property
    def default_dagster_home(self) -> Path:
        """Where Dagster's own state lives unless `DAGSTER_HOME` says otherwise; always a local disk."""
        return self._local_home / "dagster"

    @property
    def local_supabase(self) -> Path:
        """Where the demo's database lives; always a local disk."""
        return self._local_home / "supabase"

    @property
    def _local_home(self) -> Path:
        return self.home if isinstance(self.home, Path) else Path(VARIABLES["TELEMATICS_HOME"][0]).absolute()

    def require_supabase(self) -> Supabase:
        """The database to replicate.

        Raises:
            SettingsError: If none is configured, or wrongly.
        """
        if self.supabase is None:
            raise SettingsError(self.supabase_problem or f"No Supabase database is configured. {NOT_CONFIGURED}")
        return self.supabase


def parse_home(text: str) -> Path | str:
    """The home of a deployment: an absolute folder, or the URL of a folder in an object store, as text.

    Args:
        text: A value of `TELEMATICS_HOME`.

    Raises:
        SettingsError: If it is not accepted.
        DbfsDisabledError: If it is a DBFS or mount path.
    """
    refuse_dbfs(text)
    if "://" in text:
        url = text.rstrip("/")
        if not _URL.fullmatch(url) or "/.." in url or "/./" in url:
            # Neither user names, keys and queries nor anything that libraries decode differently.
            raise SettingsError(
                f"TELEMATICS_HOME={_SECRET.sub('…', text)!r} is not accepted. Give a local folder, such as "
                "./.telematics, or one of abfss://container@account.dfs.core.windows.net/path, az://container/path, "
                "s3://bucket/path, gs://bucket/path, with letters, digits and '_.=+-' in the path."
            )
        return url
    path = os.path.abspath(os.path.expanduser(text))
    if _ENCODED.search(path):
        # delta-rs decodes such a path once too often and looks for its tables elsewhere.
        raise SettingsError(f"TELEMATICS_HOME={path!r} is not accepted. Give a folder without '%' and two hex digits.")
    return Path(path)


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read and validate the environment.

    Args:
        environ: The variables; the process's own if None.

    Raises:
        SettingsError: If a value is not accepted.
        DbfsDisabledError: If `TELEMATICS_HOME` is a DBFS or mount path.
    """
    env = os.environ if environ is None else environ

    def text(name: str) -> str:
        return env.get(name, "").strip() or VARIABLES[name][0]

    def number(name: str, minimum: float) -> float:
        try:
            value = float(text(name))
        except ValueError:
            value = float("nan")
        if not minimum <= value < 1e9:
            raise SettingsError(f"{name}={text(name)!r} is not accepted. Give a number of seconds from {minimum:g}.")
        return value

    def minutes(name: str) -> int:
        given = text(name)
        if given not in map(str, _MINUTES):
            raise SettingsError(
                f"{name}={given!r} is not accepted. Use one of these, which divide an hour or a day evenly: "
                f"{', '.join(map(str, _MINUTES))}."
            )
        return int(given)

    home = parse_home(text("TELEMATICS_HOME"))
    engine = text("TELEMATICS_ENGINE")
    if engine not in get_args(EngineName):
        near = difflib.get_close_matches(engine, get_args(EngineName), 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SettingsError(
            f"TELEMATICS_ENGINE={engine!r} is not accepted.{hint} Use one of: {', '.join(get_args(EngineName))}."
        )
    names = Names(
        catalog=text("TELEMATICS_CATALOG"),
        landing_schema=text("TELEMATICS_LANDING_SCHEMA"),
        bronze_schema=text("TELEMATICS_BRONZE_SCHEMA"),
        volume=text("TELEMATICS_VOLUME"),
    )
    for variable, part in (
        ("TELEMATICS_LANDING_SCHEMA", names.landing_schema),
        ("TELEMATICS_BRONZE_SCHEMA", names.bronze_schema),
        ("TELEMATICS_VOLUME", names.volume),
        ("TELEMATICS_CATALOG", names.catalog),
    ):
        try:
            names.__class__(catalog=part).bronze("t")
        except TelematicsError as error:
            raise SettingsError(f"{variable}: {error}") from None
    dagster_home = env.get("DAGSTER_HOME", "").strip()
    # Files are loaded whatever the database's settings are: what is wrong with them is told to who needs them.
    supabase, problem = None, None
    try:
        supabase = resolve({part: env.get(variable, "") for part, variable in PARTS.items()})
    except SettingsError as error:
        problem = str(error)
    settings = Settings(
        home=home,
        engine=cast(EngineName, engine),
        names=names,
        settle_seconds=number("TELEMATICS_SETTLE_SECONDS", 0),
        incomplete_seconds=number("TELEMATICS_INCOMPLETE_SECONDS", 0),
        sensor_seconds=max(1, round(number("TELEMATICS_SENSOR_SECONDS", 1))),
        replicate_minutes=minutes("TELEMATICS_REPLICATE_MINUTES"),
        max_run_seconds=max(1, round(number("TELEMATICS_MAX_RUN_SECONDS", 1))),
        demo_change_seconds=number("TELEMATICS_DEMO_CHANGE_SECONDS", 0),
        dagster_home=Path(dagster_home) if dagster_home else None,
        spark=_spark({name: text(name) for name in VARIABLES}, env.get("JAVA_HOME", "").strip()),
        supabase=supabase,
        supabase_parts={
            part: variable
            for part, variable in {**PARTS, "hash_key": _HASH_KEY}.items()
            if env.get(variable, "").strip()
        },
        supabase_problem=problem,
        hash_key=env.get(_HASH_KEY, "").strip() or None,
        unknown=_unknown(env),
    )
    if supabase is None and problem is None and (local := read_connection(settings.local_supabase / CONNECTION_FILE)):
        return replace(settings, supabase=local.supabase, hash_key=settings.hash_key or local.hash_key)
    return settings


def _spark(given: Mapping[str, str], java_home: str) -> SparkOptions:
    master, remote = given["TELEMATICS_SPARK_MASTER"], given["TELEMATICS_SPARK_REMOTE"]
    if not _MASTER.fullmatch(master):
        raise SettingsError(
            f"TELEMATICS_SPARK_MASTER={master!r} is not accepted. Use one of: local[*], local[4], spark://host:7077, "
            "yarn, k8s://https://host:port."
        )
    if remote and not remote.startswith("sc://"):
        # What stands behind the host may be a token.
        raise SettingsError("TELEMATICS_SPARK_REMOTE is not accepted. Give a Spark Connect URL: sc://host:15002.")
    if remote and master != VARIABLES["TELEMATICS_SPARK_MASTER"][0]:
        raise SettingsError("TELEMATICS_SPARK_REMOTE and TELEMATICS_SPARK_MASTER exclude each other: unset one.")
    repository = given["TELEMATICS_SPARK_REPOSITORY"]
    if repository and not _REPOSITORY.fullmatch(repository):
        raise SettingsError(
            "TELEMATICS_SPARK_REPOSITORY is not accepted. Give the URL of a Maven repository, https://host/path, "
            f"without user and password; for those set spark.jars.ivySettings in {_SPARK_CONF} to an Ivy settings file."
        )
    folder = given["TELEMATICS_SPARK_JARS"]
    return SparkOptions(
        master=master,
        remote=remote or None,
        jars=Path(folder).expanduser().absolute() if folder else None,
        repository=repository or None,
        conf=_spark_conf(given[_SPARK_CONF]),
        java_home=Path(java_home) if java_home else None,
    )


def _spark_conf(text: str) -> dict[str, str]:
    # Values may be keys of stores: none is shown.
    usage = "Give key=value pairs with spaces between, quoted as in a shell: spark.executor.memory=4g 'spark.x=a b'."
    try:
        pairs = [pair.partition("=") for pair in shlex.split(text)]
    except ValueError as error:
        raise SettingsError(f"{_SPARK_CONF} is not accepted: {error}. {usage}") from None
    conf: dict[str, str] = {}
    for number, (key, equals, value) in enumerate(pairs, 1):
        if not equals or not re.fullmatch(r"spark\.[^\s=]+", key):
            raise SettingsError(f"{_SPARK_CONF} is not accepted: setting {number} is no spark.key=value. {usage}")
        if key in conf:
            raise SettingsError(f"{_SPARK_CONF} is not accepted: {key} stands there twice.")
        if key in ("spark.master", "spark.remote"):
            raise SettingsError(
                f"{_SPARK_CONF} is not accepted: for {key} set TELEMATICS_{key.upper().replace('.', '_')}."
            )
        conf[key] = value
    return conf


def _unknown(env: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for name in env:
        if name in VARIABLES or not name.startswith(("TELEMATICS_", "SUPABASE_")):
            continue
        # Other tools have variables of their own that begin with SUPABASE_: only what is nearly ours is a slip.
        foreign = name.startswith("SUPABASE_")
        near = difflib.get_close_matches(name, VARIABLES, 1, 0.9 if foreign else 0.6)
        if near or not foreign:
            found[name] = next(iter(near), "")
    return found
