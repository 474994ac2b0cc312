"""How every command reads its words and reports an error: one line that begins with `error:`, and exit code 2."""

import argparse
import errno
import re
from typing import NoReturn

import torch
from safetensors import SafetensorError

from ovis25.text import escape_controls, nearest

_CURES = {
    errno.ENOSPC: "free some space and give the same command again",
    errno.EDQUOT: "your quota there is used up; free some space and give the same command again",
    errno.EFBIG: "files may not grow so large there; raise the limit (ulimit -f), or choose another disk",
    errno.EACCES: "give yourself the right to it, or name another place",
    errno.EROFS: "name another place",
}
MEMORY_ERRORS = (MemoryError, torch.OutOfMemoryError)
# what the user, or the machine's owner, can mend: shown as one message, without a stack
USER_ERRORS = (OSError, ValueError, FloatingPointError, SafetensorError, *MEMORY_ERRORS)
_CHOICE = re.compile(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", re.DOTALL)


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ours, that guesses no shortened options, and takes `--dry_run` for
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
        return super().parse_known_args(None if args is None else [self._spelled(word) for word in args], namespace)

    def _spelled(self, word: str) -> str:
        name, equals, value = word.partition("=")
        is_option = name.startswith("--") and len(name) > 2
        return self.spellings.get(_plain(name), name) + equals + value if is_option else word

    def error(self, message: str) -> NoReturn:
        """One line; names the nearest of the choices."""
        if found := _CHOICE.fullmatch(message):
            name, value, known = found[1], found[2], [word.strip(" '") for word in found[3].split(",")]
            guess = nearest(value.lower(), known)
            what = "there is no command" if name == "COMMAND" else f"{name} cannot be"
            message = f"{what} {value!r}; choose one of {', '.join(known)}{f'; did you mean {guess}?' if guess else ''}"
        if message.startswith("the following arguments are required: "):
            message = f"{message.removeprefix('the following arguments are required: ')} is missing"
        self.exit(2, f"error: {escape_controls(' '.join(message.split()))} (see {self.prog} --help)\n")

    def refuse_unknown(self, words: list[str]) -> NoReturn:
        """For a command that takes no settings."""
        guess = nearest(words[0].partition("=")[0], self.spellings.values()) if words[0].startswith("-") else None
        self.error(f"unexpected argument {words[0]!r}{f'; did you mean {guess}?' if guess else ''}")


def _plain(option: str) -> str:
    return option.replace("_", "-")


def describe_error(error: Exception) -> str:
    """An error's own message; one of the operating system gets the file's name first, and a cure."""
    if isinstance(error, MEMORY_ERRORS):
        first = (str(error).strip().splitlines() or ["out of memory"])[0]
        return f"{first}; lower per_device_train_batch_size or the pixel budgets (ovis25 plan CONFIG says what fits)"
    if isinstance(error, SafetensorError):
        cure = _CURES[errno.ENOSPC] if "StorageFull" in str(error) else "look at its disk and your rights there"
        return f"weights could not be written or read ({' '.join(str(error).split())}); {cure}"
    if not isinstance(error, OSError) or error.errno is None or not error.strerror:
        return str(error)
    cure = _CURES.get(error.errno)
    place = f"{error.filename}: " if error.filename is not None else ""
    return f"{place}{error.strerror}{f'; {cure}' if cure else ''}"
