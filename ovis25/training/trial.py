"""The optimizer and the learning rate's schedule, tried on a stand-in: who else checks their arguments?"""

import math

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

from ovis25.text import shorten
from ovis25.training.config import MUON, ConfigError, TrainConfig

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
        ConfigError: it cannot be made of lr_scheduler_kwargs, or gives a rate that is no number or negative.
    """
    kind = SchedulerType(config.value("lr_scheduler_type"))
    given = config.trainer.get("lr_scheduler_kwargs") or {}
    try:
        rates = _rates(kind, given, config.value("warmup_steps"), total_steps)
    except Exception as error:
        # whatever a schedule raises, it raises because of its arguments
        raise ConfigError(f"{_named(kind, given)} cannot be used: {' '.join(str(error).split())}") from error
    wrong = [rate for rate in rates if not (isinstance(rate, (int, float)) and math.isfinite(rate) and rate >= 0)]
    if wrong:
        raise ConfigError(f"{_named(kind, given)} gives {shorten(wrong[0])} times the learning rate; correct it")


def _named(kind: SchedulerType, given: dict) -> str:
    return f"lr_scheduler_type {kind.value} with lr_scheduler_kwargs {shorten(given)}"


def _rates(kind: SchedulerType, given: dict, warmup_steps: float, total_steps: int) -> list[float]:
    """The factor of the learning rate at some steps; a schedule that follows the loss has its own rate."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warmup = math.ceil(warmup_steps * total_steps) if warmup_steps < 1 else int(warmup_steps)
    schedule = get_scheduler(kind, optimizer, warmup, total_steps, given)
    if kind.value in _BY_METRIC:
        optimizer.step()
        schedule.step(1.0)
        return [group["lr"] for group in optimizer.param_groups]
    looked_at = {0, 1, warmup, warmup + 1, (warmup + total_steps) // 2, total_steps - 1, total_steps}
    return [factor(step) for factor in schedule.lr_lambdas for step in sorted(looked_at)]
