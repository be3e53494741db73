"""Rows of a table as Arrow batches in the bronze schema, in bounded memory: exact, or null and counted.

Belongs here: running the SELECT, and making bronze values of what arrives, column by column.
Does not belong here: which type becomes which (`types.py`), which rows are asked for, what is done with them, Dagster.

Whole columns are looked at first; only where one holds something that bronze can't show are its values told apart.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Generator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from telematics_assets.engines.base import Anomaly
from telematics_assets.errors import ReplicationError
from telematics_assets.lakehouse.types import lossless_cast, plain
from telematics_assets.microbatch.rescue import RESCUED_FIELD, Rescued, array_text, moments
from telematics_assets.microbatch.session import Session
from telematics_assets.microbatch.types import ColumnPlan, Form, arrow_schema, select_list

_LONGEST_EXAMPLE = 100
_DAY_US = 86_400_000_000
#: From PostgreSQL's epoch to Arrow's, days. ADBC adds it in 32 and 64 bits, around the end if need be.
_EPOCH_DAYS = 10_957
_LARGEST_BIGINT = 2**63 - 1
_HEX = np.frombuffer("".join(f"{byte:02x}" for byte in range(256)).encode(), np.uint16)
#: What arrives for a form, where that is not the bronze type.
_ARRIVES: dict[Form, pa.DataType] = {
    "uuid": pa.binary(16),
    "xid8": pa.binary(),
    "decimal": pa.string(),
    "hash": pa.string(),
}
_SPECIAL_NUMBERS = pa.array(["NaN", "Infinity", "-Infinity"])


class Anomalies:
    """Collects what bronze could not show, by column and kind; from several threads if need be."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[tuple[str, str], tuple[int, str]] = {}

    def add(self, plan: ColumnPlan, kind: str, values: int, example: str) -> None:
        """Count some more; the first example is kept.

        Raises:
            ReplicationError: If the column is part of the key.
        """
        if not values:
            return
        example = example if len(example) <= _LONGEST_EXAMPLE else f"{example[:_LONGEST_EXAMPLE]}…"
        if plan.required:
            raise ReplicationError(
                f"Column {plan.source} is part of the key and holds {example!r} ({kind}), which {plan.arrow} does not "
                "hold: its row could not be told from others. Correct the row, or declare another unique key."
            )
        with self._lock:
            before, first = self._found.get((plan.source, kind), (0, example))
            self._found[plan.source, kind] = (before + values, first)

    @property
    def found(self) -> tuple[Anomaly, ...]:
        """All of them, in the order in which they were met."""
        return tuple(Anomaly(*key, rows, example) for key, (rows, example) in self._found.items())


def extract(
    session: Session,
    select_from: str,
    plans: Sequence[ColumnPlan],
    *,
    anomalies: Anomalies,
    where: str | None = None,
    order_by: str | None = None,
    limit: int | None = None,
    rescued: bool = False,
) -> Generator[pa.RecordBatch, None, None]:
    """Read rows as batches of some MiB in the schema `arrow_schema(plans)`.

    Args:
        session: An open transaction.
        select_from: What follows FROM, such as `SourceTable.rows_sql`.
        plans: How each column travels.
        anomalies: Collects what bronze can't show.
        where: A condition, or None for all rows.
        order_by: What follows ORDER BY, or None.
        limit: How many rows at most, or None.
        rescued: Whether a last column keeps what bronze can't show (`rescue.RESCUED_FIELD`).

    Raises:
        ReplicationError: If what arrives is not what was planned for.
        SupabaseError: If the database refuses.
        SupabaseUnavailableError: If the connection is lost; what was read so far must not be committed.
    """
    schema = arrow_schema(plans)
    if rescued:
        schema = schema.append(RESCUED_FIELD)
    query = f"SELECT {select_list(plans)} FROM {select_from}"
    query += f" WHERE {where}" if where else ""
    query += f" ORDER BY {order_by}" if order_by else ""
    query += f" LIMIT {limit}" if limit is not None else ""
    with session.stream(query) as reader:
        for batch in reader:
            if batch.num_rows:
                yield _converted(batch, plans, schema, anomalies)


def _converted(
    batch: pa.RecordBatch, plans: Sequence[ColumnPlan], schema: pa.Schema, anomalies: Anomalies
) -> pa.RecordBatch:
    checks = iter(range(len(plans), batch.num_columns))
    rescued = Rescued()
    columns = []
    for number, plan in enumerate(plans):
        array = plain(batch.column(number))
        if plan.check is not None:
            _count_arrays(plan, batch.column(next(checks)), array, anomalies, rescued)
        columns.append(_bronze(plan, array, anomalies, rescued))
    if len(schema) > len(plans):
        columns.append(rescued.column(batch.num_rows))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _count_arrays(plan: ColumnPlan, check: pa.Array, array: pa.Array, anomalies: Anomalies, rescued: Rescued) -> None:
    if check.null_count == len(check):
        return
    rescued.add(plan.source, check)
    shown = check.is_valid()
    for kind, mask in (
        ("more than one dimension", pc.and_(shown, array.is_null())),
        ("array that does not start at 1", pc.and_(shown, array.is_valid())),
    ):
        texts = check.filter(mask)
        anomalies.add(plan, kind, len(texts), texts[0].as_py() if len(texts) else "")


def _bronze(plan: ColumnPlan, array: pa.Array, anomalies: Anomalies, rescued: Rescued) -> pa.Array:
    leaves = array.flatten() if pa.types.is_list(array.type) else array
    arrives = _ARRIVES.get(plan.form) or plan.leaf
    if leaves.type != arrives or (leaves is array) == pa.types.is_list(plan.arrow):
        raise ReplicationError(
            f"Column {plan.source} arrives as {array.type}, which was not planned for: the table was altered "
            "meanwhile, or the driver reads it otherwise than version 1.13. Run it again; if that does not help, "
            "install the version in constraints.txt."
        )
    match plan.form:
        case "uuid":
            return uuid_text(array)
        case "hash":
            assert plan.hash_key is not None
            return keyed_hash(array, plan.hash_key)
        case "xid8":
            return _transaction_ids(plan, array, anomalies, rescued)
        case "decimal":
            return _decimals(plan, array, leaves, anomalies, rescued)
        case "bounded":
            return _bounded(plan, array, leaves, anomalies, rescued)
    return array if array.type == plan.arrow else array.cast(plan.arrow)


def uuid_text(array: pa.FixedSizeBinaryArray) -> pa.StringArray:
    """UUIDs of 16 bytes in their canonical spelling."""
    rows = len(array)
    if not rows:
        return pa.array([], pa.string())
    raw = np.frombuffer(array.buffers()[1], np.uint8, rows * 16, array.offset * 16)
    digits = _HEX[raw].view(np.uint8).reshape(rows, 32)
    text = np.full((rows, 36), ord("-"), np.uint8)
    for start, end, shift in ((0, 8, 0), (8, 12, 1), (12, 16, 2), (16, 20, 3), (20, 32, 4)):
        text[:, start + shift : end + shift] = digits[:, start:end]
    offsets = np.arange(rows + 1, dtype=np.int32) * np.int32(36)
    values = pa.StringArray.from_buffers(rows, pa.py_buffer(offsets), pa.py_buffer(text))
    return pc.if_else(array.is_valid(), values, None) if array.null_count else values


def keyed_hash(array: pa.StringArray, key: bytes) -> pa.StringArray:
    """HMAC-SHA-256 of each text as 64 hex digits; null stays null."""
    # RFC 2104 by hand: the two halves of the key are hashed once, which makes it three times as fast as hmac.digest.
    block = (hashlib.sha256(key).digest() if len(key) > 64 else key).ljust(64, b"\0")
    inner, outer = (hashlib.sha256(bytes(byte ^ pad for byte in block)) for pad in (0x36, 0x5C))

    def hashed(text: str) -> str:
        first, second = inner.copy(), outer.copy()
        first.update(text.encode())
        second.update(first.digest())
        return second.hexdigest()

    # The one loop over values: no library hashes a column with a key.
    encoded = array.dictionary_encode()
    return pa.array(map(hashed, encoded.dictionary.to_pylist()), pa.string()).take(encoded.indices)


def _transaction_ids(plan: ColumnPlan, array: pa.BinaryArray, anomalies: Anomalies, rescued: Rescued) -> pa.Int64Array:
    filled = pc.fill_null(array, bytes(8)) if array.null_count else array
    rows = len(filled)
    if rows == 0:
        return pa.array([], pa.int64())
    _, offsets, data = filled.buffers()
    (start,) = np.frombuffer(offsets, np.int32, 1, filled.offset * 4)
    numbers = np.frombuffer(data, ">u8", rows, start).astype(np.uint64)
    values = pa.array(numbers.view(np.int64))
    beyond = pc.less(values, 0)
    if pc.any(beyond).as_py():
        there = numbers[numbers > _LARGEST_BIGINT]
        anomalies.add(plan, "larger than a BIGINT", len(there), str(there[0]))
        rescued.add(plan.source, pc.if_else(beyond, pa.array(numbers).cast(pa.string()), None))
    kept = pc.and_not(array.is_valid(), beyond)
    return values if pc.all(kept).as_py() else pc.if_else(kept, values, None)


def _decimals(plan: ColumnPlan, array: pa.Array, leaves: pa.Array, anomalies: Anomalies, rescued: Rescued) -> pa.Array:
    try:
        return array.cast(plan.arrow)
    except pa.ArrowInvalid:
        special = pc.fill_null(pc.is_in(leaves, _SPECIAL_NUMBERS), False)
    for text in _SPECIAL_NUMBERS.to_pylist():
        anomalies.add(plan, text, pc.sum(pc.equal(leaves, text)).as_py() or 0, text)
    _rescue(plan, array, leaves, special, rescued)
    try:
        return _without(array, special).cast(plan.arrow)
    except pa.ArrowInvalid as error:
        raise ReplicationError(f"Column {plan.source} has a number that {plan.arrow} does not hold: {error}") from None


def _bounded(plan: ColumnPlan, array: pa.Array, leaves: pa.Array, anomalies: Anomalies, rescued: Rescued) -> pa.Array:
    _, misfits = lossless_cast(leaves, leaves.type)
    if misfits is None:
        return array if array.type == plan.arrow else array.cast(plan.arrow)
    numbers = _of_postgres(leaves.filter(misfits))
    ends = np.iinfo(numbers.dtype)
    for kind, mask in (
        ("infinity", numbers == ends.max),
        ("-infinity", numbers == ends.min),
        ("before year 1", (numbers < 0) & (numbers != ends.min)),
        ("after year 9999", (numbers > 0) & (numbers != ends.max)),
    ):
        if mask.any():
            anomalies.add(plan, kind, int(mask.sum()), moments(numbers[mask][:1], leaves.type)[0])
    _rescue(plan, array, leaves, misfits, rescued)
    return _without(array, misfits).cast(plan.arrow)


def _of_postgres(leaves: pa.Array) -> npt.NDArray[np.int32] | npt.NDArray[np.int64]:
    """Dates or times as PostgreSQL's own numbers, also where ADBC went around the end; null is any number."""
    if pa.types.is_date32(leaves.type):
        days: npt.NDArray[np.int32] = pc.fill_null(leaves.view(pa.int32()), 0).to_numpy() - np.int32(_EPOCH_DAYS)
        return days
    microseconds: npt.NDArray[np.int64] = pc.fill_null(leaves.view(pa.int64()), 0).to_numpy()
    return microseconds - np.int64(_EPOCH_DAYS * _DAY_US)


def _rescue(plan: ColumnPlan, array: pa.Array, leaves: pa.Array, misfits: pa.Array, rescued: Rescued) -> None:
    """Keep the text of each value that is a misfit, and of each array that has one among its elements."""
    if leaves is array:
        texts = pc.replace_with_mask(pa.nulls(len(array), pa.string()), misfits, _texts(leaves.filter(misfits)))
    else:
        rows = _rows_with(array, misfits)
        # One by one: arrays with such an element are rare.
        spelled = [array_text(_texts(value.values).to_pylist()) for value in array.filter(pa.array(rows))]
        texts = pc.replace_with_mask(pa.nulls(len(array), pa.string()), pa.array(rows), pa.array(spelled, pa.string()))
    rescued.add(plan.source, texts)


def _texts(leaves: pa.Array) -> pa.StringArray:
    """How PostgreSQL writes these numbers, dates or times."""
    if pa.types.is_string(leaves.type):
        return leaves
    texts = pa.array(moments(_of_postgres(leaves), leaves.type), pa.string())
    return pc.if_else(leaves.is_valid(), texts, None)


def _without(array: pa.Array, misfits: pa.Array) -> pa.Array:
    """The array with null for each value that is a misfit, or that has one among its elements."""
    if pa.types.is_list(array.type):
        misfits = pa.array(_rows_with(array, misfits))
    return pc.if_else(misfits, pa.scalar(None, array.type), array)


def _rows_with(array: pa.ListArray, misfits: pa.Array) -> npt.NDArray[np.bool_]:
    """Which arrays have a misfit among their elements."""
    rows = np.zeros(len(array), bool)
    rows[pc.list_parent_indices(array).filter(misfits).to_numpy()] = True
    return rows
