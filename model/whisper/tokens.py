"""Whisper's vocabulary: special ids, prompts, and the words in a row of tokens."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

EAST_ASIAN_LANGUAGES = frozenset({"zh", "ja", "ko", "yue"})
# Written without spaces between words: there, every whole character is a word.
UNSPACED_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "my", "yue", "km", "bo"})


class Vocabulary:
    """Ids and text of one checkpoint's tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.start = self._id("<|startoftranscript|>")
        self.end = self._id("<|endoftext|>")
        self.transcribe = self._id("<|transcribe|>")
        self.previous = self._id("<|startofprev|>")
        self.no_timestamps = self._id("<|notimestamps|>")
        # Languages lie between the start token and the two tasks; the order is the model's.
        translate = self._id("<|translate|>")
        self.language_ids = range(self.start + 1, min(translate, self.transcribe))
        self.languages = tuple(str(tokenizer.id_to_token(i)).strip("<|>") for i in self.language_ids)
        self.no_speech = self.no_timestamps - 1  # "<|nocaptions|>" in older files, "<|nospeech|>" in newer

    def language_id(self, language: str) -> int:
        """The token of a language code.

        Raises:
            ValueError: the checkpoint does not know it.
        """
        if language not in self.languages:
            raise ValueError(f"language {language!r}; expected one of {', '.join(self.languages)}")
        return self.language_ids[self.languages.index(language)]

    def language_of(self, language_id: int) -> str:
        """The code of a language's token."""
        return self.languages[language_id - self.language_ids.start]

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, nothing added."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; incomplete characters come out as U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def east_asian_ids(self) -> list[int]:
        """Text tokens with a byte that begins a kana, Han or Hangul character in UTF-8.

        Rare characters are said byte by byte, so looking for whole characters would miss them. The
        tokenizer writes these bytes, 0xE3 to 0xED, as the Latin-1 characters of the same number.
        """
        tokens = (str(self._tokenizer.id_to_token(i)) for i in range(self.end))
        return [i for i, token in enumerate(tokens) if any("\u00e3" <= c <= "\u00ed" for c in token)]

    def _id(self, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise ValueError(f"the tokenizer has no {token}: it is not Whisper's")
        return int(token_id)


def with_missing_merges(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, with the merges of those tokens of two symbols that none of its merges makes.

    The list of merges of OpenAI's multilingual vocabulary has no title line, and converters that skip
    one drop its first merge, of the blank and "t": " the" becomes the tokens " " and "the". The model
    never read text like that. Given it as agreed words it writes so itself, and half words follow.
    A token's number is its merge's rank, so it is known where a missing merge belongs.
    """
    settings = json.loads(tokenizer.to_str())
    ids: dict[str, int] = settings["model"]["vocab"]
    merges: list[list[str]] = settings["model"]["merges"]
    special = {token["content"] for token in settings["added_tokens"]}
    made = {first + second for first, second in merges}
    missing = [token for token in ids if len(token) == 2 and token not in made | special]
    if not missing:
        return tokenizer
    settings["model"]["merges"] = sorted([*merges, *map(list, missing)], key=lambda pair: ids["".join(pair)])
    return Tokenizer.from_str(json.dumps(settings))


@dataclass(frozen=True, slots=True)
class TokenWord:
    """A word as tokens [first, last) of a row."""

    text: str
    first: int
    last: int
    is_continuation: bool  # hangs on what came before the row, without a space


def split_words(vocabulary: Vocabulary, ids: Sequence[int], language: str | None) -> list[TokenWord]:
    """The words of a row of text tokens, in order; together they cover it.

    A word begins with a space, or, in unspaced languages, with any whole character that is no
    punctuation. An incomplete character at the end belongs to the last word.
    """
    is_unspaced = language in UNSPACED_LANGUAGES
    pieces: list[tuple[str, int, int]] = []  # whole characters: text, first and last token
    first = 0
    for last in range(1, len(ids) + 1):
        text = vocabulary.decode(ids[first:last])
        # An invalid byte stays U+FFFD for good: only one at the end may still become a character.
        if not text.endswith("\ufffd") or last == len(ids):
            pieces.append((text.replace("\ufffd", ""), first, last))
            first = last
    words: list[TokenWord] = []
    for text, first, last in pieces:
        begins = text.startswith(" ") or (is_unspaced and not is_punctuation(text))
        if words and not begins:
            before = words[-1]
            words[-1] = TokenWord(before.text + text, before.first, last, before.is_continuation)
        else:
            words.append(TokenWord(text, first, last, is_continuation=not begins))
    return [TokenWord(w.text.strip(), w.first, w.last, w.is_continuation) for w in words]


def is_punctuation(text: str) -> bool:
    """Whether nothing in `text` could be spoken."""
    return all(unicodedata.category(c)[0] in "PSZC" for c in text)
