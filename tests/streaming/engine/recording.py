"""Recordings without sound: runs of a constant sample value are words, and the marks on them are given.

The value of a run is the word's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from streaming.engine.contract import Pcm
from streaming.engine.messages import Mark
from streaming.protocol import SAMPLE_RATE_HZ

GRID = 320  # samples; endpointing decides on it
UNIT = 1 / 4096  # sample value of word number 1
ASKED_ABOUT_S = 3  # audio before a question that it is about


@dataclass(frozen=True)
class Script:
    """A recording and the marks on it."""

    pcm: Pcm
    marks: tuple[Mark, ...]
    n_words: int

    def without_questions(self) -> Script:
        """For a model that answers none."""
        return Script(self.pcm, tuple(mark for mark in self.marks if mark.kind != "ask"), self.n_words)


@dataclass(frozen=True)
class Utterance:
    """Words between two silences."""

    pause: int  # of silence before, in grid steps
    words: tuple[tuple[int, int], ...]  # samples of each word and of the gap after it


def make_script(
    utterances: Sequence[Utterance],
    *,
    start_delay: int = 4,
    stop_delay: int = 10,
    pad: int = 4,
    flushes: Sequence[float] = (),
    questions: Sequence[float] = (),
) -> Script:
    """A recording of these utterances, endpointed with delays and a pad given in grid steps."""
    pieces: list[Pcm] = []
    marks: list[Mark] = []
    at = last_stop = n_words = 0
    for utterance in utterances:
        pause = max(utterance.pause, stop_delay + 1) * GRID
        pieces.append(np.zeros(pause, np.float32))
        at += pause
        speech = at
        for length, gap in utterance.words:
            n_words += 1
            pieces += [np.full(length, n_words * UNIT, np.float32), np.zeros(gap, np.float32)]
            at += length + gap
        rest = -at % GRID
        pieces.append(np.zeros(rest, np.float32))
        at += rest
        # Endpointing needs so much to decide: an utterance is at least as long.
        decided = min(speech + start_delay * GRID, at)
        marks.append(Mark("speech_start", decided, max(speech - pad * GRID, last_stop)))
        marks.append(Mark("speech_stop", at + stop_delay * GRID, at))
        last_stop = at
    pieces.append(np.zeros((stop_delay + 1) * GRID, np.float32))
    pcm = np.concatenate(pieces)
    marks += [Mark("flush", at, at) for at in (int(part * len(pcm)) for part in flushes)]
    asked = [int(part * len(pcm)) for part in questions]
    marks += [Mark("ask", at, max(0, at - ASKED_ABOUT_S * SAMPLE_RATE_HZ), "what was that?") for at in asked]
    marks.append(Mark("flush", len(pcm), len(pcm)))
    marks.sort(key=lambda mark: mark.at)  # stable: endpointing comes before a flush at the same sample
    return Script(pcm, tuple(marks), n_words)


words = st.tuples(st.integers(1600, 9000), st.sampled_from([0, 160, 1000, 3000]))
utterances = st.builds(
    Utterance, pause=st.integers(0, 120), words=st.lists(words, min_size=1, max_size=12).map(tuple)
)
scripts = st.builds(
    make_script,
    st.lists(utterances, min_size=1, max_size=4),
    start_delay=st.sampled_from([2, 6, 100]),
    stop_delay=st.sampled_from([10, 30]),
    pad=st.sampled_from([0, 15, 50]),
    flushes=st.lists(st.floats(0.05, 0.95) | st.sampled_from([0.25, 0.5]), max_size=2),
    questions=st.lists(st.floats(0.05, 0.95) | st.sampled_from([0.25, 0.5]), max_size=2),
)
