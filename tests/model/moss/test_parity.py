"""MOSS-Audio computes what the published code computed, offline and streamed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.moss_parity import TOLERANCE, Case, cases, main, offline_errors, streamed_errors
from model.moss import checkpoint
from model.moss.checkpoint import Checkpoint
from tests.model.moss.tiny import REFERENCE, TINY

FOLDERS = [TINY, REFERENCE / "tiny-a", REFERENCE / "tiny-b"]
ALL = [
    pytest.param(folder, case.name, id=f"{folder.name}-{case.name}")
    for folder in FOLDERS
    if folder.is_dir()
    for case in cases(folder)
]
ALL += [
    pytest.param(folder, "", id=folder.name, marks=pytest.mark.skip(reason=f"{folder} is not here"))
    for folder in FOLDERS
    if not folder.is_dir()
]
_loaded: dict[Path, Checkpoint] = {}


def load(folder: Path, name: str) -> tuple[Checkpoint, Case]:
    """A checkpoint in float32, read once, and one of its cases."""
    if folder not in _loaded:
        _loaded[folder] = checkpoint.load(str(folder), torch.float32)
    return _loaded[folder], next(case for case in cases(folder) if case.name == name)


def test_the_committed_reference_is_here() -> None:
    """The reference of our own making never skips."""
    assert len(cases(TINY)) == 2


@pytest.mark.parametrize(("folder", "name"), ALL)
def test_offline_equals_the_published_code(folder: Path, name: str) -> None:
    """Mel, encoder, taps, prompt, logits and greedy tokens of a whole clip."""
    errors = offline_errors(*load(folder, name))
    assert {"encoder", "taps", "prompt", "logits", "greedy"} <= set(errors)
    beyond = {kind: error for kind, error in errors.items() if not error <= TOLERANCE[kind]}
    assert not beyond


@pytest.mark.parametrize(("folder", "name"), ALL)
def test_streaming_equals_the_published_code(folder: Path, name: str) -> None:
    """The same from random pieces, with provisional tails in between and a fork at the end."""
    errors = streamed_errors(*load(folder, name), seed=len(name))
    assert {"encoder", "taps", "prompt", "logits", "greedy"} <= set(errors)
    beyond = {kind: error for kind, error in errors.items() if not error <= TOLERANCE[kind]}
    assert not beyond


@pytest.mark.parametrize(
    ("kind", "error"), [("encoder", 1e-3), ("logits_last32", 1e-2), ("greedy", 1), ("", 0)]
)
def test_the_program_fails_beyond_the_tolerance(
    kind: str,
    error: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """bench/moss_parity.py gives 1 when one stored number is off by more than the tolerance, else 0."""
    for path in TINY.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if kind:
        stored = load_file(tmp_path / "short.safetensors")
        stored[kind].view(-1)[-1] += error
        save_file(stored, tmp_path / "short.safetensors")
    monkeypatch.setattr("sys.argv", ["moss_parity", "--seeds", "1", str(tmp_path)])
    assert main() == (1 if kind else 0)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["ok"] is (not kind)
