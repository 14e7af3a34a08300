"""How much memory there is on a device, and whether a plan fits in it.

On a GPU a plan that does not fit is refused: what is free there is known, and what follows is an
out-of-memory error in the middle of a stream. On a CPU free memory is an estimate that caches and
swap blur, so a plan is refused only where it is more than the machine has, and else warned of.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from model.moss.memory import MemoryPlan, gb

logger = logging.getLogger(__name__)

MEMINFO = Path("/proc/meminfo")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, slots=True)
class Memory:
    """What a device has, in bytes."""

    total: int
    available: int  # now; on a CPU an estimate


def memory_of(device: torch.device) -> Memory | None:
    """Of a GPU or of the machine; None where it is unknown."""
    if device.type == "cuda":
        available, total = torch.cuda.mem_get_info(device)
        return Memory(total, available)
    return machine_memory(MEMINFO, CGROUP_LIMIT)


def machine_memory(meminfo: Path, cgroup_limit: Path) -> Memory | None:
    """What Linux reports, and no more than the container's limit; None elsewhere."""
    try:
        text = meminfo.read_text(encoding="ascii")
    except OSError:
        return None
    found = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", text, re.MULTILINE))
    if len(found) < 2:
        return None
    total, available = int(found["MemTotal"]) * 1024, int(found["MemAvailable"]) * 1024
    try:
        limit = cgroup_limit.read_text(encoding="ascii").strip()
    except OSError:
        limit = "max"
    if limit.isdigit():
        total, available = min(total, int(limit)), min(available, int(limit))
    return Memory(total, available)


def check_memory(plan: MemoryPlan, device: torch.device) -> None:
    """Say how a plan fits on a device, before anything of it is allocated.

    Raises:
        DoesNotFit: names what is needed, what there is, and what to lower.
    """
    memory = memory_of(device)
    if memory is None:
        logger.warning("memory: %s needed; how much there is cannot be told here", gb(plan.n_bytes))
        return
    if device.type == "cuda":
        plan.check(memory.available, f"on {torch.cuda.get_device_name(device)}")
    else:
        plan.check(memory.total, "on this machine")
    level = logging.INFO if plan.n_bytes <= memory.available else logging.WARNING
    logger.log(level, "memory: %s needed, %s available", gb(plan.n_bytes), gb(memory.available))
