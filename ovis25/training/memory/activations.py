"""What a micro-batch holds at its peak beyond weights, gradients and optimizer states: counted, not computed.

The model's own code runs forward and backward on tensors without data, with one and two layers a tower; the storages
that live are added up (`LiveBytes`). What the second layer adds, the others add too. Adapters are PEFT's, gradient
checkpointing is transformers', the chunks of loss and visual head are those of a device of the planned size.

A step has two places where most can live. The LLM's: all that the vision side keeps, and the LLM's own forward, loss
and backward. The vision side's: its forward and, where it is trained, its backward, while nothing of the LLM lives. A
frozen vision side keeps nothing.
"""

import json
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ovis25.constants import HIDDEN_STRIDE, PATCH_SIZE
from ovis25.model import Ovis2_5, Ovis2_5_Config
from ovis25.model.adapter import add_adapter
from ovis25.model.fused import rms_norm
from ovis25.model.llm import RMSNorm
from ovis25.training.memory.counts import Choice
from ovis25.training.memory.formats import NumberFormat
from ovis25.training.memory.tracking import LiveBytes
from ovis25.training.memory.workload import Workload

_PATCH_NUMBERS = 3 * PATCH_SIZE**2
# of a batch: bytes until its end, and in the vision side's pass their index and their value as well
_PIXEL_BYTES, _OPEN_PIXEL_BYTES = 1, 8
TOWERS = ("vision", "llm")


@dataclass(frozen=True)
class Pass:
    """How a pass is made: with an adapter or whole, which towers compute their layers again, and the loss's options.

    `device_memory` decides the chunks; None is a CPU.
    """

    adapter: bool = False
    checkpointed: tuple[str, ...] = ()
    device_memory: int | None = None
    loss: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Tower:
    """Bytes: `kept` by the forward pass until the backward pass, `peak` of both."""

    kept: int
    peak: int


class _WideRMSNorm(RMSNorm):
    """What autocast makes of it on a GPU: float32 in and out."""

    def forward(self, hidden_states):
        return rms_norm(hidden_states.float(), self.weight.float(), self.variance_epsilon)


class _WideLayerNorm(nn.LayerNorm):
    def forward(self, input):
        weight, bias = self.weight.float(), self.bias.float()
        return nn.functional.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps)


class _KernelDropout(nn.Dropout):
    """A GPU's, which keeps a byte a number; a CPU keeps what it multiplied with."""

    def forward(self, input):
        return torch.native_dropout(input, self.p, self.training)[0]


_WIDE = {RMSNorm: _WideRMSNorm, nn.LayerNorm: _WideLayerNorm}


def activation_peak(
    config: Ovis2_5_Config, choice: Choice, workload: Workload, numbers: NumberFormat, how: Pass
) -> float:
    """Bytes of a device at the worst moment of a micro-batch."""
    vision = tower_bytes("vision", config, choice, workload, numbers, how)
    llm = tower_bytes("llm", config, choice, workload, numbers, how)
    pixels = workload.num_samples * workload.num_patches * _PATCH_NUMBERS
    embeds = workload.num_samples * workload.num_tokens * config.hidden_size * numbers.weights
    return embeds + max(
        vision.kept + llm.peak + pixels * _PIXEL_BYTES,
        vision.peak + pixels * (_PIXEL_BYTES + _OPEN_PIXEL_BYTES),
    )


def tower_bytes(
    name: str, config: Ovis2_5_Config, choice: Choice, workload: Workload, numbers: NumberFormat, how: Pass
) -> Tower:
    """The vision side, from pixels to embeddings, or the "llm", from embeddings to the loss, with all its layers."""
    if name == "vision" and not workload.num_patches:
        return Tower(0, 0)
    number = (config.vit_config if name == "vision" else config.llm_config).num_hidden_layers
    # the shapes as text: what decides the count, and can be looked up again
    arguments = (config.to_json_string(use_diff=False), choice, workload, numbers, how)
    last = _count_tower(name, min(number, 2), *arguments)
    if number == 1 or not last.kept:
        return last
    first = _count_tower(name, 1, *arguments)
    more = (number - 2) * (last.kept - first.kept)
    return Tower(last.kept + more, max(first.peak, last.peak) + more)


@lru_cache(maxsize=256)
def _count_tower(name, num_layers, shapes, choice, workload, numbers, how) -> Tower:
    model = _meta_model(_with_layers(shapes, num_layers), choice, numbers, how)
    with FakeTensorMode():
        _prepare(model, numbers, how)
        run = _run_vision if name == "vision" else _run_llm
        return run(model, workload, numbers, how)


def _with_layers(shapes: str, num_layers: int) -> Ovis2_5_Config:
    config = Ovis2_5_Config(**json.loads(shapes))
    config.vit_config.num_hidden_layers = config.llm_config.num_hidden_layers = num_layers
    config.llm_config.layer_types = config.llm_config.layer_types[:1] * num_layers
    return config


def _meta_model(config: Ovis2_5_Config, choice: Choice, numbers: NumberFormat, how: Pass) -> Ovis2_5:
    """The model frozen or adapted as a run has it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(numbers.dtype)
    try:
        with torch.device("meta"):
            model = Ovis2_5(config)
    finally:
        torch.set_default_dtype(before)
    if how.adapter:
        add_adapter(model, choice.adapter)
    else:
        choice.apply(model)
    return model.train()


def _prepare(model: Ovis2_5, numbers: NumberFormat, how: Pass) -> None:
    """A GPU's own forms, checkpointing, chunks; gradients are there, as from an earlier micro-batch."""
    _leave_meta(model)
    on_gpu = {nn.Dropout: _KernelDropout, **(_WIDE if _is_autocast(numbers, how) else {})}
    for module in model.modules():
        if how.device_memory is not None:
            module.__class__ = on_gpu.get(type(module), type(module))
    if how.checkpointed:
        model.checkpointed_towers = how.checkpointed
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.llm.lm_head.planned_memory = model.visual_tokenizer.head.planned_memory = how.device_memory
    for value in model.parameters():
        value.grad = torch.empty_like(value) if value.requires_grad else None


def _is_autocast(numbers: NumberFormat, how: Pass) -> bool:
    return numbers.autocast or (how.adapter and numbers.dtype == torch.bfloat16)


def _leave_meta(model: nn.Module) -> None:
    """Give every tensor one that operations take for real. PEFT cannot make its layers of such tensors itself."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        own = (module.named_parameters(recurse=False, remove_duplicate=False), module.named_buffers(recurse=False))
        for name, value in [pair for pairs in own for pair in pairs]:
            if id(value) not in made:
                empty = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                is_parameter = isinstance(value, nn.Parameter)
                made[id(value)] = nn.Parameter(empty, value.requires_grad) if is_parameter else empty
            setattr(module, name, made[id(value)])


def _run_llm(model: Ovis2_5, workload: Workload, numbers: NumberFormat, how: Pass) -> Tower:
    embeds = torch.empty(workload.num_samples, workload.num_tokens, model.config.hidden_size, dtype=numbers.dtype)
    embeds.requires_grad_(any(value.requires_grad for name, value in model.named_parameters() if _feeds_llm(name)))
    targets = torch.zeros(min(workload.num_learned, embeds[..., 0].numel()), dtype=torch.int64)
    return count_llm(model, embeds, targets, _is_autocast(numbers, how), dict(how.loss))


def _feeds_llm(name: str) -> bool:
    return name.startswith(("visual_tokenizer.", "vte.")) or "embed_tokens" in name


def count_llm(model: Ovis2_5, embeds: torch.Tensor, targets: torch.Tensor, autocast: bool, loss: dict) -> Tower:
    """From embeddings (B, T, H) to the loss of as many rows as there are targets, and back."""
    places = torch.arange(len(targets))
    live = LiveBytes([*_standing(model), embeds, targets, places])
    with live:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            # a dict is taken as it is: without data, transformers cannot see that a batch needs no mask
            hidden = model.llm.model(None, {"full_attention": None}, inputs_embeds=embeds, use_cache=False)[0]
            kept = live.now
            rows = hidden.flatten(0, 1).index_select(0, places)
            total = model.llm.lm_head(rows, targets, **loss)[:, 0].sum()
            del hidden, rows
        if total.requires_grad:
            total.backward()
    return Tower(kept, live.peak)


def _run_vision(model: Ovis2_5, workload: Workload, numbers: NumberFormat, how: Pass) -> Tower:
    height = HIDDEN_STRIDE * max(round(workload.num_patches**0.5 / HIDDEN_STRIDE), 1)
    width = HIDDEN_STRIDE * max(workload.num_patches // (height * HIDDEN_STRIDE), 1)
    grids = [(1, height, width)] * workload.num_samples
    pixels = torch.empty(len(grids) * height * width, _PATCH_NUMBERS, dtype=numbers.dtype)
    return count_vision(model, pixels, grids, _is_autocast(numbers, how))


def count_vision(model: Ovis2_5, pixels: torch.Tensor, grids: list[tuple[int, int, int]], autocast: bool) -> Tower:
    """From pixels (N, K) to embeddings, which do not count, and back where anything is trained."""
    live = LiveBytes([*_standing(model), pixels])
    with live:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            embeds = model.visual_tokenizer(pixels, grids, model.vte(None))
        kept = live.now - embeds.nbytes
        if embeds.requires_grad:
            embeds.backward(torch.ones_like(embeds))
    return Tower(kept, live.peak)


def _standing(model: Ovis2_5) -> list[torch.Tensor]:
    """What stays from step to step: parameters, their gradients, buffers."""
    parameters = list(model.parameters())
    return [*parameters, *(value.grad for value in parameters if value.grad is not None), *model.buffers()]
