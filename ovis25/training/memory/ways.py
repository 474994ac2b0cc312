"""One way to train as numbers: what it takes, what it costs, and every setting that makes a config be it."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from ovis25.training.config import MUON, OWN_KEYS, TrainConfig
from ovis25.training.memory.estimate import USABLE, Estimate
from ovis25.training.memory.formats import (
    FLOAT32,
    FLOAT32_AUTOCAST,
    MIXED,
    PURE_BFLOAT16,
    STRATEGIES,
    NumberFormat,
    Strategy,
)

# a pass forward costs one, a whole pass backward two; a frozen weight needs half of its backward pass
_FULL_COST, _ADAPTER_COST = 3, 2
_LEAST_LENGTH = 512
_BLOCK = 32 * 32


@dataclass(frozen=True)
class Way:
    """Bytes of each device and, of all devices together, of the host; `settings` for the config.

    `compute` is the step's work as a multiple of the same without gradient checkpointing. `transferred` bytes cross
    between each device and the host in an optimizer step, `each_pass` in a micro-batch. `changes` are those settings
    that make other samples, or other micro-batches, of the same data.
    """

    strategy: str
    is_checkpointed: bool
    device_bytes: float
    host_bytes: float
    compute: float
    transferred: float
    each_pass: float
    settings: dict
    changes: dict
    stage: int = 0
    is_four_bit: bool = False

    def fits(self, device_memory: float) -> bool:
        return self.device_bytes <= USABLE * device_memory


def make_way(
    estimate: Estimate, is_checkpointed: bool, num_devices: int, settings: dict, changes: dict | None = None
) -> Way:
    strategy = estimate.strategy
    cost = _ADAPTER_COST if strategy.lora else _FULL_COST
    return Way(
        strategy=strategy.name,
        is_checkpointed=is_checkpointed,
        device_bytes=estimate.total(is_checkpointed),
        host_bytes=estimate.host * num_devices,
        compute=round(1 + is_checkpointed / cost, 2),
        transferred=estimate.transferred,
        each_pass=estimate.each_pass,
        settings={**settings, **(changes or {})},
        changes=changes or {},
        stage=strategy.stage,
        is_four_bit=strategy.four_bit,
    )


def complete_settings(config: TrainConfig, strategy: Strategy, is_checkpointed: bool, in_float32: bool) -> dict:
    """The settings that turn `config` into a run of this strategy, whatever it was before."""
    settings = {**strategy.settings}
    if not strategy.lora and config.use_lora:
        settings["use_lora"] = False
    settings["gradient_checkpointing"] = is_checkpointed
    trainer = config.trainer
    if is_checkpointed and config.gradient_checkpointing_towers != "both":
        settings["gradient_checkpointing_towers"] = "both"
    if trainer.get("fsdp"):
        settings["fsdp"] = None
    if trainer.get("optim") == MUON:
        settings["optim"] = "adamw_torch_fused"
    if in_float32:
        settings |= {"bf16": False, "dtype": "float32"}
    elif config.dtype not in (None, "auto"):
        settings["dtype"] = None
    return settings


def with_settings(config: TrainConfig, settings: dict) -> TrainConfig:
    """A copy of the config with the settings in their places."""
    own = {name: value for name, value in settings.items() if name in OWN_KEYS}
    rest = {name: value for name, value in settings.items() if name not in OWN_KEYS}
    return dataclasses.replace(config, **own, trainer={**config.trainer, **rest})


def smaller_data(config: TrainConfig, batch_size: int, accumulation: int) -> list[dict]:
    """Settings that make micro-batches smaller, the least loss first: one sample at a time, then shorter samples with
    smaller single images.
    """
    one = {}
    if batch_size > 1:
        one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": batch_size * accumulation}
    steps = [one] if one else []
    for eighths in (6, 4, 3, 2, 1):
        length = config.multimodal_max_length * eighths // 8
        if length < _LEAST_LENGTH:
            break
        pixels = config.single_image_max_pixels * eighths // 8 // _BLOCK * _BLOCK
        limits = {
            "multimodal_max_length": length,
            "text_max_length": min(config.text_max_length, length),
            "single_image_max_pixels": max(pixels, config.single_image_min_pixels),
        }
        steps.append({**one, **limits})
    return steps


def configured_strategy(config: TrainConfig, in_float32: bool) -> tuple[Strategy, NumberFormat, bool]:
    """(strategy, number format, checkpointing) of the config as it stands, on a GPU."""
    trainer = config.trainer
    checkpointed = bool(trainer.get("gradient_checkpointing") or trainer.get("activation_checkpointing"))
    if config.use_lora:
        name = "QLoRA" if config.qlora else "LoRA"
        found = next(strategy for strategy in STRATEGIES if strategy.name == name)
        return found, FLOAT32 if in_float32 else MIXED, checkpointed
    if trainer.get("deepspeed"):
        return _of_deepspeed(trainer["deepspeed"]), FLOAT32 if in_float32 else MIXED, checkpointed
    numbers = PURE_BFLOAT16 if config.dtype in ("bfloat16", "float16") else FLOAT32_AUTOCAST
    numbers = FLOAT32 if in_float32 else numbers
    sharded = Strategy("FSDP", stage=3) if trainer.get("fsdp") else Strategy("without DeepSpeed")
    return sharded, numbers, checkpointed


def _of_deepspeed(settings: str | dict) -> Strategy:
    if isinstance(settings, str):
        settings = json.loads(Path(settings).read_text(encoding="utf-8"))
    zero = settings.get("zero_optimization", {})
    stage, offload = zero.get("stage", 0), "offload_optimizer" in zero
    return Strategy(f"ZeRO-{stage}{' offload' if offload else ''}", {"deepspeed": settings}, stage, offload)
