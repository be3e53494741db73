"""Keys that are there more than once are found, in as many passes as it takes."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from telematics_assets.catalog import Names
from telematics_assets.lakehouse import repeated as module
from telematics_assets.lakehouse.repeated import repeated
from telematics_assets.testing import MemoryLakehouse
from telematics_assets.testing.memory import MemoryTable


def table_of(*parts: pa.Table) -> MemoryTable:
    """A table whose rows came in several appends."""
    table = MemoryLakehouse().create(Names().bronze("t"), parts[0].schema, "", {})
    for number, part in enumerate(parts):
        table.append(part.schema, part.to_batches(), "app", number, {})
    return table


@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from(["a", "A", ""])), max_size=30), st.integers(1, 40))
def test_every_key_that_is_there_twice_is_counted_once(keys: list[tuple[int, str]], pass_rows: int) -> None:
    rows = pa.table({"n": pa.array([n for n, _ in keys], pa.int64()), "t": pa.array([t for _, t in keys], pa.string())})
    expected = {key for key in keys if keys.count(key) > 1}
    found, examples = repeated(table_of(rows), ("n", "t"), pass_rows)
    assert found == len(expected)
    assert set(examples) <= {f"{n}, {t}" for n, t in expected}
    assert len(examples) == min(len(expected), 5)


def test_a_table_without_rows_repeats_nothing() -> None:
    assert repeated(table_of(pa.table({"id": pa.array([], pa.int64())})), ("id",)) == (0, ())


def test_beyond_what_is_compared_every_suspect_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_COMPARED", 10)
    ids = pa.table({"id": list(range(100))})
    assert repeated(table_of(ids, ids), ("id",))[0] == 100
