"""Settings that exclude each other or have no effect together; what each may be alone stands with its key."""

import inspect
import re

from accelerate.utils import parse_flag_from_env
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.checkpoint import checkpoint
from transformers import optimization
from transformers.trainer_utils import FSDPOption, SchedulerType

from ovis25.text import nearest, shorten
from ovis25.tiny.strips import SOURCE_PREFIXES
from ovis25.training.config.fields import KINDS, LENGTH_STRATEGIES, LORA_KEYS, TrainConfig
from ovis25.training.config.kinds import ConfigError
from ovis25.training.config.trainer_keys import MUON

_CHECKPOINTING = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
WORKER_KEYS = ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context")
# what get_scheduler fills in
_OF_EVERY_SCHEDULE = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs")
# made by functions that pass every name on; older transformers have no GreedyLR
_SCHEDULE_CLASSES = {
    "reduce_lr_on_plateau": ReduceLROnPlateau,
    "greedy": getattr(optimization, "GreedyLR", None),
}
_WITHOUT_ARGUMENTS = ("constant", "constant_with_warmup")
_WITH_TARGETS = ("galore", "apollo")
_WITHOUT_OPTIM_ARGS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor",
                       "lomo", "adalomo")  # fmt: skip
# a DeepSpeed config's names for settings of ours
_SAME_IN_DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
_KNOWN_OPTIM_ARGS = {
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
}
_OPTIM_ARGS = re.compile(r"\w+=[^=,]+(,\w+=[^=,]+)*")


def check_values(config: TrainConfig) -> None:
    """Each value by itself, for a config that was made or changed in Python.

    Raises:
        ConfigError: it is of another type or out of range.
    """
    for name, value in config.to_dict().items():
        KINDS[name].read(name, value)


def check(config: TrainConfig) -> None:
    """Settings against each other, without a look at the machine.

    Raises:
        ConfigError: names the settings that exclude each other, and the cure.
    """
    if config.packing and config.attn_implementation not in (None, "sdpa"):
        raise ConfigError(
            f"packing and attn_implementation {config.attn_implementation} exclude each other: packed rows need sdpa "
            "(torch's own FlashAttention runs behind it on CUDA); remove attn_implementation"
        )
    if config.trl.get("loss_type") == "dft" and config.value("label_smoothing_factor"):
        raise ConfigError("loss_type dft and label_smoothing_factor exclude each other; keep one")
    if config.exam and not config.data_path.startswith(SOURCE_PREFIXES):
        raise ConfigError(
            f"exam is true, but data_path {shorten(config.data_path)} is not the tiny model's, so there is no exam; "
            "set exam to false"
        )
    _check_precision(config)
    _check_workers(config)
    _check_checkpointing(config)
    _check_sharding(config)
    _check_schedule(config)
    _check_optimizer(config)


def _check_precision(config: TrainConfig) -> None:
    for one, other in (("fp16", "bf16"), ("fp16_full_eval", "bf16_full_eval")):
        if config.value(one) and config.value(other):
            raise ConfigError(f"{one} and {other} are both true; keep one, {other} where the GPU has bfloat16")
    if config.value("fp16") and config.dtype == "bfloat16":
        raise ConfigError("fp16 needs float32 weights, but dtype is bfloat16; remove dtype, or take bf16 for fp16")


def _check_workers(config: TrainConfig) -> None:
    if config.trainer.get("dataloader_num_workers") == 0:
        for name in WORKER_KEYS:
            if config.trainer.get(name):
                raise ConfigError(
                    f"{name} is {config.trainer[name]}, but dataloader_num_workers is 0; give it workers, or remove it"
                )


def _check_checkpointing(config: TrainConfig) -> None:
    known = inspect.signature(checkpoint).parameters
    known = [*(name for name in known if name not in ("function", "args", "kwargs", "context_fn")),
             "preserve_rng_state"]  # fmt: skip
    for key in _CHECKPOINTING:
        chosen, key = config.trainer.get(key) or {}, config.spelled.get(key, key)
        for name, value in chosen.items():
            if name not in known:
                raise ConfigError(f"{key} has {_not_among(name, known)}")
            if name == "determinism_check":
                if value not in ("default", "none"):
                    raise ConfigError(f"{key}: determinism_check is {shorten(value)}; choose one of default, none")
            elif not isinstance(value, bool):
                raise ConfigError(f"{key}: {name} is {shorten(value)}, but it must be bool")
        if chosen.get("use_reentrant"):
            raise ConfigError(
                f"{key}: use_reentrant would drop the gradients of layers whose input "
                "needs none, such as adapters in a frozen vision encoder; remove it"
            )


def _check_sharding(config: TrainConfig) -> None:
    fsdp, deepspeed = config.trainer.get("fsdp"), config.trainer.get("deepspeed")
    if fsdp and deepspeed:
        raise ConfigError("deepspeed and fsdp exclude each other; keep one")
    if isinstance(fsdp, str):
        known = [option.value for option in FSDPOption]
        for word in fsdp.replace(",", " ").split():
            if word not in known:
                raise ConfigError(f"fsdp has {_not_among(word, known)}")
    if isinstance(config.trainer.get("accelerator_config"), dict):
        _check_accelerator(config.trainer["accelerator_config"])


def _check_accelerator(values: dict) -> None:
    known = ("even_batches", "use_seedable_sampler", "non_blocking", "gradient_accumulation_kwargs")
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"accelerator_config has {_not_among(name, known)}")
        if not isinstance(value, dict if name == "gradient_accumulation_kwargs" else bool):
            raise ConfigError(f"accelerator_config: {name} is {shorten(value)}, but it must be bool")


def check_deepspeed(config: TrainConfig, values: dict, where: str) -> None:
    """A DeepSpeed config must say which stage it is, and agree with the settings; `where` begins the message.

    Raises:
        ConfigError: it does not.
    """
    zero = values.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ConfigError(
            f"{where} has zero_optimization {shorten(zero)}; it must be an object with a stage of 0, 1, 2 or 3, as in "
            "scripts/zero_configs/zero2_cp.json"
        )
    for there, here in _SAME_IN_DEEPSPEED.items():
        value = values.get(there, "auto")
        if value not in ("auto", config.value(here)):
            raise ConfigError(
                f'{where} has {there} {shorten(value)}, but {here} is {config.value(here)}; write "auto" there'
            )


def _check_schedule(config: TrainConfig) -> None:
    """The names in lr_scheduler_kwargs; whether the values work is tried later (`schedule.try_schedule`)."""
    kind, given = config.value("lr_scheduler_type"), config.trainer.get("lr_scheduler_kwargs") or {}
    kind = getattr(kind, "value", kind)
    parameters = schedule_arguments(kind)
    for name in given:
        if name not in parameters:
            takes = f"{kind} takes {', '.join(parameters)}" if parameters else f"{kind} takes none; remove it"
            guess = nearest(name, parameters)
            raise ConfigError(
                f"lr_scheduler_kwargs has {shorten(name)}; {takes}{f'; did you mean {guess}?' if guess else ''}"
            )
    missing = [name for name, is_required in parameters.items() if is_required and name not in given]
    if kind.endswith("with_min_lr") and not {"min_lr", "min_lr_rate"} & given.keys():
        missing = ["min_lr_rate"]
    if missing:
        raise ConfigError(
            f'lr_scheduler_type {kind} needs lr_scheduler_kwargs, {{"{missing[0]}": ...}}; it takes '
            f"{', '.join(parameters)}"
        )


def schedule_arguments(kind: str) -> dict[str, bool]:
    """Names that a schedule takes in lr_scheduler_kwargs -> whether it needs them."""
    if kind in _WITHOUT_ARGUMENTS:
        return {}
    made_by = _SCHEDULE_CLASSES.get(kind) or optimization.TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(kind)]
    return {
        name: parameter.default is parameter.empty
        for name, parameter in inspect.signature(made_by).parameters.items()
        if name not in _OF_EVERY_SCHEDULE
    }


def _check_optimizer(config: TrainConfig) -> None:
    optim, arguments = config.value("optim"), config.trainer.get("optim_args")
    optim = getattr(optim, "value", optim)
    if optim == MUON:
        _check_muon(config)
    if arguments and not _OPTIM_ARGS.fullmatch(arguments.replace(" ", "")):
        raise ConfigError(f"optim_args is {shorten(arguments)}; it must be of the form name=value,name=value")
    if arguments and optim in _WITHOUT_OPTIM_ARGS:
        raise ConfigError(f"optim_args has no effect with optim {optim}; remove it")
    for name in (part.split("=")[0].strip() for part in (arguments or "").split(",") if arguments):
        if name not in _KNOWN_OPTIM_ARGS.get(optim, (name,)):
            raise ConfigError(f"optim_args has {_not_among(name, _KNOWN_OPTIM_ARGS[optim])} with optim {optim}")
    takes_targets = optim.startswith(_WITH_TARGETS)
    if takes_targets and not config.trainer.get("optim_target_modules"):
        raise ConfigError(f'optim {optim} needs optim_target_modules, such as ["attn", "mlp"]')
    if config.trainer.get("optim_target_modules") and not takes_targets:
        raise ConfigError(f"optim_target_modules has no effect with optim {optim}; remove it")
    if "layerwise" in optim and config.value("gradient_accumulation_steps") > 1:
        raise ConfigError(
            f"optim {optim} cannot accumulate, but gradient_accumulation_steps is "
            f"{config.value('gradient_accumulation_steps')}; set it to 1"
        )


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


def note_idle(config: TrainConfig, given: dict) -> None:
    """Report what was given but only another recipe understands."""
    if config.recipe != "trl":
        config.notes += [f"{name} has no effect here: only the trl recipe knows it" for name in config.trl]
    strategy = config.value("train_sampling_strategy")
    if config.packing and strategy in LENGTH_STRATEGIES:
        config.notes.append(f"train_sampling_strategy {strategy} has no effect with packing: rows are alike in cost")
    if not config.use_lora:
        idle = [name for name in given if name in LORA_KEYS]
        config.notes += [f"{name} has no effect without use_lora" for name in idle]
    else:
        idle = [name for name in ("train_modules", "freeze_vision_tower", "freeze_llm") if name in given]
        config.notes += [f"{name} has no effect with LoRA: see lora_target_modules" for name in idle]
    if config.visual_cache_dir and not config.cache_visual_embeddings:
        config.notes.append("visual_cache_dir has no effect without cache_visual_embeddings")


def _not_among(name, known) -> str:
    guess = nearest(name, known)
    return f"{shorten(name)}; it may hold {', '.join(known)}{f'; did you mean {guess}?' if guess else ''}"
