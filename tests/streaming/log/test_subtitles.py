"""Cues that can be read, in files that players can."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from streaming.log import subtitles
from streaming.log.subtitles import (
    CHAR_MS,
    MAX_CHARS,
    MAX_CUE_MS,
    MAX_LINES,
    MAX_WORD_MS,
    MIN_CUE_MS,
    MUSIC,
    PAUSE_MS,
    SAME_SOUND_MS,
    Cue,
    Sound,
    Spoken,
    subrip,
    webvtt,
)
from streaming.protocol import Word


def cues_of(
    segments: Sequence[Sequence[Word]], sounds: Sequence[Sound] = (), speakers: Sequence[str | None] = ()
) -> list[Cue]:
    """The cues of segments that nobody in particular said, or these speakers."""
    who = list(speakers) or [None] * len(segments)
    said = [Spoken(words, speaker) for words, speaker in zip(segments, who, strict=True)]
    return subtitles.cues_of(said, sounds)


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60).filter(
    lambda text: text.split() == [text]
)


labels = st.sampled_from(["Dog", "Telephone bell ringing", "Music", "Speech", "Siren", "x" * 64])


@st.composite
def heard(draw: st.DrawFn) -> list[Sound]:
    """Sounds anywhere, that may overlap."""
    starts = draw(st.lists(st.integers(0, 60_000), max_size=8))
    return [Sound(draw(labels), start, start + draw(st.integers(0, 40_000))) for start in starts]


@st.composite
def spoken(draw: st.DrawFn) -> list[list[Word]]:
    """Segments of words that go forward in time and may touch."""
    at = draw(st.integers(0, 4_000_000))
    segments: list[list[Word]] = []
    for _ in range(draw(st.integers(0, 4))):
        words = []
        for _ in range(draw(st.integers(1, 12))):
            start = at + draw(st.integers(0, 3000))
            at = start + draw(st.integers(0, 2000))
            words.append(Word(draw(texts), start, at, 1.0))
        segments.append(words)
    return segments


@given(spoken())
def test_cues_hold_every_word_once_and_never_overlap(segments: list[list[Word]]) -> None:
    """In order, each of a bounded length, the next one at its first word."""
    cues = cues_of(segments)
    shown = "".join("".join(cue.lines) for cue in cues)
    assert "".join(shown.split()) == "".join("".join(w.text.split()) for words in segments for w in words)
    assert all(0 <= cue.start_ms < cue.end_ms for cue in cues)
    assert all(a.end_ms <= b.start_ms for a, b in pairwise(cues))
    assert all(cue.end_ms - cue.start_ms <= MAX_CUE_MS for cue in cues)
    for cue in cues:
        assert all(len(line) <= MAX_CHARS or " " not in line for line in cue.lines)
        assert len(cue.lines) <= MAX_LINES


@given(spoken())
def test_files_have_the_form_that_players_read(segments: list[list[Word]]) -> None:
    """Whatever was said: one block a cue, times with hours; no markup, arrow or empty line in a text."""
    cues = cues_of(segments)
    head, *blocks = webvtt(cues).rstrip("\n").split("\n\n")
    assert head == "WEBVTT"
    assert len(blocks) == len(cues)
    for block in blocks:
        timing, *lines = block.split("\n")
        assert re.fullmatch(r"\d{2,}:[0-5]\d:[0-5]\d\.\d{3} --> \d{2,}:[0-5]\d:[0-5]\d\.\d{3}", timing)
        assert lines
        assert not any("<" in line or "-->" in line or not line for line in lines)
    found = re.findall(r"(?m)^\d{2,}:\d\d:\d\d,\d{3} --> ", subrip(cues))
    assert len(found) == len(cues)


def words(text: str, start_ms: int, word_ms: int = 300) -> list[Word]:
    """The words of a text, one after another."""
    parts = text.split()
    return [
        Word(part, start_ms + i * word_ms, start_ms + (i + 1) * word_ms, 1.0) for i, part in enumerate(parts)
    ]


def test_a_file_as_a_player_sees_it() -> None:
    """Over an hour, with characters that mean something, cut at a sentence; no word stands alone."""
    hour = 3_600_000
    said = [words("Salt & pepper <b>. Then", hour + 1, 500) + words("more", hour + 5_000)]
    assert webvtt(cues_of(said)) == (
        "WEBVTT\n\n"
        "01:00:00.001 --> 01:00:02.001\nSalt &amp; pepper &lt;b&gt;.\n\n"
        "01:00:02.001 --> 01:00:05.300\nThen more\n"
    )
    assert subrip(cues_of(said)).startswith("1\n01:00:00,001 --> 01:00:02,001\nSalt & pepper <b>.\n\n2\n")
    assert webvtt([]) == "WEBVTT\n"
    assert subrip([]) == ""


def test_long_speech_is_cut_to_what_can_be_read() -> None:
    """No cue is longer than its words allow, none too short to be seen where there is room."""
    cues = cues_of([words(" ".join(f"word{i}" for i in range(200)), 0)])
    assert len(cues) > 10
    assert all(cue.end_ms - cue.start_ms <= MAX_CUE_MS for cue in cues)
    (short,) = cues_of([words("Yes.", 0, 100)])
    assert short.end_ms == MIN_CUE_MS


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        # A jingle of 23.6 s in the span of the first word, and the sentence behind it.
        (
            [Word("The", 8_000, 31_600, 0.5), *words("minister said so.", 31_600)],
            [Cue(29_600, 32_500, ("The minister said so.",))],
        ),
        # The same of a word that is a segment of its own.
        ([Word("The", 8_000, 31_600, 0.5)], [Cue(29_600, 31_600, ("The",))]),
        # A silence in the span of the last word of a sentence.
        (
            [*words("that was it", 0), Word("then.", 900, 20_000, 0.5)],
            [Cue(0, 2_900, ("that was it then.",))],
        ),
        # A silence in the span of a word in the middle: the second cue begins with the word.
        (
            [*words("that was it", 0), Word("and", 900, 20_000, 0.5), *words("then more", 20_000)],
            [Cue(0, 1_000, ("that was it",)), Cue(18_000, 20_600, ("and then more",))],
        ),
    ],
)
def test_a_silence_in_the_span_of_a_word_is_not_shown(said: list[Word], expected: list[Cue]) -> None:
    """No cue is over its length or begins before its word is spoken."""
    assert cues_of([said]) == expected
    assert all(cue.end_ms - cue.start_ms <= MAX_CUE_MS for cue in expected)


@given(spoken())
def test_no_cue_begins_before_its_first_word(segments: list[list[Word]]) -> None:
    """Where the words have spans that speech can have."""
    said = [word for words in segments for word in words]
    assert all(word.end_ms - word.start_ms <= MAX_WORD_MS for word in said)
    for cue in cues_of(segments):
        n_chars = len("".join("".join(cue.lines).split()))
        first, said = said[0], said[_n_words(said, n_chars) :]
        assert first.start_ms <= cue.start_ms
    assert not said


def _n_words(said: list[Word], n_chars: int) -> int:
    """How many words from the first on have so many characters."""
    n = 0
    while n_chars > 0:
        n_chars -= len(said[n].text)
        n += 1
    assert n_chars == 0
    return n


@pytest.mark.parametrize("n_words", range(2, 60))
def test_no_word_of_a_long_sentence_stands_alone(n_words: int) -> None:
    """Whatever is left for the last cue, and every cue is seen for a second."""
    cues = cues_of([words(" ".join(["butterfly"] * n_words), 0)])
    assert all(len(" ".join(cue.lines).split()) > 1 for cue in cues)
    assert all(cue.end_ms - cue.start_ms >= MIN_CUE_MS for cue in cues)


def test_a_short_sentence_joins_its_neighbour() -> None:
    """Rather than flash by alone."""
    (cue,) = cues_of([words("No. I will not.", 0)])
    assert cue.lines == ("No. I will not.",)


def test_fast_speech_stays_until_it_can_be_read_where_there_is_room() -> None:
    """It reaches into the gap behind, and never over the next cue."""
    fast = words("incomprehensibly characteristic pronunciations.", 0, 100)
    (alone,) = cues_of([fast])
    assert alone.end_ms == CHAR_MS * sum(map(len, alone.lines)) > fast[-1].end_ms
    cue, _ = cues_of([fast, words("Next one.", 1_500)])
    assert cue.end_ms == 1_500


@given(spoken(), heard())
def test_sounds_stand_among_the_words(segments: list[list[Word]], sounds: list[Sound]) -> None:
    """With them too, cues hold every word once, never overlap, and are of a length that can be read."""
    assume(not any(bracket in word.text for words in segments for word in words for bracket in "[]"))
    cues = cues_of(segments, sounds)
    shown = "".join(re.sub(r"\[[^\]]*\]", "", " ".join(cue.lines)) for cue in cues).replace(MUSIC, "")
    assert _letters(shown) == _letters("".join(w.text for words in segments for w in words))
    assert all(0 <= cue.start_ms < cue.end_ms for cue in cues)
    assert all(a.end_ms <= b.start_ms for a, b in pairwise(cues))
    assert all(cue.end_ms - cue.start_ms <= MAX_CUE_MS for cue in cues)
    assert all(len(cue.lines) <= MAX_LINES for cue in cues)
    n_words = sum(map(len, segments))
    said = {sound.label for sound in sounds}
    text = " ".join(" ".join(cue.lines) for cue in cues)
    assert "Speech" not in text or n_words
    assert ("[Dog]" in text) == ("Dog" in said)


def _letters(text: str) -> str:
    """Without what a sound's name is written with."""
    return "".join(c for c in text if not c.isspace() and c not in "[]" + MUSIC)


def test_sounds_are_named_where_they_happened() -> None:
    """Between sentences for as long as they sound, in a sentence in their place; music as a note."""
    said = [words("Wait for me.", 10_000), words("Who is it now?", 40_000)]
    sounds = [
        Sound("Speech", 9_800, 11_000),
        Sound("Doorbell", 10_450, 11_400),
        Sound("Music", 20_000, 39_000),
        Sound("Telephone bell ringing", 50_000, 53_000),
    ]
    assert cues_of(said, sounds) == [
        Cue(10_000, 11_150, ("Wait for [Doorbell] me.",)),
        Cue(20_000, 27_000, (MUSIC,)),
        Cue(40_000, 41_200, ("Who is it now?",)),
        Cue(50_000, 53_000, ("[Telephone bell ringing]",)),
    ]
    assert all("[" not in line for cue in cues_of(said) for line in cue.lines)


@pytest.mark.parametrize(
    ("sounds", "shown"),
    [
        # It comes again and again: named once, and again after a pause.
        ([Sound("Dog", t, t + 500) for t in (0, 2_000, 4_000)], ["[Dog]"]),
        ([Sound("Dog", 0, 500), Sound("Dog", 500 + SAME_SOUND_MS, 9_000)], ["[Dog]", "[Dog]"]),
        # Two at once share a cue, so that neither flashes by.
        ([Sound("Dog", 0, 5_000), Sound("Siren", 400, 9_000)], ["[Dog] [Siren]"]),
        ([Sound("Singing", 0, 500), Sound("Background music", 100, 900)], [MUSIC]),
        ([Sound("Conversation", 0, 500), Sound("male speech", 100, 900)], []),
        ([Sound("a\n\nb --> <i>", 0, 500)], ["[a b --> <i>]"]),
    ],
)
def test_a_sound_is_named_once(sounds: list[Sound], shown: list[str]) -> None:
    """However often it comes, and never speech."""
    assert [" ".join(cue.lines) for cue in cues_of([], sounds)] == shown


@pytest.mark.parametrize("start_ms", [9_200, 10_100, 10_700, 11_000])
def test_a_sound_beside_a_sentence_makes_nothing_flash_by(start_ms: int) -> None:
    """It shares the sentence's cue, or has a second of its own."""
    cues = cues_of([words("Wait for me now.", 10_000, 200)], [Sound("Dog", start_ms, start_ms + 300)])
    assert sum("[Dog]" in " ".join(cue.lines) for cue in cues) == 1
    assert all(cue.end_ms - cue.start_ms >= MIN_CUE_MS for cue in cues)


def test_a_sentence_of_one_word_joins_its_neighbour_segment() -> None:
    """The nearer one, unless a pause or another speaker is between."""
    first, yes, last = words("I see it.", 0), words("Yes.", 1_700), words("So do I now.", 2_300)
    assert [cue.lines for cue in cues_of([first, yes, last])] == [("I see it.",), ("Yes. So do I now.",)]
    assert [cue.lines for cue in cues_of([first, yes])] == [("I see it. Yes.",)]
    alone = [words("I see it.", 0), words("Yes.", 900 + PAUSE_MS), words("So do I.", 5_000)]
    assert len(cues_of(alone)) == 3
    assert len(cues_of([first, yes, last], speakers=["S1", "S2", "S1"])) == 3


def test_speakers_are_voices_or_names() -> None:
    """WebVTT marks each cue, SubRip names who begins to speak; unknown ones are not shown."""
    said = [words("Good morning everyone.", 0), words("And to you.", 3_000), words("Thank you all.", 6_000)]
    cues = cues_of(said, speakers=["S1", "a <b>\n--> c", "a <b>\n--> c"])
    assert [line for line in webvtt(cues).splitlines() if line.startswith("<v")] == [
        "<v S1>Good morning everyone.",
        "<v a &lt;b&gt; --&gt; c>And to you.",
        "<v a &lt;b&gt; --&gt; c>Thank you all.",
    ]
    texts_shown = [line for line in subrip(cues).splitlines() if line and "-->" not in line]
    assert texts_shown[1::2] == ["S1: Good morning everyone.", "a <b> -> c: And to you.", "Thank you all."]
    assert "<v" not in webvtt(cues_of(said))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("你好世界", ("你好世界",)),
        ("客観的実在の判断", ("客観的実在の判断",)),
        ("中" * 50, ("中" * 42, "中" * 8)),
    ],
)
def test_unspaced_scripts_are_joined_as_they_are_written(text: str, lines: tuple[str, ...]) -> None:
    """Character by character, and broken where a line is full."""
    (cue,) = cues_of([[Word(char, i * 100, i * 100 + 100, 1.0) for i, char in enumerate(text)]])
    assert cue.lines == lines
