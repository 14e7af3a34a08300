"""Frames that wait for their stream: their order, their bound, and a disk that takes none."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.server import spool as module
from streaming.server.spool import FRAME_BYTES, MEMORY_BYTES, SEGMENT_BYTES, Received, Spool

MIB = 1024 * 1024
received = st.one_of(st.binary(max_size=3000), st.text(max_size=800))


def drained(spool: Spool) -> list[Received]:
    """Everything that waits."""
    found = []
    while not spool.is_empty:
        found.append(spool.get())
    return found


@given(turns=st.lists(st.tuples(st.lists(received, max_size=6), st.integers(0, 6)), max_size=12))
def test_frames_come_out_as_they_went_in(turns: list[tuple[list[Received], int]]) -> None:
    """In order and whole, text as text, however puts and gets alternate; little stays in memory."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MEMORY_BYTES", 2000)
        patch.setattr(module, "SEGMENT_BYTES", 4000)
        spool = Spool(Path(folder), 100 * MIB)
        put: list[Received] = []
        got: list[Received] = []
        for frames, n_gets in turns:
            for frame in frames:
                spool.put(frame)
                put.append(frame)
                assert spool._n_first <= 2000
            for _ in range(n_gets):
                if not spool.is_empty:
                    got.append(spool.get())
        assert spool.n_bytes >= FRAME_BYTES * (len(put) - len(got))
        assert got + drained(spool) == put
        assert spool.n_bytes == 0
        spool.close()
        assert not list(Path(folder).iterdir())


def test_it_is_full_at_its_bound(tmp_path: Path) -> None:
    """And takes frames again when one was taken."""
    spool = Spool(tmp_path, 2 * MIB)
    n = 0
    while not spool.is_full:
        spool.put(bytes(100_000))
        n += 1
    assert 2 * MIB <= spool.n_bytes < 2 * MIB + 100_000 + FRAME_BYTES
    spool.get()
    assert not spool.is_full
    assert len(drained(spool)) == n - 1


def test_files_go_when_they_were_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour of a stream that is a little too slow does not keep an hour on the disk."""
    files: list[Any] = []
    make = tempfile.TemporaryFile

    def counted(**options: Any) -> Any:
        files.append(make(**options))
        return files[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", counted)
    spool = Spool(tmp_path, 64 * MIB)
    for _ in range(40):
        spool.put(bytes(MIB))
    for _ in range(400):
        spool.put(spool.get())
    assert len(files) > 20
    assert sum(not file.closed for file in files) <= 40 * MIB // SEGMENT_BYTES + 2
    assert MEMORY_BYTES < MIB
    spool.close()
    assert all(file.closed for file in files)


class Full:
    """A file on a disk without room."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        """Fails."""
        raise OSError(errno.ENOSPC, f"No space left for {len(data)} bytes")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("at", ["open", "write"])
def test_a_full_disk_costs_no_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """It is full until what the disk did not take was read, and goes on in order."""
    spool = Spool(tmp_path, 64 * MIB)
    frames = [bytes([n]) * 200_000 for n in range(8)]
    for frame in frames[:5]:
        spool.put(frame)
    make = tempfile.TemporaryFile

    def failing(**options: Any) -> Any:
        if at == "open":
            raise OSError(errno.ENOSPC, "No space left on device")
        return Full(make(**options))

    monkeypatch.setattr(tempfile, "TemporaryFile", failing)
    monkeypatch.setattr(module, "SEGMENT_BYTES", 1)  # the next frame needs a new file
    spool.put(frames[5])
    assert spool.is_full
    assert [spool.get() for _ in range(5)] == frames[:5]
    assert spool.is_full
    assert spool.get() == frames[5]
    assert not spool.is_full
    monkeypatch.setattr(tempfile, "TemporaryFile", make)
    for frame in frames[6:]:
        spool.put(frame)
    assert drained(spool) == frames[6:]
