"""Checkpoints by hub id: from the cache, with the network gone or forbidden."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from model.errors import CheckpointError
from model.hf_hub import find
from tests.model.moss.tiny import TINY

ROOT = Path(__file__).resolve().parents[2]
REVISION = "0123456789abcdef0123456789abcdef01234567"


def cached(home: Path, *, with_weights: bool = True) -> Path:
    """A cache as the hub's library lays it out, with our tiny checkpoint as someone/tiny."""
    repo = home / "hub" / "models--someone--tiny"
    snapshot = repo / "snapshots" / REVISION
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(REVISION)
    for file in sorted(TINY.iterdir()):
        if with_weights or file.suffix == ".json":
            shutil.copy(file, repo / "blobs" / file.name)
            (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    return snapshot


def in_a_process(home: Path, name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Find a checkpoint where the hub's settings are read anew; prints its folder and its shapes."""
    code = (
        "import sys; from model.hf_hub import find; from model.moss.checkpoint import config_of, survey;"
        "folder = find(sys.argv[1]); print(folder);"
        "print(survey(folder, config_of(folder)).n_tensors)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, name],
        env={**os.environ, "HF_HOME": str(home), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


OFFLINE = {"HF_HUB_OFFLINE": "1"}
# Nobody listens on that port: what a machine without network sees, only sooner.
UNREACHABLE = {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


@pytest.mark.slow  # a process of its own, which imports the hub's package
@pytest.mark.parametrize("environment", [OFFLINE, UNREACHABLE], ids=["offline", "unreachable"])
def test_what_is_cached_needs_no_network(tmp_path: Path, environment: dict[str, str]) -> None:
    """HF_HUB_OFFLINE, and a hub that cannot be reached: the cached snapshot serves."""
    snapshot = cached(tmp_path)
    found = in_a_process(tmp_path, "someone/tiny", **environment)
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.splitlines()[0]) == snapshot
    assert int(found.stdout.splitlines()[1]) > 0


@pytest.mark.slow  # a process of its own, which imports the hub's package
@pytest.mark.parametrize("environment", [OFFLINE, UNREACHABLE], ids=["offline", "unreachable"])
def test_what_is_not_cached_is_said(tmp_path: Path, environment: dict[str, str]) -> None:
    """By the id; a broken download by the file it lacks."""
    found = in_a_process(tmp_path, "someone/other", **environment)
    assert "CheckpointUnavailable: 'someone/other' is no folder, and the hub does not give it" in found.stderr
    snapshot = cached(tmp_path, with_weights=False)
    found = in_a_process(tmp_path, "someone/tiny", **environment)
    assert f"CheckpointError: {snapshot}: neither model.safetensors.index.json nor" in found.stderr


def test_a_folder_is_itself(tmp_path: Path) -> None:
    """Whatever is in it; a name that is neither is refused before any network."""
    assert find(str(tmp_path)) == tmp_path
    for name in ("nothing", "./no/such", "a/b/c", "../up/there", "/no/such", "some one/thing", ".hidden/x"):
        with pytest.raises(CheckpointError, match="neither a folder nor a hub id OWNER/NAME"):
            find(name)
