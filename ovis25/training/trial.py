"""The optimizer, the learning rate's schedule and DeepSpeed's config, tried on stand-ins: who else checks them?"""

import copy
import math
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import unset_hf_deepspeed_config
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
from transformers.trainer_utils import SchedulerType

from ovis25.files import read_json_object
from ovis25.text import shorten
from ovis25.training import deepspeed
from ovis25.training.config import MUON, TRAINER_KEYS, ConfigError, TrainConfig

# of learning_rate, with room for rounding
_HIGHEST = 1 + 1e-6
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")
# these are looked up together with the model
_NEEDING_MODEL = ("galore", "apollo", "lomo", "adalomo")


def try_optimizer(arguments: TrainingArguments) -> None:
    """Look the optimizer up as Trainer will; torch's own are made for one number.

    Raises:
        ConfigError: its package or its arguments cannot be used.
    """
    name = getattr(arguments.optim, "value", arguments.optim)
    if name == MUON or name.startswith(_NEEDING_MODEL):
        return
    try:
        made_by, values = Trainer.get_optimizer_cls_and_kwargs(arguments)
        if made_by.__module__.startswith(("torch.", "transformers.")):
            made_by([torch.zeros(1, requires_grad=True)], **values)
    except Exception as error:
        # whatever it raises, it raises because of its package or its arguments
        with_arguments = f" with optim_args {arguments.optim_args}" if arguments.optim_args else ""
        raise ConfigError(f"optim {name}{with_arguments} cannot be used: {' '.join(str(error).split())}") from error


def try_schedule(config: TrainConfig, total_steps: int) -> None:
    """Make the schedule as Trainer will, and look at its rates from the first to the last step.

    Raises:
        ConfigError: it cannot be made of lr_scheduler_kwargs, or gives a rate that is no number, negative, or higher
            than learning_rate, which is the highest.
    """
    kind = SchedulerType(config.value("lr_scheduler_type"))
    given = config.trainer.get("lr_scheduler_kwargs") or {}
    try:
        rates = _rates(kind, given, config.value("learning_rate"), config.value("warmup_steps"), total_steps)
    except Exception as error:
        # whatever a schedule raises, it raises because of its arguments
        raise ConfigError(f"{_named(kind, given)} cannot be used: {' '.join(str(error).split())}") from error
    wrong = [rate for rate in rates if not (isinstance(rate, (int, float)) and 0 <= rate <= _HIGHEST)]
    if wrong:
        raise ConfigError(f"{_named(kind, given)} gives {shorten(wrong[0])} times the learning rate; correct it")


def _named(kind: SchedulerType, given: dict) -> str:
    return f"lr_scheduler_type {kind.value} with lr_scheduler_kwargs {shorten(given)}"


def _rates(
    kind: SchedulerType, given: dict, learning_rate: float, warmup_steps: float, total_steps: int
) -> list[float]:
    """The factor of the learning rate at some steps; a schedule that follows the loss has its own rate."""
    is_by_metric = kind.value in _BY_METRIC
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0 if is_by_metric else learning_rate)
    warmup = math.ceil(warmup_steps * total_steps) if warmup_steps < 1 else int(warmup_steps)
    schedule = get_scheduler(kind, optimizer, warmup, total_steps, given)
    if is_by_metric:
        optimizer.step()
        schedule.step(1.0)
        return [group["lr"] for group in optimizer.param_groups]
    looked_at = {0, 1, warmup, warmup + 1, (warmup + total_steps) // 2, total_steps - 1, total_steps}
    return [factor(step) for factor in schedule.lr_lambdas for step in sorted(looked_at)]


def try_deepspeed(config: TrainConfig, bf16: bool, fp16: bool) -> None:
    """Read a DeepSpeed config as transformers and DeepSpeed will, without starting anything.

    Raises:
        ConfigError: a section that DeepSpeed refuses, or a value that disagrees with the settings.
    """
    given = config.value("deepspeed")
    where = f"deepspeed {given}" if isinstance(given, str) else "deepspeed"
    values = read_json_object(Path(given)) if isinstance(given, str) else copy.deepcopy(given)
    if not {"train_batch_size", "train_micro_batch_size_per_gpu"} & values.keys():
        raise ConfigError(f'{where} has no train_micro_batch_size_per_gpu, which DeepSpeed needs; add it with "auto"')
    zero = {name: value for name, value in values["zero_optimization"].items() if value != "auto"}
    try:
        deepspeed.check_zero(zero)
    except ValueError as error:
        # pydantic's: a list of what is wrong, each with its place
        first = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
        place = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise ConfigError(f"{where} has {place}, which DeepSpeed refuses: {first['msg']}; correct it") from error
    settings = {name: config.value(name) for name in TRAINER_KEYS}
    settings |= {"bf16": bf16, "fp16": fp16, "world_size": int(os.environ.get("WORLD_SIZE", "1"))}
    _match(where, values, SimpleNamespace(**settings))


def _match(where: str, values: dict, arguments: SimpleNamespace) -> None:
    """Compare with the settings, as transformers does when it is too late."""
    read = HfTrainerDeepSpeedConfig(values)
    try:
        read.trainer_config_process(arguments)
    except (AttributeError, TypeError, ValueError) as error:
        # a section that is no object
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where} cannot be read: {reason}; see scripts/zero_configs/") from error
    finally:
        # it registers itself
        unset_hf_deepspeed_config()
    if read.mismatches:
        there, here = read.mismatches[0].removeprefix("- ds ").split(" vs hf ")
        raise ConfigError(f'{where} has {there}, but the settings make it {here}; write "auto" there')
