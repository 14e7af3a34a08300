"""The rolling key-value cache: what every stream still remembers, in constant memory.

Each slot has a row of entries, in this order:

    spare | prompt prefix | W + 1 cells, one block of audio with its markers each | scratch

Block k lives in cell k mod (W + 1): W complete blocks and the growing one. Attention does not care
where a key lies, only which position it was rotated for, so evicting a block moves nothing: its cell
becomes the growing block's. Branches (questions and their answers) write to the scratch and read the
rest where it is. The spare entry takes what padding writes.

What is appended waits for the next questions and goes through the model in one call with them; it is
computed before anything else of its slot changes.

Counts live on the host; tensors are written in place and never rebound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.layers import rounded_up, send
from model.moss.config import MossConfig
from model.moss.forward import ENTRY_MULTIPLE, Segment, compute
from model.moss.language import KvBuffers, rotary_angles, rotate
from model.moss.network import AudioEmbeddings, MossAudio
from model.moss.prompt import MAX_MARKER_DIGITS, SECONDS_PER_MARKER, TOKENS_PER_MARKER, Layout
from model.moss.step_graph import Decoder

MarkerMode = Literal["absolute", "restart"]
PrefixMode = Literal["follows", "stays"]


@dataclass(frozen=True, slots=True)
class WindowSettings:
    """How much is remembered, and what happens at the end of it."""

    n_blocks: int = 8  # W: complete blocks of 4 s kept, besides the growing one
    evict_blocks: int = 1  # dropped at once when a block completes and W are there
    # absolute: markers count from the stream's beginning for ever, keys stay as they are.
    # restart: at each eviction the window is computed anew from kept embeddings, its markers
    # begin at 2 again, and `RollingCache.marker_offset_s` says what to add.
    markers: MarkerMode = "absolute"
    # follows: the prompt is placed right before the oldest block at each eviction, so that distances
    # stay below the window's length (StreamingLLM, arXiv 2309.17453, section 3.2).
    # stays: it keeps position 0, as if the evicted audio were still there.
    prefix: PrefixMode = "follows"
    max_position: int = 8192  # about 10 minutes, as far as the maintainers advise; re-anchored there
    scratch_tokens: int = 1024  # questions and answers of one slot's branches at one time

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: no block is kept, or more are evicted than kept.
        """
        if not 1 <= self.evict_blocks <= self.n_blocks:
            raise ValueError(f"evict_blocks is {self.evict_blocks}, not 1 to n_blocks ({self.n_blocks})")
        if self.scratch_tokens < 1:
            raise ValueError(f"scratch_tokens is {self.scratch_tokens}, not at least 1")


@dataclass(slots=True)
class _Slot:
    """Where one stream is. Everything else is derived."""

    origin: int  # position of the oldest block's first token
    prefix_at: int = 0  # position of the prompt's first token
    first_block: int = 0  # number of the oldest block kept
    n_blocks: int = 0  # complete blocks kept
    marker_zero: int = 0  # the block whose first marker says 2
    n_tail: int = 0  # audio tokens of the growing block
    n_scratch: int = 0  # entries taken by branches


@dataclass(slots=True)
class Branch:
    """A question on what a slot remembers: its tokens see that and themselves, nothing sees them."""

    slot_idx: int
    position: int  # of the next token
    before: tuple[range, ...]  # entries it reads, its own not included
    entries: range  # its own, kept for it until `RollingCache.clear`
    n_tokens: int = 0  # of its own entries that are written

    @property
    def visible(self) -> tuple[range, ...]:
        """Entries its next token reads, but for that token's own."""
        return (*self.before, self.entries[: self.n_tokens])


@dataclass(frozen=True, slots=True)
class Remembered:
    """What a slot holds, in the order of positions, n tokens: for comparison."""

    position: Tensor  # [n]
    k: Tensor  # [L, K, n, D]
    v: Tensor  # [L, K, n, D]


def n_entries(config: MossConfig, settings: WindowSettings, n_prefix: int) -> int:
    """Entries of one slot: spare, prompt of `n_prefix` tokens, cells, scratch; and a few to round it up."""
    n = 1 + n_prefix + (settings.n_blocks + 1) * _cell_size(config) + settings.scratch_tokens
    return rounded_up(n, ENTRY_MULTIPLE)


def slot_bytes(config: MossConfig, settings: WindowSettings, n_prefix: int, dtype: torch.dtype) -> int:
    """Memory one more stream takes, bytes, for as long as the process lives."""
    language = config.language
    per_entry = 2 * language.num_hidden_layers * language.num_key_value_heads * language.head_dim
    n_kept = (settings.n_blocks + 1) * config.encoder.block_tokens if settings.markers == "restart" else 0
    per_kept = (1 + config.n_deepstack) * language.hidden_size
    return (n_entries(config, settings, n_prefix) * per_entry + n_kept * per_kept) * dtype.itemsize


def _cell_size(config: MossConfig) -> int:
    """Entries of a block with the longest markers there can be."""
    n_markers = config.encoder.block_tokens // TOKENS_PER_MARKER
    return config.encoder.block_tokens + n_markers * MAX_MARKER_DIGITS


class RollingCache:
    """Rolling windows of `n_slots` streams on one model."""

    def __init__(self, model: MossAudio, layout: Layout, settings: WindowSettings, n_slots: int) -> None:
        """Allocate everything; nothing grows afterwards.

        Raises:
            ValueError: the window does not fit in the positions there are.
        """
        self.model = model
        self.layout = layout
        self.settings = settings
        self.n_slots = n_slots
        self.block_tokens = model.config.encoder.block_tokens  # 50
        self._markers_per_block = self.block_tokens // TOKENS_PER_MARKER
        self.block_s = self._markers_per_block * SECONDS_PER_MARKER  # 4 s
        self._cell = _cell_size(model.config)
        self._n_cells = settings.n_blocks + 1
        self._prefix = range(1, 1 + len(layout.prefix))
        n_positions = n_entries(model.config, settings, len(layout.prefix))
        self._scratch_at = n_positions - settings.scratch_tokens
        limit = min(settings.max_position, model.config.language.max_position_embeddings)
        if n_positions > limit:
            raise ValueError(
                f"{settings.n_blocks} blocks and {settings.scratch_tokens} scratch tokens need "
                f"{n_positions} positions; there are {limit}"
            )
        self._limit = limit
        weight = model.lm_head.weight
        self.buffers = KvBuffers.new(model.config.language, n_slots, n_positions, weight)
        # Embeddings of the blocks, by cell: only to compute the window anew from.
        n_kept = self._n_cells if settings.markers == "restart" else 0
        hidden = model.config.language.hidden_size
        self._embeds = weight.new_zeros(n_slots, n_kept, self.block_tokens, hidden)
        self._added = weight.new_zeros(n_slots, n_kept, model.config.n_deepstack, self.block_tokens, hidden)

        self._slots = [_Slot(origin=len(self._prefix)) for _ in range(n_slots)]
        self._waiting: list[Segment] = []  # at most a block and a growing one per slot
        # The prompt is the same for all: computed once, at position 0, and placed from there.
        self._waiting.append(Segment(0, layout.prefix, None, 0, self._prefix, ()))
        self.flush()
        at = slice(self._prefix.start, self._prefix.stop)
        self._prefix_k = self.buffers.k[:, 0, :, at].clone()  # [L, K, P, D]
        self._prefix_v = self.buffers.v[:, 0, :, at].clone()
        self.decoder = Decoder(model, self.buffers, layout.special.never, self._scratch_at)
        self.reset(range(n_slots))

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors of the slots, those of the decoder left out; constant for ever."""
        tensors = (self.buffers.k, self.buffers.v, self._embeds, self._added, self._prefix_k, self._prefix_v)
        return sum(tensor.nbytes for tensor in tensors)

    # --- what is remembered ---------------------------------------------------------------

    def blocks(self, slot_idx: int) -> range:
        """Numbers of the complete blocks a slot remembers."""
        slot = self._slots[slot_idx]
        return range(slot.first_block, slot.first_block + slot.n_blocks)

    def n_tail(self, slot_idx: int) -> int:
        """Audio tokens of the growing block."""
        return self._slots[slot_idx].n_tail

    def marker_offset_s(self, slot_idx: int) -> int:
        """Seconds to add to what the markers say, since the slot's first sample."""
        return self._slots[slot_idx].marker_zero * self.block_s

    def ids(self, slot_idx: int) -> tuple[int, ...]:
        """The tokens a slot remembers, prompt, audio and markers, the growing block last."""
        ids = list(self.layout.prefix)
        for block in self.blocks(slot_idx):
            ids += self._block_ids(slot_idx, block)
        return (*ids, *self._tail_ids(slot_idx))

    def end_position(self, slot_idx: int) -> int:
        """The position of the next token."""
        return self._block_position(slot_idx, self.blocks(slot_idx).stop) + len(self._tail_ids(slot_idx))

    def read(self, slot_idx: int) -> Remembered:
        """Copies of the keys and values of a slot, in the order of positions."""
        self.flush()
        entries = [entry for run in self._visible(slot_idx, self.blocks(slot_idx).start) for entry in run]
        slot = self._slots[slot_idx]
        n_prefix = len(self._prefix)
        position = [
            *range(slot.prefix_at, slot.prefix_at + n_prefix),
            *range(slot.origin, slot.origin + len(entries) - n_prefix),
        ]
        k, v = self.buffers.k[:, slot_idx, :, entries], self.buffers.v[:, slot_idx, :, entries]
        return Remembered(torch.tensor(position), k, v)

    # --- writing ----------------------------------------------------------------------------

    def reset(self, slots: Iterable[int], first_block: int = 0) -> None:
        """Forget all but the prompt. The other slots are untouched.

        Args:
            slots: Whom to forget.
            first_block: The number of the block that comes next: above 0 for a stream that is taken
                up again in its middle, so that absolute markers go on where they were.
        """
        for slot_idx in slots:
            self._waiting = [one for one in self._waiting if one.slot_idx != slot_idx]
            zero = first_block if self.settings.markers == "restart" else 0
            self._slots[slot_idx] = _Slot(len(self._prefix), first_block=first_block, marker_zero=zero)
            self._place_prefix(slot_idx, 0)

    @torch.inference_mode()
    def append(self, heard: Mapping[int, AudioEmbeddings]) -> None:
        """Add one complete block to each of some slots; their growing blocks are dropped.

        Evicts, and moves positions back, where it must.
        """
        self._settle(heard)
        for slot_idx in sorted(heard):
            slot = self._slots[slot_idx]
            slot.n_tail = 0
            is_full = slot.n_blocks == self.settings.n_blocks
            if is_full:
                self._evict(slot_idx)
            new = slot.first_block + slot.n_blocks
            self._keep(slot_idx, new, heard[slot_idx])
            if is_full and self.settings.markers == "restart":
                self._waiting.append(self._whole_window(slot_idx, range(slot.first_block, new + 1)))
            else:
                self._make_room(slot_idx)
                self._waiting.append(self._block_segment(slot_idx, new, heard[slot_idx]))
            slot.n_blocks += 1

    @torch.inference_mode()
    def set_tail(self, heard: Mapping[int, AudioEmbeddings]) -> None:
        """Put what is known of the growing block in the place of what was known before."""
        # A complete block that waits is looked at in the same call; an older growing one must be gone.
        self._settle(slot_idx for slot_idx in heard if self._slots[slot_idx].n_tail)
        for slot_idx in sorted(heard):
            slot = self._slots[slot_idx]
            self._make_room(slot_idx)
            segment = self._block_segment(slot_idx, self.blocks(slot_idx).stop, heard[slot_idx])
            self._waiting.append(segment)
            slot.n_tail = len(heard[slot_idx].embeds)

    def drop_tail(self, slots: Iterable[int]) -> None:
        """Roll back the growing block; what is left is bit for bit what was there before it."""
        slots = set(slots)
        self._settle(slots)
        for slot_idx in slots:
            self._slots[slot_idx].n_tail = 0

    @torch.inference_mode()
    def flush(self) -> None:
        """Compute what waits, now."""
        waiting, self._waiting = self._waiting, []
        compute(self.model, self.buffers, waiting, self.layout.special.audio)

    def _settle(self, slots: Iterable[int]) -> None:
        """Compute what waits if any of it is of these slots, which are about to change."""
        if {segment.slot_idx for segment in self._waiting} & set(slots):
            self.flush()

    # --- branches ---------------------------------------------------------------------------

    def branch(self, slot_idx: int, first_block: int | None = None, n_tokens: int | None = None) -> Branch:
        """A new branch behind all a slot remembers.

        Args:
            slot_idx: Whom it is about.
            first_block: Older blocks are not looked at; None: all that is remembered.
            n_tokens: Scratch kept for it; None: all that is left.

        Raises:
            ValueError: so much scratch is not left; `clear` gives it back.
        """
        slot = self._slots[slot_idx]
        n_left = self.settings.scratch_tokens - slot.n_scratch
        n = n_left if n_tokens is None else n_tokens
        if n > n_left:
            raise ValueError(f"slot {slot_idx} has no scratch for {n} tokens; {n_left} are left")
        start = self._scratch_at + slot.n_scratch
        slot.n_scratch += n
        first = self.blocks(slot_idx).start if first_block is None else first_block
        before = self._visible(slot_idx, first)
        return Branch(slot_idx, self.end_position(slot_idx), before, range(start, start + n))

    @torch.inference_mode()
    def step(self, branches: Sequence[Branch], ids: Sequence[Sequence[int]]) -> Tensor:
        """Add tokens to branches, all in one call with what waits: logits after the last of each, [n, vocab].

        Raises:
            ValueError: more tokens than a branch keeps scratch for.
        """
        segments = []
        for branch, new in zip(branches, ids, strict=True):
            entries = branch.entries[branch.n_tokens : branch.n_tokens + len(new)]
            if len(entries) < len(new):
                raise ValueError(f"a branch of slot {branch.slot_idx} has no scratch for {len(new)} tokens")
            segments.append(Segment(branch.slot_idx, new, None, branch.position, entries, branch.visible))
            branch.n_tokens += len(new)
            branch.position += len(new)
        waiting, self._waiting = self._waiting, []
        hidden = compute(self.model, self.buffers, [*waiting, *segments], self.layout.special.audio)
        last = torch.stack([states[-1] for states in hidden[len(waiting) :]])
        return self.model.lm_head(last)  # type: ignore[no-any-return]

    def clear(self, slots: Iterable[int]) -> None:
        """Forget the branches of some slots."""
        for slot_idx in slots:
            self._slots[slot_idx].n_scratch = 0

    # --- places -----------------------------------------------------------------------------

    def _block_ids(self, slot_idx: int, block: int, n_tokens: int | None = None) -> tuple[int, ...]:
        since = block - self._slots[slot_idx].marker_zero
        n = self.block_tokens if n_tokens is None else n_tokens
        return self.layout.audio(n, since * self.block_s + SECONDS_PER_MARKER)

    def _tail_ids(self, slot_idx: int) -> tuple[int, ...]:
        return self._block_ids(slot_idx, self.blocks(slot_idx).stop, self._slots[slot_idx].n_tail)

    def _cell_entries(self, block: int, n_tokens: int) -> range:
        start = self._prefix.stop + block % self._n_cells * self._cell
        return range(start, start + n_tokens)

    def _block_position(self, slot_idx: int, block: int) -> int:
        slot = self._slots[slot_idx]
        return slot.origin + sum(len(self._block_ids(slot_idx, b)) for b in range(slot.first_block, block))

    def _visible(self, slot_idx: int, first_block: int) -> tuple[range, ...]:
        """Entries of the prompt, the complete blocks from `first_block` on, and the growing one."""
        blocks = self.blocks(slot_idx)
        cells = [
            self._cell_entries(block, len(self._block_ids(slot_idx, block)))
            for block in blocks
            if block >= first_block
        ]
        tail = self._cell_entries(blocks.stop, len(self._tail_ids(slot_idx)))
        return (self._prefix, *cells, tail)

    # --- eviction ---------------------------------------------------------------------------

    def _evict(self, slot_idx: int) -> None:
        slot = self._slots[slot_idx]
        next_first = slot.first_block + self.settings.evict_blocks
        slot.origin = self._block_position(slot_idx, next_first)
        slot.first_block = next_first
        slot.n_blocks -= self.settings.evict_blocks
        if self.settings.markers == "restart":
            slot.marker_zero = next_first
            slot.origin = len(self._prefix)
        elif self.settings.prefix == "follows":
            self._place_prefix(slot_idx, slot.origin - len(self._prefix))

    def _make_room(self, slot_idx: int) -> None:
        """Re-anchor if the block about to be written, or branches behind it, could run out of positions."""
        n_ahead = self._cell + self.settings.scratch_tokens
        if self._block_position(slot_idx, self.blocks(slot_idx).stop) + n_ahead > self._limit:
            self.reanchor(slot_idx)

    def reanchor(self, slot_idx: int) -> None:
        """Move a slot's window back so that it begins right behind the prompt at position 0.

        Keys are turned back from their old angles and to their new ones in float32, each with the
        very angles a token computed there would get.
        """
        slot = self._slots[slot_idx]
        delta = slot.origin - len(self._prefix)
        if delta == 0:
            return  # turning by nothing would still round the keys
        self._settle([slot_idx])
        held = [entry for run in self._visible(slot_idx, slot.first_block)[1:] for entry in run]
        old = torch.arange(slot.origin, slot.origin + len(held), device=self.model.device)
        if held:
            entries = send(torch.tensor(held), self.model.device)
            keys = self.buffers.k[:, slot_idx, :, entries]  # [L, K, n, D], a copy
            self.buffers.k[:, slot_idx, :, entries] = self._turn(keys, old, old - delta)
        slot.origin -= delta
        self._place_prefix(slot_idx, 0)

    def _turn(self, keys: Tensor, old: Tensor, new: Tensor) -> Tensor:
        config = self.model.config.language
        # Turning back is turning by the negative angle.
        plain = rotate(keys.float(), -rotary_angles(old, config))
        return rotate(plain, rotary_angles(new, config)).to(keys.dtype)

    def _place_prefix(self, slot_idx: int, at: int) -> None:
        """Write the prompt's keys for positions from `at` on, always from those made at 0."""
        self._slots[slot_idx].prefix_at = at
        entries = slice(self._prefix.start, self._prefix.stop)
        self.buffers.v[:, slot_idx, :, entries] = self._prefix_v
        keys = self._prefix_k
        if at:
            old = torch.arange(len(self._prefix), device=self.model.device)
            keys = self._turn(keys, old, old + at)
        self.buffers.k[:, slot_idx, :, entries] = keys

    # --- computing --------------------------------------------------------------------------

    def _keep(self, slot_idx: int, block: int, heard: AudioEmbeddings) -> None:
        assert heard.embeds.shape[0] == self.block_tokens, heard.embeds.shape
        if self.settings.markers == "restart":
            self._embeds[slot_idx, block % self._n_cells] = heard.embeds
            self._added[slot_idx, block % self._n_cells] = heard.added

    def _block_segment(self, slot_idx: int, block: int, heard: AudioEmbeddings) -> Segment:
        """One block, complete or growing, behind the complete ones."""
        ids = self._block_ids(slot_idx, block, heard.embeds.shape[0])
        blocks = self.blocks(slot_idx)
        visible = self._visible(slot_idx, blocks.start)[: 1 + len(blocks)]  # not the old tail
        position = self._block_position(slot_idx, block)
        return Segment(slot_idx, ids, heard, position, self._cell_entries(block, len(ids)), visible)

    def _whole_window(self, slot_idx: int, blocks: range) -> Segment:
        """All blocks of a slot anew, from their kept embeddings."""
        ids: list[int] = []
        entries: list[int] = []
        for block in blocks:
            block_ids = self._block_ids(slot_idx, block)
            ids += block_ids
            entries += self._cell_entries(block, len(block_ids))
        cells = send(torch.tensor([block % self._n_cells for block in blocks]), self.model.device)
        embeds = self._embeds[slot_idx, cells].flatten(0, 1)  # [n_blocks * 50, H]
        added = self._added[slot_idx, cells].transpose(0, 1).flatten(1, 2)  # [n_deepstack, n_blocks * 50, H]
        audio = AudioEmbeddings(embeds, added)
        return Segment(slot_idx, ids, audio, self._slots[slot_idx].origin, entries, (self._prefix,))
