"""A store that fails at one write of the checkpoint after the other, before or after it did what it was asked.

For engines that share our checkpoint.
"""

from __future__ import annotations

import errno
import os
from typing import BinaryIO

import pytest

from telematics_assets.autoloader import checkpoint
from telematics_assets.errors import TelematicsError, VolumeUnavailableError
from telematics_assets.staging import stage
from telematics_assets.volumes.base import FileEntry, Volume
from telematics_assets.volumes.local import translate
from telematics_assets_tests.conformance.platforms import CheckpointPlatform, DeltaPlatform
from telematics_assets_tests.conformance.samples import json_stream, lines

STREAM = json_stream("n", max_files_per_trigger=1)
FILES = 3
#: What a disk says, and whether it may go through later.
SAYINGS = {errno.ENOSPC: True, errno.EDQUOT: True, errno.EIO: True, errno.EROFS: False}


class Refusing:
    """A Volume that refuses one write."""

    def __init__(self, volume: Volume, nth: int, code: int, *, after: bool) -> None:
        self._volume, self._left, self._code, self._after = volume, nth, code, after
        self.refused: str | None = None
        self.location, self.uri = volume.location, volume.uri
        self.scan, self.names, self.stat = volume.scan, volume.names, volume.stat
        self.open, self.read, self.read_unchanged = volume.open, volume.read, volume.read_unchanged

    def create(self, path: str, data: bytes) -> bool:
        self._refuse(path, before=True)
        made = self._volume.create(path, data)
        self._refuse(path, before=False)
        return made

    def upload(self, path: str, source: BinaryIO, *, modified_ns: int | None = None) -> bool:
        self._refuse(path, before=True)
        made = self._volume.upload(path, source, modified_ns=modified_ns)
        self._refuse(path, before=False)
        return made

    def delete(self, path: str) -> None:
        self._refuse(path, before=True)
        self._volume.delete(path)
        self._refuse(path, before=False)

    def remove(self, file: FileEntry) -> bool:
        self._refuse(file.path, before=True)
        gone = self._volume.remove(file)
        self._refuse(file.path, before=False)
        return gone

    def _refuse(self, path: str, *, before: bool) -> None:
        if before == self._after:
            return
        self._left -= 1
        if self._left == 0:
            self.refused = path
            raise translate(OSError(self._code, os.strerror(self._code)), path)


@pytest.mark.parametrize("after", [False, True], ids=["nothing done", "done all the same"])
def test_a_checkpoint_that_can_not_be_written_is_told_and_the_next_load_goes_on(
    checkpoint_platform: CheckpointPlatform, after: bool, monkeypatch: pytest.MonkeyPatch, soak_factor: int
) -> None:
    monkeypatch.setattr(checkpoint, "FANOUT", 2)
    platform = checkpoint_platform
    for number in range(FILES):
        platform.volume_put(f"json/{number}.json", lines(f'{{"n":"{number}"}}'), number)
    codes = list(SAYINGS)
    refused: list[str] = []
    stride = 1 if soak_factor > 1 else platform.stride
    for nth in range(1, 200, stride):
        code = codes[nth % len(codes)]
        platform.restart()
        if platform.engine.look(STREAM).known:
            platform.engine.reset(STREAM, drop_table=True)
        volume = Refusing(platform.volume, nth, code, after=after)
        engine = platform.engine_over(volume)
        said: TelematicsError | None = None
        try:
            engine.ingest(STREAM)
        except TelematicsError as error:
            said = error
        assert said is None or (os.strerror(code) in str(said) and said.transient is SAYINGS[code])
        assert (said is None) == (volume.refused is None)
        if volume.refused is None:
            break
        refused.append(volume.refused.split("/")[2])
        platform.restart().ingest(STREAM)
        assert [row["n"] for row in platform.rows(STREAM, "n")] == [str(number) for number in range(FILES)]
        assert set(platform.states(STREAM).values()) == {"INGESTED"}
        assert platform.engine.ingest(STREAM).batches == ()
    wanted = {"metadata", "offsets", "results", "commits", "ledger"}
    assert wanted <= set(refused) if stride == 1 else wanted & set(refused)


@pytest.mark.parametrize("code", SAYINGS)
@pytest.mark.parametrize("after", [False, True])
def test_a_file_that_can_not_be_staged_is_told_and_staged_later(
    delta_platform: DeltaPlatform, code: int, after: bool
) -> None:
    sources = delta_platform.home / "sources"
    sources.mkdir(parents=True)
    for number in range(3):
        (sources / f"{number}.json").write_bytes(lines(f'{{"n":"{number}"}}'))
    volume = Refusing(delta_platform.volume, 2, code, after=after)
    if SAYINGS[code]:
        with pytest.raises(VolumeUnavailableError, match=os.strerror(code)):
            stage([sources], STREAM, volume)
    else:
        report = stage([sources], STREAM, volume)
        assert [os.strerror(code) in file.reason for file in report.refused] == [True]
    report = stage([sources], STREAM, delta_platform.volume)
    assert ([file.path for file in report.staged], report.refused) == ([f"json/{n}.json" for n in range(3)], ())
    assert delta_platform.engine.ingest(STREAM).rows == 3
