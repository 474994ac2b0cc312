"""What a setting may be: its type, range or choices, and one line for a value that is neither."""

import enum
import json
import math
import re
import types
import typing
from dataclasses import dataclass

from ovis25.text import lone_surrogate, nearest, shorten

# numbers that mean one thing only: no percent sign, no comma, underscores between thousands alone
_NUMBER = re.compile(r"[+-]?(\d{1,3}(_\d{3})+|\d+|(?=\.\d))(\.\d*)?([eE][+-]?\d+)?", re.ASCII)
_WORDS = {int: "int", float: "float", bool: "bool", str: "text", list: "a list of texts", dict: "an object"}


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key, the value and the cure."""


@dataclass(frozen=True)
class Kind:
    """The values that one setting takes.

    Args: `types` of bool, int, float, str, list (of texts) and dict (a JSON object). `least` and `most` belong to the
    range, `above` and `below` do not. `also` are values beside the range. `is_share` is a number of steps, or below 1 a
    share of them. `cure` ends the message.
    """

    types: tuple[type, ...]
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    also: tuple = ()
    choices: tuple[str, ...] = ()
    is_share: bool = False
    cure: str = ""

    def read(self, name: str, value):
        """The value as the setting has it; null stays null, numbers and booleans written as text are read.

        Raises:
            ConfigError: it is of another type or out of range; one line.
        """
        if value is None:
            return None
        if isinstance(value, bool):
            return value if bool in self.types else self._refuse_type(name, value)
        if isinstance(value, str):
            return self._read_text(name, value)
        if isinstance(value, (int, float)) and {int, float} & {*self.types}:
            return self._read_number(name, value)
        if isinstance(value, list) and list in self.types:
            return self._read_list(name, value)
        if isinstance(value, dict) and dict in self.types:
            return value
        return self._refuse_type(name, value)

    def _read_text(self, name: str, text: str):
        if bool in self.types and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if {int, float} & {*self.types} and _NUMBER.fullmatch(text.strip()):
            return self._read_number(name, float(text) if int not in self.types else _whole(text))
        if dict in self.types and text.lstrip().startswith("{"):
            return _read_object(name, text)
        if str not in self.types:
            return self._refuse_type(name, text)
        if not text.strip():
            raise ConfigError(f"{name} is {text!r}, which is empty; give it a value, or null for its default")
        if "\0" in text or lone_surrogate(text) is not None:
            raise ConfigError(f"{name} is {shorten(text)}, which holds a character that no file can have; remove it")
        return self._choose(name, text)

    def _choose(self, name: str, text: str):
        if not self.choices or text in self.choices:
            return text
        guess = nearest(text, self.choices)
        hint = f"; did you mean {guess}?" if guess else ""
        raise ConfigError(f"{name} is {shorten(text)}; choose one of {', '.join(self.choices)}{hint}{self.cure}")

    def _read_list(self, name: str, values: list) -> list:
        if not values or not all(isinstance(value, str) and value.strip() for value in values):
            raise ConfigError(f"{name} is {shorten(values)}, but it must be a list of texts that are not empty")
        return [self._read_text(name, value) for value in values]

    def _read_number(self, name: str, value: int | float):
        if int in self.types and float not in self.types:
            if isinstance(value, float) and math.isfinite(value):
                if not value.is_integer():
                    return self._refuse_type(name, value)
                value = int(value)
            number = value
        else:
            number = _as_float(value)
        if number in self.also:
            return number
        if not self._is_inside(number):
            finite = "" if isinstance(number, int) or math.isfinite(number) else "finite, and "
            raise ConfigError(f"{name} is {shorten(value)}; it must be {finite}{self.range_text()}{self.cure}")
        if self.is_share and number > 1 and number != int(number):
            raise ConfigError(
                f"{name} is {value}; it must be a whole number of steps, or below 1 a share of them{self.cure}"
            )
        return number

    def _is_inside(self, number: float) -> bool:
        return (
            (isinstance(number, int) or math.isfinite(number))
            and (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def range_text(self) -> str:
        """`-1, or at least 1 and at most 10`."""
        bounds = [
            f"{word} {_plain(bound)}"
            for word, bound in (
                ("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below),
            )
            if bound is not None
        ]  # fmt: skip
        text = " and ".join(bounds) or "a number"
        return ", or ".join([*map(str, self.also), text])

    def _refuse_type(self, name: str, value):
        expected = " or ".join(word for kind, word in _WORDS.items() if kind in self.types)
        if not expected:
            raise ConfigError(f"{name} is {shorten(value)}, but a config file cannot hold it; remove it")
        has_range = {self.least, self.most, self.above, self.below} != {None}
        limits = f", {self.range_text()}" if has_range else f": {', '.join(self.choices)}" if self.choices else ""
        raise ConfigError(f"{name} is {shorten(value)}, but it must be {expected}{limits}{self.cure}")


def kind_of(annotation, default=None, **limits) -> Kind:
    """The kind of a dataclass field with this annotation; `limits` are Kind's, the cure tells the default."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    accepted, choices = [], []
    for part in typing.get_args(annotation) if is_union else (annotation,):
        if typing.get_origin(part) is typing.Literal:
            accepted += [type(value) for value in typing.get_args(part)]
            continue
        part = typing.get_origin(part) or part
        if isinstance(part, type) and issubclass(part, enum.Enum):
            accepted.append(str)
            choices = [member.value for member in part]
        elif part in _WORDS:
            accepted.append(part)
    if choices:
        limits.setdefault("choices", tuple(choices))
    if default not in (None, "", -1) and not isinstance(default, (list, dict)):
        limits.setdefault("cure", f" (default: {getattr(default, 'value', default)})")
    return Kind(tuple(dict.fromkeys(limits.pop("types", accepted))), **limits)


def _whole(text: str) -> int | float:
    """`1e3` and `1_000` as whole numbers, exactly; anything else as float."""
    text = text.strip()
    try:
        return int(text)
    except ValueError:
        return float(text)


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _plain(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def _read_object(name: str, text: str) -> dict:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is {shorten(text)}, which is no valid JSON: {error}") from error
