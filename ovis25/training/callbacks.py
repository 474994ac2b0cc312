"""What watches a run: the progress line, early stopping, the guard against a broken loss."""

import math
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ovis25.training.trainer import TokenCounter

_STEPS_BETWEEN_CHECKS = 100


class EarlyStopping(TrainerCallback, ExportableState):
    """Stop when `metric` has not decreased by more than `threshold` for `patience` evaluations in a row.

    `reason` says why the run was stopped; it is saved with the checkpoints, so a resumed run knows.
    """

    def __init__(self, patience: int, threshold: float = 0.0, metric: str = "eval_loss"):
        self.patience, self.threshold, self.metric = patience, threshold, metric
        self.num_without_improvement = 0
        self.best: float | None = None
        self.reason: str | None = None

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        value = (metrics or {}).get(self.metric)
        if value is None:
            return
        if self.best is None or value < self.best - self.threshold:
            self.best, self.num_without_improvement = value, 0
            return
        self.num_without_improvement += 1
        if self.num_without_improvement >= self.patience:
            at_least = f" by more than {self.threshold:g}" if self.threshold else ""
            self.reason = (
                f"early stopping at step {state.global_step}: {self.metric} has not improved on {self.best:.4f}"
                f"{at_least} for {self.num_without_improvement} evaluations"
            )
            control.should_training_stop = True

    def state(self) -> dict:
        names = ("num_without_improvement", "best", "reason")
        return {
            "args": {"patience": self.patience, "threshold": self.threshold, "metric": self.metric},
            "attributes": {name: getattr(self, name) for name in names},
        }


class FiniteLoss(TrainerCallback):
    """Ends a run whose loss, gradients or weights are no numbers any more, before anything depends on them.

    `check` raises if they are; it is called before logs, evaluations and checkpoints, at the end, and every hundred
    steps.
    """

    def __init__(self, check: Callable[[], None]):
        self.check = check

    def on_step_end(self, args, state, control, **kwargs):
        is_last = state.global_step >= state.max_steps or control.should_training_stop
        depends = control.should_log or control.should_evaluate or control.should_save
        if is_last or depends or state.global_step % _STEPS_BETWEEN_CHECKS == 0:
            self.check()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.check()


class ProgressLine(TrainerCallback):
    """A bar with loss, tokens/s and time left; where the output is no terminal, one line per log."""

    def __init__(self, counter: TokenCounter):
        self.counter = counter
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.loss = self.tokens_per_s = math.nan

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.num_devices = args.world_size
        self.start, self.start_step = time.monotonic(), state.global_step
        self._restart_clock()
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"), console=self.console,
            )  # fmt: skip
            self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, numbers="")
            self.bar.start()

    def _restart_clock(self):
        self.clock, self.clock_tokens = time.monotonic(), self.counter.total()

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        self.loss = logs["loss"]
        seconds, tokens = time.monotonic() - self.clock, self.counter.total() - self.clock_tokens
        if seconds > 0 and tokens:
            self.tokens_per_s = tokens * self.num_devices / seconds
        self._restart_clock()
        numbers = f"loss {self.loss:.4f}  {self.tokens_per_s:,.0f} tokens/s"
        if self.bar:
            self.bar.update(self.task, numbers=numbers)
        else:
            done = state.global_step - self.start_step
            left = (time.monotonic() - self.start) / max(done, 1) * (state.max_steps - state.global_step)
            print(
                f"step {state.global_step:>6}/{state.max_steps}  {numbers}  {_clock(left)} left",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if state.is_world_process_zero and metrics and "eval_loss" in metrics:
            line = f"step {state.global_step:>6}/{state.max_steps}  evaluation loss {metrics['eval_loss']:.4f}"
            self._say(line)
        self._restart_clock()

    def on_save(self, args, state, control, **kwargs):
        self._restart_clock()

    def _say(self, line: str):
        if self.bar:
            self.bar.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Takes the bar off the terminal, so that what is said after it, an error too, stands on lines of its own."""
        if self.bar:
            self.bar.stop()
            self.bar = None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
