"""The scheduler's surroundings without a model.

A runner that reads words off the samples, and the server's side of a stream as `streaming.stream.session`
has it, crashes of the engine included. Speech is runs of a constant sample value, one run a word;
the value is the word's number. Sounds, emotions and answers are checksums of the audio they are
about, so that they show what was looked at.
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
from streaming.engine.contract import (
    SOUND_FRAME,
    Capabilities,
    Fork,
    HeardAnswer,
    HeardEmotion,
    HeardEvent,
    HeardEvents,
    HeardWord,
    Hypothesis,
    Pcm,
    SlotStep,
    SoundScores,
    StepPlan,
    StepResult,
)
from streaming.engine.messages import (
    Audio,
    CloseStream,
    Commit,
    Emotion,
    Events,
    Mark,
    Open,
    PointKind,
    Progress,
    Result,
    Skipped,
    Sounds,
)
from streaming.engine.scheduler import MARGIN, WORDS_ALONE, Listening, Scheduler
from streaming.protocol import (
    SAMPLE_RATE_HZ,
    AnswerFinal,
    EmotionUpdate,
    EventEnded,
    EventStarted,
    Message,
    TranscriptDelta,
)
from streaming.timeline.transcript import Timeline

GRID = 320  # samples; endpointing decides on it
HOP = 160  # samples; a runner can begin on no finer grid
TICK = 5120  # samples
FRAGMENT = 320  # samples; less of a run, at a window's start, is not heard
LONGEST_WINDOW_S = 7.0  # what the runner can look at
UNIT = 1 / 4096  # sample value of word number 1
SOUND_PAST = 2 * SAMPLE_RATE_HZ  # samples that a row of sound scores looks back on ...
SOUND_DELAY = SAMPLE_RATE_HZ * 3 // 5  # ... and how long it is waited for
SCORED = Listening(sound_ticks=1, emotion_ticks=4)  # as a model that scores sounds row by row
# As one that names them when asked.
NAMED = Listening(
    sound_ticks=4, events_ticks=4, emotion_ticks=6, reach=int(LONGEST_WINDOW_S * SAMPLE_RATE_HZ)
)
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
        marks.append(Mark("started", decided, max(speech - pad * GRID, last_stop)))
        marks.append(Mark("stopped", at + stop_delay * GRID, at))
        last_stop = at
    pieces.append(np.zeros((stop_delay + 1) * GRID, np.float32))
    pcm = np.concatenate(pieces)
    marks += [Mark("flush", at, at) for at in (int(part * len(pcm)) for part in flushes)]
    asked = [int(part * len(pcm)) for part in questions]
    marks += [Mark("ask", at, max(0, at - 3 * SAMPLE_RATE_HZ), "what was that?") for at in asked]
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
listenings = st.sampled_from([WORDS_ALONE, SCORED, NAMED])


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
    next_row: int = 0  # of sound scores, by position

    @property
    def end(self) -> int:
        return self.start + len(self.pcm)


class FakeRunner:
    """Hears the runs of its window, and holds the scheduler to the runner's contract."""

    capabilities = Capabilities("fake", ("transcript",), ("en",), 30.0, 0.08)

    def __init__(self, listening: Listening = WORDS_ALONE) -> None:
        self.asked: dict[int, Asked] = {}  # the last transcript fork of each owner
        self._listening = listening
        self._slots: dict[int, _Slot] = {}

    def step(self, plan: StepPlan) -> StepResult:
        """What a pure function of window and prefix makes of them."""
        assert len({step.slot_idx for step in plan.slots}) == len(plan.slots)
        words, events, emotions, answers, sounds = [], [], [], [], []
        for step in plan.slots:
            slot = self._take(step)
            if self._listening.sound_ticks and not self._listening.events_ticks:
                sounds.append(self._score(step, slot))
            for fork in step.forks:
                about = slot.pcm[fork.window_start - slot.start :]
                said = f"{fork.task}-{zlib.crc32(about.tobytes()):08x}"
                span = (step.slot_idx, step.owner, fork.window_start, slot.end)
                match fork.task:
                    case "transcript":
                        words.append(self._hear(step, slot, fork))
                    case "events":
                        found = (HeardEvent(said, fork.window_start, slot.end, 1.0),)
                        events.append(HeardEvents(*span, slot.end, found))
                    case "emotion":
                        assert step.forks[0].task == "transcript"
                        assert fork.window_start >= step.forks[0].window_start
                        emotions.append(HeardEmotion(*span, said, 1.0))
                    case "answer":
                        answers.append(HeardAnswer(step.slot_idx, step.owner, said, fork.question, True))
        return StepResult(tuple(words), tuple(events), tuple(emotions), tuple(answers), tuple(sounds))

    def asked_at(self, owner: int) -> int | None:
        """Where the last transcript fork of an owner was."""
        return self.asked[owner].point if owner in self.asked else None

    def reset(self, slots: Sequence[int]) -> None:
        """Forget."""
        for slot_idx in slots:
            self._slots.pop(slot_idx, None)

    def _take(self, step: SlotStep) -> _Slot:
        slot = self._slots.get(step.slot_idx)
        if slot is None or slot.owner != step.owner:
            slot = self._begin(step)
        elif step.start == slot.end:
            slot.pcm = np.concatenate([slot.pcm, step.pcm])
        else:
            assert step.start > slot.end, "a jump goes ahead"
            assert not self._listening.sound_ticks, "what hears everything misses nothing"
            slot = self._begin(step)
        self._slots[step.slot_idx] = slot
        assert slot.start % HOP == 0
        return slot

    @staticmethod
    def _begin(step: SlotStep) -> _Slot:
        known = step.start + SOUND_PAST if step.start else 0
        return _Slot(step.owner, step.start, step.pcm, -(-known // SOUND_FRAME) * SOUND_FRAME)

    @staticmethod
    def _score(step: SlotStep, slot: _Slot) -> SoundScores:
        """One label, whose score is a checksum of what the row looks at."""
        start, rows = slot.next_row, []
        while slot.next_row + SOUND_DELAY <= slot.end:
            first = max(0, slot.next_row - SOUND_PAST) - slot.start
            about = slot.pcm[first : slot.next_row + SOUND_DELAY - slot.start]
            rows.append(zlib.crc32(about.tobytes()) % 256 / 255)
            slot.next_row += SOUND_FRAME
        scores = np.array(rows, np.float32).reshape(-1, 1)
        return SoundScores(step.slot_idx, step.owner, start, scores)

    def _hear(self, step: SlotStep, slot: _Slot, fork: Fork) -> Hypothesis:
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


class Recorder:
    """Trackers that put on the timeline whatever they get."""

    def __init__(self) -> None:
        self._next_row = 0

    def state(self) -> None:
        """The server never dies here."""

    def push(self, found: Sounds | Emotion) -> list[Message]:
        """Rows once each, without a gap; every emotion."""
        if isinstance(found, Emotion):
            at = (found.start, found.end)
            return [EmotionUpdate(found.label or "", {}, None, None, None, *at)]
        assert found.start <= self._next_row, (found.start, self._next_row)
        n_known = (self._next_row - found.start) // SOUND_FRAME
        rows: list[Message] = []
        for score in found.scores[n_known:]:
            rows.append(EventStarted("", str(score), 1.0, self._next_row, 0))
            self._next_row += SOUND_FRAME
        return rows

    def named(self, events: Events) -> list[Message]:
        """Every event."""
        return [EventEnded("", e.label, e.score, e.start, e.end) for e in events.events]

    def final(self, start: int, end: int) -> list[Message]:
        """Nothing: what was pushed last is not told."""
        return []

    def finish(self, end: int) -> list[Message]:
        """Nothing."""
        return []

    def speech_started(self, edge: int) -> None:
        """Nothing."""


def make_timeline() -> Timeline:
    """With trackers that record."""
    return Timeline(CONFIG, Recorder(), Recorder())


@dataclass
class Stream:
    """The server's side of one stream, as `streaming.stream.session.Session` has it."""

    number: int
    script: Script
    timeline: Timeline = field(default_factory=make_timeline)
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

    def __init__(
        self, n_slots: int = 8, *, shed_after_s: float = 0.0, listening: Listening = WORDS_ALONE
    ) -> None:
        self.now_s = 0.0
        self._listening = listening
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
            listening=self._listening,
        )
        return scheduler, FakeRunner(self._listening)

    def open(self, number: int, script: Script) -> Stream:
        """A new stream."""
        if not self._listening.events_ticks:
            script = script.without_questions()
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
                has_words = result.kind != "sound" and self.runner.asked_at(result.stream) == result.point
                self.outbox.append((result, self.runner.asked[result.stream] if has_words else None))
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
        if result.kind not in ("tick", "sound"):
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
        if result.answer is not None:
            stream.messages.append(
                AnswerFinal("", result.answer.text, result.answer.start, result.answer.end)
            )
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


def alone(script: Script, listening: Listening = WORDS_ALONE) -> Stream:
    """The script heard by an engine of its own, all at once."""
    world = World(1, listening=listening)
    stream = world.open(1, script)
    world.finish(1)
    return stream
