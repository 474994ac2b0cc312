"""What is trained, and how fast: `train_modules`, freezing, and the optimizer's parameter groups."""

import math
from dataclasses import dataclass

from torch import nn

from ovis25.training.config import ConfigError

_VIT = "visual_tokenizer.vit"
# the name in the config -> the prefixes of its parameters
_LAST_BLOCK = f"{_VIT}.last_block"
# what PEFT puts before the names of the model it wraps
_ADAPTED = "base_model.model."
_PARTS = (_VIT, "visual_tokenizer.head", "vte", "llm")
MODULE_NAMES = ("all", "llm", "visual_tokenizer", _VIT, "visual_tokenizer.head", _LAST_BLOCK, "vte")


@dataclass(frozen=True)
class TrainedModule:
    """One entry of `train_modules`; `learning_rate` None means the config's."""

    name: str
    learning_rate: float | None


def parse_train_modules(text: str) -> list[TrainedModule]:
    """`"visual_tokenizer:1e-5|llm|vte:5e-6"` as a list.

    Raises:
        ConfigError: an unknown or doubled name, or a learning rate that is no positive number.
    """
    modules: list[TrainedModule] = []
    for entry in text.split("|"):
        name, _, rate = (part.strip() for part in entry.partition(":"))
        if name not in MODULE_NAMES:
            raise ConfigError(f"train_modules: unknown module {name!r}; choose from {', '.join(MODULE_NAMES)}")
        if name in (module.name for module in modules):
            raise ConfigError(f"train_modules names {name} twice")
        try:
            learning_rate = float(rate) if rate else None
        except ValueError:
            learning_rate = -1.0
        if learning_rate is not None and not 0 < learning_rate < math.inf:
            raise ConfigError(f"train_modules: the learning rate of {name} is {rate!r}; it must be a positive number")
        modules.append(TrainedModule(name, learning_rate))
    return modules


def choose_trained(
    model: nn.Module, modules: list[TrainedModule], freeze_vision_tower: bool = False, freeze_llm: bool = False
) -> dict[str, TrainedModule]:
    """Set `requires_grad` and return parameter name -> the entry that trains it; the most specific entry wins.

    `post_layernorm` is in the checkpoints but in no computation, so it is never trained.

    Raises:
        ConfigError: nothing is left to train.
    """
    last_block = f"{_VIT}.vision_model.encoder.layers.{model.config.vit_config.num_hidden_layers - 1}."
    chosen: dict[str, TrainedModule] = {}
    for name, parameter in model.named_parameters():
        matching = [module for module in modules if _belongs(name, module.name, last_block)]
        is_frozen = (
            ".post_layernorm." in name
            or (freeze_vision_tower and name.startswith(f"{_VIT}."))
            or (freeze_llm and name.startswith("llm."))
        )
        parameter.requires_grad_(bool(matching) and not is_frozen)
        if parameter.requires_grad:
            chosen[name] = max(matching, key=lambda module: len(module.name) if module.name != "all" else 0)
    if not chosen:
        names = "|".join(module.name for module in modules)
        raise ConfigError(
            f"nothing is left to train: train_modules {names}, freeze_vision_tower {freeze_vision_tower}, "
            f"freeze_llm {freeze_llm}"
        )
    return chosen


def choose_adapter(model: nn.Module) -> dict[str, TrainedModule]:
    """The same for a model with an adapter, whose parameters are the trained ones."""
    return {name: TrainedModule("lora", None) for name, value in model.named_parameters() if value.requires_grad}


def _belongs(parameter_name: str, module_name: str, last_block: str) -> bool:
    if module_name == "all":
        return True
    return parameter_name.startswith(last_block if module_name == _LAST_BLOCK else f"{module_name}.")


def parameter_groups(
    model: nn.Module,
    chosen: dict[str, TrainedModule],
    decayed_names: set[str],
    learning_rate: float,
    weight_decay: float,
) -> list[dict]:
    """Optimizer groups, one per module and kind of weight decay, each with its `module` name and `lr`."""
    groups: dict[tuple[str, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if name not in chosen:
            continue
        module, is_decayed = chosen[name], name in decayed_names
        group = groups.setdefault(
            (module.name, is_decayed),
            {
                "params": [],
                "module": module.name,
                "lr": module.learning_rate if module.learning_rate is not None else learning_rate,
                "weight_decay": weight_decay if is_decayed else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def part_of(parameter_name: str) -> str:
    """The part of the model that a parameter belongs to: visual_tokenizer.vit, visual_tokenizer.head, vte or llm."""
    return next(part for part in _PARTS if parameter_name.removeprefix(_ADAPTED).startswith(f"{part}."))


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Part of the model -> (trained, all) parameters; a tied embedding counts once."""
    counts = {part: [0, 0] for part in _PARTS}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        # a parameter that ZeRO-3 has partitioned tells its whole size here
        size = getattr(parameter, "ds_numel", parameter.numel())
        counts[part][0] += size * parameter.requires_grad
        counts[part][1] += size
    return {part: (trained, total) for part, (trained, total) in counts.items()}
