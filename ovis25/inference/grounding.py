"""Boxes and points in replies: read, scaled to pixels, drawn."""

import math
from dataclasses import dataclass, field

from PIL import Image

from ovis25.inference.checks import RequestError, shown
from ovis25.inference.drawing import draw_regions
from ovis25.processing.boxes import Region, parse_regions
from ovis25.text import shorten

# how the released models are asked (model card of AIDC-AI/Ovis2.5-9B)
GROUNDING_PROMPTS = {
    "box": "Please provide the bounding box coordinates.",
    "point": "Please provide the point coordinates.",
}
COORDINATES = ("shares", "thousandths", "pixels")
_LOOKS = {"shares": "shares of the picture", "thousandths": "0-1000", "pixels": "pixels"}


@dataclass
class Grounding:
    """`answer` as the model gave it; boxes (x1, y1, x2, y2) and points (x, y) in pixels of `image`.

    `box_labels` and `point_labels` hold the `<ref>` text before each, or None. `problems` says what could not be read,
    what cannot be a share of the picture (such regions are in neither list), what was put in order, and, after
    `draw()`, which letters no font has. Boxes and points are numbered in it as the model wrote them, from 1.
    """

    answer: str
    image: Image.Image
    boxes: list[tuple[float, float, float, float]]
    points: list[tuple[float, float]]
    box_labels: list[str | None]
    point_labels: list[str | None]
    problems: list[str] = field(default_factory=list)

    def draw(self) -> Image.Image:
        """A copy of the image with boxes, points and their labels."""
        boxes = list(zip(self.boxes, self.box_labels, strict=True))
        points = list(zip(self.points, self.point_labels, strict=True))
        picture, problems = draw_regions(self.image, boxes, points)
        self.problems += [problem for problem in problems if problem not in self.problems]
        return picture


def check_coordinates(coordinates) -> None:
    if coordinates is not None and coordinates not in COORDINATES:
        raise RequestError(f"coordinates is {shown(coordinates)}; it is one of {', '.join(COORDINATES)}")


def parse_grounding(answer: str, image: Image.Image, coordinates: str | None = None) -> Grounding:
    """Read `<box>(x1,y1),(x2,y2)</box>` and `<point>(x,y)</point>`, and scale them to pixels.

    By default numbers are shares of the picture in [0, 1), as the released models write them; 1 is its edge. A box
    that begins inside and sticks out a little is cut at the edge. `coordinates` says that a model writes "pixels" of
    the upright image, or "thousandths". Swapped corners are put in order. All but the plain case is in `problems`.
    """
    check_coordinates(coordinates)
    found = Grounding(answer, image, [], [], [], [])
    numbers_seen = {"box": 0, "point": 0}
    for region in parse_regions(answer):
        numbers_seen[region.kind] += 1
        name = f"{region.kind} {numbers_seen[region.kind]}"
        placed = _placed(region, name, image.size, coordinates or "shares", found.problems)
        if placed is None:
            continue
        is_box = region.kind == "box"
        (found.boxes if is_box else found.points).append(placed)
        (found.box_labels if is_box else found.point_labels).append(region.label)
    return found


def _placed(
    region: Region, name: str, size: tuple[int, int], coordinates: str, problems: list[str]
) -> tuple[float, ...] | None:
    """The region in pixels, or None; says why."""
    if not region.numbers:
        what = "no coordinates" if region.is_closed else "the reply ends inside it"
        problems.append(f"{name} holds {shorten(region.content)}: {what}")
        return None
    width, height = size
    units = {"shares": (1.0, 1.0), "thousandths": (1000.0, 1000.0), "pixels": (width, height)}[coordinates]
    shares = [number / units[axis % 2] for axis, number in enumerate(region.numbers)]
    inside = [min(max(share, 0.0), 1.0) for share in shares]
    if outside := [key for key, share, kept in zip(region.named, shares, inside, strict=True) if share != kept]:
        values = ", ".join(f"{key} = {region.named[key]:g}" for key in outside)
        if not _sticks_out(region, shares, inside, coordinates):
            problems.append(f"{name} has {values}: {_no_place(region, coordinates)}")
            return None
        problems.append(f"{name} has {values}: cut at the edge of the picture")
    if region.kind == "box":
        inside = _in_order(name, inside, problems)
    return tuple(share * (width, height)[axis % 2] for axis, share in enumerate(inside))


def _sticks_out(region: Region, shares: list[float], inside: list[float], coordinates: str) -> bool:
    """A box that lies in the picture with a part of it and leaves it by less than its size."""
    if region.kind == "point" or not all(-1 < share < 2 for share in shares):
        return False
    x1, y1, x2, y2 = inside
    # whole numbers beyond 1 are counted in another unit
    is_counted = coordinates == "shares" and any(n not in (0, 1) and math.floor(n) == n for n in region.numbers)
    return x1 != x2 and y1 != y2 and not is_counted


def _no_place(region: Region, coordinates: str) -> str:
    if coordinates != "shares":
        return f"outside the picture in {_LOOKS[coordinates]}"
    if min(region.numbers) < 0 or max(region.numbers) < 2:
        return "no share of the picture"
    return f'no share of the picture; it looks like {_LOOKS[region.scale]} (coordinates="{region.scale}" reads it so)'


def _in_order(name: str, corners: list[float], problems: list[str]) -> list[float]:
    x1, y1, x2, y2 = corners
    if swapped := [f"{axis}2 < {axis}1" for axis, first, second in (("x", x1, x2), ("y", y1, y2)) if second < first]:
        problems.append(f"{name} has {' and '.join(swapped)}: its corners are put in order")
    return [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]
