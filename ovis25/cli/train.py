"""`ovis25 train`, and the documented scripts that train."""

import argparse
import dataclasses

from ovis25.cli.command import Command
from ovis25.cli.exam import hold_exam
from ovis25.cli.library_errors import LIBRARY_ERRORS
from ovis25.cli.quiet import quieten
from ovis25.data.digits import parse_source
from ovis25.ranks import is_main_process
from ovis25.training import finish
from ovis25.training.config import OWN_KEYS, TRAINER_KEYS, load_config
from ovis25.training.config.trainer_keys import default_of
from ovis25.training.run import train

# of TrainingArguments, those that most runs set; None: chosen for the run, as the text says
_TRAINER_HELP = {
    "num_train_epochs": "passes over the data",
    "max_steps": "optimizer steps, in place of epochs; -1: as many as the epochs have",
    "per_device_train_batch_size": "samples a device takes at a time (with packing: rows, 1 by default)",
    "gradient_accumulation_steps": "such batches for one optimizer step",
    "learning_rate": "the highest, for what train_modules gives none of its own",
    "lr_scheduler_type": "linear, cosine, constant_with_warmup, ...",
    "warmup_steps": "steps to warm up; below 1 a share of the run",
    "weight_decay": "not for norms and biases",
    "max_grad_norm": "gradients are clipped to this norm",
    "gradient_checkpointing": "a third more computing for much less memory (default: false)",
    "bf16": "mixed precision in bfloat16 (default: where the device has it)",
    "deepspeed": "a ZeRO config of scripts/zero_configs/, or null (default: null)",
    "eval_steps": "steps between evaluations (default: a tenth of the run, with an evaluation set)",
    "save_steps": "steps between checkpoints (default: as eval_steps, without evaluation set a quarter of the run)",
    "save_total_limit": "checkpoints that are kept",
    "logging_steps": "steps between progress lines",
    "dataloader_num_workers": "processes that read samples (default: at most 8, by the cores of the machine)",
    "seed": "of weights that are made anew, order of samples, dropout",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a JSON file, for example train_config_tiny.json")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.usage = "%(prog)s CONFIG [--dry-run] [--key value ...]"


def run(parsed: argparse.Namespace, options: list[str]) -> int:
    quieten()
    config = load_config(parsed.config, options)
    results = train(config, dry_run=parsed.dry_run)
    finish.leave_processes()
    if config.exam and results and is_main_process():
        with finish.after_saving("exam", config.output_dir):
            hold_exam(config.output_dir, parse_source(config.data_path).kinds)
    return 0


def _epilog(program: str) -> str:
    own = {name: f"{field.metadata['help']}{_default(field)}" for name, field in OWN_KEYS.items()}
    trainer = {
        name: f"{text}{'' if 'default:' in text else f' (default: {_as_json(default_of(name))})'}"
        for name, text in _TRAINER_HELP.items()
        # newer transformers renamed one; the old name is understood
        if name in TRAINER_KEYS or name == "gradient_checkpointing"
    }
    return (
        "any setting of the config can be overridden: --key value\n\n"
        f"example:\n  {program} train_config_tiny.json --max_steps 20 --output_dir output/try\n\n"
        f"own settings:\n{_listed(own)}\n\n"
        f"every name of transformers' TrainingArguments is a setting too, above all:\n{_listed(trainer)}"
    )


def _listed(texts: dict[str, str]) -> str:
    width = max(map(len, texts))
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in texts.items())


def _as_json(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(getattr(value, "value", value))


def _default(setting: dataclasses.Field) -> str:
    """` (default: ...)`, where the setting has one and its help does not say it already."""
    value = setting.default
    if value is None or value == "" or "default" in setting.metadata["help"]:
        return ""
    return f" (default: {_as_json(value)})"


COMMAND = Command(
    add_arguments,
    run,
    "Fine-tune an Ovis2.5 checkpoint as a config file says. Start it again to resume it.",
    _epilog,
    interrupted="interrupted; the same command goes on from the last complete checkpoint",
    # a ValueError that is no UserError is a fault of this program, and keeps its stack
    user_errors=LIBRARY_ERRORS,
)
