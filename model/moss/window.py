"""The rolling KV cache: keys and values of every stream's recent audio, in constant memory.

`model.moss.geometry` says where each token lies; this module computes keys and values and writes them
there. What is appended waits for the next requests and goes through the model in one call with them;
it is computed before anything else of its slot changes.

Counts live on the host; tensors are written in place and never rebound. Knows no audio and no text:
blocks come as embeddings, requests as token ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.layers import send
from model.moss.config import MossConfig
from model.moss.forward import Segment, compute
from model.moss.geometry import Continuation, SlotWindow, WindowGeometry, WindowSettings, n_entries
from model.moss.language import KvBuffers, rotary_angles, rotate
from model.moss.network import AudioEmbeddings, MossAudio
from model.moss.prompt import Layout
from model.moss.step_graph import DecodeStep


@dataclass(frozen=True, slots=True)
class CachedWindow:
    """Copies of what a slot holds, n tokens in the order of positions."""

    position: Tensor  # [n]
    k: Tensor  # [L, K, n, D], rotated for their positions
    v: Tensor  # [L, K, n, D]


def slot_bytes(config: MossConfig, settings: WindowSettings, n_prefix: int, dtype: torch.dtype) -> int:
    """Memory of one more slot, bytes, for as long as the process lives."""
    language = config.language
    per_entry = 2 * language.num_hidden_layers * language.num_key_value_heads * language.head_dim
    block_tokens = config.encoder.block_tokens
    n_kept = (settings.n_blocks + 1) * block_tokens if settings.markers == "restart" else 0
    per_kept = (1 + config.n_deepstack) * language.hidden_size
    n = n_entries(block_tokens, settings, n_prefix)
    return (n * per_entry + n_kept * per_kept) * dtype.itemsize


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
        config = model.config
        self.block_tokens = config.encoder.block_tokens  # 50
        self.geometry = WindowGeometry(
            layout, settings, self.block_tokens, config.language.max_position_embeddings
        )
        self.block_s = self.geometry.block_s
        weight = model.lm_head.weight
        self.buffers = KvBuffers.new(config.language, n_slots, self.geometry.n_entries, weight)
        # Embeddings of the blocks, by cell: only to compute the window anew from.
        n_kept = self.geometry.n_cells if settings.markers == "restart" else 0
        hidden = config.language.hidden_size
        self._embeds = weight.new_zeros(n_slots, n_kept, self.block_tokens, hidden)
        self._added = weight.new_zeros(n_slots, n_kept, config.n_deepstack, self.block_tokens, hidden)

        self._windows = [SlotWindow(self.geometry, slot_idx) for slot_idx in range(n_slots)]
        self._waiting: list[Segment] = []  # at most a block and a growing one per slot
        # The prompt is the same for all: computed once, at position 0, and rotated from there.
        prefix = self.geometry.prefix
        self._waiting.append(Segment(0, layout.prefix, None, 0, prefix, ()))
        self.flush()
        at = slice(prefix.start, prefix.stop)
        self._prefix_k = self.buffers.k[:, 0, :, at].clone()  # [L, K, P, D]
        self._prefix_v = self.buffers.v[:, 0, :, at].clone()
        self.decode_step = DecodeStep(
            model, self.buffers, layout.special.suppressed, self.geometry.scratch_start
        )
        self.reset(range(n_slots))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the slots, those of the decode step left out. Never rebound."""
        return (self.buffers.k, self.buffers.v, self._embeds, self._added, self._prefix_k, self._prefix_v)

    @property
    def n_bytes(self) -> int:
        """Bytes of `tensors`; constant."""
        return sum(tensor.nbytes for tensor in self.tensors)

    # --- what a slot holds ----------------------------------------------------------------------

    def blocks(self, slot_idx: int) -> range:
        """Numbers of the complete blocks a slot holds."""
        return self._windows[slot_idx].blocks

    def n_tail(self, slot_idx: int) -> int:
        """Audio tokens of the growing block."""
        return self._windows[slot_idx].n_tail

    def marker_offset_s(self, slot_idx: int) -> int:
        """Seconds to add to what the markers say, to count from the slot's first sample."""
        return self._windows[slot_idx].marker_offset_s

    def ids(self, slot_idx: int) -> tuple[int, ...]:
        """Token ids of a slot: prompt, audio and markers, the growing block last."""
        return self._windows[slot_idx].ids()

    def end_position(self, slot_idx: int) -> int:
        """The position of the next token."""
        return self._windows[slot_idx].end_position

    def read(self, slot_idx: int) -> CachedWindow:
        """Copies of a slot's keys and values; for comparison in tests and benches."""
        self.flush()
        window = self._windows[slot_idx]
        entries = [entry for run in window.visible() for entry in run]
        k, v = self.buffers.k[:, slot_idx, :, entries], self.buffers.v[:, slot_idx, :, entries]
        return CachedWindow(torch.tensor(window.positions()), k, v)

    # --- writing ----------------------------------------------------------------------------

    def reset(self, slots: Iterable[int], first_block: int = 0) -> None:
        """Forget all but the prompt. The other slots are untouched.

        Args:
            slots: Slots to reset.
            first_block: The number of the block that comes next: above 0 for a stream resumed in its
                middle, so that absolute markers continue where they were.
        """
        for slot_idx in slots:
            self._waiting = [one for one in self._waiting if one.slot_idx != slot_idx]
            self._windows[slot_idx] = SlotWindow(self.geometry, slot_idx, first_block)
            self._place_prefix(slot_idx, 0)

    @torch.inference_mode()
    def append(self, audio: Mapping[int, AudioEmbeddings]) -> None:
        """Add one complete block to each slot in `audio`; their growing blocks are dropped.

        Evicts, and moves positions back, where necessary.
        """
        self._settle(audio)
        for slot_idx in sorted(audio):
            window = self._windows[slot_idx]
            window.n_tail = 0
            was_full = window.is_full
            if was_full:
                self._evict(slot_idx)
            new = window.blocks.stop
            self._keep(slot_idx, new, audio[slot_idx])
            if was_full and self.settings.markers == "restart":
                self._waiting.append(self._whole_window(slot_idx, range(window.first_block, new + 1)))
            else:
                self._make_room(slot_idx)
                self._waiting.append(self._block_segment(slot_idx, new, audio[slot_idx]))
            window.n_blocks += 1

    @torch.inference_mode()
    def set_tail(self, audio: Mapping[int, AudioEmbeddings]) -> None:
        """Replace the growing block of each slot in `audio`."""
        # A complete block that waits is read in the same call; an older growing one must be gone.
        self._settle(slot_idx for slot_idx in audio if self._windows[slot_idx].n_tail)
        for slot_idx in sorted(audio):
            window = self._windows[slot_idx]
            self._make_room(slot_idx)
            self._waiting.append(self._block_segment(slot_idx, window.blocks.stop, audio[slot_idx]))
            window.n_tail = len(audio[slot_idx].embeds)

    def drop_tail(self, slots: Iterable[int]) -> None:
        """Roll back the growing block; what is left is bit for bit what was there before it."""
        slots = set(slots)
        self._settle(slots)
        for slot_idx in slots:
            self._windows[slot_idx].n_tail = 0

    @torch.inference_mode()
    def flush(self) -> None:
        """Compute what waits, now."""
        waiting, self._waiting = self._waiting, []
        compute(self.model, self.buffers, waiting, self.layout.special.audio)

    def _settle(self, slots: Iterable[int]) -> None:
        """Compute what waits if any of it is of these slots, which are about to change."""
        if {segment.slot_idx for segment in self._waiting} & set(slots):
            self.flush()

    # --- continuations --------------------------------------------------------------------------

    def reserve(
        self, slot_idx: int, first_block: int | None = None, n_tokens: int | None = None
    ) -> Continuation:
        """Begin a continuation of a slot's window; as `SlotWindow.reserve`."""
        return self._windows[slot_idx].reserve(first_block, n_tokens)

    @torch.inference_mode()
    def extend(self, continuations: Sequence[Continuation], ids: Sequence[Sequence[int]]) -> Tensor:
        """Add tokens to continuations, in one call with what waits.

        Returns:
            Logits after the last token of each, [n, V].

        Raises:
            ValueError: more tokens than a continuation has scratch reserved for.
        """
        segments = []
        for one, new in zip(continuations, ids, strict=True):
            position, visible = one.position, one.visible
            segments.append(Segment(one.slot_idx, new, None, position, one.extend(len(new)), visible))
        waiting, self._waiting = self._waiting, []
        hidden = compute(self.model, self.buffers, [*waiting, *segments], self.layout.special.audio)
        last = torch.stack([states[-1] for states in hidden[len(waiting) :]])
        return self.model.lm_head(last)  # type: ignore[no-any-return]

    def release(self, slots: Iterable[int]) -> None:
        """End the continuations of some slots."""
        for slot_idx in slots:
            self._windows[slot_idx].release()

    # --- positions ------------------------------------------------------------------------------

    def _evict(self, slot_idx: int) -> None:
        window = self._windows[slot_idx]
        window.evict()
        if self.settings.markers == "absolute" and self.settings.prefix == "follows":
            self._place_prefix(slot_idx, window.origin - len(self.geometry.prefix))

    def _make_room(self, slot_idx: int) -> None:
        if self._windows[slot_idx].is_near_limit:
            self.reanchor(slot_idx)

    def reanchor(self, slot_idx: int) -> None:
        """Move a slot's window back so that it begins right behind the prompt at position 0.

        Keys are rotated back from their old angles and to their new ones in float32, each with the
        very angles a token computed there would get.
        """
        window = self._windows[slot_idx]
        delta = window.origin - len(self.geometry.prefix)
        if delta == 0:
            return  # rotating by nothing would still round the keys
        self._settle([slot_idx])
        held = [entry for run in window.visible()[1:] for entry in run]
        old = torch.arange(window.origin, window.origin + len(held), device=self.model.device)
        if held:
            entries = send(torch.tensor(held), self.model.device)
            keys = self.buffers.k[:, slot_idx, :, entries]  # [L, K, n, D], a copy
            self.buffers.k[:, slot_idx, :, entries] = self._rotated(keys, old, old - delta)
        window.origin -= delta
        self._place_prefix(slot_idx, 0)

    def _rotated(self, keys: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """Keys [L, K, n, D], rotated for positions `old` [n], as they are for positions `new` [n]."""
        config = self.model.config.language
        # Turning back is turning by the negative angle.
        plain = rotate(keys.float(), -rotary_angles(old, config))
        return rotate(plain, rotary_angles(new, config)).to(keys.dtype)

    def _place_prefix(self, slot_idx: int, position: int) -> None:
        """Write the prompt's keys for positions from `position` on, always from those made at 0."""
        prefix = self.geometry.prefix
        self._windows[slot_idx].prefix_position = position
        entries = slice(prefix.start, prefix.stop)
        self.buffers.v[:, slot_idx, :, entries] = self._prefix_v
        keys = self._prefix_k
        if position:
            old = torch.arange(len(prefix), device=self.model.device)
            keys = self._rotated(keys, old, old + position)
        self.buffers.k[:, slot_idx, :, entries] = keys

    # --- computing --------------------------------------------------------------------------

    def _keep(self, slot_idx: int, block: int, audio: AudioEmbeddings) -> None:
        assert audio.embeds.shape[0] == self.block_tokens, audio.embeds.shape
        if self.settings.markers == "restart":
            cell = block % self.geometry.n_cells
            self._embeds[slot_idx, cell] = audio.embeds
            self._added[slot_idx, cell] = audio.added

    def _block_segment(self, slot_idx: int, block: int, audio: AudioEmbeddings) -> Segment:
        """One block, complete or growing, behind the complete ones."""
        window = self._windows[slot_idx]
        ids = window.block_ids(block, audio.embeds.shape[0])
        visible = window.visible()[: 1 + window.n_blocks]  # not the old tail
        entries = self.geometry.cell(block, len(ids))
        return Segment(slot_idx, ids, audio, window.block_position(block), entries, visible)

    def _whole_window(self, slot_idx: int, blocks: range) -> Segment:
        """All blocks of a slot anew, from their kept embeddings."""
        window = self._windows[slot_idx]
        ids: list[int] = []
        entries: list[int] = []
        for block in blocks:
            block_ids = window.block_ids(block)
            ids += block_ids
            entries += self.geometry.cell(block, len(block_ids))
        cells = send(torch.tensor([block % self.geometry.n_cells for block in blocks]), self.model.device)
        embeds = self._embeds[slot_idx, cells].flatten(0, 1)  # [n_blocks * 50, H]
        added = self._added[slot_idx, cells].transpose(0, 1).flatten(1, 2)  # [n_deepstack, n_blocks * 50, H]
        audio = AudioEmbeddings(embeds, added)
        return Segment(slot_idx, ids, audio, window.origin, entries, (self.geometry.prefix,))
