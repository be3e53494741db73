"""Differences of two sets of keys, in memory and by files."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from telematics_assets.microbatch.keys import Keys, Wanted, differences, marked, parts_of


def gathered(keys: Keys, table: pa.Table) -> Keys:
    for batch in table.to_batches(max_chunksize=7_000):
        keys.add(pa.Table.from_batches([batch]))
    return keys


@pytest.mark.parametrize("parts", [1, 5])
def test_what_one_side_lacks_is_found_in_memory_and_by_files(parts: int) -> None:
    count = 700_000 if parts > 1 else 1_000
    numbers = pa.array(range(count))
    texts = pc.cast(pc.add(numbers, 1), pa.string())
    everything = pa.table({"n": numbers, "t": texts})
    ours = everything.filter(pc.not_equal(numbers, 17))
    theirs = everything.filter(pc.less(numbers, count - 2))
    with Keys(["n", "t"], parts) as left, Keys(["n", "t"], parts) as right:
        gathered(left, ours)
        gathered(right, theirs)
        found = list(differences(left, right))
    only = sorted(row for each in found for row in each.left["n"].to_pylist())
    extra = sorted(row for each in found for row in each.right["n"].to_pylist())
    assert (only, extra) == ([count - 2, count - 1], [17])


def test_marks_tell_rows_apart_that_look_alike() -> None:
    rows = {
        "id": [1, 2, 3, 4, 5, 6],
        "f": [0.0, -0.0, float("nan"), None, 1.0, 1.0],
        "t": ["", "", None, "", "a", None],
        "l": [["a", "b"], ["a", "b"], ["ab"], [], None, ["a", None]],
    }
    table = pa.table(rows)
    marks = {
        tuple(row) for row in zip(*(column.to_pylist() for column in marked(table, ["id"]).columns[1:]), strict=True)
    }
    assert len(marks) == 6
    assert marked(table, ["id"]).equals(marked(table, ["id"]))


def test_wanted_rows_are_picked_out_and_beyond_a_limit_all_are(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Wanted(["n"])
    assert not wanted
    wanted.add(pa.table({"n": [3, 5]}))
    rows = pa.RecordBatch.from_pydict({"n": list(range(10)), "x": list("abcdefghij")})
    assert wanted.among(rows)["n"].to_pylist() == [3, 5]
    monkeypatch.setattr("telematics_assets.microbatch.keys.MOST_WANTED", 2)
    wanted.add(pa.table({"n": [7]}))
    assert wanted.among(rows).num_rows == 10


def test_parts_grow_with_the_rows() -> None:
    assert parts_of(0) == 1
    assert parts_of(2_000_000) == 5
    assert parts_of(10**10) == 256
