"""How much memory there is, and what the loader does where it is not enough."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from model.errors import CheckpointError
from model.moss.geometry import WindowSettings
from streaming.config import EngineConfig, EngineSettings, ModelConfig, MossConfig
from streaming.engine import memory
from streaming.engine.memory import Memory, machine_memory
from streaming.engine.runners.loader import load_runner, window_of
from streaming.engine.runners.moss import MossRunner
from tests.model.moss.tiny import TINY

MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB\n"


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, Memory(16_384_000_000, 8_192_000_000)),
        ("max\n", Memory(16_384_000_000, 8_192_000_000)),
        ("9000000000\n", Memory(9_000_000_000, 8_192_000_000)),
        ("1000000000\n", Memory(1_000_000_000, 1_000_000_000)),
    ],
)
def test_a_container_has_no_more_than_its_limit(tmp_path: Path, limit: str | None, expected: Memory) -> None:
    """The machine's numbers, bounded by the control group's."""
    (tmp_path / "meminfo").write_text(MEMINFO)
    if limit is not None:
        (tmp_path / "max").write_text(limit)
    assert machine_memory(tmp_path / "meminfo", tmp_path / "max") == expected


def test_where_there_is_no_such_file_it_is_unknown(tmp_path: Path) -> None:
    """Another system, or a file that says something else."""
    assert machine_memory(tmp_path / "none", tmp_path / "none") is None
    (tmp_path / "meminfo").write_text("nothing of that")
    assert machine_memory(tmp_path / "meminfo", tmp_path / "none") is None


def load(n_slots: int = 2, moss: MossConfig | None = None) -> MossRunner:
    """The tiny checkpoint by the engine's way."""
    runner = load_runner(
        EngineSettings(
            model=ModelConfig(name=str(TINY), dtype="float32", device="cpu"),
            engine=EngineConfig(n_slots=n_slots),
            moss=moss or MossConfig(),
        )
    )
    assert isinstance(runner, MossRunner)
    return runner


@pytest.mark.parametrize(
    ("there", "said"),
    [(Memory(10**9, 10**9), logging.INFO), (Memory(10**12, 10**6), logging.WARNING), (None, logging.WARNING)],
)
def test_the_loader_says_how_it_fits(
    there: Memory | None,
    said: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Enough; not at the moment; nobody knows."""
    monkeypatch.setattr(memory, "memory_of", lambda _device: there)
    with caplog.at_level(logging.INFO, "streaming.engine.memory"):
        load()
    assert [record.levelno for record in caplog.records] == [said]


def test_the_loader_refuses_what_the_machine_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a weight is read; with needed, available and what to lower."""
    monkeypatch.setattr(memory, "memory_of", lambda _device: Memory(10**9, 10**9))
    with pytest.raises(CheckpointError, match=r"1\.00 GB are available on this machine.*engine\.n_slots to"):
        load(n_slots=2000)


def test_the_window_follows_the_section() -> None:
    """Seconds become whole blocks, and every setting arrives."""
    moss = MossConfig(
        window_s=13.0,
        evict_blocks=2,
        markers="restart",
        prefix="stays",
        max_position=4096,
        scratch_tokens=700,
        answer_tokens=64,
    )
    window = window_of(moss)
    assert (window.n_blocks, window.evict_blocks, window.scratch_tokens) == (4, 2, 700)
    assert (window.markers, window.prefix, window.max_position) == ("restart", "stays", 4096)
    assert load(moss=moss).capabilities.max_window_s == 16.0
    assert window_of(MossConfig()) == WindowSettings()


def test_memory_of_this_machine_is_plausible() -> None:
    """Whatever it is, there is some, and not more than all of it."""
    found = memory.memory_of(torch.device("cpu"))
    if memory.MEMINFO.exists():
        assert found is not None
        assert 0 < found.available <= found.total
