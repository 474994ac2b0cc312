"""From words to a command: the doors of the package. Only the command that is asked for is imported."""

import argparse
import importlib
import sys
from pathlib import Path

from ovis25 import __version__
from ovis25.cli.command import Command, Parser
from ovis25.cli.errors import exit_code_of
from ovis25.text import nearest, shorten

# a name -> what `ovis25 --help` says of it; the command is COMMAND of the file of that name
COMMANDS = {
    "train": "fine-tune a checkpoint",
    "plan": "memory of every way to train, per device",
    "merge": "merge a LoRA adapter into its base",
    "infer": "ask a model, once or from a file",
    "chat": "talk to a model in the terminal",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code, one of the table in `errors`. `--help` and `--version` load nothing else.

    Raises:
        SystemExit: after --help and --version, and for words that no command takes.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    place = next((index for index, word in enumerate(words) if not word.startswith("-")), len(words))
    parser = _top_parser()
    parser.parse_args(words[:place])
    if place == len(words):
        parser.error("a command is missing: ovis25 COMMAND, and ovis25 --help lists them")
    name = words[place]
    if name not in COMMANDS:
        parser.error(_unknown(name))
    return _run(_load(name), f"ovis25 {name}", words[place + 1 :])


def train_main(arguments: list[str] | None = None, **fixed) -> int:
    """The documented doors `src_theo/train_theo.py CONFIG [--key value ...]` and its sisters.

    `fixed` are the settings that make the door: recipe="trl", use_lora=True.
    """
    program = Path(sys.argv[0]).name
    return _run(
        _load("train"), program, arguments, f"python {program}", [f"--{key}={value}" for key, value in fixed.items()]
    )


def merge_main(arguments: list[str] | None = None) -> int:
    """The documented door `src_theo/lora/merge_lora_adapters.py --adapter_path A --output_path B`."""
    return _run(_load("merge"), "merge_lora_adapters.py", arguments)


def _top_parser() -> Parser:
    parser = Parser(prog="ovis25", description="Train and run Ovis2.5.", usage="%(prog)s [-h] [--version] COMMAND ...")
    parser.add_argument("--version", action="version", version=f"ovis25 {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    return parser


def _unknown(name: str) -> str:
    guess = nearest(name, COMMANDS)
    hint = f"did you mean {guess}?" if guess else f"the commands are {', '.join(COMMANDS)}"
    return f"there is no command {shorten(name)}; {hint}"


def _load(name: str) -> Command:
    """With all that it needs: torch, transformers, the model."""
    return importlib.import_module(f"ovis25.cli.{name}").COMMAND


def _run(
    command: Command, program: str, words: list[str] | None, called: str | None = None, fixed: list[str] | None = None
) -> int:
    """Parse and run; `called` is how the examples start the program, `fixed` are options that win over the given."""
    parser = Parser(
        prog=program,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=command.description,
        epilog=command.epilog(called or program),
    )
    command.add_arguments(parser)
    words = sys.argv[1:] if words is None else words
    parsed, options = parser.parse_known_args(words)
    if options and not command.takes_options:
        parser.refuse_unknown(options)
    if hasattr(parsed, "config"):
        parser.check_order(parsed.config, options, words)
    return exit_code_of(command, lambda: command.run(parsed, [*options, *(fixed or [])]))
