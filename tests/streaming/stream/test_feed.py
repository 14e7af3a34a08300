"""One stream's dialogue with an engine, without sockets or time.

The engine is the fake one of the service's tests, in this process: its words are checksums of the
samples, so that one that is lost, repeated or out of place shows. `tests/streaming/engine` proves
the same with the real scheduler.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.config import parse_config
from streaming.engine import messages
from streaming.engine.contract import Answer, Findings
from streaming.engine.messages import SEND_GRID, Mark
from streaming.errors import EngineFault
from streaming.protocol import (
    SAMPLE_RATE_HZ,
    AnswerFinal,
    Ask,
    Degraded,
    Flushed,
    Message,
    SpeechStarted,
    SpeechStopped,
    TranscriptDelta,
)
from streaming.stream.feed import MAX_SEND, Feed, FeedState
from streaming.timeline.transcript import new_timeline
from tests.streaming.engine.recording import Script, Utterance, make_script
from tests.streaming.fake_engine import MAX_STEP, FakeEngine

SECOND = SAMPLE_RATE_HZ
CONFIG = parse_config("")
TASKS = ("transcript", "answer")
AHEAD = 3 * SECOND
words = st.tuples(st.integers(1600, 9000), st.sampled_from([0, 160, 3000]))
utterances = st.builds(
    Utterance, pause=st.integers(40, 120), words=st.lists(words, min_size=1, max_size=12).map(tuple)
)
scripts = st.builds(
    make_script,
    st.lists(utterances, min_size=1, max_size=3),
    start_delay=st.just(6),
    stop_delay=st.sampled_from([10, 30]),
    flushes=st.lists(st.floats(0.05, 0.95), max_size=2),
    questions=st.lists(st.floats(0.05, 0.95), max_size=2),
)
cuts = st.sampled_from([320, SEND_GRID, SECOND]) | st.integers(0, 40_000)
steps = st.lists(
    st.tuples(st.just("arrive"), cuts)
    | st.tuples(st.just("take"), st.integers(1, 4))
    | st.tuples(st.sampled_from(["crash", "restart"]), st.just(0)),
    max_size=40,
)


def new_feed(max_ahead: int, ring: int, saved: bytes | None = None, script: Script | None = None) -> Feed:
    """Of a new stream, or one that continues from a snapshot."""
    if saved is None or script is None:
        return Feed(
            1,
            new_timeline(CONFIG, TASKS, ()),
            language="en",
            ring=ring,
            max_ahead=max_ahead,
            max_step=MAX_STEP,
        )
    state = msgspec.msgpack.decode(saved, type=FeedState)
    return Feed(
        1,
        new_timeline(CONFIG, TASKS, (), state.timeline),
        ring=ring,
        max_ahead=max_ahead,
        max_step=MAX_STEP,
        state=state,
        audio=script.pcm[state.ring_start : state.ring_end],
    )


@dataclass
class Talk:
    """A script through a feed to an engine."""

    script: Script
    max_ahead: int = AHEAD
    n_marks: int = 0
    found: list[Message] = field(default_factory=list)
    outbox: deque[messages.FromEngine] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.feed = new_feed(self.max_ahead, len(self.script.pcm))
        self.new_engine()

    def new_engine(self) -> None:
        """The feed's first engine, or another one after a death."""
        self.outbox.clear()
        self.engine = FakeEngine(self.outbox.append)
        self.feed.reopen()
        self.send()

    def send(self) -> None:
        """Let the engine have what it may."""
        for message in self.feed.outgoing():
            self.engine.take(message)

    def step(self, action: str, n: int) -> None:
        """Something happens."""
        match action:
            case "arrive":
                self.arrive(n)
            case "take":
                self.take(n)
            case "crash":
                self.feed.engine_died()
                self.new_engine()
            case "restart":
                saved = msgspec.msgpack.encode(self.feed.snapshot())
                self.feed = new_feed(self.max_ahead, len(self.script.pcm), saved, self.script)
                self.new_engine()

    def arrive(self, n_samples: int) -> None:
        """Samples come, with what endpointing finds in them and what the client asks for."""
        end = min(len(self.script.pcm), self.feed.n_samples + n_samples)
        while self.n_marks < len(self.script.marks) and self.script.marks[self.n_marks].at <= end:
            mark = self.script.marks[self.n_marks]
            pcm = self.script.pcm[self.feed.n_samples : mark.at]
            is_endpoint = mark.kind in ("speech_start", "speech_stop")
            self.found += self.feed.push(pcm, (mark,) if is_endpoint else ())
            if mark.kind == "flush":
                self.feed.flush(f"f{self.n_marks}")
            elif mark.kind == "ask":
                self.feed.ask(Ask(f"q{self.n_marks}", mark.question, 3000))
            self.n_marks += 1
        self.found += self.feed.push(self.script.pcm[self.feed.n_samples : end], ())
        self.send()

    def take(self, n_messages: int) -> None:
        """Take so much of what the engine said."""
        for _ in range(min(n_messages, len(self.outbox))):
            message = self.outbox.popleft()
            assert isinstance(message, messages.Result | messages.Progress | messages.Skipped), message
            self.found += self.feed.take(message)
            self.send()

    def finish(self) -> list[Message]:
        """The rest comes, and everything is answered."""
        self.arrive(len(self.script.pcm))
        while self.outbox:
            self.take(1)
        assert self.feed.n_pending == 0
        assert not self.feed.is_owed
        return self.found + self.feed.close()


@given(script=scripts, steps=steps, max_ahead=st.sampled_from([AHEAD, 10**9]))
@settings(max_examples=150)
def test_no_cut_and_no_death_changes_anything(
    script: Script, steps: list[tuple[str, int]], max_ahead: int
) -> None:
    """Of the engine, or of the server: the same messages in the same order."""
    talk = Talk(script, max_ahead)
    for action, n in steps:
        talk.step(action, n)
    assert talk.finish() == Talk(script, 10**9).finish()


TALK = make_script(
    [Utterance(40, ((4000, 400),) * 6), Utterance(60, ((3000, 0),) * 8)], flushes=[0.3], questions=[0.6]
)


@pytest.mark.parametrize("death", ["crash", "restart"])
@pytest.mark.parametrize("piece", [SECOND // 2, 10 * SECOND])
def test_a_death_after_any_message_changes_nothing(death: str, piece: int) -> None:
    """Whatever the engine had said and the server had taken of it by then."""
    undisturbed = Talk(TALK, 10**9).finish()
    n_taken = 0
    while True:
        talk = Talk(TALK)
        left = n_taken
        while left and (talk.outbox or talk.feed.n_samples < len(TALK.pcm)):
            if talk.outbox:
                talk.take(1)
                left -= 1
            else:
                talk.arrive(piece)
        if left:
            break  # there are no more messages to die after
        talk.step(death, 0)
        assert talk.finish() == undisturbed, n_taken
        n_taken += 1
    assert n_taken > 15


@given(script=scripts)
@settings(max_examples=30)
def test_every_mark_leads_to_its_message(script: Script) -> None:
    """Once each and in order; every client's request gets its id back."""
    found = Talk(script).finish()
    kinds = {
        "speech_start": SpeechStarted,
        "speech_stop": SpeechStopped,
        "flush": Flushed,
        "ask": AnswerFinal,
    }
    expected = [kinds[mark.kind] for mark in script.marks]
    seen = [type(m) for m in found if isinstance(m, tuple(kinds.values()))]
    assert seen == expected
    ids = [m.id for m in found if isinstance(m, Flushed | AnswerFinal)]
    clients = [(i, m.kind) for i, m in enumerate(script.marks) if m.kind in ("flush", "ask")]
    assert ids == [f"{kind[0].replace('a', 'q')}{i}" for i, kind in clients]
    assert any(isinstance(m, TranscriptDelta) for m in found)


QUIET = Script(make_script([Utterance(200, ((4000, 0),))]).pcm, (), 0)


def sent(feed: Feed) -> list[messages.Audio]:
    """The audio that goes out now."""
    return [message for message in feed.outgoing() if isinstance(message, messages.Audio)]


def test_audio_goes_in_whole_steps_and_not_too_far_ahead() -> None:
    """On the grid, a second at most in one message; the rest when the engine has decided."""
    feed = new_feed(AHEAD, 10 * SECOND)
    feed.reopen()
    feed.push(QUIET.pcm[: SEND_GRID - 1], ())
    assert not sent(feed)
    feed.push(QUIET.pcm[: 4 * SECOND], ())
    spans = [(m.start, m.start + len(m.pcm) // 4) for m in sent(feed)]
    limit = AHEAD - AHEAD % SEND_GRID
    assert spans == [(0, MAX_SEND), (MAX_SEND, 2 * MAX_SEND), (2 * MAX_SEND, limit)]
    assert feed.take(messages.Progress(1, SECOND, SECOND // 2, 0)) == []
    spans = [(m.start, m.start + len(m.pcm) // 4) for m in sent(feed)]
    assert spans == [(limit, limit + MAX_SEND), (limit + MAX_SEND, AHEAD + SECOND)]
    assert feed.n_free == 10 * SECOND - feed.n_samples + SECOND // 2


def test_a_change_of_language_goes_out_before_its_audio() -> None:
    """However often it changes, once for each piece of audio."""
    feed = new_feed(AHEAD, 10 * SECOND)
    feed.reopen()
    feed.push(QUIET.pcm[:SECOND], ())
    sent(feed)
    for language in ("de", None, "fr"):
        feed.set_language(language)
    assert not list(feed.outgoing())
    feed.push(QUIET.pcm[:SECOND], ())
    configure, *audio = feed.outgoing()
    assert configure == messages.Configure(1, SECOND, "fr")
    assert audio


def test_a_mark_of_the_past_goes_to_the_next_engine_alone() -> None:
    """The engine decided its place and died before it answered: it comes before the audio that follows."""
    feed = new_feed(AHEAD, 10 * SECOND)
    feed.reopen()
    feed.push(QUIET.pcm[:SECOND], ())
    feed.flush("f")
    sent(feed)
    feed.take(messages.Progress(1, SECOND, SECOND, 0))
    feed.push(QUIET.pcm[:SECOND], ())
    feed.engine_died()
    assert not list(feed.outgoing())
    feed.reopen()
    late, rest = sent(feed)
    assert late == messages.Audio(1, SECOND, b"", (Mark("flush", SECOND, SECOND),))
    assert (rest.start, rest.marks) == (SECOND, ())


def test_points_that_were_left_out_are_reported() -> None:
    """As one message, with where they lay."""
    feed = new_feed(AHEAD, SECOND)
    feed.reopen()
    (degraded,) = feed.take(messages.Skipped(1, 16_000, 32_000, 2))
    assert degraded == Degraded("overload", "2 decode points skipped", 1000, 2000)


@pytest.mark.parametrize(
    ("kind", "point"),
    [
        ("flush", SECOND - 320),
        ("speech_stop", SECOND),
        ("tick", SECOND + 320),
        ("idle_tick", 2 * SECOND),
        ("ask", SECOND),
    ],
)
def test_a_result_that_nobody_asked_for_changes_nothing(kind: messages.PointKind, point: int) -> None:
    """It is a fault of the engine's; the next engine answers what this one did not."""
    feed = new_feed(AHEAD, 10 * SECOND)
    feed.reopen()
    feed.push(QUIET.pcm[:SECOND], (Mark("speech_start", 3200, 1600),))
    feed.flush("f")
    list(feed.outgoing())
    before = feed.snapshot()
    wrong = messages.Result(1, point, kind, (), "en", 0.0, 0, 0.0)
    with pytest.raises(EngineFault):
        feed.take(wrong)
    assert feed.snapshot() == before
    assert not list(feed.outgoing())


def test_a_question_without_an_answer_changes_nothing() -> None:
    """The mark was right, what came with it is not."""
    feed = new_feed(AHEAD, 10 * SECOND)
    feed.reopen()
    feed.push(QUIET.pcm[:SECOND], ())
    feed.ask(Ask("q", "Who?", 1000))
    list(feed.outgoing())
    before = feed.snapshot()
    with pytest.raises(EngineFault, match="without an answer"):
        feed.take(messages.Result(1, SECOND, "ask", (), "en", 0.0, 0, 0.0))
    assert feed.snapshot() == before


def test_a_cut_answer_and_its_thinking_reach_the_asker() -> None:
    """As the model left them: a client sees that the answer is not whole."""
    feed = new_feed(AHEAD, 10 * SECOND)
    feed.reopen()
    feed.push(QUIET.pcm[:SECOND], ())
    feed.ask(Ask("q", "Who?", 1000))
    list(feed.outgoing())
    answer = Answer(0, SECOND, "Somebody wh", thinking="A voice.", is_cut=True)
    result = messages.Result(1, SECOND, "ask", (), "en", 0.0, 0, 0.0, found=Findings(answer=answer))
    (final,) = [message for message in feed.take(result) if isinstance(message, AnswerFinal)]
    assert final == AnswerFinal("q", "Somebody wh", 0, 1000, is_cut=True, thinking="A voice.")
