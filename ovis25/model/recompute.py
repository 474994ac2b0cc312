"""What is computed again in the backward pass instead of being kept."""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


def in_chunks(function: Callable[..., torch.Tensor], *rows: torch.Tensor, size: int) -> torch.Tensor:
    """`function` of `size` rows at a time, its outputs one after the other: memory does not grow with the rows.

    Each output row must depend on its own input rows alone. Where gradients are wanted and there is more than one
    chunk, only the inputs are kept; what `function` made of them is made again in the backward pass.
    """
    if len(rows[0]) <= size:
        return function(*rows)
    chunks = zip(*(tensor.split(size) for tensor in rows), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks])
    return torch.cat([function(*chunk) for chunk in chunks])


def keeping_inputs(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """`function` of the inputs, which alone are kept.

    For an activation and the linear layer behind it: the backward pass makes the activation again, one pass over
    memory, and stops before the product, whose result no gradient needs. torch.compile decides for itself.
    """
    if torch.is_grad_enabled() and inputs[0].requires_grad and not torch.compiler.is_compiling():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)
