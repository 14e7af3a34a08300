"""Where the tokens of a rolling window lie, as plain integers: cache entries, positions, token ids.

Each slot has a row of entries in the KV cache, in this order:

    spare | prompt prefix | W + 1 cells, each one block of audio with its markers | scratch

Block k lies in cell k mod (W + 1): W complete blocks and the growing one. Attention depends on the
position a key was rotated for, not on where it is stored, so evicting a block moves nothing: its cell
is reused for the growing block. Requests and their answers (`Continuation`) write to the scratch and
read the rest in place. Padding and idle lanes write to the spare entry.

Knows no tensor and no model; `model.moss.window` writes keys and values where this module says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from model.layers import rounded_up
from model.moss.prompt import MAX_MARKER_DIGITS, SECONDS_PER_MARKER, TOKENS_PER_MARKER, Layout

SPARE = 0  # the entry that padding and idle lanes write and read
ENTRY_MULTIPLE = 16  # GPU attention kernels take masks of such widths without copying them

MarkerMode = Literal["absolute", "restart"]
PrefixMode = Literal["follows", "stays"]


@dataclass(frozen=True, slots=True)
class WindowSettings:
    """The size of the window, and what happens when it is full."""

    n_blocks: int = 8  # W: complete blocks of 4 s kept, besides the growing one
    evict_blocks: int = 1  # blocks dropped at once when a block completes and W are kept
    # absolute: markers count from the stream's first sample; cached keys stay as they are.
    # restart: each eviction recomputes the window from kept embeddings; its markers begin at 2
    # again, and `RollingCache.marker_offset_s` gives the seconds to add.
    markers: MarkerMode = "absolute"
    # follows: each eviction moves the prompt right before the oldest block, so that distances stay
    # below the window's length (StreamingLLM, arXiv 2309.17453, section 3.2).
    # stays: the prompt keeps position 0, as if the evicted audio were still there.
    prefix: PrefixMode = "follows"
    max_position: int = 8192  # about 10 minutes, as far as the maintainers advise; re-anchored there
    scratch_tokens: int = 1024  # prompts and answers of one slot's continuations at one time

    def __post_init__(self) -> None:
        """Refuse settings that cannot work.

        Raises:
            ValueError: no block is kept, or more are evicted than kept.
        """
        if not 1 <= self.evict_blocks <= self.n_blocks:
            raise ValueError(f"evict_blocks is {self.evict_blocks}, not 1 to n_blocks ({self.n_blocks})")
        if self.scratch_tokens < 1:
            raise ValueError(f"scratch_tokens is {self.scratch_tokens}, not at least 1")


def cell_size(block_tokens: int) -> int:
    """Entries of a block with the longest markers there can be."""
    return block_tokens + block_tokens // TOKENS_PER_MARKER * MAX_MARKER_DIGITS


def n_entries(block_tokens: int, settings: WindowSettings, n_prefix: int) -> int:
    """Entries of one slot with a prompt of `n_prefix` tokens, rounded up to `ENTRY_MULTIPLE`."""
    n = 1 + n_prefix + (settings.n_blocks + 1) * cell_size(block_tokens) + settings.scratch_tokens
    return rounded_up(n, ENTRY_MULTIPLE)


class WindowGeometry:
    """Sizes and places that are the same for every slot."""

    def __init__(
        self, layout: Layout, settings: WindowSettings, block_tokens: int, max_position: int
    ) -> None:
        """Lay out one slot's row.

        Args:
            layout: Prompt and markers as tokens.
            settings: The window.
            block_tokens: Audio tokens of a complete block.
            max_position: Positions the model has; `settings.max_position` may lower it.

        Raises:
            ValueError: the window does not fit in the positions there are.
        """
        self.layout = layout
        self.settings = settings
        self.block_tokens = block_tokens
        self.block_s = block_tokens // TOKENS_PER_MARKER * SECONDS_PER_MARKER  # 4 s
        self.n_cells = settings.n_blocks + 1
        self.cell_size = cell_size(block_tokens)
        self.prefix = range(1, 1 + len(layout.prefix))
        self.n_entries = n_entries(block_tokens, settings, len(layout.prefix))
        self.scratch_start = self.n_entries - settings.scratch_tokens
        self.max_position = min(settings.max_position, max_position)
        if self.n_entries > self.max_position:
            raise ValueError(
                f"{settings.n_blocks} blocks and {settings.scratch_tokens} scratch tokens need "
                f"{self.n_entries} positions; there are {self.max_position}"
            )

    def cell(self, block: int, n_tokens: int) -> range:
        """Entries of the first `n_tokens` tokens, audio and markers, of a block."""
        start = self.prefix.stop + block % self.n_cells * self.cell_size
        return range(start, start + n_tokens)


@dataclass(slots=True)
class Continuation:
    """A request's tokens and its answer's, behind a slot's window.

    They see the window and themselves; nothing else sees them.
    """

    slot_idx: int
    lane_idx: int  # its row among those of its slot that are decoded side by side
    position: int  # of the next token
    window: tuple[range, ...]  # entries of the slot's window that it reads
    entries: range  # its own, reserved until `SlotWindow.release`
    n_tokens: int = 0  # how many of its own entries are written

    @property
    def visible(self) -> tuple[range, ...]:
        """Entries its next token reads, besides that token's own."""
        return (*self.window, self.entries[: self.n_tokens])

    @property
    def lane(self) -> tuple[int, int]:
        """Slot and lane."""
        return self.slot_idx, self.lane_idx

    @property
    def next_entry(self) -> int:
        """Where the next token's key and value go."""
        return self.entries.start + self.n_tokens

    def extend(self, n_tokens: int) -> range:
        """Take the entries of the next `n_tokens` tokens.

        Raises:
            ValueError: more tokens than scratch was reserved for.
        """
        taken = self.entries[self.n_tokens : self.n_tokens + n_tokens]
        if len(taken) < n_tokens:
            raise ValueError(f"slot {self.slot_idx}: no scratch reserved for {n_tokens} more tokens")
        self.n_tokens += n_tokens
        self.position += n_tokens
        return taken


class SlotWindow:
    """One slot's window: which blocks it holds, and at which positions. Everything else is derived."""

    def __init__(self, geometry: WindowGeometry, slot_idx: int, first_block: int = 0) -> None:
        """A window that holds the prompt alone.

        Args:
            geometry: Places in the row.
            slot_idx: The row.
            first_block: The number of the block that comes next.
        """
        self.slot_idx = slot_idx
        self.origin = len(geometry.prefix)  # position of the oldest block's first token
        self.prefix_position = 0  # of the prompt's first token
        self.first_block = first_block  # number of the oldest block kept
        self.n_blocks = 0  # complete blocks kept
        # The block whose first marker says 2.
        self.marker_zero = first_block if geometry.settings.markers == "restart" else 0
        self.n_tail = 0  # audio tokens of the growing block
        self._geometry = geometry
        self._n_scratch = 0  # entries reserved for continuations
        self._n_lanes = 0  # continuations

    @property
    def blocks(self) -> range:
        """Numbers of the complete blocks it holds; the growing block has the number after them."""
        return range(self.first_block, self.first_block + self.n_blocks)

    @property
    def is_full(self) -> bool:
        """Whether a further complete block evicts one."""
        return self.n_blocks == self._geometry.settings.n_blocks

    @property
    def marker_offset_s(self) -> int:
        """Seconds to add to what the markers say, to count from the slot's first sample."""
        return self.marker_zero * self._geometry.block_s

    # --- tokens and positions -----------------------------------------------------------------

    def block_ids(self, block: int, n_tokens: int | None = None) -> tuple[int, ...]:
        """Audio and marker ids of a block, or of its first `n_tokens` audio tokens."""
        first_marker_s = (block - self.marker_zero) * self._geometry.block_s + SECONDS_PER_MARKER
        n = self._geometry.block_tokens if n_tokens is None else n_tokens
        return self._geometry.layout.audio(n, first_marker_s)

    def tail_ids(self) -> tuple[int, ...]:
        """Audio and marker ids of the growing block."""
        return self.block_ids(self.blocks.stop, self.n_tail)

    def ids(self) -> tuple[int, ...]:
        """All token ids of the window in the order of positions: prompt, blocks, growing block."""
        ids = list(self._geometry.layout.prefix)
        for block in self.blocks:
            ids += self.block_ids(block)
        return (*ids, *self.tail_ids())

    def block_position(self, block: int) -> int:
        """Position of a block's first token."""
        return self.origin + sum(len(self.block_ids(b)) for b in range(self.first_block, block))

    @property
    def end_position(self) -> int:
        """Position of the first token behind the window."""
        return self.block_position(self.blocks.stop) + len(self.tail_ids())

    def positions(self) -> list[int]:
        """Position of every token, in the order of `ids`."""
        prefix = range(self.prefix_position, self.prefix_position + len(self._geometry.prefix))
        return [*prefix, *range(self.origin, self.end_position)]

    def visible(self, first_block: int | None = None) -> tuple[range, ...]:
        """Entries of the prompt, the complete blocks from `first_block` on, and the growing block."""
        cells = [
            self._geometry.cell(block, len(self.block_ids(block)))
            for block in self.blocks
            if first_block is None or block >= first_block
        ]
        tail = self._geometry.cell(self.blocks.stop, len(self.tail_ids()))
        return (self._geometry.prefix, *cells, tail)

    # --- changes --------------------------------------------------------------------------------

    def evict(self) -> None:
        """Drop the oldest blocks. Keys and values stay where they are, and are no longer visible."""
        settings = self._geometry.settings
        next_first = self.first_block + settings.evict_blocks
        self.origin = self.block_position(next_first)
        self.first_block = next_first
        self.n_blocks -= settings.evict_blocks
        if settings.markers == "restart":
            self.marker_zero = next_first
            self.origin = len(self._geometry.prefix)

    @property
    def is_near_limit(self) -> bool:
        """Whether another block and continuations behind it could run out of positions."""
        n_ahead = self._geometry.cell_size + self._geometry.settings.scratch_tokens
        return self.block_position(self.blocks.stop) + n_ahead > self._geometry.max_position

    def reserve(self, first_block: int | None = None, n_tokens: int | None = None) -> Continuation:
        """Begin a continuation of the window as it is now.

        Args:
            first_block: Older blocks are not visible to it; None: all that are kept are.
            n_tokens: Scratch to reserve; None: all that is left.

        Raises:
            ValueError: not so much scratch is left; `release` gives it back.
        """
        geometry = self._geometry
        n_left = geometry.settings.scratch_tokens - self._n_scratch
        n = n_left if n_tokens is None else n_tokens
        if n > n_left:
            raise ValueError(f"slot {self.slot_idx} has no scratch for {n} tokens; {n_left} are left")
        start = geometry.scratch_start + self._n_scratch
        lane_idx = self._n_lanes
        self._n_scratch += n
        self._n_lanes += 1
        visible = self.visible(first_block)
        return Continuation(self.slot_idx, lane_idx, self.end_position, visible, range(start, start + n))

    def release(self) -> None:
        """End all continuations; their scratch is free again."""
        self._n_scratch = 0
        self._n_lanes = 0
