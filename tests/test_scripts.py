"""The set-up's script for the demo's recording, without the network."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from scripts import make_demo_recording as script


def test_texts_are_read_from_the_packages_list(tmp_path: Path) -> None:
    """A line a sound; comments are left out, colons in a sentence stay."""
    path = tmp_path / "texts.gz"
    path.write_bytes(gzip.compress(b"; Core: Sounds\n\nfollowme/sorry: I'm sorry: no.\nadded: Added.\n"))
    assert script.read_texts(path) == {"followme/sorry": "I'm sorry: no.", "added": "Added."}


def test_without_apt_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package names are in the message, for those who get them by other means."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(script.RecordingError, match=r"apt-get is missing.*asterisk-core-sounds-en"):
        script.make(tmp_path / "call.wav", tmp_path / "packages")
    assert not (tmp_path / "call.wav").exists()


def test_a_failure_names_the_way_round_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 1, and how to use a recording of one's own."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["make_demo_recording.py", str(tmp_path / "call.wav")])
    assert script.main() == 1
    assert "make demo RECORDING=" in capsys.readouterr().err
