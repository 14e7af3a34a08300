"""From hypotheses to text: what is committed stays, nothing is lost, nothing is said twice."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.config import TranscriptConfig
from streaming.engine.contract import Hypothesis, SlotResult, TimedWord
from streaming.engine.messages import (
    Audio,
    Commit,
    Mark,
    Open,
    PointKind,
    Result,
)
from streaming.engine.scheduler import Scheduler
from streaming.protocol import (
    Message,
    SpeechStarted,
    SpeechStopped,
    TranscriptDelta,
    TranscriptFinal,
    TranscriptInterim,
)
from streaming.text import comparable, join_words
from streaming.timeline.transcript import KEPT, Timeline, TimelineState

SECOND = 16_000
TICK = 5120
EDGE_S = 0.25
CONFIG = TranscriptConfig(
    window_s=5.0,
    join_gap_s=1.0,
    use_context=True,
    agreement=2,
    commit_delay_s=EDGE_S,
    max_segment_s=6.0,
    max_tokens_per_s=12.0,
    sure_confidence=0.0,
)


def result(
    point: int, words: tuple[TimedWord, ...], kind: PointKind = "tick", language: str = "en"
) -> Result:
    """What an engine says at a point."""
    return Result(1, point, kind, words, language, 0.0, 0, 0.0)


def heard(text: str, at: float = 0.0, word_s: float = 0.3) -> tuple[TimedWord, ...]:
    """The words of a text, one after another from second `at` on."""
    starts = itertools.count(int(at * SECOND), int(word_s * SECOND))
    return tuple(
        TimedWord(word, start, start + int(word_s * SECOND), 0.9)
        for word, start in zip(text.split(), starts, strict=False)
    )


def committed(messages: list[Message]) -> list[str]:
    """The words of all deltas."""
    return [word.text for m in messages if isinstance(m, TranscriptDelta) for word in m.words]


def closed(messages: list[Message]) -> list[str]:
    """The words of all finals."""
    return [word.text for m in messages if isinstance(m, TranscriptFinal) for word in m.words]


def shown(messages: list[Message]) -> list[str]:
    """The texts of all interim messages."""
    return [m.text for m in messages if isinstance(m, TranscriptInterim)]


texts = st.sampled_from(["a", "b", "B,", "c.", "-", "ć", "中", "don't"])
updates = st.lists(
    st.tuples(
        st.sampled_from(["tick", "tick", "tick", "tick", "speech_stop", "flush"]),
        st.lists(st.tuples(texts, st.integers(0, 6000), st.integers(0, 3000)), max_size=6),
    ),
    max_size=24,
)
Update = tuple[PointKind, list[tuple[str, int, int]]]


def play(timeline: Timeline, script: list[Update]) -> tuple[list[Message], list[tuple[Result, int]]]:
    """Any hypotheses, each going on from the committed words, as the scheduler sees to."""
    messages: list[Message] = []
    results = []
    floor = 0
    for i, (kind, parts) in enumerate(script):
        point = (i + 1) * TICK
        words = []
        at = floor
        for text, length, gap in parts:
            end = min(at + length, point)
            words.append(TimedWord(text, at, end, 0.5))
            at = min(end + gap, point)
        update = result(point, tuple(words), kind)
        applied = timeline.apply(update)
        messages += applied.messages
        results.append((update, applied.n_committed))
        if applied.n_committed:
            floor = words[applied.n_committed - 1].end
    return messages, results


@given(script=updates, agreement=st.integers(1, 4))
@settings(max_examples=80)
def test_whatever_is_heard_is_committed_once_and_for_good(script: list[Update], agreement: int) -> None:
    """The committed words are those that were counted, in order; finals and deltas say the same."""
    timeline = Timeline(CONFIG.model_copy(update={"agreement": agreement}))
    messages, results = play(timeline, script)
    expected = [word.text for update, n in results for word in update.words[:n]]
    assert committed(messages) == expected
    assert timeline.n_words == len(expected)
    for message in messages:
        if isinstance(message, TranscriptDelta | TranscriptFinal):
            assert message.text == join_words(word.text for word in message.words)
    assert expected[: len(closed(messages))] == closed(messages)
    messages += timeline.finish(1_000_000)
    assert closed(messages) == expected
    assert timeline.n_segments == sum(isinstance(m, TranscriptFinal) for m in messages)


@given(script=updates, agreement=st.integers(1, 4))
@settings(max_examples=80)
def test_a_tick_commits_only_what_is_sure(script: list[Update], agreement: int) -> None:
    """Never the last word, nothing at the live edge, nothing the updates before did not say too."""
    timeline = Timeline(CONFIG.model_copy(update={"agreement": agreement}))
    _, results = play(timeline, script)
    since: list[list[str]] = []  # the guesses of the last ticks, after what is committed
    for update, n_committed in results:
        guess = [comparable(word.text) for word in update.words]
        if update.kind == "tick":
            assert n_committed < max(len(update.words), 1)
            for word in update.words[:n_committed]:
                assert word.end <= update.point - EDGE_S * SECOND
            if n_committed:
                assert len(since) >= agreement - 1
            for other in since[len(since) - (agreement - 1) :] if agreement > 1 else []:
                assert not n_committed or other[:n_committed] == guess[:n_committed]
            since = [other[n_committed:] for other in [*since, guess]]
        else:
            since = []


@given(script=updates)
@settings(max_examples=40)
def test_a_stop_or_flush_commits_everything_and_closes(script: list[Update]) -> None:
    """After it nothing is shown that may still change."""
    timeline = Timeline(CONFIG)
    messages, _ = play(timeline, script)
    applied = timeline.apply(result(10_000_000, heard("the end"), "flush"))
    messages += applied.messages
    assert applied.n_committed == 2
    assert closed(messages) == committed(messages)
    assert committed(messages)[-2:] == ["the", "end"]
    assert ["", *shown(messages)][-1] == ""


@given(script=updates)
@settings(max_examples=40)
def test_interim_text_is_sent_when_it_changes(script: list[Update]) -> None:
    """And only then; it is what follows the committed words."""
    timeline = Timeline(CONFIG)
    on_screen = ""
    for i, (kind, parts) in enumerate(script):
        words = tuple(TimedWord(text, 0, length, 0.5) for text, length, _ in parts)
        applied = timeline.apply(result((i + 1) * TICK, words, kind))
        expected = join_words(word.text for word in words[applied.n_committed :])
        assert shown(list(applied.messages)) == ([expected] if expected != on_screen else [])
        on_screen = expected


def test_a_word_is_committed_when_two_updates_agree() -> None:
    """Case and punctuation do not matter; the newest spelling is taken."""
    timeline = Timeline(CONFIG)
    assert timeline.apply(result(2 * SECOND, heard("so, good"))).n_committed == 0
    applied = timeline.apply(result(3 * SECOND, heard("So good morning")))
    assert applied.n_committed == 2
    assert committed(list(applied.messages)) == ["So", "good"]
    assert shown(list(applied.messages)) == ["morning"]


@pytest.mark.parametrize(
    ("text", "running"),
    [
        ("good morning", "good morning"),
        ("你 好 世 界", "你好世界"),
        ("こ れ は moss だ", "これは moss だ"),
    ],
)
def test_separators_and_texts_joined_are_the_transcript(text: str, running: str) -> None:
    """Of deltas and of the interim behind them: a space between words, nothing in an unspaced script."""
    timeline = Timeline(TranscriptConfig(agreement=1, commit_delay_s=0.0))
    said = ""
    words = heard(text)
    n_committed = 0
    for n in range(1, len(words) + 1):  # a word more at each tick, of which the last stays open
        applied = timeline.apply(result(words[n - 1].end + SECOND, words[n_committed:n]))
        n_committed += applied.n_committed
        for message in applied.messages:
            if isinstance(message, TranscriptDelta):
                said += message.separator + message.text
            elif isinstance(message, TranscriptInterim):
                assert running.startswith(said + message.separator + message.text)
    final = timeline.apply(result(words[-1].end + 2 * SECOND, words[n_committed:], "flush"))
    said += "".join(m.separator + m.text for m in final.messages if isinstance(m, TranscriptDelta))
    assert said == running == next(m.text for m in final.messages if isinstance(m, TranscriptFinal))


def test_after_a_flush_agreement_begins_anew() -> None:
    """What was said before it says nothing of what follows."""
    timeline = Timeline(CONFIG)
    timeline.apply(result(2 * SECOND, heard("a b c")))
    timeline.apply(result(2 * SECOND, heard("a b c"), "flush"))
    assert timeline.apply(result(4 * SECOND, heard("a b c", 2.0))).n_committed == 0


def test_a_long_segment_is_closed_at_its_last_sentence() -> None:
    """Once it is longer than the limit."""
    timeline = Timeline(CONFIG.model_copy(update={"agreement": 1}))
    text = "one two. three four five six seven eight"
    messages = list(timeline.apply(result(5 * SECOND, heard(text))).messages)
    assert closed(messages) == []
    messages += timeline.apply(result(7 * SECOND, heard("nine ten", 3.0))).messages
    assert closed(messages) == ["one", "two."]
    messages += timeline.finish(8 * SECOND)
    assert closed(messages) == committed(messages)


@given(n_ticks=st.integers(1, 100), max_segment_s=st.sampled_from([5.0, 8.0]))
@settings(max_examples=30)
def test_segments_without_sentences_are_closed_as_well(n_ticks: int, max_segment_s: float) -> None:
    """None is much longer than one and a half times the limit."""
    timeline = Timeline(CONFIG.model_copy(update={"agreement": 1, "max_segment_s": max_segment_s}))
    messages: list[Message] = []
    for i in range(n_ticks):
        messages += timeline.apply(result((i + 2) * SECOND, heard("on and", i, 0.5))).messages
    lengths = [m.end_ms - m.start_ms for m in messages if isinstance(m, TranscriptFinal)]
    assert len(lengths) >= n_ticks // (max_segment_s * 1.5 + 2)
    assert all(length <= (max_segment_s * 1.5 + 2) * 1000 for length in lengths)


def test_a_segment_has_the_language_that_was_heard() -> None:
    """The last one that the engine named."""
    timeline = Timeline(CONFIG)
    messages = list(timeline.apply(result(SECOND, heard("ja so"), "flush", "de")).messages)
    assert [m.language for m in messages if isinstance(m, TranscriptFinal)] == ["de"]


def test_finishing_drops_what_was_not_committed() -> None:
    """The engine is gone: what it only guessed is taken from the screen."""
    timeline = Timeline(CONFIG)
    timeline.apply(result(SECOND, heard("a guess")))
    messages = timeline.finish(2 * SECOND)
    assert shown(messages) == [""]
    assert committed(messages) == closed(messages) == []


def test_speech_is_told_with_its_edges() -> None:
    """In milliseconds; a stop knows where the speech began."""
    timeline = Timeline(CONFIG)
    assert timeline.speech_started(1600) == [SpeechStarted(100)]
    assert timeline.speech_stopped(16_000) == [SpeechStopped(100, 1000)]


# --- what a restart goes on with -------------------------------------------------------------


@given(script=updates, pauses=st.lists(st.integers(0, 200), min_size=30, max_size=30))
@settings(max_examples=80)
def test_a_restart_gets_what_the_scheduler_kept(script: list[Update], pauses: list[int]) -> None:
    """Words and context of any window are those the dead engine had: then its forks are the same."""
    timeline = Timeline(CONFIG)
    scheduler = Scheduler(CONFIG, n_slots=1, tick=TICK, shed_after_s=0.0, clock=lambda: 0.0)
    scheduler.open(Open(1, "en"))
    at = 0
    for (_, parts), pause in zip(script, pauses, strict=False):
        start, at = at, at + (pause + 1) * 320
        scheduler.push(
            Audio(1, start, bytes(4 * (at - start)), (Mark("speech_start", at, max(start, at - 3200)),))
        )
        start, at = at, at + 2 * TICK
        stop = Mark("speech_stop", at, at)
        scheduler.push(Audio(1, start, bytes(4 * (at - start)), (stop,)))
        is_answered = False
        for _ in range(10):  # ticks, the stop, and points that are asked again in another window
            schedule = scheduler.schedule()
            (step,) = schedule.plan.slots
            point = step.start + len(step.pcm)
            fork = step.forks[0]
            words, context = timeline.window(fork.window_start)
            assert [word.text for word in fork.prefix] == [word.text for word in words]
            assert fork.context == context
            where = fork.window_start
            hypothesis = []
            for text, length, gap in parts:
                end = min(where + length, point)
                hypothesis.append(TimedWord(text, where, end, 0.5))
                where = min(end + gap, point)
            answer = Hypothesis(tuple(hypothesis), "en", 0.0, 0)
            results = scheduler.apply(schedule, (SlotResult(answer),), 0.0)
            for said in results:
                applied = timeline.apply(said)
                commit = Commit(1, said.point, said.kind, applied.n_committed, applied.unsaid)
                scheduler.commit(commit)
            is_answered = any(said.kind == "speech_stop" for said in results)
            if is_answered:
                break
        assert is_answered


@pytest.mark.parametrize("middle", [-320, -20, -1, 0, 1, 320])
def test_a_word_belongs_to_the_window_of_its_middle(middle: int) -> None:
    """A sample more or less decides, the same on both sides."""
    timeline = Timeline(CONFIG)
    start = 16_000 + middle - 100
    timeline.apply(
        result(
            5 * SECOND, (TimedWord("before", 0, 100, 1.0), TimedWord("x", start, start + 200, 1.0)), "flush"
        )
    )
    words, context = timeline.window(16_000)
    assert [word.text for word in words] == (["x"] if middle >= 0 else [])
    assert context == ("before" if middle >= 0 else "before x")


@pytest.mark.parametrize("cut", range(32_000, 32_320, 40))
def test_a_window_is_cut_for_both_between_the_same_words(cut: int) -> None:
    """Where a very short word ends at the cut, which is moved back to the grid."""
    words = (
        TimedWord("long", 0, cut - 100, 1.0),
        TimedWord("I.", cut - 100, cut, 1.0),
        TimedWord("so", cut, 60_000, 1.0),
    )
    scheduler = Scheduler(CONFIG, n_slots=1, tick=TICK, shed_after_s=0.0, clock=lambda: 0.0)
    scheduler.open(Open(1, "en", committed=words, consumed=80_000, is_speech=True))
    scheduler.push(Audio(1, 0, bytes(4 * 82_000)))
    ((step,),) = (scheduler.schedule().plan.slots,)
    timeline = Timeline(CONFIG)
    timeline.apply(result(80_000, words, "flush"))
    kept, context = timeline.window(step.forks[0].window_start)
    assert 0 < step.forks[0].window_start <= cut
    assert [(w.text, w.start, w.end) for w in step.forks[0].prefix] == [
        (w.text, w.start, w.end) for w in kept
    ]
    assert step.forks[0].context == context


def test_memory_does_not_grow_with_the_stream() -> None:
    """Hours of speech: the words of the last minutes and the end of the text before them."""
    timeline = Timeline(CONFIG)
    for i in range(2000):
        timeline.apply(result((i + 1) * 5 * SECOND, heard(f"word{i} is said.", i * 5.0), "speech_stop"))
    words, context = timeline.window(0)
    assert len(words) <= 3 * (KEPT // (5 * SECOND) + 2)
    assert words[-3].text == "word1999"
    assert "is said. word" in context
    assert len(context) < 300
    last, before = timeline.window(words[-1].start)
    assert [word.text for word in last] == ["said."]
    assert before.endswith("word1999 is")


# --- what a restarted server goes on from ------------------------------------------------------

CONFIGURED = {"_config", "_commit_delay", "_unsure_delay", "_max_segment", "_sounds", "_voice"}


def test_a_state_holds_everything_a_timeline_remembers() -> None:
    """Whoever adds an attribute adds it to the state, or it is lost with the server."""
    remembered = {name.removeprefix("_") for name in vars(Timeline(CONFIG)) if name not in CONFIGURED}
    assert remembered == {field.name for field in msgspec.structs.fields(TimelineState)} - {"sounds", "voice"}


@settings(max_examples=40)
@given(
    texts=st.lists(st.lists(st.sampled_from(["a", "b.", "c"]), max_size=6).map(" ".join), max_size=12),
    cut=st.integers(0, 12),
)
def test_a_timeline_goes_on_from_its_state(texts: list[str], cut: int) -> None:
    """Through bytes and back, at any result: the same messages as without."""
    one = Timeline(CONFIG)
    for i, text in enumerate(texts):
        if i == cut:
            state = msgspec.msgpack.decode(msgspec.msgpack.encode(one.snapshot()), type=TimelineState)
            other = Timeline(CONFIG, state=state)
            assert other.snapshot() == one.snapshot()
        point = (i + 1) * TICK
        kind: PointKind = "speech_stop" if i % 5 == 4 else "tick"
        found = one.apply(result(point, heard(text), kind))
        if i >= cut:
            assert other.apply(result(point, heard(text), kind)) == found


def test_a_change_of_language_closes_the_segment() -> None:
    """Its first words belong to the language before, and are committed; what follows is agreed on anew."""
    timeline = Timeline(CONFIG)
    english, french = heard("ask not what"), heard("c'est ce que", 1.0)
    timeline.apply(result(TICK * 4, english))
    changed = msgspec.structs.replace(
        result(TICK * 8, english + french, language="fr"), n_before=3, language_before="en"
    )
    applied = timeline.apply(changed)
    assert applied.n_committed == 3
    finals = [m for m in applied.messages if isinstance(m, TranscriptFinal)]
    assert [(m.language, m.text) for m in finals] == [("en", "ask not what")]
    later = timeline.apply(result(TICK * 9, french, "flush", "fr"))
    finals = [m for m in later.messages if isinstance(m, TranscriptFinal)]
    assert [(m.language, m.text) for m in finals] == [("fr", "c'est ce que")]


def test_a_change_without_words_before_it_closes_what_is_open() -> None:
    """The committed words keep the language that they were committed in, whenever the segment closes."""
    timeline = Timeline(CONFIG)
    timeline.apply(result(TICK * 4, heard("ask not what you")))
    timeline.apply(result(TICK * 5, heard("ask not what you")))
    french = msgspec.structs.replace(
        result(TICK * 8, heard("c'est", 1.0), language="fr"), language_before="en"
    )
    finals = [m for m in timeline.apply(french).messages if isinstance(m, TranscriptFinal)]
    assert [m.language for m in finals] == ["en"]


def test_words_of_another_language_begin_a_segment() -> None:
    """Also where the client changes the language, or detection wavers, and nothing else says so."""
    timeline = Timeline(CONFIG)
    messages = [*timeline.apply(result(TICK * 8, heard("ask not what you"))).messages]
    messages += timeline.apply(result(TICK * 9, heard("ask not what you"))).messages
    messages += timeline.apply(result(TICK * 12, heard("das ist gut", 2.0), "flush", "de")).messages
    finals = [(m.language, m.text) for m in messages if isinstance(m, TranscriptFinal)]
    assert finals == [("en", "ask not what"), ("de", "das ist gut")]


def test_words_whose_language_is_in_doubt_wait() -> None:
    """At a tick; when speech stops they are committed as they are."""
    timeline = Timeline(CONFIG)
    words = heard("ask not what you can")
    timeline.apply(result(TICK * 8, words))
    doubted = msgspec.structs.replace(result(TICK * 9, words), held_from=words[2].start)
    assert timeline.apply(doubted).n_committed == 2
    stop = msgspec.structs.replace(result(TICK * 10, words[2:], "speech_stop"), held_from=words[2].start)
    assert timeline.apply(stop).n_committed == 3
