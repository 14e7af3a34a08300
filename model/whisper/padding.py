"""Keys and values of the silence that pads a window, computed once when the model is loaded.

Whisper reads windows of 30 s, and stock weights fail when the padding is cut off. But the keys and
values of padded positions hardly depend on the audio before them. So they are taken from a window of
padding alone, and only positions that hold audio are computed: an encode costs in proportion to the
audio, with the weights as they are.

Most padded positions resemble many others. So each head's keys are put into groups, and a group counts
as often as it has members behind the audio. The few keys that resemble no other, which draw much
attention, are groups of their own. Knows no model.
Measured in docs/measurements.md, section 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

N_GROUPS = 64  # of each head; more made no measurable difference
N_ROUNDS = 8  # of k-means


@dataclass(frozen=True, slots=True)
class Silence:
    """The padding as one layer's heads see it, each in its own groups."""

    keys: Tensor  # [1, H, G, D / H], the mean of each group
    values: Tensor  # as `keys`
    log_sizes: Tensor  # [S + 1, H, G], log of each group's members at or after a position; -inf for none

    def behind(self, k: Tensor, v: Tensor, n_audio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Append the padding to keys and values of the audio.

        Args:
            k: Keys of the audio, [B, H, T, D / H].
            v: Values, as `k`.
            n_audio: [B] int64, positions of each row that hold audio; the others are masked.

        Returns:
            Keys and values [B, H, T + G, D / H], and a bias to add to the scores, [B, H, 1, T + G].
        """
        batch, n_heads, n_steps, _ = k.shape
        is_behind = torch.arange(n_steps, device=k.device) >= n_audio[:, None]  # [B, T]
        masked = torch.zeros(batch, n_steps, dtype=k.dtype, device=k.device)
        masked = masked.masked_fill(is_behind, float("-inf"))[:, None].expand(-1, n_heads, -1)
        bias = torch.cat([masked, self.log_sizes[n_audio]], dim=2)[:, :, None]
        keys = torch.cat([k, self.keys.expand(batch, -1, -1, -1)], dim=2)
        values = torch.cat([v, self.values.expand(batch, -1, -1, -1)], dim=2)
        return keys, values, bias


@dataclass(frozen=True, slots=True)
class Padding:
    """The padding of a full window, for every layer that attends to the audio."""

    encoder: tuple[Silence, ...]
    decoder: tuple[Silence, ...]  # of its attention to the audio


def summarise(keys: Tensor, values: Tensor, n_groups: int = N_GROUPS) -> Silence:
    """Group the positions of a padded window, [1, H, S, D / H], by their keys."""
    member = _groups(keys[0].float(), min(n_groups, keys.shape[2]))  # [H, S, G]
    size = member.sum(dim=1).clamp(min=1.0)[..., None]  # [H, G, 1]
    own = member.transpose(1, 2)
    # Members at or after each position, for a window whose audio ends there.
    sizes = F.pad(member.flip(1).cumsum(dim=1).flip(1), (0, 0, 0, 1)).transpose(0, 1)  # [S + 1, H, G]
    return Silence(
        (own @ keys[0].float() / size).to(keys.dtype)[None],
        (own @ values[0].float() / size).to(values.dtype)[None],
        sizes.log().to(keys.dtype).contiguous(),
    )


def _groups(points: Tensor, n_groups: int) -> Tensor:
    """One group for each point [H, S, D], as [H, S, G] of zeros and ones.

    k-means from centres far from one another, so that outliers get groups of their own.
    """
    heads = torch.arange(points.shape[0], device=points.device)
    far = (points - points.mean(dim=1, keepdim=True)).square().sum(dim=-1)  # [H, S], to the nearest centre
    chosen = []
    for _ in range(n_groups):
        farthest = far.argmax(dim=1)
        chosen.append(points[heads, farthest])
        far = torch.minimum(far, (points - chosen[-1][:, None]).square().sum(dim=-1))
    centres = torch.stack(chosen, dim=1)  # [H, G, D]
    for _ in range(N_ROUNDS):
        member = _nearest(points, centres)
        size = member.sum(dim=1)[..., None]
        centres = torch.where(size > 0, member.transpose(1, 2) @ points / size.clamp(min=1.0), centres)
    return _nearest(points, centres)


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    return F.one_hot(torch.cdist(points, centres).argmin(dim=-1), centres.shape[1]).to(points.dtype)
