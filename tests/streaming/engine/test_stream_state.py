"""What the scheduler makes of a hypothesis' words."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from streaming.engine.contract import Hypothesis, TimedWord
from streaming.engine.messages import Open
from streaming.engine.stream_state import Stream, words_after

spans = st.tuples(st.integers(0, 1000), st.integers(0, 1000)).map(lambda pair: (min(pair), max(pair)))


@given(
    st.lists(spans, max_size=8),
    st.lists(spans, max_size=3).map(sorted),
    st.integers(0, 500),
    st.integers(0, 500),
)
def test_words_are_in_order_and_never_overlap(
    heard: list[tuple[int, int]], committed: list[tuple[int, int]], window_start: int, speech_start: int
) -> None:
    """None begins before the window, before anybody spoke, or in what is committed; whatever is found."""
    said = tuple(TimedWord("said", *span, 1.0) for span in committed)
    opening = Open(1, None, window_start=window_start, committed=said, speech_start=speech_start)
    words = tuple(TimedWord(str(i), *span, 1.0) for i, span in enumerate(heard))
    found = words_after(Stream.opened(opening, 0, 0.0), Hypothesis(words, "en", 0.0, 0))
    assert [word.text for word in found] == [word.text for word in words]
    assert all(word.start <= word.end for word in found)
    assert all(before.end <= after.start for before, after in pairwise(found))
    floor = max(window_start, speech_start, said[-1].end if said else 0)
    assert all(word.start >= floor for word in found)


def test_words_that_are_in_order_stay_as_they_are() -> None:
    """With the pauses between them."""
    words = (TimedWord("a", 10, 20, 1.0), TimedWord("b", 20, 20, 1.0), TimedWord("c", 500, 600, 1.0))
    found = words_after(Stream.opened(Open(1, None), 0, 0.0), Hypothesis(words, "en", 0.0, 0))
    assert found == words
