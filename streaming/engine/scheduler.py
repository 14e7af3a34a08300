"""Decides what is due, on the sample clock. Touches no tensor.

A stream is decoded at points of a fixed grid while somebody speaks, and at every mark (speech
stopped, flush, question). After each decode the timeline says how many words it commits, and the
stream waits for that: so what is decoded depends on samples alone, not on how fast anything came.
Where a model is asked for more than words it hears all audio without a gap, and the points of a
slower grid go on while nobody speaks.

The window of a stream is the audio a decode looks at. It grows with the stream and is cut at a
pause between committed words before it gets too long; a new window starts where speech begins
after a long silence.

A stream's sample cursors, from the oldest audio to the newest:

    answered, given, window_start <= consumed <= received

    answered      the timeline has committed what was found before it
    given         the runner has the audio before it; after a restart it is back at `start`
    window_start  the next decode looks at the audio from it on
    consumed      all decode points before it are decided
    received      the server sent the audio before it
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from streaming.config import EmotionConfig, EventsConfig, TranscriptConfig
from streaming.engine.contract import (
    Capabilities,
    Fork,
    HeardWord,
    Hypothesis,
    Pcm,
    SlotStep,
    StepPlan,
    StepResult,
    Task,
)
from streaming.engine.findings import Findings, by_slot
from streaming.engine.messages import (
    MAX_CONTEXT_CHARS,
    Audio,
    Commit,
    Configure,
    Mark,
    Open,
    PointKind,
    Progress,
    Result,
    Skipped,
)
from streaming.protocol import SAMPLE_RATE_HZ
from streaming.text import ends_sentence, join_words

GRID = 320  # samples; windows begin on the encoder's 20 ms grid
MARGIN = 480  # samples before a window that its first mel frames look at, rounded up to hops
START_DELAY = 3 * SAMPLE_RATE_HZ  # from a beginning of speech to its mark, at most: vad.start_ms + pad_ms
MIN_SPEECH = SAMPLE_RATE_HZ * 2 // 5  # a tick needs this much speech: less is guessed at
SETTLE_AUDIO = 3 * SAMPLE_RATE_HZ  # a detected language stays once so much of it was heard
SETTLE_SCORE = 0.5
# Speech after the last committed word in which a word must have been heard: at a tick the model may
# yet find it, when speech has stopped it is the last chance.
LOST_AT_TICK = 3 * SAMPLE_RATE_HZ
LOST_AT_STOP = SAMPLE_RATE_HZ * 3 // 5
LONGEST_WINDOW_S = 29.0  # a window may grow to this while nothing in it is committed
EXTRA_TOKENS = 8  # of a transcript's budget, whatever the length of its audio
EVENTS_TOKENS = 160  # ten lines
EMOTION_TOKENS = 256  # thirteen phrases
# Scores of sounds come up to 0.8 s late and look back 2.5 s: what a restart hears again for them.
SOUND_REACH = 4 * SAMPLE_RATE_HZ
EMOTION_WINDOW = 4 * SAMPLE_RATE_HZ  # speech that an emotion is read from, at most ...
MIN_EMOTION = SAMPLE_RATE_HZ * 4 // 5  # ... and at least


@dataclass(frozen=True, slots=True)
class Listening:
    """What a model is asked for beside words, in ticks of the grid; 0: it is not."""

    sound_ticks: int = 0  # between points while nobody speaks; 0: what is no speech is not heard
    events_ticks: int = 0  # between `events` forks
    emotion_ticks: int = 0  # between `emotion` forks while somebody speaks
    reach: int = SOUND_REACH  # samples before the last answer that a restart hears again for sounds
    answer_tokens: int = 0  # budget of an answer to a question, its thinking included

    def max_step(self, tick: int) -> int:
        """Samples between two decode points of a stream at most, with `tick` samples between ticks."""
        return max(MIN_SPEECH + tick, self.sound_ticks * tick)

    @classmethod
    def to(
        cls, capabilities: Capabilities, events: EventsConfig, emotion: EmotionConfig, tick: int
    ) -> Listening:
        """What is wanted of what a model can do; `tick` in samples."""

        def ticks(seconds: float) -> int:
            return max(1, round(seconds * SAMPLE_RATE_HZ / tick))

        wants_events = events.enabled and "events" in capabilities.tasks
        wants_emotion = emotion.enabled and "emotion" in capabilities.tasks
        # A question may be about anything that sounded, so what answers questions hears everything.
        hears_all = wants_events or "answer" in capabilities.tasks
        events_ticks = ticks(capabilities.events_every_s)
        # What names sounds or answers questions does so from its memory, which a restart must fill.
        window_s = min(capabilities.max_window_s, LONGEST_WINDOW_S)
        return cls(
            sound_ticks=events_ticks if hears_all else 0,
            events_ticks=events_ticks if wants_events and not capabilities.sounds else 0,
            emotion_ticks=ticks(emotion.interval_s) if wants_emotion else 0,
            reach=SOUND_REACH if capabilities.sounds or not hears_all else int(window_s * SAMPLE_RATE_HZ),
            answer_tokens=capabilities.answer_tokens if "answer" in capabilities.tasks else 0,
        )


WORDS_ALONE = Listening()


class EngineFull(RuntimeError):
    """More streams than slots; the server admits no more than there are."""


@dataclass(slots=True)
class _Point:
    """A decode point: where, and what asked for it."""

    at: int
    kind: PointKind
    since: int = 0  # of a tick or sound point: what slower grids hold after this is due here
    asked: Mark | None = None  # the question
    is_retry: bool = False  # its words are decoded again, in a shorter window, and nothing else


@dataclass(slots=True)
class _Stream:
    """What the scheduler knows of one stream. Positions are samples on its clock."""

    number: int
    slot_idx: int
    language: str | None  # set by the client, or detected and settled
    due: float  # on the scheduler's clock: when `received` came, or would have at the pace of speech
    start: int  # audio before this never came
    received: int
    consumed: int  # everything before this is decided
    answered: int  # ... and the timeline has what was found before this
    given: int  # the runner has the audio before this
    window_start: int
    committed: deque[HeardWord]  # words inside the window
    context: str
    is_speech: bool
    speech_edge: int
    last_stop: int  # where speech last ended; the window may go on if it begins again soon
    pieces: deque[tuple[int, Pcm]] = field(default_factory=deque)  # audio the runner has not got
    marks: deque[Mark] = field(default_factory=deque)
    arrivals: deque[tuple[int, float]] = field(default_factory=deque)  # end of an audio message, `due` there
    awaiting: _Point | None = None
    hypothesis: tuple[HeardWord, ...] = ()  # of the awaited point
    findings: Findings = field(default_factory=Findings)  # of a point that is decoded again
    next_language: Configure | None = None  # takes effect at the first point after its position
    retry: _Point | None = None  # decode this point again, in a shorter window
    speech_end: int = 0  # at a `stopped` point: where speech ended
    reported: int = 0  # `consumed` as the server knows it


@dataclass(frozen=True, slots=True)
class Schedule:
    """What is due now."""

    plan: StepPlan
    results: tuple[Result, ...]  # points that need no model
    skipped: tuple[Skipped, ...]
    progress: tuple[Progress, ...]


class Scheduler:
    """Streams, their windows and their decode points."""

    def __init__(
        self,
        config: TranscriptConfig,
        *,
        n_slots: int,
        tick: int,
        shed_after_s: float,
        clock: Callable[[], float],
        longest_window_s: float = LONGEST_WINDOW_S,
        listening: Listening = WORDS_ALONE,
    ) -> None:
        """Nothing is open.

        Args:
            config: When windows are cut.
            n_slots: Streams at once.
            tick: Samples between decode points.
            shed_after_s: Wall-clock seconds a live stream may be behind before points are left out; 0: never.
            clock: Seconds, monotonic. Only shedding looks at it.
            longest_window_s: What the model can look at.
            listening: What is wanted beside words.
        """
        self._config = config
        self._tick = tick
        self._shed_after_s = shed_after_s
        self._clock = clock
        self._listening = listening
        self._longest_window = int(min(longest_window_s, LONGEST_WINDOW_S) * SAMPLE_RATE_HZ)
        self._window = min(int(config.window_s * SAMPLE_RATE_HZ), self._longest_window)
        self._join_gap = int(config.join_gap_s * SAMPLE_RATE_HZ)
        self._streams: dict[int, _Stream] = {}
        self._free = list(range(n_slots - 1, -1, -1))

    @property
    def n_streams(self) -> int:
        """Open streams."""
        return len(self._streams)

    def open(self, message: Open) -> None:
        """Give a stream a slot.

        Raises:
            EngineFull: no slot is free.
        """
        if not self._free:
            raise EngineFull(f"stream {message.stream}: all {len(self._streams)} slots are taken")
        self._streams[message.stream] = _Stream(
            number=message.stream,
            slot_idx=self._free.pop(),
            language=message.language,
            due=self._clock() - (message.consumed - message.start) / SAMPLE_RATE_HZ,
            start=message.start,
            received=message.start,
            consumed=message.consumed,
            answered=message.consumed,
            given=message.start,
            window_start=message.window_start,
            committed=deque(message.committed),
            context=message.context,
            is_speech=message.is_speech,
            speech_edge=message.speech_edge,
            last_stop=message.last_stop,
            reported=message.consumed,
        )

    def close(self, number: int) -> int | None:
        """Forget a stream; its slot, which the runner must reset, or None if it is not open."""
        stream = self._streams.pop(number, None)
        if stream is None:
            return None
        self._free.append(stream.slot_idx)
        return stream.slot_idx

    def configure(self, message: Configure) -> None:
        """Change a stream's language from a position on."""
        if stream := self._streams.get(message.stream):
            stream.next_language = message

    def push(self, message: Audio) -> None:
        """Take audio and the marks inside it. Of a stream that is closed: nothing."""
        stream = self._streams.get(message.stream)
        if stream is None:
            return
        assert message.start == stream.received, (message.start, stream.received)
        pcm: Pcm = np.frombuffer(message.pcm, dtype="<f4")
        if len(pcm):
            stream.pieces.append((message.start, pcm))
            stream.received += len(pcm)
            stream.due = max(self._clock(), stream.due + len(pcm) / SAMPLE_RATE_HZ)
            stream.arrivals.append((stream.received, stream.due))
        stream.marks.extend(message.marks)

    def commit(self, message: Commit) -> None:
        """Take the timeline's answer to a result; the stream may go on."""
        stream = self._streams.get(message.stream)
        if stream is None:
            return
        point = stream.awaiting
        assert point is not None, (message.point, message.kind)
        expected = (point.at, point.kind)
        assert expected == (message.point, message.kind), (expected, message.point, message.kind)
        stream.committed.extend(stream.hypothesis[: message.n_words])
        stream.hypothesis = ()
        stream.awaiting = None
        stream.answered = point.at
        if point.kind == "stopped":
            stream.is_speech = False

    def schedule(self) -> Schedule:
        """Everything that is due, at most one point of each stream."""
        steps: list[SlotStep] = []
        results: list[Result] = []
        skipped: list[Skipped] = []
        for stream in self._streams.values():
            if stream.awaiting is not None:
                continue
            point, stream.retry = stream.retry, None
            if point is None:
                point, left_out = self._next_point(stream)
                if left_out is not None:
                    skipped.append(left_out)
            if point is None:
                continue
            stream.awaiting = point
            forks = self._forks(stream, point)
            if not forks and not self._listening.sound_ticks:  # a mark with nothing open
                results.append(_result(stream, point, None, Findings(), 0.0))
                continue
            start, pcm = self._take(stream, point.at)
            steps.append(SlotStep(stream.slot_idx, stream.number, start, pcm, forks))
        progress = [p for stream in self._streams.values() if (p := self._progress(stream)) is not None]
        return Schedule(StepPlan(tuple(steps)), tuple(results), tuple(skipped), tuple(progress))

    def apply(self, schedule: Schedule, result: StepResult, compute_s: float) -> list[Result]:
        """The results of a schedule's plan; each stream now waits for its `Commit`."""
        results = []
        for step, (hypothesis, findings) in zip(
            schedule.plan.slots, by_slot(schedule.plan, result), strict=True
        ):
            stream = self._streams.get(step.owner)
            if stream is None:
                continue  # the slot changed hands meanwhile
            point = stream.awaiting
            assert point is not None, step.owner
            stream.findings = findings.or_else(stream.findings)
            if hypothesis is not None:
                stream.hypothesis = _words_after(stream, hypothesis)
                if _lost_its_place(stream, point.at, point.kind):
                    # A step of the grid further: else a very short last word would stay in it, for ever.
                    self._move_window(stream, stream.committed[-1].end + GRID)
                    point.is_retry = True
                    stream.awaiting, stream.retry = None, point
                    continue
                _settle_language(stream, point.at, hypothesis)
            results.append(_result(stream, point, hypothesis, stream.findings, compute_s))
            stream.findings = Findings()
        return results

    def _next_point(self, stream: _Stream) -> tuple[_Point | None, Skipped | None]:
        """Go on to the stream's next decode point if its audio is there; `consumed` moves with it."""
        while True:
            mark = stream.marks[0] if stream.marks else None
            point, left_out = self._next_on_grid(stream, mark)
            if point is not None:
                stream.consumed = point.at
                return point, left_out
            if mark is None or mark.kind != "started":
                break
            stream.marks.popleft()
            self._begin_speech(stream, mark)
            stream.consumed = max(stream.consumed, mark.at)
        if mark is not None:
            assert mark.kind != "started", mark.at
            stream.marks.popleft()
            stream.consumed = max(stream.consumed, mark.at)
            if mark.kind == "stopped":
                stream.last_stop = stream.speech_end = mark.edge
            return _Point(mark.at, mark.kind, asked=mark if mark.kind == "ask" else None), None
        if not stream.is_speech and not self._listening.sound_ticks:
            stream.consumed = max(stream.consumed, stream.received)
            self._drop_silence(stream)
        stream.due = min(stream.due, self._clock())  # caught up: no lead is owed to what comes next
        return None, None

    def _next_on_grid(self, stream: _Stream, mark: Mark | None) -> tuple[_Point | None, Skipped | None]:
        """The next tick or sound point, if it lies before the next mark and its audio is there."""
        last = stream.received
        if mark is not None:  # a start or stop is decided instead of a point at its sample, others after it
            last = min(last, mark.at - 1 if mark.kind in ("started", "stopped") else mark.at)
        kind: PointKind
        if stream.is_speech:
            kind, step = "tick", self._tick
            first = max(stream.consumed, stream.speech_edge + MIN_SPEECH - 1)
        elif self._listening.sound_ticks:
            kind, step = "sound", self._tick * self._listening.sound_ticks
            first = stream.consumed
        else:
            return None, None
        at = (first // step + 1) * step
        if at > last:
            return None, None
        newest = last // step * step
        if newest == at or not self._is_late(stream, at):
            return _Point(at, kind, at - step), None
        # Sounds that are scored row by row lose nothing by it: the rows come with the newer point.
        gives_up = kind == "tick" or self._listening.events_ticks
        left_out = Skipped(stream.number, at, newest, (newest - at) // step) if gives_up else None
        return _Point(newest, kind, at - step), left_out

    def _begin_speech(self, stream: _Stream, mark: Mark) -> None:
        """Speech began: go on with the window after a short pause, else start a new one."""
        stream.is_speech = True
        stream.speech_edge = mark.edge
        if mark.edge - stream.last_stop > self._join_gap:
            edge = max(mark.edge, stream.committed[-1].end if stream.committed else 0)
            self._move_window(stream, edge)

    def _cut_window(self, stream: _Stream, at: int) -> None:
        """Shorten a window that got too long, at the best pause between committed words."""
        if at - stream.window_start <= self._window:
            return
        words = list(stream.committed)
        oldest = at - self._window * 2 // 3  # cut here at the latest ...
        newest = at - self._window // 4  # ... and keep this much to look back on
        best, best_score = None, -1.0
        for before, after in itertools.pairwise(words):
            cut = (before.end + after.start) // 2
            if oldest <= cut <= newest:
                gap_s = (after.start - before.end) / SAMPLE_RATE_HZ
                score = gap_s + (1.0 if ends_sentence(before.text) else 0.0)
                if score > best_score:
                    best, best_score = cut, score
        if best is None:
            # No pause there. What is not committed must stay in the window, up to what a model can
            # look at; beyond that the oldest is given up.
            last = words[-1].end if words else stream.window_start
            best = max(min(last, newest), at - self._longest_window)
        self._move_window(stream, best)

    def _move_window(self, stream: _Stream, start: int) -> None:
        """Begin the window at `start`; committed words before it become context."""
        stream.window_start = max(stream.start, start // GRID * GRID)
        gone = []
        while stream.committed and stream.committed[0].middle < stream.window_start:
            gone.append(stream.committed.popleft().text)
        stream.context = join_words([stream.context, *gone] if stream.context else gone)[-MAX_CONTEXT_CHARS:]

    def _forks(self, stream: _Stream, point: _Point) -> tuple[Fork, ...]:
        """What is asked at a point: words first, for an emotion is read from the same encoding."""
        forks = []
        if stream.is_speech and point.kind in ("tick", "stopped", "flush"):
            if stream.next_language is not None and point.at > stream.next_language.at:
                stream.language, stream.next_language = stream.next_language.language, None
            self._cut_window(stream, point.at)
            forks.append(self._transcript(stream, point.at))
            if point.is_retry:
                return tuple(forks)
            heard_to = stream.speech_end if point.kind == "stopped" else point.at
            if (
                self._is_due(self._listening.emotion_ticks, point)
                and heard_to - stream.speech_edge >= MIN_EMOTION
            ):
                start = max(stream.window_start, stream.speech_edge, heard_to - EMOTION_WINDOW)
                forks.append(_plain_fork("emotion", start, EMOTION_TOKENS))
        if point.kind != "stopped" and self._is_due(self._listening.events_ticks, point):
            start = max(stream.start, point.at - self._longest_window)
            forks.append(_plain_fork("events", start, EVENTS_TOKENS))
        if point.asked is not None:
            start = max(stream.start, min(point.asked.edge, point.at))
            forks.append(_plain_fork("answer", start, self._listening.answer_tokens, point.asked.question))
        return tuple(forks)

    def _is_due(self, n_ticks: int, point: _Point) -> bool:
        """Whether a point lies on a grid of `n_ticks`, left-out points included; marks but questions do."""
        if not n_ticks or point.kind == "ask":
            return False
        step = n_ticks * self._tick
        return point.kind not in ("tick", "sound") or point.at // step > point.since // step

    def _transcript(self, stream: _Stream, at: int) -> Fork:
        last = stream.committed[-1].end if stream.committed else stream.window_start
        open_s = max(0, at - last) / SAMPLE_RATE_HZ
        return Fork(
            task="transcript",
            window_start=stream.window_start,
            prefix=tuple(stream.committed),
            context=stream.context if self._config.use_context else "",
            language=stream.language,
            max_tokens=EXTRA_TOKENS + int(open_s * self._config.max_tokens_per_s),
        )

    def _take(self, stream: _Stream, end: int) -> tuple[int, Pcm]:
        """Audio from where the runner is, or from where the window needs it, to `end`."""
        start = max(stream.given, stream.start)
        if not self._listening.sound_ticks:
            start = max(start, stream.window_start - MARGIN)
        taken: list[Pcm] = []
        while stream.pieces and stream.pieces[0][0] < end:
            at, pcm = stream.pieces.popleft()
            if at + len(pcm) > end:
                stream.pieces.appendleft((end, pcm[end - at :]))
                pcm = pcm[: end - at]
            if at + len(pcm) > start:
                taken.append(pcm[max(0, start - at) :])
        stream.given = end
        while stream.arrivals and stream.arrivals[0][0] < end:
            stream.arrivals.popleft()
        pcm = np.concatenate(taken) if taken else np.empty(0, dtype=np.float32)
        assert len(pcm) == end - start, (len(pcm), start, end)
        return start, pcm

    def _needed_from(self, stream: _Stream) -> int:
        """A restart, or the next window, needs the audio from here on."""
        needed = (stream.consumed - START_DELAY) // GRID * GRID - MARGIN
        if self._listening.sound_ticks:
            # From the last answer on: what was found since is lost with the engine, however far it went.
            needed = min(needed, (stream.answered - self._listening.reach) // GRID * GRID)
        if stream.is_speech or stream.consumed - stream.last_stop <= self._join_gap + START_DELAY:
            needed = min(needed, stream.window_start - MARGIN)
        return max(stream.start, needed)

    def _drop_silence(self, stream: _Stream) -> None:
        """Forget audio nobody will look at: of a long silence only the last seconds are kept."""
        needed = self._needed_from(stream)
        while stream.pieces and stream.pieces[0][0] + len(stream.pieces[0][1]) <= needed:
            stream.pieces.popleft()
        while stream.arrivals and stream.arrivals[0][0] < stream.consumed:
            stream.arrivals.popleft()

    def _is_late(self, stream: _Stream, at: int) -> bool:
        """Whether a live stream is further behind than it may be.

        A client that sends faster than real time is not behind just because its audio has to wait:
        lateness counts from when the sample would have come at the pace of speech, or did come.
        """
        if not self._shed_after_s:
            return False
        now = self._clock()
        due = next((due for end, due in stream.arrivals if end >= at), now)
        return now - due > self._shed_after_s

    def _progress(self, stream: _Stream) -> Progress | None:
        consumed = stream.consumed
        if stream.awaiting is not None and stream.awaiting.kind in ("tick", "sound"):
            consumed -= 1  # not answered yet: after a crash it is due again
        if consumed - stream.reported < SAMPLE_RATE_HZ // 2:
            return None
        stream.reported = consumed
        return Progress(stream.number, consumed, self._needed_from(stream), stream.window_start)


def _plain_fork(task: Task, window_start: int, max_tokens: int, question: str = "") -> Fork:
    """A fork that goes on from nothing."""
    return Fork(task, window_start, (), "", None, max_tokens, question)


def _result(
    stream: _Stream, point: _Point, hypothesis: Hypothesis | None, findings: Findings, compute_s: float
) -> Result:
    """What is told of a point; with no words where none were asked for."""
    return Result(
        stream=stream.number,
        point=point.at,
        kind=point.kind,
        words=stream.hypothesis,
        stable_end=point.at if hypothesis is None else hypothesis.stable_end,
        language=stream.language if hypothesis is None else hypothesis.language,
        no_speech=0.0 if hypothesis is None else hypothesis.no_speech,
        n_loops_cut=0 if hypothesis is None else hypothesis.n_loops_cut,
        compute_s=compute_s,
        window_start=stream.window_start,
        settled_language=stream.language,
        sounds=findings.sounds,
        events=findings.events,
        emotion=findings.emotion,
        answer=findings.answer,
    )


def _settle_language(stream: _Stream, at: int, hypothesis: Hypothesis) -> None:
    """Stay with a detected language once it is sure and enough was heard."""
    if (
        stream.language is None
        and hypothesis.language_score >= SETTLE_SCORE
        and at - stream.window_start >= SETTLE_AUDIO
        and hypothesis.words
    ):
        stream.language = hypothesis.language


def _lost_its_place(stream: _Stream, at: int, kind: PointKind) -> bool:
    """Whether the model took the text for finished while speech went on.

    Whisper does that after a pause inside a long window, and then stays silent. In a window that
    begins after the committed words it hears again; so this is true once at most for a point.
    """
    if stream.hypothesis or not stream.committed:
        return False
    begin = max(stream.committed[-1].end, stream.speech_edge)
    if kind == "stopped":
        return stream.speech_end - begin >= LOST_AT_STOP
    return at - begin >= LOST_AT_TICK


def _words_after(stream: _Stream, hypothesis: Hypothesis) -> tuple[HeardWord, ...]:
    """The hypothesis' words, none of them before what is committed or before anybody spoke.

    What a model hears after a pause it likes to begin inside the pause: endpointing knows better.
    """
    floor = max(stream.window_start, stream.speech_edge)
    if stream.committed:
        floor = max(floor, stream.committed[-1].end)
    words: list[HeardWord] = []
    for word in hypothesis.words:
        start = max(word.start, floor)
        words.append(HeardWord(word.text, start, max(word.end, start), word.score))
        floor = start
    return tuple(words)
