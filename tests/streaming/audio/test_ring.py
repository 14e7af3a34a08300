"""The ring against a plain list."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streaming.audio.ring import Ring


@given(
    capacity=st.integers(1, 40),
    steps=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 200)), max_size=40),
)
def test_a_ring_reads_what_a_list_would(capacity: int, steps: list[tuple[int, int]]) -> None:
    """Any pushes and forgets leave exactly what was not forgotten, at its position."""
    ring, everything = Ring(capacity), np.zeros(0, np.float32)
    for n_samples, forget in steps:
        ring.forget(forget)
        pcm = np.arange(n_samples, dtype=np.float32)[: ring.n_free] + len(everything)
        ring.push(pcm)
        everything = np.concatenate([everything, pcm])
        assert ring.end == len(everything)
        assert ring.end - ring.start + ring.n_free == capacity
        np.testing.assert_array_equal(ring.read(ring.start, ring.end), everything[ring.start :])


def test_forgetting_never_goes_back() -> None:
    """A position before the start changes nothing, one after the end forgets all there is."""
    ring = Ring(8)
    ring.push(np.ones(6, np.float32))
    ring.forget(4)
    ring.forget(2)
    assert (ring.start, ring.n_free) == (4, 6)
    ring.forget(100)
    assert (ring.start, ring.end, ring.n_free) == (6, 6, 8)


def test_what_is_read_is_a_copy() -> None:
    """Later pushes do not change it."""
    ring = Ring(4)
    ring.push(np.ones(4, np.float32))
    read = ring.read(0, 4)
    ring.forget(4)
    ring.push(np.zeros(4, np.float32))
    np.testing.assert_array_equal(read, np.ones(4))
