"""The log-mel spectrogram: of a stream as of the whole clip, and as transformers computes it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.mel import HALF, HOP, N_FFT, SILENCE, StreamingMel, log_mel

N_MELS = pytest.mark.parametrize("n_mels", [80, 128])


def noise(n_samples: int, seed: int = 0) -> Tensor:
    """Noise that grows louder, so that the maximum is not in the first frames."""
    rng = np.random.default_rng(seed)
    pcm = rng.standard_normal(n_samples) * np.linspace(0.001, 0.3, n_samples)
    return torch.from_numpy(pcm.astype(np.float32))


def streamed(pcm: Tensor, lengths: list[int], n_mels: int) -> tuple[Tensor, float]:
    """All frames of a clip pushed in pieces, and the peak; what is left over is pushed last."""
    stream = StreamingMel(n_mels)
    frames = []
    for length in lengths:
        frames.append(stream.push(pcm[:length]))
        pcm = pcm[length:]
    frames += [stream.push(pcm), stream.finish()]
    return torch.cat(frames), stream.peak


@N_MELS
@given(
    n_hops=st.integers(2, 12),
    rest=st.sampled_from([0, 1, 39, 40, 41, 159]),
    lengths=st.lists(st.integers(0, 700), max_size=12),
)
@example(n_hops=2, rest=39, lengths=[1] * 200)
@example(n_hops=5, rest=0, lengths=[HALF, 1, 0, HOP, N_FFT])
@settings(max_examples=60)
def test_chunking_does_not_change_the_frames(n_mels: int, n_hops: int, rest: int, lengths: list[int]) -> None:
    """Any cut of the clip gives the frames and the peak of the whole clip at once."""
    pcm = noise(n_hops * HOP + rest)
    whole, whole_peak = streamed(pcm, [], n_mels)
    frames, peak = streamed(pcm, lengths, n_mels)
    assert frames.shape == (len(pcm) // HOP, n_mels)
    torch.testing.assert_close(frames, whole, atol=1e-6, rtol=0)
    assert peak == pytest.approx(whole_peak, abs=1e-6)


@N_MELS
@pytest.mark.parametrize(
    "n_samples", [HALF + 1, 240, 320, *(16_000 + rest for rest in (0, 1, 39, 40, 41, 159))]
)
def test_a_clip_is_as_transformers_has_it(n_mels: int, n_samples: int) -> None:
    """Within 1e-5, edges included, also for clips shorter than a window."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, at import
        from transformers import WhisperFeatureExtractor
    pcm = noise(n_samples)
    extractor = WhisperFeatureExtractor(feature_size=n_mels)  # type: ignore[no-untyped-call]
    theirs = extractor._np_extract_fbank_features(pcm.numpy()[None], device="cpu")[0]  # [M, T]
    ours = log_mel(pcm, n_mels)
    np.testing.assert_allclose(ours.numpy().T, theirs, atol=1e-5, rtol=0)


def test_a_clip_too_short_to_mirror_is_refused() -> None:
    """The message says how long it is and how long it must be."""
    with pytest.raises(ValueError, match=r"200 samples; .* at least 201"):
        log_mel(torch.zeros(HALF), 80)


@given(lengths=st.lists(st.integers(0, 500), min_size=1, max_size=6))
@settings(max_examples=40)
def test_a_look_at_the_tail_changes_nothing(lengths: list[int]) -> None:
    """The frames after a look are those without it."""
    pcm = noise(sum(lengths) + HALF + 1)
    stream = StreamingMel(80)
    frames = []
    for length in lengths:
        frames.append(stream.push(pcm[:length]))
        pcm = pcm[length:]
        peak, n_frames = stream.peak, stream.n_frames
        stream.tail()
        assert (stream.peak, stream.n_frames) == (peak, n_frames)
    frames += [stream.push(pcm), stream.finish()]
    whole, _ = streamed(noise(sum(lengths) + HALF + 1), [], 80)
    torch.testing.assert_close(torch.cat(frames), whole, atol=1e-6, rtol=0)


@given(n_samples=st.integers(HALF + 1, 2000))
@settings(max_examples=40)
def test_the_tail_is_what_comes_if_zeros_follow(n_samples: int) -> None:
    """No frame after it holds anything."""
    pcm = noise(n_samples)
    stream = StreamingMel(80)
    stream.push(pcm)
    tail = stream.tail()
    following = stream.push(torch.zeros(2 * N_FFT))
    torch.testing.assert_close(tail, following[: len(tail)], atol=1e-6, rtol=0)
    assert following[len(tail) :].max() == SILENCE


def test_before_the_first_window_there_is_no_tail() -> None:
    """Too little to mirror gives no frame at all."""
    stream = StreamingMel(80)
    assert stream.push(torch.ones(HALF)).shape == (0, 80)
    assert stream.tail().shape == (0, 80)
