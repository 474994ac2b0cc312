"""`ovis25 chat`: a conversation in the terminal."""

import argparse

from ovis25.cli.command import Command
from ovis25.cli.library_errors import LIBRARY_ERRORS
from ovis25.cli.models import add_model_arguments, generation_options, load_engine
from ovis25.cli.quiet import quieten
from ovis25.cli.terminal import HELP, run_chat, speak_utf8
from ovis25.inference.request import make_request


def run(parsed: argparse.Namespace, words: list[str]) -> int:
    quieten()
    speak_utf8()
    options = generation_options(parsed, words)
    # before the model is loaded: unknown names, wrong types and ranges
    make_request("a question", **options)
    run_chat(load_engine(parsed).chat(**options))
    return 0


COMMAND = Command(
    add_model_arguments,
    run,
    "Talk to a model. Commands inside:\n\n" + HELP,
    lambda program: "example:\n  ovis25 chat output/tiny --think",
    user_errors=(ValueError, *LIBRARY_ERRORS),
)
