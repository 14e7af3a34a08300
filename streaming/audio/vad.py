"""Endpointing: where speech begins and ends, decided on the sample clock.

Pure: the marks depend on the samples alone, not on how they were cut or when they came.

webrtcvad adapts to the noise and cannot say how. So that the state at any sample can be made again
from a bounded piece of audio before it, the detector gives way to a new one every `PERIOD` frames,
which has heard the `WARM_UP` frames before that already.

It was made for loud audio, so a second one hears everything `BOOST_DB` louder: it decides on frames
below `LOUD`. How quiet a frame may be follows the room (`audio/level.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import numpy as np
import webrtcvad

from streaming.audio.level import HISTORY, LOUD, LevelGate
from streaming.config import VadConfig
from streaming.engine.contract import Pcm
from streaming.engine.messages import Mark
from streaming.protocol import SAMPLE_RATE_HZ

FRAME_MS = 20
FRAME = SAMPLE_RATE_HZ * FRAME_MS // 1000  # samples
# So many speech frames in a row end a pause; fewer are clicks, which would otherwise keep it open.
RESUME_FRAMES = 3
PERIOD = 1000  # frames that one detector decides on: 20 s
WARM_UP = 500  # frames it hears before: 10 s, in which it learns the noise
BOOST_DB = 20.0
BOOST = 10.0 ** (BOOST_DB / 20)
# Whether speech is mostly too quiet is asked every so many frames, 30 s; it takes 5 s of it to say so.
REVIEW = 1500
MIN_CUT = 250
assert WARM_UP >= HISTORY  # else the gate could not be made again from what a detector needs


class VadState(msgspec.Struct, frozen=True, array_like=True):
    """What the decisions go on from; the detectors are made again from audio."""

    is_speech: bool
    n_frames: int
    n_run: int
    speech_end: int
    last_stop: int
    n_taken: int = 0
    n_cut: int = 0
    is_cut: bool = False


class _Detector:
    """webrtcvad on frames as they are and on frames made louder."""

    def __init__(self, aggressiveness: int) -> None:
        self._plain, self._boosted = webrtcvad.Vad(aggressiveness), webrtcvad.Vad(aggressiveness)

    def set_mode(self, aggressiveness: int) -> None:
        """Decide so from now on; what was learnt of the noise stays."""
        self._plain.set_mode(aggressiveness)
        self._boosted.set_mode(aggressiveness)

    def is_voiced(self, frame: _Frame) -> bool:
        """Take the next frame. Both hear each one: they follow the noise."""
        plain = bool(self._plain.is_speech(frame.plain, SAMPLE_RATE_HZ))
        boosted = bool(self._boosted.is_speech(frame.boosted, SAMPLE_RATE_HZ))
        return plain if frame.power >= LOUD else boosted


@dataclass(frozen=True, slots=True)
class _Frame:
    """One frame: its mean square, and its samples as webrtcvad takes them."""

    power: float
    plain: bytes
    boosted: bytes


class Vad:
    """The endpointing state of one stream.

    A frame counts as speech if webrtcvad says so and its level passes the gate.
    """

    def __init__(self, config: VadConfig) -> None:
        self.is_speech = False
        self._detector = _Detector(config.aggressiveness)
        self._next: _Detector | None = None  # warms up to take over
        self._gate = LevelGate(config.min_level_dbfs)
        self.change(config)
        self._rest: Pcm = np.zeros(0, np.float32)  # less than a frame
        self._n_frames = 0
        self._n_run = 0  # speech frames in a row, up to the newest one
        self._speech_end = 0  # after the last frame of the running speech
        self._last_stop = 0
        # Voiced frames since the last review: that passed the gate, and that did not.
        self._n_taken = self._n_cut = 0
        self.is_cut = False  # whether at the last review most did not

    def change(self, config: VadConfig) -> None:
        """Decide by these settings from the next frame on."""
        self._aggressiveness = config.aggressiveness
        for detector in filter(None, (self._detector, self._next)):
            detector.set_mode(config.aggressiveness)
        self._n_start = math.ceil(config.start_ms / FRAME_MS)
        self._n_stop = math.ceil(config.stop_ms / FRAME_MS)
        self._pad = config.pad_ms * SAMPLE_RATE_HZ // 1000
        self._gate.change(config.min_level_dbfs)

    def push(self, pcm: Pcm) -> list[Mark]:
        """The decisions that these samples bring, in order."""
        joined = np.concatenate([self._rest, pcm])
        n_whole = len(joined) - len(joined) % FRAME
        self._rest = joined[n_whole:].copy()
        marks = []
        for frame in _frames(joined[:n_whole]):
            is_loud = frame.power >= self._gate.power
            is_voiced = self._hear(frame)
            self._n_frames += 1
            self._review(is_voiced, is_loud)
            mark = self._decide(is_voiced and is_loud)
            if mark is not None:
                marks.append(mark)
        return marks

    @staticmethod
    def needed_from(state: VadState) -> int:
        """Position of the oldest sample that `restore` needs for a state."""
        return max(0, state.n_frames // PERIOD * PERIOD - WARM_UP) * FRAME

    def snapshot(self) -> VadState:
        """What `restore` continues from, with the audio from `needed_from` to now."""
        return VadState(
            self.is_speech,
            self._n_frames,
            self._n_run,
            self._speech_end,
            self._last_stop,
            self._n_taken,
            self._n_cut,
            self.is_cut,
        )

    def restore(self, state: VadState, pcm: Pcm) -> None:
        """Continue where another was; called before the first `push`.

        Args:
            state: Of the other.
            pcm: The audio from `needed_from` on up to the last sample it was given.
        """
        self.is_speech, self._n_run = state.is_speech, state.n_run
        self._speech_end, self._last_stop = state.speech_end, state.last_stop
        self._n_taken, self._n_cut, self.is_cut = state.n_taken, state.n_cut, state.is_cut
        first = self.needed_from(state) // FRAME
        n_heard = state.n_frames - first
        frames = _frames(pcm[: n_heard * FRAME])
        assert len(frames) == n_heard, (len(pcm), state)
        for n_frames, frame in enumerate(frames, first):
            self._n_frames = n_frames
            self._hear(frame)
        self._n_frames = state.n_frames
        self._rest = pcm[n_heard * FRAME :].copy()

    def _hear(self, frame: _Frame) -> bool:
        """Whether a frame is voiced, by the detector whose turn it is; the gate follows too."""
        self._gate.hear(frame.power)
        phase = self._n_frames % PERIOD
        if phase == 0 and self._next is not None:
            self._detector, self._next = self._next, None
        elif phase == PERIOD - WARM_UP:
            self._next = _Detector(self._aggressiveness)
        if self._next is not None:
            self._next.is_voiced(frame)
        return self._detector.is_voiced(frame)

    def _review(self, is_voiced: bool, is_loud: bool) -> None:
        """Count what the gate lets through and what it does not; every 30 s see which is more."""
        if is_voiced:
            self._n_taken += is_loud
            self._n_cut += not is_loud
        if self._n_frames % REVIEW == 0:
            self.is_cut = self._n_cut >= MIN_CUT and self._n_cut > self._n_taken
            self._n_taken = self._n_cut = 0

    def _decide(self, is_voiced: bool) -> Mark | None:
        at = self._n_frames * FRAME
        self._n_run = self._n_run + 1 if is_voiced else 0
        if not self.is_speech:
            if self._n_run < self._n_start:
                return None
            self.is_speech = True
            self._speech_end = at
            began = at - self._n_run * FRAME
            return Mark("speech_start", at, max(began - self._pad, self._last_stop))
        if self._n_run >= RESUME_FRAMES:
            self._speech_end = at
        if at - self._speech_end < self._n_stop * FRAME:
            return None
        self.is_speech = False
        self._n_run = 0
        self._last_stop = self._speech_end
        return Mark("speech_stop", at, self._speech_end)


def _frames(pcm: Pcm) -> list[_Frame]:
    """Whole frames, of [n_frames * FRAME] samples."""
    frames = pcm.reshape(-1, FRAME)  # [n_frames, FRAME]
    powers = np.square(frames.astype(np.float64)).mean(axis=1).tolist()
    plain = np.rint(frames * 32767).astype("<i2")
    boosted = np.rint(np.clip(frames * BOOST, -1.0, 1.0) * 32767).astype("<i2")
    return [_Frame(p, a.tobytes(), b.tobytes()) for p, a, b in zip(powers, plain, boosted, strict=True)]
