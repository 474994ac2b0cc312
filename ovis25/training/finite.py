"""Is every number of a run finite? Looked at on the device in every step, read when something depends on it.

A step's loss and gradient norm cost a few element-wise kernels and no synchronisation. The host reads the verdict
before anything is logged, evaluated, saved or reported.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainingArguments

from ovis25.training.config import ConfigError

STOP, SKIP = "stop", "skip"
_LOSS, _NORM = "the training loss", "the gradient norm"
# steps left out one after the other that are no accident any more, and as a share of all
_MAX_IN_A_ROW = 10
_MAX_SHARE = 0.01
_MAX_NAMED = 6


class FirstBad:
    """The number and the value of the first of many scalars that is not finite, kept on their device."""

    def __init__(self, device: torch.device):
        self.number = torch.full((), -1, dtype=torch.int64, device=device)
        self.value = torch.zeros((), device=device)

    def note(self, number: int, value: torch.Tensor) -> None:
        value = value.detach().to(self.value.device).float().reshape(())
        is_first = ~torch.isfinite(value) & (self.number < 0)
        self.number = torch.where(is_first, number, self.number)
        self.value = torch.where(is_first, value, self.value)

    def read(self) -> tuple[int, float] | None:
        """The one synchronisation."""
        number = int(self.number)
        return None if number < 0 else (number, float(self.value))


@dataclass
class BadStep:
    """A step whose loss, gradient norm or weights are not finite; `samples` are those it was taken on."""

    step: int
    what: str
    value: float
    samples: list[str]

    def describe(self) -> str:
        text = f"{self.what} became {self.value:g} at step {self.step}"
        return f"{text}, on {listed(self.samples)}" if self.samples else text


def _order(bad: BadStep) -> tuple[int, bool]:
    """The earliest first; in one step the loss, which the gradients follow."""
    return bad.step, bad.what != _LOSS


class FiniteWatch:
    """Watches the steps of one process; every process of the run must call the same methods at the same time.

    Args:
        names: indices of the training set -> names of those samples.
        judges_norms: False under loss scaling (float16), where overflowing gradients are expected and handled.
        skips: leave a bad step's update out (see `gradient`), which costs one synchronisation a step.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        names: Callable[[Iterable[int]], list[str]],
        judges_norms: bool = True,
        skips: bool = False,
    ):
        self.accelerator, self.names = accelerator, names
        self.judges_norms, self.skips = judges_norms, skips
        self.skipped: list[dict] = []
        self._num_batches = 0
        # number of a batch -> its step and indices, since the last good check
        self._batches: dict[int, tuple[int, list[int]]] = {}
        self._forget()

    def _forget(self) -> None:
        self._loss, self._norm = FirstBad(self.accelerator.device), FirstBad(self.accelerator.device)

    def note_loss(self, loss: torch.Tensor, step: int, indices: Iterable[int]) -> None:
        """Called with the loss of every micro-batch of this process."""
        self._num_batches += 1
        self._batches[self._num_batches] = (step, list(indices))
        self._loss.note(self._num_batches, loss)

    def note_norm(self, norm: torch.Tensor | float | None, step: int) -> None:
        """Called with every step's gradient norm, which is that of all processes."""
        if norm is None or not self.judges_norms:
            return
        if not isinstance(norm, torch.Tensor):
            # DeepSpeed's: on the host already, -1 for what is not finite
            norm = torch.tensor(norm if norm >= 0 else math.nan)
        self._norm.note(step, norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def must_skip(self, step: int, total_steps: int) -> BadStep | None:
        """Where bad steps are left out: the step if it is one; forgets it and counts it.

        Raises:
            FloatingPointError: too many were.
        """
        if not self.skips:
            return None
        found = self._find()
        self._settle(step)
        if found is None:
            return None
        self._forget()
        self.skipped.append({"step": found.step, "what": found.what, "value": str(found.value), "on": found.samples})
        self._check_bounds(found, total_steps)
        return found

    def _check_bounds(self, found: BadStep, total_steps: int) -> None:
        steps = {entry["step"] for entry in self.skipped}
        most = max(_MAX_IN_A_ROW, int(_MAX_SHARE * total_steps))
        is_streak = all(found.step - back in steps for back in range(_MAX_IN_A_ROW + 1))
        if is_streak or len(steps) > most:
            limit = f"{_MAX_IN_A_ROW} in a row" if is_streak else f"{most} of {total_steps}"
            raise FloatingPointError(
                f"{len(steps)} steps were left out because they were not finite, more than {limit}; "
                f"{found.describe()}. Lower learning_rate, or mend these samples"
            )

    def find(self) -> BadStep | None:
        """The first bad step of any process since the last call; where there is none, all of them are forgotten."""
        found = self._find()
        if found is None and self._batches:
            # the last step's batches stay: its update may turn out to be the bad one
            self._settle(max(step for step, _ in self._batches.values()))
        return found

    def _settle(self, step: int) -> None:
        self._batches = {number: batch for number, batch in self._batches.items() if batch[0] >= step}

    def _find(self) -> BadStep | None:
        is_bad = ((self._loss.number >= 0) | (self._norm.number >= 0)).float()
        if not float(self.accelerator.reduce(is_bad, "sum")):
            return None
        found = [bad for bad in gather_object([self._own()]) if bad is not None]
        first = min(found, key=_order)
        alike = [bad for bad in found if (bad.step, bad.what) == (first.step, first.what)]
        return BadStep(first.step, first.what, first.value, [name for bad in alike for name in bad.samples])

    def _own(self) -> BadStep | None:
        """What this process saw: a bad loss is one micro-batch's, a bad norm any's of the step."""
        found = []
        if loss := self._loss.read():
            step, indices = self._batches[loss[0]]
            found.append(BadStep(step, _LOSS, loss[1], self.names(indices)))
        if norm := self._norm.read():
            found.append(BadStep(norm[0], _NORM, norm[1], self.samples_of_step(norm[0])))
        return min(found, key=_order, default=None)

    def samples_of_step(self, step: int) -> list[str]:
        """Names of this process's samples of a step since the last check."""
        return self.names([index for when, indices in self._batches.values() if when == step for index in indices])

    def last_step(self) -> list[str]:
        """Names of all processes' samples of the last step."""
        last = max((step for step, _ in self._batches.values()), default=0)
        return gather_object(self.samples_of_step(last))


def check_policy(policy: str, arguments: TrainingArguments) -> None:
    """Refuse to leave steps out where that could not be exact.

    Raises:
        ConfigError: DeepSpeed steps inside its own backward pass; float16 has the loss scaler.
    """
    if policy != SKIP:
        return
    reason = "deepspeed takes the step inside its own engine" if arguments.deepspeed_plugin else None
    reason = "fp16 leaves steps out itself, by its loss scaler" if arguments.fp16 else reason
    if reason:
        raise ConfigError(f"on_nonfinite {SKIP} cannot be used here: {reason}; use {STOP}")


def bad_weights(model: nn.Module, only_trained: bool = False) -> list[str]:
    """Names of the parameters, in any process, that hold NaN or infinity; reads each once, synchronises once.

    Of weights that ZeRO-3 or FSDP shard, each process looks at its share. Every process must call this.
    """
    shares = {}
    for name, parameter in model.named_parameters():
        share = _share(parameter)
        if share.is_floating_point() and share.numel() and (parameter.requires_grad or not only_trained):
            shares[name] = share
    found = []
    if shares:
        # float32 may overflow in a sum of good numbers: those are looked at one by one
        sums = [share.sum(dtype=torch.float32) for share in shares.values()]
        are_good = torch.stack([value.to(sums[0].device) for value in sums]).isfinite().tolist()
        suspects = [name for name, is_good in zip(shares, are_good, strict=True) if not is_good]
        found = [name for name in suspects if not bool(shares[name].isfinite().all())]
    return list(dict.fromkeys(gather_object(found)))


def _share(parameter: nn.Parameter) -> torch.Tensor:
    """The part of a parameter that this process holds."""
    shard = getattr(parameter, "ds_tensor", parameter)
    if getattr(getattr(shard, "status", None), "name", None) == "NOT_AVAILABLE":
        # swapped out to a disk
        return torch.empty(0)
    return shard.detach().to_local() if hasattr(shard, "to_local") else shard.detach()


def listed(names: list[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def likely_cause(step: int, learning_rate: float, losses: list[float]) -> str:
    """Words for what to look at first; `losses` are those logged before."""
    if step <= 1:
        return "The base weights are finite, so look at these samples first"
    if len(losses) > 1 and losses[-1] > 2 * min(losses):
        return (
            f"The loss had already risen from {min(losses):.4g} to {losses[-1]:.4g}: lower learning_rate "
            f"({learning_rate:g}) or max_grad_norm, or warm up longer"
        )
    return f"Look at these samples, or lower learning_rate ({learning_rate:g}) or max_grad_norm"
