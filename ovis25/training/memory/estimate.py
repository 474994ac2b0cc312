"""Weights, gradients, optimizer states and the peak of a micro-batch, for each way to train."""

from dataclasses import dataclass
from functools import cached_property

from ovis25.model import Ovis2_5_Config
from ovis25.training.memory.activations import TOWERS, Pass, activation_peak
from ovis25.training.memory.counts import Choice, Counts, count, gathered_bytes, static_bytes, step_bytes
from ovis25.training.memory.formats import MIXED, STRATEGIES, NumberFormat, Strategy
from ovis25.training.memory.workload import Workload

# what a plan may fill of a device: CUDA's context, communication buckets and the allocator take their part
USABLE = 0.94


@dataclass(frozen=True)
class Estimate:
    """Bytes on each device, and `host` bytes of the machine's memory for each device.

    `activations` is all that a micro-batch adds at its worst moment, or the step after it where that takes more,
    `activations_checkpointed` the same with gradient checkpointing. `transferred` bytes cross between device and host
    in each optimizer step, `each_pass` in each micro-batch.
    """

    strategy: Strategy
    weights: float
    gradients: float
    optimizer: float
    activations: float
    activations_checkpointed: float
    host: float
    transferred: float = 0
    each_pass: float = 0

    @property
    def static(self) -> float:
        return self.weights + self.gradients + self.optimizer

    def total(self, checkpointed: bool) -> float:
        return self.static + (self.activations_checkpointed if checkpointed else self.activations)

    def to_dict(self) -> dict:
        """Everything by name, in bytes."""
        own = {name: value for name, value in vars(self).items() if name != "strategy"}
        both = {"total": self.total(False), "total_checkpointed": self.total(True)}
        return {"strategy": self.strategy.name, **own, **both}


@dataclass(frozen=True)
class Setup:
    """The run's shapes, its data's and the machine's: what all ways to train have in common."""

    config: Ovis2_5_Config
    choice: Choice
    workload: Workload
    num_devices: int = 1
    numbers: NumberFormat = MIXED
    device_memory: int | None = None
    loss: tuple[tuple[str, object], ...] = ()
    towers: tuple[str, ...] = TOWERS

    @cached_property
    def counts(self) -> Counts:
        return count(self.config, self.choice)

    def estimate(self, strategy: Strategy, only_checkpointed: bool = False) -> Estimate:
        """With gradient checkpointing and without, unless only the first is wanted."""
        counts = self.counts
        weights, gradients, optimizer, host = static_bytes(counts, strategy, self.num_devices, self.numbers)
        gathered = gathered_bytes(counts, strategy, self.numbers)
        step = step_bytes(counts, strategy, self.num_devices, self.numbers)
        checkpointed = max(self._peak(strategy.lora, self.towers) + gathered, step)
        whole = checkpointed if only_checkpointed else max(self._peak(strategy.lora, ()) + gathered, step)
        to_host, each_pass = self._transfers(strategy, counts)
        return Estimate(strategy, weights, gradients, optimizer, whole, checkpointed, host, to_host, each_pass)

    def _peak(self, adapter: bool, checkpointed: tuple[str, ...]) -> float:
        how = Pass(adapter, checkpointed, self.device_memory, self.loss)
        return activation_peak(self.config, self.choice, self.workload, self.numbers, how)

    def _transfers(self, strategy: Strategy, counts: Counts) -> tuple[float, float]:
        """Gradients go to the host and new weights come back; under ZeRO-3 weights also come for each direction."""
        if not strategy.offload:
            return 0, 0
        step = counts.trained * (self.numbers.gradients + self.numbers.weights) / self.num_devices
        return step, 2 * counts.total * self.numbers.weights / self.num_devices * (strategy.stage == 3)


def estimate_all(
    config: Ovis2_5_Config,
    choice: Choice,
    workload: Workload,
    num_devices: int,
    numbers: NumberFormat = MIXED,
    device_memory: int | None = None,
    strategies: tuple[Strategy, ...] = STRATEGIES,
) -> list[Estimate]:
    """The strategies, in their order; `device_memory` decides the chunks, as on a device of that size."""
    setup = Setup(config, choice, workload, num_devices, numbers, device_memory)
    return [setup.estimate(strategy) for strategy in strategies]
