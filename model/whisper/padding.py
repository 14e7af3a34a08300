"""What Whisper makes of the silence behind a window's audio, computed once at load.

Whisper reads 30 s whatever was said, and stock weights fail when the padding is cut off. But what the
padded positions become hardly depends on the audio before them. So their keys and values are taken
from a window of nothing but padding, and only positions that hold audio are computed: an encode
costs what the audio lasts, with the weights as they are.

Most padded positions are like many others. A head needs not look at each: its keys are put into
groups, and a group counts as often as it has members behind the audio. The few keys that are like no
other, on which much attention rests, are groups of their own.
Measured in docs/measurements.md, section 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

N_GROUPS = 64  # of each head; more changed nothing that could be measured
N_ROUNDS = 8  # of moving the groups to their members


@dataclass(frozen=True, slots=True)
class Silence:
    """The padding as one layer's heads see it, each in its own groups."""

    keys: Tensor  # [1, H, G, D / H], the mean of each group
    values: Tensor  # as `keys`
    log_sizes: Tensor  # [S + 1, H, G], of each group's part at or after a position; -inf where it has none

    def behind(self, k: Tensor, v: Tensor, n_heard: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Put the padding behind keys and values of what was heard.

        Args:
            k: Keys of the audio, [B, H, T, D / H].
            v: Values, as `k`.
            n_heard: [B] int64, positions of each row that count; the others are never looked at.

        Returns:
            Keys and values [B, H, T + G, D / H] and what to add to every score, [B, H, 1, T + G].
        """
        batch, n_heads, n_steps, _ = k.shape
        is_behind = torch.arange(n_steps, device=k.device) >= n_heard[:, None]  # [B, T]
        unheard = torch.zeros(batch, n_steps, dtype=k.dtype, device=k.device)
        unheard = unheard.masked_fill(is_behind, float("-inf"))[:, None].expand(-1, n_heads, -1)
        bias = torch.cat([unheard, self.log_sizes[n_heard]], dim=2)[:, :, None]
        keys = torch.cat([k, self.keys.expand(batch, -1, -1, -1)], dim=2)
        values = torch.cat([v, self.values.expand(batch, -1, -1, -1)], dim=2)
        return keys, values, bias


@dataclass(frozen=True, slots=True)
class Padding:
    """The padding of a full window, for every layer that attends to the audio."""

    encoder: tuple[Silence, ...]
    decoder: tuple[Silence, ...]  # of its attention to the audio


def summarise(keys: Tensor, values: Tensor, n_groups: int = N_GROUPS) -> Silence:
    """Put the positions of a padded window, [1, H, S, D / H], into groups of like keys."""
    member = _groups(keys[0].float(), min(n_groups, keys.shape[2]))  # [H, S, G]
    size = member.sum(dim=1).clamp(min=1.0)[..., None]  # [H, G, 1]
    own = member.transpose(1, 2)
    # How many members lie at or after each position: for a window that ends there.
    sizes = F.pad(member.flip(1).cumsum(dim=1).flip(1), (0, 0, 0, 1)).transpose(0, 1)  # [S + 1, H, G]
    return Silence(
        (own @ keys[0].float() / size).to(keys.dtype)[None],
        (own @ values[0].float() / size).to(values.dtype)[None],
        sizes.log().to(keys.dtype).contiguous(),
    )


def _groups(points: Tensor, n_groups: int) -> Tensor:
    """One group for each point [H, S, D], as [H, S, G] of zeros and ones.

    Begun with points far from one another, so that outliers stand alone, then k-means.
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
