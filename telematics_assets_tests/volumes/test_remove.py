"""`Volume.remove`: only the version that is meant goes, also after a process died in the middle of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from telematics_assets.volumes.base import Volume
from telematics_assets.volumes.local import LocalVolume
from telematics_assets.volumes.memory import MemoryVolume

PATH = "json/a.json"


@pytest.fixture(params=["local", "memory"])
def volume(request: pytest.FixtureRequest, tmp_path: Path) -> Volume:
    """An empty Volume."""
    return LocalVolume(tmp_path, "/Volumes/a/b/c") if request.param == "local" else MemoryVolume()


def test_the_version_that_is_meant_goes_once(volume: Volume) -> None:
    volume.create(PATH, b"one")
    file = volume.stat(PATH)
    assert file is not None
    assert volume.remove(file)
    assert volume.names("json") == []
    assert not volume.remove(file)


def test_another_version_stays_whatever_its_size(volume: Volume) -> None:
    volume.create(PATH, b"one")
    file = volume.stat(PATH)
    assert file is not None
    volume.delete(PATH)
    volume.create(PATH, b"two")
    assert not volume.remove(file)
    assert volume.read(PATH) == b"two"
    assert volume.names("json") == ["a.json"]


@pytest.mark.parametrize("newer", [None, b"newer"])
@pytest.mark.parametrize("ours", [True, False])
def test_what_a_killed_process_put_aside_is_removed_or_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: bool, newer: bytes | None
) -> None:
    volume = LocalVolume(tmp_path, "/Volumes/a/b/c")
    volume.create(PATH, b"one")
    file = volume.stat(PATH)
    assert file is not None

    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    rename = os.rename

    def replaced_first(source: str, target: str) -> None:
        if not ours:
            (tmp_path / "two").write_bytes(b"two")
            os.replace(tmp_path / "two", source)
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", replaced_first)
        patched.setattr(os, "unlink", die)
        patched.setattr(os, "link", die)
        with pytest.raises(Killed):
            volume.remove(file)
    assert volume.stat(PATH) is None
    if newer is not None:
        volume.create(PATH, newer)
    assert volume.remove(file) == ours
    left = newer if newer is not None else None if ours else b"two"
    assert (volume.read(PATH) if volume.stat(PATH) else None) == left
    assert volume.names("json") == ([] if left is None else ["a.json"])
