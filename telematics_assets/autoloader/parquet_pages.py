"""Footers and page headers of many small Parquet files, as columns.

Belongs here: which files are built alike, and where their pages are and what they hold.
Does not belong here: what becomes of that (`parquet_together.py`), the protocol (`lockstep.py`), Dagster.

Only what is plain is taken: one row group, no repeated values, no encryption, pages that fill their column without a
gap and count as many values as the footer. Whatever differs is left to who reads one file after another.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from telematics_assets.autoloader.lockstep import (
    BINARY,
    I32,
    I64,
    LIST,
    PADDING,
    STRUCT,
    Lockstep,
    Marks,
    Numbers,
    OddError,
)

MAGIC = b"PAR1"
DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
#: The encoding of texts that say how much of the text before them they share.
DELTA_BYTE_ARRAY = 7
#: A file that takes more unpacked is read alone.
MAX_UNPACKED = 16 << 20
#: Differing ways to write the same schema that are looked for among the files of a group.
_ROUNDS = 12
_LEAST = 4
_MAX_PAGES = 64
_MIN_SIZE = 12
_SCHEMA = b"ARROW:schema"


@dataclass
class Leaf:
    """A column of the files of a family.

    Attributes:
        kind: Its physical type.
        codec: How its pages are packed.
        encodings: The list of its encodings, and ...
        path: ... of the names on the way to it, as they stand in the first file.
        packed: Bytes of its pages with their headers, by file.
        values: Values by the footer, by file.
        data_at: Where its first data page begins in the joined bytes, by file.
        dictionary_at: Where its dictionary begins, if it has one.
    """

    kind: int = -1
    codec: int = -1
    encodings: bytes = b""
    path: bytes = b""
    values: Numbers = field(default_factory=lambda: np.zeros(0, np.int64))
    packed: Numbers = field(default_factory=lambda: np.zeros(0, np.int64))
    data_at: Numbers = field(default_factory=lambda: np.zeros(0, np.int64))
    dictionary_at: Numbers | None = None

    @property
    def start(self) -> Numbers:
        """Where its first page begins, by file."""
        return self.data_at if self.dictionary_at is None else self.dictionary_at


@dataclass
class Pages:
    """Pages of the columns of a family, in order of file, column and place.

    Attributes:
        file: Which file of the family, by page.
        leaf: Which column.
        kind: What kind of page.
        header: Where its header begins in the joined bytes.
        body: Where its content begins.
        packed: Bytes of the content.
        unpacked: The same when it is unpacked.
        values: Values, nulls included.
        checksum: CRC-32 of the content, or -1.
        encoding: Of the values.
        definition: Of the definition levels.
        repetition: Of the repetition levels.
    """

    file: Numbers
    leaf: Numbers
    kind: Numbers
    header: Numbers
    body: Numbers
    packed: Numbers
    unpacked: Numbers
    values: Numbers
    checksum: Numbers
    encoding: Numbers
    definition: Numbers
    repetition: Numbers

    def take(self, chosen: npt.NDArray[np.intp] | Marks) -> Pages:
        """Some of the pages."""
        return Pages(**{name: values[chosen] for name, values in vars(self).items()})


@dataclass
class Family:
    """Files whose footers are built alike and tell the same schema.

    Attributes:
        members: Which files of the group.
        rows: Rows, by file.
        leaves: The columns.
        head: The first file's footer up to its count of rows.
        tail: What stands in it behind the row groups.
    """

    members: npt.NDArray[np.intp]
    rows: Numbers
    leaves: list[Leaf]
    head: bytes
    tail: bytes


class Group:
    """Small files in one piece of memory."""

    def __init__(self, contents: Sequence[bytes]) -> None:
        """Join the contents of some files.

        Args:
            contents: The files.
        """
        self.joined = b"".join([*contents, bytes(PADDING)])
        self.data = np.frombuffer(self.joined, np.uint8)
        sizes = np.array([len(content) for content in contents], np.int64)
        ends = np.cumsum(sizes)
        self._starts = ends - sizes
        lengths = [int.from_bytes(content[-8:-4], "little") for content in contents]
        self._footers = ends - 8 - np.array(lengths, np.int64)
        self._ends = ends - 8
        framed = [content[:4] == MAGIC == content[-4:] and len(content) >= _MIN_SIZE for content in contents]
        self._left = np.flatnonzero(np.array(framed, np.bool_) & (self._footers >= self._starts + 4))

    def families(self) -> list[Family]:
        """The files that are built alike; those that are like few others are left out."""
        found: list[Family] = []
        for _ in range(_ROUNDS):
            if len(self._left) < _LEAST:
                break
            family = None
            alike = np.zeros(len(self._left), np.bool_)
            with suppress(OddError):
                family, alike = self._family(self._left)
            alike[0] = True
            self._left = self._left[~alike]
            if family is not None and len(family.members) >= _LEAST:
                found.append(family)
        return found

    def _family(self, files: npt.NDArray[np.intp]) -> tuple[Family, Marks]:
        """The files that are like the first, with which of them are sound, and which are alike."""
        steps = Lockstep(self.joined, self._footers[files])
        rows: Numbers | None = None
        group: _RowGroup | None = None
        head = tail = b""
        first = int(self._footers[files[0]])
        last = 0
        for number, kind in steps.fields():
            begin = steps.at
            _expect(kind, {3: I64, 4: LIST, 5: LIST}.get(number, kind))
            if number == 3:
                head = self.joined[first : int(begin[0])]
                rows = steps.signed()
            elif number == 4:
                if last != 3:
                    raise OddError
                group = _RowGroup(steps)
                tail = self.joined[int(steps.at[0]) : int(self._ends[files[0]])]
            elif number == 5:
                _notes(steps)
            elif number in (1, 2, 6, 7):
                steps.skip(kind)
                steps.alike &= steps.same_bytes(begin)
            else:
                raise OddError
            last = number
        if rows is None or group is None:
            raise OddError
        alike = steps.alike.copy()
        # More rows than bytes cost more than is read here; bounded, no sum or product of them overflows.
        sound = alike & (steps.at == self._ends[files]) & (rows > 0) & (rows <= MAX_UNPACKED) & (rows == group.rows)
        sound &= (group.unpacked >= 0) & (group.unpacked <= MAX_UNPACKED)
        for leaf in group.leaves:
            leaf.data_at = leaf.data_at + self._starts[files]
            if leaf.dictionary_at is not None:
                leaf.dictionary_at = leaf.dictionary_at + self._starts[files]
                sound &= leaf.dictionary_at < leaf.data_at
            sound &= (leaf.values == rows) & (leaf.packed > 0) & (leaf.start >= self._starts[files] + 4)
            sound &= leaf.start + leaf.packed <= self._footers[files]
        leaves = [
            Leaf(
                leaf.kind,
                leaf.codec,
                leaf.encodings,
                leaf.path,
                leaf.values[sound],
                leaf.packed[sound],
                leaf.data_at[sound],
                None if leaf.dictionary_at is None else leaf.dictionary_at[sound],
            )
            for leaf in group.leaves
        ]
        return Family(files[sound], rows[sound], leaves, head, tail), alike

    def pages(self, family: Family) -> tuple[Pages, Marks]:
        """The pages of a family's columns, and which of its files have them in full."""
        count, width = len(family.members), len(family.leaves)
        at = np.stack([leaf.start for leaf in family.leaves], axis=1).ravel()
        ends = np.stack([leaf.start + leaf.packed for leaf in family.leaves], axis=1).ravel()
        left = np.repeat(family.rows, width)
        dictionary = np.tile([leaf.dictionary_at is not None for leaf in family.leaves], count)
        good = np.ones(count * width, np.bool_)
        found: list[Pages] = []
        chunks = np.arange(count * width)
        for number in range(_MAX_PAGES):
            pages, whole = self._headers(at[chunks], chunks // width, chunks % width)
            is_dictionary = pages.kind == DICTIONARY_PAGE
            whole &= np.isin(pages.kind, (DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2))
            whole &= is_dictionary == (dictionary[chunks] if number == 0 else np.False_)
            whole &= (pages.packed >= 0) & (pages.unpacked >= 0) & (pages.unpacked <= MAX_UNPACKED)
            whole &= (pages.values >= 0) & (pages.body + pages.packed <= ends[chunks])
            good[chunks] &= whole
            found.append(pages)
            at[chunks] = pages.body + pages.packed
            left[chunks] -= np.where(is_dictionary, 0, pages.values)
            chunks = chunks[whole & (at[chunks] < ends[chunks])]
            if not len(chunks):
                break
        else:
            good[chunks] = False
        good &= left == 0
        names = vars(found[0])
        joined = Pages(**{name: np.concatenate([vars(pages)[name] for pages in found]) for name in names})
        # The sort is stable: pages of one column stay in order.
        joined = joined.take(np.argsort(joined.file * width + joined.leaf, kind="stable"))
        files = good.reshape(count, width).all(axis=1)
        unpacked = np.bincount(joined.file, joined.unpacked, count)
        return joined, files & (unpacked <= MAX_UNPACKED)

    def _headers(self, at: Numbers, file: Numbers, leaf: Numbers) -> tuple[Pages, Marks]:
        """The headers of pages that begin at some places, and which of them could be read."""
        values = {name: np.full(len(at), -1, np.int64) for name in _HEADER}
        whole = np.zeros(len(at), np.bool_)
        left = np.arange(len(at))
        for _ in range(_ROUNDS):
            if not len(left):
                break
            steps = Lockstep(self.joined, at[left])
            try:
                read = _page(steps)
            except OddError:
                left = left[1:]
                continue
            alike = left[steps.alike]
            for name, found in read.items():
                values[name][alike] = found[steps.alike]
            values["body"][alike] = steps.at[steps.alike]
            whole[alike] = True
            left = left[~steps.alike]
        return Pages(file=file, leaf=leaf, header=at, **values), whole


#: Numbers of a page header, and those of the structures in it, of which each kind of page has its own.
_NUMBERS = {1: "kind", 2: "unpacked", 3: "packed", 4: "checksum"}
_COUNTS = {
    5: {1: "values", 2: "encoding", 3: "definition", 4: "repetition"},
    7: {1: "values", 2: "encoding"},
    8: {1: "values", 4: "encoding"},
}
_HOLDERS = {DATA_PAGE: 5, DICTIONARY_PAGE: 7, DATA_PAGE_V2: 8}
_HEADER = (
    "kind",
    "body",
    "packed",
    "unpacked",
    "values",
    "checksum",
    "encoding",
    "definition",
    "repetition",
)


_LEAF_TYPES = {1: I32, 2: LIST, 3: LIST, 4: I32, 5: I64, 7: I64, 9: I64, 11: I64, 12: STRUCT}


class _RowGroup:
    """The one row group of each file."""

    def __init__(self, steps: Lockstep) -> None:
        self.leaves: list[Leaf] = []
        if steps.items() != (1, STRUCT):
            raise OddError
        nothing = np.full(len(steps.at), -1, np.int64)
        self.rows = self.unpacked = nothing
        for number, kind in steps.fields():
            _expect(kind, {1: LIST, 2: I64, 3: I64}.get(number, kind))
            if number == 1:
                count, _ = steps.items()
                self.leaves = [self._column(steps) for _ in range(count)]
            elif number == 2:
                self.unpacked = steps.signed()
            elif number == 3:
                self.rows = steps.signed()
            else:
                steps.skip(kind)
        if not self.leaves:
            raise OddError

    def _column(self, steps: Lockstep) -> Leaf:
        leaf: Leaf | None = None
        for number, kind in steps.fields():
            if number == 3:
                _expect(kind, STRUCT)
                leaf = self._leaf(steps)
            elif number in (2, 4, 5, 6, 7):
                steps.skip(kind)
            else:
                # In another file, or encrypted.
                raise OddError
        if leaf is None or not (len(leaf.values) and len(leaf.packed) and len(leaf.data_at)):
            raise OddError
        return leaf

    def _leaf(self, steps: Lockstep) -> Leaf:
        leaf = Leaf()
        for number, kind in steps.fields():
            begin = steps.at
            _expect(kind, _LEAF_TYPES.get(number, kind))
            if number == 1:
                leaf.kind = steps.same()
            elif number == 4:
                leaf.codec = steps.same()
            elif number == 5:
                leaf.values = steps.signed()
            elif number == 7:
                leaf.packed = steps.signed()
            elif number == 9:
                leaf.data_at = steps.signed()
            elif number == 11:
                leaf.dictionary_at = steps.signed()
            elif number == 12:
                steps.skip_loose()
            else:
                steps.skip(kind)
                if number in (2, 3):
                    taken = steps.since(begin, 0)
                    leaf.encodings, leaf.path = (taken, leaf.path) if number == 2 else (leaf.encodings, taken)
                if number == 3:
                    steps.alike &= steps.same_bytes(begin)
        return leaf


def _notes(steps: Lockstep) -> None:
    """Key-value metadata: what others write of a file is free, what Arrow reads types from is not."""
    count, kind = steps.items()
    if kind != STRUCT:
        raise OddError
    for _ in range(count):
        schema = False
        for number, inner in steps.fields():
            begin = steps.at
            steps.skip(inner)
            if inner != BINARY or number not in (1, 2):
                raise OddError
            if number == 1:
                steps.alike &= steps.same_bytes(begin)
                schema = steps.since(begin, 0).endswith(_SCHEMA)
            elif schema:
                _same_types(steps, begin)


def _same_types(steps: Lockstep, begin: Numbers) -> None:
    """Take out whose Arrow schema, read since `begin`, has other columns than the first; its own notes are free."""
    same = steps.same_bytes(begin)
    if same[steps.alike].all():
        return
    lead = _arrow_schema(steps.since(begin, 0))
    for number in np.flatnonzero(steps.alike & ~same).tolist():
        schema = _arrow_schema(steps.since(begin, number))
        same[number] = lead is not None and schema is not None and lead.equals(schema, check_metadata=True)
    steps.alike &= same


def _arrow_schema(text: bytes) -> pa.Schema | None:
    """The columns of what Arrow wrote as a text, with its length before it."""
    start = next((at for at, byte in enumerate(text) if byte < 0x80), len(text)) + 1
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text[start:], validate=True)))
    except (pa.ArrowException, OSError, ValueError):
        return None
    return schema.remove_metadata()


def _page(steps: Lockstep) -> dict[str, Numbers]:
    """One page header."""
    nothing = np.full(len(steps.at), -1, np.int64)
    read = dict.fromkeys(("encoding", "definition", "repetition", "checksum"), nothing)
    kind = holder = -1
    for number, type_ in steps.fields():
        if number in _NUMBERS and type_ == I32:
            if number == 1:
                kind = steps.same()
            else:
                read[_NUMBERS[number]] = steps.signed()
        elif number in _COUNTS and type_ == STRUCT and holder < 0:
            holder = number
            _counts(steps, read, _COUNTS[number])
        else:
            raise OddError
    if holder != _HOLDERS.get(kind) or not {"unpacked", "packed", "values"} <= read.keys():
        raise OddError
    read["kind"] = np.full(len(steps.at), kind, np.int64)
    if read["checksum"] is not nothing:
        read["checksum"] = read["checksum"] & 0xFFFFFFFF
    return read


def _counts(steps: Lockstep, read: dict[str, Numbers], names: dict[int, str]) -> None:
    for number, kind in steps.fields():
        if number in names:
            _expect(kind, I32)
            read[names[number]] = steps.signed()
        elif kind == STRUCT:
            steps.skip_loose()
        else:
            steps.skip(kind)


def _expect(kind: int, wanted: int) -> None:
    if kind != wanted:
        raise OddError
