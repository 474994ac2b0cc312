"""What a command is to the one place that runs them all."""

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from ovis25.text import escape_controls, nearest

_CHOICE = re.compile(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", re.DOTALL)
_REQUIRED = "the following arguments are required: "


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
    """An ArgumentParser whose errors are one line, that guesses no shortened options, and takes `--dry_run` for
    `--dry-run`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def add_argument(self, *names, **kwargs):
        action = super().add_argument(*names, **kwargs)
        # set here: the base class adds --help while it is being made
        spellings = self.__dict__.setdefault("spellings", {})
        spellings |= {_plain(option): option for option in action.option_strings if option.startswith("--")}
        return action

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._spelled(word) for word in words], namespace)

    def _spelled(self, word: str) -> str:
        name, equals, value = word.partition("=")
        is_option = name.startswith("--") and len(name) > 2
        return self.spellings.get(_plain(name), name) + equals + value if is_option else word

    def error(self, message: str) -> NoReturn:
        """One line; names the nearest of the choices."""
        if found := _CHOICE.fullmatch(message):
            name, value, known = found[1], found[2], [word.strip(" '") for word in found[3].split(",")]
            guess = nearest(value.lower(), known)
            hint = f"; did you mean {guess}?" if guess else ""
            message = f"{name} cannot be {value!r}; choose one of {', '.join(known)}{hint}"
        if message.startswith(_REQUIRED):
            message = f"{message.removeprefix(_REQUIRED)} is missing"
        self.exit(2, f"error: {escape_controls(' '.join(message.split()))} (see {self.prog} --help)\n")

    def refuse_unknown(self, words: list[str]) -> NoReturn:
        """For a command that takes no settings."""
        guess = nearest(words[0].partition("=")[0], self.spellings.values()) if words[0].startswith("-") else None
        self.error(f"unexpected argument {words[0]!r}{f'; did you mean {guess}?' if guess else ''}")

    def check_order(self, config: str, options: list[str], words: list[str]) -> None:
        """A word behind a setting that stands before CONFIG would be taken for the config's name."""
        first = next((word for word in options if word.startswith("-")), None)
        if first in words and config in words and words.index(first) < words.index(config):
            self.error(f"{config!r} stands behind {first}; the config's name comes first: CONFIG --key value")


def _plain(option: str) -> str:
    return option.replace("_", "-")
