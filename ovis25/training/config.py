"""The training config: one flat JSON file, overridden on the command line.

Own keys are the fields of `TrainConfig`; every other key is a name of transformers' TrainingArguments.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from ovis25.constants import MAX_IMAGE_MEGAPIXELS, MULTIPLE_IMAGE_PIXELS, SINGLE_IMAGE_PIXELS, VIDEO_PIXELS
from ovis25.data import datainfo
from ovis25.files import REPOSITORY_ROOT, read_json_object, resolve_input
from ovis25.processing.limits import following_minima
from ovis25.tiny.strips import SOURCE_PREFIXES
from ovis25.training import trl_keys
from ovis25.training.legacy import RENAMED, WITHOUT_EFFECT, translate


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key, the value and the cure."""


def _setting(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    """Every own key of a training config, `trainer`: the TrainingArguments that the file sets, `trl`: SFTConfig's."""

    model_path: str = _setting("", "checkpoint folder, hub name, or tiny (needs no download)")
    data_path: str = _setting("", "training samples: .json, .jsonl, datainfo:FILE:a|b, or tiny:train:NUMBER")
    eval_data_path: str | None = _setting(None, "evaluation samples, in the same forms; turns early stopping on")
    image_folder: str | None = _setting(None, "where relative image and video paths start (default: the data's folder)")
    output_dir: str = _setting("output", "the final model, checkpoints, plan and report")
    overwrite_output_dir: bool = _setting(False, "start over: delete the checkpoints of an earlier run in output_dir")

    train_modules: str = _setting("all", "what is trained, with own learning rates: visual_tokenizer:1e-5|llm|vte:5e-6")
    freeze_vision_tower: bool = _setting(False, "never train visual_tokenizer.vit")
    freeze_llm: bool = _setting(False, "never train llm")
    recipe: str = _setting("standard", "standard: transformers' Trainer, or trl: TRL's SFTTrainer")
    dtype: str | None = _setting(None, "weights in memory: float32 or bfloat16 (default: chosen for the device)")
    attn_implementation: str | None = _setting(None, "the LLM's attention: sdpa, eager, flash_attention_2, ...")

    gradient_checkpointing_towers: str = _setting("both", "with gradient_checkpointing: both, llm, or vision alone")
    compile_layers: bool = _setting(False, "torch.compile for the layers of both towers (GPU; slow first steps)")
    z_loss: float = _setting(0.0, "weight of the squared log-sum-exp of the logits in the loss")

    multimodal_max_length: int = _setting(8192, "tokens of a sample with visuals, at most")
    text_max_length: int = _setting(4096, "tokens of a text sample, at most")
    single_image_min_pixels: int = _setting(SINGLE_IMAGE_PIXELS[0], "pixel budget of one image")
    single_image_max_pixels: int = _setting(SINGLE_IMAGE_PIXELS[1], "pixel budget of one image")
    multiple_image_min_pixels: int = _setting(MULTIPLE_IMAGE_PIXELS[0], "pixel budget of each of several images")
    multiple_image_max_pixels: int = _setting(MULTIPLE_IMAGE_PIXELS[1], "pixel budget of each of several images")
    video_min_pixels: int = _setting(VIDEO_PIXELS[0], "pixel budget of each video frame")
    video_max_pixels: int = _setting(VIDEO_PIXELS[1], "pixel budget of each video frame")
    max_image_megapixels: float = _setting(MAX_IMAGE_MEGAPIXELS, "largest picture file; a larger JPEG is read reduced")
    min_frames: int = _setting(8, "frames taken of a video, at least")
    max_frames: int = _setting(8, "frames taken of a video, at most")
    on_bad_sample: str = _setting("error", "error, or skip: leave defective samples out and list them")
    on_long_sample: str = _setting("shrink", "shrink (lower its pixel budget), skip, or error")
    packing: bool = _setting(False, "rows of whole samples, up to multimodal_max_length tokens; a batch counts rows")

    cache_visual_embeddings: bool = _setting(False, "frozen vision: compute every picture's embeddings once, then read")
    visual_cache_dir: str | None = _setting(None, "where they lie (default: visual_cache in output_dir); may be shared")

    use_lora: bool = _setting(False, "train a LoRA adapter on the frozen model; output_dir is then an adapter folder")
    lora_r: int = _setting(16, "rank of the adapter")
    lora_alpha: float = _setting(32, "its scale: lora_alpha / lora_r (rsLoRA: / sqrt(lora_r))")
    lora_dropout: float = _setting(0.0, "dropout before the adapter")
    lora_target_modules: str | list = _setting("llm", "llm, vision, all-linear, or layer names such as q_proj,v_proj")
    lora_modules_to_save: str | list | None = _setting(None, "modules trained whole beside the adapter: vte, ...")
    apply_lora_to_vision: bool = _setting(False, "adapters in the vision encoder too")
    use_rslora: bool = _setting(False, "rank-stabilised LoRA")
    use_dora: bool = _setting(False, "weight-decomposed LoRA")
    qlora: bool = _setting(False, "the frozen LLM in 4 bits (needs a CUDA GPU and bitsandbytes)")

    early_stopping_patience: int | None = _setting(
        None, "evaluations without improvement before stopping; 0: never (default: 3 with an evaluation set)"
    )
    early_stopping_threshold: float = _setting(0.0, "the least decrease of the evaluation loss that counts")
    exam: bool = _setting(False, "tiny only: answer held-out questions at the end")

    trainer: dict = field(default_factory=dict)
    trl: dict = field(default_factory=dict)
    config_dir: str = ""
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        """The flat dict that is saved with the model and can be read as a config again."""
        own = {name: getattr(self, name) for name in OWN_KEYS}
        return {**own, **self.trainer, **self.trl}


OWN_KEYS = {f.name: f for f in dataclasses.fields(TrainConfig) if "help" in f.metadata}
TRAINER_KEYS = {f.name: f for f in dataclasses.fields(TrainingArguments) if f.name != "output_dir"}
_CHOICES = {
    "on_bad_sample": ("error", "skip"),
    "on_long_sample": ("shrink", "skip", "error"),
    "recipe": ("standard", "trl"),
    "gradient_checkpointing_towers": ("both", "llm", "vision"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
}
# values of train_sampling_strategy for which every length must be known
LENGTH_STRATEGIES = ("group_by_length", "batch_rebalance")
# the value of optim that transformers does not know
MUON = "muon"
_LORA_KEYS = [name for name in OWN_KEYS if name != "use_lora" and ("lora" in name or name == "use_dora")]


def load_config(path: str | Path, overrides: list[str] = ()) -> TrainConfig:
    """Read a config file and apply `--key value` overrides; the file may also lie in `src_theo/`.

    Raises:
        ConfigError: unreadable JSON, an unknown key (the nearest name is suggested), a value of the wrong type.
        FileNotFoundError: the config, or a file that it names, is nowhere; lists where it looked.
    """
    config_path = resolve_input(path, REPOSITORY_ROOT / "src_theo", REPOSITORY_ROOT / "src_theo" / "lora")
    try:
        in_file, notes = translate(_read(config_path))
        given, more_notes = translate(parse_overrides(overrides))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{config_path.name}: {error}") from error
    values, notes = {**in_file, **given}, [*notes, *more_notes]
    own, trainer, trl = {}, {}, {}
    for name, value in values.items():
        if name in OWN_KEYS:
            own[name] = _coerce(name, value, OWN_KEYS[name].type)
        elif name in TRAINER_KEYS:
            trainer[name] = _coerce(name, value, TRAINER_KEYS[name].type)
        elif name in trl_keys.PASSED_ON:
            trl[name] = _coerce(name, value, trl_keys.PASSED_ON[name])
        elif name in trl_keys.WITHOUT_EFFECT:
            notes.append(f"{name} has no effect here: {trl_keys.WITHOUT_EFFECT[name]}")
        else:
            raise ConfigError(f"{config_path.name}: {_unknown_key(name)}")
    own |= following_minima({name: value for name, value in own.items() if value is not None})
    config = TrainConfig(**own, trainer=trainer, trl=trl, config_dir=str(config_path.parent), notes=notes)
    if config.packing:
        # a row is many samples already
        config.trainer.setdefault("per_device_train_batch_size", 1)
    _check(config, config_path)
    _note_idle(config, own)
    _resolve_paths(config)
    return config


def parse_overrides(arguments: list[str]) -> dict:
    """`["--max_steps", "4", "--bf16", "--lr_scheduler_type=cosine"]` as a dict; a lone flag is true."""
    values: dict = {}
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--"):
            raise ConfigError(f"unexpected argument {argument!r}: overrides are written --key value")
        name, has_value, text = argument[2:].partition("=")
        if not has_value:
            is_flag = not remaining or remaining[0].startswith("--")
            text = "true" if is_flag else remaining.pop(0)
        values[name.replace("-", "_")] = _parse_value(text)
    return values


def _parse_value(text: str):
    if text.lower() in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(text.lower())
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _read(path: Path) -> dict:
    try:
        values = read_json_object(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    # keys that begin with an underscore are the user's comments
    return {name: value for name, value in values.items() if not name.startswith("_")}


def _unknown_key(name: str) -> str:
    known = [*OWN_KEYS, *TRAINER_KEYS, *trl_keys.PASSED_ON, *trl_keys.WITHOUT_EFFECT, *RENAMED, *WITHOUT_EFFECT]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {nearest[0]}?" if nearest else "see ovis25 train --help for the keys"
    return f"unknown key {name!r}; {hint}"


def _coerce(name: str, value, annotation):
    """The value as the type that the setting has; numbers written as text become numbers."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    accepted = typing.get_args(annotation) if is_union else (annotation,)
    if value is None:
        # what null means for a setting that has no null: its default
        return None
    if isinstance(value, bool):
        if bool in accepted or not set(accepted) <= {int, float, type(None)}:
            return value
    elif bool in accepted and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    elif int in accepted and float not in accepted and _is_number(value):
        if float(value) == int(float(value)):
            return int(float(value))
    elif float in accepted and _is_number(value):
        return float(value)
    elif not set(accepted) <= {int, float, bool, type(None)}:
        return value
    expected = " or ".join(t.__name__ for t in accepted if t is not type(None))
    raise ConfigError(f"{name} is {value!r}, but it must be {expected}")


def _is_number(value) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _check(config: TrainConfig, path: Path) -> None:
    for name in ("model_path", "data_path"):
        if not getattr(config, name):
            raise ConfigError(f"{path.name}: {name} is missing")
    for name, choices in _CHOICES.items():
        value = getattr(config, name)
        if value is not None and value not in choices:
            raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
    for name in ("multimodal_max_length", "text_max_length"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be at least 1")
    if config.packing and config.attn_implementation not in (None, "sdpa"):
        raise ConfigError(
            f"packing and attn_implementation {config.attn_implementation} exclude each other: packed rows need sdpa "
            "(torch's own FlashAttention runs behind it on CUDA); remove attn_implementation"
        )
    if config.lora_r < 1 or not 0 <= config.lora_dropout < 1:
        raise ConfigError(
            f"lora_r is {config.lora_r} and lora_dropout {config.lora_dropout}; at least 1, and in [0, 1)"
        )
    if not 0 <= config.z_loss < math.inf:
        raise ConfigError(f"z_loss is {config.z_loss}; it must be at least 0, and is about 1e-4 where it is used")
    if config.trl.get("loss_type", "nll") not in ("nll", "dft"):
        raise ConfigError(f"loss_type is {config.trl['loss_type']!r}; choose one of nll, dft")
    if config.trl.get("loss_type") == "dft" and config.trainer.get("label_smoothing_factor"):
        raise ConfigError("loss_type dft and label_smoothing_factor exclude each other; keep one")
    if config.trainer.get("optim") == MUON:
        _check_muon(config)


def _check_muon(config: TrainConfig) -> None:
    """Muon needs every trained matrix whole, in full fine-tuning."""
    if config.use_lora:
        raise ConfigError(
            f"optim {MUON} is for whole weight matrices, not for the factors of an adapter (use_lora); "
            "use adamw_torch_fused or adafactor"
        )
    sharding = {
        "deepspeed": config.trainer.get("deepspeed") or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"),
        "fsdp": config.trainer.get("fsdp") or parse_flag_from_env("ACCELERATE_USE_FSDP"),
    }
    for name, is_on in sharding.items():
        if is_on:
            raise ConfigError(
                f"optim {MUON} and {name} exclude each other: Muon needs whole matrices, and {name} flattens or "
                f"shards them; use adamw_torch_fused, whose states are sharded with them, or do without {name}"
            )
    idle = [name for name in ("optim_args", "optim_target_modules") if config.trainer.get(name)]
    if idle:
        raise ConfigError(f"{idle[0]} has no effect with optim {MUON}; remove it")


def _note_idle(config: TrainConfig, given: dict) -> None:
    """Report what was given but only another recipe understands."""
    if config.recipe != "trl":
        config.notes += [f"{name} has no effect here: only the trl recipe knows it" for name in config.trl]
    strategy = config.trainer.get("train_sampling_strategy")
    if config.packing and strategy in LENGTH_STRATEGIES:
        config.notes.append(f"train_sampling_strategy {strategy} has no effect with packing: rows are alike in cost")
    if not config.use_lora:
        idle = [name for name in given if name in _LORA_KEYS]
        config.notes += [f"{name} has no effect without use_lora" for name in idle]
    else:
        idle = [name for name in ("train_modules", "freeze_vision_tower", "freeze_llm") if name in given]
        config.notes += [f"{name} has no effect with LoRA: see lora_target_modules" for name in idle]
    if config.visual_cache_dir and not config.cache_visual_embeddings:
        config.notes.append("visual_cache_dir has no effect without cache_visual_embeddings")


def _resolve_paths(config: TrainConfig) -> None:
    """Make every input path absolute; names that are no paths (tiny, hub names) stay."""
    for name in ("data_path", "eval_data_path", "image_folder"):
        value = getattr(config, name)
        if value and value.startswith(datainfo.PREFIX):
            setattr(config, name, datainfo.resolve_source(value, config.config_dir))
        elif value and not value.startswith(SOURCE_PREFIXES):
            setattr(config, name, str(_resolve(name, value, config.config_dir)))
    for name in ("deepspeed", "fsdp_config", "accelerator_config"):
        value = config.trainer.get(name)
        if isinstance(value, str) and value.endswith((".json", ".yaml")):
            config.trainer[name] = str(_resolve(name, value, config.config_dir))
    try:
        config.model_path = str(resolve_input(config.model_path, config.config_dir))
    except FileNotFoundError:
        if config.model_path.startswith((".", "/", "~")):
            raise
    config.output_dir = str(Path(config.output_dir).expanduser().absolute())
    if config.visual_cache_dir:
        config.visual_cache_dir = str(Path(config.visual_cache_dir).expanduser().absolute())


def _resolve(name: str, value: str, config_dir: str) -> Path:
    try:
        return resolve_input(value, config_dir)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: {error}") from error
