"""Boxes and points in replies: read, scaled to pixels, drawn."""

import re
from dataclasses import dataclass

from PIL import Image, ImageDraw

# how the released models are asked (model card of AIDC-AI/Ovis2.5-9B)
GROUNDING_PROMPTS = {
    "box": "Please provide the bounding box coordinates.",
    "point": "Please provide the point coordinates.",
}

_NUMBER = r"\s*(-?\d+(?:\.\d+)?|-?\.\d+)\s*"
_PAIR = rf"\({_NUMBER},{_NUMBER}\)"
_FOUND = re.compile(rf"<ref>(.*?)</ref>|<box>\s*{_PAIR}\s*,\s*{_PAIR}\s*</box>|<point>\s*{_PAIR}\s*</point>", re.DOTALL)
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")


@dataclass
class Grounding:
    """`answer` as the model gave it; boxes (x1, y1, x2, y2) and points (x, y) in pixels of `image`.

    `box_labels` and `point_labels` hold the `<ref>` text before each, or None.
    """

    answer: str
    image: Image.Image
    boxes: list[tuple[float, float, float, float]]
    points: list[tuple[float, float]]
    box_labels: list[str | None]
    point_labels: list[str | None]

    def draw(self) -> Image.Image:
        """A copy of the image with boxes, points and their labels."""
        picture = self.image.convert("RGB").copy()
        draw = ImageDraw.Draw(picture)
        line = max(2, round(min(picture.size) / 200))
        for index, (box, label) in enumerate(zip(self.boxes, self.box_labels, strict=True)):
            colour = _COLOURS[index % len(_COLOURS)]
            left, right = sorted((box[0], box[2]))
            top, bottom = sorted((box[1], box[3]))
            draw.rectangle((left, top, right, bottom), outline=colour, width=line)
            _write(draw, (left, top), label, colour)
        for index, ((x, y), label) in enumerate(zip(self.points, self.point_labels, strict=True)):
            colour, radius = _COLOURS[index % len(_COLOURS)], 3 * line
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=line)
            _write(draw, (x + radius, y + radius), label, colour)
        return picture


def parse_grounding(answer: str, image: Image.Image) -> Grounding:
    """Read `<box>(x1,y1),(x2,y2)</box>` and `<point>(x,y)</point>`, coordinates in [0, 1), and scale them to pixels.

    Coordinates outside are clamped to the image; what does not parse is left out.
    """
    found = Grounding(answer, image, [], [], [], [])
    label, (width, height) = None, image.size
    for match in _FOUND.finditer(answer):
        name, *numbers = match.groups()
        if name is not None:
            label = name.strip()
            continue
        x1, y1, x2, y2, x, y = (None if n is None else min(max(float(n), 0.0), 1.0) for n in numbers)
        if x1 is not None:
            found.boxes.append((x1 * width, y1 * height, x2 * width, y2 * height))
            found.box_labels.append(label)
        else:
            found.points.append((x * width, y * height))
            found.point_labels.append(label)
    return found


def _write(draw: ImageDraw.ImageDraw, corner: tuple[float, float], label: str | None, colour: str) -> None:
    if label:
        box = draw.textbbox(corner, label)
        draw.rectangle(box, fill=colour)
        draw.text(corner, label, fill="white")
