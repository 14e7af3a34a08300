"""Decides what is due, on the sample clock. Touches no tensor.

A stream is decoded at points of a fixed grid while somebody speaks, and at every mark (speech
stopped, flush, question). After each decode the timeline says how many words it commits, and the
stream waits for that: so what is decoded depends on samples alone, not on how fast anything came.
Where a model is asked for more than words it hears all audio without a gap, and the points of a
slower grid go on while nobody speaks.

The window of a stream is the audio a decode looks at. It grows with the stream and is cut at a
pause between committed words before it gets too long; a new window starts where speech begins
after a long silence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from streaming.config import TranscriptConfig
from streaming.engine.contract import (
    Findings,
    Fork,
    Hypothesis,
    Pcm,
    SlotResult,
    SlotStep,
    StepPlan,
    Task,
)
from streaming.engine.language import decoded_in, held_from, span_of
from streaming.engine.messages import (
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
from streaming.engine.stream_state import (
    GRID,
    MARGIN,
    Point,
    Stream,
    follow_language,
    has_lost_its_place,
    words_after,
)
from streaming.engine.task_schedule import (
    LONGEST_WINDOW_S,
    MIN_SPEECH,
    REPORT_STEP,
    TRANSCRIPT_ONLY,
    TaskSchedule,
)
from streaming.protocol import SAMPLE_RATE_HZ

START_DELAY = 3 * SAMPLE_RATE_HZ  # from a beginning of speech to its mark, at most: vad.start_ms + pad_ms
EXTRA_TOKENS = 8  # of a transcript's budget, whatever the length of its audio
EVENTS_TOKENS = 160  # ten lines
EMOTION_TOKENS = 256  # thirteen phrases
EMOTION_WINDOW = 4 * SAMPLE_RATE_HZ  # speech that an emotion is read from, at most ...
MIN_EMOTION = SAMPLE_RATE_HZ * 4 // 5  # ... and at least


class EngineFull(RuntimeError):
    """More streams than slots; the server admits no more than there are."""


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
        tasks: TaskSchedule = TRANSCRIPT_ONLY,
    ) -> None:
        """Nothing is open.

        Args:
            config: When windows are cut.
            n_slots: Streams at once.
            tick: Samples between decode points.
            shed_after_s: Wall-clock seconds a live stream may be behind before points are left out; 0: never.
            clock: Seconds, monotonic. Only shedding looks at it.
            longest_window_s: What the model can look at.
            tasks: What is wanted beside words.
        """
        self._config = config
        self._tick = tick
        self._shed_after_s = shed_after_s
        self._clock = clock
        self._tasks = tasks
        self._longest_window = int(min(longest_window_s, LONGEST_WINDOW_S) * SAMPLE_RATE_HZ)
        self._window = min(int(config.window_s * SAMPLE_RATE_HZ), self._longest_window)
        self._join_gap = int(config.join_gap_s * SAMPLE_RATE_HZ)
        self._streams: dict[int, Stream] = {}
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
        due = self._clock() - (message.consumed - message.start) / SAMPLE_RATE_HZ
        self._streams[message.stream] = Stream.opened(message, self._free.pop(), due)

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
        stream.commit(message.n_words, message.unsaid)
        stream.awaiting = None
        stream.answered = point.at
        if point.kind == "speech_stop":
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
            if not forks and not self._tasks.sound_ticks:  # a mark with nothing open
                results.append(_result(stream, point, None, Findings(), 0.0))
                continue
            start, pcm = stream.take(point.at, is_gapless=bool(self._tasks.sound_ticks))
            steps.append(SlotStep(stream.slot_idx, stream.number, start, pcm, forks))
        progress = [p for stream in self._streams.values() if (p := self._progress(stream)) is not None]
        return Schedule(StepPlan(tuple(steps)), tuple(results), tuple(skipped), tuple(progress))

    def apply(self, schedule: Schedule, found: Sequence[SlotResult], compute_s: float) -> list[Result]:
        """The results of a schedule's plan; each stream now waits for its `Commit`."""
        results = []
        for step, slot in zip(schedule.plan.slots, found, strict=True):
            stream = self._streams.get(step.owner)
            if stream is None:
                continue  # the slot changed hands meanwhile
            point = stream.awaiting
            assert point is not None, step.owner
            stream.found = slot.found.or_else(stream.found)
            hypothesis = slot.hypothesis
            if hypothesis is not None:
                stream.hypothesis = (*stream.before, *words_after(stream, hypothesis))
                if hypothesis.estimate is not None and follow_language(stream, point.at, hypothesis):
                    point.is_retry = True
                    stream.awaiting, stream.retry = None, point
                    continue
                if has_lost_its_place(stream, point.at, point.kind):
                    # A step of the grid further: else a very short last word would stay in it, for ever.
                    stream.move_window(stream.committed[-1].end + GRID)
                    point.is_retry = True
                    stream.awaiting, stream.retry = None, point
                    continue
            results.append(_result(stream, point, hypothesis, stream.found, compute_s))
            stream.found = Findings()
        return results

    def _next_point(self, stream: Stream) -> tuple[Point | None, Skipped | None]:
        """Go on to the stream's next decode point if its audio is there; `consumed` moves with it."""
        while True:
            mark = stream.marks[0] if stream.marks else None
            point, left_out = self._next_on_grid(stream, mark)
            if point is not None:
                stream.consumed = point.at
                return point, left_out
            if mark is None or mark.kind != "speech_start":
                break
            stream.marks.popleft()
            self._begin_speech(stream, mark)
            stream.consumed = max(stream.consumed, mark.at)
        if mark is not None:
            assert mark.kind != "speech_start", mark.at
            stream.marks.popleft()
            stream.consumed = max(stream.consumed, mark.at)
            if mark.kind == "speech_stop":
                stream.last_stop = stream.speech_end = mark.boundary
            return Point(mark.at, mark.kind, asked=mark if mark.kind == "ask" else None), None
        if not stream.is_speech and not self._tasks.sound_ticks:
            stream.consumed = max(stream.consumed, stream.received)
            self._drop_silence(stream)
        stream.due = min(stream.due, self._clock())  # caught up: no lead is owed to what comes next
        return None, None

    def _next_on_grid(self, stream: Stream, mark: Mark | None) -> tuple[Point | None, Skipped | None]:
        """The next tick or sound point, if it lies before the next mark and its audio is there."""
        last = stream.received
        if mark is not None:  # a start or stop is decided instead of a point at its sample, others after it
            last = min(last, mark.at - 1 if mark.kind in ("speech_start", "speech_stop") else mark.at)
        kind: PointKind
        if stream.is_speech:
            kind, step = "tick", self._tick
            first = max(stream.consumed, stream.speech_start + MIN_SPEECH - 1)
        elif self._tasks.sound_ticks:
            kind, step = "idle_tick", self._tick * self._tasks.sound_ticks
            first = stream.consumed
        else:
            return None, None
        at = (first // step + 1) * step
        if at > last:
            return None, None
        newest = last // step * step
        if newest == at or not self._is_late(stream, at):
            return Point(at, kind, at - step), None
        # Sounds that are scored row by row lose nothing by it: the rows come with the newer point.
        gives_up = kind == "tick" or self._tasks.events_ticks
        left_out = Skipped(stream.number, at, newest, (newest - at) // step) if gives_up else None
        return Point(newest, kind, at - step), left_out

    def _begin_speech(self, stream: Stream, mark: Mark) -> None:
        """Speech began: keep the window after a short pause, else start a new one."""
        stream.is_speech = True
        stream.speech_start = mark.boundary
        if mark.boundary - stream.last_stop > self._join_gap:
            stream.move_window(max(mark.boundary, stream.committed[-1].end if stream.committed else 0))

    def _forks(self, stream: Stream, point: Point) -> tuple[Fork, ...]:
        """What is asked at a point: words first, for an emotion is read from the same encoding."""
        forks = []
        if stream.is_speech and point.kind in ("tick", "speech_stop", "flush"):
            if stream.next_language is not None and point.at > stream.next_language.at:
                stream.language, stream.next_language = stream.next_language.language, None
                stream.is_detecting, stream.doubt = stream.language is None, None
            stream.cut_window(point.at, self._window, self._longest_window)
            forks.append(self._transcript(stream, point))
            if point.is_retry:
                return tuple(forks)
            heard_to = stream.speech_end if point.kind == "speech_stop" else point.at
            if (
                self._is_due(self._tasks.emotion_ticks, point)
                and heard_to - stream.speech_start >= MIN_EMOTION
            ):
                start = max(stream.window_start, stream.speech_start, heard_to - EMOTION_WINDOW)
                forks.append(_plain_fork("emotion", start, EMOTION_TOKENS))
        if point.kind != "speech_stop" and self._is_due(self._tasks.events_ticks, point):
            start = max(stream.start, point.at - self._longest_window)
            forks.append(_plain_fork("events", start, EVENTS_TOKENS))
        if point.asked is not None:
            start = max(stream.start, min(point.asked.boundary, point.at))
            forks.append(_plain_fork("answer", start, self._tasks.answer_tokens, point.asked.question))
        return tuple(forks)

    def _is_due(self, n_ticks: int, point: Point) -> bool:
        """Whether a point lies on a grid of `n_ticks`, left-out points included; marks but questions do."""
        if not n_ticks or point.kind == "ask":
            return False
        step = n_ticks * self._tick
        return point.kind not in ("tick", "idle_tick") or point.at // step > point.since // step

    def _transcript(self, stream: Stream, point: Point) -> Fork:
        last = stream.committed[-1].end if stream.committed else stream.window_start
        open_s = max(0, point.at - last) / SAMPLE_RATE_HZ
        n_ticks = self._tasks.language_ticks
        asks = stream.is_detecting and n_ticks and not point.is_retry
        if asks and self._is_due(1 if stream.doubt is not None else n_ticks, point):
            end = stream.speech_end if point.kind == "speech_stop" else point.at
            span = span_of(stream.window_start, end, is_tick=point.kind == "tick")
        else:
            span = None
        return Fork(
            task="transcript",
            window_start=stream.window_start,
            prefix=tuple(stream.committed),
            context=stream.context if self._config.use_context else "",
            language=decoded_in(stream.language, stream.doubt),
            max_tokens=EXTRA_TOKENS + int(open_s * self._config.max_tokens_per_s),
            language_span=span,
        )

    def _needed_from(self, stream: Stream) -> int:
        """A restart, or the next window, needs the audio from here on."""
        needed = (stream.consumed - START_DELAY) // GRID * GRID - MARGIN
        if self._tasks.sound_ticks:
            # From the last answer on: what was found since is lost with the engine, however far it went.
            needed = min(needed, (stream.answered - self._tasks.reach) // GRID * GRID)
        if stream.is_speech or stream.consumed - stream.last_stop <= self._join_gap + START_DELAY:
            needed = min(needed, stream.window_start - MARGIN)
        return max(stream.start, needed)

    def _drop_silence(self, stream: Stream) -> None:
        """Forget audio nobody will look at: of a long silence only the last seconds are kept."""
        needed = self._needed_from(stream)
        while stream.pieces and stream.pieces[0][0] + len(stream.pieces[0][1]) <= needed:
            stream.pieces.popleft()
        while stream.arrivals and stream.arrivals[0][0] < stream.consumed:
            stream.arrivals.popleft()

    def _is_late(self, stream: Stream, at: int) -> bool:
        """Whether a live stream is further behind than it may be.

        A client that sends faster than real time is not behind just because its audio has to wait:
        lateness counts from when the sample would have come at the pace of speech, or did come.
        """
        if not self._shed_after_s:
            return False
        now = self._clock()
        due = next((due for end, due in stream.arrivals if end >= at), now)
        return now - due > self._shed_after_s

    def _progress(self, stream: Stream) -> Progress | None:
        if stream.retry is not None or (stream.awaiting is not None and stream.awaiting.is_retry):
            return None  # the window is the one of the result to come; a restart begins with the one before
        consumed = stream.consumed
        if stream.awaiting is not None and stream.awaiting.kind in ("tick", "idle_tick"):
            consumed -= 1  # not answered yet: after a crash it is due again
        if consumed - stream.reported < REPORT_STEP:
            return None
        stream.reported = consumed
        return Progress(stream.number, consumed, self._needed_from(stream), stream.window_start)


def _plain_fork(task: Task, window_start: int, max_tokens: int, question: str = "") -> Fork:
    """A fork that goes on from nothing."""
    return Fork(task, window_start, (), "", None, max_tokens, question)


def _result(
    stream: Stream, point: Point, hypothesis: Hypothesis | None, found: Findings, compute_s: float
) -> Result:
    """The message about a point; with no words where none were asked for."""
    return Result(
        stream=stream.number,
        point=point.at,
        kind=point.kind,
        words=stream.hypothesis,
        language=stream.language if hypothesis is None else hypothesis.language,
        no_speech=0.0 if hypothesis is None else hypothesis.no_speech,
        n_repetitions_cut=0 if hypothesis is None else hypothesis.n_repetitions_cut,
        compute_s=compute_s,
        window_start=stream.window_start,
        settled_language=stream.language if stream.is_detecting else None,
        doubt=stream.doubt,
        n_before=len(stream.before),
        language_before=stream.language_before,
        held_from=held_from(stream.doubt, point.at),
        found=found,
    )
