"""One decode step of every answer at once, over buffers that never move.

A lane is one answer on one slot; a step feeds every lane its last token and writes the next one
where the following step reads it. All a step needs lies on the device: tokens, positions, entries
and what each lane may look at. So a step is the same sequence of kernels over the same addresses,
and on CUDA it is captured once per size (`Bucket`) as a graph and replayed. Elsewhere the same
function runs as it is.

The host sends something only when a lane opens, ends or is told what to say, and waits for the device
once per step, to read what was said: whether an answer ends is decided there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.layers import rounded_up, send
from model.moss.language import Access, KvBuffers, visible_mask
from model.moss.network import MossAudio

LANES = 4  # answers side by side on one slot: one per task
SPARE = 0  # the entry that padding and idle lanes write and look at

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]  # what a graph API does with a step


@dataclass(frozen=True, slots=True)
class Lane:
    """An answer that begins: its next token, and what it may look at."""

    slot_idx: int
    lane_idx: int  # below LANES
    token: int
    position: int  # of the token
    entry: int  # where the token's key and value go; the following ones behind it
    visible: tuple[range, ...]  # entries it sees, its own so far among them


@dataclass(frozen=True, slots=True)
class Said:
    """What one lane said in a step."""

    token: int
    log_probability: float


@dataclass(frozen=True, slots=True)
class Bucket:
    """The size of a step: it covers the first so many slots, lanes and entries."""

    n_slots: int
    n_lanes: int
    n_read: int


def decoder_bytes(n_slots: int, n_entries: int) -> int:
    """What the buffers of a `Decoder` take."""
    return n_slots * LANES * (n_entries + 4 * 8 + 2 * 8) + n_slots * 8


class Decoder:
    """The lanes of all slots. Buffers are written in place, never rebound: a graph holds their addresses."""

    def __init__(self, model: MossAudio, buffers: KvBuffers, never: Sequence[int], scratch_at: int) -> None:
        """All lanes idle.

        Args:
            model: What answers.
            buffers: Keys and values of the slots, shared with the cache that fills them.
            never: Ids that are never said.
            scratch_at: The first entry a lane may write.
        """
        self._model = model
        self._buffers = buffers
        self._n_slots, self._n_entries = buffers.k.shape[1], buffers.k.shape[3]
        self._scratch_at = scratch_at
        device = buffers.k.device
        shape = (self._n_slots, LANES)
        self._token = torch.zeros(shape, dtype=torch.int64, device=device)
        self._position = torch.zeros(shape, dtype=torch.int64, device=device)
        self._entry = torch.zeros(shape, dtype=torch.int64, device=device)
        self._live = torch.zeros(shape, dtype=torch.int64, device=device)  # 1 where a lane moves on
        self._seen = torch.zeros(*shape, self._n_entries, dtype=torch.bool, device=device)
        self._seen[:, :, SPARE] = True  # an idle lane looks at something, or its softmax is NaN
        self._said = torch.zeros(*shape, 2, dtype=torch.float64, device=device)
        self.never = torch.tensor(never, device=device)
        self._slot_index = torch.arange(self._n_slots, device=device)[:, None]
        self._last: dict[tuple[int, int], int] = {}  # open lanes and the entry each writes next
        self._replays: dict[Bucket, Replay] = {}

    @property
    def n_bytes(self) -> int:
        """Bytes of all buffers."""
        own = (self._token, self._position, self._entry, self._live, self._seen, self._said, self._slot_index)
        return sum(tensor.nbytes for tensor in own)

    # --- lanes --------------------------------------------------------------------------------

    def open(self, lanes: Sequence[Lane]) -> None:
        """Begin answers in idle lanes."""
        if not lanes:
            return
        n_ranges = max(len(lane.visible) for lane in lanes)
        table = []
        for lane in lanes:
            key = (lane.slot_idx, lane.lane_idx)
            assert key not in self._last, key
            assert lane.lane_idx < LANES, lane
            self._last[key] = lane.entry
            starts = [run.start for run in lane.visible] + [SPARE] * (n_ranges - len(lane.visible))
            stops = [run.stop for run in lane.visible] + [SPARE] * (n_ranges - len(lane.visible))
            table.append([*key, lane.token, lane.position, lane.entry, *starts, *stops])
        rows = send(torch.tensor(table), self._token.device)
        at = (rows[:, 0], rows[:, 1])
        self._token[at], self._position[at], self._entry[at] = rows[:, 2], rows[:, 3], rows[:, 4]
        self._live[at] = torch.ones_like(rows[:, 0])
        self._seen[at] = visible_mask(rows[:, 5 : 5 + n_ranges], rows[:, 5 + n_ranges :], self._n_entries)

    def say(self, told: Sequence[tuple[int, int, int]]) -> None:
        """Put a token in the mouth of lanes (slot, lane, token), in place of what they said last."""
        if told:
            rows = send(torch.tensor(told), self._token.device)
            self._token[rows[:, 0], rows[:, 1]] = rows[:, 2]

    def close(self, lanes: Sequence[tuple[int, int]]) -> None:
        """End answers; the lanes (slot, lane) are idle again."""
        if not lanes:
            return
        for key in lanes:
            del self._last[key]
        rows = send(torch.tensor(lanes), self._token.device)
        at = (rows[:, 0], rows[:, 1])
        self._live[at] = self._entry[at] = self._position[at] = torch.zeros_like(rows[:, 0])
        idle = torch.zeros(self._n_entries, dtype=torch.bool, device=self._token.device)
        idle[SPARE] = True
        self._seen[at] = idle.expand(len(lanes), -1)

    # --- steps --------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> dict[tuple[int, int], Said]:
        """Feed every open lane its token: what each says next."""
        bucket = self._bucket()
        replay = self._replays.get(bucket)
        if replay is not None:
            replay()
        else:
            self._compute(bucket)
        for key in self._last:
            self._last[key] += 1
        # The one wait for the device: the host must know what was said to end an answer.
        said = self._said[: bucket.n_slots, : bucket.n_lanes].tolist()
        return {key: Said(int(said[key[0]][key[1]][0]), said[key[0]][key[1]][1]) for key in self._last}

    @torch.inference_mode()
    def capture(self, capture: Capture) -> int:
        """Capture a step of every size there can be, and replay it from now on: how many there are.

        Not while a lane is open: capturing runs the step, and an idle lane writes to the spare entry alone.
        """
        assert not self._last, "an answer is open"
        for bucket in self.buckets():
            self._replays[bucket] = capture(functools.partial(self._compute, bucket))
        return len(self._replays)

    def buckets(self) -> Iterator[Bucket]:
        """Every size a step can have, largest first: the others fit in the memory of the largest."""
        sizes = [_doubling(self._n_slots), _doubling(LANES), self._reads()]
        for n_read in reversed(sizes[2]):
            for n_lanes in reversed(sizes[1]):
                for n_slots in reversed(sizes[0]):
                    yield Bucket(n_slots, n_lanes, n_read)

    def _reads(self) -> list[int]:
        """How far a step may read: a quarter of the scratch, where most answers end, or all of it."""
        short = self._scratch_at + (self._n_entries - self._scratch_at) // 4
        return sorted({min(rounded_up(short, 16), self._n_entries), self._n_entries})

    def _bucket(self) -> Bucket:
        """The smallest size that covers the open lanes."""
        assert self._last, "no answer is open"
        return Bucket(
            min(n for n in _doubling(self._n_slots) if n > max(slot for slot, _ in self._last)),
            min(n for n in _doubling(LANES) if n > max(lane for _, lane in self._last)),
            min(n for n in self._reads() if n > max(self._last.values())),
        )

    def _compute(self, bucket: Bucket) -> None:
        """One step of the lanes in a bucket. Reads and writes nothing but fixed buffers.

        Nothing here may depend on what the buffers hold, bring a value to the host or send one from
        there: a captured graph does the same again whatever the host knows by then.
        """
        lanes = (slice(bucket.n_slots), slice(bucket.n_lanes))
        entry = self._entry[lanes]
        seen = self._seen[lanes]
        seen.scatter_(2, entry[:, :, None], value=True)  # a token sees itself
        access = Access(
            self._buffers,
            range(bucket.n_slots),
            self._slot_index[: bucket.n_slots],
            entry,
            seen[:, :, : bucket.n_read],
        )
        x = self._model.language_model.embed_tokens(self._token[lanes])
        hidden = self._model.language_model.forward(x, self._position[lanes], (), access)
        said = choose(self._model.lm_head(hidden), self.never)
        self._said[lanes].copy_(said)
        self._token[lanes].copy_(said[..., 0])  # what was said is fed next
        self._position[lanes].add_(self._live[lanes])
        entry.add_(self._live[lanes])


def choose(logits: Tensor, never: Tensor) -> Tensor:
    """The likeliest token of `logits` [..., V] but for the ids in `never`, and its log probability.

    Together in one float64 [..., 2], which holds any id, so that one copy brings both to the host.
    """
    scores = logits.float()
    if scores is logits:
        scores = scores.clone()  # the caller's are not changed
    scores.index_fill_(-1, never, -torch.inf)
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
