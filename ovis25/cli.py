"""The command line: `ovis25 COMMAND`; the scripts in `src_theo/` call the same functions."""

import argparse
import dataclasses
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch
from huggingface_hub.utils import enable_progress_bars
from PIL import Image
from transformers.utils import logging as transformers_logging

from ovis25 import __version__
from ovis25.data import DataError
from ovis25.inference import Ovis25Inference, RequestError
from ovis25.inference.checks import check_whole
from ovis25.inference.grounding import COORDINATES, GROUNDING_PROMPTS
from ovis25.inference.request import make_request
from ovis25.inference.requests_file import answer_file, json_text, reply_record
from ovis25.inference.terminal import HELP, named_file, print_stream, run_chat, speak_utf8
from ovis25.merge import merge_adapter
from ovis25.text import escape_controls
from ovis25.tiny.exam import print_exam, run_exam
from ovis25.tiny.strips import KINDS, parse_source
from ovis25.tools import BUILT_IN, toolbox
from ovis25.training import build, finish, memory
from ovis25.training.build import is_main_process
from ovis25.training.config import OWN_KEYS, TRAINER_KEYS, ConfigError, TrainConfig, load_config
from ovis25.training.config.trainer_keys import default_of
from ovis25.training.run import train

# what the user can mend: shown as one message, without a stack
_USER_ERRORS = (ConfigError, DataError, FileNotFoundError, FloatingPointError)
_EXAM_BATCH = 64
_DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for what the user can mend, 130 when interrupted, 3 for a run whose
    model is saved, but whose curves or exam failed.
    """
    parser = argparse.ArgumentParser(prog="ovis25", description="Train and run Ovis2.5.")
    parser.add_argument("--version", action="version", version=f"ovis25 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train_arguments(
        commands.add_parser(
            "train",
            help="fine-tune a checkpoint",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            description=_TRAIN_DESCRIPTION,
            epilog=_train_help("ovis25 train"),
        )
    )
    _add_plan_arguments(commands.add_parser("plan", help="memory of every way to train, per device", **_PLAN_TEXTS))
    _add_merge_arguments(commands.add_parser("merge", help="merge a LoRA adapter into its base", **_MERGE_TEXTS))
    _add_infer_arguments(commands.add_parser("infer", help="ask a model, once or from a file", **_INFER_TEXTS))
    _add_chat_arguments(commands.add_parser("chat", help="talk to a model in the terminal", **_CHAT_TEXTS))
    parsed, overrides = parser.parse_known_args(arguments)
    if parsed.command == "train":
        return _run_train(parsed, overrides)
    if parsed.command in ("infer", "chat"):
        return _run_inference(parsed, overrides)
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
        epilog=_train_help(f"python {Path(sys.argv[0]).name}"),
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
    "epilog": "example, in src_theo/lora/:\n"
    "  python merge_lora_adapters.py --adapter_path output/ovis2_5_lora --output_path output/merged",
}


def _add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter_path", required=True, metavar="A", help="the adapter's folder")
    parser.add_argument("--output_path", required=True, metavar="B", help="the merged folder; must not exist yet")
    _add_base_arguments(parser)
    parser.add_argument("--dtype", choices=_DTYPES, help="of the merged weights (default: the base's)")


def _add_base_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", help="an adapter's base, where the adapter's own name for it does not lead there")
    parser.add_argument(
        "--anyway", action="store_true", help="take a base with other weights than those the adapter was trained on"
    )


def _run_merge(parsed: argparse.Namespace) -> int:
    _quieten()
    dtype = getattr(torch, parsed.dtype) if parsed.dtype else None
    try:
        report = merge_adapter(parsed.adapter_path, parsed.output_path, parsed.base, dtype, not parsed.anyway)
        print(report.render())
        return 0
    except (FileNotFoundError, ValueError) as error:
        if os.environ.get("OVIS25_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


_PLAN_TEXTS = {
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "description": "Say what each ZeRO stage, LoRA and QLoRA take of a device's memory, and recommend the settings.\n"
    "Counted for the largest micro-batch that the config allows: images, videos and text as long as it lets them be.\n"
    "No GPU is needed, and no weights are loaded.",
    "epilog": "examples:\n"
    "  ovis25 plan src_theo/train_config.json --devices 4 --device-memory 80GB\n"
    "  ovis25 plan src_theo/lora/train_config_lora.json --device-memory 24GB --kinds image text",
}
# planned for where there is no GPU to ask
_USUAL_DEVICE = 80 * 10**9


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
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


def _run_plan(parsed: argparse.Namespace, overrides: list[str]) -> int:
    _quieten()
    try:
        if parsed.devices < 1:
            raise ConfigError(f"--devices is {parsed.devices}; it must be at least 1")
        config = load_config(parsed.config, overrides)
        plan = build.memory_plan(config, _machine(parsed), parsed.float32, tuple(parsed.kinds), parsed.full)
        print(json.dumps(plan.to_dict(), indent=2) if parsed.json else memory.render(plan))
        return 0
    except (*_USER_ERRORS, ValueError) as error:
        if os.environ.get("OVIS25_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _machine(parsed: argparse.Namespace) -> memory.Machine:
    """The machine asked about: this one, where nothing is said and it has a GPU."""
    is_here = parsed.device_memory is None and torch.cuda.is_available()
    device, host = _USUAL_DEVICE, memory.TYPICAL_HOST
    if is_here:
        device, host = torch.cuda.get_device_properties(0).total_memory, psutil.virtual_memory().total
    if parsed.device_memory is not None:
        device = memory.parse_bytes(parsed.device_memory)
    if parsed.host_memory is not None:
        host = memory.parse_bytes(parsed.host_memory)
    return memory.Machine(parsed.devices, device, host)


_INFER_TEXTS = {
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "description": "Ask a model. The answer goes to the standard output, thinking and tool calls to the standard\n"
    "error. Generation arguments of transformers are options too: --temperature 0 --top_p 0.9; and the\n"
    "engine's: --max_new_tokens N (default: 1024), --max_pixels N, --num_frames N (default: as trained).\n"
    "With --requests, a file of requests (JSON Lines: prompt, image, images, video, enable_thinking, ...) is\n"
    "answered in batches, a line's own generation arguments win; the same command goes on where it stopped.",
    "epilog": "examples:\n"
    '  ovis25 infer output/tiny --image strip.png --prompt "Read the digits." --think --budget 64\n'
    "  ovis25 infer output/tiny --requests requests.jsonl --output replies.jsonl",
}
_CHAT_TEXTS = {
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "description": "Talk to a model. Commands inside:\n\n" + HELP,
    "epilog": "example:\n  ovis25 chat output/tiny --think",
}


def _add_infer_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model_arguments(parser)
    parser.add_argument("--prompt", help="the question")
    parser.add_argument("--image", action="append", default=[], help="a file, address or data: URL; may be repeated")
    parser.add_argument("--video", help="a file")
    parser.add_argument("--ground", choices=list(GROUNDING_PROMPTS), help="ask where it is, in the one --image")
    parser.add_argument("--coordinates", choices=COORDINATES, help="with --ground: the model's unit (default: shares)")
    parser.add_argument("--draw", metavar="PNG", help="with --ground: write the picture with what was found")
    parser.add_argument("--json", action="store_true", help="print the whole reply as one JSON object")
    parser.add_argument("--requests", metavar="JSONL", help="a file of requests instead of --prompt")
    parser.add_argument("--output", metavar="JSONL", help="with --requests: where the replies go")
    parser.add_argument(
        "--batch_size",
        type=int,
        default=8,
        help="with --requests: so many at once, at least 1 (default: 8)",
    )


def _add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model_arguments(parser)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder, an adapter's folder, a hub name, or tiny")
    parser.add_argument("--think", action="store_true", help="think before answering")
    parser.add_argument("--budget", type=int, metavar="N", help="end the thinking after N tokens; implies --think")
    parser.add_argument("--tools", nargs="*", metavar="NAME", help=f"tools it may call, of {', '.join(BUILT_IN)}")
    parser.add_argument("--system", help="a system prompt (default: none)")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable (default: none)")
    parser.add_argument("--device", help="cuda, cpu, ... (default: the GPU where there is one)")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights (default: bfloat16, on a CPU float32)")
    _add_base_arguments(parser)


def _run_inference(parsed: argparse.Namespace, overrides: list[str]) -> int:
    _quieten()
    speak_utf8()
    try:
        options = {"system": parsed.system} if parsed.system else {}
        if parsed.think or parsed.budget is not None:
            options["enable_thinking"] = True
        if parsed.budget is not None:
            options["thinking_budget"] = parsed.budget
        if parsed.tools is not None:
            options["tools"] = toolbox(parsed.tools or BUILT_IN)
        options |= _generation_options(overrides)
        if parsed.command == "infer":
            _check_infer(parsed)
        # before the model is loaded: unknown names, wrong types and ranges
        make_request("a question" if parsed.command == "chat" or parsed.requests else parsed.prompt, **options)
        if parsed.seed is not None:
            check_whole("--seed", parsed.seed, 0, 2**63 - 1)
            torch.manual_seed(parsed.seed)
        dtype = getattr(torch, parsed.dtype) if parsed.dtype else None
        engine = Ovis25Inference(parsed.model, parsed.device, dtype, base=parsed.base, check_base=not parsed.anyway)
        if parsed.command == "chat":
            run_chat(engine.chat(**options))
        elif parsed.requests:
            num_right, num_wrong = answer_file(engine, parsed.requests, parsed.output, parsed.batch_size, **options)
            print(f"{num_right} answered, {num_wrong} failed: {parsed.output}")
            return 1 if num_wrong else 0
        else:
            _infer(engine, parsed, options)
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted; with --requests the same command goes on where it stopped", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        if os.environ.get("OVIS25_DEBUG"):
            raise
        print(f"error: {escape_controls(str(error))}", file=sys.stderr)
        return 2


def _check_infer(parsed: argparse.Namespace) -> None:
    if bool(parsed.requests) == (parsed.prompt is not None):
        raise RequestError("give either --prompt or --requests")
    if bool(parsed.requests) != bool(parsed.output):
        raise RequestError("--requests and --output belong together")
    if parsed.requests and (parsed.image or parsed.video or parsed.ground or parsed.json):
        raise RequestError("with --requests, images, videos and prompts stand in the file; its replies are JSON")
    if parsed.ground and (len(parsed.image) != 1 or parsed.video):
        raise RequestError(f"--ground needs one --image; {len(parsed.image)} were given")
    if (parsed.draw or parsed.coordinates) and not parsed.ground:
        raise RequestError(f"--{'draw' if parsed.draw else 'coordinates'} needs --ground box or --ground point")
    if parsed.draw:
        _check_picture_name(Path(parsed.draw))
    if parsed.batch_size < 1:
        raise RequestError(f"--batch_size is {parsed.batch_size}; it must be at least 1")
    parsed.image = [named_file("image", name) for name in parsed.image]
    parsed.video = named_file("video", parsed.video) if parsed.video is not None else None


def _check_picture_name(path: Path) -> None:
    """Before anything is asked: a picture can be written there."""
    if path.suffix.lower() not in Image.registered_extensions():
        raise RequestError(f"--draw {path}: no picture format ends in {path.suffix or 'nothing'!r}; name it .png")
    if not path.parent.is_dir() or path.is_dir():
        raise RequestError(f"--draw {path}: {'it is a folder' if path.is_dir() else f'{path.parent} is no folder'}")


def _infer(engine: Ovis25Inference, parsed: argparse.Namespace, options: dict) -> None:
    if parsed.ground:
        _ground(engine, parsed, options)
        return
    stream = engine.stream(parsed.prompt, parsed.image, parsed.video, **options)
    if parsed.json:
        for _ in stream:
            pass
        print(json_text(reply_record(stream.reply)))
    else:
        print_stream(stream)


def _ground(engine: Ovis25Inference, parsed: argparse.Namespace, options: dict) -> None:
    found = engine.grounding_inference(
        parsed.image[0], parsed.prompt, parsed.ground, parse=True, coordinates=parsed.coordinates, **options
    )
    if parsed.draw:
        found.draw().save(parsed.draw)
    record = {"answer": found.answer, "boxes": found.boxes, "points": found.points, "problems": found.problems}
    print(json_text(record) if parsed.json else escape_controls(found.answer))
    for problem in found.problems:
        print(escape_controls(f"note: {problem}"), file=sys.stderr)


def _generation_options(overrides: list[str]) -> dict:
    """`--name value` and `--name=value` pairs, values read as JSON where they are."""
    options, rest = {}, [part for word in overrides for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    for name, value in zip(rest[::2], [*rest[1::2], None], strict=False):
        if not name.startswith("--") or value is None:
            raise RequestError(f"{name}: options are written --name value")
        options[name[2:].replace("-", "_")] = _option_value(value)
    return options


def _option_value(text: str):
    """JSON where it is JSON, also with Python's True, False and None; else the text."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except (ValueError, RecursionError):
        return text


_TRAIN_DESCRIPTION = "Fine-tune an Ovis2.5 checkpoint as a config file says. Start it again to resume it."


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a JSON file, for example train_config_tiny.json")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.usage = "%(prog)s CONFIG [--dry-run] [--key value ...]"


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


def _train_help(program: str) -> str:
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


def _run_train(parsed: argparse.Namespace, overrides: list[str]) -> int:
    _quieten()
    config: TrainConfig | None = None
    try:
        config = load_config(parsed.config, overrides)
        results = train(config, dry_run=parsed.dry_run)
        finish.leave_processes()
        if config.exam and results and is_main_process():
            with finish.after_saving("exam", config.output_dir):
                hold_exam(config.output_dir, parse_source(config.data_path).kinds)
        return 0
    except KeyboardInterrupt:
        if is_main_process():
            print("\ninterrupted; the same command goes on from the last complete checkpoint", file=sys.stderr)
        return 130
    except (*_USER_ERRORS, finish.FinishError) as error:
        if os.environ.get("OVIS25_DEBUG"):
            raise
        if is_main_process():
            print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, finish.FinishError) else 2


def hold_exam(model_path: str, kinds: Iterable[str] = tuple(KINDS)) -> dict:
    """Let a tiny model answer held-out questions and print how it did."""
    engine = Ovis25Inference(model_path)

    def answer(requests: list[dict]) -> list[str]:
        replies = []
        for start in range(0, len(requests), _EXAM_BATCH):
            batch = requests[start : start + _EXAM_BATCH]
            limit = max(request["max_new_tokens"] for request in batch)
            fields = [{k: r[k] for k in ("prompt", "images", "enable_thinking")} for r in batch]
            for request, question in zip(fields, batch, strict=True):
                request["tools"] = toolbox() if question["with_tools"] else None
            greedy = {"do_sample": False, "repetition_penalty": 1.0}
            found = engine.replies(fields, len(batch), max_new_tokens=limit, **greedy)
            replies += [reply.text for reply in found]
        return replies

    results = run_exam(answer, asked_kinds=kinds)
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
        if not torch.accelerator.is_available():
            # so that DeepSpeed, which PEFT imports, does not warn that it found no GPU
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # accelerate would warn that DeepSpeed's accumulation, which is the config's, wins
        logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
        if is_main_process():
            # a download takes long: its bars stay
            enable_progress_bars()


if __name__ == "__main__":
    sys.exit(main())
