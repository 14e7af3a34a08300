"""What is planned is what is taken, and what does not fit is refused with what to lower."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from model.moss.checkpoint import empty_model
from model.moss.config import SpecialTokens, read_config
from model.moss.encoder import Block
from model.moss.forward import MAX_CALL_TOKENS
from model.moss.geometry import MarkerMode, WindowSettings
from model.moss.memory import DoesNotFit, MemoryPlan, plan_memory
from model.moss.prompt import ByteTokenizer, Layout
from model.moss.window import RollingCache
from tests.model.moss.test_checkpoint import official
from tests.model.moss.tiny import LAYOUT, make_model

MODEL = make_model()


def parts(plan: MemoryPlan) -> dict[str, int]:
    """Bytes by name."""
    return {part.name: part.n_bytes for part in plan.parts}


@pytest.mark.parametrize("markers", ["absolute", "restart"])
@pytest.mark.parametrize("n_slots", [1, 5])
def test_what_is_planned_is_what_is_allocated(markers: MarkerMode, n_slots: int) -> None:
    """Weights, slots and the buffers of the decode step, to the byte."""
    window = WindowSettings(n_blocks=3, scratch_tokens=100, markers=markers)
    plan = plan_memory(MODEL.config, window, n_slots, torch.float32, n_prefix=len(LAYOUT.prefix))
    cache = RollingCache(MODEL, LAYOUT, window, n_slots)
    assert parts(plan)["weights"] == sum(parameter.nbytes for parameter in MODEL.parameters())
    assert parts(plan)["slots"] == cache.n_bytes
    assert 0 < cache.decode_step.n_bytes < parts(plan)["decode"]


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors alive at one time, those in `kept` left out."""

    def __init__(self, *kept: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n_bytes = 0  # at the worst moment
        self._now = 0
        self._kept = {tensor.untyped_storage()._cdata for tensor in kept}
        self._alive: Counter[int] = Counter()  # tensors on a storage

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one kernel, and count what it gave."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._kept:
                    if not self._alive[storage._cdata]:
                        self._now += storage.nbytes()
                        self.n_bytes = max(self.n_bytes, self._now)
                    self._alive[storage._cdata] += 1
                    weakref.finalize(tensor, self._drop, storage._cdata, storage.nbytes())
        return out

    def _drop(self, key: int, n_bytes: int) -> None:
        self._alive[key] -= 1
        if not self._alive[key]:
            self._now -= n_bytes


@pytest.mark.slow
@torch.inference_mode()
def test_the_workspace_is_what_the_largest_calls_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 4B model without memory behind its tensors: at most what is planned, and not a fraction of it.

    Attention itself is left out: the kernels of a GPU keep no scores.
    """
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention", lambda q, *_, **__: torch.empty_like(q)
    )
    config, window, n_slots = read_config(official()), WindowSettings(), 64
    layout = Layout(ByteTokenizer(), SpecialTokens())
    plan = parts(plan_memory(config, window, n_slots, torch.bfloat16, n_prefix=len(layout.prefix)))
    model = empty_model(config).to(torch.bfloat16)
    cache = RollingCache(model, layout, window, n_slots)
    kept = [*model.parameters(), cache.buffers.k, cache.buffers.v, *cache.decode_step.lanes.tensors]
    used = {}

    with Peak(*kept) as peak:  # a tail among them: every block is cut to its length
        embeddings = model.embed_audio(
            [*[Block(torch.zeros(400, 128), False)] * 127, Block(torch.zeros(399, 128), False)]
        )
    used["encode"] = peak.n_bytes

    n_rows, n_question = 16, MAX_CALL_TOKENS // 16 - 54  # a block with its markers, and a question
    cache.append(dict(enumerate(embeddings[:n_rows])))
    continuations = [cache.reserve(slot_idx) for slot_idx in range(n_rows)]
    with Peak(*kept) as peak:
        cache.extend(continuations, [[40] * n_question] * n_rows)
    used["prefill"] = peak.n_bytes

    with Peak(*kept) as peak:
        cache.decode_step.compute(next(iter(cache.decode_step.buckets())))
    used["decode"] = peak.n_bytes + cache.decode_step.n_bytes
    for name, n_bytes in used.items():
        assert 0.4 * plan[name] < n_bytes < plan[name], (name, used, plan)


def test_the_official_model_fits_a_large_gpu() -> None:
    """The plan of 4B in bfloat16: 10.45 GB of weights, and each stream a few hundred megabytes."""
    config = read_config(official())
    plan = plan_memory(config, WindowSettings(), 64, torch.bfloat16, is_cuda=True)
    assert round(parts(plan)["weights"] / 1e9, 2) == 10.45
    assert 2e8 < plan.bytes_per_slot < 3e8
    plan.check(80_000_000_000, "there")


def test_half_the_precision_takes_half_the_cache() -> None:
    """Weights and slots follow the dtype."""
    config = read_config(official())
    half, full = (plan_memory(config, WindowSettings(), 8, d) for d in (torch.bfloat16, torch.float32))
    for name in ("weights", "slots"):
        assert parts(full)[name] == 2 * parts(half)[name]


def test_a_refusal_names_what_to_lower_and_how_far() -> None:
    """Needed and available, and the settings with numbers that do fit."""
    config = read_config(official())

    def planned(n_slots: int, n_blocks: int) -> MemoryPlan:
        window = WindowSettings(n_blocks=n_blocks, max_position=40_960)
        return plan_memory(config, window, n_slots, torch.bfloat16, is_cuda=True)

    available = 24_000_000_000
    with pytest.raises(DoesNotFit) as refused:
        planned(32, 30).check(available, "on a small GPU")
    text = str(refused.value)
    assert "24.00 GB are available on a small GPU" in text
    n_slots = int(text.split("engine.n_slots to ")[1].split()[0])
    window_s = int(text.split("moss.window_s to ")[1].split()[0])
    planned(n_slots, 30).check(available, "")
    planned(32, window_s // 4).check(available, "")
    # As far as that, give or take one: the workspace shrinks a little with the window, too.
    for other in (planned(n_slots + 2, 30), planned(32, window_s // 4 + 2)):
        with pytest.raises(DoesNotFit):
            other.check(available, "")
