"""The checks that every field of a request shares: each names the field, the value, and what it must be."""

import math
import reprlib
from numbers import Integral, Real
from pathlib import Path

from PIL import Image

from ovis25.generate.request import RequestError
from ovis25.text import lone_surrogate, shorten

_LARGEST_SHOWN = 10**30
# bounded in depth and length, and safe for objects that cannot be shown
_CONTAINERS = reprlib.Repr()
_CONTAINERS.maxlevel = _CONTAINERS.maxlist = _CONTAINERS.maxtuple = _CONTAINERS.maxdict = 3
_CONTAINERS.maxother = 40


def shown(value) -> str:
    """Any value in a few words."""
    if isinstance(value, int) and abs(value) > _LARGEST_SHOWN:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, (str, bytes, int, float)):
        return shorten(value)
    return f"{_CONTAINERS.repr(value)} (a {type(value).__name__})"


def refuse(name: str, value, wanted: str) -> RequestError:
    return RequestError(f"{name} is {shown(value)}; it must be {wanted}")


def check_flag(name: str, value) -> None:
    """True or False; whatever else Python takes for one of them is refused."""
    if not isinstance(value, bool):
        raise refuse(name, value, "true or false")


def check_whole(name: str, value, low: int, high: float = math.inf) -> None:
    """A whole number in [low, high], no boolean."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value <= high:
        raise refuse(name, value, f"a whole number, at least {low}" + (f", at most {high}" if high < math.inf else ""))


def check_real(name: str, value, low: float, high: float = math.inf, wanted: str = "") -> None:
    """A finite number in [low, high], no boolean; `wanted` says it better where the range is odd."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or value in (math.inf, -math.inf):
        between = f"a number from {low:g} to {high:g}" if high < math.inf else f"a number, at least {low:g}"
        raise refuse(name, value, wanted or between)


def check_text(name: str, value) -> None:
    """Text that a tokenizer takes."""
    if not isinstance(value, str):
        raise refuse(name, value, "text")
    if (place := lone_surrogate(value)) is not None:
        raise RequestError(
            f"{name} holds half a character ({value[place]!a}, a lone surrogate) at place {place}; "
            "it was cut in the middle of an emoji, or its bytes are no UTF-8: write the whole character"
        )


def check_picture(name: str, value) -> None:
    """The type of a picture's source; whether it can be read is another question."""
    if not isinstance(value, (str, Path, bytes, Image.Image)) or value in ("", b""):
        wanted = "a path, an address, a data: URL, bytes or a PIL picture"
        hint = " (Image.fromarray makes one of an array)" if hasattr(value, "__array__") else ""
        raise refuse(name, value, wanted + hint)


def check_list(name: str, value, of: str) -> None:
    if not isinstance(value, (list, tuple)):
        raise refuse(name, value, f"a list of {of}")
