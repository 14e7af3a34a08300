"""One stream's dialogue with an engine: what to send it, and what its replies lead to.

Sans-I/O: no clock, no socket, no event loop. The server's session, the property tests and the benches
drive the same class, so that what is proved of one holds for the others. Nothing is lost when an
engine dies: the ring keeps the audio that the next one needs, and a mark stays until it is answered.

A stream's sample cursors, from the oldest to the newest:

    ring start <= consumed <= sent <= ring end
                  `window start` lies at or before `consumed`; `sent` is back at the ring's start
                  when another engine gets the stream
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

import msgspec

from streaming.audio.ring import Ring
from streaming.engine import messages
from streaming.engine.contract import LanguageDoubt, Pcm, TimedWord
from streaming.engine.messages import SEND_GRID, Mark
from streaming.errors import EngineFault
from streaming.protocol import (
    SAMPLE_RATE_HZ,
    AnswerDelta,
    AnswerFinal,
    Ask,
    Degraded,
    Flushed,
    Message,
    ms_of,
)
from streaming.timeline.transcript import Timeline, TimelineState

MAX_SEND = SAMPLE_RATE_HZ  # samples in one message

FromEngine = messages.Result | messages.Progress | messages.Skipped  # of one stream


class PendingMark(msgspec.Struct, frozen=True):
    """A mark that the engine has not answered; it is sent again to the next engine."""

    mark: Mark
    client_id: str | None = None  # of the client's flush or question; None: not a client's
    is_announced: bool = False  # a beginning of speech is on the timeline


class FeedState(msgspec.Struct, frozen=True):
    """All that a feed and its timeline remember, but for the ring's audio."""

    language: str | None
    language_from: int | None
    settled_language: str | None
    ring_start: int
    ring_end: int
    consumed: int
    window_start: int
    pending: tuple[PendingMark, ...]
    speech_start: int | None
    last_stop: int
    timeline: TimelineState
    doubt: LanguageDoubt | None = None  # of the settled language


class Feed:
    """One stream between its source of audio and an engine. Positions are samples at 16 kHz."""

    def __init__(
        self,
        number: int,
        timeline: Timeline,
        *,
        language: str | None = None,
        ring: int,
        max_ahead: int,
        max_step: int,
        state: FeedState | None = None,
        audio: Pcm | None = None,
    ) -> None:
        """The feed of a new stream, or of one that continues from a `snapshot()`; no engine has it yet.

        Args:
            number: The engine's name for the stream.
            timeline: Of this stream, made from `state.timeline` where there is a state.
            language: That the stream is set to; None: detect. Of a state, its own counts.
            ring: Samples that are kept for the engine at most.
            max_ahead: Samples that the engine gets beyond what it has decided.
            max_step: Samples between two decode points at most, as the engine's `Ready` says.
            state: Of the feed that this one continues.
            audio: Of that feed's ring, from `state.ring_start` to `state.ring_end`.
        """
        self._number = number
        self._timeline = timeline
        self._max_ahead = max_ahead
        self._max_step = max_step
        self._language = language
        self._language_from: int | None = None  # where a change begins that the engine does not know
        self._settled_language: str | None = None  # what the engine detected ...
        self._doubt: LanguageDoubt | None = None  # ... and what speaks against it
        self._ring = Ring(ring)
        self._is_open = False  # the running engine has this stream
        self._replies: deque[messages.ToEngine] = deque()  # go out before any audio
        self._sent = 0  # the engine has the audio before it
        self._consumed = 0  # the engine has decided everything before it
        self._window_start = 0
        self._pending: deque[PendingMark] = deque()  # in order; a mark per 0.1 s of the ring at most
        self._n_marks_sent = 0  # how many of them the running engine has
        self._speech_start: int | None = None  # at `_consumed`: where the running speech began
        self._last_stop = 0  # at `_consumed`: where the speech before ended
        if state is not None:
            assert audio is not None
            self._restore(state, audio)

    # --- snapshot ------------------------------------------------------------------------

    def snapshot(self) -> FeedState:
        """What a new feed continues from, together with the ring's audio."""
        return FeedState(
            language=self._language,
            language_from=self._language_from,
            settled_language=self._settled_language,
            ring_start=self._ring.start,
            ring_end=self._ring.end,
            consumed=self._consumed,
            window_start=self._window_start,
            pending=tuple(self._pending),
            speech_start=self._speech_start,
            last_stop=self._last_stop,
            timeline=self._timeline.snapshot(),
            doubt=self._doubt,
        )

    def _restore(self, state: FeedState, audio: Pcm) -> None:
        assert len(audio) == state.ring_end - state.ring_start, (len(audio), state.ring_start, state.ring_end)
        self._language = state.language
        self._language_from, self._settled_language = state.language_from, state.settled_language
        self._doubt = state.doubt
        self._ring = Ring(max(self._ring.capacity, len(audio)), state.ring_start)
        self._ring.push(audio)
        self._consumed, self._window_start = state.consumed, state.window_start
        self._pending.extend(state.pending)
        self._speech_start, self._last_stop = state.speech_start, state.last_stop

    # --- from the source of audio --------------------------------------------------------

    @property
    def n_samples(self) -> int:
        """Samples pushed since the stream began."""
        return self._ring.end

    @property
    def n_free(self) -> int:
        """Samples that can be pushed now."""
        return self._ring.n_free

    @property
    def capacity(self) -> int:
        """Samples that the ring holds."""
        return self._ring.capacity

    @property
    def n_pending(self) -> int:
        """Marks without an answer."""
        return len(self._pending)

    def n_unanswered(self, kind: messages.MarkKind) -> int:
        """Marks of a kind without an answer."""
        return sum(pending.mark.kind == kind for pending in self._pending)

    def push(self, pcm: Pcm, marks: Sequence[Mark]) -> list[Message]:
        """Take audio, [n_samples], that there is room for, and endpointing's marks up to its end."""
        self._ring.push(pcm)
        self._pending.extend(PendingMark(mark) for mark in marks)
        return self._announce()

    def flush(self, client_id: str | None) -> None:
        """Commit everything pushed so far; where a client asked for it, `flushed` follows."""
        at = self._ring.end
        self._pending.append(PendingMark(Mark("flush", at, at), client_id))

    def ask(self, ask: Ask) -> None:
        """Answer a question about the last audio pushed."""
        at = self._ring.end
        since = max(0, at - ask.last_ms * SAMPLE_RATE_HZ // 1000)
        self._pending.append(PendingMark(Mark("ask", at, since, ask.question), ask.id))

    def set_language(self, language: str | None) -> None:
        """Decode in this language, or detect it, from the audio that is pushed next."""
        self._language = language
        self._settled_language = self._doubt = None
        self._language_from = self._ring.end

    def close(self) -> list[Message]:
        """Nothing follows: close the timeline with what is committed now."""
        self._is_open = False
        return self._timeline.finish(self._ring.end)

    @property
    def n_words(self) -> int:
        """Committed words."""
        return self._timeline.n_words

    @property
    def n_segments(self) -> int:
        """Closed segments."""
        return self._timeline.n_segments

    # --- to the engine -------------------------------------------------------------------

    @property
    def is_owed(self) -> bool:
        """Whether the engine has more undecided audio than lies between two points, or owes a result."""
        sent = islice(self._pending, self._n_marks_sent)
        owes_result = any(pending.mark.kind != "speech_start" for pending in sent)
        return self._is_open and (owes_result or self._sent - self._consumed >= self._max_step)

    @property
    def undecided(self) -> tuple[int, int]:
        """The audio that the engine has not decided yet: where it begins and ends."""
        return self._consumed, self._ring.end

    def reopen(self) -> None:
        """A new engine knows nothing of this stream: open it there, where the last one was."""
        opening = _opening(self._number, self.snapshot(), *self._timeline.window(self._window_start))
        self._replies = deque([opening])
        self._language_from = None
        self._sent = self._ring.start
        self._n_marks_sent = 0
        self._is_open = True

    def engine_died(self) -> None:
        """The engine is gone: nothing goes out before `reopen`."""
        self._is_open = False

    def outgoing(self) -> Iterator[messages.ToEngine]:
        """What may be sent now: audio goes at most `max_ahead` beyond what the engine decided."""
        while (message := self._next_out()) is not None:
            yield message

    def _next_out(self) -> messages.ToEngine | None:
        if not self._is_open:
            return None
        # 1. Answers to the engine, which it waits for.
        if self._replies:
            return self._replies.popleft()
        # 2. How far audio may go: to the end where a mark waits, else to the grid.
        limit = min(self._ring.end, self._consumed + self._max_ahead)
        unsent = islice(self._pending, self._n_marks_sent, None)
        marks = [pending.mark for pending in unsent if pending.mark.at <= limit]
        if not marks:
            limit -= limit % SEND_GRID
            if self._sent >= limit:
                return None
        # 3. A change of language, here, so that the number of changes is bounded by audio.
        if self._language_from is not None:
            at, self._language_from = self._language_from, None
            return messages.Configure(self._number, at, self._language)
        # 4. The audio, with the marks in it. A mark at or before its start was not answered by an
        #    engine that died: it goes without audio.
        start = self._sent
        is_late = bool(marks) and marks[0].at <= start
        end = start if is_late else min(limit, start + MAX_SEND)
        due = tuple(mark for mark in marks if mark.at <= end)
        self._sent = end
        self._n_marks_sent += len(due)
        return messages.Audio(self._number, start, self._ring.read(start, end).tobytes(), due)

    # --- from the engine -----------------------------------------------------------------

    def take(self, message: FromEngine) -> list[Message]:
        """What a message of the engine's leads to on the timeline.

        Raises:
            EngineFault: it is not what a correct engine says; nothing of it was taken.
        """
        match message:
            case messages.Result():
                return self._take_result(message)
            case messages.Progress():
                self._consume(message.consumed)
                self._window_start = max(self._window_start, message.window_start)
                self._ring.forget(message.needed_from)
                return []
            case messages.Skipped(start=start, end=end, n_points=n_points):
                text = f"{n_points} decode points skipped"
                return [Degraded("overload", text, ms_of(start), ms_of(end))]

    def _take_result(self, result: messages.Result) -> list[Message]:
        self._check(result)
        self._consume(result.point)
        self._window_start = max(self._window_start, result.window_start)
        if self._language_from is None:
            self._settled_language, self._doubt = result.settled_language, result.doubt
        answered: PendingMark | None = None
        found: list[Message] = []
        if result.kind not in ("tick", "idle_tick"):
            answered = self._pending.popleft()
            self._n_marks_sent -= 1
            if answered.mark.kind == "speech_stop":
                self._speech_start = None
                self._last_stop = answered.mark.boundary
                found += self._timeline.speech_stopped(answered.mark.boundary)
        applied = self._timeline.apply(result)
        answer = (result.point, result.kind, applied.n_committed, applied.unsaid)
        self._replies.append(messages.Commit(self._number, *answer))
        found += applied.messages
        if answered is not None and answered.client_id is not None:
            found += _reply(answered.client_id, answered.mark, result)
        return found + self._announce()

    def _check(self, result: messages.Result) -> None:
        """A result answers the first mark that wants one, or no mark, and is about audio that was sent.

        Raises:
            EngineFault: it does not.
        """
        sent = [pending.mark for pending in islice(self._pending, self._n_marks_sent)]
        expected = next((mark for mark in sent if mark.kind != "speech_start"), None)
        if result.kind in ("tick", "idle_tick"):
            is_expected = expected is None or result.point <= expected.at
        else:
            is_expected = expected is not None and (result.kind, result.point) == (expected.kind, expected.at)
        if not is_expected or result.point > self._sent:
            raise EngineFault(
                f"stream {self._number}: a result of kind {result.kind} at {result.point}; "
                f"the next mark is {expected and (expected.kind, expected.at)}, audio went to {self._sent}"
            )
        if result.kind == "ask" and result.found.answer is None:
            raise EngineFault(f"stream {self._number}: a question at {result.point} without an answer")

    def _consume(self, position: int) -> None:
        """The engine decided everything before a position; that answers the `speech_start` marks there."""
        self._consumed = max(self._consumed, position)
        while self._n_marks_sent:
            mark = self._pending[0].mark
            if mark.kind != "speech_start" or mark.at > self._consumed:
                return
            self._n_marks_sent -= 1
            self._pending.popleft()
            self._speech_start = mark.boundary

    def _announce(self) -> list[Message]:
        """Put on the timeline the speech that has begun, in its order with the words.

        A `speech_start` mark waits until every mark before it has its result; then no words of earlier
        audio can follow, and the timeline has the same order at any speed. Sounds of earlier audio may.
        """
        found: list[Message] = []
        for i, pending in enumerate(self._pending):
            if pending.mark.kind != "speech_start":
                break
            if not pending.is_announced:
                self._pending[i] = msgspec.structs.replace(pending, is_announced=True)
                found += self._timeline.speech_started(pending.mark.boundary)
        return found


def _opening(number: int, state: FeedState, committed: tuple[TimedWord, ...], context: str) -> messages.Open:
    """The message that opens a stream where it is; the committed words are those of its window."""
    return messages.Open(
        stream=number,
        language=state.language,
        start=state.ring_start,
        consumed=state.consumed,
        window_start=state.window_start,
        committed=committed,
        context=context,
        is_speech=state.speech_start is not None,
        speech_start=state.speech_start or 0,
        last_stop=state.last_stop,
        settled_language=state.settled_language,
        doubt=state.doubt,
    )


def _reply(client_id: str, mark: Mark, result: messages.Result) -> list[Message]:
    """That a client's flush is done, or what the model answered to its question."""
    if mark.kind == "flush":
        return [Flushed(client_id, ms_of(mark.at))]
    answer = result.found.answer
    assert answer is not None, "checked before"
    start_ms, end_ms = ms_of(answer.start), ms_of(answer.end)
    final = AnswerFinal(client_id, answer.text, start_ms, end_ms, answer.is_cut, answer.thinking)
    return [AnswerDelta(client_id, answer.text), final] if answer.text else [final]
