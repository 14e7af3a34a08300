"""The server's own feed and the real engine with a virtual clock, in this process.

Audio arrives at the pace of speech on the virtual clock; a step takes as long on it as it took on
the real one. So a run needs no real time while the engine idles, and still shows true lags.
Sockets and the process boundary are left out: `bench/live.py` measures with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streaming.audio.vad import Vad
from streaming.config import Config
from streaming.engine.contract import Capabilities, Runner
from streaming.engine.messages import Audio, CloseStream, Commit, Open, Result
from streaming.engine.scheduler import Scheduler
from streaming.engine.task_schedule import TaskSchedule
from streaming.protocol import SAMPLE_RATE_HZ, Message
from streaming.stream.feed import Feed, FromEngine
from streaming.timeline.transcript import new_timeline

CHUNK = SAMPLE_RATE_HZ // 50  # samples that arrive at a time, 20 ms


@dataclass(frozen=True, slots=True)
class VirtualRun:
    """What one stream heard back."""

    arrivals: tuple[tuple[float, Message], ...]  # virtual seconds since the stream began
    flush_s: float  # from the last sample to `flushed`


@dataclass(frozen=True, slots=True)
class VirtualRuns:
    """Streams that ran at once."""

    runs: tuple[VirtualRun, ...]
    cpu_s: float  # core-seconds of all steps
    wall_s: float  # of all steps
    n_steps: int


class _Stream:
    def __init__(
        self,
        number: int,
        audio: NDArray[np.float32],
        config: Config,
        capabilities: Capabilities,
        max_step: int,
        language: str | None,
        keep: Callable[[Message], bool],
    ) -> None:
        self.number = number
        self.audio = audio
        self._keep = keep
        self._vad = Vad(config.vad)
        self._feed = Feed(
            number,
            new_timeline(config, capabilities.tasks, capabilities.sounds),
            language=language,
            ring=len(audio),
            max_ahead=int(config.ingest.max_ahead_s * SAMPLE_RATE_HZ),
            max_step=max_step,
        )
        self.arrivals: list[tuple[float, Message]] = []
        self.flushed_s: float | None = None

    def open(self, scheduler: Scheduler) -> None:
        """Take a slot."""
        self._feed.reopen()
        self._send(scheduler)

    def arrive(self, now_s: float, scheduler: Scheduler) -> None:
        """Push what has come by now; after the last sample, a flush."""
        start = self._feed.n_samples
        have = min(len(self.audio), round(now_s * SAMPLE_RATE_HZ) // CHUNK * CHUNK)
        if now_s >= len(self.audio) / SAMPLE_RATE_HZ:
            have = len(self.audio)
        if have <= start:
            return
        for at in range(start, have, CHUNK):
            pcm = self.audio[at : min(at + CHUNK, have)]
            self._hear((at + len(pcm)) / SAMPLE_RATE_HZ, self._feed.push(pcm, self._vad.push(pcm)))
        if have == len(self.audio):
            self._feed.flush("end")
        self._send(scheduler)

    def take(self, message: FromEngine, now_s: float, scheduler: Scheduler) -> None:
        """Give what the engine said to the feed, and its answer back to the scheduler."""
        self._hear(now_s, self._feed.take(message))
        if isinstance(message, Result) and message.kind == "flush":
            self.flushed_s = now_s
            self._hear(now_s, self._feed.close())
        else:
            self._send(scheduler)

    def _send(self, scheduler: Scheduler) -> None:
        for message in self._feed.outgoing():
            match message:
                case Open():
                    scheduler.open(message)
                case Audio():
                    scheduler.push(message)
                case Commit():
                    scheduler.commit(message)

    def _hear(self, at_s: float, messages: Iterable[Message]) -> None:
        self.arrivals += [(at_s, message) for message in messages if self._keep(message)]


def run(
    audio: Sequence[NDArray[np.float32]],
    runner: Runner,
    config: Config,
    language: str | None = None,
    speed: float = 1.0,
    keep: Callable[[Message], bool] = lambda _: True,
) -> VirtualRuns:
    """Stream every recording at once, from virtual second 0, until each is flushed.

    Args:
        audio: [n_samples] each, 16 kHz mono.
        runner: With at least as many slots.
        config: Endpointing, ticks and commit policy.
        language: Set for every stream; None: detected.
        speed: How many times faster than measured a step counts; for what-if runs.
        keep: Which messages are kept; a long run's captions take memory.
    """
    now_s = 0.0
    tick = config.engine.tick_ms * SAMPLE_RATE_HZ // 1000
    listening = TaskSchedule.for_model(runner.capabilities, config.events, config.emotion, tick)
    scheduler = Scheduler(
        config.transcript,
        n_slots=len(audio),
        tick=tick,
        shed_after_s=config.engine.shed_after_s,
        clock=lambda: now_s,
        longest_window_s=runner.capabilities.max_window_s,
        tasks=listening,
    )
    streams = [
        _Stream(number, pcm, config, runner.capabilities, listening.max_step(tick), language, keep)
        for number, pcm in enumerate(audio)
    ]
    for stream in streams:
        stream.open(scheduler)
    cpu_s = wall_s = 0.0
    n_steps = 0
    while any(stream.flushed_s is None for stream in streams):
        for stream in streams:
            stream.arrive(now_s, scheduler)
        schedule = scheduler.schedule()
        found: tuple[FromEngine, ...] = (*schedule.skipped, *schedule.progress, *schedule.results)
        for message in found:
            streams[message.stream].take(message, now_s, scheduler)
        if schedule.plan.slots:
            wall, cpu = time.perf_counter(), time.process_time()
            answers = runner.step(schedule.plan)
            took_s = time.perf_counter() - wall
            cpu_s += time.process_time() - cpu
            wall_s += took_s
            n_steps += 1
            now_s += took_s / speed
            for result in scheduler.apply(schedule, answers, took_s):
                streams[result.stream].take(result, now_s, scheduler)
        elif not (schedule.results or schedule.progress):
            now_s = (round(now_s * SAMPLE_RATE_HZ) // CHUNK + 1) * CHUNK / SAMPLE_RATE_HZ
    for stream in streams:
        slot_idx = scheduler.close(CloseStream(stream.number).stream)
        assert slot_idx is not None
        runner.reset([slot_idx])
    return VirtualRuns(
        tuple(
            VirtualRun(tuple(s.arrivals), (s.flushed_s or 0.0) - len(s.audio) / SAMPLE_RATE_HZ)
            for s in streams
        ),
        cpu_s,
        wall_s,
        n_steps,
    )
