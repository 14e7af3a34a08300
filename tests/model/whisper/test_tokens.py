"""The vocabulary, and words out of rows of tokens."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from model.whisper.checkpoint import load_embedded
from model.whisper.tokens import TokenWord, Vocabulary, is_punctuation, split_words, with_missing_merges
from tests.tiny_whisper import LANGUAGES, tiny_tokenizer

VOCABULARY = Vocabulary(tiny_tokenizer())


def split(text: str, language: str | None = "en") -> list[str]:
    """The words of a text's tokens."""
    return [word.text for word in split_words(VOCABULARY, VOCABULARY.encode(text), language)]


def test_special_tokens_are_found() -> None:
    """Languages in the model's order, to their ids and back."""
    assert VOCABULARY.languages == LANGUAGES
    for language in LANGUAGES:
        assert VOCABULARY.language_of(VOCABULARY.language_id(language)) == language
    assert VOCABULARY.no_speech == VOCABULARY.no_timestamps - 1


def test_an_unknown_language_is_refused() -> None:
    """The known ones are named."""
    with pytest.raises(ValueError, match="'fr'; expected one of en, zh, de, ko"):
        VOCABULARY.language_id("fr")


def test_another_tokenizer_is_refused() -> None:
    """The missing token is named."""
    with pytest.raises(ValueError, match=r"no <\|startoftranscript\|>: it is not Whisper's"):
        Vocabulary(Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))


def test_east_asian_tokens_are_found_by_their_first_byte() -> None:
    """Whole characters, and the bytes that rare ones are said in; nothing of another script."""
    ids = VOCABULARY.east_asian_ids()
    assert {"\u4e2d", "\u6587", " \u4e2d"} <= {VOCABULARY.decode([i]) for i in ids}
    rare = VOCABULARY.encode(
        "\u85e4"
    )  # not in the vocabulary: "\u85e4 \u85e4 \u85e4" was once heard in English
    assert len(rare) > 1
    assert set(rare) & set(ids)
    assert not set(VOCABULARY.encode(" the day, na\u00efve \u00e9t\u00e9. \u0434\u0430")) & set(ids)


def without_merge(tokenizer: Tokenizer, idx: int) -> Tokenizer:
    """As a converter leaves it that takes a line of merges for a title."""
    settings = json.loads(tokenizer.to_str())
    del settings["model"]["merges"][idx]
    return Tokenizer.from_str(json.dumps(settings))


def test_a_missing_merge_is_put_back_in_its_place() -> None:
    """Of a token of two symbols; " the" is one token again, and not a blank and a word."""
    whole = tiny_tokenizer()
    text = " the open-source day"
    merges = json.loads(whole.to_str())["model"]["merges"]
    lost = [idx for idx, pair in enumerate(merges) if len("".join(pair)) == 2]
    assert merges[0] == ["\u0120", "t"]
    assert len(lost) > 1
    for idx in lost:
        broken = without_merge(whole, idx)
        mended = with_missing_merges(broken)
        assert json.loads(mended.to_str())["model"]["merges"] == merges
    assert Vocabulary(without_merge(whole, 0)).encode(text) != VOCABULARY.encode(text)
    assert with_missing_merges(whole) is whole


@pytest.mark.slow
def test_every_token_of_the_embedded_vocabulary_can_be_written() -> None:
    """Its text becomes the token again: the model reads agreed words as it wrote them."""
    tokenizer = load_embedded().tokenizer
    vocabulary = Vocabulary(tokenizer)
    texts = {i: vocabulary.decode([i]) for i in range(vocabulary.end)}
    others = [
        text for i, text in texts.items() if "\ufffd" not in text and text and vocabulary.encode(text) != [i]
    ]
    assert sorted(others) == ["'D", "'M", "'RE", "'S", "'T"]  # apart before merges are looked at
    assert len(vocabulary.encode(" talking to the three that think")) == 6


def test_words_begin_with_spaces() -> None:
    """Punctuation belongs to the word before it."""
    assert split(" the open-source day, Day.") == ["the", "open-source", "day,", "Day."]


def test_what_begins_without_a_space_goes_on() -> None:
    """The first word of a row may hang on what came before the row."""
    words = split_words(VOCABULARY, VOCABULARY.encode("-source day"), "en")
    assert [(word.text, word.is_continuation) for word in words] == [("-source", True), ("day", False)]


@pytest.mark.parametrize(
    ("text", "language", "behind"),
    [
        (" the day.", "en", ["", "."]),
        (' "day," he', "en", [',"', ""]),
        (" open-source day", "en", ["", ""]),
        (" 3.5 day", "en", ["", ""]),
        ("中文。文", "zh", ["", "。", ""]),
    ],
)
def test_punctuation_behind_a_word_is_told_apart(text: str, language: str, behind: list[str]) -> None:
    """Inside a word it is spoken with it, and what is nothing but punctuation is a word of its own."""
    ids = VOCABULARY.encode(text)
    words = split_words(VOCABULARY, ids, language)
    assert [VOCABULARY.decode(ids[word.spoken : word.last]) for word in words] == behind


def test_chinese_characters_are_words() -> None:
    """Each with the punctuation after it; in a spaced language they stay together."""
    assert split("中文。文", "zh") == ["中", "文。", "文"]
    assert split(" 中文。", "en") == ["中文。"]


def test_a_character_of_several_tokens_is_one_piece() -> None:
    """Bytes are put together before words are told apart."""
    ids = VOCABULARY.encode("你好")
    assert len(ids) == 6
    words = split_words(VOCABULARY, ids, "zh")
    assert [(w.text, w.first, w.last) for w in words] == [("你", 0, 3), ("好", 3, 6)]


def test_an_incomplete_character_at_the_end_belongs_to_the_last_word() -> None:
    """It is not shown, and its tokens are not lost."""
    ids = VOCABULARY.encode(" day") + VOCABULARY.encode("好")[:2]
    assert split_words(VOCABULARY, ids, "en") == [TokenWord("day", 0, len(ids), False, 1)]


def test_an_invalid_byte_does_not_swallow_the_words_after_it() -> None:
    """A continuation byte in the middle, which no further token can complete."""
    ids = VOCABULARY.encode(" the") + VOCABULARY.encode("你")[1:2] + VOCABULARY.encode(" open day")
    assert [word.text for word in split_words(VOCABULARY, ids, "en")] == ["the", "open", "day"]


@given(ids=st.lists(st.integers(0, VOCABULARY.end - 1), max_size=12), language=st.sampled_from(["en", "zh"]))
def test_words_cover_the_row(ids: list[int], language: str) -> None:
    """In order, without gaps, whatever the tokens."""
    words = split_words(VOCABULARY, ids, language)
    edges = [0, *(word.last for word in words)]
    assert [word.first for word in words] == edges[:-1]
    assert edges[-1] == len(ids)
    assert all(word.first < word.last for word in words)
    assert not any("\ufffd" in word.text for word in words)


@pytest.mark.parametrize(("text", "expected"), [("…!", True), ("", True), ("a.", False), ("3", False)])
def test_punctuation_cannot_be_spoken(text: str, expected: bool) -> None:
    """Letters and digits can."""
    assert is_punctuation(text) is expected
