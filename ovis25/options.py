"""The grammar of options that are no command's own: `--name value`, `--name=value`; values in JSON where they are."""

import json
from collections.abc import Callable

from ovis25.text import shorten

_WORDS = {"true": True, "false": False, "none": None, "null": None}


def read_options(
    words: list[str],
    error: type[ValueError],
    may_stand_alone: Callable[[str], bool] = lambda name: False,
    how: str = "options are written --name value",
    lacking: str = "--{0} has no value; write --{0} VALUE, or null for the default",
) -> dict:
    """`["--max_steps", "4", "--bf16", "--lr_scheduler_type=cosine"]` as a dict.

    Hyphens in names count as underscores. A lone name is true where `may_stand_alone`. `how` ends the message for a
    stray word, `lacking` is the one for a name without a value.

    Raises:
        error: a stray word, a name with two values, a name without one that may not stand alone.
    """
    values: dict = {}
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--") or word == "--":
            raise error(f"unexpected argument {word!r}: {how}")
        spelled, has_value, text = word[2:].partition("=")
        name = spelled.replace("-", "_")
        if not has_value:
            is_lone = not remaining or remaining[0].startswith("--")
            text = "true" if is_lone and may_stand_alone(name) else "" if is_lone else remaining.pop(0)
        if not text.strip():
            raise error(lacking.format(spelled))
        value = _read_value(text, error)
        if name in values and values[name] != value:
            raise error(f"--{name} is given twice, as {shorten(values[name])} and {shorten(value)}; keep one")
        values[name] = value
    return values


def _read_value(text: str, error: type[ValueError]):
    """JSON where it is JSON, True, False and None in any case; else the text."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return text
    except ValueError as problem:
        # a number of thousands of digits
        raise error(f"{shorten(text)} is no usable number: {problem}") from problem
