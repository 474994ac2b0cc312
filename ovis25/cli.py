"""The command line: `ovis25 COMMAND`; the scripts in `src_theo/` call the same functions."""

import argparse
import os
import sys
import textwrap
import warnings
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from ovis25 import __version__
from ovis25.data import DataError
from ovis25.inference import Ovis25Inference
from ovis25.inference.merge import merge_adapter
from ovis25.tiny.exam import print_exam, run_exam
from ovis25.training import build, memory
from ovis25.training.build import is_main_process
from ovis25.training.config import OWN_KEYS, ConfigError, TrainConfig, load_config
from ovis25.training.run import train

# what the user can mend: shown as one message, without a stack
_USER_ERRORS = (ConfigError, DataError, FileNotFoundError, FloatingPointError)
_EXAM_BATCH = 64


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for what the user can mend, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="ovis25", description="Train and run Ovis2.5.")
    parser.add_argument("--version", action="version", version=f"ovis25 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train_arguments(
        commands.add_parser(
            "train",
            help="fine-tune a checkpoint",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            description=_TRAIN_DESCRIPTION,
            epilog=_train_help(),
        )
    )
    _add_plan_arguments(commands.add_parser("plan", help="memory of every way to train, per device", **_PLAN_TEXTS))
    _add_merge_arguments(commands.add_parser("merge", help="merge a LoRA adapter into its base", **_MERGE_TEXTS))
    parsed, overrides = parser.parse_known_args(arguments)
    if parsed.command == "train":
        return _run_train(parsed, overrides)
    if parsed.command == "plan":
        return _run_plan(parsed, overrides)
    if overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    return _run_merge(parsed)


def train_main(arguments: list[str] | None = None, **fixed) -> int:
    """The documented doors `src_theo/train_theo.py CONFIG [--key value ...]` and its sisters.

    `fixed` are the settings that make the door: recipe="trl", use_lora=True.
    """
    parser = argparse.ArgumentParser(
        prog=Path(sys.argv[0]).name,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_TRAIN_DESCRIPTION,
        epilog=_train_help(),
    )
    _add_train_arguments(parser)
    parsed, overrides = parser.parse_known_args(arguments)
    return _run_train(parsed, [*overrides, *(f"--{name}={value}" for name, value in fixed.items())])


def merge_main(arguments: list[str] | None = None) -> int:
    """The documented door `src_theo/lora/merge_lora_adapters.py --adapter_path A --output_path B`."""
    parser = argparse.ArgumentParser(prog="merge_lora_adapters.py", **_MERGE_TEXTS)
    _add_merge_arguments(parser)
    return _run_merge(parser.parse_args(arguments))


_MERGE_TEXTS = {
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "description": "Merge a LoRA adapter into its base, check the result, and write a folder like a released one.",
    "epilog": "example:\n  merge_lora_adapters.py --adapter_path output/ovis2_5_lora --output_path output/merged",
}


def _add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter_path", required=True, metavar="A", help="the adapter's folder")
    parser.add_argument("--output_path", required=True, metavar="B", help="the merged folder; must not exist yet")
    parser.add_argument("--base", help="the base model, where the adapter's own name for it does not lead there")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the merged weights")


def _run_merge(parsed: argparse.Namespace) -> int:
    _quieten()
    dtype = getattr(torch, parsed.dtype) if parsed.dtype else None
    try:
        print(merge_adapter(parsed.adapter_path, parsed.output_path, parsed.base, dtype).render())
        return 0
    except (FileNotFoundError, ValueError) as error:
        if os.environ.get("OVIS25_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


_PLAN_TEXTS = {
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "description": "Estimate the memory that each ZeRO stage, LoRA and QLoRA take, and recommend the settings.\n"
    "One micro-batch of samples as long as the config allows, with one image as large as it allows.",
    "epilog": "example:\n  ovis25 plan src_theo/train_config.json --devices 4 --device-memory 80GB",
}


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a JSON file; any setting can be overridden: --key value")
    parser.add_argument("--devices", type=int, default=1, help="GPUs in all (default: 1)")
    parser.add_argument("--device-memory", default="80GB", help="of each, like 80GB or 24GiB (default: 80GB)")
    parser.add_argument("--float32", action="store_true", help="train in float32 instead of bfloat16")


def _run_plan(parsed: argparse.Namespace, overrides: list[str]) -> int:
    _quieten()
    try:
        if parsed.devices < 1:
            raise ConfigError(f"--devices is {parsed.devices}; it must be at least 1")
        config = load_config(parsed.config, overrides)
        print(build.memory_plan(config, parsed.devices, memory.parse_bytes(parsed.device_memory), parsed.float32))
        return 0
    except (*_USER_ERRORS, ValueError) as error:
        if os.environ.get("OVIS25_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


_TRAIN_DESCRIPTION = "Fine-tune an Ovis2.5 checkpoint as a config file says. Start it again to resume it."


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a JSON file, for example train_config_tiny.json")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.usage = "%(prog)s CONFIG [--dry-run] [--key value ...]"


def _train_help() -> str:
    keys = "\n".join(f"  {name:<26} {field.metadata['help']}" for name, field in OWN_KEYS.items())
    return (
        textwrap.dedent(
            """\
        any setting of the config can be overridden: --key value

        example:
          python train_theo.py train_config_tiny.json --max_steps 20 --output_dir output/try

        own settings (every name of transformers' TrainingArguments is a setting too):
        """
        )
        + keys
    )


def _run_train(parsed: argparse.Namespace, overrides: list[str]) -> int:
    _quieten()
    config: TrainConfig | None = None
    try:
        config = load_config(parsed.config, overrides)
        results = train(config, dry_run=parsed.dry_run)
        if config.exam and results and is_main_process():
            hold_exam(config.output_dir)
        return 0
    except KeyboardInterrupt:
        if is_main_process():
            print("\ninterrupted; the same command goes on from the last complete checkpoint", file=sys.stderr)
        return 130
    except _USER_ERRORS as error:
        if os.environ.get("OVIS25_DEBUG"):
            raise
        if is_main_process():
            print(f"error: {error}", file=sys.stderr)
        return 2


def hold_exam(model_path: str) -> dict:
    """Let a tiny model answer held-out questions and print how it did."""
    engine = Ovis25Inference(model_path)

    def answer(requests: list[dict]) -> list[str]:
        replies = []
        for start in range(0, len(requests), _EXAM_BATCH):
            batch = requests[start : start + _EXAM_BATCH]
            limit = max(request["max_new_tokens"] for request in batch)
            fields = [{k: r[k] for k in ("prompt", "images", "enable_thinking")} for r in batch]
            greedy = {"do_sample": False, "repetition_penalty": 1.0}
            found = engine.replies(fields, len(batch), max_new_tokens=limit, **greedy)
            replies += [reply.text for reply in found]
        return replies

    results = run_exam(answer)
    print_exam(results)
    print(f"The checkpoint lies in {model_path}")
    return results


def _quieten() -> None:
    """Our own lines instead of transformers' bars and notices; errors stay."""
    if not os.environ.get("OVIS25_DEBUG"):
        # what other libraries will have to change one day
        warnings.filterwarnings("ignore", category=FutureWarning)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
