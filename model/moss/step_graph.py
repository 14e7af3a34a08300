"""One decode step of every answer at once, over buffers that never move.

A lane is one answer on one slot; a step feeds every open lane its last token and writes the next one
where the following step reads it. Everything a step needs lies on the device: tokens, positions,
entries and the mask of each lane. So a step is the same sequence of kernels over the same addresses,
and on CUDA it is captured once per size (`Bucket`) as a graph and replayed. Elsewhere the same
function runs as it is.

The host sends something only when a lane opens, closes or has its token replaced, and waits for the
device once per step, to read the tokens. When an answer ends, and with which tokens, is decided by
`model.moss.generate`; this module knows no text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from model.layers import rounded_up, send
from model.moss.geometry import ENTRY_MULTIPLE, SPARE, Continuation
from model.moss.language import Access, KvBuffers, visible_mask
from model.moss.network import MossAudio

LANES = 4  # answers decoded side by side on one slot: one per task

Lane = tuple[int, int]  # slot, and lane within it
Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]  # what a graph API does with a step


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """The token a lane's step chose."""

    token: int
    log_probability: float


@dataclass(frozen=True, slots=True)
class Bucket:
    """The size of a step: it covers the first so many slots, lanes and entries."""

    n_slots: int
    n_lanes: int
    n_read: int


@dataclass(frozen=True, slots=True)
class LaneBuffers:
    """State of all lanes, S slots with `LANES` lanes each. Written in place, never rebound."""

    token: Tensor  # [S, LANES], fed next
    position: Tensor  # [S, LANES], of that token
    entry: Tensor  # [S, LANES], where its key and value go
    is_open: Tensor  # [S, LANES], 1 where the lane advances, 0 where it is idle
    mask: Tensor  # [S, LANES, C] bool, entries it reads
    chosen: Tensor  # [S, LANES, 2] float64, the last token and its log probability

    @staticmethod
    def new(n_slots: int, n_entries: int, device: torch.device) -> LaneBuffers:
        """All lanes idle."""

        def zeros() -> Tensor:
            return torch.zeros(n_slots, LANES, dtype=torch.int64, device=device)

        mask = torch.zeros(n_slots, LANES, n_entries, dtype=torch.bool, device=device)
        mask[:, :, SPARE] = True  # an idle lane reads something, or its softmax is NaN
        chosen = torch.zeros(n_slots, LANES, 2, dtype=torch.float64, device=device)
        return LaneBuffers(zeros(), zeros(), zeros(), zeros(), mask, chosen)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return tuple(getattr(self, each.name) for each in fields(self))


def decode_step_bytes(n_slots: int, n_entries: int) -> int:
    """What the buffers of a `DecodeStep` take."""
    return n_slots * LANES * (n_entries + 4 * 8 + 2 * 8) + n_slots * 8


class DecodeStep:
    """The lanes of all slots and the captured steps over them."""

    def __init__(
        self, model: MossAudio, buffers: KvBuffers, suppressed: Sequence[int], scratch_start: int
    ) -> None:
        """All lanes idle.

        Args:
            model: The model whose decoder runs.
            buffers: Keys and values of the slots, shared with the cache that fills them.
            suppressed: Ids that are never chosen.
            scratch_start: The first entry a lane may write.
        """
        self._model = model
        self._buffers = buffers
        self._n_slots, self._n_entries = buffers.k.shape[1], buffers.k.shape[3]
        self._scratch_start = scratch_start
        device = buffers.k.device
        self.lanes = LaneBuffers.new(self._n_slots, self._n_entries, device)
        self.suppressed = torch.tensor(suppressed, device=device)
        self._slot_index = torch.arange(self._n_slots, device=device)[:, None]
        self._next_entry: dict[Lane, int] = {}  # of the open lanes
        self._replays: dict[Bucket, Replay] = {}

    @property
    def n_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(tensor.nbytes for tensor in (*self.lanes.tensors, self._slot_index))

    # --- lanes --------------------------------------------------------------------------------

    def open(self, answers: Sequence[tuple[Continuation, int]]) -> None:
        """Open the lanes of continuations, each with the token that is fed to it first."""
        if not answers:
            return
        n_ranges = max(len(one.visible) for one, _ in answers)
        table = []
        for one, token in answers:
            assert one.lane not in self._next_entry, one.lane
            assert one.lane_idx < LANES, one
            self._next_entry[one.lane] = one.next_entry
            starts = [run.start for run in one.visible] + [SPARE] * (n_ranges - len(one.visible))
            stops = [run.stop for run in one.visible] + [SPARE] * (n_ranges - len(one.visible))
            table.append([*one.lane, token, one.position, one.next_entry, *starts, *stops])
        lanes = self.lanes
        rows = send(torch.tensor(table), lanes.token.device)
        at = (rows[:, 0], rows[:, 1])
        lanes.token[at], lanes.position[at], lanes.entry[at] = rows[:, 2], rows[:, 3], rows[:, 4]
        lanes.is_open[at] = torch.ones_like(rows[:, 0])
        lanes.mask[at] = visible_mask(rows[:, 5 : 5 + n_ranges], rows[:, 5 + n_ranges :], self._n_entries)

    def replace(self, tokens: Mapping[Lane, int]) -> None:
        """Feed lanes these tokens next, in place of those they chose."""
        if tokens:
            table = [[*lane, token] for lane, token in tokens.items()]
            rows = send(torch.tensor(table), self.lanes.token.device)
            self.lanes.token[rows[:, 0], rows[:, 1]] = rows[:, 2]

    def close(self, closed: Sequence[Lane]) -> None:
        """Make lanes idle again."""
        if not closed:
            return
        for lane in closed:
            del self._next_entry[lane]
        lanes = self.lanes
        rows = send(torch.tensor(closed), lanes.token.device)
        at = (rows[:, 0], rows[:, 1])
        lanes.is_open[at] = lanes.entry[at] = lanes.position[at] = torch.zeros_like(rows[:, 0])
        idle = torch.zeros(self._n_entries, dtype=torch.bool, device=lanes.token.device)
        idle[SPARE] = True
        lanes.mask[at] = idle.expand(len(closed), -1)

    # --- steps --------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> dict[Lane, TokenChoice]:
        """Feed every open lane its token; the next token of each."""
        bucket = self._bucket()
        replay = self._replays.get(bucket)
        if replay is not None:
            replay()
        else:
            self.compute(bucket)
        for lane in self._next_entry:
            self._next_entry[lane] += 1
        # The one wait for the device: the host must know the tokens to end an answer.
        chosen = self.lanes.chosen[: bucket.n_slots, : bucket.n_lanes].tolist()
        found = {}
        for slot_idx, lane_idx in self._next_entry:
            token, log_probability = chosen[slot_idx][lane_idx]
            found[slot_idx, lane_idx] = TokenChoice(int(token), log_probability)
        return found

    @torch.inference_mode()
    def capture(self, capture: Capture) -> int:
        """Capture a step of every size there can be, and replay it from now on; returns how many there are.

        Not while a lane is open: capturing runs the step, and only an idle lane is sure to write to the
        spare entry alone.
        """
        assert not self._next_entry, "a lane is open"
        for bucket in self.buckets():
            self._replays[bucket] = capture(functools.partial(self.compute, bucket))
        return len(self._replays)

    def buckets(self) -> Iterator[Bucket]:
        """Every size a step can have, largest first: the others fit in the memory of the largest."""
        sizes = [_doubling(self._n_slots), _doubling(LANES), self._reads()]
        for n_read in reversed(sizes[2]):
            for n_lanes in reversed(sizes[1]):
                for n_slots in reversed(sizes[0]):
                    yield Bucket(n_slots, n_lanes, n_read)

    def _reads(self) -> list[int]:
        """Entries a step may read: a quarter of the scratch, where most answers end, or all of it."""
        short = self._scratch_start + (self._n_entries - self._scratch_start) // 4
        return sorted({min(rounded_up(short, ENTRY_MULTIPLE), self._n_entries), self._n_entries})

    def _bucket(self) -> Bucket:
        """The smallest size that covers the open lanes."""
        assert self._next_entry, "no lane is open"
        return Bucket(
            min(n for n in _doubling(self._n_slots) if n > max(slot for slot, _ in self._next_entry)),
            min(n for n in _doubling(LANES) if n > max(lane for _, lane in self._next_entry)),
            min(n for n in self._reads() if n > max(self._next_entry.values())),
        )

    def compute(self, bucket: Bucket) -> None:
        """One step of the lanes in a bucket, without reading its tokens. Touches fixed buffers alone.

        Nothing here may depend on what the buffers hold, bring a value to the host or send one from
        there: a captured graph does the same again whatever the host knows by then.
        """
        lanes = self.lanes
        at = (slice(bucket.n_slots), slice(bucket.n_lanes))
        entry, mask, is_open = lanes.entry[at], lanes.mask[at], lanes.is_open[at]
        mask.scatter_(2, entry[:, :, None], value=True)  # a token sees itself
        access = Access(
            self._buffers,
            range(bucket.n_slots),
            self._slot_index[: bucket.n_slots],
            entry,
            mask[:, :, : bucket.n_read],
        )
        x = self._model.language_model.embed_tokens(lanes.token[at])
        hidden = self._model.language_model.forward(x, lanes.position[at], (), access)
        chosen = choose(self._model.lm_head(hidden), self.suppressed)
        lanes.chosen[at].copy_(chosen)
        lanes.token[at].copy_(chosen[..., 0])  # fed next
        lanes.position[at].add_(is_open)
        entry.add_(is_open)


def choose(logits: Tensor, suppressed: Tensor) -> Tensor:
    """The greedy token of `logits` [..., V] without the ids `suppressed` [n], and its log probability.

    Both in one float64 [..., 2], which holds any id exactly, so that one copy brings them to the host.
    """
    scores = logits.float()
    if scores is logits:
        scores = scores.clone()  # the caller's are not changed
    scores.index_fill_(-1, suppressed, -torch.inf)
    best = scores.max(dim=-1)
    log_probability = best.values - scores.logsumexp(dim=-1)
    return torch.stack([best.indices.double(), log_probability.double()], dim=-1)


def _doubling(limit: int) -> list[int]:
    """1, 2, 4 and so on below `limit`, then `limit`."""
    sizes = [1 << k for k in range(limit.bit_length()) if 1 << k < limit]
    return [*sizes, limit]


class CudaGraphs:
    """Captures steps as CUDA graphs that share one pool of memory: they never run side by side."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Replay:
        """Capture what `run` does; needs a GPU.

        Source: the recipe of torch.cuda.graph's documentation: first on a side stream, so that
        libraries set themselves up outside of the capture.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        return graph.replay
