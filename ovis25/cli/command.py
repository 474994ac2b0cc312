"""What a command is to the one place that runs them all."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command of the command line; a file of this folder makes one and calls it COMMAND.

    Args:
        add_arguments: give a parser what is the command's own.
        run: from the parsed arguments and the words that no parser knew to an exit code.
        description: what `--help` begins with.
        epilog: from the program's name to what `--help` ends with.
        takes_options: whether words that the parser does not know are options (`--name value`).
        interrupted: what Ctrl-C answers.
        user_errors: what this command's user can mend beside `errors.USER_ERRORS`.
    """

    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, list[str]], int]
    description: str
    epilog: Callable[[str], str]
    takes_options: bool = True
    interrupted: str = "interrupted"
    user_errors: tuple[type[Exception], ...] = ()


class Parser(argparse.ArgumentParser):
    """argparse's, with the errors of all commands: `error: ...` begins the line."""

    def error(self, message: str):
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {message}\n")
