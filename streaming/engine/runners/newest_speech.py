"""Which part of a window is its newest speech: what lies behind the last pause."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.mel import HOP
from streaming.engine.contract import Fork

MIN_PAUSE = 20  # frames, 0.2 s: shorter gaps are consonants
MIN_RANGE = 1.5  # decades of power between speech and pauses; with less, noise covers them
QUIET = 0.3  # of that range: quieter frames are a pause
KEPT_PAUSE = 20 * HOP  # samples of the pause that an estimate sees before the speech
LONGEST = 64_000  # samples, 4 s: of a longer utterance, the newest part alone ...
UNBROKEN = 48_000  # ... and 3 s of one without a pause


@dataclass(frozen=True, slots=True)
class SpeechPart:
    """The newest speech of a window. Positions in samples."""

    start: int
    n_samples: int
    frames: Tensor  # [T, M] log power
    pauses: tuple[tuple[int, int], ...]  # in the whole span that was asked about


def newest_part(fork: Fork, frames: Tensor) -> SpeechPart | None:
    """What a transcript fork's language is estimated on; None where nothing is asked, or too little came.

    Args:
        fork: With a window that begins at frame 0 of `frames`.
        frames: [T, M] log power, up to the live edge.
    """
    span = fork.language_span
    if span is None:
        return None
    first, end = span.start, span.end
    begin, stop = (first - fork.window_start) // HOP, (end - fork.window_start) // HOP
    found = find_pauses(frames[begin:stop])
    pauses = tuple((first + a * HOP, first + b * HOP) for a, b in found)
    start = max(first, newest_speech(pauses, end, span.least_speech))
    start -= (start - fork.window_start) % HOP
    if end - start < span.least_speech:
        return None
    return SpeechPart(start, end - start, frames[(start - fork.window_start) // HOP : stop], pauses)


def find_pauses(log_power: Tensor) -> list[tuple[int, int]]:
    """The pauses of a window that speech follows.

    Args:
        log_power: [T, M] log10 power of mel frames.

    Returns:
        First frame and the frame after the last, oldest first.
    """
    if log_power.shape[0] < 2 * MIN_PAUSE:
        return []
    level = (10.0 ** log_power.double()).sum(dim=1).log10()  # [T], decades
    low, high = torch.quantile(level, torch.tensor([0.05, 0.95], dtype=level.dtype)).tolist()
    if high - low < MIN_RANGE:
        return []
    quiet: list[bool] = (level < low + QUIET * (high - low)).tolist()
    pauses = []
    at = 0
    for is_quiet, run in itertools.groupby(quiet):
        n_frames = len(list(run))
        if is_quiet and n_frames >= MIN_PAUSE and at + n_frames < len(quiet):
            pauses.append((at, at + n_frames))
        at += n_frames
    return pauses


def newest_speech(pauses: Sequence[tuple[int, int]], end: int, least: int) -> int:
    """Where the newest speech begins: behind the last pause that leaves enough of it.

    Args:
        pauses: As samples, oldest first.
        end: Sample at which the speech ends.
        least: Samples of speech that are enough.
    """
    starts = [stop for _, stop in pauses if stop <= end - least]
    return max(starts[-1] - KEPT_PAUSE, end - LONGEST) if starts else end - UNBROKEN
