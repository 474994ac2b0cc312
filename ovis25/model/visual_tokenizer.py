"""From pixels to visual words to embeddings: a probability over the visual vocabulary, times its table.

Shapes: N patches, D vision width, S hidden stride, M visual tokens (N / S^2), V visual vocabulary
(four indicators included), H LLM width.
"""

import torch
from torch import nn

from ovis25.constants import NUM_INDICATORS
from ovis25.model.config import Ovis2_5_Config
from ovis25.model.vision import SiglipNavit


class VisualTokenizer(nn.Module):
    """Encoder and head; gives each visual token a probability over the V - 4 visual words."""

    def __init__(self, config: Ovis2_5_Config):
        super().__init__()
        vit, num_words = config.vit_config, config.visual_vocab_size - NUM_INDICATORS
        self.block_size = vit.hidden_stride**2
        self.vit = SiglipNavit(vit)
        self.head = nn.Sequential(
            nn.Linear(vit.hidden_size * self.block_size, num_words, bias=False), nn.LayerNorm(num_words)
        )

    def forward(self, pixels_NK: torch.Tensor, grids: list[tuple[int, int, int]]) -> torch.Tensor:
        """Returns (M, V - 4) probabilities in the working dtype; the softmax runs in float32."""
        features_ND = self.vit(pixels_NK, grids)
        logits_MV = self.head(features_ND.unflatten(0, (-1, self.block_size)).flatten(1))
        return torch.softmax(logits_MV, dim=-1, dtype=torch.float32).to(logits_MV.dtype)


class VisualEmbedding(nn.Embedding):
    """`vte`: rows of visual words, then one row per indicator.

    Called with probabilities (M, V - 4) it mixes the words' rows; called with ids it looks rows up.
    """

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.is_floating_point():
            # what appending four zero probabilities would compute
            return tokens @ self.weight[:-NUM_INDICATORS]
        return super().forward(tokens)
