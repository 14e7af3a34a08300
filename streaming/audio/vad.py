"""Endpointing: where speech begins and ends, decided on the sample clock.

Pure: the marks depend on the samples alone, not on how they were cut or when they came.

webrtcvad adapts to the noise and cannot say how. So that the state at any sample can be made again
from a bounded piece of audio before it, the detector gives way to a new one every `PERIOD` frames,
which has heard the `WARM_UP` frames before that already.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
import webrtcvad

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


class VadState(msgspec.Struct, frozen=True, array_like=True):
    """What the decisions go on from; the detectors are made again from audio."""

    is_speech: bool
    n_frames: int
    n_run: int
    speech_end: int
    last_stop: int


class Vad:
    """The endpointing state of one stream.

    A frame counts as speech if webrtcvad says so and its level reaches the minimum.
    """

    def __init__(self, config: VadConfig) -> None:
        self.is_speech = False
        self._detector = webrtcvad.Vad()
        self._next: webrtcvad.Vad | None = None  # warms up to take over
        self.change(config)
        self._rest: Pcm = np.zeros(0, np.float32)  # less than a frame
        self._n_frames = 0
        self._n_run = 0  # speech frames in a row, up to the newest one
        self._speech_end = 0  # after the last frame of the running speech
        self._last_stop = 0

    def change(self, config: VadConfig) -> None:
        """Decide by these settings from the next frame on."""
        self._aggressiveness = config.aggressiveness
        for detector in filter(None, (self._detector, self._next)):
            detector.set_mode(config.aggressiveness)  # what it learnt of the noise stays
        self._n_start = math.ceil(config.start_ms / FRAME_MS)
        self._n_stop = math.ceil(config.stop_ms / FRAME_MS)
        self._pad = config.pad_ms * SAMPLE_RATE_HZ // 1000
        self._min_power = 10.0 ** (config.min_level_dbfs / 10)  # of a full-scale square wave

    def push(self, pcm: Pcm) -> list[Mark]:
        """The decisions that these samples bring, in order."""
        joined = np.concatenate([self._rest, pcm])
        n_whole = len(joined) - len(joined) % FRAME
        self._rest = joined[n_whole:].copy()
        frames = joined[:n_whole].reshape(-1, FRAME)  # [n_frames, FRAME]
        is_loud = np.square(frames.astype(np.float64)).mean(axis=1) >= self._min_power  # [n_frames]
        quantised = np.rint(frames * 32767).astype("<i2")
        marks = []
        for frame, loud in zip(quantised, is_loud, strict=True):
            # Asked for quiet frames too: the detector follows the noise floor.
            voiced = self._hear(frame.tobytes())
            self._n_frames += 1
            mark = self._decide(bool(voiced and loud))
            if mark is not None:
                marks.append(mark)
        return marks

    @staticmethod
    def needed_from(state: VadState) -> int:
        """Position of the oldest sample that `restore` needs for a state."""
        return max(0, state.n_frames // PERIOD * PERIOD - WARM_UP) * FRAME

    def snapshot(self) -> VadState:
        """What `restore` continues from, with the audio from `needed_from` to now."""
        return VadState(self.is_speech, self._n_frames, self._n_run, self._speech_end, self._last_stop)

    def restore(self, state: VadState, pcm: Pcm) -> None:
        """Continue where another was; called before the first `push`.

        Args:
            state: Of the other.
            pcm: The audio from `needed_from` on up to the last sample it was given.
        """
        self.is_speech, self._n_run = state.is_speech, state.n_run
        self._speech_end, self._last_stop = state.speech_end, state.last_stop
        self._n_frames = state.n_frames
        first = self.needed_from(state) // FRAME
        n_heard = state.n_frames - first
        frames = np.rint(pcm[: n_heard * FRAME].reshape(-1, FRAME) * 32767).astype("<i2")  # [n_heard, FRAME]
        assert len(frames) == n_heard, (len(pcm), state)
        for n_frames, frame in enumerate(frames, first):
            self._n_frames = n_frames
            self._hear(frame.tobytes())
        self._n_frames = state.n_frames
        self._rest = pcm[n_heard * FRAME :].copy()

    def _hear(self, frame: bytes) -> bool:
        """Whether a frame is voiced, by the detector whose turn it is."""
        phase = self._n_frames % PERIOD
        if phase == 0 and self._next is not None:
            self._detector, self._next = self._next, None
        elif phase == PERIOD - WARM_UP:
            self._next = webrtcvad.Vad(self._aggressiveness)
        if self._next is not None:
            self._next.is_speech(frame, SAMPLE_RATE_HZ)
        return bool(self._detector.is_speech(frame, SAMPLE_RATE_HZ))

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
