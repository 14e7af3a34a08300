"""Audio becomes blocks: the same however it is cut, and those of the published code."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.mel import log_mel
from model.moss.encoder import Block
from model.moss.frontend import StreamingFrontend
from tests.model.moss.tiny import make_model, random_pcm

CONFIG = make_model().config.encoder


def wandering(n_samples: int) -> Tensor:
    """Digital silence, then ever louder noise: the floor of the mel rises all the time."""
    level = torch.linspace(-6, 0, n_samples)  # powers of ten
    return torch.where(torch.arange(n_samples) < 20_000, 0.0, random_pcm(n_samples, 0) * 10.0**level)


PCM = wandering(14 * 16_000)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(chunks=st.lists(st.integers(0, 70_000), min_size=1, max_size=12))
def test_blocks_depend_on_the_audio_alone(chunks: list[int]) -> None:
    """A complete block is that of the clip that ends with it, the growing one of the clip that ends now."""
    frontend = StreamingFrontend(CONFIG)
    blocks: list[Block] = []
    at = 0
    for n in chunks:
        blocks += frontend.push(PCM[at : at + n])
        at = min(at + n, PCM.shape[0])
        assert frontend.n_samples == at
        assert frontend.n_blocks == len(blocks) == max(0, at - 40) // 64_000
        tail = frontend.tail()
        if at <= 200 or ((at // 160) % 400 == 0 and at // 64_000 == len(blocks)):
            assert tail is None
        else:
            assert tail is not None
            assert torch.equal(tail.mel, log_mel(PCM[:at], 128)[400 * len(blocks) :])
            assert tail.is_first is (len(blocks) == 0)
    for idx, block in enumerate(blocks):
        assert torch.equal(block.mel, log_mel(PCM[: 64_000 * (idx + 1) + 40], 128)[400 * idx :])
        assert block.is_first is (idx == 0)


def test_a_known_peak_makes_the_floor_that_of_the_whole_clip() -> None:
    """Told the clip's maximum, a stream gives the mel of the published code's single hearing."""
    whole = log_mel(PCM, 128)
    blind, told = StreamingFrontend(CONFIG), StreamingFrontend(CONFIG, min_peak=float(whole.max() * 4 - 4))
    assert not torch.equal(blind.push(PCM)[0].mel, whole[:400])
    torch.testing.assert_close(told.push(PCM)[0].mel, whole[:400], atol=1e-6, rtol=0)


def test_the_mel_is_rounded_as_the_processor_rounds_it() -> None:
    """`mel_dtype` of the official processor is bfloat16, in any arithmetic of the model."""
    plain, rounded = (
        StreamingFrontend(CONFIG, mel_dtype).push(PCM)[1].mel for mel_dtype in ("float32", "bfloat16")
    )
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, plain.bfloat16().float())
    assert not torch.equal(rounded, plain)
