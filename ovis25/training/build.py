"""The parts of a run, each built from the config by one function."""

import importlib
import importlib.util
import os
import socket
import sys
from dataclasses import dataclass

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from ovis25.checkpoint import resolve_checkpoint
from ovis25.data import ConversationDataset, datainfo
from ovis25.data.packed import PackedDataset
from ovis25.model import Ovis2_5, Ovis2_5_Config
from ovis25.model.adapter import AdapterSettings, add_adapter
from ovis25.processing import Ovis2_5Processor, VisualLimits
from ovis25.processing.limits import LIMIT_NAMES
from ovis25.tiny.build import TINY_NAME, resolve_model_path
from ovis25.tiny.strips import SOURCE_PREFIXES, parse_source
from ovis25.training import memory
from ovis25.training.config import LENGTH_STRATEGIES, MUON, TRAINER_KEYS, ConfigError, TrainConfig
from ovis25.training.cost import cost_weights
from ovis25.training.extensions import remove_stale_locks
from ovis25.training.modules import parse_train_modules
from ovis25.training.plan import Steps, count_steps

_NUM_EVALUATIONS = 10
_DEFAULTS = {
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
}
_TRL_DEFAULTS_DIFFER = [
    name for name in ("learning_rate", "gradient_checkpointing", "activation_checkpointing") if name in TRAINER_KEYS
]


def is_main_process() -> bool:
    """Whether this process speaks to the user and writes files (rank 0 under torchrun)."""
    return int(os.environ.get("RANK", "0")) == 0


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass
class Precision:
    """Device and number format of a run."""

    device: str
    weights: torch.dtype
    bf16: bool
    fp16: bool
    note: str | None

    @property
    def description(self) -> str:
        mixed = "bfloat16" if self.bf16 else "float16" if self.fp16 else None
        weights = str(self.weights).removeprefix("torch.")
        return f"{mixed} with {weights} weights" if mixed else weights


def choose_precision(config: TrainConfig) -> Precision:
    """bf16 where the device has it, float32 on a CPU; weights stay float32 unless DeepSpeed keeps a master copy,
    or LoRA freezes them.
    """
    bf16, fp16 = config.trainer.get("bf16"), config.trainer.get("fp16")
    requested = getattr(torch, config.dtype) if config.dtype not in (None, "auto") else None
    if not torch.cuda.is_available() or config.trainer.get("use_cpu"):
        off = [name for name in ("bf16", "fp16", "tf32") if config.trainer.get(name)]
        note = f"without effect: {', '.join(off)}; this machine trains on its CPU, in float32" if off else None
        return Precision("CPU", requested or torch.float32, False, False, note)
    if bf16 is None and not fp16:
        bf16 = torch.cuda.is_bf16_supported()
    may_be_half = (bf16 or fp16) and (config.trainer.get("deepspeed") or config.use_lora)
    half = torch.bfloat16 if bf16 else torch.float16
    weights = requested or (half if may_be_half else torch.float32)
    return Precision(torch.cuda.get_device_name(), weights, bool(bf16), bool(fp16), None)


def visual_limits(config: TrainConfig) -> VisualLimits:
    try:
        return VisualLimits(**{name: getattr(config, name) for name in LIMIT_NAMES})
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_dataset(config: TrainConfig, key: str, processor: Ovis2_5Processor) -> ConversationDataset:
    """The samples of `data_path` or `eval_data_path`, checked; the progress bar is rank 0's."""
    source = getattr(config, key)
    if source.startswith(SOURCE_PREFIXES):
        source = parse_source(source)
    elif source.startswith(datainfo.PREFIX):
        source = datainfo.read_datainfo(*datainfo.split_source(source))
    return ConversationDataset(
        source,
        processor,
        config.image_folder,
        **{name: getattr(config, name) for name in LIMIT_NAMES},
        multimodal_max_length=config.multimodal_max_length,
        text_max_length=config.text_max_length,
        on_bad_sample=config.on_bad_sample,
        on_long_sample=config.on_long_sample,
        show_progress=is_main_process(),
        raw_pixels=True,
        measure_all=config.packing or config.trainer.get("train_sampling_strategy") in LENGTH_STRATEGIES,
    )


def pack_dataset(config: TrainConfig, dataset: ConversationDataset, folder: str, is_training: bool) -> PackedDataset:
    """The samples in rows of about equal cost; each device gets as many rows as the others."""
    trainer = config.trainer
    rows_per_device = _value(trainer, "per_device_train_batch_size")
    if not is_training:
        rows_per_device = trainer.get("per_device_eval_batch_size") or rows_per_device
    seed = trainer.get("data_seed")
    return PackedDataset.of(
        dataset,
        cost_weights(Ovis2_5_Config.from_pretrained(folder), _vision_share(config)),
        config.multimodal_max_length,
        seed=_value(trainer, "seed") if seed is None else seed,
        multiple=num_processes() * rows_per_device,
        in_order=is_training and trainer.get("train_sampling_strategy") == "sequential",
    )


def _vision_share(config: TrainConfig) -> float:
    """How many passes the vision side takes for one of the LLM: forward and two backward where it is trained whole,
    one backward, for the inputs, where only adapters are. A cache changes nothing, so that it may come and go in a run;
    without vision, full rows cost alike anyway.
    """
    if config.use_lora:
        is_adapted = config.apply_lora_to_vision or {"vision", "all-linear"} & {*_names(config.lora_target_modules)}
        return 1.0 if is_adapted else 1 / 2
    modules = parse_train_modules(config.train_modules)
    is_trained = any(name == "all" or name.startswith("visual_tokenizer") for name in (m.name for m in modules))
    return 1.0 if is_trained and not config.freeze_vision_tower else 1 / 3


def build_model(config: TrainConfig, folder: str, dtype: torch.dtype, without_weights: bool = False) -> Ovis2_5:
    """The checkpoint's model; `without_weights` makes its shapes alone, for the plan of a dry run."""
    if without_weights:
        with torch.device("meta"):
            return Ovis2_5(Ovis2_5_Config.from_pretrained(folder))
    arguments = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    if is_deepspeed_zero3_enabled():
        # the model is made in shards, which asks DeepSpeed how many ranks there are
        importlib.import_module("deepspeed").init_distributed(auto_mpi_discovery=False)
    if config.qlora and config.use_lora:
        arguments["quantization_config"] = _four_bits(dtype)
    try:
        return Ovis2_5.from_pretrained(folder, dtype=dtype, **arguments)
    except ImportError as error:
        raise ConfigError(
            f"attn_implementation {config.attn_implementation} cannot be used: {error}; use sdpa"
        ) from error


def _four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """The LLM's linear layers as 4-bit NormalFloat (QLoRA, arXiv 2305.14314); the vision side stays as it is."""
    if not torch.cuda.is_available():
        raise ConfigError("qlora needs a CUDA GPU, and this machine has none; train LoRA without it (qlora: false)")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("qlora needs bitsandbytes: pip install 'ovis25[qlora]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["visual_tokenizer", "vte", "lm_head"],
    )


def build_adapter(config: TrainConfig, model: Ovis2_5, folder: str) -> PreTrainedModel:
    """The model frozen, with a fresh adapter on it. Raises ConfigError for layers that it does not have."""
    # an adapter must be able to find its base again from anywhere
    base = str(folder) if config.model_path == TINY_NAME else config.model_path
    try:
        settings = AdapterSettings(
            base=base,
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=_names(config.lora_target_modules),
            modules_to_save=_names(config.lora_modules_to_save),
            apply_to_vision=config.apply_lora_to_vision,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
        )
        # ZeRO-3 gathers parameters into buffers of one dtype
        return add_adapter(model, settings, keep_dtype=is_deepspeed_zero3_enabled())
    except ValueError as error:
        raise ConfigError(str(error)) from error


def choose_towers(config: TrainConfig, model: PreTrainedModel) -> None:
    """Which towers gradient checkpointing is for, and whether their layers are compiled."""
    whole = model.get_base_model() if config.use_lora else model
    if config.gradient_checkpointing_towers != "both":
        whole.checkpointed_towers = (config.gradient_checkpointing_towers,)
    if config.compile_layers:
        whole.compile_layers()


def _names(value: str | list | None) -> tuple[str, ...]:
    """Names given as a list, or as text with commas or bars between them."""
    parts = value if isinstance(value, list) else (value or "").replace("|", ",").split(",")
    return tuple(part.strip() for part in parts if part.strip())


def trl_recipe():
    """The module of the trl recipe, imported only where it is asked for: TRL is optional, and slow to import."""
    try:
        return importlib.import_module("ovis25.training.trl")
    except ImportError as error:
        raise ConfigError(f"the trl recipe needs TRL ({error}): pip install 'ovis25[trl]'") from error


def steps_of(config: TrainConfig, num_items: int) -> Steps:
    """The number of steps that Trainer will take over so many samples, or packed rows."""
    trainer = config.trainer
    return count_steps(
        num_items,
        _value(trainer, "per_device_train_batch_size"),
        num_processes(),
        _value(trainer, "gradient_accumulation_steps"),
        _value(trainer, "num_train_epochs"),
        _value(trainer, "max_steps"),
        _value(trainer, "dataloader_drop_last"),
    )


def _value(trainer: dict, name: str):
    value = trainer.get(name)
    return TRAINER_KEYS[name].default if value is None else value


def training_arguments(config: TrainConfig, precision: Precision, steps: Steps) -> TrainingArguments:
    """TrainingArguments with this framework's defaults, where the config is silent.

    Raises:
        ConfigError: transformers refuses the combination, or evaluation is asked for without a set.
    """
    given = {name: value for name, value in config.trainer.items() if value is not None}
    values = {**_DEFAULTS, **_rhythm(config, given, steps), **given}
    values |= {"bf16": precision.bf16, "fp16": precision.fp16, "output_dir": config.output_dir}
    if precision.device == "CPU":
        values.pop("tf32", None)
        values |= {"use_cpu": True, "dataloader_pin_memory": given.get("dataloader_pin_memory", False)}
    values.setdefault("dataloader_num_workers", min(8, max((os.cpu_count() or 1) // num_processes() - 1, 0)))
    values.setdefault("per_device_eval_batch_size", _value(given, "per_device_train_batch_size"))
    for prefix in ("activation", "gradient"):
        if values.get(f"{prefix}_checkpointing"):
            chosen = values.get(f"{prefix}_checkpointing_kwargs") or {}
            if chosen.get("use_reentrant"):
                raise ConfigError(
                    f"{prefix}_checkpointing_kwargs: use_reentrant would drop the gradients of layers whose input "
                    "needs none, such as adapters in a frozen vision encoder; remove it"
                )
            values[f"{prefix}_checkpointing_kwargs"] = {**chosen, "use_reentrant": False}
    values.pop("resume_from_checkpoint", None)
    is_muon = values.get("optim") == MUON
    if is_muon:
        del values["optim"]
    make = TrainingArguments
    if config.recipe == "trl":
        make = trl_recipe().sft_config
        # SFTConfig's own defaults differ; one config means the same in both recipes
        values = {**{name: TRAINER_KEYS[name].default for name in _TRL_DEFAULTS_DIFFER}, **values, **config.trl}
    if given.get("deepspeed"):
        for lock in remove_stale_locks(is_only_machine=int(os.environ.get("NNODES", "1")) == 1):
            print(f"removed {lock}, which a killed process left", file=sys.stderr)
        _be_the_only_process()
    try:
        arguments = make(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"transformers refuses these settings: {error}") from error
    if is_muon:
        # transformers checks the name only while it makes the arguments; OvisTraining makes the optimizer
        arguments.optim = MUON
    return arguments


def _be_the_only_process() -> None:
    """What torchrun tells its processes, for one started without it: DeepSpeed would look for MPI instead."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _rhythm(config: TrainConfig, given: dict, steps: Steps) -> dict:
    """When to evaluate and save, where the config does not say."""
    if not config.eval_data_path:
        if given.get("eval_strategy", "no") != "no" or given.get("do_eval"):
            raise ConfigError("eval_strategy asks for evaluation, but eval_data_path names no evaluation set")
        if given.get("load_best_model_at_end"):
            raise ConfigError("load_best_model_at_end needs an evaluation set: give eval_data_path")
        return {"save_strategy": "steps", "save_steps": max(1, steps.total // 4)} if "save_steps" not in given else {}
    strategy = given.get("eval_strategy", "steps")
    if strategy == "no":
        return {}
    every = given.get("eval_steps", max(1, steps.total // _NUM_EVALUATIONS))
    return {
        "eval_strategy": strategy,
        "eval_steps": every,
        "save_strategy": strategy,
        "save_steps": every,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
    }


def early_stopping_patience(config: TrainConfig, arguments: TrainingArguments) -> int:
    """Evaluations without improvement after which to stop; 0 for never.

    Raises:
        ConfigError: early stopping without an evaluation to judge by.
    """
    evaluates = config.eval_data_path and arguments.eval_strategy != "no"
    patience = config.early_stopping_patience
    if patience is None:
        return 3 if evaluates else 0
    if patience < 0 or config.early_stopping_threshold < 0:
        raise ConfigError("early_stopping_patience and early_stopping_threshold must not be negative")
    if patience and not evaluates:
        raise ConfigError("early_stopping_patience needs evaluations: give eval_data_path, and no eval_strategy of no")
    return patience


def memory_plan(
    config: TrainConfig,
    machine: memory.Machine,
    in_float32: bool = False,
    kinds: tuple[str, ...] = memory.KINDS,
    with_full: bool = False,
) -> memory.MemoryPlan:
    """What `ovis25 plan` answers: released models by their name, without a download.

    `kinds` of samples are in the data; `with_full` compares full fine-tuning for LoRA configs too.
    """
    size = next((size for size in ("2B", "9B") if f"Ovis2.5-{size}" in config.model_path), None)
    if size and not os.path.isdir(config.model_path):
        shapes = memory.released_config(size)
    else:
        shapes = Ovis2_5_Config.from_pretrained(resolve_checkpoint(resolve_model_path(config.model_path)))
    visual_limits(config)
    choice = memory.Choice(
        config.train_modules, config.freeze_vision_tower, config.freeze_llm,
        config.lora_r, _names(config.lora_target_modules), config.apply_lora_to_vision,
        _names(config.lora_modules_to_save), config.lora_dropout, config.use_dora,
    )  # fmt: skip
    trainer = config.trainer
    in_float32 = in_float32 or config.dtype == "float32" or (trainer.get("bf16") is False and not trainer.get("fp16"))
    return memory.plan_memory(
        memory.Run(
            config, shapes, choice, machine,
            _value(trainer, "per_device_train_batch_size"), _value(trainer, "gradient_accumulation_steps"),
            kinds, in_float32, with_full,
        )
    )  # fmt: skip
