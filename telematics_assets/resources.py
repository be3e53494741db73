"""The resources behind the keys `engine`, `landing` and `supabase`.

Belongs here: Dagster resources that make the real thing when a run or a tick first needs it.
Does not belong here: which of them a deployment uses (`definitions.py`), what they do.

Tests and other code locations may put any object with the protocol `Engine` or `Volume`, or a `Supabase`, behind these
keys.

https://docs.dagster.io/guides/build/external-resources
"""

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from telematics_assets.catalog import Names
from telematics_assets.deployment import open_engine
from telematics_assets.engines.base import Engine
from telematics_assets.engines.spark.session import SparkOptions
from telematics_assets.errors import SettingsError
from telematics_assets.microbatch.connection import PARTS, Supabase, resolve
from telematics_assets.microbatch.local import CONNECTION_FILE, read_connection
from telematics_assets.settings import Settings, parse_home
from telematics_assets.volumes.base import Volume

if TYPE_CHECKING:
    from typing import Self

    from telematics_assets.engines.checkpointed import CheckpointEngine

_OPENING = threading.Lock()
_OPENED: "list[tuple[Settings, CheckpointEngine]]" = []


@dataclass(frozen=True)
class _Source:
    """What an engine needs to replicate: the database, or what is wrong with its settings, and the key of hashes."""

    supabase: Supabase | None
    problem: str | None = None
    hash_key: str | None = field(default=None, repr=False)


class _Deployment(dg.ConfigurableResource[Any]):
    home: str = Field(description="Absolute folder, or object store URL, that mirrors Unity Catalog.")
    catalog: str = Field(description="Unity Catalog catalog.")
    landing_schema: str = Field(description="Schema of the landing Volume.")
    bronze_schema: str = Field(description="Schema of the bronze tables.")
    volume: str = Field(description="Name of the landing Volume.")
    settle_seconds: float = Field(description="A file younger than this waits for two equal listings.")
    incomplete_seconds: float = Field(description="How long a file without its end may still be growing.")
    source: dg.ResourceDependency[_Source]

    @classmethod
    def from_settings(cls, settings: Settings, supabase: Supabase | None = None) -> "Self":
        """The resource of a deployment's settings.

        Args:
            settings: The deployment.
            supabase: The database to replicate instead of the one that the settings name.
        """
        return cls(**cls._parts(settings, supabase))

    @staticmethod
    def _parts(settings: Settings, supabase: Supabase | None) -> dict[str, Any]:
        source = _Source(supabase, None, settings.hash_key) if supabase else _SourceResource.from_settings(settings)
        return {
            "source": source,
            "home": str(settings.home),
            "catalog": settings.names.catalog,
            "landing_schema": settings.names.landing_schema,
            "bronze_schema": settings.names.bronze_schema,
            "volume": settings.names.volume,
            "settle_seconds": settings.settle_seconds,
            "incomplete_seconds": settings.incomplete_seconds,
        }

    def _settings(self) -> Settings:
        return Settings(
            home=parse_home(self.home),
            names=Names(self.catalog, self.landing_schema, self.bronze_schema, self.volume),
            settle_seconds=self.settle_seconds,
            incomplete_seconds=self.incomplete_seconds,
            supabase=self.source.supabase,
            supabase_problem=self.source.problem,
            hash_key=self.source.hash_key,
        )


class _Embedded(_Deployment):
    def _engine(self) -> "CheckpointEngine":
        return _opened(self._settings())


class _Spark(_Deployment):
    # No config: what the user sets for Spark may hold keys, and config is shown.
    spark: dg.ResourceDependency[SparkOptions]

    @classmethod
    def from_settings(cls, settings: Settings, supabase: Supabase | None = None) -> "Self":
        """See `_Deployment.from_settings`."""
        return cls(spark=settings.spark, **cls._parts(settings, supabase))

    def _engine(self) -> "CheckpointEngine":
        return _opened(replace(self._settings(), engine="spark", spark=self.spark))


class EmbeddedEngineResource(_Embedded):
    """The engine that works inside the run's own process, on a local folder or an object store."""

    def create_resource(self, context: dg.InitResourceContext) -> Engine:
        """The engine; the same object for every tick and run of this process, so that its caches help."""
        return self._engine()


class EmbeddedLandingResource(_Embedded):
    """The landing Volume that the embedded engine reads."""

    def create_resource(self, context: dg.InitResourceContext) -> Volume:
        """The Volume."""
        return self._engine().volume


class SparkEngineResource(_Spark):
    """The engine that reads and writes by Apache Spark, in a session that a run makes when it first needs one."""

    def create_resource(self, context: dg.InitResourceContext) -> Engine:
        """The engine; the same object for every tick and run of this process, and with it one session."""
        return self._engine()


class SparkLandingResource(_Spark):
    """The landing Volume that Spark reads."""

    def create_resource(self, context: dg.InitResourceContext) -> Volume:
        """The Volume."""
        return self._engine().volume


class SupabaseResource(dg.ConfigurableResource[Any]):
    """The Supabase database to replicate. Every part is empty or an `EnvVar`; what it holds is shown nowhere."""

    url: str = Field(default="", repr=False, description="URL of the transaction pooler, with user and password.")
    host: str = Field(default="", description="Host of the pooler.")
    port: str = Field(default="", description="Port of the pooler.")
    user: str = Field(default="", description="User at the pooler: role.project-ref.")
    password: str = Field(default="", repr=False, description="The user's password.")
    database: str = Field(default="", description="Database.")
    sslmode: str = Field(default="", description="verify-full, verify-ca or require; disable on loopback.")
    ca: str = Field(default="", description="File with the CA's certificate.")
    connections: str = Field(default="", description="Connections that read a large table together, at most.")
    hash_key: str = Field(default="", repr=False, description="Secret key of hashed columns.")
    demo: str = Field(default="", description="Where nothing else is given: the file by which the demo's is found.")

    @classmethod
    def from_settings(cls, settings: Settings) -> "Self":
        """The resource of a deployment's settings; Dagster looks the values up when a run needs them."""
        parts = {part: dg.EnvVar(variable) for part, variable in settings.supabase_parts.items()}
        return cls(**parts, demo=str(settings.local_supabase / CONNECTION_FILE))

    def create_resource(self, context: dg.InitResourceContext) -> Supabase | None:
        """The connection's description, or None if nothing is configured; nothing connects here.

        Raises:
            SettingsError: If the parts describe no connection.
        """
        supabase = resolve({part: getattr(self, part) for part in PARTS})
        if supabase is None and (local := read_connection(Path(self.demo))):
            return local.supabase
        return supabase


class _SourceResource(SupabaseResource):
    def create_resource(self, context: dg.InitResourceContext) -> Any:
        """A `_Source`."""
        try:
            supabase = super().create_resource(context)
        except SettingsError as error:
            # Files are loaded all the same.
            return _Source(None, str(error))
        hash_key = self.hash_key.strip()
        local = None if hash_key else read_connection(Path(self.demo))
        if local is not None and local.supabase == supabase:
            hash_key = local.hash_key
        return _Source(supabase, None, hash_key or None)


def _opened(settings: Settings) -> "CheckpointEngine":
    """The engine of these settings: one for the whole process."""
    with _OPENING:
        for known, engine in _OPENED:
            if known == settings:
                return engine
        engine = open_engine(settings)
        # Settings change where tests and demos change them.
        _OPENED[:] = [*_OPENED[-3:], (settings, engine)]
        return engine
