"""What the scheduler knows of one stream: cursors, window, audio that waits, and the awaited point.

Knows no other stream, no clock and no tensor.

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
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from streaming.engine.contract import Findings, Hypothesis, LanguageDoubt, Pcm, TimedWord
from streaming.engine.language import weigh
from streaming.engine.messages import Configure, Mark, Open, PointKind, extended
from streaming.protocol import SAMPLE_RATE_HZ
from streaming.text import ends_sentence

GRID = 320  # samples; windows begin on the encoder's 20 ms grid
MARGIN = 480  # samples before a window that its first mel frames look at, rounded up to hops
MIN_WINDOW = 20 * GRID  # of less audio no words are decoded when the language changes
# Speech after the last committed word in which a word must have been heard: at a tick the model may
# yet find it, when speech has stopped it is the last chance.
LOST_AT_TICK = 3 * SAMPLE_RATE_HZ
LOST_AT_STOP = SAMPLE_RATE_HZ * 3 // 5


@dataclass(slots=True)
class Point:
    """A decode point: where, and what asked for it."""

    at: int
    kind: PointKind
    since: int = 0  # of a tick or sound point: what slower grids hold after this is due here
    asked: Mark | None = None  # the question
    is_retry: bool = False  # its words are decoded again, in a shorter window, and nothing else


@dataclass(slots=True)
class Stream:
    """What the scheduler knows of one stream. Positions are samples on its clock."""

    number: int
    slot_idx: int
    language: str | None  # set by the client, or detected; None: not known yet
    is_detecting: bool  # no language is set
    doubt: LanguageDoubt | None  # of a detected language, or of one that is not known yet
    due: float  # on the scheduler's clock: when `received` came, or would have at the pace of speech
    start: int  # audio before this never came
    received: int
    consumed: int  # everything before this is decided
    answered: int  # ... and the timeline has what was found before this
    given: int  # the runner has the audio before this
    window_start: int
    committed: deque[TimedWord]  # words inside the window
    context: str
    is_speech: bool
    speech_start: int
    last_stop: int  # where speech last ended; the window may go on if it begins again soon
    pieces: deque[tuple[int, Pcm]] = field(default_factory=deque)  # audio the runner has not got
    marks: deque[Mark] = field(default_factory=deque)
    arrivals: deque[tuple[int, float]] = field(default_factory=deque)  # end of an audio message, `due` there
    awaiting: Point | None = None
    hypothesis: tuple[TimedWord, ...] = ()  # of the awaited point
    found: Findings = field(default_factory=Findings)  # of a point that is decoded again
    next_language: Configure | None = None  # takes effect at the first point after its position
    retry: Point | None = None  # decode this point again, in a shorter window
    # Of the awaited point, where the language changed at it: the words that come before the window, which
    # began anew with the change, and their language.
    before: tuple[TimedWord, ...] = ()
    language_before: str | None = None
    speech_end: int = 0  # at a `speech_stop` point: where speech ended
    reported: int = 0  # `consumed` as the server knows it

    @classmethod
    def opened(cls, message: Open, slot_idx: int, due: float) -> Stream:
        """A stream as the server opens it: new, or as the engine before left it."""
        return cls(
            number=message.stream,
            slot_idx=slot_idx,
            language=message.language or message.settled_language,
            is_detecting=message.language is None,
            doubt=message.doubt,
            due=due,
            start=message.start,
            received=message.start,
            consumed=message.consumed,
            answered=message.consumed,
            given=message.start,
            window_start=message.window_start,
            committed=deque(message.committed),
            context=message.context,
            is_speech=message.is_speech,
            speech_start=message.speech_start,
            last_stop=message.last_stop,
            reported=message.consumed,
        )

    def commit(self, n_words: int, unsaid: Sequence[int]) -> None:
        """Take the first words of the hypothesis as committed, but for those that nobody said."""
        words = enumerate(self.hypothesis[:n_words])
        self.committed.extend(word for i, word in words if i not in unsaid)
        self.hypothesis = ()
        if self.language_before is not None:
            self.move_window(self.window_start)  # the words before it become context
            self.before, self.language_before = (), None

    def cut_window(self, at: int, wanted: int, longest: int) -> None:
        """Shorten a window that got too long, at the best pause between committed words.

        Args:
            at: The decode point, where the window ends.
            wanted: Samples that a window should have at most.
            longest: Samples that a model can look at.
        """
        if at - self.window_start <= wanted:
            return
        words = list(self.committed)
        oldest = at - wanted * 2 // 3  # cut here at the latest ...
        newest = at - wanted // 4  # ... and keep this much to look back on
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
            last = words[-1].end if words else self.window_start
            best = max(min(last, newest), at - longest)
        self.move_window(best)

    def move_window(self, start: int) -> None:
        """Begin the window at `start`; committed words before it become context."""
        self.window_start = max(self.start, start // GRID * GRID)
        gone = []
        while self.committed and self.committed[0].middle < self.window_start:
            gone.append(self.committed.popleft().text)
        self.context = extended(self.context, gone)

    def take(self, end: int, *, is_gapless: bool) -> tuple[int, Pcm]:
        """Audio from where the runner is to `end`, or, where gaps may be, from where the window needs it.

        Returns:
            Its first sample, and the audio.
        """
        start = max(self.given, self.start)
        if not is_gapless:
            start = max(start, self.window_start - MARGIN)
        taken: list[Pcm] = []
        while self.pieces and self.pieces[0][0] < end:
            at, pcm = self.pieces.popleft()
            if at + len(pcm) > end:
                self.pieces.appendleft((end, pcm[end - at :]))
                pcm = pcm[: end - at]
            if at + len(pcm) > start:
                taken.append(pcm[max(0, start - at) :])
        self.given = end
        while self.arrivals and self.arrivals[0][0] < end:
            self.arrivals.popleft()
        pcm = np.concatenate(taken) if taken else np.empty(0, dtype=np.float32)
        assert len(pcm) == end - start, (len(pcm), start, end)
        return start, pcm


def follow_language(stream: Stream, at: int, hypothesis: Hypothesis) -> bool:
    """Weigh a hypothesis' language estimate, and begin the window anew where another language begins.

    What was decoded before that place stays as it is, in `before`. Committed words stay too.

    Returns:
        Whether the point is to be decoded again, in the new language.
    """
    assert hypothesis.estimate is not None
    verdict = weigh(stream.language, stream.doubt, hypothesis.estimate)
    stream.language, stream.doubt = verdict.language, verdict.doubt
    if verdict.since is None or verdict.language == hypothesis.language:
        return False
    begin = max(verdict.since, stream.window_start)
    if stream.committed:
        begin = max(begin, stream.committed[-1].end + GRID)
    stream.move_window(min(begin, at))
    stream.language_before = hypothesis.language
    words = itertools.takewhile(lambda word: word.middle < stream.window_start, stream.hypothesis)
    stream.hypothesis = stream.before = tuple(words)
    return at - stream.window_start >= MIN_WINDOW


def has_lost_its_place(stream: Stream, at: int, kind: PointKind) -> bool:
    """Whether the model took the text for finished while speech went on.

    Whisper does that after a pause inside a long window, and then stays silent. In a window that
    begins after the committed words it hears again; so this is true once at most for a point.
    """
    if stream.hypothesis or not stream.committed:
        return False
    begin = max(stream.committed[-1].end, stream.speech_start)
    if kind == "speech_stop":
        return stream.speech_end - begin >= LOST_AT_STOP
    return at - begin >= LOST_AT_TICK


def words_after(stream: Stream, hypothesis: Hypothesis) -> tuple[TimedWord, ...]:
    """The hypothesis' words, none of them before what is committed or before anybody spoke.

    None reaches over the next. What a model hears after a pause it likes to begin inside the pause:
    endpointing knows better.
    """
    floor = max(stream.window_start, stream.speech_start)
    if stream.committed:
        floor = max(floor, stream.committed[-1].end)
    words: list[TimedWord] = []
    for word in hypothesis.words:
        start = max(word.start, floor)
        if words and words[-1].end > start:
            words[-1] = msgspec.structs.replace(words[-1], end=start)
        words.append(TimedWord(word.text, start, max(word.end, start), word.confidence))
        floor = start
    return tuple(words)
