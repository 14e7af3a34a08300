"""The decode step: over fixed buffers, free of the host, the same when it is recorded and replayed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from model.layers import send
from model.moss.checkpoint import empty_model
from model.moss.frontend import StreamingFrontend
from model.moss.generate import Generation, Request, generate
from model.moss.geometry import WindowSettings
from model.moss.language import visible_mask
from model.moss.step_graph import LANES, Bucket, CudaGraphs, LaneBuffers, Replay, choose
from model.moss.window import RollingCache
from tests.model.moss.tiny import LAYOUT, make_model, random_audio, random_pcm

MODEL = make_model()
WINDOW = WindowSettings(n_blocks=3, scratch_tokens=300)
TEXTS = ["What?", "Where?", "Who was that?", "When did it begin?"]

# What brings a value to the host or waits for one, or sends one from there: kernels (`lift_fresh` is
# what `torch.tensor` does) and methods that need none on a CPU.
HOST = {"_local_scalar_dense", "nonzero", "lift_fresh", "is_nonzero", "equal"}
HOST_METHODS = {"tolist", "item", "numpy", "cpu", "cuda", "__bool__", "__int__", "__float__", "__index__"}


def make_cache(n_slots: int = 5) -> RollingCache:
    """Slot s has heard s blocks and a little of the next."""
    cache = RollingCache(MODEL, LAYOUT, WINDOW, n_slots)
    for slot_idx in range(n_slots):
        for block in range(slot_idx):
            cache.append({slot_idx: random_audio(MODEL, 10 * slot_idx + block)})
        cache.set_tail({slot_idx: random_audio(MODEL, slot_idx, 10 * slot_idx + 1)})
    cache.flush()
    return cache


def questions(*slots: int, n: int = 20) -> list[Request]:
    """A question for each slot named, each time another one."""
    return [Request(s, LAYOUT.question(TEXTS[k % 4]), n) for k, s in enumerate(slots)]


class Recorder(TorchDispatchMode):
    """A capture as CUDA does it: the kernels of one run with the very tensors they were given.

    A replay runs them again on what those tensors hold by then. Python's part of the step is not
    run again: what it decided at capture is fixed, as it is in a graph.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one kernel and note it."""
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Run the kernels again, on the buffers' present content."""
        made: dict[int, Tensor] = {}

        def now(value: Any) -> Any:
            return made.get(id(value), value) if isinstance(value, Tensor) else value

        for func, args, kwargs, out in self.calls:
            again = func(*tree_map(now, args), **tree_map(now, kwargs))
            for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, Tensor):
                    made[id(old)] = new


class NoHost(TorchFunctionMode):
    """Refuses methods that bring a value to the host."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run what is called, if it may be."""
        assert getattr(func, "__name__", "") not in HOST_METHODS, func
        return func(*args, **(kwargs or {}))


class Recording:
    """A graph API for `DecodeStep.capture`: runs once to warm up, records once, counts replays."""

    def __init__(self) -> None:
        self.n_replays = 0
        self.recorders: list[Recorder] = []

    def __call__(self, run: Callable[[], None]) -> Replay:
        """Capture a step."""
        run()
        recorder = Recorder()
        with NoHost(), recorder:
            run()
        self.recorders.append(recorder)

        def replay() -> None:
            self.n_replays += 1
            recorder.replay()

        return replay


def same(a: Sequence[Generation], b: Sequence[Generation]) -> None:
    """Token for token, and as sure of it."""
    assert [(x.tokens, x.reason) for x in a] == [(y.tokens, y.reason) for y in b]
    assert [x.confidence for x in a] == pytest.approx([y.confidence for y in b], rel=1e-5)


@pytest.mark.slow
def test_recorded_steps_answer_as_the_function_does() -> None:
    """Every size captured, then answers of many slots and lanes by replay alone: the same tokens."""
    eager, replayed = make_cache(), make_cache()
    held = replayed.buffers.k[:, :, :, 1:].clone()
    recording = Recording()
    assert replayed.decode_step.capture(recording) == len(list(replayed.decode_step.buckets()))
    assert torch.equal(held, replayed.buffers.k[:, :, :, 1:])  # capturing writes to the spare entry alone
    for asked in (questions(3), questions(0, 4, 4, 1), questions(2, 2, 2, 2), questions(4, 0, n=90)):
        before = recording.n_replays
        same(generate(replayed, asked, guard=None), generate(eager, asked, guard=None))
        assert recording.n_replays == before + asked[0].max_tokens - 1  # the first token is the prefill's
    # And again after the window has moved on.
    for cache in (eager, replayed):
        for block in range(6):
            cache.append({4: random_audio(MODEL, 500 + block)})
    same(generate(replayed, questions(4, 1), guard=None), generate(eager, questions(4, 1), guard=None))


def test_a_captured_step_never_speaks_to_the_host() -> None:
    """No value is read, none is sent, and no tensor but a fixed one is written for good."""
    cache = make_cache()
    recording = Recording()
    cache.decode_step.capture(recording)
    for recorder in recording.recorders:
        assert len(recorder.calls) > 50
        names = {func.overloadpacket.__name__ for func, _, _, _ in recorder.calls}
        assert not names & HOST
        for func, _, kwargs, _ in recorder.calls:
            if func.overloadpacket.__name__ == "_to_copy":
                assert kwargs.get("device") is None, "a copy between devices"


def test_buffers_are_never_rebound() -> None:
    """The addresses a graph holds are those the step works on afterwards, too."""
    cache = make_cache()

    def addresses() -> list[int]:
        return [tensor.data_ptr() for tensor in (*cache.tensors, *cache.decode_step.lanes.tensors)]

    before = addresses()
    generate(cache, questions(0, 4, 4))
    assert addresses() == before


def test_a_step_writes_for_open_lanes_alone() -> None:
    """Idle lanes and slots of the same size of step keep every bit, the spare entry left out."""
    cache = make_cache()
    generate(cache, questions(0, 1, 2, 3, 4, n=30))  # their scratch holds something
    held = cache.buffers.k.clone()
    generate(cache, questions(3, n=30))
    changed = (held != cache.buffers.k).any(dim=(0, 2, 4))  # [S, C]
    assert changed[3].any()
    assert not changed[[0, 1, 2, 4], 1:].any()
    assert not changed[3, 1 : cache.geometry.scratch_start].any()


def test_lanes_are_idle_again_after_an_answer() -> None:
    """Nothing of an answer is left behind: what is asked next is not changed by it."""
    cache, fresh = make_cache(), make_cache()
    generate(cache, questions(4, 4, 4, 0, n=40))
    same(generate(cache, questions(4, 1)), generate(fresh, questions(4, 1)))
    lanes = cache.decode_step.lanes
    idle = LaneBuffers.new(5, cache.geometry.n_entries, lanes.token.device)
    for name in ("position", "entry", "is_open", "mask"):
        assert torch.equal(getattr(lanes, name), getattr(idle, name)), name


def test_nothing_is_captured_while_an_answer_is_open() -> None:
    """Capturing runs the step, and would write a token of it."""
    cache = make_cache()
    cache.decode_step.open([(cache.reserve(1), 40)])
    with pytest.raises(AssertionError, match="open"):
        cache.decode_step.capture(Recording())


@pytest.mark.parametrize(("n_slots", "n_sizes"), [(1, 6), (5, 24), (64, 42)])
def test_sizes_cover_every_step_and_are_few(n_slots: int, n_sizes: int) -> None:
    """Doubling slots and lanes, two reaches into the scratch."""
    cache = RollingCache(MODEL, LAYOUT, WindowSettings(n_blocks=1, scratch_tokens=256), n_slots)
    sizes = list(cache.decode_step.buckets())
    assert len(sizes) == len(set(sizes)) == n_sizes
    assert sizes[0] == Bucket(n_slots, LANES, cache.buffers.k.shape[3])
    assert all(size.n_read % 16 == 0 for size in sizes)


def test_more_answers_than_lanes_wait() -> None:
    """Six questions on one slot: the same answers as one by one."""
    cache = make_cache()
    many = [Request(2, LAYOUT.question(f"{k}?"), 8) for k in range(LANES + 2)]
    same(generate(cache, many), [generate(cache, [one])[0] for one in many])


def test_choosing() -> None:
    """The likeliest of what may be said, with its probability among all that may."""
    logits = torch.tensor([[1.0, 5.0, 2.0], [0.0, 9.0, 8.0]])
    kept = logits.clone()
    tokens, log_probability = choose(logits, torch.tensor([1])).float().unbind(-1)
    assert tokens.tolist() == [2, 2]
    expected = torch.tensor([[1.0, 2.0], [0.0, 8.0]]).log_softmax(1)[:, 1]
    torch.testing.assert_close(log_probability, expected)
    assert torch.equal(logits, kept)


def test_ranges_become_masks() -> None:
    """Disjoint ranges in any order, empty ones among them."""
    starts, stops = torch.tensor([[3, 0, 0], [5, 0, 2]]), torch.tensor([[5, 1, 0], [6, 0, 5]])
    rows = [[int(x) for x in row] for row in visible_mask(starts, stops, 6)]
    assert rows == [[1, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1]]


class NoWaiting(TorchFunctionMode):
    """Refuses what waits for a device unseen: tensors made there of Python's values, indexing by mask."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run what is called, if it may be."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is torch.tensor:
            assert kwargs.get("device") is None, "sent from pageable memory"
        if name in ("__getitem__", "__setitem__") and args[0].is_meta:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(part, list) for part in index), "a list as an index is sent, too"
            masks = [part for part in index if isinstance(part, Tensor) and part.dtype == torch.bool]
            assert not masks, "how many places a mask names, the host must wait for"
        return func(*args, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "window",
    [
        WindowSettings(n_blocks=2, scratch_tokens=200, max_position=520),
        WindowSettings(n_blocks=2, scratch_tokens=200, markers="restart"),
    ],
    ids=["re-anchored", "restart"],
)
def test_audio_and_questions_never_wait_for_the_device(window: WindowSettings) -> None:
    """Encode, append, evict, re-anchor, growing blocks, questions: on tensors that hold nothing to read.

    A tensor on the meta device raises when a value of it is asked for.
    """
    model = empty_model(MODEL.config)
    cache = RollingCache(model, LAYOUT, window, 3)
    frontends = [StreamingFrontend(MODEL.config.encoder) for _ in range(3)]
    n_moves = 0
    with NoWaiting(), torch.inference_mode():
        for tick in range(9):
            before = cache.end_position(0)
            blocks = [frontend.push(random_pcm(70_000, tick)) for frontend in frontends]
            tails = [frontend.tail() for frontend in frontends]
            audio = model.embed_audio(
                [block for complete in blocks for block in complete] + [t for t in tails if t]
            )
            assert len(audio) == 6
            cache.append(dict(enumerate(audio[:3])))
            cache.set_tail(dict(enumerate(audio[3:])))
            n_moves += cache.end_position(0) < before
            continuations = [cache.reserve(slot_idx, n_tokens=90) for slot_idx in (0, 2, 2)]
            logits = cache.extend(continuations, [LAYOUT.question(text) for text in TEXTS[:3]])
            cache.decode_step.open([(one, 40) for one in continuations])
            cache.decode_step.replace({(0, 0): 41})
            cache.decode_step.compute(next(cache.decode_step.buckets()))
            cache.decode_step.close([(0, 0), (2, 0), (2, 1)])
            cache.release([0, 2])
            assert logits.is_meta
        cache.reset([1])
    assert cache.blocks(0).stop == 9
    assert window.markers == "restart" or n_moves > 0


class FakeCuda:
    """torch.cuda's graph calls, in the order they come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "Stream", lambda: self.stream("side"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream("main"))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self.within(f"on {stream.name}"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", self.graph)
        monkeypatch.setattr(torch.cuda, "graph", lambda _graph, pool: self.within(f"capture in {pool}"))

    def stream(self, name: str) -> Any:
        """A stream of that name."""
        log = self.log

        class Stream:
            def __init__(self) -> None:
                self.name = name

            def wait_stream(self, other: Any) -> None:
                log.append(f"{name} waits for {other.name}")

        return Stream()

    def graph(self) -> Any:
        """A graph that notes its replays."""
        log = self.log

        class Graph:
            def replay(self) -> None:
                log.append("replay")

        return Graph()

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Between the beginning and the end of something."""
        self.log.append(name)
        yield
        self.log.append("end")


def test_what_is_sent_to_a_gpu_is_pinned_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By way of pinned memory there, as it is elsewhere."""
    log: list[tuple[Any, Any, Any]] = []
    pinned = torch.zeros(2)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda _self: pinned)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: log.append((self, args, kwargs)))
    host = torch.ones(2)
    send(host, torch.device("cuda"))
    send(host, torch.device("cpu"))
    assert log[0][0] is pinned
    assert log[0][1:] == ((torch.device("cuda"),), {"non_blocking": True})
    assert log[1][0] is host
    assert log[1][1:] == ((torch.device("cpu"),), {})


def test_the_order_of_cuda_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm on a side stream that waits and is waited for, then captured once in the shared pool."""
    fake = FakeCuda(monkeypatch)
    replay = CudaGraphs()(lambda: fake.log.append("run"))
    replay()
    assert fake.log == [
        "side waits for main",
        *["on side", "run", "run", "end"],
        "main waits for side",
        *["capture in pool", "run", "end"],
        "replay",
    ]
