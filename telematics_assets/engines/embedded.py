"""The embedded engine: our loader, pyarrow and polars to read, pyarrow to write. No JVM, no account.

Belongs here: how a plan's files become one Delta commit in this process.
Does not belong here: the answers about tables and streams (`checkpointed.py`), reading files (`autoloader/`), other
engines, Dagster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pyarrow as pa

from telematics_assets.autoloader.allocator import keep_freed_memory_in_few_places
from telematics_assets.autoloader.checkpoint import ATTEMPT_INFO, DIGEST_INFO, Plan, Result
from telematics_assets.autoloader.loader import BatchWriter
from telematics_assets.autoloader.ordered import ahead
from telematics_assets.autoloader.reading import Attempt, PlanRows, RestartError, first_schema
from telematics_assets.autoloader.schema import evolved, lost_own_fields, widens
from telematics_assets.catalog import FileStream, TableName
from telematics_assets.engines.base import ProgressListener
from telematics_assets.engines.checkpointed import CheckpointEngine, create_table, open_volume, options_of, tables_root
from telematics_assets.lakehouse.base import Commit, Lakehouse, Table
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.settings import Settings
from telematics_assets.volumes.base import FileEntry, Volume

#: Batches that are read while the writer is busy.
BATCHES_AHEAD = 1


def open_engine(settings: Settings) -> EmbeddedEngine:
    """The embedded engine of a deployment."""
    return EmbeddedEngine(
        open_volume(settings), DeltaLakehouse(tables_root(settings)), settings.names, **options_of(settings)
    )


class EmbeddedEngine(CheckpointEngine):
    """Executes everything in this process. See `engines.base.Engine`."""

    name = "embedded"

    def _writer(self) -> BatchWriter:
        return _Writer(self._volume, self._lakehouse, self._clock)


class _Writer:
    """Reads a plan's files in this process and appends their rows. See `autoloader.loader.BatchWriter`."""

    def __init__(self, volume: Volume, lakehouse: Lakehouse, clock: Callable[[], int]) -> None:
        keep_freed_memory_in_few_places()
        self._volume = volume
        self._lakehouse = lakehouse
        self._clock = clock

    def create_table(
        self, stream: FileStream, name: TableName, files: tuple[FileEntry, ...], properties: dict[str, str]
    ) -> Table:
        """See `BatchWriter.create_table`."""
        return create_table(self._volume, self._lakehouse, stream, name, files, properties)

    def write(
        self,
        stream: FileStream,
        table: Table,
        plan: Plan,
        attempt: str,
        stream_id: str,
        publish: Callable[[Result], None],
        on_step: Callable[[str], None],
        progress: ProgressListener,
    ) -> Commit:
        """See `BatchWriter.write`."""
        info = {ATTEMPT_INFO: attempt, DIGEST_INFO: plan.digest}

        def commit(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Commit:
            write = table.widen if widens(table.schema, schema) else table.append
            return write(schema, batches, stream_id, plan.batch_id, info)

        return self._written(stream, table.schema, plan, attempt, commit, publish, on_step, progress)

    def rewrite(
        self,
        stream: FileStream,
        table: Table,
        plan: Plan,
        attempt: str,
        positions: dict[str, int],
        publish: Callable[[Result], None],
        on_step: Callable[[str], None],
        progress: ProgressListener,
    ) -> Commit:
        """See `RefreshWriter.rewrite`."""
        info = {ATTEMPT_INFO: attempt, DIGEST_INFO: plan.digest}

        def commit(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Commit:
            return table.overwrite(schema, batches, positions, info)

        schema = first_schema(self._volume, stream, plan.files)
        return self._written(stream, schema, plan, attempt, commit, publish, on_step, progress)

    def _written(
        self,
        stream: FileStream,
        base: pa.Schema,
        plan: Plan,
        attempt: str,
        commit: Callable[[pa.Schema, Iterable[pa.RecordBatch]], Commit],
        publish: Callable[[Result], None],
        on_step: Callable[[str], None],
        progress: ProgressListener,
    ) -> Commit:
        """One attempt at a plan over a schema, to which its files may add columns."""
        known = Attempt(new_fields=lost_own_fields(stream, base))
        on_step("reading")
        now = self._clock()
        while True:
            schema = evolved(base, known.new_fields)
            rows = PlanRows(self._volume, stream, base, schema, plan, attempt, known, publish, on_step, progress, now)
            try:
                return commit(schema, ahead(iter(rows), BATCHES_AHEAD))
            except RestartError:
                continue
