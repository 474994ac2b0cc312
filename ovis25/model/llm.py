"""transformers' Qwen3 with our output layer and its element-wise parts fused; names, weights and caches are Qwen3's."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3MLP,
    Qwen3RMSNorm,
    eager_attention_forward,
)

from ovis25.compat import attention_of
from ovis25.model.fused import rms_norm, rotate, swiglu
from ovis25.model.loss import LmHead
from ovis25.model.recompute import keeping_inputs


class RMSNorm(Qwen3RMSNorm):
    def forward(self, hidden_states):
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class MLP(Qwen3MLP):
    def forward(self, x):
        return keeping_inputs(lambda gate, up: self.down_proj(swiglu(gate, up)), self.gate_proj(x), self.up_proj(x))


class Attention(Qwen3Attention):
    """B batch, T positions, A heads, K heads of keys and values, C head size."""

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **kwargs):
        query_BTAC, key_BTKC, value_BTKC = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = (table[..., None, : self.head_dim // 2] for table in position_embeddings)
        query_BTAC = rotate(self.q_norm(query_BTAC), cos, sin)
        key_BTKC = rotate(self.k_norm(key_BTKC), cos, sin)
        query, key, value = (x.transpose(1, 2) for x in (query_BTAC, key_BTKC, value_BTKC))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention_of(self.config), eager_attention_forward)
        output, weights = attend(
            self, query, key, value, attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling, sliding_window=self.sliding_window, **kwargs,
        )  # fmt: skip
        return self.o_proj(output.flatten(2)), weights


_OURS: dict[type[nn.Module], type[nn.Module]] = {Qwen3RMSNorm: RMSNorm, Qwen3MLP: MLP, Qwen3Attention: Attention}


def build_llm(config: Qwen3Config) -> Qwen3ForCausalLM:
    """The LLM with random weights, or none on the meta device.

    Its modules change class in place: they keep their names, weights and everything else that transformers gave them.
    """
    # under ZeRO-3, transformers would shard and initialise even what is only to show its shapes
    is_for_shapes = is_deepspeed_zero3_enabled() and torch.get_default_device().type == "meta"
    llm = Qwen3ForCausalLM(config) if is_for_shapes else AutoModelForCausalLM.from_config(config)
    for module in llm.modules():
        if type(module) in _OURS:
            module.__class__ = _OURS[type(module)]
    llm.lm_head.__class__ = LmHead
    return llm
