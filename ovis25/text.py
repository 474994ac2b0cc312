"""Words for messages: values shortened, nearest names, text that no tokenizer takes."""

import difflib
import re
from collections.abc import Iterable

# halves of a character beyond the basic plane: JSON can hold one alone, UTF-8 and tokenizers cannot
_SURROGATE = re.compile("[\ud800-\udfff]")


def shorten(value, limit: int = 60) -> str:
    """`repr` of the value, with its middle left out where it is longer than `limit` characters.

    `shorten("a" * 100, 20)` is `'aaaaaaaa...aaaaaaaa' (100 characters)`.
    """
    text = repr(value[: 2 * limit]) if isinstance(value, (str, bytes)) and len(value) > 2 * limit else repr(value)
    if len(text) <= limit and not (isinstance(value, (str, bytes)) and len(value) > 2 * limit):
        return text
    half = (limit - 3) // 2
    if isinstance(value, (str, bytes)):
        unit = "characters" if isinstance(value, str) else "bytes"
        return f"{text[:half]}...{repr(value[-half:])[-half:]} ({len(value):,} {unit})"
    return f"{text[:half]}...{text[-half:]}"


def nearest(name, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that looks most like the given one, or None where none does."""
    found = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def lone_surrogate(text: str) -> int | None:
    """The place of the first half character (a lone surrogate), or None.

    Half an emoji comes out of tools that cut text at UTF-16 units; no tokenizer takes it, and no file can be written
    with it.
    """
    found = _SURROGATE.search(text)
    return found.start() if found else None
