"""Words to running text and back to comparable words. Pure functions."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

_CLOSING = "\"')]\u00bb\u201d\u2019"  # quotes and brackets that may close behind a full stop
_SENTENCE_ENDS = (".", "?", "!", "\u3002", "\uff1f", "\uff01", "\u0964")  # Latin, full-width, danda


def join_words(words: Iterable[str]) -> str:
    """Words as running text: a space between them, but none between two words of an unspaced script."""
    text = ""
    for word in words:
        if text and word and not (_is_unspaced(text[-1]) and _is_unspaced(word[0])):
            text += " "
        text += word
    return text


def separator(before: str, text: str) -> str:
    """What stands between `text` and the running text before it: a space, or nothing."""
    return join_words((before[-1], text[0]))[1:-1] if before and text else ""


def split_words(text: str) -> list[str]:
    """Running text as words that `join_words` makes into it again, but for the width of spaces.

    Scripts without spaces come apart by character, closing punctuation stays where it hangs.
    """
    words: list[str] = []
    for piece in text.split():
        start = 0
        for idx in range(1, len(piece)):
            is_inside = _is_unspaced(piece[idx - 1]) and _is_unspaced(piece[idx])
            if is_inside and not unicodedata.category(piece[idx]).startswith("P"):
                words.append(piece[start:idx])
                start = idx
        words.append(piece[start:])
    return words


def comparable(word: str) -> str:
    """A word without case and punctuation: two updates that differ in a comma agree on the word."""
    kept = "".join(c for c in unicodedata.normalize("NFKC", word).casefold() if c.isalnum())
    return kept or word


def ends_sentence(word: str) -> bool:
    """Whether a sentence ends with this word."""
    return word.rstrip(_CLOSING).endswith(_SENTENCE_ENDS)


def _is_unspaced(char: str) -> bool:
    """Chinese, Japanese, Thai, Lao, Khmer, Burmese, and full-width punctuation."""
    code = ord(char)
    return (
        0x2E80 <= code <= 0x9FFF
        or 0xF900 <= code <= 0xFAFF
        or 0xFF00 <= code <= 0xFF65
        or 0x20000 <= code <= 0x3FFFF
        or 0x0E00 <= code <= 0x0EFF
        or 0x1000 <= code <= 0x109F
        or 0x1780 <= code <= 0x17FF
    )
