"""What is planned is what is taken, and what does not fit is refused with what to lower."""

from __future__ import annotations

import pytest
import torch

from model.moss.config import read_config
from model.moss.memory import DoesNotFit, MemoryPlan, plan_memory
from model.moss.window import MarkerMode, RollingCache, WindowSettings
from tests.model.moss_tiny import LAYOUT, make_model
from tests.model.test_moss_checkpoint import official

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
    assert 0 < cache.decoder.n_bytes < parts(plan)["decode"]


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
    for other in (planned(n_slots + 1, 30), planned(32, window_s // 4 + 1)):
        with pytest.raises(DoesNotFit):
            other.check(available, "")
