"""Files that were loaded twice under two names: the same bytes, told without keeping a hash of every file.

Belongs here: which loaded files may be the same by what the ledger knows, and comparing those in the landing Volume.
Does not belong here: the ledger (`checkpoint.py`), what is done about it (`asset_checks.py`), Dagster.

Files of equal size and rows are candidates. Of those the first and last bytes are compared, and of what then still
looks alike everything: the work depends on how many files look alike, not on how many there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable
from typing import BinaryIO

import polars as pl

from telematics_assets.autoloader.codecs import read_up_to
from telematics_assets.engines.base import Duplicate, Duplicates
from telematics_assets.errors import VolumeError
from telematics_assets.volumes.base import Volume

#: Bytes at each end of a candidate that are compared first.
END_BYTES = 64 * 1024
#: How many candidates are opened, and how many bytes of them are read as a whole, for one question.
MAX_OPENED = 10_000
MAX_READ_BYTES = 1 << 30

_PIECE = 1 << 20

_File = tuple[str, int, int, int]


def find_duplicates(volume: Volume, ledger: pl.DataFrame, since_batch: int) -> Duplicates:
    """Loaded files of some batches whose bytes are those of another loaded file.

    Args:
        volume: The landing Volume. Files that are gone or changed since can't be compared.
        ledger: Every known file (`checkpoint.LEDGER_SCHEMA`).
        since_batch: Files of these batches on are compared with all others.
    """
    like = ["size", "rows"]
    loaded = ledger.filter((pl.col("state") == "INGESTED") & (pl.col("rows") > 0) & pl.col("size").is_not_null())
    alike = loaded.filter((pl.len().over(like) > 1) & (pl.col("batch_id").max().over(like) >= since_batch))
    columns = alike.sort("batch_id", "path").select("path", "size", "modified_ns", "batch_id")
    comparison = _Comparison(volume)
    by_ends = comparison.groups(columns.head(MAX_OPENED).iter_rows(), _ends)
    budget = MAX_READ_BYTES
    found: list[Duplicate] = []
    for group in by_ends:
        size = group[0][1]
        if size <= 2 * END_BYTES:
            groups = [group]
        elif budget >= size * len(group):
            budget -= size * len(group)
            groups = comparison.groups(group, _everything)
        else:
            comparison.passed_over += len(group)
            continue
        found += [
            Duplicate(path, same[0][0], batch_id)
            for same in groups
            for path, _, _, batch_id in same[1:]
            if batch_id >= since_batch
        ]
    passed_over = comparison.passed_over + max(alike.height - MAX_OPENED, 0)
    return Duplicates(tuple(sorted(found, key=lambda file: file.path)), passed_over)


class _Comparison:
    """Digests files of the Volume as they were loaded, and counts those that can't be."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self.passed_over = 0

    def groups(self, files: Iterable[_File], digest: Callable[[BinaryIO, int], Hashable]) -> list[list[_File]]:
        """Files that stay together, the first loaded first; those that stand alone are left out."""
        together: dict[Hashable, list[_File]] = {}
        for file in files:
            path, size, modified_ns, _ = file
            now = self._volume.stat(path)
            if now is None or (now.size, now.modified_ns) != (size, modified_ns):
                self.passed_over += 1
                continue
            try:
                with self._volume.open(path) as source:
                    together.setdefault((size, digest(source, size)), []).append(file)
            except VolumeError:
                self.passed_over += 1
        return [group for group in together.values() if len(group) > 1]


def _ends(source: BinaryIO, size: int) -> bytes:
    if size <= 2 * END_BYTES:
        return hashlib.sha256(read_up_to(source, size)).digest()
    digest = hashlib.sha256(read_up_to(source, END_BYTES))
    source.seek(size - END_BYTES)
    digest.update(read_up_to(source, END_BYTES))
    return digest.digest()


def _everything(source: BinaryIO, size: int) -> bytes:
    digest = hashlib.sha256()
    while piece := source.read(_PIECE):
        digest.update(piece)
    return digest.digest()
