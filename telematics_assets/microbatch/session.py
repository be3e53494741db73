"""Transactions in the database that only read: everything that a batch reads, it reads in one of these.

Belongs here: opening connections, beginning and ending transactions, and asking questions inside them.
Does not belong here: which questions (`source.py`, `extract.py`), the connection's parameters (`connection.py`), what
an error means (`hurdles.py`), ending one that is silent (`silence.py`), Dagster.

Behind a transaction pooler a session is borrowed: whatever is set must end with the transaction, and nothing may be
asked outside of one. ADBC moves rows as Arrow columns by binary COPY, ten times faster than row by row; with a query
outside a transaction its several round trips meet different server connections, and it answers with wrong rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

import adbc_driver_manager
import adbc_driver_postgresql.dbapi as postgresql
import pyarrow as pa

from telematics_assets.errors import SupabaseError, SupabaseUnavailableError, TelematicsError
from telematics_assets.microbatch.ahead import one_ahead
from telematics_assets.microbatch.connection import Supabase
from telematics_assets.microbatch.hurdles import RETRY_PAUSES, explain, retried
from telematics_assets.microbatch.silence import Watch

#: Bytes of one record batch that ADBC hands over.
BATCH_BYTES = 8 << 20

# One message and one round trip. None of it takes a snapshot: a lock may be taken before the first question.
_BEGIN = "; ".join(
    (
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
        # A reader whom policies filter then fails instead of seeing fewer rows.
        "SET LOCAL row_security = off",
        "SET LOCAL statement_timeout = 0",
        "SET LOCAL idle_in_transaction_session_timeout = 0",
        "SET LOCAL lock_timeout = '10s'",
        "SET LOCAL TimeZone = 'UTC'",
        "SET LOCAL DateStyle = 'ISO, YMD'",
        "SET LOCAL IntervalStyle = 'iso_8601'",
        "SET LOCAL extra_float_digits = 1",
        "SET LOCAL bytea_output = 'hex'",
        "SET LOCAL quote_all_identifiers = off",
        "SET LOCAL client_encoding = 'UTF8'",
        "SET LOCAL search_path = pg_catalog",
    )
)
# A setting that older servers do not know.
_BEGIN_17 = f"{_BEGIN}; SET LOCAL transaction_timeout = 0"
_VERSION_17 = 170_000
#: How long it may take to ask, past a connection that is silent, whether the server still works for it, seconds.
_ASKING_SECONDS = 30.0
# A server that waits for its client to take the rows, while that waits for rows, has lost it.
_AT_IT = """
SELECT count(*) > 0 FROM pg_stat_activity
WHERE usename = current_user AND pid <> pg_backend_pid() AND state = 'active'
  AND wait_event IS DISTINCT FROM 'ClientWrite' AND xact_start < clock_timestamp() - {seconds} * interval '0.9 second'
"""
_DRIVER_ERRORS = (adbc_driver_manager.Error, pa.ArrowException, OSError)


class BeginningRefusedError(SupabaseError):
    """Raised when the database refuses for good what a transaction shall begin with."""


class Session:
    """Questions inside one transaction: all answers are of one snapshot."""

    def __init__(self, connection: Any, supabase: Supabase, watch: Watch) -> None:
        """Ask through an open connection that is inside a transaction."""
        self._connection = connection
        self._supabase = supabase
        self._watch = watch
        #: Whether an answer was not read to its end.
        self.cut_short = False
        #: What is called before the transaction ends, however it does.
        self.ending = ExitStack()

    @property
    def connections(self) -> int:
        """How many connections may be at work at once."""
        return self._supabase.connections

    def beside(self) -> Connection:
        """Another connection to the same database, which is tried once."""
        return Connection(self._supabase, ())

    def cut(self) -> None:
        """End the connection at once: whoever waits for an answer, in another thread, gets an error."""
        self._watch.cut()

    def run(self, statement: str) -> None:
        """Execute a statement that answers nothing; several are separated by `;`."""
        with self._asking(), self._connection.cursor() as cursor:
            cursor.adbc_statement.set_sql_query(statement)
            cursor.adbc_statement.execute_update()

    def rows(self, query: str) -> list[dict[str, Any]]:
        """The rows of a small answer."""
        with self._asking(), self._connection.cursor() as cursor:
            # By COPY every question takes more round trips, and the server plans it twice.
            cursor.adbc_statement.set_options(**{"adbc.postgresql.use_copy": "false"})
            cursor.execute(query)
            return list(cursor.fetch_arrow_table().to_pylist())

    def value(self, query: str) -> Any:
        """The one value of an answer with one row and one column, or None if there is no row."""
        for row in self.rows(query):
            return next(iter(row.values()))
        return None

    @contextmanager
    def stream(self, query: str) -> Iterator[pa.RecordBatchReader]:
        """The rows of an answer of any size, batch by batch; the server is never more than one batch ahead.

        Only what the database gets wrong becomes an error of ours: whoever reads may have other troubles.
        """
        with self._connection.cursor() as cursor:
            with self._asking():
                cursor.adbc_statement.set_options(**{"adbc.postgresql.batch_size_hint_bytes": str(BATCH_BYTES)})
                cursor.execute(query)
                reader = cursor.fetch_record_batch()
            failures: list[Exception] = []
            cut_short_before, self.cut_short = self.cut_short, True

            def pulled(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
                try:
                    yield from batches
                    self.cut_short = cut_short_before
                except (SupabaseError, SupabaseUnavailableError) as failure:
                    failures.append(failure)
                    raise

            try:
                # The driver decodes in one thread only, and the interpreter's lock is free meanwhile.
                with one_ahead(lambda: self._next(reader), self._watch.cut) as batches:
                    yield pa.RecordBatchReader.from_batches(reader.schema, pulled(batches))
            except Exception:
                # A writer that pulled the rows through Arrow's C interface has made a text of it.
                if failures:
                    raise failures[0] from None
                raise

    def _next(self, reader: pa.RecordBatchReader) -> pa.RecordBatch | None:
        with self._asking():
            try:
                return reader.read_next_batch()
            except StopIteration:
                return None

    def _asking(self) -> AbstractContextManager[None]:
        return _explained(self._supabase, self._watch, self._watch.waiting())


class Connection:
    """A connection to the database that waits between transactions without holding anything of the pooler's."""

    def __init__(
        self, supabase: Supabase, pauses: Sequence[float] = RETRY_PAUSES, *, watch: Watch | None = None
    ) -> None:
        """Describe a connection; the first transaction opens it.

        Args:
            supabase: The database.
            pauses: How long to wait before another try, seconds; none for one try only.
            watch: Ends it when it is silent; by default one that asks first whether the server is still at it.
        """
        self._supabase = supabase
        self._pauses = pauses
        self._connection: Any = None
        self._version = 0
        self._watch = watch or Watch(supabase.port, supabase.silence_seconds, lambda: _is_at_it(supabase))

    @property
    def place(self) -> str:
        """Host and port."""
        return self._supabase.place

    @contextmanager
    def transaction(self, first: str = "", *, pauses: Sequence[float] | None = None) -> Iterator[Session]:
        """One `REPEATABLE READ READ ONLY` transaction; see `transaction` for what it raises.

        Args:
            first: A statement that goes along with its beginning, in one message: one that takes no snapshot, and
                answers nothing.
            pauses: How long to wait before another try this time, seconds.

        Raises:
            BeginningRefusedError: If the database can be reached, and refuses that.
        """
        session = retried(lambda: self._begun(first), self._pauses if pauses is None else pauses)
        try:
            with session.ending:
                yield session
            if session.cut_short:
                # Another word would first have to read the rest.
                self.close()
            else:
                session.run("COMMIT")
        except BaseException:
            # Ending the connection ends the transaction, and spares reading what is under way.
            self.close()
            raise

    def cut(self) -> None:
        """End the connection at once: whoever waits for an answer, in another thread, gets an error."""
        self._watch.cut()

    def close(self) -> None:
        """End the connection; another transaction opens it again."""
        connection, self._connection = self._connection, None
        self._watch.close()
        if connection is not None:
            # Nothing was written: however it ends, nothing is lost.
            with suppress(adbc_driver_manager.Error, RuntimeError):
                connection.close()

    def _begun(self, first: str) -> Session:
        waited = self._connection is not None
        if not waited:
            with _explained(self._supabase, self._watch, self._watch.opening()):
                # With autocommit the driver sends no BEGIN of its own.
                self._connection = postgresql.connect(self._supabase.uri(), autocommit=True)
                self._version = int(self._connection.adbc_get_info()["vendor_version"])
        session = Session(self._connection, self._supabase, self._watch)
        begin = _BEGIN if self._version < _VERSION_17 else _BEGIN_17
        try:
            session.run(f"{begin}; {first}" if first else begin)
        except BaseException as error:
            self.close()
            if waited and isinstance(error, SupabaseUnavailableError) and error.soon:
                # It may have been lost long ago, while nothing was asked: only a new one tells whether anybody answers.
                return self._begun(first)
            if first and isinstance(error, SupabaseError):
                raise BeginningRefusedError(error.cause, error.fix) from None
            raise
        return session


@contextmanager
def connected(supabase: Supabase, pauses: Sequence[float] = RETRY_PAUSES) -> Iterator[Connection]:
    """A connection for several transactions, one after the other.

    Args:
        supabase: The database.
        pauses: How long to wait before another try, seconds; none for one try only.
    """
    connection = Connection(supabase, pauses)
    try:
        yield connection
    finally:
        connection.close()


@contextmanager
def transaction(supabase: Supabase, pauses: Sequence[float] = RETRY_PAUSES) -> Iterator[Session]:
    """Open a connection and one `REPEATABLE READ READ ONLY` transaction on it; both end with the block.

    Nothing is set beyond the transaction's end: behind a pooler the session is the next client's. No snapshot is taken
    before the first question, so that a lock may come first.

    Args:
        supabase: The database.
        pauses: How long to wait before another try, seconds; none for one try only.

    Raises:
        SupabaseError: If it refuses for good.
        SupabaseUnavailableError: If it does not answer, after several tries where that may help.
    """
    with connected(supabase, pauses) as connection, connection.transaction() as session:
        yield session


def _is_at_it(supabase: Supabase) -> bool:
    """Whether the server works for this role since so long; asked through another connection, and that not for long."""
    connection = Connection(supabase, (), watch=Watch(supabase.port, _ASKING_SECONDS))
    try:
        with connection.transaction() as session:
            return bool(session.value(_AT_IT.format(seconds=supabase.silence_seconds)))
    except TelematicsError:
        return False
    finally:
        connection.close()


@contextmanager
def _explained(supabase: Supabase, watch: Watch, waiting: AbstractContextManager[None]) -> Iterator[None]:
    try:
        with waiting:
            yield
    except _DRIVER_ERRORS as error:
        if watch.fired:
            raise SupabaseUnavailableError(
                f"{supabase.place} has said nothing for {supabase.silence_seconds:g} seconds, and the server is not at "
                "work for us any more: the pooler hangs, or the network has lost what was on its way.",
                "Nothing was committed; the next run goes on where this one began.",
                soon=True,
            ) from None
        # The driver's own error may repeat what is secret: no report shall show it as the context.
        raise explain(error, supabase) from None
