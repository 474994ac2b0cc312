"""Bytes per device of every way to train a model: what `ovis25 plan` prints.

Static part (weights, gradients, optimizer states), in bytes a parameter, with N devices:

| | weights | gradients | optimizer |
|---|---|---|---|
| bfloat16 with a float32 master copy and Adam | 2 | 2 | 4 + 8 |
| float32 | 4 | 4 | 8, and under ZeRO 1 to 3 a master copy of 4 |

ZeRO-1 shares the optimizer's part among the devices, ZeRO-2 the gradients too, ZeRO-3 the weights too (Rajbhandari et
al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC'20, section 3: 4 + 12/N, 2 + 14/N, 16/N
with bfloat16). Offloading moves the optimizer's share and the gradients to the host (Ren et al., "ZeRO-Offload",
USENIX ATC'21), under ZeRO-3 the weights too. Frozen parameters have weights alone. A LoRA adapter on a
bfloat16 model is float32: 16 bytes a parameter. QLoRA keeps the LLM's linear layers in 4.127 bits: NormalFloat with
doubly quantised constants (Dettmers et al., arXiv 2305.14314, section 3).

Activations are counted, not computed by a formula: the forward pass of each tower runs on tensors without data, with
one and two layers, and what autograd keeps is added up; the rest of the layers follows. With gradient checkpointing
a layer keeps its input, and one layer at a time is whole.

The chunk's peak, the larger of two: a chunk of learned rows' logits in the working format, in float32, their
log-softmax and gradient; a chunk of visual tokens' logits, their normed form, its gradient and the probabilities' in
the working format, and probabilities and their gradient in float32. All other rows wait (`ovis25.model.recompute`).

Not counted: communication buckets, the allocator's fragmentation, temporary buffers, CUDA's own context (about 1 GB).
6 % of each device are left free for them.
"""

import copy
import re
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen3Config

from ovis25.constants import HIDDEN_STRIDE, PATCH_SIZE
from ovis25.model import Ovis2_5, Ovis2_5_Config
from ovis25.model.adapter import target_layers
from ovis25.model.loss import CHUNK_ROWS
from ovis25.model.visual_tokenizer import CHUNK_TOKENS
from ovis25.training.modules import choose_trained, parse_train_modules

_UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_FOUR_BITS = 4.127 / 8
_ADAPTER_BYTES = 4
# what a plan may fill of a device: CUDA's context, communication buckets and the allocator take their part
_USABLE = 0.94


@dataclass(frozen=True)
class NumberFormat:
    """Bytes a parameter; `master` is the optimizer's own copy of the weights under ZeRO 1 to 3."""

    dtype: torch.dtype
    weights: int
    gradients: int
    master: int
    moments: int
    master_always: bool


MIXED = NumberFormat(torch.bfloat16, 2, 2, 4, 8, master_always=True)
FLOAT32 = NumberFormat(torch.float32, 4, 4, 4, 8, master_always=False)


@dataclass(frozen=True)
class Strategy:
    """A way to train, and the settings that choose it."""

    name: str
    settings: str
    stage: int = 0
    offload: bool = False
    lora: bool = False
    four_bit: bool = False


def _zero(stage: int, offload: bool = False) -> Strategy:
    file = f"scripts/zero_configs/zero{stage}{'_offload' if offload else ''}_cp.json"
    return Strategy(f"ZeRO-{stage}{' offload' if offload else ''}", f'"deepspeed": "{file}"', stage, offload)


# in the order in which they are preferred
STRATEGIES = (
    _zero(0), _zero(1), _zero(2), _zero(3), _zero(2, offload=True), _zero(3, offload=True),
    Strategy("LoRA", '"use_lora": true', lora=True),
    Strategy("QLoRA", '"use_lora": true, "qlora": true', lora=True, four_bit=True),
)  # fmt: skip


@dataclass
class Workload:
    """One micro-batch on one device: `num_samples` of one image each, every token that is not visual learned."""

    num_samples: int
    num_tokens: int
    num_patches: int

    @property
    def num_learned(self) -> int:
        return self.num_samples * max(self.num_tokens - self.num_patches // HIDDEN_STRIDE**2, 0)


@dataclass
class Counts:
    """Parameters: all, the trained ones in full fine-tuning, the adapter's, and those that QLoRA quantises."""

    total: int
    trained: int
    adapter: int
    quantised: int


@dataclass
class Estimate:
    """Bytes on each device, and `host` bytes of the machine's memory for each device."""

    strategy: Strategy
    weights: float
    gradients: float
    optimizer: float
    activations: float
    activations_checkpointed: float
    chunk_peak: float
    host: float

    @property
    def static(self) -> float:
        return self.weights + self.gradients + self.optimizer

    def total(self, checkpointed: bool) -> float:
        return self.static + self.chunk_peak + (self.activations_checkpointed if checkpointed else self.activations)


def parse_bytes(text: str) -> int:
    """`80GB` (10^9 each), `80GiB` (2^30 each) or a plain number, in bytes.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?i?B?)\s*", text, re.IGNORECASE)
    unit = match[2].upper() if match else None
    if unit not in _UNITS or match[1].count(".") > 1 or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is no amount of memory; write it like 80GB or 79.2GiB")
    return int(float(match[1]) * _UNITS[unit])


def released_config(size: str) -> Ovis2_5_Config:
    """The released shapes, "2B" or "9B", without any download."""
    shapes = {
        "2B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
        "9B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    }
    llm = Qwen3Config(
        vocab_size=151936, num_key_value_heads=8, head_dim=128, tie_word_embeddings=size == "2B", **shapes[size]
    )
    return Ovis2_5_Config(llm_config=llm)


@dataclass
class Choice:
    """What is trained, with full fine-tuning and with LoRA; the names are the config's keys."""

    train_modules: str = "all"
    freeze_vision_tower: bool = False
    freeze_llm: bool = False
    lora_r: int = 16
    lora_target_modules: tuple[str, ...] = ("llm",)
    apply_lora_to_vision: bool = False

    def adapted(self, model: Ovis2_5) -> list[str]:
        return target_layers(model, self.lora_target_modules, self.apply_lora_to_vision)

    def apply(self, model: Ovis2_5, lora: bool) -> None:
        """Set `requires_grad`; an adapted layer stands for its adapter, which keeps the same input."""
        choose_trained(model, parse_train_modules(self.train_modules), self.freeze_vision_tower, self.freeze_llm)
        if lora:
            layers = dict(model.named_modules())
            model.requires_grad_(False)
            for name in self.adapted(model):
                layers[name].weight.requires_grad_()


def count(config: Ovis2_5_Config, choice: Choice) -> Counts:
    """Parameters of a model that is never built."""
    with torch.device("meta"):
        model = Ovis2_5(config)
    choice.apply(model, lora=False)
    layers = dict(model.named_modules())
    adapted = [layers[name] for name in choice.adapted(model)]
    return Counts(
        total=sum(value.numel() for value in model.parameters()),
        trained=sum(value.numel() for value in model.parameters() if value.requires_grad),
        adapter=sum(choice.lora_r * (layer.in_features + layer.out_features) for layer in adapted),
        quantised=sum(layers[name].weight.numel() for name in target_layers(model, ("llm",))),
    )


def static_bytes(
    counts: Counts, strategy: Strategy, num_devices: int, numbers: NumberFormat
) -> tuple[float, float, float, float]:
    """(weights, gradients, optimizer) bytes on each device, and host bytes for each."""
    if strategy.lora:
        frozen = (counts.total - counts.quantised * strategy.four_bit) * numbers.weights
        weights = frozen + counts.quantised * strategy.four_bit * _FOUR_BITS + counts.adapter * _ADAPTER_BYTES
        return weights, counts.adapter * _ADAPTER_BYTES, counts.adapter * numbers.moments, 0
    shares = [num_devices if strategy.stage >= stage else 1 for stage in (1, 2, 3)]
    has_master = numbers.master_always or strategy.stage > 0
    optimizer = counts.trained * (numbers.master * has_master + numbers.moments) / shares[0]
    gradients = counts.trained * numbers.gradients / shares[1]
    weights = counts.total * numbers.weights / shares[2]
    if not strategy.offload:
        return weights, gradients, optimizer, 0
    moved = optimizer + gradients
    return (0, 0, 0, moved + weights) if strategy.stage == 3 else (weights, 0, 0, moved)


def kept_bytes(parameters: list[torch.Tensor], forward) -> int:
    """Bytes that autograd keeps of a forward pass, each storage once; parameters do not count."""
    own = {value.untyped_storage()._cdata for value in parameters}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del output
    return total


def activation_bytes(
    config: Ovis2_5_Config, choice: Choice, workload: Workload, numbers: NumberFormat, lora: bool = False
) -> tuple[float, float]:
    """What a forward pass keeps for backward: (all of it, with gradient checkpointing)."""
    one, two = (_tower_bytes(config, choice, workload, numbers, lora, num_layers) for num_layers in (1, 2))
    layers = (config.vit_config.num_hidden_layers, config.llm_config.num_hidden_layers)
    rows = (workload.num_samples * workload.num_patches, workload.num_samples * workload.num_tokens)
    widths = (config.vit_config.hidden_size, config.hidden_size)
    per_layer = [more - less for less, more in zip(one, two, strict=True)]
    full = sum(first + (number - 1) * each for first, number, each in zip(one, layers, per_layer, strict=True))
    inputs = [
        number * row * width * numbers.weights * (each > 0)
        for number, row, width, each in zip(layers, rows, widths, per_layer, strict=True)
    ]
    outside = sum(first - each for first, each in zip(one, per_layer, strict=True))
    return full, outside + sum(inputs) + max(per_layer)


def _tower_bytes(config, choice, workload, numbers, lora, num_layers) -> tuple[int, int]:
    """Bytes kept by (the visual path, the LLM) with so many layers each; nothing is computed or stored."""
    config = copy.deepcopy(config)
    config.vit_config.num_hidden_layers = config.llm_config.num_hidden_layers = num_layers
    config.llm_config.layer_types = config.llm_config.layer_types[:1] * num_layers
    height = HIDDEN_STRIDE * max(round(workload.num_patches**0.5 / HIDDEN_STRIDE), 1)
    width = HIDDEN_STRIDE * max(workload.num_patches // (height * HIDDEN_STRIDE), 1)
    grids = [(1, height, width)] * workload.num_samples
    before = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(numbers.dtype)
        try:
            model = Ovis2_5(config).train()
        finally:
            torch.set_default_dtype(before)
        choice.apply(model, lora)
        pixels = torch.zeros(len(grids) * height * width, 3 * PATCH_SIZE**2, dtype=numbers.dtype)
        embeds = torch.zeros(workload.num_samples, workload.num_tokens, config.hidden_size, dtype=numbers.dtype)
        embeds.requires_grad_()
        own = list(model.parameters())
        # a dict is taken as it is: without data, transformers cannot see that a batch needs no mask
        no_mask = {"full_attention": None}
        return (
            kept_bytes(own, lambda: model.visual_tokenizer(pixels, grids, model.vte(None))),
            kept_bytes(own, lambda: model.llm.model(None, no_mask, inputs_embeds=embeds, use_cache=False)[0]),
        )


def estimate_all(
    config: Ovis2_5_Config, choice: Choice, workload: Workload, num_devices: int, numbers: NumberFormat = MIXED
) -> list[Estimate]:
    """Every strategy, in the order of STRATEGIES."""
    counts = count(config, choice)
    activations = {lora: activation_bytes(config, choice, workload, numbers, lora) for lora in (False, True)}
    chunk_peak = max(
        min(workload.num_learned, CHUNK_ROWS) * config.llm_config.vocab_size * (numbers.weights + 3 * 4),
        min(workload.num_samples * workload.num_patches // HIDDEN_STRIDE**2, CHUNK_TOKENS)
        * config.visual_vocab_size
        * (4 * numbers.weights + 2 * 4),
    )
    estimates = []
    for strategy in STRATEGIES:
        weights, gradients, optimizer, host = static_bytes(counts, strategy, num_devices, numbers)
        full, checkpointed = activations[strategy.lora]
        estimates.append(Estimate(strategy, weights, gradients, optimizer, full, checkpointed, chunk_peak, host))
    return estimates


def recommend(estimates: list[Estimate], device_memory: float, only_lora: bool = False) -> tuple[Estimate, bool] | None:
    """The first that fits, and whether it needs gradient checkpointing: full fine-tuning before LoRA, and
    recomputation before transfers to the host.
    """
    staged = [e for e in estimates if not e.strategy.lora and not e.strategy.offload]
    offloaded = [e for e in estimates if e.strategy.offload]
    adapters = [e for e in estimates if e.strategy.lora]
    full = () if only_lora else (staged, offloaded)
    order = [(e, ck) for group in full for ck in (False, True) for e in group]
    order += [(e, ck) for e in adapters for ck in (False, True)]
    return next(((e, ck) for e, ck in order if e.total(ck) <= _USABLE * device_memory), None)


def format_bytes(number: float) -> str:
    """`80.0 GB`, or `12.3 MB` below one GB (powers of ten)."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def render(estimates: list[Estimate], device_memory: float, only_lora: bool = False) -> str:
    """A table of GB (MB for small models) per device, and the settings to write."""
    unit = 1e9 if max(e.total(False) for e in estimates) >= 1e9 else 1e6
    heads = ("GB per device" if unit == 1e9 else "MB per device", "weights", "gradients", "optimizer", "activations",
             "checkpointed", "chunk", "total", "checkpointed", "host", "fits")  # fmt: skip
    rows = [heads]
    for e in estimates:
        usable = _USABLE * device_memory
        fits = "yes" if e.total(False) <= usable else "checkpointed" if e.total(True) <= usable else "no"
        parts = (e.weights, e.gradients, e.optimizer, e.activations, e.activations_checkpointed, e.chunk_peak,
                 e.total(False), e.total(True), e.host)  # fmt: skip
        rows.append((e.strategy.name, *(f"{part / unit:.1f}" for part in parts), fits))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        row[0].ljust(widths[0])
        + "".join(cell.rjust(width + 2) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join([*lines, "", _advice(estimates, device_memory, only_lora)])


def _advice(estimates: list[Estimate], device_memory: float, only_lora: bool) -> str:
    found = recommend(estimates, device_memory, only_lora)
    if found is None:
        least = min(estimates, key=lambda e: e.total(True))
        return (
            f"nothing fits into {format_bytes(device_memory)}; the least is {least.strategy.name} with checkpointing, "
            f"{format_bytes(least.total(True))}.\n"
            "Use more devices, or lower multimodal_max_length or single_image_max_pixels"
        )
    estimate, is_checkpointed = found
    host = f"\n(and {format_bytes(estimate.host)} of host memory for each device)" if estimate.host else ""
    return f'recommended: {estimate.strategy.settings}, "gradient_checkpointing": {str(is_checkpointed).lower()}{host}'
