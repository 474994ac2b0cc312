"""`ovis25 plan`: what every way to train takes of a device's memory."""

import argparse
import json

import psutil
import torch

from ovis25.cli.command import Command
from ovis25.cli.library_errors import LIBRARY_ERRORS
from ovis25.cli.quiet import quieten
from ovis25.training import build, memory
from ovis25.training.config import ConfigError, load_config

# planned for where there is no GPU to ask
_USUAL_DEVICE = 80 * 10**9
_LEAST_DEVICE = 10**9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a JSON file; any setting can be overridden: --key value")
    parser.add_argument("--devices", type=int, default=1, help="GPUs in all (default: 1)")
    parser.add_argument("--device-memory", help="of each, like 80GB or 24GiB (default: this machine's GPU, or 80GB)")
    parser.add_argument(
        "--host-memory", help="of a machine of up to 8 devices (default: 128GB, or this machine's with its own GPU)"
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=memory.KINDS, default=memory.KINDS, help="what the data hold (default: all)"
    )
    parser.add_argument("--full", action="store_true", help="with LoRA configs: compare full fine-tuning too")
    parser.add_argument("--float32", action="store_true", help="train in float32 instead of bfloat16")
    parser.add_argument("--json", action="store_true", help="print all numbers as one JSON object, in bytes")
    parser.usage = (
        "%(prog)s CONFIG [--devices N] [--device-memory AMOUNT] [--host-memory AMOUNT] [--kinds KIND ...]\n"
        "                   [--full] [--float32] [--json] [--key value ...]"
    )


def run(parsed: argparse.Namespace, options: list[str]) -> int:
    quieten()
    if parsed.devices < 1:
        raise ConfigError(f"--devices is {parsed.devices}; it must be at least 1")
    config = load_config(parsed.config, options)
    build.check_plannable(config)
    plan = build.memory_plan(config, _machine(parsed), parsed.float32, tuple(parsed.kinds), parsed.full)
    print(json.dumps(plan.to_dict(), indent=2) if parsed.json else memory.render(plan))
    return 0


def _machine(parsed: argparse.Namespace) -> memory.Machine:
    """The machine asked about: this one, where nothing is said and it has a GPU."""
    is_here = parsed.device_memory is None and torch.cuda.is_available()
    device, host = _USUAL_DEVICE, memory.TYPICAL_HOST
    if is_here:
        device, host = torch.cuda.get_device_properties(0).total_memory, psutil.virtual_memory().total
    if parsed.device_memory is not None:
        device = _amount("--device-memory", parsed.device_memory)
    if parsed.host_memory is not None:
        host = _amount("--host-memory", parsed.host_memory)
    return memory.Machine(parsed.devices, device, host)


def _amount(name: str, text: str) -> int:
    number = memory.parse_bytes(text)
    if number < _LEAST_DEVICE:
        hint = f"; did you mean {text.strip()}GB?" if text.strip().isdigit() else ""
        raise ConfigError(f"{name} is {text!r}, which is less than any device has (1GB){hint}")
    return number


COMMAND = Command(
    add_arguments,
    run,
    "Say what each ZeRO stage, LoRA and QLoRA take of a device's memory, and recommend the settings.\n"
    "Counted for the largest micro-batch that the config allows: images, videos and text as long as it lets them be.\n"
    "No GPU is needed, and no weights are loaded.",
    lambda program: (
        "examples:\n"
        "  ovis25 plan src_theo/train_config.json --devices 4 --device-memory 80GB\n"
        "  ovis25 plan src_theo/lora/train_config_lora.json --device-memory 24GB --kinds image text"
    ),
    user_errors=(ValueError, *LIBRARY_ERRORS),
)
