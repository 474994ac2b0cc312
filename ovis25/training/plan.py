"""The plan of a run: how many steps, when it evaluates and saves, what is trained and how fast."""

import math
from dataclasses import asdict, dataclass, field

_MAX_KEYS = 20


@dataclass
class Steps:
    """How often the optimizer steps, counted as Trainer counts."""

    per_epoch: int
    total: int
    effective_batch: int


def count_steps(
    num_samples: int,
    per_device_batch: int,
    num_devices: int,
    gradient_accumulation: int,
    num_epochs: float,
    max_steps: int = -1,
    drop_last: bool = False,
) -> Steps:
    """Optimizer steps of a run; a last, smaller batch or accumulation counts as a step.

    100 samples, batch 4 on 2 devices with accumulation 3: 25 batches, 13 per device, 5 steps an epoch.
    """
    divide = math.floor if drop_last else math.ceil
    batches_per_device = divide(divide(num_samples / per_device_batch) / num_devices)
    per_epoch = max(math.ceil(batches_per_device / gradient_accumulation), 1)
    total = max_steps if max_steps > 0 else math.ceil(num_epochs * per_epoch)
    return Steps(per_epoch, total, per_device_batch * num_devices * gradient_accumulation)


@dataclass
class Plan:
    """Everything that is known before the first step; printed and saved as train_plan.json."""

    model: str
    output_dir: str
    device: str
    num_devices: int
    precision: str
    data: dict
    eval_data: dict | None
    per_device_batch: int
    gradient_accumulation: int
    effective_batch: int
    num_epochs: float
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    schedule: str
    optimizer: str
    evaluates: str
    saves: str
    early_stopping: str
    modules: dict[str, dict]
    optimizer_groups: list[dict]
    packing: dict | None = None
    eval_packing: dict | None = None
    resumes_from: str | None = None
    visual_cache: str | None = None
    notes: list[str] = field(default_factory=list)

    def mark_estimates(self, note: str | None) -> None:
        """With a note that says why, every count of text tokens becomes "about"."""
        if note:
            self.notes.append(note)
            for data in (self.data, self.eval_data):
                if data:
                    data["is_estimate"] = True

    def to_dict(self) -> dict:
        return asdict(self)

    def render(self) -> str:
        """The plan as lines that people read."""
        lines = [
            ("model", self.model),
            ("output", self.output_dir),
            ("device", f"{self.num_devices} x {self.device}, {self.precision}"),
            ("samples", _describe_data(self.data)),
            *([("packed", _describe_packing(self.packing, self.data))] if self.packing else []),
            *_describe_notable(self.data, "samples"),
            ("evaluation", _describe_data(self.eval_data, self.eval_packing) if self.eval_data else "none"),
            *(_describe_notable(self.eval_data, "evaluation") if self.eval_data else []),
            (
                "batch",
                f"{self.per_device_batch} per device x {self.num_devices} devices x {self.gradient_accumulation} "
                f"accumulated = {self.effective_batch}{' rows' if self.packing else ''}",
            ),
            (
                "steps",
                f"{self.total_steps:,} in all, {self.steps_per_epoch:,} an epoch "
                f"({self.total_steps / self.steps_per_epoch:.2f} epochs), {self.warmup_steps} to warm up, "
                f"{self.schedule}",
            ),
            ("optimizer", self.optimizer),
            *([("visual cache", self.visual_cache)] if self.visual_cache else []),
            ("evaluates", self.evaluates),
            ("saves", self.saves),
            ("stops early", self.early_stopping),
            ("trains", ""),
        ]
        width = max(len(name) for name, _ in lines)
        text = [f"  {name:<{width}}  {value}".rstrip() for name, value in lines]
        for name, counts in self.modules.items():
            share = f"{counts['trained'] / 1e6:,.2f} M of {counts['total'] / 1e6:,.2f} M parameters"
            text.append(f"    {name:<22} {share if counts['trained'] else 'frozen'}")
        for module in dict.fromkeys(group["module"] for group in self.optimizer_groups):
            groups = [group for group in self.optimizer_groups if group["module"] == module]
            # norms and biases do not decay: one module may stand in two groups
            rates, decays = (
                {f"{group[name]:g}": None for group in groups} for name in ("learning_rate", "weight_decay")
            )
            text.append(
                f"    optimizer: {module}, learning rate {' and '.join(rates)}, weight decay {' and '.join(decays)}"
            )
        if self.resumes_from:
            text.append(f"  resumes from {self.resumes_from}")
        text += [f"  note: {note}" for note in self.notes]
        return "\n".join(["The plan", *text])


def _describe_data(data: dict, packing: dict | None = None) -> str:
    about = "about " if data["is_estimate"] else ""
    text = (
        f"{data['num_samples']:,} ({about}{data['total_tokens']:,} tokens, {data['learned_tokens']:,} learned, "
        f"longest {data['longest']:,})"
    )
    if data["num_skipped"]:
        text += f", {data['num_skipped']:,} left out"
    if data["num_shrunk"]:
        text += f", {data['num_shrunk']:,} shrunk to fit"
    if packing:
        text += f", packed in {packing['num_rows']:,} rows"
    return text


def _describe_notable(data: dict, name: str) -> list[tuple[str, str]]:
    """A line for each thing about the rows that somebody may not have meant."""
    lines = []
    if data.get("unused_keys"):
        listed = [f"{key} ({count:,})" for key, count in data["unused_keys"].items()]
        more = f", and {len(listed) - _MAX_KEYS} more" if len(listed) > _MAX_KEYS else ""
        lines.append(f"keys that nothing reads: {', '.join(listed[:_MAX_KEYS])}{more}")
    if data.get("num_empty_thinking"):
        lines.append(f"{data['num_empty_thinking']:,} answers with an empty <think> block, which is not learned")
    if data.get("num_placed"):
        lines.append(f"{data['num_placed']:,} visuals that no text names, put before the first question")
    return [(name, line) for line in lines]


def _describe_packing(packing: dict, data: dict) -> str:
    about = "about " if data["is_estimate"] else ""
    return (
        f"{data['num_samples']:,} samples in {about}{packing['num_rows']:,} rows of up to "
        f"{packing['capacity']:,} tokens, "
        f"fill {100 * packing['fill']:.1f} %, cost spread {100 * packing['cost_spread']:.1f} %"
    )


def optimizer_groups(groups: list[dict]) -> list[dict]:
    """Module, learning rate and weight decay of each group, as the optimizer holds them."""
    return [
        {
            "module": group.get("module", "all"),
            # a schedule keeps the base rate here and the current one, 0 while warming up, in lr
            "learning_rate": group.get("initial_lr", group["lr"]),
            "weight_decay": group["weight_decay"],
        }
        for group in groups
    ]
