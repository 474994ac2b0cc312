"""The whole answer of `ovis25 plan` as data."""

from dataclasses import asdict, dataclass

from ovis25.model import loss, visual_tokenizer
from ovis25.model.recompute import chunk_size
from ovis25.training.memory.advice import Machine, Recommendation, Run, recommend
from ovis25.training.memory.estimate import USABLE, Estimate
from ovis25.training.memory.ways import Way
from ovis25.training.memory.workload import Workload, patches_of


@dataclass(frozen=True)
class Chunks:
    """Rows of the loss and of the visual head whose numbers exist at once, on the planned device."""

    loss_rows: int
    visual_tokens: int

    @property
    def are_reduced(self) -> bool:
        return (self.loss_rows, self.visual_tokens) != (loss.CHUNK_ROWS, visual_tokenizer.CHUNK_TOKENS)


@dataclass(frozen=True)
class MemoryPlan:
    """Numbers in bytes; `configured` is the config as it stands."""

    model: str
    machine: Machine
    workload: Workload
    patches: dict[str, int]
    number_format: str
    optimizer: str | None
    chunks: Chunks
    estimates: tuple[Estimate, ...]
    configured: Way
    recommendation: Recommendation

    @property
    def usable(self) -> float:
        """Bytes of each device that a plan may fill."""
        return USABLE * self.machine.device_memory

    def to_dict(self) -> dict:
        """JSON's types alone; `fits` tells for each way, and for the config as it stands, whether it fits."""
        values = asdict(self)
        values["usable_memory"] = self.usable
        values["estimates"] = [estimate.to_dict() for estimate in self.estimates]
        values["configured"]["fits"] = self.machine.fits(self.configured)
        return values


def plan_memory(run: Run) -> MemoryPlan:
    """Every way to train the run's config on its machine, and which to take."""
    estimates = [run.setup.estimate(strategy) for strategy in run.strategies]
    memory = run.machine.device_memory
    optimizer = run.config.trainer.get("optim")
    return MemoryPlan(
        model=run.config.model_path,
        machine=run.machine,
        workload=run.workload,
        patches={kind: patches_of(run.config, kind) for kind in run.kinds if kind != "text"},
        number_format="float32" if run.in_float32 else "bfloat16",
        optimizer=None if not optimizer or optimizer.startswith("adamw_torch") else optimizer,
        chunks=Chunks(
            chunk_size(loss.CHUNK_ROWS, run.shapes.llm_config.vocab_size, memory),
            chunk_size(visual_tokenizer.CHUNK_TOKENS, run.shapes.visual_vocab_size, memory),
        ),
        estimates=tuple(estimates),
        configured=run.as_it_stands(),
        recommendation=recommend(run, estimates),
    )
