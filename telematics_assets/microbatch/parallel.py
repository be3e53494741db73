"""Reading a large table by several connections at once, all of them in one snapshot.

Belongs here: who reads which part, that all read the same moment, and that everybody has ended when the reading has.
Does not belong here: which parts there are (`snapshot.py`), what becomes of rows (`extract.py`), Dagster.

One connection is as fast as one process of the server. The batch's own transaction exports its snapshot, and helpers
take that for theirs, each in a transaction of its own: behind a transaction pooler it stays on one server connection as
long as it lasts. Parts lie in a queue, from which all take: nobody waits for a slow one, nor for a helper that does not
come. The batch's own connection reads too, and what a helper gives back before any of it was passed on.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass

import pyarrow as pa

from telematics_assets.errors import SupabaseError, SupabaseUnavailableError
from telematics_assets.microbatch.session import Connection, Session

#: Bytes of rows that wait to be made use of, whoever read them.
QUEUE_BYTES = 32 << 20
#: How long readers may go on, seconds: those that nobody waits for any more, and those that only have to say goodbye.
_PATIENCE_SECONDS, _GOODBYE_SECONDS = 0.2, 2.0
# The same answer of two transactions: they see the same moment of the same server.
_MOMENT = "SELECT pg_current_snapshot()::text || ' ' || pg_postmaster_start_time()::text"

#: Reads a part through a transaction.
Read = Callable[[Session, str], Generator[pa.RecordBatch, None, None]]


def read_together(
    session: Session, parts: Sequence[str], read: Read, *, lock: str
) -> Generator[pa.RecordBatch, None, None]:
    """Read all parts, in no order, by as many connections as there may be, and come.

    They have ended when the iterator is closed, or else when the transaction ends.

    Args:
        session: The batch's own transaction, which reads too, and asks nothing else meanwhile.
        parts: What `read` is called with, each once; all of them together are what is to be read.
        read: Reads a part. Called in other threads, several at once.
        lock: A statement that locks what is read, without waiting.

    Raises:
        SupabaseError: If the database refuses.
        SupabaseUnavailableError: If a connection is lost of whose part rows were passed on already.
    """
    readers = _Readers(session, parts, read)
    session.ending.callback(readers.close)
    try:
        readers.start(lock)
        yield from readers
    finally:
        readers.close()


@dataclass
class _Reader:
    """A thread with its connection.

    Attributes:
        cut: Ends the connection at once.
        work: Done when the thread is.
        is_own: Whether it is the session's own.
        has_come: Whether it has a transaction.
    """

    cut: Callable[[], None]
    work: Future[None]
    is_own: bool
    has_come: bool


class _Readers(Iterator[pa.RecordBatch]):
    """The session's own reader and its helpers."""

    def __init__(self, session: Session, parts: Sequence[str], read: Read) -> None:
        self._session = session
        self._parts = deque(parts)
        self._read = read
        self._batches: deque[pa.RecordBatch] = deque()
        self._bytes = 0
        #: Parts that are being read.
        self._in_hand = 0
        self._failure: BaseException | None = None
        self._over = False
        self._changed = threading.Condition()
        self._readers: list[_Reader] = []

    def start(self, lock: str) -> None:
        """Begin to read."""
        snapshot, moment = self._session.value("SELECT pg_export_snapshot()"), self._session.value(_MOMENT)
        first = f"SET TRANSACTION SNAPSHOT '{snapshot}'; {lock}"
        connections = min(self._session.connections, len(self._parts))
        threads = ThreadPoolExecutor(connections, "reader")

        def begin(cut: Callable[[], None], work: Callable[[_Reader], None], *, is_own: bool) -> None:
            reader = _Reader(cut, Future(), is_own, has_come=is_own)
            self._readers.append(reader)
            reader.work = threads.submit(work, reader)
            reader.work.add_done_callback(self._ended)

        def helping(connection: Connection) -> Callable[[_Reader], None]:
            return lambda reader: self._help(reader, connection, first, moment)

        begin(self._session.cut, lambda _: self._read_parts(self._session, is_own=True), is_own=True)
        for _ in range(connections - 1):
            helper = self._session.beside()
            begin(helper.cut, helping(helper), is_own=False)
        threads.shutdown(wait=False)

    def __next__(self) -> pa.RecordBatch:
        with self._changed:
            self._changed.wait_for(lambda: self._batches or self._failure or not (self._parts or self._in_hand))
            if self._failure is not None:
                raise self._failure
            if not self._batches:
                raise StopIteration
            batch = self._batches.popleft()
            self._bytes -= batch.nbytes
            self._changed.notify_all()
            return batch

    def close(self) -> None:
        """End all that still read or are on their way."""
        with self._changed:
            patience = _PATIENCE_SECONDS if self._in_hand else _GOODBYE_SECONDS
            self._over = True
            self._parts.clear()
            self._batches.clear()
            self._changed.notify_all()
        readers, self._readers = self._readers, []
        wait([reader.work for reader in readers if reader.has_come], patience)
        # Who is on the way ends as soon as its connection answers or fails: nobody waits for that.
        while left := [reader for reader in readers if not reader.work.done()]:
            for reader in left:
                reader.cut()
                # Nothing can be said on it any more, not even COMMIT.
                self._session.cut_short |= reader.is_own
            wait([reader.work for reader in left], _PATIENCE_SECONDS)
            if not any(reader.has_come for reader in left):
                break

    def _help(self, reader: _Reader, connection: Connection, first: str, moment: object) -> None:
        # Whoever does not come, or is lost with nothing in hand, is not missed.
        with closing(connection), suppress(SupabaseError, SupabaseUnavailableError):
            if self._over:
                return
            with connection.transaction(first) as session:
                reader.has_come = True
                if session.value(_MOMENT) == moment:
                    self._read_parts(session, is_own=False)

    def _read_parts(self, session: Session, *, is_own: bool) -> None:
        while (part := self._taken(is_own=is_own)) is not None:
            passed = False
            try:
                with closing(self._read(session, part)) as batches:
                    for batch in batches:
                        if not self._passed(batch):
                            return
                        passed = True
            except (SupabaseError, SupabaseUnavailableError) as error:
                if not is_own and not passed:
                    self._put_down(part)
                else:
                    self._failed(error)
                return
            self._put_down()

    def _taken(self, *, is_own: bool) -> str | None:
        with self._changed:
            # The session's own reader stays until nobody can give anything back.
            self._changed.wait_for(lambda: self._over or self._parts or not (is_own and self._in_hand))
            if self._over or self._failure or not self._parts:
                return None
            self._in_hand += 1
            return self._parts.popleft()

    def _put_down(self, *unread: str) -> None:
        with self._changed:
            self._in_hand -= 1
            self._parts.extend(unread)
            self._changed.notify_all()

    def _passed(self, batch: pa.RecordBatch) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._over or not self._bytes or self._bytes + batch.nbytes <= QUEUE_BYTES)
            if self._over:
                return False
            self._batches.append(batch)
            self._bytes += batch.nbytes
            self._changed.notify_all()
            return True

    def _ended(self, work: Future[None]) -> None:
        if (error := work.exception()) is not None:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()
