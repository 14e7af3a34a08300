"""Torch and Hypothesis settings of these tests."""

from __future__ import annotations

import torch
from hypothesis import settings

torch.set_num_threads(1)  # tiny tensors: a second thread only waits
# The first call of a kernel may take longer than Hypothesis' default deadline.
settings.register_profile("tensors", deadline=None)
settings.load_profile("tensors")
