"""Attention inside segments (frames of images, samples of a packed row), without padding and without a mask.

Shapes: N rows of all segments, A heads, C head size, S segments, L rows of one segment; K heads of keys and values,
which divides A (each serves A / K query heads).
"""

import inspect
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# the LLM's attention once it has been given packed rows; without segments it is transformers' sdpa
PACKED_ATTENTION = "ovis25_packed"


# older versions of torch tell grouped heads by their number alone
_VARLEN_TAKES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


class Segments:
    """Rows that lie one segment after the other, described once per batch and used by every layer.

    `offsets` (S + 1,) int32: where each segment begins, then N. `runs`: (how many, length) of neighbours of equal
    length, each run being one view and no copy.

    Lengths 3, 5, 5, 2: rows 0..2, 3..7, 8..12 and 13..14; offsets 0, 3, 8, 13, 15; runs (1, 3), (2, 5), (1, 2).
    """

    def __init__(self, lengths: list[int], device: torch.device):
        self.longest = max(lengths)
        self.offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)
        self.runs = [(len(list(run)), length) for length, run in groupby(lengths)]


def segment_attention(
    query_NAC: torch.Tensor,
    key_NKC: torch.Tensor,
    value_NKC: torch.Tensor,
    segments: Segments,
    is_causal: bool = False,
) -> torch.Tensor:
    """Attention inside each segment, scale C^-0.5; returns (N, A, C) in the query's dtype.

    One call of torch's variable-length kernel where it runs (CUDA, half precision), else one SDPA call for each run of
    segments of equal length.
    """
    if has_varlen_kernel(query_NAC):
        return varlen_attention(query_NAC, key_NKC, value_NKC, segments, is_causal)
    return sdpa_attention(query_NAC, key_NKC, value_NKC, segments, is_causal)


def has_varlen_kernel(query_NAC: torch.Tensor) -> bool:
    """Whether torch's FlashAttention takes this tensor: Ampere or newer, half precision, head size 8, 16, ... 256."""
    head_size = query_NAC.shape[-1]
    return (
        query_NAC.is_cuda
        and query_NAC.dtype in (torch.float16, torch.bfloat16)
        and head_size % 8 == 0
        and head_size <= 256
        and torch.version.hip is None
        and torch.cuda.get_device_capability(query_NAC.device)[0] >= 8
    )


def varlen_attention(query_NAC, key_NKC, value_NKC, segments: Segments, is_causal: bool = False) -> torch.Tensor:
    """All segments in one kernel."""
    offsets, longest = segments.offsets, segments.longest
    grouped = {"enable_gqa": query_NAC.shape[1] != key_NKC.shape[1]} if _VARLEN_TAKES_GQA else {}
    return varlen_attn(
        query_NAC.contiguous(), key_NKC.contiguous(), value_NKC.contiguous(), offsets, offsets, longest, longest,
        window_size=(-1, 0) if is_causal else (-1, -1), **grouped,
    )  # fmt: skip


# its calls differ from batch to batch: compiled, each mix of lengths would be compiled anew
@torch.compiler.disable
def sdpa_attention(query_NAC, key_NKC, value_NKC, segments: Segments, is_causal: bool = False) -> torch.Tensor:
    """One SDPA call per run of equal lengths, on every device."""
    rows = [number * length for number, length in segments.runs]
    outputs = []
    for (number, _), *parts in zip(
        segments.runs, query_NAC.split(rows), key_NKC.split(rows), value_NKC.split(rows), strict=True
    ):
        query_SALC, key_SKLC, value_SKLC = (part.unflatten(0, (number, -1)).transpose(1, 2) for part in parts)
        output_SALC = F.scaled_dot_product_attention(
            query_SALC, key_SKLC, value_SKLC, is_causal=is_causal, enable_gqa=query_SALC.shape[1] != key_SKLC.shape[1]
        )
        outputs.append(output_SALC.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _packed_attention(module, query, key, value, attention_mask, segments: Segments | None = None, **kwargs):
    """The LLM's attention, as transformers calls it: (1, A, N, C) queries, (1, K, N, C) keys and values."""
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # under autocast the norms of query and key give float32, and the kernels take one dtype
    rows_first = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    return segment_attention(*rows_first, segments, is_causal=True)[None], None


ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, _packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
