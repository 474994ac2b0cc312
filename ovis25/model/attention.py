"""Attention over frames of different sizes, without padding and without a mask.

Shapes: N patches of all frames, A heads, C head size, F frames of one length, L that length.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class FrameGroups:
    """Frames of equal length, gathered once per batch and used by every layer.

    `indices` holds one (F, L) tensor of row indices per distinct length, or is None when all frames have
    the same length, so that a view is enough.
    """

    num_frames: int
    indices: list[torch.Tensor] | None

    @classmethod
    def from_lengths(cls, lengths: list[int], device: torch.device) -> "FrameGroups":
        if len(set(lengths)) == 1:
            return cls(len(lengths), None)
        starts: dict[int, list[int]] = {}
        position = 0
        for length in lengths:
            starts.setdefault(length, []).append(position)
            position += length
        indices = [
            torch.tensor(group, device=device)[:, None] + torch.arange(length, device=device)
            for length, group in starts.items()
        ]
        return cls(len(lengths), indices)


def frame_attention(
    query_NAC: torch.Tensor, key_NAC: torch.Tensor, value_NAC: torch.Tensor, groups: FrameGroups
) -> torch.Tensor:
    """Bidirectional attention inside each frame, scale C^-0.5; returns (N, A, C) in the query's dtype."""
    if groups.indices is None:
        stacked = (x.unflatten(0, (groups.num_frames, -1)) for x in (query_NAC, key_NAC, value_NAC))
        return _attend(*stacked).flatten(0, 1)
    output_NAC = torch.empty_like(query_NAC)
    for index_FL in groups.indices:
        group_FLAC = _attend(query_NAC[index_FL], key_NAC[index_FL], value_NAC[index_FL])
        output_NAC = output_NAC.index_put((index_FL,), group_FLAC)
    return output_NAC


def _attend(query_FLAC: torch.Tensor, key_FLAC: torch.Tensor, value_FLAC: torch.Tensor) -> torch.Tensor:
    heads_first = (x.transpose(1, 2) for x in (query_FLAC, key_FLAC, value_FLAC))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
