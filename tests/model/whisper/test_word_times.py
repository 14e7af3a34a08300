"""Where words are said inside the spans that alignment gives them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.whisper.tokens import TokenWord
from model.whisper.word_times import POSITIONS_PER_S, longest, loud_positions, word_spans

S = POSITIONS_PER_S


def word(text: str, first: int = 0, n_behind: int = 0) -> TokenWord:
    """A word of one token, and tokens of punctuation behind it."""
    return TokenWord(text, first, first + 1 + n_behind, is_continuation=False, spoken=first + 1)


def loud(*spans: tuple[float, float], end_s: float = 30.0) -> NDArray[np.bool_]:
    """Positions that are loud in these seconds."""
    positions = np.zeros(round(end_s * S), dtype=np.bool_)
    for first_s, last_s in spans:
        positions[round(first_s * S) : round(last_s * S)] = True
    return positions


MUSIC = loud((0.0, 30.0))
SILENCE = loud()


@pytest.mark.parametrize(
    ("said", "starts_s", "is_loud", "expected_s"),
    [
        pytest.param([word("The")], [7.9, 30.96 - 2], MUSIC, [(28.68, 28.96)], id="after a jingle"),
        pytest.param([word("But")], [3.0, 18.0], loud((1, 3), (17.8, 20)), [(17.8, 18.0)], id="a long pause"),
        pytest.param([word("and")], [2.0, 2.8], loud((0, 2), (2.6, 4)), [(2.6, 2.8)], id="a short pause"),
        pytest.param([word("him.", 0, 1)], [1.0, 1.4, 9.0], MUSIC, [(1.0, 1.4)], id="a full stop over music"),
        pytest.param([word("then")], [1.0, 20.0], loud((1.1, 1.5)), [(1.16, 1.5)], id="at the beginning"),
        pytest.param([word("shh")], [1.0, 1.4], SILENCE, [(1.0, 1.4)], id="nothing is loud"),
        pytest.param([word("on")], [1.0, 1.4], loud((1.1, 1.12), (1.3, 2)), [(1.3, 1.4)], id="a click"),
        pytest.param([word("1984")], [1.0, 2.6], MUSIC, [(1.0, 2.6)], id="digits are words"),
        pytest.param([word("BFM")], [1.0, 2.2], MUSIC, [(1.0, 2.2)], id="capitals are spelt"),
        pytest.param([word("你")], [1.0, 1.8], MUSIC, [(1.0, 1.8)], id="a syllable"),
        pytest.param(
            [word("Le"), word("plus", 1)],
            [4.0, 28.0, 29.6],
            MUSIC,
            [(29.04, 29.26), (29.26, 29.6)],
            id="two after a jingle",
        ),
        pytest.param(
            [word("it.", 0, 1), word("He", 2)],
            [1.0, 9.0, 9.0, 20.0],
            loud((1.0, 1.5), (19.8, 30.0)),
            [(1.28, 1.5), (19.8, 20.0)],
            id="a sentence before a pause",
        ),
        pytest.param([word("a"), word("b", 1)], [1.0, 1.0, 1.0], MUSIC, [(1, 1), (1, 1)], id="no length"),
    ],
)
def test_a_word_is_where_it_is_said(
    said: list[TokenWord],
    starts_s: list[float],
    is_loud: NDArray[np.bool_],
    expected_s: list[tuple[float, float]],
) -> None:
    """Not in the silence, the music or the punctuation beside it."""
    spans = word_spans(said, [round(s * S) for s in starts_s], is_loud)
    assert [(first / S, last / S) for first, last in spans] == expected_s


@given(data=st.data())
def test_spans_are_in_order_and_not_too_long(data: st.DataObject) -> None:
    """None begins before its tokens or overlaps the next, whatever the alignment and the sound."""
    n_words = data.draw(st.integers(1, 6))
    texts = st.text(st.sampled_from("abcXYZ129你。.,-"), min_size=1, max_size=8)
    words = []
    at = 0
    for _ in range(n_words):
        spoken = at + data.draw(st.integers(1, 3))
        last = spoken + data.draw(st.integers(0, 2))
        words.append(TokenWord(data.draw(texts), at, last, is_continuation=False, spoken=spoken))
        at = last
    starts = sorted(data.draw(st.lists(st.integers(0, 400), min_size=at + 1, max_size=at + 1)))
    is_loud = np.array(data.draw(st.lists(st.booleans(), max_size=400)), dtype=np.bool_)
    spans = word_spans(words, starts, is_loud)
    for said, (first, last) in zip(words, spans, strict=True):
        assert starts[said.first] <= first <= last <= starts[-1]
        assert last - first <= longest(said.text)
    assert all(last <= first for (_, last), (first, _) in pairwise(spans))


def test_loud_is_what_stands_out_of_the_window() -> None:
    """Speech over noise and over digital silence, however quiet; steady noise has nothing loud in it."""
    n_frames = 400
    noise = torch.full((n_frames, 80), -7.0)
    speech = noise.clone()
    speech[100:160] = -4.0
    expected = [50 <= position < 80 for position in range(n_frames // 2)]
    for gain in (0.0, -2.0):
        assert loud_positions(speech + gain).tolist() == expected
    digital = torch.full((n_frames, 80), -10.0)
    digital[100:160] = -4.0
    digital[200:] = -9.0
    assert loud_positions(digital).tolist() == expected
    assert not loud_positions(noise).any()
    assert loud_positions(noise[:1]).shape == (0,)
