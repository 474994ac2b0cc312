"""LoRA adapters: which layers get one, and how they are saved, loaded and merged. The one file that knows PEFT."""

import difflib
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ovis25.checkpoint import CheckpointError, cure_for, read_json, unfinished_downloads
from ovis25.model.config import Ovis2_5_Config
from ovis25.model.ovis import Ovis2_5
from ovis25.weights import read_header, weights_digest

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
# which base the adapter was trained on: its name, its folder at that time, and the digest of its weights
BASE_NOTE_NAME = "ovis25_base.json"

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
    _remember_base(model)
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
        CheckpointError: an adapter that names no base, or whose config is damaged.
    """
    path = Path(folder) / ADAPTER_CONFIG_NAME
    if not path.is_file():
        return None
    base = read_json(folder, ADAPTER_CONFIG_NAME).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{path} names no base_model_name_or_path; give the base model (--base, base= in Python)")
    return base


def check_adapter(folder: str | Path) -> None:
    """Look through an adapter's folder by its headers.

    Raises:
        CheckpointError: config or weights are missing, cut or damaged, or of a kind that is not read.
    """
    folder = Path(folder)
    kind = read_json(folder, ADAPTER_CONFIG_NAME).get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG_NAME}: peft_type is {kind!r}; adapters of kind 'LORA' are read"
        )
    path = folder / ADAPTER_WEIGHTS_NAME
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{folder} holds its weights as a pickled file alone (adapter_model.bin), which can run any program when "
            f"it is opened, so it is not read; save the adapter again as {ADAPTER_WEIGHTS_NAME}"
        )
    if not read_header(path):
        raise CheckpointError(f"{path} holds no weights{unfinished_downloads(folder)}; {cure_for(folder, path.name)}")


def write_base_note(model: nn.Module, folder: str | Path) -> None:
    """Write into an adapter's folder which base it belongs to; nothing for a model that is none, or made in memory."""
    base = model.get_base_model() if isinstance(model, PeftModel) else None
    if getattr(base, "base_digest", None) is None:
        return
    note = {
        "base": model.peft_config[model.active_adapter].base_model_name_or_path,
        "folder": str(Path(base.base_folder).absolute()),
        "weights_sha256": base.base_digest,
    }
    (Path(folder) / BASE_NOTE_NAME).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def _remember_base(model: Ovis2_5) -> None:
    """Take the base's digest at the start: a save must not depend on files that may be gone by then."""
    folder = getattr(model, "base_folder", None)
    model.base_digest = weights_digest(folder) if folder else None


def check_base(adapter: str | Path, base_folder: str | Path) -> None:
    """Compare a base's weights with those that the adapter was trained on; an adapter without a note is only told of.

    Raises:
        CheckpointError: they are another model's; names both folders and the ways out.
    """
    adapter = Path(adapter)
    if not (adapter / BASE_NOTE_NAME).is_file():
        warnings.warn(
            f"{adapter} holds no {BASE_NOTE_NAME} (it was saved by PEFT itself or by an older release), so it cannot "
            f"be checked that {base_folder} is its base",
            stacklevel=2,
        )
        return
    note, digest = read_json(adapter, BASE_NOTE_NAME), weights_digest(base_folder)
    expected = str(note.get("weights_sha256"))
    if digest != expected:
        raise CheckpointError(
            f"{base_folder} is not the base of the adapter {adapter}, trained on {note.get('folder')} with "
            f"the weights {expected[:12]}, this folder holds the weights {digest[:12]}; on another base an adapter "
            "answers wrongly. Give its own base with --base PATH (base= in Python), or use this one all the same with "
            "--anyway (check_base=False)"
        )


def load_adapter(model: Ovis2_5, folder: str | Path) -> PeftModel:
    """Put a saved adapter on its base, in place: `model` itself answers with the adapter from then on.

    Raises:
        CheckpointError: the adapter's weights are not those that its config and the base make; nothing is half loaded.
    """
    check_adapter(folder)
    _remember_base(model)
    try:
        with warnings.catch_warnings():
            # PEFT warns of missing weights and goes on; the comparison below ends it instead
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, folder)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the adapter {folder} does not fit its base {_origin(model)}: {reason[:300]}") from error
    stored = read_header(Path(folder) / ADAPTER_WEIGHTS_NAME).keys()
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    missing, unexpected = (
        sorted(wanted - stored),
        sorted(name for name in stored - wanted if "embed_tokens" not in name),
    )
    if missing or unexpected:
        raise CheckpointError(
            f"the adapter {folder} does not fit {ADAPTER_CONFIG_NAME} and its base {_origin(model)}: "
            f"{len(missing)} weights are missing ({', '.join(missing[:2]) or 'none'}), {len(unexpected)} belong to "
            f"no layer ({', '.join(unexpected[:2]) or 'none'})"
        )
    return adapted


def _origin(model: nn.Module) -> str:
    return str(getattr(model, "base_folder", None) or "")


def _stand_in(model: nn.Module) -> None:
    """Give every weight of a model on the meta device a stand-in on the CPU that takes no memory: one zero, repeated.

    PEFT moves an adapter to where its base is, so the base has to be somewhere.
    """
    stand_ins: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight not in stand_ins:
                stand_ins[weight] = nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False)
            setattr(module, name, stand_ins[weight])


class AdapterOnShapes:
    """An adapter over a base that is not in memory: gives the merged weights one by one.

    What PEFT computes for each layer (plain, rank-stabilised and weight-decomposed LoRA, adapted embeddings) is
    computed by PEFT, in float32.

    Args:
        config: the base's.
        folder: the adapter's.
    """

    def __init__(self, config: Ovis2_5_Config, folder: str | Path):
        with torch.device("meta"):
            model = Ovis2_5(config)
        _stand_in(model)
        load_adapter(model, folder)
        self._layers: dict[str, BaseTunerLayer] = {}
        self._whole: dict[str, torch.Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer) and isinstance(module, nn.Module):
                self._layers |= {f"{name}.{part}": module for part in self._changed_parts(module)}
            elif isinstance(module, ModulesToSaveWrapper):
                trained = module.modules_to_save[module.active_adapters[0]]
                self._whole |= {f"{name}.{part}": value for part, value in trained.state_dict().items()}

    @property
    def names(self) -> set[str]:
        """The base's weights that the adapter changes."""
        return self._layers.keys() | self._whole.keys()

    def merged(self, name: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The weight with the adapter in it, float32; `read` gives a weight of the base by its name."""
        if name in self._whole:
            return self._whole[name].float()
        layer = self._layers[name]
        stem, part = name.rsplit(".", 1)
        base = layer.get_base_layer()
        shapes = dict(base.named_parameters())
        try:
            for key in shapes:
                setattr(base, key, nn.Parameter(read(f"{stem}.{key}").float(), requires_grad=False))
            layer.merge()
            return getattr(base, part).data
        finally:
            layer.merged_adapters.clear()
            for key, shape in shapes.items():
                setattr(base, key, shape)

    @staticmethod
    def _changed_parts(layer: BaseTunerLayer) -> list[str]:
        return ["weight", *(["bias"] if any(getattr(layer, "lora_bias", {}).values()) else [])]
