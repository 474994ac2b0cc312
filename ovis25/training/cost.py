"""What a sample costs in FLOPs, from the model's shapes: two per multiply-add of the forward pass."""

from ovis25.constants import HIDDEN_STRIDE, NUM_INDICATORS, PATCH_SIZE
from ovis25.data.packing.balance import CostWeights
from ovis25.model import Ovis2_5_Config


def cost_weights(config: Ovis2_5_Config, vision_share: float = 1.0) -> CostWeights:
    """FLOPs of a forward pass by token, pair of tokens, learned token, visual token and pair of patches.

    No padding; the head runs on learned rows alone; causal attention does half of all pairs. `vision_share` scales the
    vision side where it runs less often than the LLM.
    """
    llm, vit = config.llm_config, config.vit_config
    query_width, key_width = llm.num_attention_heads * llm.head_dim, llm.num_key_value_heads * llm.head_dim
    llm_layer = llm.hidden_size * (2 * query_width + 2 * key_width + 3 * llm.intermediate_size)
    vit_layer = vit.hidden_size * (4 * vit.hidden_size + 2 * vit.intermediate_size)
    patch = vit.num_hidden_layers * vit_layer + vit.num_channels * PATCH_SIZE**2 * vit.hidden_size
    # to the visual words, and from them to the embedding
    head = (config.visual_vocab_size - NUM_INDICATORS) * (HIDDEN_STRIDE**2 * vit.hidden_size + llm.hidden_size)
    return CostWeights(
        token=2.0 * llm.num_hidden_layers * llm_layer,
        token_pair=2.0 * llm.num_hidden_layers * query_width,
        learned=2.0 * llm.hidden_size * llm.vocab_size,
        visual=2.0 * vision_share * (HIDDEN_STRIDE**2 * patch + head),
        patch_pair=2.0 * vision_share * vit.num_hidden_layers * 2 * vit.hidden_size,
    )
