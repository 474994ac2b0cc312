"""Words for messages: values shortened, nearest names, text that no tokenizer takes."""

import difflib
import re
from collections.abc import Iterable

# halves of a character beyond the basic plane: JSON can hold one alone, UTF-8 and tokenizers cannot
_SURROGATE = re.compile("[\ud800-\udfff]")
# what a terminal obeys (C0 but newline and tab, DEL, C1), what turns text around, and what some readers end lines at
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


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


def escape_controls(text: str, form: str | None = None) -> str:
    """The text with its control characters shown instead of obeyed: an escape becomes `\\x1b`.

    Newlines and tabs stay. `form` writes every one alike, as JSON wants it: `\\u{:04x}`.
    """

    def escaped(match: re.Match) -> str:
        code = ord(match.group())
        return (form or (r"\x{:02x}" if code < 256 else r"\u{:04x}")).format(code)

    return _CONTROL.sub(escaped, text)
