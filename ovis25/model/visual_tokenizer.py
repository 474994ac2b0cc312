"""From pixels to visual words to embeddings: a probability over the visual vocabulary, times its table.

Shapes: N patches, D vision width, S hidden stride, M visual tokens (N / S^2), F features of one (S^2 * D), V visual
vocabulary (four indicators included), H LLM width.
"""

import torch
from torch import nn

from ovis25.constants import NUM_INDICATORS
from ovis25.model.config import Ovis2_5_Config
from ovis25.model.recompute import chunk_size, device_memory, in_chunks
from ovis25.model.vision import SiglipNavit

# visual tokens whose probabilities exist at once (1024 x 65532 in float32: 268 MB); fewer on small devices
CHUNK_TOKENS = 1024


class VisualHead(nn.Sequential):
    """Linear and LayerNorm, then a softmax in float32 over the V - 4 visual words."""

    # DeepSpeed ZeRO-3 then gathers the whole head once a pass: ranks may differ in their number of chunks
    _z3_leaf = True
    # the memory that chunks are made for, where it is not that of the device the rows are on
    planned_memory: int | None = None

    def forward(self, features_MF: torch.Tensor, words_VH: torch.Tensor | None = None) -> torch.Tensor:
        """(M, V - 4) probabilities in the working dtype; with `words_VH` (V - 4, H) the embeddings (M, H) they mix.

        The probabilities of all visual tokens never exist at once where they are mixed.
        """
        if words_VH is None:
            return self._probabilities(features_MF)
        size = chunk_size(CHUNK_TOKENS, len(words_VH), self.planned_memory or device_memory(features_MF.device))
        return in_chunks(lambda features: self._probabilities(features) @ words_VH, features_MF, size=size)

    def _probabilities(self, features_MF: torch.Tensor) -> torch.Tensor:
        logits_MV = super().forward(features_MF)
        return torch.softmax(logits_MV, dim=-1, dtype=torch.float32).to(logits_MV.dtype)


class VisualTokenizer(nn.Module):
    """Encoder and head."""

    def __init__(self, config: Ovis2_5_Config):
        super().__init__()
        vit, num_words = config.vit_config, config.visual_vocab_size - NUM_INDICATORS
        self.block_size = vit.hidden_stride**2
        self.vit = SiglipNavit(vit)
        self.head = VisualHead(
            nn.Linear(vit.hidden_size * self.block_size, num_words, bias=False), nn.LayerNorm(num_words)
        )

    def forward(
        self, pixels_NK: torch.Tensor, grids: list[tuple[int, int, int]], words_VH: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(M, V - 4) probabilities, or the (M, H) embeddings that they mix of `words_VH`; see `VisualHead`."""
        features_ND = self.vit(pixels_NK, grids)
        return self.head(features_ND.unflatten(0, (-1, self.block_size)).flatten(1), words_VH)


class VisualEmbedding(nn.Embedding):
    """`vte`: rows of visual words, then one row per indicator. Called with None it gives the words' rows (V - 4, H)."""

    def forward(self, ids: torch.Tensor | None) -> torch.Tensor:
        return self.weight[:-NUM_INDICATORS] if ids is None else super().forward(ids)
