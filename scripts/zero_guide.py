"""Writes the guide to ZeRO stages into README.md and src_theo/README.md, from the planner's figures.

python scripts/zero_guide.py            # after a change of the planner or of the shipped configs
python scripts/zero_guide.py --check    # exit code 1 where a page differs (a test calls this)
"""

import argparse
import functools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ovis25.training import build, memory  # noqa: E402
from ovis25.training.config import load_config  # noqa: E402

PAGES = ("README.md", "src_theo/README.md")
BEGIN, END = "<!-- begin: python scripts/zero_guide.py -->", "<!-- end -->"
CONFIGS = {"2B": ("train_config_2b.json", 4), "9B": ("train_config.json", 8)}
DEVICE_MEMORY = "80 GB"
SMALL_MEMORY = "24 GB"

# what each device keeps a share of, and what travels (Rajbhandari et al., ZeRO, SC'20, section 7)
STAGES = {
    "ZeRO-0": ("zero0_cp.json, or no `deepspeed`", "nothing: everything is on every device", "plain data-parallel"),
    "ZeRO-1": ("zero1_cp.json", "optimizer states", "as plain data-parallel: the same volume"),
    "ZeRO-2": ("zero2_cp.json", "and gradients", "as plain data-parallel: the same volume"),
    "ZeRO-3": ("zero3_cp.json", "and weights", "1.5 times the volume: weights are gathered twice a step"),
    "ZeRO-2 offload": (
        "zero2_offload_cp.json", "as ZeRO-2, optimizer states and gradients in host memory",
        "and gradients and weights over PCIe each step; the optimizer runs on the CPU (compiles with g++ once)",
    ),
    "ZeRO-3 offload": (
        "zero3_offload_cp.json", "as ZeRO-3, all of it in host memory",
        "1.5 times the volume, and all weights over PCIe in each pass",
    ),
}  # fmt: skip


@functools.cache
def plan_of(size: str, num_devices: int, device_memory: str = DEVICE_MEMORY) -> memory.MemoryPlan:
    """What the planner says of the shipped config of that size."""
    config = load_config(ROOT / "src_theo" / CONFIGS[size][0])
    return build.memory_plan(config, memory.Machine(num_devices, memory.parse_bytes(device_memory)))


def table() -> list[str]:
    """A row for each stage: GB per device with gradient checkpointing, and the share of the first row."""
    figures = {size: {e.strategy.name: e for e in plan_of(size, num).estimates} for size, (_, num) in CONFIGS.items()}
    heads = [f"{size} on {num}, GB each" for size, (_, num) in CONFIGS.items()]
    lines = [f"| `deepspeed` | each device keeps a share of | {' | '.join(heads)} | speed: what travels |"]
    lines.append("|---|---|---|---|---|")
    for stage, (file, shared, speed) in STAGES.items():
        name, _, more = file.partition(", ")
        label = f"`{name}`" + (f", {more}" if more else "")
        cells = [_memory_cell(figures[size][stage], figures[size]["ZeRO-0"]) for size in CONFIGS]
        lines.append(f"| {label} | {shared} | {' | '.join(cells)} | {speed} |")
    return lines


def _memory_cell(estimate: memory.Estimate, baseline: memory.Estimate) -> str:
    total = estimate.total(checkpointed=True)
    cell = f"{total / 1e9:.1f} ({100 * total / baseline.total(checkpointed=True):.0f} %)"
    return cell + (f" + {estimate.host / 1e9:.0f} on the host" if estimate.host else "")


def advice() -> list[str]:
    """Which stage to take; what fits is asked of the planner."""
    lines = [f"| you have | take, on devices of {DEVICE_MEMORY} |", "|---|---|"]
    for size, counts in (("2B", (1, 4)), ("9B", (1, 4, 8))):
        found = [f"{_recommended(size, num, DEVICE_MEMORY)} on {_devices(num)}" for num in counts]
        lines.append(f"| the {size} | {'; '.join(found)} |")
    found = [
        f"the {size} on {_devices(num)}: {_recommended(size, num, SMALL_MEMORY)}"
        for size, num in (("2B", 1), ("2B", 4), ("9B", 1), ("9B", 8))
    ]
    lines.append(f"| little memory, {SMALL_MEMORY} a device | {'; '.join(found)}; or LoRA |")
    lines.append("| small experiments | none: `--deepspeed null` on one device, with LoRA or `--model_path tiny` |")
    return lines


def _devices(num: int) -> str:
    return "one" if num == 1 else f"{num}"


def _recommended(size: str, num_devices: int, device_memory: str) -> str:
    ways = plan_of(size, num_devices, device_memory).recommendation.ways
    if not ways:
        return "nothing fits"
    sizes = "".join(f", {name} {value:,}" for name, value in ways[0].changes.items())
    return f"{ways[0].strategy}{' with gradient checkpointing' if ways[0].is_checkpointed else ''}{sizes}"


def guide() -> str:
    """The whole block, between its marks."""
    intro = [
        "Several devices share the work by data-parallel alone, or the memory too, as `deepspeed` says; the files lie",
        "in `scripts/zero_configs/`. Memory is what `ovis25 plan` estimates for the shipped configs, with gradient",
        "checkpointing. Speed is the volume of communication that the ZeRO paper gives (arXiv 1910.02054, section 7),",
        "**not measured by us on GPUs**.",
    ]
    rule = [
        "Take the first that fits: a later one shares more, and sends no less. `train_config.json` holds ZeRO-2 for",
        "the 9B, `train_config_2b.json` ZeRO-1. For the largest samples that those configs allow, the planner chooses:",
    ]
    return "\n".join([BEGIN, *intro, "", *table(), "", *rule, "", *advice(), END])


def with_guide(page: str, block: str) -> str:
    """The page with the block in place of the one between the marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks the lines {BEGIN} and {END}")
    return before + block + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; say which pages differ")
    is_check = parser.parse_args().check
    block, num_different = guide(), 0
    for name in PAGES:
        page = (ROOT / name).read_text(encoding="utf-8")
        wanted = with_guide(page, block)
        if page != wanted:
            num_different += 1
            print(f"{name} {'differs: run python scripts/zero_guide.py' if is_check else 'is written anew'}")
            if not is_check:
                (ROOT / name).write_text(wanted, encoding="utf-8")
    return num_different if is_check else 0


if __name__ == "__main__":
    sys.exit(main())
