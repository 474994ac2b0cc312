"""The SigLIP2 NaViT encoder: patches of frames of any size in, the last layer's hidden states out.

Shapes: N patches of all frames (block order: 2 x 2 blocks, rows of blocks first), K numbers per patch
(3 * 16 * 16), D width, A heads, C head size (D / A).
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from ovis25.model.attention import Segments, segment_attention
from ovis25.model.config import SiglipNavitConfig
from ovis25.model.fused import rotate
from ovis25.model.recompute import keeping_inputs

_ROPE_BASE = 10000.0


class PatchEmbedding(nn.Conv2d):
    """The released 16 x 16 convolution, applied to rows that are one patch each: a plain matrix product."""

    def forward(self, pixels_NK: torch.Tensor) -> torch.Tensor:
        return F.linear(pixels_NK, self.weight.flatten(1), self.bias)


class Embeddings(nn.Module):
    """Patch embedding plus the position table resized to each grid."""

    def __init__(self, config: SiglipNavitConfig):
        super().__init__()
        self.table_side = config.image_size // config.patch_size
        self.stride = config.hidden_stride
        self.patch_embedding = PatchEmbedding(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(self.table_side**2, config.hidden_size)

    def forward(self, pixels_NK: torch.Tensor, grids: list[tuple[int, int, int]]) -> torch.Tensor:
        # called as a module, so that sharded parameters (ZeRO-3) are gathered
        table = self.position_embedding(torch.arange(self.table_side**2, device=pixels_NK.device))
        return self.patch_embedding(pixels_NK) + self._positions(table, grids)

    def _positions(self, table: torch.Tensor, grids: list[tuple[int, int, int]]) -> torch.Tensor:
        """(N, D): the table, resized in float32 along its rows and its columns, as products with cached matrices."""
        resized = {}
        with torch.autocast(table.device.type, enabled=False):
            table_ssD = table.float().unflatten(0, (self.table_side, self.table_side))
            for _, height, width in grids:
                if (height, width) not in resized:
                    rows_hs, columns_ws = (
                        torch.from_numpy(bicubic_matrix(size, self.table_side)).to(table.device)
                        for size in (height, width)
                    )
                    tall_hsD = (rows_hs @ table_ssD.flatten(1)).unflatten(1, (self.table_side, -1))
                    resized[height, width] = block_order(columns_ws @ tall_hsD, self.stride).to(table.dtype)
        return torch.cat([resized[height, width] for frames, height, width in grids for _ in range(frames)])


@lru_cache(maxsize=1024)
def bicubic_matrix(size: int, table_side: int) -> np.ndarray:
    """(size, table_side) float32: what torch's bicubic interpolation (`align_corners=False`) multiplies a line with.

    Cubic convolution with a = -0.75 (Keys, "Cubic convolution interpolation for digital image processing", 1981), lines
    continued by their ends. As products the resizing is fast, and its gradient the same in every run on CUDA.
    """
    centre = (np.arange(size) + 0.5) * table_side / size - 0.5
    matrix = np.zeros((size, table_side))
    for tap in range(-1, 3):
        place = np.floor(centre).astype(int) + tap
        distance = np.abs(centre - place)
        near = (1.25 * distance - 2.25) * distance**2 + 1
        far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
        np.add.at(matrix, (np.arange(size), place.clip(0, table_side - 1)), np.where(distance <= 1, near, far))
    return matrix.astype(np.float32)


def block_order(grid_hw: torch.Tensor, stride: int) -> torch.Tensor:
    """Flatten (height, width, ...) to (height * width, ...), one stride x stride block after the other.

    A 2 x 4 grid holding 0..7 row by row, stride 2, comes out as 0 1 4 5 2 3 6 7.
    """
    blocks = grid_hw.unflatten(1, (-1, stride)).unflatten(0, (-1, stride)).transpose(1, 2)
    return blocks.flatten(0, 3)


@lru_cache(maxsize=1024)
def patch_places(height: int, width: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column, (h * w,) int64 each, of every patch of one frame in block order."""
    places = np.arange(height * width).reshape(height // stride, stride, width // stride, stride)
    places = places.transpose(0, 2, 1, 3).ravel()
    return places // width, places % width


def rotary_tables(
    grids: list[tuple[int, int, int]], head_size: int, stride: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (N, 1, C / 2) float32: the angles of patch (r, c) are [r * f, c * f].

    Made of one table over the rows and columns that occur; f has C / 4 frequencies.
    """
    exponents = torch.arange(0, head_size // 2, 2, device=device, dtype=torch.float32) / (head_size // 2)
    frequencies = 1.0 / (_ROPE_BASE**exponents)
    longest = max(max(height, width) for _, height, width in grids)
    angles = torch.arange(longest, device=device, dtype=torch.float32)[:, None] * frequencies
    frames = [patch_places(height, width, stride) for t, height, width in grids for _ in range(t)]
    rows_N, columns_N = (torch.from_numpy(np.concatenate(places)).to(device) for places in zip(*frames, strict=True))
    return tuple(
        torch.cat([table[rows_N], table[columns_N]], dim=-1)[:, None] for table in (angles.cos(), angles.sin())
    )


class Attention(nn.Module):
    def __init__(self, config: SiglipNavitConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_ND, rotary, frames: Segments) -> torch.Tensor:
        query, key, value = (
            projection(hidden_ND).unflatten(-1, (self.num_heads, -1))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        # in float32, whatever the working dtype
        query, key = (rotate(x, *rotary).to(x.dtype) for x in (query, key))
        output_NAC = segment_attention(query, key, value, frames)
        return self.out_proj(output_NAC.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: SiglipNavitConfig):
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return keeping_inputs(lambda inner: self.fc2(self.activation(inner)), self.fc1(hidden_ND))


class EncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: SiglipNavitConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden_ND, rotary, frames: Segments) -> torch.Tensor:
        hidden_ND = hidden_ND + self.self_attn(self.layer_norm1(hidden_ND), rotary, frames)
        return hidden_ND + self.mlp(self.layer_norm2(hidden_ND))


class Encoder(nn.Module):
    def __init__(self, config: SiglipNavitConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_ND, rotary, frames: Segments) -> torch.Tensor:
        for layer in self.layers:
            hidden_ND = layer(hidden_ND, rotary, frames)
        return hidden_ND


class VisionModel(nn.Module):
    def __init__(self, config: SiglipNavitConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        # in every released checkpoint, applied nowhere
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps).requires_grad_(False)

    def forward(self, pixels_NK: torch.Tensor, grids: list[tuple[int, int, int]]) -> torch.Tensor:
        """(N, K) pixels and (frames, height, width) grids in patches -> (N, D), before `post_layernorm`."""
        hidden_ND = self.embeddings(pixels_NK, grids)
        head_size = self.config.hidden_size // self.config.num_attention_heads
        rotary = rotary_tables(grids, head_size, self.config.hidden_stride, pixels_NK.device)
        lengths = [height * width for frames, height, width in grids for _ in range(frames)]
        return self.encoder(hidden_ND, rotary, Segments(lengths, pixels_NK.device))


class SiglipNavit(nn.Module):
    """Wraps the encoder under the released weight names (`vit.vision_model...`)."""

    def __init__(self, config: SiglipNavitConfig):
        super().__init__()
        self.vision_model = VisionModel(config)

    def forward(self, pixels_NK: torch.Tensor, grids: list[tuple[int, int, int]]) -> torch.Tensor:
        return self.vision_model(pixels_NK, grids)
