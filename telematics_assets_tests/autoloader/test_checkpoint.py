"""The checkpoint: published once, never changed, small for ever, honest about every file that is damaged or gone."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telematics_assets.autoloader.checkpoint import (
    FANOUT,
    FORMAT,
    LEDGER_SCHEMA,
    BatchCommit,
    Checkpoint,
    FileResult,
    Metadata,
    Plan,
    Result,
)
from telematics_assets.catalog import Column, FileStream, TableContract
from telematics_assets.errors import CheckpointCorruptError, CheckpointTooNewError, FileMissingError, TableMovedError
from telematics_assets.testing import MemoryEngine, parquet_bytes
from telematics_assets.volumes.base import FileEntry, Volume
from telematics_assets.volumes.local import LocalVolume
from telematics_assets.volumes.memory import MemoryVolume

ROOT = "_checkpoints/stream"
FOLDERS = ("metadata", "offsets", "results", "commits", "ledger")
IDENTITY = Metadata("stream-id", "table-id")
EXISTING = pl.DataFrame({"path": ["f/first"], "size": [1], "modified_ns": [10]})

Row = tuple[int | None, int, str, str | None, int, int, int]
Decision = tuple[str, str]


class Model:
    """What a ledger must say, as a dict."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.superseded: dict[tuple[str, int], Row] = {}
        self.batches = 0

    def decide(self, batch: int, decisions: list[Decision]) -> None:
        for path, state in decisions:
            if state != "LEFT":
                size, modified = facts(batch, path)
                older = self.rows.get(path)
                if older is not None and older[2] == "INGESTED":
                    self.superseded[path, older[5]] = older
                self.rows[path] = (size, modified, state, reason(state), rows(state), batch, batch + 1)


def facts(batch: int, path: str) -> tuple[int, int]:
    return 100 * batch + len(path), 10**18 + batch


def reason(state: str) -> str | None:
    return None if state == "INGESTED" else f"because {state}"


def rows(state: str) -> int:
    return 7 if state == "INGESTED" else 0


def run(checkpoint: Checkpoint, batch: int, decisions: list[Decision], *, compact: bool = True) -> None:
    """One batch from plan to commit."""
    files = tuple(FileEntry(path, *facts(batch, path), "tag") for path, _ in decisions)
    checkpoint.publish_plan(Plan(batch, "planner", files))
    results = tuple(FileResult(path, state, reason(state), rows(state)) for path, state in decisions)
    checkpoint.publish_result(Result(batch, "lost", (), (), ()))
    checkpoint.publish_result(Result(batch, "won", results, (), (("a", "STRING"),)))
    checkpoint.publish_commit(BatchCommit(batch, "won", batch + 1))
    if compact:
        checkpoint.compact(IDENTITY)


def as_dict(ledger: pl.DataFrame) -> dict[str, Row]:
    assert dict(ledger.schema) == LEDGER_SCHEMA
    found = {row[0]: row[1:8] for row in ledger.iter_rows()}
    assert len(found) == ledger.height, "one row per path"
    return found


def superseded(checkpoint: Checkpoint, metadata: Metadata) -> dict[tuple[str, int], Row]:
    frame = checkpoint.versions(metadata)[1]
    assert dict(frame.schema) == LEDGER_SCHEMA
    found = {(row[0], row[6]): row[1:8] for row in frame.iter_rows()}
    assert len(found) == frame.height, "one row per version"
    return found


def filled(batches: int, volume: Volume | None = None) -> tuple[Volume, Model]:
    volume = volume or MemoryVolume()
    checkpoint = Checkpoint(volume, "stream")
    checkpoint.begin(IDENTITY)
    model = Model()
    for batch in range(batches):
        decisions = [(f"f/{batch}", "INGESTED"), (f"f/{batch % 5}-again", "SKIPPED_CORRUPTED")]
        run(checkpoint, batch, decisions)
        model.decide(batch, decisions)
    return volume, model


def number(batch: int) -> str:
    return f"{batch:020d}"


class Watched(MemoryVolume):
    """A Volume that calls back before every operation on a checkpoint."""

    def __init__(self, before: Callable[[str, str], None]) -> None:
        super().__init__()
        self.before: Callable[[str, str], None] | None = before

    def copy_of(self, other: MemoryVolume) -> Watched:
        for folder in FOLDERS:
            for name in other.names(f"{ROOT}/{folder}"):
                self.put(f"{ROOT}/{folder}/{name}", other.read(f"{ROOT}/{folder}/{name}"))
        return self

    def _tell(self, operation: str, path: str) -> None:
        callback, self.before = self.before, None
        if callback is not None:
            callback(operation, path)
            self.before = self.before or callback

    def names(self, folder: str) -> list[str]:
        self._tell("names", folder)
        return super().names(folder)

    def read(self, path: str) -> bytes:
        self._tell("read", path)
        return super().read(path)

    def create(self, path: str, data: bytes) -> bool:
        self._tell("create", path)
        return super().create(path, data)

    def upload(self, path: str, source: BinaryIO, *, modified_ns: int | None = None) -> bool:
        raise AssertionError("a checkpoint publishes by create alone")

    def delete(self, path: str) -> None:
        self._tell("delete", path)
        super().delete(path)


class Killed(BaseException):
    """The process ended here."""


def killer(after: int) -> Callable[[str, str], None]:
    left = [after]

    def before(operation: str, path: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    return before


# -- round trips and write-if-absent -----------------------------------------------------------------------------------


def test_a_stream_that_never_began_has_nothing() -> None:
    checkpoint = Checkpoint(MemoryVolume(), "stream")
    assert checkpoint.location == ROOT
    assert checkpoint.metadata() is None
    assert checkpoint.plan(0) is None
    assert checkpoint.last_commit(IDENTITY) is None
    assert as_dict(checkpoint.ledger(IDENTITY)) == as_dict(checkpoint.no_files()) == {}
    assert checkpoint.next_free_batch() == 0
    with pytest.raises(FileMissingError):
        checkpoint.result(0, "a")


def test_what_is_published_is_read_back_equal_by_another_process(tmp_path: Path) -> None:
    volume = LocalVolume(tmp_path, "/Volumes/a/b/c")
    odd = "sp ace/100%#\"q'\n\t\\/Zürich-🚗"
    metadata = Metadata("stream-id", "table-id", 3, 9)
    plan = Plan(3, "planner", (FileEntry(odd, 2**40, 10**18 + 1, "tag"), FileEntry("plain", 0, -5, None)))
    files = (FileResult(odd, "INGESTED", None, 5, 2, 1), FileResult("plain", "SKIPPED_CORRUPTED", "why\nnot"))
    result = Result(3, "attempt", files, (("new", "BIGINT"),), (("old", "STRING"), ("new", "BIGINT")))
    commit = BatchCommit(3, "attempt", 17)

    writer, reader = Checkpoint(volume, "stream"), Checkpoint(volume, "stream")
    assert writer.begin(metadata) == metadata
    assert writer.publish_plan(plan) == plan
    writer.publish_result(result)
    writer.publish_commit(commit)

    assert reader.metadata() == metadata
    assert reader.plan(3) == plan
    assert reader.plan(3).digest == plan.digest  # type: ignore[union-attr]
    assert reader.result(3, "attempt") == result
    assert reader.last_commit(metadata) == commit
    assert as_dict(reader.ledger(metadata)) == {
        odd: (2**40, 10**18 + 1, "INGESTED", None, 5, 3, 17),
        "plain": (0, -5, "SKIPPED_CORRUPTED", "why\nnot", 0, 3, 17),
    }
    assert reader.next_free_batch() == 4


def test_a_digest_tells_plans_apart() -> None:
    plan = Plan(1, "planner", (FileEntry("a", 1, 2, "3"), FileEntry("b", 1, 2, "3")))
    others = [
        replace(plan, batch_id=2),
        replace(plan, planner="other"),
        replace(plan, files=plan.files[:1]),
        replace(plan, files=plan.files[::-1]),
        *(
            replace(plan, files=(replace(plan.files[0], **change), plan.files[1]))
            for change in ({"path": "c"}, {"size": 2}, {"modified_ns": 3}, {"etag": None})
        ),
    ]
    assert len({plan.digest, *(other.digest for other in others)}) == len(others) + 1


def test_nothing_published_is_ever_replaced() -> None:
    checkpoint = Checkpoint(MemoryVolume(), "stream")
    first = checkpoint.begin(IDENTITY)
    assert checkpoint.begin(Metadata("other", "other")) == first == checkpoint.metadata()
    plan = Plan(0, "first", (FileEntry("a", 1, 2, None),))
    assert checkpoint.publish_plan(plan) == plan
    assert checkpoint.publish_plan(Plan(0, "second", ())) == plan == checkpoint.plan(0)
    checkpoint.publish_commit(BatchCommit(0, "first", 1))
    checkpoint.publish_commit(BatchCommit(0, "second", 2))
    assert checkpoint.last_commit(IDENTITY) == BatchCommit(0, "first", 1)


def test_of_eight_planners_all_follow_one_plan(tmp_path: Path) -> None:
    volume = LocalVolume(tmp_path, "/Volumes/a/b/c")
    for batch in range(5):
        start = threading.Barrier(8)
        followed: list[Plan] = []

        def plan(plan: Plan, start: threading.Barrier = start, followed: list[Plan] = followed) -> None:
            start.wait()
            followed.append(Checkpoint(volume, "stream").publish_plan(plan))

        threads = [threading.Thread(target=plan, args=(Plan(batch, f"planner{n}", ()),)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(followed) == 8
        assert len({one.digest for one in followed}) == 1


# -- the ledger --------------------------------------------------------------------------------------------------------

DECISIONS = st.lists(
    st.tuples(
        st.sampled_from([f"f/{n}" for n in range(12)]),
        st.sampled_from(["INGESTED", "SKIPPED_CORRUPTED", "SKIPPED_MISSING", "LEFT"]),
    ),
    max_size=5,
    unique_by=lambda decision: decision[0],
)


@given(
    st.lists(st.tuples(DECISIONS, st.booleans(), st.sampled_from("ABC"), st.integers(0, 40)), max_size=40),
    st.sampled_from([0, 5]),
)
@settings(max_examples=60)
def test_the_ledger_equals_a_dict_whoever_compacts_and_wherever_one_is_killed(
    history: list[tuple[list[Decision], bool, str, int]], first: int
) -> None:
    """A and B are two processes with caches of their own; C is a process that is killed while it compacts."""
    metadata = replace(IDENTITY, first_batch=first)
    volume = Watched(lambda operation, path: None)
    processes = {name: Checkpoint(volume, "stream") for name in "AB"}
    processes["A"].begin(metadata)
    model = Model()
    for batch, (decisions, compacts, who, patience) in enumerate(history, first):
        process = processes.get(who, processes["A"])
        run(process, batch, decisions, compact=False)
        model.decide(batch, decisions)
        if who == "C":
            volume.before = killer(patience)
            with contextlib.suppress(Killed):
                Checkpoint(volume, "stream").compact(metadata)
            volume.before = None
        elif compacts:
            process.compact(metadata)
        assert as_dict(process.ledger(metadata)) == model.rows
        assert superseded(process, metadata) == model.superseded
    last = None if not history else BatchCommit(first + len(history) - 1, "won", first + len(history))
    for reader in (*processes.values(), Checkpoint(volume, "stream")):
        assert reader.last_commit(metadata) == last
        assert as_dict(reader.ledger(metadata)) == model.rows
        assert superseded(reader, metadata) == model.superseded


def test_files_that_were_there_first_are_known_until_a_batch_decides_them() -> None:
    volume = MemoryVolume()
    existing = pl.DataFrame({"path": ["f/a", "f/b"], "size": [1, 2], "modified_ns": [10, 20], "etag": ["x", None]})
    Checkpoint(volume, "stream").record_existing(existing)
    checkpoint = Checkpoint(volume, "stream")
    checkpoint.record_existing(existing.head(0))
    assert checkpoint.metadata() is None
    checkpoint.begin(IDENTITY)
    reason = "it was there before the stream began"
    known: dict[str, Any] = {
        path: (size, at, "SKIPPED_EXISTING", reason, None, None, None) for path, size, at, _ in existing.rows()
    }
    assert as_dict(checkpoint.ledger(IDENTITY)) == known, "the first record stays"
    model = Model()
    for batch in range(3 * FANOUT):
        decisions = [(f"f/{batch}", "INGESTED")] + [("f/b", "INGESTED")] * (batch == 1)
        run(checkpoint, batch, decisions)
        model.decide(batch, decisions)
        for reader in (checkpoint, Checkpoint(volume, "stream")):
            assert as_dict(reader.ledger(IDENTITY)) == known | model.rows
            assert superseded(reader, IDENTITY) == {}
    checkpoint.forget()
    assert volume.names(f"{ROOT}/ledger") == []


def test_after_many_batches_every_folder_stays_small_and_nothing_is_forgotten() -> None:
    volume, model = filled(0)
    checkpoint = Checkpoint(volume, "stream")
    peak = dict.fromkeys(FOLDERS, 0)
    total = 700
    for batch in range(total):
        decisions = [(f"f/{batch}", "INGESTED"), (f"f/{batch % 9}", "SKIPPED_CORRUPTED")]
        run(checkpoint, batch, decisions)
        model.decide(batch, decisions)
        for folder in FOLDERS:
            peak[folder] = max(peak[folder], len(volume.names(f"{ROOT}/{folder}")))
    tiers = 3  # 8 ** 3 < 700 < 8 ** 4
    assert peak["metadata"] == 1
    assert peak["ledger"] <= tiers * (FANOUT - 1) + 1
    assert peak["offsets"] <= FANOUT + 1
    assert peak["commits"] <= FANOUT + 1
    assert peak["results"] <= 2 * (FANOUT + 1)  # two attempts per batch here
    assert as_dict(checkpoint.ledger(IDENTITY)) == as_dict(Checkpoint(volume, "stream").ledger(IDENTITY)) == model.rows


def test_a_batch_costs_what_it_adds() -> None:
    """Reading goes on from the cached ledger: old segments are not read again."""
    volume = Watched(lambda operation, path: None).copy_of(filled(200)[0])  # type: ignore[arg-type]
    checkpoint = Checkpoint(volume, "stream")
    checkpoint.ledger(IDENTITY)
    sizes: list[int] = []
    covered: list[int] = []

    def before(operation: str, path: str) -> None:
        if operation == "read" and "/ledger/" in path:
            a, b = path.rsplit("/", 1)[1].split("-")
            covered.append(int(b) - int(a) + 1)

    volume.before = before
    for batch in range(200, 248):
        run(checkpoint, batch, [(f"f/{batch}", "INGESTED")])
        covered.clear()
        checkpoint.ledger(IDENTITY)
        sizes.append(sum(covered))
    # Per 48 batches at most 48 of them from small segments, and at most one merge of 64.
    assert sum(sizes) <= 48 + 64
    assert as_dict(checkpoint.ledger(IDENTITY)) == as_dict(Checkpoint(volume, "stream").ledger(IDENTITY))


def test_a_cached_ledger_is_not_shown_for_a_stream_that_began_anew() -> None:
    volume = MemoryVolume()
    sensor, loader = Checkpoint(volume, "stream"), Checkpoint(volume, "stream")
    loader.begin(IDENTITY)
    run(loader, 0, [("f/old", "INGESTED")])
    assert list(as_dict(sensor.ledger(IDENTITY))) == ["f/old"]
    loader.forget()
    anew = loader.begin(Metadata("another", "another"))
    run(loader, 0, [("f/new", "INGESTED")])
    assert list(as_dict(sensor.ledger(anew))) == ["f/new"]


@pytest.mark.parametrize("batches", [FANOUT, 2 * FANOUT, FANOUT * FANOUT, FANOUT * FANOUT + FANOUT])
def test_two_loaders_compact_at_once_at_every_step(batches: int) -> None:
    """At each operation of one loader's compaction the other one compacts completely, and goes on by a few batches."""
    base = MemoryVolume()
    checkpoint = Checkpoint(base, "stream")
    checkpoint.begin(IDENTITY)
    for batch in range(batches):
        run(checkpoint, batch, [(f"f/{batch}", "INGESTED")], compact=batch + 1 < batches)
    step, interrupted = 0, True
    while interrupted:
        volume = Watched(lambda operation, path: None).copy_of(base)
        others: list[int] = []
        left = [step]

        def before(
            operation: str, path: str, volume: Watched = volume, others: list[int] = others, left: list[int] = left
        ) -> None:
            left[0] -= 1
            if left[0] == -1:
                other = Checkpoint(volume, "stream")
                other.compact(IDENTITY)
                others.extend(range(batches, batches + FANOUT + 1))
                for batch in others:
                    run(other, batch, [(f"f/{batch}", "INGESTED")])

        volume.before = before
        Checkpoint(volume, "stream").compact(IDENTITY)
        volume.before = None
        reader = Checkpoint(volume, "stream")
        total = batches + len(others)
        assert set(as_dict(reader.ledger(IDENTITY))) == {f"f/{batch}" for batch in range(total)}, f"step {step}"
        assert reader.last_commit(IDENTITY) == BatchCommit(total - 1, "won", total)
        interrupted = bool(others)
        step += 1
    assert step > 10


def test_readers_beside_a_busy_loader_always_see_a_ledger_that_once_was(tmp_path: Path) -> None:
    volume = LocalVolume(tmp_path, "/Volumes/a/b/c")
    loader = Checkpoint(volume, "stream")
    loader.begin(IDENTITY)
    committed = [0]
    failures: list[Exception] = []
    stop = threading.Event()

    def read() -> None:
        cached = Checkpoint(volume, "stream")
        try:
            while not stop.is_set():
                for reader in (cached, Checkpoint(volume, "stream")):
                    before = committed[0]
                    known = set(as_dict(reader.ledger(IDENTITY)))
                    assert known == {f"f/{n}" for n in range(len(known))}
                    assert before <= len(known) <= committed[0] + 1
        except Exception as error:  # noqa: BLE001 - shown by the main thread
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in readers:
        thread.start()
    try:
        for batch in range(80):
            run(loader, batch, [(f"f/{batch}", "INGESTED")])
            committed[0] = batch + 1
    finally:
        stop.set()
        for thread in readers:
            thread.join()
    assert failures == []


# -- new generations ---------------------------------------------------------------------------------------------------


def test_a_rebuilt_ledger_begins_a_generation_that_knows_its_files() -> None:
    volume, _ = filled(12)
    checkpoint = Checkpoint(volume, "stream")
    checkpoint.ledger(IDENTITY)
    batch = checkpoint.next_free_batch()
    assert batch == 12
    kept = ("f/kept", None, 5_000, "INGESTED", None, 3, batch, 40, None, None)
    files = pl.DataFrame([kept], schema=LEDGER_SCHEMA, orient="row")
    anew = Metadata("anew", "table-id", batch, 40)
    checkpoint.begin_from(anew, files, BatchCommit(batch, "rebuilt", 40))
    for reader in (checkpoint, Checkpoint(volume, "stream")):
        assert reader.metadata() == anew
        assert reader.last_commit(anew) == BatchCommit(batch, "rebuilt", 40)
        assert as_dict(reader.ledger(anew)) == {"f/kept": (None, 5_000, "INGESTED", None, 3, batch, 40)}
    for n in range(batch + 1, batch + 30):
        checkpoint.publish_plan(Plan(n, "p", (FileEntry(f"f/{n}", 1, 2, None),)))
        checkpoint.publish_result(Result(n, "a", (FileResult(f"f/{n}", "INGESTED", None, 1),), (), ()))
        checkpoint.publish_commit(BatchCommit(n, "a", 40 + n))
        checkpoint.compact(anew)
    known = as_dict(Checkpoint(volume, "stream").ledger(anew))
    assert set(known) == {"f/kept", *(f"f/{n}" for n in range(batch + 1, batch + 30))}
    assert all(int(name.split("-")[0]) >= batch for name in volume.names(f"{ROOT}/ledger")), "old segments are deleted"


def test_a_forgotten_checkpoint_is_gone() -> None:
    volume, _ = filled(12)
    Checkpoint(volume, "stream").forget()
    assert [volume.names(f"{ROOT}/{folder}") for folder in FOLDERS] == [[], [], [], [], []]


def test_what_a_broken_off_reset_leaves_behind_means_nothing() -> None:
    base, _ = filled(12)
    Checkpoint(base, "stream").publish_plan(Plan(12, "pending", ()))
    Checkpoint(base, "stream").record_existing(EXISTING)
    patience = 0
    finished = False
    while not finished:
        volume = Watched(lambda operation, path: None).copy_of(base)  # type: ignore[arg-type]
        volume.before = killer(patience)
        with contextlib.suppress(Killed):
            Checkpoint(volume, "stream").forget()
            finished = True
        volume.before = None
        patience += 1
        checkpoint = Checkpoint(volume, "stream")
        if checkpoint.metadata() is None:
            anew = checkpoint.begin(Metadata("anew", "anew", checkpoint.next_free_batch()))
            assert checkpoint.last_commit(anew) is None
            assert checkpoint.plan(anew.first_batch) is None
            assert as_dict(checkpoint.ledger(anew)) == {}
    assert patience > 10


# -- damage ------------------------------------------------------------------------------------------------------------


def read_all(checkpoint: Checkpoint) -> None:
    """Everything that a load, a look and a recovery read."""
    metadata = checkpoint.metadata()
    assert metadata is not None
    last = checkpoint.last_commit(metadata)
    assert last is not None
    checkpoint.ledger(metadata)
    assert checkpoint.plan(last.batch_id + 1) is not None
    checkpoint.result(last.batch_id, last.attempt)


#: Each kind of file, of a checkpoint with a segment, batches behind it and a pending plan.
DAMAGEABLE = [
    "metadata/0",
    f"offsets/{number(11)}",
    f"offsets/{number(12)}",
    f"results/{number(10)}.won",
    f"results/{number(11)}.won",
    f"commits/{number(10)}",
    f"commits/{number(11)}",
    f"ledger/{number(0)}-{number(7)}",
    "ledger/existing",
]


@pytest.fixture
def damaged() -> MemoryVolume:
    volume, _ = filled(12)
    Checkpoint(volume, "stream").publish_plan(Plan(12, "pending", ()))
    Checkpoint(volume, "stream").record_existing(EXISTING)
    read_all(Checkpoint(volume, "stream"))
    assert isinstance(volume, MemoryVolume)
    return volume


@pytest.mark.parametrize("name", DAMAGEABLE)
def test_a_file_cut_short_anywhere_is_named(damaged: MemoryVolume, name: str) -> None:
    whole = damaged.read(f"{ROOT}/{name}")
    for length in {0, 1, 4, *range(0, len(whole), 7), len(whole) - 1}:
        damaged.put(f"{ROOT}/{name}", whole[:length])
        with pytest.raises(CheckpointCorruptError) as refused:
            read_all(Checkpoint(damaged, "stream"))
        assert f"{ROOT}/{name}" in str(refused.value)
        assert "telematics reset stream --rebuild" in str(refused.value)
    damaged.put(f"{ROOT}/{name}", whole)
    read_all(Checkpoint(damaged, "stream"))


@pytest.mark.parametrize("name", DAMAGEABLE)
@pytest.mark.parametrize(
    "content", [b"\0" * 64, b"\xff\xfe\xfd", b"[]", b"null", b"{}", b'"text"', b'{"kind":"other"}']
)
def test_a_file_that_is_something_else_is_named(damaged: MemoryVolume, name: str, content: bytes) -> None:
    damaged.put(f"{ROOT}/{name}", content)
    with pytest.raises(CheckpointCorruptError) as refused:
        read_all(Checkpoint(damaged, "stream"))
    assert f"{ROOT}/{name}" in str(refused.value)


@pytest.mark.parametrize("name", DAMAGEABLE)
def test_a_newer_format_is_refused_and_nothing_is_changed(damaged: MemoryVolume, name: str) -> None:
    path = f"{ROOT}/{name}"
    if name.startswith("ledger"):
        buffer = io.BytesIO()
        other = pl.DataFrame({"path": ["f/0"], "unheard_of": [1]})
        other.write_parquet(buffer, metadata={"telematics.format": str(FORMAT + 1)})
        damaged.put(path, buffer.getvalue())
    else:
        document = json.loads(damaged.read(path))
        damaged.put(path, json.dumps({**document, "format": FORMAT + 1, "unheard_of": 1}).encode())
    before = {folder: damaged.names(f"{ROOT}/{folder}") for folder in FOLDERS}
    with pytest.raises(CheckpointTooNewError, match="Upgrade the package") as refused:
        read_all(Checkpoint(damaged, "stream"))
    assert path in str(refused.value)
    assert {folder: damaged.names(f"{ROOT}/{folder}") for folder in FOLDERS} == before


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        (f"commits/{number(9)}", f"commits/{number(9)}"),
        (f"commits/{number(10)}", f"commits/{number(10)}"),
        (f"results/{number(10)}.won", f"results/{number(10)}.won"),
        (f"offsets/{number(10)}", f"offsets/{number(10)}"),
        (f"ledger/{number(0)}-{number(7)}", f"commits/{number(0)}"),
    ],
)
def test_a_file_that_is_missing_in_the_middle_is_named(damaged: MemoryVolume, lost: str, named: str) -> None:
    damaged.delete(f"{ROOT}/{lost}")
    with pytest.raises(CheckpointCorruptError) as refused:
        read_all(Checkpoint(damaged, "stream"))
    assert named in str(refused.value)


def test_a_lost_newest_commit_leaves_the_batch_pending() -> None:
    volume, _ = filled(12)
    volume.delete(f"{ROOT}/commits/{number(11)}")
    checkpoint = Checkpoint(volume, "stream")
    assert checkpoint.last_commit(IDENTITY) == BatchCommit(10, "won", 11)
    assert checkpoint.plan(11) is not None


@pytest.mark.parametrize("batches", [FANOUT, FANOUT * FANOUT])
def test_a_lost_newest_commit_that_the_ledger_covers_is_refused(batches: int) -> None:
    volume, _ = filled(batches)
    assert volume.names(f"{ROOT}/commits") == [number(batches - 1)]
    volume.delete(f"{ROOT}/commits/{number(batches - 1)}")
    with pytest.raises(CheckpointCorruptError, match="commits"):
        Checkpoint(volume, "stream").last_commit(IDENTITY)


def test_a_cached_ledger_does_not_hide_a_rolled_back_checkpoint() -> None:
    volume, _ = filled(3)
    checkpoint = Checkpoint(volume, "stream")
    assert checkpoint.ledger(IDENTITY).height == 6
    volume.delete(f"{ROOT}/commits/{number(2)}")
    assert set(as_dict(checkpoint.ledger(IDENTITY))) == {"f/0", "f/1", "f/0-again", "f/1-again"}


def test_strange_files_beside_the_checkpoints_own_change_nothing(damaged: MemoryVolume) -> None:
    for folder in FOLDERS:
        for name in (".0123.tmp", "README", "x-y", f"{number(3)}.bak"):
            damaged.put(f"{ROOT}/{folder}/{name}", b"not ours")
    read_all(Checkpoint(damaged, "stream"))
    Checkpoint(damaged, "stream").compact(IDENTITY)


def test_after_a_broken_off_reset_a_load_takes_everything_or_says_what_to_do() -> None:
    contract = TableContract("One row per point.", (Column("n", "BIGINT", "A number."),))
    stream = FileStream("stream", "parquet", "in", "points", contract)
    outcomes: dict[str, int] = {"loaded": 0, "refused": 0}
    patience, finished = 0, False
    while not finished:
        engine = MemoryEngine()
        for file in range(FANOUT + 2):
            engine.volume.put(f"in/{file}.parquet", parquet_bytes({"n": [file]}))
            engine.ingest(stream)
        table = engine.names.bronze("points")
        engine.lakehouse.drop(table)
        dying = Watched(killer(patience)).copy_of(engine.volume)
        with contextlib.suppress(Killed):
            Checkpoint(dying, "stream").forget()
            finished = True
        for folder in FOLDERS:
            for name in engine.volume.names(f"{ROOT}/{folder}"):
                if dying.stat(f"{ROOT}/{folder}/{name}") is None:
                    engine.volume.delete(f"{ROOT}/{folder}/{name}")
        patience += 1
        engine.volume.put("in/0.parquet", parquet_bytes({"n": [100, 101]}))
        try:
            engine.ingest(stream)
            outcomes["loaded"] += 1
        except TableMovedError:
            outcomes["refused"] += 1
            engine.reset(stream, drop_table=True)
            engine.ingest(stream)
        assert sorted(engine.read(table, ["n"]).column("n").to_pylist()) == [*range(1, FANOUT + 2), 100, 101]
    assert min(outcomes.values()) > 1, outcomes
