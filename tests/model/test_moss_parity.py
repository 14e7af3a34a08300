"""MOSS-Audio computes what the published code computed, offline and streamed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.moss_parity import TOLERANCE, Case, cases, offline_errors, streamed_errors
from model.moss import checkpoint
from model.moss.checkpoint import Checkpoint
from tests.model.moss_tiny import REFERENCE, TINY

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


def test_the_program_fails_beyond_the_tolerance(tmp_path: Path) -> None:
    """bench/moss_parity.py exits 1 when one stored number is off by more than the tolerance."""
    from safetensors.torch import load_file, save_file

    for path in TINY.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stored = load_file(tmp_path / "short.safetensors")
    stored["encoder"][3, 5] += 1e-3
    save_file(stored, tmp_path / "short.safetensors")
    command = [sys.executable, "-m", "bench.moss_parity", "--seeds", "1"]
    assert subprocess.run([*command, str(TINY)], capture_output=True, check=False).returncode == 0
    broken = subprocess.run([*command, str(tmp_path)], capture_output=True, check=False)
    assert broken.returncode == 1
    assert b'"ok": false' in broken.stdout
