"""The streams benchmark runs where there is no GPU, and says so."""

from __future__ import annotations

import json

import pytest
import torch

from bench.moss_gpu import lags_of, main, shapes_of
from model.moss.checkpoint import memory_need
from tests.model.moss.tiny import TINY


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The program on a CPU."""
    monkeypatch.setattr("sys.argv", ["moss_gpu", "--device", "cpu", *arguments])
    return main()


@pytest.mark.slow
@pytest.mark.parametrize("what", [["--random", "tiny"], [str(TINY)]])
def test_a_row_per_number_of_streams(
    what: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the parts of a tick that make it up; nothing claims to be a GPU."""
    options = ["--streams", "1", "3", "--ticks", "2", "--tokens", "4", "--window", "8", "--dtype", "float32"]
    assert run(monkeypatch, *what, *options) == 0
    out = capsys.readouterr().out
    assert "This is a CPU" in out
    report = json.loads(out.splitlines()[-1])
    assert report["is_gpu"] is False
    assert [row["n_streams"] for row in report["rows"]] == [1, 3]
    for row in report["rows"]:
        parts = [row[f"{part}_ms"] for part in ("encode", "prefill", "decode")]
        assert all(part > 0 for part in parts)
        assert row["other_ms"] >= 0
        assert row["peak_bytes"] is None


def test_large_weights_are_not_tried_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2 and a line that says what runs."""
    assert run(monkeypatch, "--random", "4b") == 2
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_its_shapes_are_the_official_ones() -> None:
    """10.45 and 18.10 GB."""
    sizes = [memory_need(shapes_of(size), torch.bfloat16).weight_bytes / 1e9 for size in ("4b", "8b")]
    assert [round(size, 2) for size in sizes] == [10.45, 18.10]


def test_a_late_tick_delays_the_next() -> None:
    """Audio waits for no one: what one tick takes too long is added to those behind it."""
    assert lags_of([0.1, 0.1]) == pytest.approx([0.1, 0.1])
    assert lags_of([0.84, 0.1, 0.1]) == pytest.approx([0.84, 0.3, 0.1])
    assert lags_of([0.74] * 3) == pytest.approx([0.74, 0.84, 0.94])
