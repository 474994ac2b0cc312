"""What is wrong with data, in words for the user."""

import enum
import re

from ovis25.errors import UserError
from ovis25.text import shorten

# how a DataLoader hands on what a worker raised: the worker's whole stack, with the message at its end
_FROM_WORKER = re.compile(
    r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback.*\n[\w.]*DataError: ", re.S
)


class DataError(UserError, ValueError):
    """Data that cannot be trained on; the message lists what is wrong, where, and the cure.

    One raised in a DataLoader's worker has the same message as one raised without workers.
    """

    def __init__(self, message: str):
        super().__init__(_FROM_WORKER.sub("", str(message), count=1).rstrip("\n"))


class DefectKind(enum.StrEnum):
    """What sort of thing is wrong with a sample: fixed codes, for counting and for who mends by program."""

    FORM = "form"  # a key lacks, or holds another type than it must
    UNREAD_KEY = "unread_key"  # a key that nothing reads, and that could matter
    CONFLICT = "conflict"  # two places say different things
    TURN_ORDER = "turn_order"  # who speaks when
    EMPTY_TURN = "empty_turn"
    NOTHING_LEARNED = "nothing_learned"
    THINKING = "thinking"
    CHARACTERS = "characters"  # half characters, control tokens
    PLACEHOLDERS = "placeholders"  # placeholders and visuals that do not match
    SOURCE = "source"  # what is named as a picture or a video is none: no path, an address, a broken data: URL
    MISSING_FILE = "missing_file"
    UNREADABLE_FILE = "unreadable_file"
    UNFIT_SIZE = "unfit_size"  # a picture that no pixel budget holds
    TOOL_CALL = "tool_call"
    TOO_LONG = "too_long"


class SampleError(ValueError):
    """What is wrong with one field of a sample, and the cure."""

    def __init__(self, field: str, problem: str, cure: str, kind: DefectKind = DefectKind.FORM):
        super().__init__(told(field, problem, cure))
        self.field, self.problem, self.cure, self.kind = field, problem, cure, kind

    def __reduce__(self):
        return type(self), (self.field, self.problem, self.cure, self.kind)


def told(field: str, problem: str, cure: str) -> str:
    """A defect as one line."""
    end = "" if problem.endswith("?") else "."
    return f"field {field}: {problem}{end} {cure}".replace("\n", " ")


def label(name, limit: int = 200) -> str:
    """A name as it is where it is short and can be printed, else its shortened `repr`."""
    text = str(name)
    return text if len(text) <= limit and text.isprintable() else shorten(text, limit)
