"""When each word was said: the times of its tokens, without the silence or music beside it.

Alignment leaves no gaps: every encoder position belongs to a token. A pause goes to the punctuation
behind a word or, where there is none, to the beginning of the next word. So a word ends where its
punctuation begins, its beginning is cut to what is loud, and a span that is too long for a word
holds the word at its end; of two such spans in a row the first word stands right before the second.
What was measured is in docs/measurements.md, section 19.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.whisper.modeling import FRAMES_PER_POSITION
from model.whisper.tokens import TokenWord

POSITIONS_PER_S = 50
# Spans of words by their letters, seconds: 0.2 % of 5,471 words are longer than the longest.
LONGEST_S, LONGEST_PER_LETTER_S = 0.6, 0.08
TYPICAL_S, TYPICAL_PER_LETTER_S = 0.1, 0.06
# What is written shorter than it is said: a digit is a word, a letter of a script without case may be a
# syllable, and capitals alone are spelt.
LETTERS = {"Nd": 5, "Lo": 3}
SPELT_LETTERS = 3
# What is loud, in a window whose quietest tenth and loudest twentieth are known: so far above the quiet.
QUIET_PERCENTILE, LOUD_PERCENTILE = 10, 95
LOUD_SHARE, LOUD_DB = 0.4, 6.0
MAX_RANGE_DB = 50.0  # digital silence is no quieter than so far below the loud
LOUD_RUN = 2  # positions in a row; one alone is a click


def word_spans(
    words: Sequence[TokenWord], starts: Sequence[int], loud: NDArray[np.bool_]
) -> list[tuple[int, int]]:
    """Where each word is said, in encoder positions.

    Args:
        words: In order.
        starts: Of each token, and where the last one ends; not decreasing.
        loud: [n_positions], see `loud_positions`.

    Returns:
        First and last position (exclusive) of each word: not before its first token, not longer than
        `longest`, and so that no two overlap.
    """
    spans: list[tuple[int, int]] = []  # from the last word to the first
    limit: int | None = None  # where the word behind begins, if its span was too long
    for word in reversed(words):
        first, last = starts[word.first], starts[word.spoken]
        is_too_long = last - first > longest(word.text)
        if is_too_long:
            if limit is not None and word.spoken == word.last:
                last = limit
            else:
                last = _end_of_loud(loud, first, last)
            first = max(first, last - _positions(TYPICAL_S + TYPICAL_PER_LETTER_S * _n_letters(word.text)))
        first = _begin_of_loud(loud, first, last)
        limit = first if is_too_long else None
        spans.append((first, last))
    return spans[::-1]


def loud_positions(log_power: Tensor) -> NDArray[np.bool_]:
    """Which encoder positions are loud, compared with the rest of their window.

    Args:
        log_power: [T, M] log10 power of mel frames.

    Returns:
        [T // 2].
    """
    n_positions = log_power.shape[0] // FRAMES_PER_POSITION
    if not n_positions:
        return np.zeros(0, dtype=np.bool_)
    power = (log_power * math.log(10.0)).exp().sum(dim=1)  # [T]
    level = 10.0 * power[: n_positions * FRAMES_PER_POSITION].log10()
    level_db = level.view(n_positions, FRAMES_PER_POSITION).mean(dim=1).numpy()
    quiet, top = np.percentile(level_db, (QUIET_PERCENTILE, LOUD_PERCENTILE))
    quiet = max(quiet, top - MAX_RANGE_DB)
    is_loud: NDArray[np.bool_] = level_db >= quiet + max(LOUD_DB, LOUD_SHARE * (top - quiet))
    return is_loud


def longest(text: str) -> int:
    """The longest span of a word, in encoder positions."""
    return _positions(LONGEST_S + LONGEST_PER_LETTER_S * _n_letters(text))


def _begin_of_loud(loud: NDArray[np.bool_], first: int, last: int) -> int:
    """Where sound begins inside a span; its beginning where there is none."""
    runs = _runs(loud, first, last)
    return first + int(runs[0]) if len(runs) else first


def _end_of_loud(loud: NDArray[np.bool_], first: int, last: int) -> int:
    """Where sound ends inside a span; its end where there is none."""
    runs = _runs(loud, first, last)
    return first + int(runs[-1]) + LOUD_RUN if len(runs) else last


def _runs(loud: NDArray[np.bool_], first: int, last: int) -> NDArray[np.intp]:
    """Offsets in a span at which `LOUD_RUN` loud positions begin."""
    inside = loud[first:last]
    if len(inside) < LOUD_RUN:
        return np.zeros(0, dtype=np.intp)
    return np.flatnonzero(np.lib.stride_tricks.sliding_window_view(inside, LOUD_RUN).all(axis=1))


def _n_letters(text: str) -> int:
    kinds = [kind for char in text if (kind := unicodedata.category(char))[0] in "LN"]
    is_spelt = len(kinds) > 1 and all(kind == "Lu" for kind in kinds)
    return sum(SPELT_LETTERS if is_spelt else LETTERS.get(kind, 1) for kind in kinds)


def _positions(seconds: float) -> int:
    return round(seconds * POSITIONS_PER_S)
