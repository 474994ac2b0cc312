"""The settings that transformers' TrainingArguments has: their ranges, and where this framework's defaults differ."""

import dataclasses

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ovis25.training.config.kinds import Kind, kind_of

TRAINER_KEYS = {f.name: f for f in dataclasses.fields(TrainingArguments) if f.name != "output_dir"}
# the value of optim that transformers does not know
MUON = "muon"
DEFAULTS = {
    "logging_steps": 10,
    "save_total_limit": 2,
    "report_to": "none",
    "remove_unused_columns": False,
    "restore_callback_states_from_checkpoint": True,
    # a broken loss must be seen, not averaged away
    "logging_nan_inf_filter": False,
    # every rank touches every parameter (see Ovis2_5.get_inputs_embeds)
    "ddp_find_unused_parameters": False,
    # our own progress line instead
    "disable_tqdm": True,
    # transformers would let every process but the first warn of what is as it should be
    "log_level_replica": "error",
}

# counts beyond these are typing errors, and some would not fit where they go
_MANY, _BATCH, _WORKERS, _SEED = 10**9, 10**6, 4096, 2**32 - 1
_STEPS = {"above": 0, "most": _MANY, "is_share": True}
_COUNT = {"least": 1, "most": _BATCH}
_RATE = {"least": 0}
_BETA = {"least": 0, "below": 1}
_ON_OFF = {"types": (bool,)}
_FOLDER_OR_YES = {"types": (bool, str)}

_LIMITS: dict[str, dict] = {
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "eval_accumulation_steps": _COUNT,
    "num_train_epochs": {"above": 0, "most": _BATCH},
    "max_steps": {"least": 1, "most": _MANY, "also": (-1,)},
    "learning_rate": _RATE,
    "weight_decay": _RATE,
    "max_grad_norm": _RATE,
    "neftune_noise_alpha": _RATE,
    "adam_beta1": _BETA,
    "adam_beta2": _BETA,
    "adam_epsilon": {"above": 0},
    "label_smoothing_factor": _BETA,
    "warmup_steps": {"least": 0, "most": _MANY, "is_share": True},
    "logging_steps": _STEPS,
    "eval_steps": _STEPS,
    "save_steps": _STEPS,
    "eval_delay": {"least": 0, "most": _MANY},
    "save_total_limit": {"least": 1, "most": _MANY, "cure": "; null keeps every checkpoint"},
    "torch_empty_cache_steps": {"least": 1, "most": _MANY},
    "seed": {"least": 0, "most": _SEED},
    "data_seed": {"least": 0, "most": _SEED},
    "dataloader_num_workers": {"least": 0, "most": _WORKERS},
    "dataloader_prefetch_factor": {"least": 1, "most": _WORKERS},
    "ddp_bucket_cap_mb": {"least": 1, "most": _BATCH},
    "ddp_timeout": {"least": 1, "most": 10**7},
    "optim": {"choices": (*(name.value for name in OptimizerNames), MUON)},
    "metric_for_best_model": {
        "choices": ("eval_loss", "loss"),
        "cure": "; the loss is what evaluations give",
    },
    "label_names": {"choices": ("labels",)},
    "include_num_input_tokens_seen": {"choices": ("all", "non_padding", "no")},
    "torch_compile_mode": {"choices": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")},
    "debug": {"choices": ("underflow_overflow", "tpu_metrics_debug"), "types": (str,)},
    "resume_from_checkpoint": _FOLDER_OR_YES,
    "fsdp": _FOLDER_OR_YES,
    "parallelism_config": {"types": ()},
    "lr_scheduler_kwargs": {"types": (dict,)},
    "activation_checkpointing_kwargs": {"types": (dict,)},
    "gradient_checkpointing_kwargs": {"types": (dict,)},
    "liger_kernel_config": {"types": (dict,)},
}


def default_of(name: str):
    """What a run takes for a key that the config does not set."""
    if name in DEFAULTS:
        return DEFAULTS[name]
    field = TRAINER_KEYS[name]
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def _kind(name: str) -> Kind:
    field = TRAINER_KEYS[name]
    limits = dict(_LIMITS.get(name, {}))
    if field.metadata.get("choices"):
        limits.setdefault("choices", tuple(field.metadata["choices"]))
    return kind_of(field.type, default_of(name), **limits)


TRAINER_KINDS = {name: _kind(name) for name in TRAINER_KEYS}
