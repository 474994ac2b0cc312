"""What is computed again in the backward pass instead of being kept."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch.utils.checkpoint import checkpoint

# of a device's memory, what one chunk of the widest rows may take
_CHUNK_SHARE = 1 / 32
# one number of such a row: in the working format and in float32, with both gradients
_NUMBER_BYTES = 16


@lru_cache
def device_memory(device: torch.device) -> int | None:
    """Bytes that a GPU has in all, whoever uses them; None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def chunk_size(most: int, width: int, memory: int | None) -> int:
    """Rows of `width` numbers at once: `most`, halved until they take 1/32 of a device's `memory` (None: `most`).

    Of the card alone, not of what is free just now: chunks decide the order of sums, which must be the same on every
    rank, in every step and after a resume. 1024 rows of 151936 logits on 80 GB, 256 on 24 GB.
    """
    while memory is not None and most > 1 and most * width * _NUMBER_BYTES > _CHUNK_SHARE * memory:
        most //= 2
    return most


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
