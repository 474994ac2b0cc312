"""A memory plan as text: what a micro-batch is, a table, the config as it stands, and which way to take."""

import json

from ovis25.training.memory.estimate import Estimate
from ovis25.training.memory.formats import format_bytes
from ovis25.training.memory.plan import MemoryPlan
from ovis25.training.memory.ways import Way

_KIND_NAMES = {"image": "one image", "images": "several images", "video": "a video"}


def render(plan: MemoryPlan) -> str:
    """The plan for people; `MemoryPlan.to_dict` is the same for programs."""
    return "\n".join([*_heading(plan), "", *_table(plan), "", _configured(plan), *_advice(plan)])


def _heading(plan: MemoryPlan) -> list[str]:
    load, machine = plan.workload, plan.machine
    lines = [
        f"{plan.model} on {machine.num_devices} x {format_bytes(machine.device_memory)}",
        f"a micro-batch of at most {load.num_samples} x ({load.num_tokens:,} tokens, {load.num_patches:,} patches, "
        f"{load.num_learned // load.num_samples:,} learned) in {plan.number_format}",
    ]
    if len(plan.patches) > 1:
        parts = ", ".join(f"{_KIND_NAMES[kind]} {number:,}" for kind, number in plan.patches.items())
        lines.append(f"patches: {parts}")
    if plan.chunks.are_reduced:
        lines.append(
            f"on such a device the loss takes {plan.chunks.loss_rows:,} learned tokens at a time, "
            f"the visual head {plan.chunks.visual_tokens:,} visual tokens"
        )
    if plan.optimizer:
        lines.append(f"the optimizer's column is AdamW's, not that of optim {plan.optimizer} (see docs/benchmarks.md)")
    return lines


def _table(plan: MemoryPlan) -> list[str]:
    unit = 1e9 if max(e.total(False) for e in plan.estimates) >= 1e9 else 1e6
    heads = ("GB per device" if unit == 1e9 else "MB per device", "weights", "gradients", "optimizer", "activations",
             "checkpointed", "total", "checkpointed", "host", "fits")  # fmt: skip
    rows = [heads, *(_row(plan, e, unit) for e in plan.estimates)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        row[0].ljust(widths[0])
        + "".join(cell.rjust(width + 2) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]


def _row(plan: MemoryPlan, e: Estimate, unit: float) -> tuple[str, ...]:
    usable = plan.usable
    fits = "yes" if e.total(False) <= usable else "checkpointed" if e.total(True) <= usable else "no"
    if fits != "no" and e.host * plan.machine.num_devices > plan.machine.most_host:
        fits = "host too small"
    parts = (e.weights, e.gradients, e.optimizer, e.activations, e.activations_checkpointed,
             e.total(False), e.total(True), e.host)  # fmt: skip
    return (e.strategy.name, *(f"{part / unit:.1f}" for part in parts), fits)


def _configured(plan: MemoryPlan) -> str:
    way = plan.configured
    does = "fits" if plan.machine.fits(way) else "does not fit"
    return f"the config as it stands: {_name(way)}, {_sizes(way)}: {does}"


def _advice(plan: MemoryPlan) -> list[str]:
    advice, lines = plan.recommendation, []
    if advice.least_full and advice.ways:
        least = advice.least_full
        lines += [
            f"full fine-tuning needs at least {_sizes(least)} ({_name(least)}): {_settings(least.settings)}",
            f"{advice.ways[0].strategy} fits:",
        ]
    for title, way in zip(("recommended", "or"), advice.ways, strict=False):
        lines += [f"{title}: {_settings(way.settings)}", f"  {_sizes(way)}{_costs(way)}"]
    return lines or [
        f"nothing fits into {format_bytes(plan.machine.device_memory)}; the least is {_name(advice.least)}, "
        f"{_sizes(advice.least)}.",
        "Use more devices, or lower multimodal_max_length or single_image_max_pixels",
    ]


def _name(way: Way) -> str:
    return way.strategy + (" with checkpointing" if way.is_checkpointed else "")


def _sizes(way: Way) -> str:
    host = f" and {format_bytes(way.host_bytes)} of host memory" if way.host_bytes else ""
    return f"{format_bytes(way.device_bytes)} per device{host}"


def _costs(way: Way) -> str:
    """What is paid in time, as far as it can be counted."""
    parts = []
    if way.changes:
        parts.append("with " + ", ".join(f"{name} {value:,}" for name, value in way.changes.items()))
    if way.is_checkpointed:
        parts.append(f"{way.compute - 1:.0%} more compute: layers run forward twice")
    if way.is_four_bit:
        parts.append("weights are unpacked from 4 bits in every pass")
    if way.stage == 3:
        parts.append("weights are gathered in every pass")
    if way.transferred:
        parts.append(f"{format_bytes(way.transferred)} cross to the host and back in each step")
    if way.each_pass:
        parts.append(f"{format_bytes(way.each_pass)} in each micro-batch")
    return "; " + "; ".join(parts) if parts else ""


def _settings(settings: dict) -> str:
    return json.dumps(settings)[1:-1]
