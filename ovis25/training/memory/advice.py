"""Which ways to train fit, and which to take."""

import dataclasses
import math
from dataclasses import dataclass

from ovis25.model import Ovis2_5_Config
from ovis25.training.config import TrainConfig
from ovis25.training.memory.activations import TOWERS
from ovis25.training.memory.counts import Choice
from ovis25.training.memory.estimate import USABLE, Estimate, Setup
from ovis25.training.memory.formats import FLOAT32, MIXED, STRATEGIES, Strategy
from ovis25.training.memory.ways import (
    Way,
    complete_settings,
    configured_strategy,
    make_way,
    smaller_data,
    with_settings,
)
from ovis25.training.memory.workload import KINDS, Workload, largest_workload

# what machines have that hold such devices, where nothing is said
TYPICAL_HOST = 128 * 10**9
_DEVICES_OF_A_MACHINE = 8
# host memory beyond this multiple of the devices' own is nobody's first choice
_MOST_HOST = 8
# a second way is worth naming where it takes that much less
_LESS = 0.9


@dataclass(frozen=True)
class Machine:
    """Devices, the memory of each, and the memory of one host of up to eight of them, in bytes."""

    num_devices: int
    device_memory: int
    host_memory: int = TYPICAL_HOST

    def fits(self, way: Way) -> bool:
        return way.fits(self.device_memory) and way.host_bytes <= self.most_host

    @property
    def most_host(self) -> float:
        num_hosts = math.ceil(self.num_devices / _DEVICES_OF_A_MACHINE)
        return min(num_hosts * self.host_memory, _MOST_HOST * self.device_memory * self.num_devices)


@dataclass(frozen=True)
class Recommendation:
    """The best ways that fit, none to two; the least that full fine-tuning takes, where it does not fit; the least of
    all, where nothing fits.
    """

    ways: tuple[Way, ...]
    least_full: Way | None = None
    least: Way | None = None


@dataclass(frozen=True)
class Run:
    """A config with its shapes, on a machine; `batch_size` and `accumulation` are those that Trainer would take."""

    config: TrainConfig
    shapes: Ovis2_5_Config
    choice: Choice
    machine: Machine
    batch_size: int
    accumulation: int
    kinds: tuple[str, ...] = KINDS
    in_float32: bool = False
    with_full: bool = False

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """Those to compare: with LoRA configs adapters alone unless asked, and on one device nothing that is shared."""
        only_adapters = self.config.use_lora and not self.with_full
        is_alone = self.machine.num_devices == 1
        return tuple(s for s in STRATEGIES if s.lora or not (only_adapters or (is_alone and _only_shares(s))))

    @property
    def workload(self) -> Workload:
        return largest_workload(self.config, self.batch_size, self.kinds)

    @property
    def setup(self) -> Setup:
        numbers = FLOAT32 if self.in_float32 else MIXED
        machine = self.machine
        return Setup(
            self.shapes, self.choice, self.workload, machine.num_devices, numbers, machine.device_memory, self._loss()
        )

    def _loss(self) -> tuple[tuple[str, object], ...]:
        is_trl = self.config.recipe == "trl"
        options = {
            "label_smoothing": self.config.trainer.get("label_smoothing_factor") or 0.0,
            "z_loss": self.config.z_loss,
            "loss_type": self.config.trl.get("loss_type") or "nll" if is_trl else "nll",
            "with_metrics": is_trl,
        }
        return tuple(options.items())

    def with_data(self, changes: dict) -> "Run":
        batch_size = changes.get("per_device_train_batch_size", self.batch_size)
        return dataclasses.replace(self, config=with_settings(self.config, changes), batch_size=batch_size)

    def way(self, estimate: Estimate, is_checkpointed: bool, changes: dict | None = None) -> Way:
        settings = complete_settings(self.config, estimate.strategy, is_checkpointed, self.in_float32)
        return make_way(estimate, is_checkpointed, self.machine.num_devices, settings, changes)

    def smaller_way(self, strategy: Strategy, changes: dict) -> Way:
        return self.way(self.with_data(changes).setup.estimate(strategy, only_checkpointed=True), True, changes)

    def as_it_stands(self) -> Way:
        """What the config itself would take."""
        strategy, numbers, is_checkpointed = configured_strategy(self.config, self.in_float32)
        named = self.config.gradient_checkpointing_towers
        towers = TOWERS if named == "both" else (named,)
        setup = dataclasses.replace(self.setup, numbers=numbers, towers=towers)
        return make_way(setup.estimate(strategy), is_checkpointed, self.machine.num_devices, {})


def _only_shares(strategy: Strategy) -> bool:
    return strategy.stage > 0 and not strategy.offload


def recommend(run: Run, estimates: list[Estimate]) -> Recommendation:
    """Full fine-tuning before adapters, computing again before transfers to the host, the config's own samples before
    smaller ones.
    """
    fitting = [way for way in _unchanged(run, estimates) if run.machine.fits(way)]
    if len(_best_two(fitting)) < 2:
        fitting += _changed(run, estimates)
    full = [run.way(e, True) for e in estimates if not e.strategy.lora]
    is_full = any(not way.settings.get("use_lora") for way in fitting)
    least_full = min(full, key=lambda way: way.device_bytes) if full and not is_full else None
    if fitting:
        return Recommendation(tuple(_best_two(fitting)), least_full)
    return Recommendation((), least_full, min((run.way(e, True) for e in estimates), key=lambda way: way.device_bytes))


def _unchanged(run: Run, estimates: list[Estimate]) -> list[Way]:
    """The config's own samples, the best way first."""
    staged = [e for e in estimates if not e.strategy.lora and not e.strategy.offload]
    offloaded = [e for e in estimates if e.strategy.offload]
    adapters = [e for e in estimates if e.strategy.lora]
    order = [(e, again) for group in (staged, offloaded) for again in (False, True) for e in group]
    order += [(e, again) for e in adapters for again in (False, True)]
    return [run.way(e, again) for e, again in order]


def _changed(run: Run, estimates: list[Estimate]) -> list[Way]:
    """Smaller micro-batches, as large as fit, for each strategy whose weights and states fit."""
    found = []
    for estimate in estimates:
        strategy = estimate.strategy
        fits_already = run.machine.fits(run.way(estimate, True))
        if fits_already or strategy.offload or estimate.static > USABLE * run.machine.device_memory:
            continue
        steps = smaller_data(run.config, run.batch_size, run.accumulation)
        # the smallest first: where it does not fit, none does
        if steps and run.machine.fits(run.smaller_way(strategy, steps[-1])):
            ways = (run.smaller_way(strategy, changes) for changes in steps)
            found.append(next(way for way in ways if run.machine.fits(way)))
    return found


def _best_two(ways: list[Way]) -> list[Way]:
    """The first, and the next that is another strategy or takes clearly less."""
    first = ways[:1]
    others = [
        way
        for way in ways[1:]
        if way.strategy != first[0].strategy or way.device_bytes <= _LESS * first[0].device_bytes
    ]
    return first + others[:1]
