"""Reading what the model says: tolerant of anything, strict in what comes out."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from model.moss.parse import (
    MAX_LABEL,
    MAX_VALUE,
    VOICE_KEYS,
    Sentence,
    SoundEvent,
    Span,
    parse_events,
    parse_sentences,
    parse_voice,
)

WINDOW = Span(0.0, 30.0)


def sentence(text: str, start_s: float, end_s: float, is_closed: bool = True) -> Sentence:
    """Short for a sentence."""
    return Sentence(text, Span(start_s, end_s), is_closed)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[0.00]hello there[2.01][2.01]the weather is nice today[4.32]",
            [sentence("hello there", 0, 2.01), sentence("the weather is nice today", 2.01, 4.32)],
        ),
        ("[0.00]cut in a wor", [sentence("cut in a wor", 0, 30, False)]),
        ("[0.00]cut in a time[2.", [sentence("cut in a time", 0, 30, False)]),
        ("[1.00]one[2.00", [sentence("one", 1, 2)]),
        ("0.50]one[1.50]\n2.00]two[3.00]", [sentence("one", 0.5, 1.5), sentence("two", 2, 3)]),
        ("no times at all", [sentence("no times at all", 0, 30, False)]),
        ("before[1.00][2.00]after", [sentence("before", 0, 1), sentence("after", 2, 30, False)]),
        ("[3.00]back[1.00][0.50]wards[4.00]", [sentence("back", 3, 3), sentence("wards", 3, 4)]),
        ("[29.00]late[99.00]", [sentence("late", 29, 30)]),
        ("[28.00]last[29.00][30.50]more[31.00][32.00]and more", [sentence("last", 28, 29)]),
        ("[1.00]again[2.00][3.00]so[4.00][1.00]again[2.00]", [sentence("again", 1, 2), sentence("so", 3, 4)]),
        (
            "[0.00]a[1.00][2.00]b c[20.00][21.00]d[22.00][2.00]b e[3.00]",
            [sentence("a", 0, 1), sentence("b e", 2, 3)],
        ),
        ("[0.00]a b[1.00][2.00]c[3.00][0.00]a", [sentence("a b", 0, 1), sentence("c", 2, 3)]),
        ("[0.00]a b[1.00][2.00]c[3.00][0.00]a b d", [sentence("a b", 0, 1), sentence("c", 2, 3)]),
        ("[2.00]a b[9.00][2.00]a b c", [sentence("a b c", 2, 30, False)]),
        ("[1.00]a b[1.00]a b c[4.00]", [sentence("a b c", 1, 4)]),
        ("[1.00]a[2.00][1.00]b[2.00][1.00]a[2.00]", [sentence("a", 1, 2)]),
        (
            "[0.00]A, b.[1.00][2.00]c[3.00][0.00]a b[1.00][2.00]C?[3.00][4.00]d[5.00]",
            [sentence("A, b.", 0, 1), sentence("c", 2, 3), sentence("d", 4, 5)],
        ),
        ("[3.00]a[4.00][0.50]b[1.00]", [sentence("a", 3, 4), sentence("b", 4, 4)]),
        ("[29.00]a[30.00][30.00]b[30.50]", [sentence("a", 29, 30)]),
        ("[1.00]one[1.00]two[2.00]", [sentence("one", 1, 1), sentence("two", 1, 2)]),
        ("[1.00]no[2.00][3.00]no[4.00]", [sentence("no", 1, 2), sentence("no", 3, 4)]),
        ("[99.00]one[100.00][101.00]two[102.00]", [sentence("one", 30, 30), sentence("two", 30, 30)]),
        ("[1:02]minutes[1:03.5]", [sentence("minutes", 30, 30)]),
        ("[0.00]it cost 3.50 dollars[2.00]", [sentence("it cost 3.50 dollars", 0, 2)]),
        ("[ 0.00 s ]spaces[ 1.00s]", [sentence("spaces", 0, 1)]),
        ("[0.00][S01]who[1.00]", [sentence("[S01]who", 0, 1)]),
        ("", []),
        ("[0.00][1.00]", []),
    ],
)
def test_sentences(text: str, expected: list[Sentence]) -> None:
    """Good answers and the ways in which they go wrong."""
    assert list(parse_sentences(text, WINDOW)) == expected


@given(
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=6),
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=6),
    st.integers(0, 5),
)
def test_a_restarted_sentence_replaces_all_from_there_on(first: list[str], anew: list[str], at: int) -> None:
    """From the sentence that it begins with all is as in the second telling, whatever came before."""
    at = min(at, len(first) - 1)
    assume(first[at] != anew[0])
    told = [*enumerate(first), *enumerate(anew, at)]
    answer = "".join(f"[{2 * idx}.00]{words}[{2 * idx + 1}.00]" for idx, words in told)
    assert [s.text for s in parse_sentences(answer, WINDOW)] == first[:at] + anew


@pytest.mark.parametrize(
    ("prefix", "text", "expected"),
    [
        # All of it again, and then on.
        (
            "[1.00]one[1.50][3.00]six five",
            "two[4.00][1.00]one[1.50][3.00]six five two[4.00][5.00]seven[6.00]",
            [sentence("one", 1, 1.5), sentence("six five two", 3, 4), sentence("seven", 5, 6)],
        ),
        # Astray; then from the words on that were given.
        ("[1.00]six five", "two[17.15][1.00]six five nine[4.00]", [sentence("six five nine", 1, 4)]),
        ("[1.00]six five", "[1.00]six five two[4.00]", [sentence("six five two", 1, 4)]),
        ("[1.00]six five", "[2.00][1.00]six five two", [sentence("six five two", 1, 30, False)]),
        # Other or fewer words than those that were given.
        (
            "[1.00]six five",
            "[2.00][1.00]six[1.50][5.00]seven[6.00]",
            [sentence("six five", 1, 2), sentence("seven", 5, 6)],
        ),
        (
            "[1.00]six five[2.00][3.00]one",
            "[3.50][1.00]six[2.00][5.00]seven[6.00]",
            [sentence("six five", 1, 2), sentence("one", 3, 3.5), sentence("seven", 5, 6)],
        ),
        # An earlier one again in the place of the open one.
        (
            "[1.00]one two[1.00][1.00]one",
            "two[2.00][3.00]six[4.00]",
            [sentence("one two", 1, 1), sentence("one", 1, 2), sentence("six", 3, 4)],
        ),
        # Given twice: they were agreed, whatever their times.
        (
            "[3.00]no[3.00][3.00]no",
            "[4.00][6.00]then[7.00]",
            [sentence("no", 3, 3), sentence("no", 3, 4), sentence("then", 6, 7)],
        ),
    ],
)
def test_a_forced_prefix_stays(prefix: str, text: str, expected: list[Sentence]) -> None:
    """The model goes on from it; it does not take it back."""
    assert list(parse_sentences(text, WINDOW, forced_prefix=prefix)) == expected


def test_sentences_of_a_restarted_window() -> None:
    """The offset is added before the window is looked at."""
    window = Span(100.0, 130.0)
    assert parse_sentences("[0.00]a[2.00][5.00]b[40.00]", window, 100.0) == (
        sentence("a", 100, 102),
        sentence("b", 105, 130),
    )


def event(label: str, start_s: float, end_s: float) -> SoundEvent:
    """Short for an event."""
    return SoundEvent(label, Span(start_s, end_s))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "0.00 - 7.00: birds chirping\n7.00 - 28.00: water running",
            [event("birds chirping", 0, 7), event("water running", 7, 28)],
        ),
        ("- [1.0 - 2.0]: a door", [event("a door", 1, 2)]),
        ("* 1s – 2s: a door\n", [event("a door", 1, 2)]),  # noqa: RUF001
        ("1. 3.0 to 4.0 seconds: bell", [event("bell", 3, 4)]),
        ("[0:05] - [0:10]: bell", [event("bell", 5, 10)]),
        ("5.0 - 2.0: backwards", [event("backwards", 2, 5)]),
        ("25.0 - 99.0: beyond\n40 - 50: outside", [event("beyond", 25, 30)]),
        ("8.0 - 9.0: later\n1.0 - 2.0: earlier", [event("earlier", 1, 2), event("later", 8, 9)]),
        ("Sure! Here are the events:\n```\n1.0 - 2.0: **bell**\n```", [event("bell", 1, 2)]),
        ("1.0 - : cut off", [event("cut off", 1, 30)]),
        ("1.0 - 2.0:", []),
        ("nothing", []),
    ],
)
def test_events(text: str, expected: list[SoundEvent]) -> None:
    """Good answers and the ways in which they go wrong."""
    assert list(parse_events(text, WINDOW)) == expected


FULL = {key: f"some {key}" for key in VOICE_KEYS}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(FULL, indent=4),
        "```json\n" + json.dumps(FULL) + "\n```",
        "Here it is: " + json.dumps(FULL) + " I hope it helps {really}.",
        json.dumps({key.upper(): value for key, value in reversed(FULL.items())}),
        json.dumps({**FULL, "other": "left out"}),
        json.dumps(FULL)[:-1] + ",}",
    ],
)
def test_voices(text: str) -> None:
    """All thirteen keys, in their order, whatever is around them."""
    fields = parse_voice(text).fields
    assert fields == FULL
    assert list(fields) == list(VOICE_KEYS)


def test_a_voice_cut_short() -> None:
    """What was said before the end is kept; the last value too, as far as it goes."""
    text = json.dumps({"gender": "male", "emotion": 'he says "no"\nloudly', "tone": "warm"}, indent=4)
    assert parse_voice(text[: text.index("warm") + 2]).fields == {
        "gender": "male",
        "emotion": 'he says "no" loudly',
        "tone": "wa",
    }
    assert parse_voice('{"age": 30, "tone": null, "pitch": ["low", "steady"]}').fields == {
        "pitch": '["low", "steady"]',
        "age": "30",
    }
    assert parse_voice("I cannot hear anybody.").fields == {}


PIECES = st.one_of(
    st.sampled_from(
        ["[", "]", "0.00", "12.5", "1:02", " - ", ":", "\n", "a dog", "s", " to ", "```", "nan", "-5"]
    ),
    st.sampled_from(["{", "}", '"', '"emotion"', "\\", "\\u12", ",", "٣.٤", "²", "\x00", "\ud800", "à"]),
    st.sampled_from(["9" * 40, "1" * 5000, "[" * 200, "{" * 300, " " * 3000, "- " * 2000]),
)
ANYTHING = st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=40).map("".join))


@given(text=ANYTHING, start_s=st.floats(0, 1e6), length_s=st.floats(0, 600), offset_s=st.floats(-1e6, 1e6))
@example(text="[1e5]x[9]", start_s=5.0, length_s=1.0, offset_s=0.0)
@example(text='{"age": ' + "1" * 5000 + "}", start_s=0.0, length_s=1.0, offset_s=0.0)
@example(text="{" * 100_000, start_s=0.0, length_s=1.0, offset_s=0.0)
@example(text='{"a":' + "[" * 100_000, start_s=0.0, length_s=1.0, offset_s=0.0)
def test_anything_can_be_read(text: str, start_s: float, length_s: float, offset_s: float) -> None:
    """Never an exception, never a time outside the window, never a span that ends before it begins."""
    window = Span(start_s, start_s + length_s)
    sentences = parse_sentences(text, window, offset_s)
    events = parse_events(text, window, offset_s)
    for span in [*(s.span for s in sentences), *(e.span for e in events)]:
        assert window.start_s <= span.start_s <= span.end_s <= window.end_s
    starts, ends = [s.span.start_s for s in sentences], [s.span.end_s for s in sentences]
    assert starts == sorted(starts)
    assert ends == sorted(ends)
    for found in [*(s.text for s in sentences), *(e.label for e in events)]:
        assert found
        assert found.isprintable()
    assert all(len(e.label) <= MAX_LABEL for e in events)
    fields = parse_voice(text).fields
    assert set(fields) <= set(VOICE_KEYS)
    assert all(0 < len(value) <= MAX_VALUE and value.isprintable() for value in fields.values())
