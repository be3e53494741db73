"""JSON files, plain or packed, read exactly and column by column.

Belongs here: cutting a file into lines, reading its blocks in order, and the two cheap looks at a file (is it complete,
which keys does it have). A document is read in the same way, its elements being the lines.
Does not belong here: what becomes of a block (`json_rows.py`), where a document's elements are (`json_documents.py`),
unpacking (`codecs.py`), schema decisions, Dagster.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from telematics_assets.autoloader.chunks import MAX_RECORD_BYTES, Chunk, RecordTooLongError
from telematics_assets.autoloader.codecs import codec, is_complete_packed, read_up_to, unpacked
from telematics_assets.autoloader.json_documents import Elements, elements, is_complete_document
from telematics_assets.autoloader.json_exact import WHITE_SPACE, is_json_value
from telematics_assets.autoloader.json_grid import Block
from telematics_assets.autoloader.json_rows import Layout, Shapes, read_block, record_keys
from telematics_assets.autoloader.ordered import in_order
from telematics_assets.errors import UnreadableFileError

#: How much of a file is parsed at a time.
CHUNK_BYTES = 2 * 1024 * 1024

#: Values of one chunk, null ones too: short records of many columns make small chunks.
CHUNK_VALUES = 1_000_000

#: How far back from a file's end its last line is looked for, before a closing brace has to do.
TAIL_BYTES = 1024 * 1024

_BOM = b"\xef\xbb\xbf"
#: What an allocator of the C library is shown to be a usual size, just below the largest that it takes for one.
_USUAL_BYTES = 31 * 1024 * 1024

_LINE_FEED = b"\n"[0]


def read_json(
    source: BinaryIO,
    target: pa.Schema,
    *,
    rescued_column: str,
    raw_column: str | None,
    file_path: str,
    multi_line: bool = False,
    verbatim: Collection[str] = (),
    chunk_bytes: int = CHUNK_BYTES,
    on_unknown: Callable[[Sequence[str]], None] | None = None,
) -> Iterator[Chunk]:
    """Read a file of JSON lines, or a JSON document, in file order and in bounded memory.

    Args:
        source: The file, plain or packed; it can seek.
        target: The columns to yield: data columns, `_corrupt_record`, the raw column if any, the rescued column. A data
            column that is no string column is not filled: its key is rescued. `pa.string()` needs no conversion.
        rescued_column: Name of the rescued data column.
        raw_column: Name of the column for the line as it stands in the file, or None.
        file_path: How the rescued data names the file.
        multi_line: The file is a document: its elements are read as lines are (`json_documents.elements`).
        verbatim: String columns that show each value's source text, strings in their quotes; `null` is null as well.
        chunk_bytes: How much is parsed at a time; the rows are the same with any.
        on_unknown: Called before a chunk is yielded, with those keys of its records that name no column of `target`, in
            order of appearance.

    Yields:
        Chunks with at least one row each.

    Raises:
        UnreadableFileError: If the file is packed and can't be unpacked to its end, or a line is longer than
            `MAX_RECORD_BYTES`; rows before that place may have been yielded.
    """
    _keep_freed_pages()
    layout = Layout.of(target, rescued_column, raw_column, file_path, verbatim)
    shapes = Shapes()
    lines_before = 0
    opened = unpacked(source, repr(file_path))
    blocks: Iterator[bytes | Elements] = _blocks(opened, chunk_bytes)
    if multi_line:
        blocks = elements(opened, chunk_bytes)
    parts = _short(blocks, max(1, CHUNK_VALUES // len(target)))
    results = in_order(lambda part: read_block(part, layout, shapes), parts, _part_bytes)
    try:
        for result in results:
            if result.too_long is not None:
                raise RecordTooLongError(result.too_long)
            lines_before += result.lines
            if result.unknown and on_unknown is not None:
                on_unknown(result.unknown)
            if result.chunk.table.num_rows:
                yield result.chunk
    except RecordTooLongError as error:
        kind, remedy = (
            ("Element", "Make smaller records") if multi_line else ("Line", "Put one JSON object on each line")
        )
        raise UnreadableFileError(
            f"{kind} {lines_before + error.record + 1} of {file_path!r} is longer than {MAX_RECORD_BYTES} bytes, "
            f"the longest record that is read. {remedy}, then upload the file again."
        ) from None
    finally:
        results.close()


@cache
def _keep_freed_pages() -> None:
    """Free a large piece of memory once: glibc then keeps freed pages for the next block, up to twice that size.

    Without it every block gives its pages back and faults them in again: half a million faults in 2 M lines, which
    threads wait for each other at. The pages of this piece are never touched.
    """
    bytes(_USUAL_BYTES)


def json_keys(source: BinaryIO, limit_bytes: int, *, multi_line: bool = False) -> list[str]:
    """The top-level keys at the start of a file, for schema inference.

    Args:
        source: The file, plain or packed.
        limit_bytes: How much to look at (unpacked). Only whole lines within it count.
        multi_line: The file is a document.

    Returns:
        The keys of its records, each once, in order of appearance; lines that are no record have none.

    Raises:
        UnreadableFileError: If the file is packed and can't be unpacked so far.
    """
    opened = unpacked(source)
    head = read_up_to(opened, limit_bytes)
    cut = opened.read(1) not in (b"", b"\n")
    if multi_line:
        # An element that the limit cuts has no end, and thereby is no record.
        parts = [Block.of(part) for part in elements(io.BytesIO(head), limit_bytes)]
    else:
        parts = [Block((head[: head.rfind(b"\n") + 1] if cut else head).removeprefix(_BOM))]
    return list(dict.fromkeys(key for part in parts for key in record_keys(part)))


def is_complete_json(source: BinaryIO, size: int, *, multi_line: bool = False) -> bool:
    """Whether a file that may still be being written has its end.

    A plain file has it if it ends with a line feed, or if its last line is one whole JSON value; of a last line longer
    than `TAIL_BYTES` only the closing brace is asked for. A document has it if it is closed; of one larger than
    `TAIL_BYTES` only the closing bracket is asked for. A packed file has it if it unpacks to its end and its content
    has it, within the limits of `codecs.py`.

    Args:
        source: The file; it can seek.
        size: Its size in bytes.
        multi_line: The file is a document.

    Returns:
        False for a file without content.
    """
    source.seek(0)
    if codec(source) is not None:
        return is_complete_packed(source, size, is_complete_document if multi_line else _is_complete_lines)
    if multi_line and size <= TAIL_BYTES:
        return is_complete_document(iter([read_up_to(source, size)]))
    source.seek(max(0, size - TAIL_BYTES))
    tail = read_up_to(source, min(size, TAIL_BYTES))
    return tail.rstrip(WHITE_SPACE).endswith((b"}", b"]")) if multi_line else _is_complete_tail(tail, size > TAIL_BYTES)


def _is_complete_lines(pieces: Iterator[bytes]) -> bool:
    tail, total = b"", 0
    for piece in pieces:
        total += len(piece)
        tail = (tail + piece)[-TAIL_BYTES:]
    return _is_complete_tail(tail, total > TAIL_BYTES)


def _is_complete_tail(tail: bytes, cut: bool) -> bool:
    """Whether a file that ends with `tail` has its end; `cut` says that more stands before it."""
    if tail.endswith(b"\n"):
        return True
    _, line_feed, line = tail.rpartition(b"\n")
    if cut and not line_feed:
        return line.rstrip(WHITE_SPACE).endswith(b"}")
    line = line if line_feed else line.removeprefix(_BOM)
    if not line.strip(WHITE_SPACE):
        return bool(line_feed)
    return is_json_value(line.decode(errors="replace"))


def _blocks(source: BinaryIO, chunk_bytes: int) -> Iterator[bytes]:
    """Cut a file into pieces of whole lines. The last line of the last piece may lack its line feed."""
    pieces: list[bytes | memoryview] = []
    open_bytes = 0
    first = True
    data = source.read(chunk_bytes)
    while data:
        following = source.read(chunk_bytes)
        cut = data.rfind(b"\n") + 1 if following else len(data)
        if cut:
            pieces.append(memoryview(data)[:cut])
            block = b"".join(pieces)
            yield block.removeprefix(_BOM) if first else block
            first = False
            pieces, open_bytes = [], 0
        pieces.append(data[cut:])
        open_bytes += len(data) - cut
        if open_bytes > MAX_RECORD_BYTES + len(_BOM) + 1:
            raise RecordTooLongError
        data = following


def _part_bytes(part: bytes | Elements) -> int:
    return len(part.data if isinstance(part, Elements) else part)


def _short(blocks: Iterator[bytes | Elements], lines: int) -> Iterator[bytes | Elements]:
    """Cut blocks into parts of so many lines at most."""
    for block in blocks:
        if isinstance(block, Elements):
            for start in range(0, len(block.offsets) - 1, lines):
                offsets = block.offsets[start : start + lines + 1]
                yield Elements(block.data[offsets[0] : offsets[-1]], offsets - offsets[0])
            continue
        feeds = np.frombuffer(block, np.uint8) == _LINE_FEED
        if np.count_nonzero(feeds) <= lines:
            yield block
        else:
            ends = np.flatnonzero(feeds)[lines - 1 :: lines] + 1
            for start, end in pairwise([0, *ends.tolist(), len(block)]):
                if start < end:
                    yield block[start:end]
