"""A source under a decoder.

Belongs here: telling a source's own errors from those of its content.
Does not belong here: decoding (`codecs.py`, `parquet.py`), Dagster.
"""

from __future__ import annotations

from typing import BinaryIO


class Watched:
    """A source that remembers its own error: the decoder's errors are the file's fault, these are not.

    Attributes:
        error: What the source raised last, or None.
    """

    closed = False

    def __init__(self, source: BinaryIO) -> None:
        """Watch a source; it stays open."""
        self._source = source
        self.error: Exception | None = None

    def read(self, size: int = -1) -> bytes:
        """Read from the source."""
        try:
            return self._source.read(size)
        except Exception as error:
            self.error = error
            raise

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move in the source."""
        try:
            return self._source.seek(offset, whence)
        except Exception as error:
            self.error = error
            raise

    def tell(self) -> int:
        """Where the source stands."""
        return self._source.tell()

    def close(self) -> None:
        """Leave the source open: whoever opened it closes it."""
