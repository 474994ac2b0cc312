"""Element-wise parts of both towers as one operation each: fewer passes over memory, fewer tensors kept for backward.

Each computes what the plain formula in its docstring computes; the tests compare them. torch.compile sees that formula
and fuses it itself.
"""

import torch
import torch.nn.functional as F


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back: nothing of x is kept."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, gradient):
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, -sin).to(ctx.dtype), None, None


def _rotated(x, cos, sin):
    first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    output = torch.empty(x.shape, dtype=first.dtype, device=x.device)
    half = first.shape[-1]
    torch.mul(first, cos, out=output[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=output[..., half:]).addcmul_(first, sin)
    return output


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + C/2) of x (..., C): [x1 cos - x2 sin, x2 cos + x1 sin], in the wider of the dtypes.

    `cos` and `sin` (..., C/2) broadcast against x's halves and get no gradient.
    """
    if torch.compiler.is_compiling():
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return _Rotate.apply(x, cos, sin)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number per row."""

    @staticmethod
    def forward(ctx, x, weight, epsilon):
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        gradient, normed = gradient.float(), x.float() * scale
        product = gradient * normed
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        wide_weight = weight.float()
        mean = (product @ wide_weight)[..., None] / x.shape[-1]
        grad_x = (gradient * wide_weight).addcmul_(normed, mean, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """weight * (x / sqrt(mean(x^2) + epsilon)), over the last dimension, the division in float32 and cast back."""
    if torch.compiler.is_compiling():
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)
    if x.is_cuda and x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, epsilon)  # one kernel there, and as little kept
    return _RMSNorm.apply(x, weight, epsilon)


class _SwiGLU(torch.autograd.Function):
    """Keeps its two inputs."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    if torch.compiler.is_compiling():
        return F.silu(gate) * up
    return _SwiGLU.apply(gate, up)
