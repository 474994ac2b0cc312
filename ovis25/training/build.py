"""The parts of a run, each built from the config by one function."""

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from ovis25.checkpoint import resolve_checkpoint
from ovis25.data import datainfo
from ovis25.data.dataset import SampleDataset
from ovis25.data.digits import SOURCE_PREFIXES, parse_source
from ovis25.data.measure import LengthLimits, Rules
from ovis25.data.packing.rows import PackedDataset
from ovis25.data.samples import Samples
from ovis25.data.survey import make_survey
from ovis25.loading import TINY_NAME, resolve_model_path
from ovis25.model import Ovis2_5, Ovis2_5_Config
from ovis25.model.adapter import AdapterSettings, add_adapter
from ovis25.model.folder import check_folder
from ovis25.processing import Ovis2_5Processor, VisualLimits
from ovis25.processing.limits import LIMIT_NAMES
from ovis25.ranks import is_main_process, num_processes
from ovis25.tools import Toolbox, as_toolbox, load_tools
from ovis25.training import deepspeed, memory
from ovis25.training.config import DEFAULTS, LENGTH_STRATEGIES, MUON, TRAINER_KEYS, ConfigError, TrainConfig
from ovis25.training.config.check import WORKER_KEYS, check, check_values
from ovis25.training.config.machine import check_machine
from ovis25.training.config.places import check_places
from ovis25.training.cost import cost_weights
from ovis25.training.extensions import remove_stale_locks
from ovis25.training.modules import parse_train_modules
from ovis25.training.plan import Steps, count_steps
from ovis25.training.rhythm import check_patience, choose_rhythm
from ovis25.training.trial import try_deepspeed, try_optimizer, try_schedule

# for what is tried before the data is counted
_SOME_STEPS = 1000
_MOST_PLANNED = 2**20
_TRL_DEFAULTS_DIFFER = [
    name for name in ("learning_rate", "gradient_checkpointing", "activation_checkpointing") if name in TRAINER_KEYS
]


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


def check_before_loading(config: TrainConfig) -> None:
    """All that can be known of a run's settings before its data and weights are touched; writes nothing.

    Raises:
        ConfigError: a setting that cannot work, here or anywhere; one line with key, value and cure.
    """
    check_values(config)
    check(config)
    check_places(config)
    check_machine(config)
    visual_limits(config)
    tools_of(config)
    _note_rates(config)
    precision = choose_precision(config)
    num_steps = config.value("max_steps") if config.value("max_steps") > 0 else _SOME_STEPS
    rhythm = choose_rhythm(config, num_steps)
    check_patience(config, rhythm.evaluates)
    try_schedule(config, num_steps)
    if config.value("deepspeed"):
        try_deepspeed(config, precision.bf16, precision.fp16)
    if num_processes() == 1 and not config.value("deepspeed") and not config.value("fsdp"):
        # the real ones, which would start the other processes' group here, are made when the steps are known
        training_arguments(config, precision, Steps(num_steps, num_steps, 1))


def _note_rates(config: TrainConfig) -> None:
    """A run at rate 0 measures losses and changes nothing, which some want; nobody should get it unawares."""
    rates = [module.learning_rate for module in parse_train_modules(config.train_modules)]
    if not config.value("learning_rate") and (config.use_lora or not any(rates)):
        config.notes.append("learning_rate is 0: the run changes nothing")


def choose_precision(config: TrainConfig) -> Precision:
    """bf16 where the device has it, float32 on a CPU; weights stay float32 unless DeepSpeed keeps a master copy,
    or LoRA freezes them. fp16 is mixed precision with float32 weights and a scaled loss.

    Raises:
        ConfigError: fp16 on a CPU.
    """
    given = config.given_trainer
    bf16, fp16 = given.get("bf16"), config.value("fp16")
    requested = getattr(torch, config.dtype) if config.dtype not in (None, "auto") else None
    if requested == torch.float16:
        raise ConfigError("dtype is 'float16'; train in float32 or bfloat16 (mixed precision: fp16 or bf16)")
    if not torch.cuda.is_available() or config.value("use_cpu"):
        if fp16:
            raise ConfigError(
                "fp16 is true, but this run trains on the CPU, which has no loss scaling for it; remove fp16 for "
                'float32, or take "dtype": "bfloat16"'
            )
        off = [name for name in ("bf16", "tf32") if given.get(name)]
        note = f"without effect: {', '.join(off)}; this machine trains on its CPU, in float32" if off else None
        return Precision("CPU", requested or torch.float32, False, False, note)
    if bf16 is None and not fp16:
        bf16 = torch.cuda.is_bf16_supported()
    may_be_half = bf16 and (given.get("deepspeed") or config.use_lora)
    weights = requested or (torch.bfloat16 if may_be_half else torch.float32)
    return Precision(torch.cuda.get_device_name(), weights, bool(bf16), bool(fp16), None)


def visual_limits(config: TrainConfig) -> VisualLimits:
    try:
        return VisualLimits(**{name: getattr(config, name) for name in LIMIT_NAMES})
    except ValueError as error:
        raise ConfigError(str(error)) from error


def tools_of(config: TrainConfig) -> Toolbox:
    """The tools that make pictures in training data.

    Raises:
        ConfigError: `tools` names one that there is not, or that is none.
    """
    try:
        return as_toolbox(None) if config.tools is None else load_tools(_names(config.tools))
    except ValueError as error:
        raise ConfigError(f"tools: {error}") from error


def check_vocabulary(config: TrainConfig, processor: Ovis2_5Processor) -> None:
    """Tokens that a setting names are known to the tokenizer.

    Raises:
        ConfigError: eos_token is not.
    """
    token = config.trl.get("eos_token") if config.recipe == "trl" else None
    if token and token not in processor.tokenizer.get_vocab():
        raise ConfigError(f"eos_token is {token!r}, which the tokenizer does not have; leave it out for its own")


def samples_of(config: TrainConfig, key: str) -> Samples:
    """The rows of `data_path` or `eval_data_path`. Raises DataError where they cannot be read."""
    source = getattr(config, key)
    if source.startswith(SOURCE_PREFIXES):
        source = parse_source(source)
    elif source.startswith(datainfo.PREFIX):
        source = datainfo.read_datainfo(*datainfo.split_source(source))
    return Samples.of(source, config.image_folder)


def rules_of(config: TrainConfig, processor: Ovis2_5Processor) -> Rules:
    """What the config says of how samples are encoded. Raises ConfigError for limits and tools that cannot be."""
    lengths = LengthLimits(config.multimodal_max_length, config.text_max_length, config.on_long_sample)
    return Rules(processor, visual_limits(config), lengths, tools_of(config))


def build_dataset(
    config: TrainConfig, key: str, processor: Ovis2_5Processor, skipped_path: Path | None = None
) -> SampleDataset:
    """The samples of `data_path` or `eval_data_path`, checked; the progress bar is rank 0's.

    Samples that break while decoding are noted in `skipped_path`.
    """
    samples, rules = samples_of(config, key), rules_of(config, processor)
    survey = make_survey(
        samples,
        rules,
        stops_at_form=config.on_bad_sample == "error",
        measure_all=config.packing or config.value("train_sampling_strategy") in LENGTH_STRATEGIES,
        show_progress=is_main_process(),
    )
    options = {"on_bad_sample": config.on_bad_sample, "skipped_path": skipped_path}
    return SampleDataset(samples, survey, rules, raw_pixels=True, **options)


def pack_dataset(config: TrainConfig, dataset: SampleDataset, folder: str, is_training: bool) -> PackedDataset:
    """The samples in rows of about equal cost; each device gets as many rows as the others."""
    rows_per_device = config.value("per_device_train_batch_size")
    if not is_training:
        rows_per_device = config.given_trainer.get("per_device_eval_batch_size", rows_per_device)
    seed = config.value("data_seed")
    return PackedDataset.of(
        dataset,
        cost_weights(Ovis2_5_Config.from_pretrained(folder), _vision_share(config)),
        config.multimodal_max_length,
        seed=config.value("seed") if seed is None else seed,
        multiple=num_processes() * rows_per_device,
        in_order=is_training and config.value("train_sampling_strategy") == "sequential",
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
    if config.trainer.get("deepspeed"):
        deepspeed.start()
    if config.qlora and config.use_lora:
        arguments["quantization_config"] = _four_bits(dtype)
    try:
        return Ovis2_5.from_pretrained(folder, dtype=dtype, **arguments)
    except ImportError as error:
        if not config.attn_implementation:
            # weights that a library has quantized
            raise ConfigError(f"{folder} cannot be loaded: {' '.join(str(error).split())}") from error
        raise ConfigError(
            f"attn_implementation {config.attn_implementation} cannot be used: {error}; use sdpa"
        ) from error


def _four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """The LLM's linear layers as 4-bit NormalFloat (QLoRA, arXiv 2305.14314); the vision side stays as it is."""
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
    """The number of steps that Trainer will take over so many samples, or packed rows.

    Raises:
        ConfigError: there would be none.
    """
    batch, devices = config.value("per_device_train_batch_size"), num_processes()
    drops = config.value("dataloader_drop_last")
    if drops and num_items // batch < devices:
        raise ConfigError(
            f"dataloader_drop_last leaves no batch: {num_items} {'rows' if config.packing else 'samples'} are fewer "
            f"than {batch} per device x {devices} devices = {batch * devices}; set it to false, or lower "
            "per_device_train_batch_size"
        )
    steps = count_steps(
        num_items, batch, devices, config.value("gradient_accumulation_steps"), config.value("num_train_epochs"),
        config.value("max_steps"), drops,
    )  # fmt: skip
    if num_items < 1 or steps.total < 1:
        raise ConfigError(
            f"there is nothing to train: {num_items} samples in {config.value('num_train_epochs')} epochs make "
            f"{steps.total} steps"
        )
    return steps


def training_arguments(config: TrainConfig, precision: Precision, steps: Steps) -> TrainingArguments:
    """TrainingArguments with this framework's defaults, where the config is silent.

    What the defaults make of the user's settings is added to the config's notes.

    Raises:
        ConfigError: transformers refuses the combination, or evaluation is asked for without a set.
    """
    given = config.given_trainer
    rhythm = choose_rhythm(config, steps.total)
    config.notes += [note for note in rhythm.notes if note not in config.notes]
    values = {**DEFAULTS, **rhythm.values, **given, **_checkpointing(given)}
    values |= {"bf16": precision.bf16, "fp16": precision.fp16, "output_dir": config.output_dir}
    if precision.device == "CPU":
        values.pop("tf32", None)
        values |= {"use_cpu": True, "dataloader_pin_memory": given.get("dataloader_pin_memory", False)}
    values.setdefault("dataloader_num_workers", _num_workers(given))
    values.setdefault("per_device_eval_batch_size", config.value("per_device_train_batch_size"))
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
        deepspeed.allow_blanks()
        deepspeed.be_the_only_process()
    try:
        arguments = make(**values)
    except Exception as error:
        # whatever the constructor raises, it raises because of these values
        raise ConfigError(f"transformers refuses these settings: {' '.join(str(error).split())}") from error
    if is_muon:
        # transformers checks the name only while it makes the arguments; OvisTraining makes the optimizer
        arguments.optim = MUON
    try_optimizer(arguments)
    try_schedule(config, steps.total)
    return arguments


def _checkpointing(given: dict) -> dict:
    """The arguments of gradient checkpointing, never the reentrant kind."""
    return {
        f"{prefix}_checkpointing_kwargs": {**given.get(f"{prefix}_checkpointing_kwargs", {}), "use_reentrant": False}
        for prefix in ("activation", "gradient")
        if given.get(f"{prefix}_checkpointing")
    }


def _num_workers(given: dict) -> int:
    """Processes that read data: what the machine's cores allow; at least one where settings ask for workers."""
    wanted = any(given.get(name) for name in WORKER_KEYS)
    return min(8, max((os.cpu_count() or 1) // num_processes() - 1, int(wanted)))


def early_stopping_patience(config: TrainConfig, arguments: TrainingArguments) -> int:
    """Evaluations without improvement after which to stop; 0 for never.

    Raises:
        ConfigError: early stopping without an evaluation to judge by.
    """
    evaluates = bool(config.eval_data_path) and arguments.eval_strategy != "no"
    check_patience(config, evaluates)
    if config.early_stopping_patience is None:
        return 3 if evaluates else 0
    return config.early_stopping_patience


def check_plannable(config: TrainConfig) -> None:
    """The planner walks through a whole micro-batch. Raises ConfigError: it is one that no device could hold."""
    batch, length = config.value("per_device_train_batch_size"), config.multimodal_max_length
    if batch * max(length, config.text_max_length) > _MOST_PLANNED:
        raise ConfigError(
            f"per_device_train_batch_size {batch:,} x multimodal_max_length {length:,} tokens is more than any device "
            f"holds; plan at most {_MOST_PLANNED:,} tokens"
        )


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
        folder = resolve_checkpoint(resolve_model_path(config.model_path))
        check_folder(folder)
        shapes = Ovis2_5_Config.from_pretrained(folder)
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
            config.value("per_device_train_batch_size"), config.value("gradient_accumulation_steps"),
            kinds, in_float32, with_full,
        )
    )  # fmt: skip
