"""What is wrong with data, in words for the user."""

import re

from ovis25.text import shorten

# how a DataLoader hands on what a worker raised: the worker's whole stack, with the message at its end
_FROM_WORKER = re.compile(
    r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback.*\n[\w.]*DataError: ", re.S
)


class DataError(ValueError):
    """Data that cannot be trained on; the message lists what is wrong, where, and the cure.

    One raised in a DataLoader's worker has the same message as one raised without workers.
    """

    def __init__(self, message: str):
        super().__init__(_FROM_WORKER.sub("", str(message), count=1).rstrip("\n"))


class SampleError(ValueError):
    """What is wrong with one field of a sample, and the cure."""

    def __init__(self, field: str, problem: str, cure: str):
        super().__init__(told(field, problem, cure))
        self.field, self.problem, self.cure = field, problem, cure

    def __reduce__(self):
        return type(self), (self.field, self.problem, self.cure)


def told(field: str, problem: str, cure: str) -> str:
    """A defect as one line."""
    end = "" if problem.endswith("?") else "."
    return f"field {field}: {problem}{end} {cure}".replace("\n", " ")


def label(name, limit: int = 200) -> str:
    """A name as it is where it is short and can be printed, else its shortened `repr`."""
    text = str(name)
    return text if len(text) <= limit and text.isprintable() else shorten(text, limit)
