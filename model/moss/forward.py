"""One call of the language model over many slots: blocks, growing blocks and prompts side by side.

What a call needs to know of its tokens is put into one small table of integers on the host and sent
in one copy; embeddings are placed and masks made on the device. Knows rows and entries, not what a
window is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.layers import rounded_up, send
from model.moss.geometry import ENTRY_MULTIPLE
from model.moss.language import Access, KvBuffers, visible_mask
from model.moss.network import AudioEmbeddings, MossAudio

MAX_CALL_TOKENS = 4096  # padding included; slots beyond that follow in another call
# Rows are padded to multiples of this: for every number of rows that a matrix product has not seen yet,
# oneDNN compiles a kernel on a CPU and keeps it, a quarter to half a megabyte each
# (docs/decisions/019-round-tensor-lengths.md).
TOKEN_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens, computed in one call with those of other slots and continuations."""

    slot_idx: int
    ids: Sequence[int]
    audio: AudioEmbeddings | None  # replaces the embeddings of the audio id; None: there are none
    position: int  # of the first token
    entries: Sequence[int]  # where each is written
    visible: Sequence[range]  # entries all of them see


def compute(model: MossAudio, buffers: KvBuffers, segments: Sequence[Segment], audio_id: int) -> list[Tensor]:
    """Hidden states of each segment, [n, H]; keys and values are written to `buffers`.

    One call, or a few where there are more than `MAX_CALL_TOKENS` tokens. A segment may attend to what
    an earlier one of its slot writes.
    """
    by_slot: dict[int, list[Segment]] = {}
    for segment in segments:
        by_slot.setdefault(segment.slot_idx, []).append(segment)
    hidden: dict[int, Tensor] = {}
    rows: list[list[Segment]] = []
    width = 0
    for slot_idx in sorted(by_slot):
        row = by_slot[slot_idx]
        n_tokens = sum(len(segment.ids) for segment in row)
        # On a GPU it would be undefined which of two tokens an entry keeps.
        assert len({entry for segment in row for entry in segment.entries}) == n_tokens, slot_idx
        row_width = rounded_up(n_tokens, TOKEN_MULTIPLE)
        if rows and (len(rows) + 1) * max(width, row_width) > MAX_CALL_TOKENS:
            hidden |= _call(model, buffers, rows, width, audio_id)
            rows, width = [], 0
        rows.append(row)
        width = max(width, row_width)
    if rows:
        hidden |= _call(model, buffers, rows, width, audio_id)
    return [hidden[id(segment)] for segment in segments]


def _call(
    model: MossAudio, buffers: KvBuffers, rows: Sequence[Sequence[Segment]], n_tokens: int, audio_id: int
) -> dict[int, Tensor]:
    """One call, a row of `n_tokens` per slot: hidden states by the segment's identity."""
    every = [segment for row in rows for segment in row]
    # Only as many entries as are read or written: the scratch is the larger part, and mostly empty.
    n_read = 1 + max(max(run) for segment in every for run in (*segment.visible, segment.entries) if run)
    n_read = min(rounded_up(n_read, ENTRY_MULTIPLE), buffers.k.shape[3])
    table = _Table(rows, n_tokens, audio_id, buffers.k.device)
    x = model.language_model.embed_tokens(table.ids)  # [B, T, H]
    deepstack: tuple[Tensor, ...] = ()
    if audio := [segment.audio for segment in every if segment.audio is not None]:
        added = x.new_zeros(model.config.n_deepstack, *x.shape)
        x.flatten(0, 1).index_copy_(0, table.audio, torch.cat([one.embeds for one in audio]))
        added.flatten(1, 2).index_copy_(1, table.audio, torch.cat([one.added for one in audio], dim=1))
        deepstack = added.unbind()
    access = Access(buffers, table.slots, table.slot_index, table.entries, table.mask(n_read))
    out = model.language_model.forward(x, table.position, deepstack, access)
    return {id(segment): out[row, at] for segment, row, at in table.places}


class _Table:
    """One call's integers on the device, in one copy: B rows of T tokens in up to G segments each."""

    def __init__(
        self, rows: Sequence[Sequence[Segment]], n_tokens: int, audio_id: int, device: torch.device
    ) -> None:
        self.slots = tuple(row[0].slot_idx for row in rows)
        self.places: list[tuple[Segment, int, slice]] = []  # segment, row, where in it
        n_segments = 1 + max(len(row) for row in rows)  # the last is what pads the row
        n_ranges = max(1, *(len(segment.visible) for row in rows for segment in row))
        # Padding goes to the spare entry, at position 0, and attends to that entry alone.
        host = torch.zeros(len(rows), 4 * n_tokens + 2 * n_segments * n_ranges + 1, dtype=torch.int64)
        tokens = host[:, : 4 * n_tokens].view(len(rows), 4, n_tokens)
        ranges = host[:, 4 * n_tokens : -1].view(len(rows), 2, n_segments, n_ranges)
        host[:, -1] = torch.tensor(self.slots)
        tokens[:, 3] = n_segments - 1
        ranges[:, 1, -1, 0] = 1
        audio: list[int] = []
        for row_idx, row in enumerate(rows):
            start = 0
            for idx, segment in enumerate(row):
                n = len(segment.ids)
                at = slice(start, start + n)
                self.places.append((segment, row_idx, at))
                position = range(segment.position, segment.position + n)
                for kind, values in enumerate((segment.ids, position, segment.entries)):
                    tokens[row_idx, kind, at] = torch.tensor(list(values))
                tokens[row_idx, 3, at] = idx
                for n_th, run in enumerate(segment.visible):
                    ranges[row_idx, 0, idx, n_th] = run.start
                    ranges[row_idx, 1, idx, n_th] = run.stop
                if segment.audio is not None:
                    first = row_idx * n_tokens + start
                    audio += [first + k for k, token in enumerate(segment.ids) if token == audio_id]
                start += n
        sent = send(host, device)
        self.ids, self.position, self.entries, self._segment = (
            sent[:, : 4 * n_tokens].view(len(rows), 4, n_tokens).unbind(1)
        )
        self._starts, self._stops = (
            sent[:, 4 * n_tokens : -1].view(len(rows), 2, n_segments, n_ranges).unbind(1)
        )
        self.slot_index = sent[:, -1:]
        self.audio = send(torch.tensor(audio, dtype=torch.int64), device)  # of the flat rows

    def mask(self, n_read: int) -> Tensor:
        """What each token attends to, [B, T, n_read]: its segment's ranges, and its segment up to itself."""
        n_tokens = self.ids.shape[1]
        shared = visible_mask(self._starts, self._stops, n_read)  # [B, G, R]
        seen = shared.gather(1, self._segment[:, :, None].expand(-1, -1, n_read))
        # Which token of the call writes an entry, and of which segment it is; -1: none.
        order = torch.arange(n_tokens, device=self.ids.device)
        writer = torch.full_like(shared[:, 0], -1, dtype=torch.int64)
        writer.scatter_(1, self.entries, order.expand_as(self.entries))
        segment = self._segment.gather(1, writer.clamp(min=0))
        is_own = (segment[:, None, :] == self._segment[:, :, None]) & (writer >= 0)[:, None, :]
        return seen | (is_own & (writer[:, None, :] <= order[None, :, None]))
