"""Training steps of the released shapes with random weights: a packed row of eight images and text.

Useful work is what the model's mathematics needs (`forward_flops` of train_step.py): nothing that is computed again
counts. A trained weight costs three forward passes, a frozen one with gradients behind it two, else one.
"""

import copy
import functools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from gpu_run import DTYPE, Mark, Run
from torch import nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity
from torch.utils.checkpoint import checkpoint
from train_step import forward_flops, quarter_config

from ovis25 import Ovis2_5, Ovis2_5_Config
from ovis25.constants import IGNORE_INDEX, IMAGE_BEGIN_ID, IMAGE_END_ID, VISUAL_ATOM_ID
from ovis25.model.adapter import AdapterSettings, add_adapter
from ovis25.training.memory import released_config

TARGETS = {"2B": 0.40, "9B": 0.45}
_RECOMPUTED = {(): "nothing", ("vision",): "vision", ("llm",): "llm", ("vision", "llm"): "both"}


@dataclass(frozen=True)
class Variant:
    """One way to take a step; `recomputed` names the towers under gradient checkpointing.

    `optimizer`: "adamw" (fused, states in the weights' dtype) or "adafactor".
    `float32_adapter`: as the trainer keeps an adapter, with autocast around the step.
    """

    recomputed: tuple[str, ...] = ()
    is_compiled: bool = False
    optimizer: str = "adamw"
    float32_adapter: bool = False

    @property
    def labels(self) -> dict[str, str]:
        return {
            "layers": "compiled" if self.is_compiled else "eager",
            "recomputed": _RECOMPUTED[self.recomputed],
            "optimizer": self.optimizer + (", float32 adapter" if self.float32_adapter else ""),
        }


VISION, LLM, BOTH = ("vision",), ("llm",), ("vision", "llm")
VARIANTS = {
    "train-2b": (
        Variant(), Variant(is_compiled=True), Variant(VISION), Variant(VISION, is_compiled=True), Variant(BOTH),
        Variant(LLM),
    ),
    "lora-9b": (Variant(), Variant(is_compiled=True), Variant(LLM), Variant(float32_adapter=True)),
    "train-9b": (
        Variant(BOTH, optimizer="adafactor"), Variant(VISION, optimizer="adafactor"), Variant(BOTH),
        Variant(VISION, is_compiled=True, optimizer="adafactor"),
    ),
}  # fmt: skip


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tiny_config() -> Ovis2_5_Config:
    """The released head sizes; narrow, and with few words."""
    config = quarter_config(True)
    config.llm_config.vocab_size, config.visual_vocab_size = 4096, 1028
    return config


def build_model(run: Run, size: str, num_layers: int | None = None) -> Ovis2_5:
    """A released size with random weights, made on the device; `num_layers` cuts both towers."""
    config = tiny_config() if run.is_small else released_config(size)
    if num_layers is not None:
        config = copy.deepcopy(config)
        config.vit_config.num_hidden_layers = config.llm_config.num_hidden_layers = num_layers
        config.llm_config.layer_types = config.llm_config.layer_types[:num_layers]
    torch.manual_seed(0)
    with default_dtype(DTYPE), run.device:
        return Ovis2_5(config)


def small_depth(run: Run) -> Ovis2_5:
    return build_model(run, "2B", num_layers=2)


def packed_row(
    config: Ovis2_5_Config, num_samples: int, side: int, num_text: int, device: torch.device
) -> tuple[list[dict], dict]:
    """(samples as the dataset gives them, the row that they make): an image of side^2 patches, then learned text."""
    generator = torch.Generator().manual_seed(0)
    num_visual = side * side // config.vit_config.hidden_stride**2
    items = []
    for _ in range(num_samples):
        text = torch.randint(config.llm_config.vocab_size, (num_text,), generator=generator)
        image = torch.tensor([IMAGE_BEGIN_ID, *[VISUAL_ATOM_ID] * num_visual, IMAGE_END_ID])
        items.append({
            "input_ids": torch.cat([image, text]),
            "labels": torch.cat([torch.full_like(image, IGNORE_INDEX), text]),
            "pixel_values": torch.randint(256, (side * side, 768), generator=generator, dtype=torch.uint8),
            "grid_thws": torch.tensor([[1, side, side]]),
        })  # fmt: skip
    row = {name: torch.cat([item[name] for item in items]).to(device) for name in items[0]}
    lengths = [len(item["input_ids"]) for item in items]
    row |= {"input_ids": row["input_ids"][None], "labels": row["labels"][None]}
    row["position_ids"] = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    row["sequence_lengths"] = torch.tensor(lengths)
    return items, row


def measured_row(run: Run, config: Ovis2_5_Config) -> tuple[list[dict], dict]:
    """8192 tokens: eight times 896^2 pixels and 238 words."""
    shape = {"num_samples": 2, "side": 8, "num_text": 16} if run.is_small else {
        "num_samples": 8, "side": 56, "num_text": 238,
    }  # fmt: skip
    return packed_row(config, **shape, device=run.device)


def useful_tflop(config: Ovis2_5_Config, items: list[dict], is_lora: bool) -> float:
    total = sum(forward_flops(config, item) for item in items)
    if not is_lora:
        return 3 * total / 1e12
    llm = sum(forward_flops(config, {**item, "grid_thws": None}) for item in items)
    shapes = config.llm_config
    width = shapes.num_hidden_layers * shapes.num_attention_heads * shapes.head_dim
    attention = sum(2 * width * len(item["input_ids"]) ** 2 for item in items)
    # attention has no weights: its backward pass is whole
    return (total - llm + 2 * llm + attention) / 1e12


@dataclass
class Task:
    """A model to train (`trained` is `model`, or its adapter), the packed row, and the useful work of one step."""

    size: str
    model: Ovis2_5
    trained: nn.Module
    items: list[dict]
    row: dict
    tflop: float


def make_task(run: Run, size: str, is_lora: bool) -> Task:
    model = trained = build_model(run, size).train()
    items, row = measured_row(run, model.config)
    if is_lora:
        trained = add_adapter(model, AdapterSettings(base=f"AIDC-AI/Ovis2.5-{size}"), keep_dtype=True)
    return Task(size, model, trained, items, row, useful_tflop(model.config, items, is_lora))


def measure_training(run: Run, section: str) -> None:
    """Every variant of `VARIANTS[section]`, on one model; after the first two, where a 2B's time goes."""
    kind, size = section.split("-")
    task = make_task(run, size.upper(), kind == "lora")
    exhausted: set[tuple[str, ...]] = set()
    for position, variant in enumerate(VARIANTS[section]):
        obstacle = "out of memory before" if variant.recomputed in exhausted else None
        if measure_variant(run, task, variant, obstacle)["status"] == "out of memory":
            exhausted.add(variant.recomputed)
        if section == "train-2b" and position == 1:
            measure_towers(run, task)
            profile(run, task, Variant(VISION) if () in exhausted else Variant())


def measure_variant(run: Run, task: Task, variant: Variant, obstacle: str | None) -> dict:
    run.clear()

    def figures() -> dict:
        with prepared(run, task, variant):
            return _step_figures(run, task, variant)

    row = run.measure(
        {"model": task.size, **variant.labels, "target_mfu": TARGETS[task.size]},
        figures,
        needs_s=60 if variant.is_compiled else 15,
        needs_gb=least_gb(task, variant.optimizer),
        obstacle=obstacle,
    )
    _drop_gradients(task.trained)
    return row


@contextmanager
def prepared(run: Run, task: Task, variant: Variant) -> Iterator[None]:
    """Layers recomputed and compiled as the variant says, and nothing of it afterwards."""
    towers = {"vision": task.model.visual_tokenizer.vit.vision_model.encoder.layers, "llm": task.model.llm.model.layers}
    if task.trained is not task.model:
        _cast_trained(task.trained, torch.float32 if variant.float32_adapter else DTYPE)
    for name, layers in towers.items():
        for layer in layers:
            layer.gradient_checkpointing = name in variant.recomputed
            layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
            if variant.is_compiled:
                # what is traced is the same on a CPU, whose compiler takes a minute
                layer.compile(dynamic=False, backend="aot_eager" if run.is_small else "inductor")
    try:
        yield
    finally:
        for layer in (layer for layers in towers.values() for layer in layers):
            layer.gradient_checkpointing, layer._compiled_call_impl = False, None


def _cast_trained(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def make_optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    return torch.optim.Adafactor(parameters, lr=1e-5, foreach=False)


def _step_figures(run: Run, task: Task, variant: Variant) -> dict:
    counters.clear()
    model, row, optimizer = task.trained, task.row, make_optimizer(task.trained, variant.optimizer)
    autocast = torch.autocast(run.device.type, DTYPE) if variant.float32_adapter else nullcontext()
    losses = []

    def step() -> list[Mark]:
        marks = [Mark(run.device)]
        with autocast:
            loss = model(**row).loss
        marks.append(Mark(run.device))
        loss.backward()
        marks.append(Mark(run.device))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        return [*marks, Mark(run.device)]

    start = time.monotonic()
    step()
    step()
    run.synchronize()
    warm_up_s = time.monotonic() - start
    steps = [step() for _ in range(1 if run.is_small else 5)]
    run.synchronize()
    forward, backward, update, whole = (
        statistics.median(marks[end].ms_since(marks[begin]) for marks in steps)
        for begin, end in ((0, 1), (1, 2), (2, 3), (0, 3))
    )
    return {
        **run.shares(task.tflop, whole),
        "step_ms": whole, "forward_ms": forward, "backward_ms": backward, "optimizer_ms": update,
        "tokens_per_s": row["input_ids"].numel() / whole * 1e3,
        "peak_gb": run.peak_gb(), "warm_up_s": warm_up_s, "loss": losses[0].item(), "useful_tflop": task.tflop,
        "graphs": counters["stats"]["unique_graphs"], "graph_breaks": sum(counters["graph_break"].values()),
    }  # fmt: skip


def _drop_gradients(model: nn.Module) -> None:
    """What a failed step has left."""
    for parameter in model.parameters():
        parameter.grad = None


def least_gb(task: Task, optimizer: str) -> float:
    """10^9 bytes below which no step is possible: weights, gradients, optimizer states and the layers' inputs."""
    learned = sum(parameter.nbytes for parameter in task.trained.parameters() if parameter.requires_grad)
    static = sum(parameter.nbytes for parameter in task.trained.parameters())
    static += learned * (3 if optimizer == "adamw" else 1)
    vit, llm = task.model.config.vit_config, task.model.config.llm_config
    inputs = llm.num_hidden_layers * llm.hidden_size * task.row["input_ids"].numel()
    if task.trained is task.model:
        inputs += vit.num_hidden_layers * vit.hidden_size * len(task.row["pixel_values"])
    return (static + inputs * DTYPE.itemsize) / 1e9


def measure_towers(run: Run, task: Task) -> None:
    """Forward and backward passes of each half alone, nothing recomputed."""
    model, row = task.model, task.row
    llm_flops = sum(forward_flops(model.config, {**item, "grid_thws": None}) for item in task.items)
    vision_tflop = task.tflop - 3 * llm_flops / 1e12
    with torch.no_grad():
        embeds = model.get_inputs_embeds(row["input_ids"], row["pixel_values"], row["grid_thws"])
    embeds.requires_grad_()
    packing = {name: row[name] for name in ("labels", "position_ids", "sequence_lengths")}

    def vision() -> torch.Tensor:
        return model.get_visual_embeddings(row["pixel_values"], row["grid_thws"]).sum()

    def llm() -> torch.Tensor:
        return model(inputs_embeds=embeds, **packing).loss

    for name, forward, tflop in (("vision", vision, vision_tflop), ("llm", llm, 3 * llm_flops / 1e12)):
        run.clear()
        labels = {"model": f"{task.size}, {name} alone", "layers": "eager", "recomputed": "nothing"}
        run.measure(labels, functools.partial(_tower_figures, run, model, forward, tflop), needs_s=10)
        _drop_gradients(model)


def _tower_figures(run: Run, model: Ovis2_5, forward, tflop: float) -> dict:
    with torch.no_grad():
        forward_ms = run.milliseconds(forward, repeats=5)

    def both() -> None:
        forward().backward()
        _drop_gradients(model)

    both_ms = run.milliseconds(both, repeats=5)
    return {
        **run.shares(tflop, both_ms), "step_ms": both_ms, "forward_ms": forward_ms,
        "backward_ms": both_ms - forward_ms, "peak_gb": run.peak_gb(),
    }  # fmt: skip


def profile(run: Run, task: Task, variant: Variant) -> None:
    """The kernels of one pass forward and back that take longest, each as a row."""
    run.clear()
    attribute, kind = (
        ("self_device_time_total", ProfilerActivity.CUDA)
        if run.device.type == "cuda"
        else ("self_cpu_time_total", ProfilerActivity.CPU)
    )

    def figures() -> dict:
        with prepared(run, task, variant):
            task.model(**task.row).loss.backward()
            _drop_gradients(task.model)
            with torch.profiler.profile(activities=[kind]) as profiler:
                task.model(**task.row).loss.backward()
                run.synchronize()
        times = [(getattr(event, attribute) / 1e3, event) for event in profiler.key_averages()]
        total = sum(ms for ms, _ in times)
        run.rows += [
            {"kernel": event.key[:70], "calls": event.count, "ms": ms, "share": ms / total, "status": "ok"}
            for ms, event in sorted(times, key=lambda pair: pair[0], reverse=True)[:15]
        ]
        return {"step_ms": total}

    labels = {"model": f"{task.size}, profiled", **variant.labels, "optimizer": None}
    run.measure(labels, figures, needs_s=15)
    _drop_gradients(task.model)
