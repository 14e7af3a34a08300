"""Recordings with reference words, read from a manifest and joined to one long recording.

A manifest has one JSON object a line: `path` (relative to a root), `text`, and `words`
([{w, start, end}], seconds) where word times are known; a long recording has `utterances`,
each with those fields. Knows nothing of servers or of what is measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients.sources import decode
from streaming.protocol import SAMPLE_RATE_HZ

GAP_S = 1.0  # silence between joined utterances


@dataclass(frozen=True, slots=True)
class RefWord:
    """One word that was said, and when, seconds from the start of its recording."""

    text: str
    start_s: float
    end_s: float
    is_timed: bool = True  # False: the times are its clip's, so that it can be aligned but not timed


@dataclass(frozen=True, slots=True)
class Clip:
    """One line of a manifest that has a text."""

    path: Path
    text: str
    words: tuple[RefWord, ...]
    duration_s: float


@dataclass(frozen=True, slots=True)
class Recording:
    """Audio and what was said in it."""

    audio: NDArray[np.float32]  # [n_samples], 16 kHz mono, -1 to 1
    text: str
    words: tuple[RefWord, ...]

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return len(self.audio) / SAMPLE_RATE_HZ


def load_manifest(manifest: Path, root: Path, path_part: str = "") -> list[Clip]:
    """The clips whose path contains `path_part` and which have a text, in the manifest's order.

    Raises:
        ValueError: a line is no clip, or no clip is left; names the file.
    """
    clips = []
    for line_number, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            if path_part in row["path"] and (row.get("text") or row.get("utterances")):
                clips.append(_clip(row, root))
        except (ValueError, KeyError, TypeError) as exc:
            raise ValueError(f"{manifest}:{line_number}: no clip: {exc!r}") from exc
    if not clips:
        raise ValueError(f"{manifest}: no clip with a text has {path_part!r} in its path")
    return clips


def read_audio(path: Path) -> NDArray[np.float32]:
    """A whole file as 16 kHz mono, [n_samples], exactly the samples a client would send.

    Raises:
        SourceError: PyAV cannot read it.
    """
    samples = np.frombuffer(b"".join(decode(str(path), chunk_ms=1000)), dtype="<i2")
    return (samples / 32768.0).astype(np.float32)


def join(clips: Iterable[Clip], gap_s: float = GAP_S, max_s: float = float("inf")) -> Recording:
    """One recording of `clips`, each followed by `gap_s` seconds of silence, word times shifted.

    Whole clips only: those that would end after `max_s` seconds are left out, save the first.
    """
    gap = np.zeros(round(gap_s * SAMPLE_RATE_HZ), dtype=np.float32)
    pieces: list[NDArray[np.float32]] = []
    texts: list[str] = []
    words: list[RefWord] = []
    n_samples = 0
    for clip in clips:
        audio = read_audio(clip.path)
        start_s = n_samples / SAMPLE_RATE_HZ
        if pieces and start_s + len(audio) / SAMPLE_RATE_HZ > max_s:
            break
        words += [
            RefWord(word.text, word.start_s + start_s, word.end_s + start_s, word.is_timed)
            for word in clip.words
        ]
        texts.append(clip.text)
        pieces += [audio, gap]
        n_samples += len(audio) + len(gap)
    return Recording(np.concatenate(pieces) if pieces else gap[:0], " ".join(texts), tuple(words))


def _clip(row: Mapping[str, Any], root: Path) -> Clip:
    utterances: Sequence[Mapping[str, Any]] = row.get("utterances") or [row]
    words = [word for utterance in utterances for word in _words(utterance, row["duration"])]
    text = " ".join(utterance["text"] for utterance in utterances)
    return Clip(root / row["path"], text, tuple(words), float(row["duration"]))


def _words(utterance: Mapping[str, Any], clip_s: float) -> list[RefWord]:
    """The words of one utterance; without known times each spans the whole utterance."""
    if utterance.get("words"):
        return [RefWord(w["w"], float(w["start"]), float(w["end"])) for w in utterance["words"]]
    start_s, end_s = float(utterance.get("start", 0.0)), float(utterance.get("end", clip_s))
    return [RefWord(text, start_s, end_s, is_timed=False) for text in utterance["text"].split()]


def add_clip_options(parser: argparse.ArgumentParser) -> None:
    """Which rows of which manifest a program takes."""
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--root", type=Path, required=True, help="what the manifest's paths are relative to")
    parser.add_argument("--filter", default="", help="only rows with this in their path")
