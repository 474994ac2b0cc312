"""Parameters, and the bytes that weights, gradients and optimizer states take: what does not depend on the data."""

from dataclasses import dataclass

import torch
from transformers import Qwen3Config

from ovis25.model import Ovis2_5, Ovis2_5_Config
from ovis25.model.adapter import AdapterSettings, target_layers
from ovis25.training.memory.formats import NumberFormat, Strategy
from ovis25.training.modules import choose_trained, parse_train_modules

_FOUR_BITS = 4.127 / 8
_ADAPTER_BYTES = 4
# parameters that DeepSpeed updates at once under ZeRO-3 (its default)
_SUB_GROUP = 10**9


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


@dataclass(frozen=True)
class Choice:
    """What is trained, with full fine-tuning and with LoRA; the names are the config's keys."""

    train_modules: str = "all"
    freeze_vision_tower: bool = False
    freeze_llm: bool = False
    lora_r: int = 16
    lora_target_modules: tuple[str, ...] = ("llm",)
    apply_lora_to_vision: bool = False
    lora_modules_to_save: tuple[str, ...] = ()
    lora_dropout: float = 0.0
    use_dora: bool = False

    def adapted(self, model: Ovis2_5) -> list[str]:
        return target_layers(model, self.lora_target_modules, self.apply_lora_to_vision)

    def apply(self, model: Ovis2_5) -> None:
        """Set `requires_grad` for full fine-tuning."""
        choose_trained(model, parse_train_modules(self.train_modules), self.freeze_vision_tower, self.freeze_llm)

    @property
    def adapter(self) -> AdapterSettings:
        return AdapterSettings(
            base="",
            r=self.lora_r,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules,
            modules_to_save=self.lora_modules_to_save,
            apply_to_vision=self.apply_lora_to_vision,
            use_dora=self.use_dora,
        )


@dataclass
class Counts:
    """Parameters: all, the trained ones in full fine-tuning, those that LoRA adds, and those that QLoRA quantises.

    `quantised_largest` is one of its layers' weight, `gathered_largest` the largest that ZeRO-3 gathers at once.
    """

    total: int
    trained: int
    adapter: int
    quantised: int
    quantised_largest: int = 0
    gathered_largest: int = 0


def count(config: Ovis2_5_Config, choice: Choice) -> Counts:
    """Parameters of a model that is never built."""
    with torch.device("meta"):
        model = Ovis2_5(config)
    choice.apply(model)
    layers = dict(model.named_modules())
    quantised = [layers[name].weight.numel() for name in target_layers(model, ("llm",))]
    return Counts(
        total=sum(value.numel() for value in model.parameters()),
        trained=sum(value.numel() for value in model.parameters() if value.requires_grad),
        adapter=_added(layers, choice, choice.adapted(model)),
        quantised=sum(quantised),
        quantised_largest=max(quantised),
        gathered_largest=max(value.numel() for value in model.parameters()),
    )


def _added(layers: dict, choice: Choice, adapted: list[str]) -> int:
    """Two factors for each adapted layer, DoRA's magnitudes, and copies of the modules to save."""
    parts = [layers[name] for name in adapted]
    factors = sum(choice.lora_r * (layer.in_features + layer.out_features) for layer in parts)
    magnitudes = choice.use_dora * sum(layer.out_features for layer in parts)
    saved = [
        layer
        for full, layer in layers.items()
        if any(full == name or full.endswith(f".{name}") for name in choice.lora_modules_to_save)
    ]
    return factors + magnitudes + sum(value.numel() for layer in saved for value in layer.parameters())


def static_bytes(
    counts: Counts, strategy: Strategy, num_devices: int, numbers: NumberFormat
) -> tuple[float, float, float, float]:
    """(weights, gradients, optimizer) bytes on each device, and host bytes for each."""
    if strategy.lora:
        frozen = (counts.total - counts.quantised * strategy.four_bit) * numbers.weights
        weights = frozen + counts.quantised * strategy.four_bit * _FOUR_BITS + counts.adapter * _ADAPTER_BYTES
        return weights, counts.adapter * _ADAPTER_BYTES, counts.adapter * 2 * _ADAPTER_BYTES, 0
    shares = [num_devices if strategy.stage >= stage else 1 for stage in (1, 2, 3)]
    has_master = numbers.master_always or strategy.stage > 0
    optimizer = counts.trained * (numbers.master * has_master + numbers.moments) / shares[0]
    gradients = counts.trained * numbers.gradients / shares[1]
    weights = counts.total * numbers.weights / shares[2]
    if not strategy.offload:
        return weights, gradients, optimizer, 0
    moved = optimizer + gradients
    return (0, 0, 0, moved + weights) if strategy.stage == 3 else (weights, 0, 0, moved)


def gathered_bytes(counts: Counts, strategy: Strategy, numbers: NumberFormat) -> float:
    """What exists beside its resting form while a pass runs: ZeRO-3's largest weight, QLoRA's unpacked layer."""
    if strategy.four_bit:
        return counts.quantised_largest * 2
    return counts.gathered_largest * numbers.weights * (strategy.stage == 3)


def step_bytes(counts: Counts, strategy: Strategy, num_devices: int, numbers: NumberFormat) -> float:
    """What the optimizer's step needs for a moment, when no activation lives: DeepSpeed's float32 copy of the
    half-precision gradients that a device updates with (as its code reads; at most).
    """
    if not strategy.settings.get("deepspeed") or strategy.offload or numbers.gradients == 4:
        return 0
    updated = counts.trained / (num_devices if strategy.stage else 1)
    return 4 * (min(updated, _SUB_GROUP) if strategy.stage == 3 else updated)
