"""The fused element-wise parts against the plain formulas, and transformers' own Qwen3."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from ovis25.model.fused import rms_norm, rotate, swiglu
from ovis25.model.llm import build_llm

# float32: the same sums in another order. Measured worst 3e-7
SAME = 2e-6


def leaf(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def plain_rotate(x, cos, sin):
    """transformers' formula: tables over the whole width, (x cos) + (rotate_half(x) sin)."""
    return apply_rotary_pos_emb(x, x, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1), unsqueeze_dim=0)[0][0]


def plain_norm(x, weight):
    norm = Qwen3RMSNorm(x.shape[-1], eps=1e-6)
    norm.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
    return norm(x)


def test_gradients_are_the_derivatives():
    torch.manual_seed(0)
    angles = torch.randn(3, 1, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(rotate, (leaf(3, 2, 4), angles.cos(), angles.sin()))
    assert torch.autograd.gradcheck(swiglu, (leaf(3, 5), leaf(3, 5)))
    # its sums run in float32
    x, weight = leaf(3, 2, 6), leaf(6)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6), (x, weight), eps=1e-2, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_the_plain_formulas(dtype):
    torch.manual_seed(0)
    x, gate, up = (leaf(7, 3, 8, dtype=dtype) for _ in range(3))
    angles, weight = torch.randn(7, 1, 4), leaf(8, dtype=dtype)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    pairs = [
        (rms_norm(x, weight, 1e-6), plain_norm(x, weight), (x,)),
        (rotate(x, cos, sin), plain_rotate(x, cos, sin), (x,)),
        (swiglu(gate, up), F.silu(gate) * up, (gate, up)),
    ]
    # bfloat16 rounds after each step of the plain formulas: up to two of its eighth bits
    bound = SAME if dtype == torch.float32 else 2**-7
    for got, expected, inputs in pairs:
        assert got.dtype == expected.dtype
        assert relative_error(got, expected) < bound
        direction = torch.randn_like(got)
        for gradient, plain in zip(
            torch.autograd.grad(got, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
        ):
            assert gradient.dtype == plain.dtype and relative_error(gradient, plain) < bound


def test_compiled_they_are_the_same_graph_of_plain_formulas():
    torch.manual_seed(0)
    x, gate, weight, angles = torch.randn(7, 3, 8), torch.randn(7, 3, 8), torch.randn(8), torch.randn(7, 1, 4)

    def all_three(x):
        return swiglu(gate, rotate(rms_norm(x, weight, 1e-6), angles.cos(), angles.sin()))

    compiled = torch.compile(all_three, backend="eager", fullgraph=True)
    assert relative_error(compiled(x), all_three(x)) < SAME


def test_mixed_dtypes_widen_as_plain():
    """Under autocast the norms' weights are float32 beside bfloat16 activations."""
    x, weight = torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(8)
    assert torch.equal(rms_norm(x, weight, 1e-6), plain_norm(x, weight))
    assert rotate(x, torch.ones(2, 4), torch.zeros(2, 4)).dtype == torch.float32


def test_the_llm_is_transformers_qwen3():
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=50, tie_word_embeddings=True,
    )  # fmt: skip
    ours, plain = build_llm(config), Qwen3ForCausalLM._from_config(config)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(ours.state_dict())
    ids, mask = torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    outputs = [llm(input_ids=ids, attention_mask=mask).logits for llm in (ours, plain)]
    assert relative_error(outputs[0], outputs[1]) < SAME
    for output in outputs:
        (output[:, 3:] ** 2).sum().backward()
    for (name, value), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert relative_error(value.grad, other.grad) < SAME, name
    generated = [llm.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False) for llm in (ours, plain)]
    assert torch.equal(*generated)
