"""Config names of older releases and of the upstream scripts: translated, or reported as without effect."""

import dataclasses

from transformers import TrainingArguments

from ovis25.text import shorten
from ovis25.training.config.kinds import Kind

_SWITCH = Kind((bool,))
_TRANSFORMERS_NAMES = {field.name for field in dataclasses.fields(TrainingArguments)}

RENAMED = {
    "ovis_pretrained_path": "model_path",
    "model_name_or_path": "model_path",
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # a value below 1 is a ratio there
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "train_attn_implementation": "attn_implementation",
    "llm_attn_implementation": "attn_implementation",
}
# newer transformers renamed these; both directions, so that one config serves every supported version
for _old, _new in (
    ("gradient_checkpointing", "activation_checkpointing"),
    ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
):
    if _new in _TRANSFORMERS_NAMES:
        RENAMED[_old] = _new
    else:
        RENAMED[_new] = _old

WITHOUT_EFFECT = {
    "stage": "the stage is what train_modules selects",
    "data_type": "samples tell their own kind",
    "visual_vocab_size": "the checkpoint fixes it",
    "conversation_formatter_class": "the checkpoint fixes it",
    "visual_tokenizer_class": "the checkpoint fixes it",
    "accepts_loss_kwargs": "the loss is always the mean over the learned tokens of the step",
    "vit_attn_implementation": "the vision encoder chooses its kernel itself",
    "visual_max_tokens": "use single_image_max_pixels and its relatives",
    "logging_dir": "set the TENSORBOARD_LOGGING_DIR variable instead",
    "save_safetensors": "weights are always saved as safetensors",
    "include_tokens_per_second": "the progress line always shows tokens/s",
    "monitor_step": "use logging_steps",
    "model_init_seed": "use seed",
    "cache_dir": "set the HF_HOME variable instead",
    "trust_remote_code": "the model's code is this package",
    "fp16_backend": "mixed precision is torch's own",
    "half_precision_backend": "mixed precision is torch's own",
    "use_ipex": "removed from transformers",
    "use_mps_device": "the device is found",
    "past_index": "removed from transformers",
    "ray_scope": "removed from transformers",
    "torchdynamo": "use torch_compile",
    "dispatch_batches": "removed from transformers",
    "split_batches": "removed from transformers",
    "do_train": "train_theo.py always trains",
    "do_predict": "train_theo.py only trains and evaluates",
    "remove_unused_columns": "samples have no columns to remove",
    "length_column_name": "samples have no columns; their lengths are known",
    "include_for_metrics": "the loss is what evaluations give",
    "batch_eval_metrics": "the loss is what evaluations give",
    "eval_do_concat_batches": "the loss is what evaluations give",
    "eval_use_gather_object": "the loss is what evaluations give",
    "prediction_loss_only": "the loss is what evaluations give",
    "use_liger_kernel": "Liger has no kernels for Ovis2.5; its loss and element-wise parts are fused already",
    "liger_kernel_config": "Liger has no kernels for Ovis2.5; its loss and element-wise parts are fused already",
    "local_rank": "torchrun tells each process its rank",
}


def translate(values: dict) -> tuple[dict, list[str], dict[str, str]]:
    """Rename old keys; returns the new dict, one note per key that was renamed or has no effect, and new -> old name.

    Raises:
        ValueError: an old and a new name of the same setting disagree.
    """
    translated, notes = {}, []
    values = _name_data_sets(values, notes)
    written_as: dict[str, str] = {}
    for name, value in values.items():
        if name == "group_by_length":
            if value is None:
                continue
            notes.append("group_by_length is train_sampling_strategy now: translated")
            is_on = _SWITCH.read(name, value)
            name, value = "train_sampling_strategy", "group_by_length" if is_on else "random"
        if name in WITHOUT_EFFECT:
            notes.append(f"{name} has no effect here: {WITHOUT_EFFECT[name]}")
            continue
        if name == "warmup_ratio":
            _check_ratio(value)
        new_name = RENAMED.get(name, name)
        if new_name != name and name not in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            notes.append(f"{name} is {new_name} now: translated")
        if new_name in translated and translated[new_name] != value:
            raise ValueError(
                f"{written_as[new_name]}={translated[new_name]!r} and {name}={value!r} are the same setting "
                "with two values; keep one"
            )
        written_as[new_name] = name
        translated[new_name] = value
    return translated, notes, written_as


def _check_ratio(value) -> None:
    """warmup_steps, its new name, takes 1 and more for steps."""
    try:
        is_ratio = value is None or (not isinstance(value, bool) and 0 <= float(value) < 1)
    except (TypeError, ValueError, OverflowError):
        is_ratio = False
    if not is_ratio:
        raise ValueError(f"warmup_ratio is {shorten(value)}; it must be at least 0 and below 1 (steps: warmup_steps)")


def _name_data_sets(values: dict, notes: list[str]) -> dict:
    """The upstream pair `data_info_version` and `data_name` as one `data_path`; alone, neither says anything."""
    values = dict(values)
    named = {key: values.pop(key) for key in ("data_info_version", "data_name") if key in values}
    if len(named) == 2:
        source = f"datainfo:{named['data_info_version']}:{named['data_name']}"
        if values.setdefault("data_path", source) != source:
            raise ValueError(f"data_path={values['data_path']!r} and data_name={named['data_name']!r}; keep one")
    else:
        notes += [f"{key} has no effect here: the data is what data_path names" for key in named]
    return values
