"""Boxes and points that a model writes: read from the text, with every number as it stands there.

`<ref>a cat</ref><box>(0.1,0.2),(0.5,0.6)</box>`, `<point>(0.3,0.4)</point>`. Reading is linear in the text's length.
"""

import math
import re
from dataclasses import dataclass

_TAG = re.compile(r"<(/?)(ref|box|point)>")
# every character can match in one way only
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
_BRACKETS = str.maketrans("()[]", "    ")
_LONGEST_CONTENT = 400
_NAMES = {"box": ("x1", "y1", "x2", "y2"), "point": ("x", "y")}


@dataclass(frozen=True)
class Region:
    """A box (x1, y1, x2, y2) or a point (x, y), raw.

    `numbers` is empty where the content could not be read; `content` is what stood between the tags, cut to 400
    characters; `label` is the last `<ref>` before it.
    """

    kind: str
    numbers: tuple[float, ...]
    content: str
    label: str | None = None
    is_closed: bool = True

    @property
    def named(self) -> dict[str, float]:
        """The numbers under the names x1, y1, x2, y2 or x, y."""
        return dict(zip(_NAMES[self.kind], self.numbers, strict=False))

    @property
    def scale(self) -> str:
        """What the numbers look like: "shares" (all in [0, 1]), "thousandths" (all in [0, 1000]) or "pixels"."""
        if all(0 <= number <= 1 for number in self.numbers):
            return "shares"
        return "thousandths" if all(0 <= number <= 1000 for number in self.numbers) else "pixels"


def parse_regions(text: str) -> list[Region]:
    """Every box and point of a text, in order; also those that cannot be read or are cut off at the end."""
    regions: list[Region] = []
    label, open_tag, start = None, None, 0
    for tag in _TAG.finditer(text):
        is_closing, name = bool(tag[1]), tag[2]
        if is_closing and name == open_tag:
            content = text[start : tag.start()]
            if name == "ref":
                label = content.strip()
            else:
                regions.append(_region(name, content, label))
            open_tag = None
        elif not is_closing:
            open_tag, start = name, tag.end()
    if open_tag in _NAMES:
        regions.append(Region(open_tag, (), text[start:][:_LONGEST_CONTENT], label, is_closed=False))
    return regions


def _region(kind: str, content: str, label: str | None) -> Region:
    numbers: tuple[float, ...] = ()
    if len(content) <= _LONGEST_CONTENT:
        parts = [part for part in re.split(r"[\s,]+", content.translate(_BRACKETS)) if part]
        if len(parts) == len(_NAMES[kind]) and all(map(_NUMBER.fullmatch, parts)):
            numbers = tuple(map(float, parts))
    if not all(map(math.isfinite, numbers)):
        numbers = ()
    return Region(kind, numbers, content[:_LONGEST_CONTENT], label)
