"""LoRA adapters: which layers get one, and how they are saved, loaded and merged. The one file that knows PEFT."""

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ovis25.model.ovis import Ovis2_5

ADAPTER_CONFIG_NAME = "adapter_config.json"

_LLM, _VISION = "llm.model.layers.", "visual_tokenizer.vit."
# a group's name -> the prefixes of its linear layers
GROUPS = {"llm": (_LLM,), "vision": (_VISION,), "all-linear": (_LLM, "visual_tokenizer.")}


@dataclass
class AdapterSettings:
    """What an adapter is made of; the names are LoraConfig's where it has one.

    `target_modules` holds groups (llm, vision, all-linear), layer names (q_proj: in the LLM, and in the ViT where
    `apply_to_vision`), or longer ends of names. `modules_to_save` are trained and saved whole. `base` is the name that
    the adapter's folder gives for its base.
    """

    base: str
    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("llm",)
    modules_to_save: tuple[str, ...] = ()
    apply_to_vision: bool = False
    use_rslora: bool = False
    use_dora: bool = False


def target_layers(model: nn.Module, targets: tuple[str, ...], apply_to_vision: bool = False) -> list[str]:
    """Full names of the linear layers that `targets` choose, in the model's order.

    Raises:
        ValueError: a target that chooses nothing; suggests the nearest name.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "llm.lm_head"]
    if apply_to_vision:
        targets = (*targets, "vision") if set(targets) <= GROUPS.keys() else targets
    chosen: set[str] = set()
    for target in targets:
        if target in GROUPS:
            found = {name for name in linear if name.startswith(GROUPS[target])}
        else:
            reachable = [name for name in linear if "." in target or apply_to_vision or name.startswith(_LLM)]
            found = {name for name in reachable if name == target or name.endswith(f".{target}")}
        if not found:
            known = [*GROUPS, *sorted({name.rsplit(".", 1)[-1] for name in linear})]
            nearest = difflib.get_close_matches(target, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"choose from {', '.join(known)}"
            raise ValueError(f"lora_target_modules: no linear layer is called {target!r}; {hint}")
        chosen |= found
    return [name for name in linear if name in chosen]


def add_adapter(model: Ovis2_5, settings: AdapterSettings, keep_dtype: bool = False) -> PeftModel:
    """Freeze the model and put a fresh adapter on it; its output is unchanged at first.

    `keep_dtype` leaves the adapter in the weights' dtype; otherwise a half-precision model gets a float32 one.

    Raises:
        ValueError: a target or a module to save that the model does not have.
    """
    modules = dict(model.named_modules())
    for name in settings.modules_to_save:
        if not any(full == name or full.endswith(f".{name}") for full in modules):
            nearest = difflib.get_close_matches(name, [full for full in modules if full.count(".") < 3], n=1)
            raise ValueError(
                f"lora_modules_to_save: the model has no module {name!r}" + (f"; near: {nearest[0]}" if nearest else "")
            )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=_pattern(target_layers(model, settings.target_modules, settings.apply_to_vision), modules),
        modules_to_save=list(settings.modules_to_save) or None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=not keep_dtype)
    # PEFT has written the folder that the weights were loaded from
    config.base_model_name_or_path = settings.base
    return adapted


def _pattern(layers: list[str], modules: dict[str, nn.Module]) -> str | list[str]:
    """The layers as a regular expression over their numbers, where it means the same: short, and always the same."""
    pattern = "|".join(dict.fromkeys(re.sub(r"\d+", r"\\d+", re.escape(name)) for name in layers))
    matched = [name for name in modules if re.fullmatch(pattern, name)]
    return pattern if set(matched) == set(layers) else layers


def adapter_base(folder: str | Path) -> str | None:
    """The base that an adapter's folder names; None for a folder that holds no adapter.

    Raises:
        ValueError: an adapter that names no base.
    """
    path = Path(folder) / ADAPTER_CONFIG_NAME
    if not path.is_file():
        return None
    base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{path} names no base_model_name_or_path; give the base model")
    return base


def load_adapter(model: Ovis2_5, folder: str | Path) -> PeftModel:
    """Put a saved adapter on its base, in place: `model` itself answers with the adapter from then on."""
    return PeftModel.from_pretrained(model, folder)
