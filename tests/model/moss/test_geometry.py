"""Places of a rolling window: entries, positions and ids, without a model."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.moss.geometry import (
    ENTRY_MULTIPLE,
    SPARE,
    MarkerMode,
    PrefixMode,
    SlotWindow,
    WindowGeometry,
    WindowSettings,
)
from tests.model.moss.tiny import LAYOUT

N_PREFIX = len(LAYOUT.prefix)
BLOCK_TOKENS = 50


def make_geometry(
    n_blocks: int = 3,
    evict_blocks: int = 1,
    markers: MarkerMode = "absolute",
    prefix: PrefixMode = "follows",
    max_position: int = 8192,
) -> WindowGeometry:
    """Of a window with 64 scratch tokens."""
    settings = WindowSettings(n_blocks, evict_blocks, markers, prefix, max_position, scratch_tokens=64)
    return WindowGeometry(LAYOUT, settings, BLOCK_TOKENS, 40_960)


def append(window: SlotWindow) -> None:
    """Complete a block, as `RollingCache.append` counts it."""
    window.n_tail = 0
    if window.is_full:
        window.evict()
    window.n_blocks += 1


def test_a_row_has_a_place_for_everything() -> None:
    """Spare, prompt, W + 1 cells and scratch follow one another without overlap, to a round length."""
    geometry = make_geometry()
    cells = [geometry.cell(block, geometry.cell_size) for block in range(geometry.n_cells)]
    assert SPARE == 0
    assert geometry.prefix == range(1, 1 + N_PREFIX)
    assert cells[0].start == geometry.prefix.stop
    assert all(one.stop == other.start for one, other in pairwise(cells))
    assert cells[-1].stop <= geometry.scratch_start == geometry.n_entries - 64
    assert geometry.n_entries % ENTRY_MULTIPLE == 0
    assert geometry.n_entries - ENTRY_MULTIPLE < cells[-1].stop + 64


def test_a_block_reuses_the_cell_of_the_one_evicted_before_it() -> None:
    """Block k lies in cell k mod (W + 1)."""
    geometry = make_geometry(n_blocks=3)
    assert geometry.cell(4, 9) == geometry.cell(0, 9) == range(1 + N_PREFIX, 10 + N_PREFIX)
    assert geometry.cell(7, 9) == geometry.cell(3, 9)


@given(
    n_blocks=st.integers(1, 4),
    evict=st.integers(1, 4),
    markers=st.sampled_from(["absolute", "restart"]),
    prefix=st.sampled_from(["follows", "stays"]),
    first_block=st.integers(0, 30_000),
    tails=st.lists(st.integers(0, BLOCK_TOKENS), min_size=1, max_size=12),
)
def test_entries_positions_and_ids_agree(
    n_blocks: int,
    evict: int,
    markers: MarkerMode,
    prefix: PrefixMode,
    first_block: int,
    tails: list[int],
) -> None:
    """After any number of blocks: an entry and a position for each id, no entry twice, all in the row."""
    geometry = make_geometry(n_blocks, min(evict, n_blocks), markers, prefix)
    window = SlotWindow(geometry, 0, first_block)
    for n_done, n_tail in enumerate(tails):
        assert window.blocks.stop == first_block + n_done
        assert len(window.blocks) <= n_blocks
        window.n_tail = n_tail
        ids, entries = window.ids(), [entry for run in window.visible() for entry in run]
        positions = window.positions()
        assert len(ids) == len(entries) == len(positions) == len(set(entries))
        assert all(SPARE < entry < geometry.scratch_start for entry in entries)
        assert positions[N_PREFIX:] == list(range(window.origin, window.end_position))
        offset_s = 4 * window.blocks.start if markers == "restart" else 0
        assert window.marker_offset_s == offset_s
        append(window)


def test_the_first_marker_of_a_block_gives_its_second_second() -> None:
    """Block 9 is 36 to 40 s: its markers say 38 and 40, or 2 and 4 where it is the first of a restart."""
    digits = LAYOUT.special.digits
    absolute = SlotWindow(make_geometry(), 0, first_block=9)
    ids = absolute.block_ids(9)
    assert [digits.index(idx) for idx in ids if idx in digits] == [3, 8, 4, 0]
    restarted = SlotWindow(make_geometry(markers="restart"), 0, first_block=9)
    assert [digits.index(idx) for idx in restarted.block_ids(9) if idx in digits] == [2, 4]
    assert restarted.marker_offset_s == 36


@pytest.mark.parametrize("markers", ["absolute", "restart"])
def test_eviction_moves_the_origin_past_what_is_dropped(markers: MarkerMode) -> None:
    """Positions of kept blocks stay, except where the window restarts behind the prompt."""
    window = SlotWindow(make_geometry(n_blocks=2, markers=markers), 0)
    append(window)
    append(window)
    second = window.block_position(1)
    append(window)
    assert window.blocks == range(1, 3)
    assert window.origin == (second if markers == "absolute" else N_PREFIX)
    assert window.block_position(1) == window.origin


def test_a_window_near_its_last_position_says_so() -> None:
    """While another block and its continuations fit, it does not."""
    limit = make_geometry(n_blocks=1).n_entries
    window = SlotWindow(make_geometry(n_blocks=1, max_position=limit), 0)
    assert not window.is_near_limit
    n_ahead = make_geometry().cell_size + 64
    while window.block_position(window.blocks.stop) + n_ahead <= limit:
        assert not window.is_near_limit
        append(window)
    assert window.is_near_limit


def test_continuations_have_scratch_and_lanes_of_their_own() -> None:
    """Side by side behind the same window; released, their scratch is free again."""
    geometry = make_geometry()
    window = SlotWindow(geometry, 5)
    append(window)
    window.n_tail = 7
    one, two = window.reserve(n_tokens=40), window.reserve(n_tokens=24)
    assert (one.lane, two.lane) == ((5, 0), (5, 1))
    assert one.position == two.position == window.end_position
    assert one.entries == range(geometry.scratch_start, geometry.scratch_start + 40)
    assert two.entries == range(one.entries.stop, geometry.n_entries)
    with pytest.raises(ValueError, match="slot 5 has no scratch for 1 tokens; 0 are left"):
        window.reserve(n_tokens=1)
    window.release()
    assert window.reserve().entries == range(geometry.scratch_start, geometry.n_entries)


def test_a_continuation_grows_within_its_scratch() -> None:
    """Each token sees the window and those before it; beyond what is reserved it is refused."""
    window = SlotWindow(make_geometry(), 0)
    append(window)
    one = window.reserve(n_tokens=5)
    start, position = one.entries.start, one.position
    assert one.extend(3) == range(start, start + 3)
    assert one.visible == (*window.visible(), range(start, start + 3))
    assert one.next_entry == start + 3
    assert one.position == position + 3
    with pytest.raises(ValueError, match="no scratch reserved for 3 more tokens"):
        one.extend(3)
    assert one.extend(2) == range(start + 3, start + 5)


def test_older_blocks_can_be_hidden_from_a_continuation() -> None:
    """From `first_block` on, with the prompt and the growing block."""
    geometry = make_geometry()
    window = SlotWindow(geometry, 0)
    for _ in range(3):
        append(window)
    whole = window.reserve(n_tokens=1).visible
    last = window.reserve(first_block=2, n_tokens=1).visible
    assert last[:2] == (geometry.prefix, whole[3])


def test_a_window_that_cannot_fit_is_refused() -> None:
    """More entries than positions is an error at once, with both numbers."""
    with pytest.raises(ValueError, match="there are 600"):
        make_geometry(n_blocks=9, max_position=600)
    with pytest.raises(ValueError, match="there are 300"):
        WindowGeometry(LAYOUT, WindowSettings(n_blocks=3, scratch_tokens=64), BLOCK_TOKENS, 300)
    with pytest.raises(ValueError, match="evict_blocks"):
        WindowSettings(n_blocks=2, evict_blocks=3)
    with pytest.raises(ValueError, match="scratch_tokens"):
        WindowSettings(scratch_tokens=0)
