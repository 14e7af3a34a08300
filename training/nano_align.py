"""Forced alignment of recordings of several digits, by the encoder that is being trained on them.

The strings of `speech_train` have texts without times. Once the encoder recognises digits, the likeliest
path through its scores gives the time of each. Knows no mixture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.moss.frontend import blocks_of
from streaming.protocol import SAMPLE_RATE_HZ
from training.nano_batch import TOKENS_PER_S
from training.nano_mixtures import WORDS, Spoken
from training.nano_model import Learner

PAD_S = 0.24  # of silence around a recording


@torch.no_grad()
def spans_of(learner: Learner, spoken: Spoken) -> list[tuple[float, float]]:
    """Start and end of each word of a recording, as shares of its length."""
    pad = np.zeros(round(PAD_S * SAMPLE_RATE_HZ), np.float32)
    padded = torch.from_numpy(np.concatenate([pad, spoken.audio, pad]))
    blocks = blocks_of([padded], learner.model.config.encoder)
    encoded = learner.model.audio_encoder.forward(blocks)
    hidden = torch.cat([row[:n] for row, n in zip(encoded.hidden, encoded.n_tokens, strict=True)])
    scores = learner.digit_at_head(hidden).float().log_softmax(-1)
    length_s = len(spoken.audio) / SAMPLE_RATE_HZ
    found = []
    for first, last in likeliest(scores, [1 + WORDS.index(word) for word in spoken.words]):
        start_s, end_s = first / TOKENS_PER_S - PAD_S, (last + 1) / TOKENS_PER_S - PAD_S
        found.append((max(0.0, start_s / length_s), min(1.0, end_s / length_s)))
    return found


def likeliest(scores: Tensor, digits: Sequence[int]) -> list[tuple[int, int]]:
    """The likeliest first and last token of each digit, in order, with or without pauses between.

    Args:
        scores: [T, 11] log-probabilities, 0 for no digit.
        digits: At most T of them.
    """
    states = [0]
    for digit in digits:
        states += [digit, 0]
    emitted: NDArray[np.float64] = scores[:, states].double().numpy()  # [T, S]
    best = np.full(len(states), -np.inf)
    best[:2] = emitted[0, :2]
    came_from = np.zeros(emitted.shape, np.int64)
    for t in range(1, len(emitted)):
        options = np.stack([best, np.roll(best, 1), np.roll(best, 2)])
        options[1, 0] = options[2, :2] = -np.inf
        options[2, ::2] = -np.inf  # only a pause can be skipped
        came_from[t] = options.argmax(axis=0)
        best = options.max(axis=0) + emitted[t]
    state = len(states) - 1 if best[-1] >= best[-2] else len(states) - 2
    path = [state]
    for t in range(len(emitted) - 1, 0, -1):
        state -= int(came_from[t, state])
        path.append(state)
    path.reverse()
    found = [
        (path.index(2 * idx + 1), len(path) - 1 - path[::-1].index(2 * idx + 1)) for idx in range(len(digits))
    ]
    for idx in range(1, len(digits)):
        if digits[idx] == digits[idx - 1] and found[idx][0] == found[idx - 1][1] + 1:
            # Between equal digits without a pause the scores give no boundary: it is put in the middle.
            first, last = found[idx - 1][0], found[idx][1]
            middle = (first + last) // 2
            found[idx - 1 : idx + 1] = [(first, middle), (min(middle + 1, last), last)]
    return found
