"""The scheduler's surroundings without a model: the server's own `Feed`s around one engine.

The engine runs in steps; it may die, and so may the server.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field

import msgspec

from streaming.config import TranscriptConfig
from streaming.engine import messages
from streaming.engine.contract import SOUND_FRAME, EmotionEstimate, SoundEvents, SoundScores
from streaming.engine.messages import (
    Audio,
    Commit,
    Open,
    PointKind,
    Progress,
    Result,
    Skipped,
)
from streaming.engine.scheduler import Scheduler
from streaming.engine.task_schedule import TRANSCRIPT_ONLY, TaskSchedule
from streaming.protocol import (
    SAMPLE_RATE_HZ,
    Ask,
    EmotionUpdate,
    EventEnded,
    EventStarted,
    Message,
    SpeechStarted,
    TranscriptDelta,
)
from streaming.stream.feed import Feed, FeedState
from streaming.timeline.transcript import Timeline
from tests.streaming.engine.fake_runner import LONGEST_WINDOW_S, Asked, FakeRunner
from tests.streaming.engine.recording import ASKED_ABOUT_S, Script, Utterance, make_script
from tests.streaming.fake_engine import MAX_STEP

TICK = 5120  # samples
SECOND = SAMPLE_RATE_HZ
TEN_WORDS = Utterance(30, ((4000, 1000),) * 10)  # 3.1 s
LONG = make_script([TEN_WORDS, TEN_WORDS], flushes=[0.3])
MINUTE = make_script([Utterance(10, ((4000, 400),) * 200)])
CONFIG = TranscriptConfig(
    window_s=5.0,
    join_gap_s=1.0,
    use_context=True,
    agreement=2,
    commit_delay_s=0.2,
    max_segment_s=6.0,
    max_tokens_per_s=12.0,
    sure_confidence=0.0,
)


class Recorder:
    """Trackers that put on the timeline whatever they get."""

    def __init__(self, next_row: int = 0) -> None:
        self._next_row = next_row

    def snapshot(self) -> int:
        """The next row of sound scores."""
        return self._next_row

    def push(self, found: SoundScores | EmotionEstimate) -> list[Message]:
        """Rows once each, without a gap; every emotion."""
        if isinstance(found, EmotionEstimate):
            at = (found.start, found.end)
            return [EmotionUpdate(found.label or "", {}, None, None, None, *at)]
        assert found.start <= self._next_row, (found.start, self._next_row)
        n_known = (self._next_row - found.start) // SOUND_FRAME
        rows: list[Message] = []
        for score in found.scores[n_known:]:
            rows.append(EventStarted("", str(score), 1.0, self._next_row, 0))
            self._next_row += SOUND_FRAME
        return rows

    def named(self, events: SoundEvents) -> list[Message]:
        """Every event."""
        return [EventEnded("", e.label, e.score, e.start, e.end) for e in events.events]

    def final(self, start: int, end: int) -> list[Message]:
        """Nothing: what was pushed last is not repeated."""
        return []

    def finish(self, end: int) -> list[Message]:
        """Nothing."""
        return []

    def speech_started(self, edge: int) -> None:
        """Nothing."""


def make_feed(
    number: int, script: Script, max_ahead: int, saved: bytes | None = None, language: str | None = "en"
) -> Feed:
    """A feed with trackers that record; of a new stream, or one that continues from a saved state."""
    if saved is None:
        timeline = Timeline(CONFIG, Recorder(), Recorder())
        return Feed(
            number, timeline, language=language, ring=len(script.pcm), max_ahead=max_ahead, max_step=MAX_STEP
        )
    state = msgspec.msgpack.decode(saved, type=FeedState)
    timeline = Timeline(CONFIG, Recorder(state.timeline.sounds), Recorder(), state.timeline)
    audio = script.pcm[state.ring_start : state.ring_end]
    return Feed(
        number,
        timeline,
        ring=len(script.pcm),
        max_ahead=max_ahead,
        max_step=MAX_STEP,
        state=state,
        audio=audio,
    )


@dataclass
class Stream:
    """A script on its way through a feed, and what came of it."""

    number: int
    script: Script
    feed: Feed
    n_arrived: int = 0  # marks the server has
    needed_from: int = 0  # what the engine said last
    asked: list[tuple[PointKind, Asked]] = field(default_factory=list)
    answered: list[tuple[int, PointKind]] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def committed(self) -> list[str]:
        """The words on the timeline."""
        return [w.text for m in self.messages if isinstance(m, TranscriptDelta) for w in m.words]

    @property
    def arrived(self) -> int:
        """Samples the server has."""
        return self.feed.n_samples

    @property
    def consumed(self) -> int:
        """Samples that the engine has decided."""
        return self.feed.undecided[0]

    @property
    def is_done(self) -> bool:
        """Whether everything has arrived and every mark is answered."""
        return self.arrived == len(self.script.pcm) and not self.feed.n_pending

    def arrive(self, n_samples: int, *, holds_flush: bool) -> None:
        """Samples and marks come to the server."""
        end = min(len(self.script.pcm), self.arrived + n_samples)
        for mark in self.script.marks[self.n_arrived :]:
            is_held = holds_flush and n_samples and mark.kind == "flush" and mark.at == end
            if mark.at > end or is_held:
                break
            self.n_arrived += 1
            pcm = self.script.pcm[self.arrived : mark.at]
            if mark.kind in ("speech_start", "speech_stop"):
                self.messages += self.feed.push(pcm, (mark,))
                continue
            self.messages += self.feed.push(pcm, ())
            if mark.kind == "flush":
                self.feed.flush("f")
            else:
                self.feed.ask(Ask("q", mark.question, ASKED_ABOUT_S * 1000))
        self.messages += self.feed.push(self.script.pcm[self.arrived : end], ())


class World:
    """Streams and an engine that runs in steps, may be restarted, and may have a clock."""

    def __init__(
        self,
        n_slots: int = 8,
        *,
        shed_after_s: float = 0.0,
        tasks: TaskSchedule = TRANSCRIPT_ONLY,
        max_ahead: int = 1_000_000_000,
    ) -> None:
        self.now_s = 0.0
        self._tasks = tasks
        self._n_slots, self._shed_after_s = n_slots, shed_after_s
        self._max_ahead = max_ahead
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
            tasks=self._tasks,
        )
        return scheduler, FakeRunner(self._tasks)

    def open(self, number: int, script: Script) -> Stream:
        """A new stream."""
        if not self._tasks.events_ticks:
            script = script.without_questions()
        language = None if self._tasks.language_ticks else "en"
        stream = Stream(number, script, make_feed(number, script, self._max_ahead, language=language))
        stream.feed.reopen()
        self._send(stream)
        self.streams[number] = stream
        return stream

    def close(self, number: int) -> None:
        """A stream leaves."""
        slot_idx = self.scheduler.close(number)
        assert slot_idx is not None
        self.runner.reset([slot_idx])
        del self.streams[number]

    def arrive(self, stream: Stream, n_samples: int, *, holds_flush: bool = False) -> None:
        """Samples and marks come to the server and go on to the engine.

        A flush at the newest sample may come with the audio or, `holds_flush`, on its own later.
        """
        stream.arrive(n_samples, holds_flush=holds_flush)
        self._send(stream)

    def _send(self, stream: Stream) -> None:
        for message in stream.feed.outgoing():
            match message:
                case Open():
                    self.scheduler.open(message)
                case Audio():
                    self.scheduler.push(message)
                case Commit():
                    self.scheduler.commit(message)
                case _:
                    raise AssertionError(message)

    def tick(self) -> bool:
        """One turn of the engine's loop; whether anything was due."""
        schedule = self.scheduler.schedule()
        said: tuple[messages.FromEngine, ...] = (*schedule.skipped, *schedule.progress, *schedule.results)
        self.outbox += [(message, None) for message in said]
        if schedule.plan.slots:
            answers = self.runner.step(schedule.plan)
            for result in self.scheduler.apply(schedule, answers, 0.0):
                has_words = (
                    result.kind not in ("idle_tick", "ask")
                    and self.runner.asked_at(result.stream) == result.point
                )
                self.outbox.append((result, self.runner.asked[result.stream] if has_words else None))
        return bool(schedule.plan.slots or schedule.results)

    def take(self, n_messages: int = 1_000_000) -> None:
        """The server reads what the engine said, and answers."""
        for _ in range(min(n_messages, len(self.outbox))):
            message, asked = self.outbox.popleft()
            assert isinstance(message, Result | Progress | Skipped), message
            stream = self.streams.get(message.stream)
            if stream is None:
                continue
            match message:
                case Result():
                    stream.answered.append((message.point, message.kind))
                    if asked is not None:
                        stream.asked.append((message.kind, asked))
                case Progress():
                    assert stream.needed_from <= message.needed_from <= message.consumed
                    stream.needed_from = message.needed_from
                case Skipped():
                    stream.skipped.append(message)
            stream.messages += stream.feed.take(message)
            self._send(stream)

    def crash(self) -> None:
        """The engine dies with everything it has not said; the next one gets the streams."""
        self.outbox.clear()
        self.scheduler, self.runner = self._new_engine()
        for stream in self.streams.values():
            stream.feed.engine_died()
            assert not list(stream.feed.outgoing())
            stream.feed.reopen()
            self._send(stream)

    def restart(self) -> None:
        """The server dies, and the engine with it; the next one goes by what was saved."""
        for stream in self.streams.values():
            saved = msgspec.msgpack.encode(stream.feed.snapshot())
            stream.feed = make_feed(stream.number, stream.script, self._max_ahead, saved)
        self.crash()

    def finish(self, *numbers: int) -> None:
        """Whatever has not arrived does, and everything is answered."""
        for number in numbers:
            self.arrive(self.streams[number], 1_000_000_000)
        while self.tick() or self.outbox:
            self.take()
        for number in numbers:
            assert self.streams[number].is_done, self.streams[number]


def alone(script: Script, tasks: TaskSchedule = TRANSCRIPT_ONLY) -> Stream:
    """The script heard by an engine of its own, all at once."""
    world = World(1, tasks=tasks)
    stream = world.open(1, script)
    world.finish(1)
    return stream


def act(world: World, stream: Stream, action: str, n: int, *, holds_flush: bool = False) -> None:
    """Do one of the things that can happen next."""
    match action:
        case "arrive":
            world.arrive(stream, n, holds_flush=holds_flush)
        case "tick":
            world.tick()
        case "take":
            world.take(n)
        case "crash":
            world.crash()
        case "restart":
            world.restart()
        case _:
            raise AssertionError(action)


def assert_same(ours: Stream, theirs: Stream) -> None:
    """The same questions were asked, answered and committed.

    Sounds of the silence before may be found before or after speech is known to have begun: how fast
    the engine is decides their order, and nothing else.
    """
    assert ours.answered == theirs.answered
    assert ours.asked == theirs.asked
    for kinds in (SpeechStarted, (EventStarted, EventEnded)):
        left_out = [[m for m in stream.messages if not isinstance(m, kinds)] for stream in (ours, theirs)]
        assert left_out[0] == left_out[1]


def numbers_of(words: list[str]) -> list[int]:
    """The words' numbers, whole or not."""
    return [int(re.findall(r"\d+", word)[0]) for word in words]


def rows_of(stream: Stream) -> list[int]:
    """Which rows of sound scores came, by position."""
    return [m.start_ms for m in stream.messages if isinstance(m, EventStarted)]


def send(world: World, stream: Stream, end: int) -> None:
    """Everything up to `end`, in messages of a second at most, as a session sends it."""
    end = min(end, len(stream.script.pcm))
    while stream.arrived < end:
        world.arrive(stream, min(SECOND, end - stream.arrived))


def live(world: World, stream: Stream, step_s: float, lead_s: float = 0.0) -> float:
    """Send at the pace of speech, `lead_s` ahead of it, to an engine that needs `step_s` a step.

    Returns how far behind the engine was at worst, in seconds of audio that had come.
    """
    worst = 0
    start_s = world.now_s
    while not stream.is_done:
        send(world, stream, int((world.now_s - start_s + lead_s) * SECOND))
        worst = max(worst, stream.arrived - stream.consumed)
        worked = world.tick()
        world.now_s += step_s if worked else 0.02
        world.take()
    return worst / SECOND
