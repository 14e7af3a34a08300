"""Words to running text and back, in scripts with and without spaces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.text import comparable, ends_sentence, join_words, separator, split_words

SCRIPTS = "aé1ß.,!?\"')你好。\uff0c\uff01ไทยこんにちは한국"
texts = st.lists(st.text(alphabet=SCRIPTS, min_size=1, max_size=6), max_size=6).map(" ".join)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], ""),
        (["one"], "one"),
        (["Good", "morning."], "Good morning."),
        (["你好", "世界", "。"], "你好世界。"),
        (["say", "你好", "twice"], "say 你好 twice"),
        (["สวัส", "ดี"], "สวัสดี"),
        (["안녕", "하세요"], "안녕 하세요"),  # Korean has spaces
        (["", "one", "", "two"], "one two"),
    ],
)
def test_words_are_joined_as_their_script_is_written(words: list[str], text: str) -> None:
    """A space, except between two words of an unspaced script."""
    assert join_words(words) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("  Good   morning. ", ["Good", "morning."]),
        ("你好。", ["你", "好。"]),  # closing punctuation stays with its word
        ("Hi 你好", ["Hi", "你", "好"]),
    ],
)
def test_text_comes_apart_as_its_script_is_written(text: str, words: list[str]) -> None:
    """At spaces, and by character where a script has none."""
    assert split_words(text) == words


@given(texts)
def test_splitting_and_joining_keeps_every_character(text: str) -> None:
    """All but spaces: those may go where a space stood between two words of an unspaced script."""
    words = split_words(text)
    assert "".join(join_words(words).split()) == "".join(text.split())
    assert all(word and not any(char.isspace() for char in word) for word in words)


@given(texts, texts)
def test_the_separator_joins_texts_as_words_are_joined(before: str, text: str) -> None:
    """Text sent piece by piece, each behind its separator, is the text joined at once."""
    assert before + separator(before, text) + text == join_words([before, text])


@pytest.mark.parametrize(
    ("word", "other"),
    [("Hello,", "hello"), ("It's", "its"), ("STRASSE", "straße"), ("\uff11\uff12", "12"), ("ﬁne", "fine")],
)
def test_words_agree_despite_case_and_punctuation(word: str, other: str) -> None:
    """And despite the forms that Unicode has of one character."""
    assert comparable(word) == comparable(other)


def test_words_that_differ_do_not_agree() -> None:
    """An accent makes another word; of punctuation alone, the marks themselves are compared."""
    assert comparable("resume") != comparable("résumé")
    assert comparable("?") != comparable("!")


@pytest.mark.parametrize("word", ["end.", "Really?", "stop!", 'said."', "(so.)", "好。", "吗\uff1f", "है।"])
def test_a_sentence_ends(word: str) -> None:
    """In several scripts, and before closing quotes and brackets."""
    assert ends_sentence(word)


@pytest.mark.parametrize("word", ["", "and", "so,", "3.14", '"', "well:"])
def test_a_sentence_goes_on(word: str) -> None:
    """After a comma, a number's point, or nothing at all."""
    assert not ends_sentence(word)
