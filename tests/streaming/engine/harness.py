"""The scheduler's surroundings without a model.

A runner that reads words off the samples, and the server's side of a stream as `streaming.session`
has it, crashes of the engine included. Speech is runs of a constant sample value, one run a word;
the value is the word's number.
"""

from __future__ import annotations

import itertools
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st

from streaming.config import TranscriptConfig
from streaming.engine import messages
from streaming.engine.messages import (
    Audio,
    CloseStream,
    Commit,
    Mark,
    Open,
    PointKind,
    Progress,
    Result,
    Skipped,
)
from streaming.engine.plan import (
    Capabilities,
    Fork,
    HeardWord,
    Hypothesis,
    Pcm,
    SlotStep,
    StepPlan,
    StepResult,
)
from streaming.engine.scheduler import MARGIN, Scheduler
from streaming.protocol import SAMPLE_RATE_HZ, Message, TranscriptDelta
from streaming.timeline import Timeline

GRID = 320  # samples; endpointing decides on it
HOP = 160  # samples; a runner can begin on no finer grid
TICK = 5120  # samples
FRAGMENT = 320  # samples; less of a run, at a window's start, is not heard
LONGEST_WINDOW_S = 7.0  # what the runner can look at
UNIT = 1 / 4096  # sample value of word number 1
CONFIG = TranscriptConfig(
    window_s=5.0,
    join_gap_s=1.0,
    use_context=True,
    agreement=2,
    edge_s=0.2,
    max_segment_s=6.0,
    max_tokens_per_s=12.0,
    sure_score=0.0,
)


@dataclass(frozen=True)
class Script:
    """A recording and the marks on it."""

    pcm: Pcm
    marks: tuple[Mark, ...]
    n_words: int


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
        marks.append(Mark("started", decided, max(speech - pad * GRID, last_stop)))
        marks.append(Mark("stopped", at + stop_delay * GRID, at))
        last_stop = at
    pieces.append(np.zeros((stop_delay + 1) * GRID, np.float32))
    pcm = np.concatenate(pieces)
    marks += [Mark("flush", at, at) for at in (int(part * len(pcm)) for part in flushes)]
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
)


@dataclass(frozen=True)
class Asked:
    """One question that the runner got."""

    point: int
    fork: Fork
    window: int  # checksum of the audio that was looked at


@dataclass
class _Slot:
    owner: int
    start: int
    pcm: Pcm

    @property
    def end(self) -> int:
        return self.start + len(self.pcm)


class FakeRunner:
    """Hears the runs of its window, and holds the scheduler to the runner's contract."""

    capabilities = Capabilities("fake", ("transcript",), ("en",), 30.0, 0.08)

    def __init__(self) -> None:
        self.asked: dict[int, Asked] = {}  # the last question of each owner
        self._slots: dict[int, _Slot] = {}

    def step(self, plan: StepPlan) -> StepResult:
        """What a pure function of window and prefix makes of them."""
        assert len({step.slot_idx for step in plan.slots}) == len(plan.slots)
        return StepResult(tuple(self._hear(step, fork) for step in plan.slots for fork in step.forks))

    def reset(self, slots: Sequence[int]) -> None:
        """Forget."""
        for slot_idx in slots:
            self._slots.pop(slot_idx, None)

    def _hear(self, step: SlotStep, fork: Fork) -> Hypothesis:
        slot = self._slots.get(step.slot_idx)
        if slot is None or slot.owner != step.owner:
            slot = _Slot(step.owner, step.start, step.pcm)
        elif step.start == slot.end:
            slot = _Slot(slot.owner, slot.start, np.concatenate([slot.pcm, step.pcm]))
        else:
            assert step.start > slot.end, "a jump goes ahead"
            slot = _Slot(step.owner, step.start, step.pcm)
        self._slots[step.slot_idx] = slot
        assert slot.start % HOP == 0
        assert fork.window_start % GRID == 0
        assert slot.start <= max(0, fork.window_start - MARGIN), "the first mel frames look before the window"
        assert slot.end - fork.window_start <= LONGEST_WINDOW_S * SAMPLE_RATE_HZ
        window = slot.pcm[fork.window_start - slot.start :]
        self.asked[step.owner] = Asked(slot.end, fork, zlib.crc32(window.tobytes()))
        heard = runs(window, fork.window_start)[len(fork.prefix) :]
        return Hypothesis(step.slot_idx, step.owner, tuple(heard), slot.end, "en", 1.0, 0.0, 0)


def runs(window: Pcm, start: int) -> list[HeardWord]:
    """The words of a window; the text of one that goes on at the live edge tells how much of it came."""
    edges = [0, *(np.flatnonzero(np.diff(window)) + 1).tolist(), len(window)]
    found = []
    for first, last in itertools.pairwise(edges):
        if window[first : first + 1].any() and (first > 0 or last > FRAGMENT):
            number = round(float(window[first]) / UNIT)
            text = f"w{number}" if last < len(window) else f"w{number}x{last - first}"
            found.append(HeardWord(text, start + first, start + last, 1.0))
    return found


@dataclass
class Stream:
    """The server's side of one stream, as `streaming.session.Session` has it."""

    number: int
    script: Script
    timeline: Timeline = field(default_factory=lambda: Timeline(CONFIG))
    arrived: int = 0  # samples the server has
    ring_start: int = 0
    consumed: int = 0
    window_start: int = 0
    last_stop: int = 0
    speech_edge: int | None = None
    sent: int = 0
    n_arrived: int = 0  # marks the server has
    pending: deque[Mark] = field(default_factory=deque)
    n_sent: int = 0  # of them
    # What came of it.
    asked: list[tuple[PointKind, Asked]] = field(default_factory=list)
    answered: list[tuple[int, PointKind]] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def committed(self) -> list[str]:
        """The words on the timeline."""
        return [w.text for m in self.messages if isinstance(m, TranscriptDelta) for w in m.words]

    @property
    def is_done(self) -> bool:
        """Whether everything has arrived and every mark is answered."""
        return self.arrived == len(self.script.pcm) and not self.pending


class World:
    """Streams and an engine that runs in steps, may be restarted, and may have a clock."""

    def __init__(self, n_slots: int = 8, *, shed_after_s: float = 0.0) -> None:
        self.now_s = 0.0
        self._n_slots, self._shed_after_s = n_slots, shed_after_s
        self.streams: dict[int, Stream] = {}
        self.scheduler, self.runner = self._new_engine()
        self.outbox: deque[tuple[messages.FromEngine, Asked | None]] = deque()

    def _new_engine(self) -> tuple[Scheduler, FakeRunner]:
        scheduler = Scheduler(
            CONFIG,
            n_slots=self._n_slots,
            tick=TICK,
            shed_after_s=self._shed_after_s,
            clock=lambda: self.now_s,
            longest_window_s=LONGEST_WINDOW_S,
        )
        return scheduler, FakeRunner()

    def open(self, number: int, script: Script) -> Stream:
        """A new stream."""
        stream = self.streams[number] = Stream(number, script)
        self.scheduler.open(Open(number, "en"))
        return stream

    def close(self, number: int) -> None:
        """A stream leaves."""
        slot_idx = self.scheduler.close(CloseStream(number).stream)
        assert slot_idx is not None
        self.runner.reset([slot_idx])
        del self.streams[number]

    def arrive(self, stream: Stream, n_samples: int, *, holds_flush: bool = False) -> None:
        """Samples and marks come to the server and go on to the engine.

        A flush at the newest sample may come with the audio or, `holds_flush`, on its own later.
        """
        stream.arrived = min(len(stream.script.pcm), stream.arrived + n_samples)
        for mark in stream.script.marks[stream.n_arrived :]:
            is_held = holds_flush and n_samples and mark.kind == "flush" and mark.at == stream.arrived
            if mark.at > stream.arrived or is_held:
                break
            stream.pending.append(mark)
            stream.n_arrived += 1
        self._pump(stream)

    def _pump(self, stream: Stream) -> None:
        waiting = list(stream.pending)[stream.n_sent :]
        while stream.sent < stream.arrived or waiting:
            is_late = bool(waiting) and waiting[0].at <= stream.sent
            end = stream.sent if is_late else stream.arrived
            due = tuple(mark for mark in waiting if mark.at <= end)
            pcm = stream.script.pcm[stream.sent : end]
            self.scheduler.push(Audio(stream.number, stream.sent, pcm.astype("<f4").tobytes(), due))
            stream.sent = end
            waiting = waiting[len(due) :]
            stream.n_sent += len(due)

    def tick(self) -> bool:
        """One turn of the engine's loop; whether anything was due."""
        schedule = self.scheduler.schedule()
        said: tuple[messages.FromEngine, ...] = (*schedule.skipped, *schedule.progress, *schedule.results)
        self.outbox += [(message, None) for message in said]
        if schedule.plan.slots:
            answers = self.runner.step(schedule.plan)
            for result in self.scheduler.apply(schedule, answers, 0.0):
                self.outbox.append((result, self.runner.asked[result.stream]))
        return bool(schedule.plan.slots or schedule.results)

    def take(self, n_messages: int = 1_000_000) -> None:
        """The server reads what the engine said, and answers."""
        for _ in range(min(n_messages, len(self.outbox))):
            message, asked = self.outbox.popleft()
            match message:
                case Result():
                    if stream := self.streams.get(message.stream):
                        self._on_result(stream, message, asked)
                case Progress():
                    if stream := self.streams.get(message.stream):
                        self._consume(stream, message.consumed)
                        stream.window_start = max(stream.window_start, message.window_start)
                        assert stream.ring_start <= message.needed_from <= message.consumed
                        stream.ring_start = message.needed_from
                case Skipped():
                    self.streams[message.stream].skipped.append(message)

    def _on_result(self, stream: Stream, result: Result, asked: Asked | None) -> None:
        self._consume(stream, result.point)
        stream.window_start = max(stream.window_start, result.window_start)
        if result.kind != "tick":
            assert stream.n_sent
            mark = stream.pending.popleft()
            stream.n_sent -= 1
            assert (mark.kind, mark.at) == (result.kind, result.point)
            if mark.kind == "stopped":
                stream.speech_edge = None
                stream.last_stop = mark.edge
        stream.answered.append((result.point, result.kind))
        if asked is not None:
            stream.asked.append((result.kind, asked))
        applied = stream.timeline.apply(result)
        stream.messages += applied.messages
        self.scheduler.commit(Commit(stream.number, result.point, result.kind, applied.n_committed))

    @staticmethod
    def _consume(stream: Stream, position: int) -> None:
        stream.consumed = max(stream.consumed, position)
        while (
            stream.n_sent and stream.pending[0].kind == "started" and stream.pending[0].at <= stream.consumed
        ):
            stream.n_sent -= 1
            stream.speech_edge = stream.pending.popleft().edge

    def crash(self) -> None:
        """The engine dies with everything it has not said; the next one gets the streams."""
        self.outbox.clear()
        self.scheduler, self.runner = self._new_engine()
        for stream in self.streams.values():
            committed, context = stream.timeline.window(stream.window_start)
            self.scheduler.open(
                Open(
                    stream=stream.number,
                    language="en",
                    start=stream.ring_start,
                    consumed=stream.consumed,
                    window_start=stream.window_start,
                    committed=committed,
                    context=context,
                    is_speech=stream.speech_edge is not None,
                    speech_edge=stream.speech_edge or 0,
                    last_stop=stream.last_stop,
                )
            )
            stream.sent = stream.ring_start
            stream.n_sent = 0
            self._pump(stream)

    def finish(self, *numbers: int, each: Callable[[], None] | None = None) -> None:
        """Whatever has not arrived does, and everything is answered."""
        for number in numbers:
            self.arrive(self.streams[number], 1_000_000_000)
        while self.tick() or self.outbox:
            self.take()
            if each is not None:
                each()
        for number in numbers:
            assert self.streams[number].is_done, self.streams[number]


def alone(script: Script) -> Stream:
    """The script heard by an engine of its own, all at once."""
    world = World(1)
    stream = world.open(1, script)
    world.finish(1)
    return stream
