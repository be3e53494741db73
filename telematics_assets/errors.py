"""The one error tree of the package.

Belongs here: every exception that the package raises on purpose, and whether it is worth trying again.
Does not belong here: handling (the Dagster boundary is `telematics_assets.assets`, the exit codes are `cli.py`).

Two branches decide what a caller does: `PermanentError` is never retried, `TransientError` is retried with
backoff. A message says what was given, what is accepted, and the next step; it never holds a secret.
"""

from __future__ import annotations


class TelematicsError(Exception):
    """Raised when anything in this package fails on purpose; catch this to catch them all."""

    transient = False


class PermanentError(TelematicsError):
    """Raised when trying again can't help: somebody must change something first."""


class TransientError(TelematicsError):
    """Raised when the same call may go through later."""

    transient = True


class SettingsError(PermanentError):
    """Raised when an environment variable or a setting has a value that is not accepted."""


class MissingExtraError(PermanentError):
    """Raised when a feature needs an optional dependency that is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f'{feature} needs an optional dependency. Run: pip install "telematics_assets[{extra}]"')
        self.extra = extra


class OptionError(PermanentError):
    """Raised when a stream is declared with an unknown option or an option value that is not accepted."""


class UnknownNameError(PermanentError):
    """Raised when a stream, table or file is asked for by a name that does not exist."""


class DbfsDisabledError(PermanentError):
    """Raised when a path uses DBFS or a mount (`dbfs:/`, `/dbfs/`, `/mnt/`), which Unity Catalog workspaces disable."""

    def __init__(self, path: str) -> None:
        super().__init__(
            f"DBFS_DISABLED: {path!r} is a DBFS or mount path, and those are not accepted. "
            "Use a Unity Catalog Volume: /Volumes/<catalog>/<schema>/<volume>/<path>"
        )


class VolumeError(PermanentError):
    """Raised when the landing Volume refuses an operation for good (no permission, not a folder, bad path)."""


class VolumeUnavailableError(TransientError):
    """Raised when the landing Volume did not answer this time (I/O error, time-out, disk full)."""


class FileMissingError(VolumeError):
    """Raised when a path of the Volume does not exist."""


class UnreadableFileError(PermanentError):
    """Raised when one data file can't be read: it is quarantined by name, the rest of its batch goes on."""


class FileChangedError(TransientError):
    """Raised when a data file changed or vanished while it was being read."""


class StagingError(PermanentError):
    """Raised when files were refused at staging; nothing of a refused file was uploaded."""


class SourceUnavailableError(TransientError):
    """Raised when a file to stage could not be fetched this time; nothing of it was uploaded."""


class CheckpointError(PermanentError):
    """Raised when a stream's checkpoint can't be trusted; each subclass names what happened and the choices."""


class CheckpointCorruptError(CheckpointError):
    """Raised when a checkpoint file is cut short or is not what was written."""


class CheckpointTooNewError(CheckpointError):
    """Raised when the checkpoint was written by a newer version of this package."""


class CheckpointRolledBackError(CheckpointError):
    """Raised when the table is ahead of the checkpoint: it was lost, or restored from an older copy."""


class TableError(PermanentError):
    """Raised when a Delta table can't be used as this stream's target."""


class TableNotFoundError(TableError):
    """Raised when a table is read that does not exist."""


class TableMovedError(TableError):
    """Raised when a table was deleted, restored, overwritten or emptied by somebody else under a live checkpoint."""


class TableNotOursError(TableError):
    """Raised when a table exists that this stream did not create."""


class TableUnsupportedError(TableError):
    """Raised when a table has a feature or property that breaks the exactly-once promise."""


class RowsAtRiskError(PermanentError):
    """Raised when a full refresh would take away rows whose files are gone, or can't be read any more."""


class SchemaError(PermanentError):
    """Raised when data can't be brought into the table's schema under the stream's schema evolution mode."""


class CommitConflictError(TransientError):
    """Raised when another writer committed first; nothing of this commit is in the table."""


class BasisMovedError(CommitConflictError):
    """Raised when an overwrite had to commit a property first: the handle is one version further, nobody else wrote."""


class RunLimitError(PermanentError):
    """Raised when something took longer than its stated limit."""


class PostgresStartError(PermanentError):
    """Raised when the local PostgreSQL server can't be started."""


class SupabaseError(PermanentError):
    """Raised when the database refuses for good: the message names the hurdle and how to take it."""

    def __init__(self, cause: str, fix: str = "") -> None:
        super().__init__(f"{cause} {fix}".strip())
        self.cause = cause
        self.fix = fix


class SupabaseUnavailableError(TransientError):
    """Raised when the database or its pooler did not answer this time.

    Attributes:
        soon: Whether it may go through within seconds.
    """

    def __init__(self, cause: str, fix: str = "", *, soon: bool = False) -> None:
        super().__init__(f"{cause} {fix}".strip())
        self.cause = cause
        self.fix = fix
        self.soon = soon


class ReplicationError(PermanentError):
    """Raised when a table can't be replicated as it is declared; the message says what to change."""


class ReplicaLagsError(TransientError):
    """Raised when the database is behind what was read of it before: a standby that has not caught up yet."""


class SparkError(PermanentError):
    """Raised when Spark can't be used as it is set up: the message names what is in the way and how to mend it."""

    def __init__(self, cause: str, fix: str = "") -> None:
        super().__init__(f"{cause} {fix}".strip())
        self.cause = cause
        self.fix = fix


class JavaMissingError(SparkError):
    """Raised when there is no Java that Spark runs on."""


class SparkJarsError(SparkError):
    """Raised when jars that Spark needs are missing, or are not the ones they are called."""


class QueryError(PermanentError):
    """Raised when a query can't be answered as it is written: the message says why, and what to look at."""


class SparkUnavailableError(TransientError):
    """Raised when a cluster, a Connect server or a repository of jars did not answer this time."""

    def __init__(self, cause: str, fix: str = "") -> None:
        super().__init__(f"{cause} {fix}".strip())
        self.cause = cause
        self.fix = fix
