"""Attention kernels: the model's own and others, in one table of functions of one signature.

Shapes: N rows of all segments, A heads, C head size, K heads of keys and values.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from gpu_run import DTYPE, Run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ovis25.model.attention import Segments, sdpa_attention, segment_attention, varlen_attention

# (query (N, A, C), key (N, K, C), value (N, K, C), segments, is_causal) -> (N, A, C)
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Segments, bool], torch.Tensor]


def sdpa_by(backend: SDPBackend) -> Kernel:
    """One SDPA call for each run of equal lengths, by one backend alone."""

    def kernel(query, key, value, segments, is_causal):
        with sdpa_kernel(backend):
            return sdpa_attention(query, key, value, segments, is_causal)

    return kernel


def padded(kernel: Kernel, size: int) -> Kernel:
    """The kernel at a larger head size, filled up with zeros; the padding is part of what is timed."""

    def padded_kernel(query, key, value, segments, is_causal):
        head_size = query.shape[-1]
        # kernels divide by the root of the size they see
        query = query * (size / head_size) ** 0.5
        parts = (F.pad(part, (0, size - head_size)) for part in (query, key, value))
        return kernel(*parts, segments, is_causal)[..., :head_size]

    return padded_kernel


@functools.lru_cache(maxsize=1)
def _block_mask(segments: Segments, is_causal: bool):
    """Made once for each batch in a model, so it is not timed."""
    lengths = segments.offsets.diff()
    segment_N = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)

    def is_seen(batch, head, row, column):
        same = segment_N[row] == segment_N[column]
        return same & (row >= column) if is_causal else same

    return create_block_mask(is_seen, None, None, len(segment_N), len(segment_N), device=str(lengths.device))


def flex(query, key, value, segments, is_causal):
    heads_first = (part.transpose(0, 1)[None] for part in (query, key, value))
    output = _compiled_flex()(
        *heads_first, block_mask=_block_mask(segments, is_causal), enable_gqa=query.shape[1] != key.shape[1]
    )
    return output[0].transpose(0, 1)


@functools.cache
def _compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


def dense_mask(query, key, value, segments, is_causal):
    """One SDPA call with a mask over everything: what transformers makes of packed rows by itself."""
    lengths = segments.offsets.diff()
    segment_N = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    mask_NN = segment_N[:, None] == segment_N
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    heads_first = (part.transpose(0, 1)[None] for part in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first, mask_NN.tril() if is_causal else mask_NN)[0].transpose(0, 1)


FLASH, CUDNN, EFFICIENT = (
    sdpa_by(backend)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
)
# the model's own first, the slow to compile last
VIT_KERNELS: dict[str, Kernel] = {
    "the model's": segment_attention,
    "varlen": varlen_attention,
    "sdpa cudnn": CUDNN,
    "sdpa flash": FLASH,
    "varlen padded to 80": padded(varlen_attention, 80),
    "varlen padded to 96": padded(varlen_attention, 96),
    "varlen padded to 128": padded(varlen_attention, 128),
    "sdpa cudnn padded to 80": padded(CUDNN, 80),
    "sdpa cudnn padded to 128": padded(CUDNN, 128),
    "sdpa efficient": EFFICIENT,
    "flex": flex,
    "flex padded to 128": padded(flex, 128),
}
LLM_KERNELS: dict[str, Kernel] = {
    "the model's": segment_attention,
    "varlen": varlen_attention,
    "sdpa cudnn": CUDNN,
    "sdpa flash": FLASH,
    "sdpa dense mask": dense_mask,
    "flex": flex,
}
# what a CPU computes; on the others' failure there, nothing is learned
_ANYWHERE = ("the model's", "sdpa flash", "sdpa dense mask")
_COMPILED_S, _PLAIN_S = 25, 3


def is_compiled(name: str) -> bool:
    return name.startswith("flex")


def needs(name: str) -> dict:
    """`Run.measure`'s arguments for a kernel."""
    return {"needs_s": _COMPILED_S if is_compiled(name) else _PLAIN_S, "needs_cuda": name not in _ANYWHERE}


def ragged_lengths(num_frames: int = 24) -> tuple[int, ...]:
    """Patches of frames of 224 to 896 pixels a side."""
    sides = np.random.default_rng(0).integers(224, 897, (num_frames, 2)) // 32 * 2
    return tuple(int(height * width) for height, width in sides)


@dataclass(frozen=True)
class Case:
    """Segments that a batch really has, and the heads that look at them."""

    name: str
    lengths: tuple[int, ...]
    num_heads: int
    num_key_heads: int
    head_size: int
    is_causal: bool

    @property
    def kernels(self) -> dict[str, Kernel]:
        return LLM_KERNELS if self.is_causal else VIT_KERNELS

    @property
    def tflop(self) -> float:
        """Of one forward pass: two products of n^2 each, half of them under a causal mask."""
        pairs = sum(length**2 for length in self.lengths)
        return (2 if self.is_causal else 4) * pairs * self.num_heads * self.head_size / 1e12

    def inputs(self, device: torch.device, dtype: torch.dtype = DTYPE) -> list[torch.Tensor]:
        """Query, key, value and the output's gradient, of fixed random numbers."""
        generator = torch.Generator(device).manual_seed(0)
        return [
            torch.randn(sum(self.lengths), heads, self.head_size, device=device, generator=generator).to(dtype)
            for heads in (self.num_heads, self.num_key_heads, self.num_key_heads, self.num_heads)
        ]


def vit_case(name: str, *lengths: int) -> Case:
    return Case(f"ViT {name}", lengths, 16, 16, 72, is_causal=False)


def llm_case(name: str, num_heads: int, *lengths: int) -> Case:
    return Case(f"LLM {num_heads}/8 {name}", lengths, num_heads, 8, 128, is_causal=True)


def cases(is_small: bool) -> list[Case]:
    """The most telling first."""
    if is_small:
        return [vit_case("ragged", 16, 36, 24), llm_case("ragged", 16, 16, 36, 24)]
    ragged = (4096, 1536, 1024, 700, 512, 224, 100)
    return [
        vit_case("8 x 896^2", *[3136] * 8),
        llm_case("8 x 1024", 16, *[1024] * 8),
        vit_case("24 of 224 to 896", *ragged_lengths()),
        vit_case("1 x 1792^2", 12544),
        llm_case("ragged 8192", 16, *ragged),
        llm_case("8 x 1024", 32, *[1024] * 8),
        vit_case("32 x 448^2", *[784] * 32),
        llm_case("ragged 8192", 32, *ragged),
    ]


def measure_kernels(run: Run) -> None:
    """Plain kernels on all cases, then those that take long to compile on the first three."""
    for case in cases(run.is_small):
        _measure_case(run, case, [name for name in case.kernels if not is_compiled(name)])
    for case in cases(run.is_small)[:3]:
        _measure_case(run, case, [name for name in case.kernels if is_compiled(name)])


def _measure_case(run: Run, case: Case, names: list[str]) -> None:
    segments = Segments(case.lengths, run.device)
    *inputs, gradient = case.inputs(run.device)
    for name in names:
        if is_compiled(name):
            run.clear()
        labels = {"case": case.name, "kernel": name}
        run.measure(labels, functools.partial(_times, run, case, name, inputs, gradient, segments), **needs(name))


def _times(run: Run, case: Case, name: str, inputs, gradient, segments: Segments) -> dict:
    """The backward pass of a fused kernel counts 2.5 forward passes, as in the FlashAttention papers."""
    kernel = case.kernels[name]
    with torch.no_grad():
        forward_ms = run.milliseconds(lambda: kernel(*inputs, segments, case.is_causal))
    leaves = [part.detach().requires_grad_() for part in inputs]

    def forward_and_backward():
        torch.autograd.grad(kernel(*leaves, segments, case.is_causal), leaves, gradient)

    both_ms = run.milliseconds(forward_and_backward, repeats=7)
    return {
        "forward_ms": forward_ms,
        "forward_tflops": case.tflop / forward_ms * 1e3,
        "both_ms": both_ms,
        "both_tflops": 3.5 * case.tflop / both_ms * 1e3,
    }
