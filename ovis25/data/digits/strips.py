"""Pictures of one to four handwritten digits, drawn from the originals of a split."""

import math
import random
from dataclasses import dataclass

from PIL import Image

from ovis25.data.digits.originals import MARGIN, SOURCE_SIDE, originals

_CELL_SIDES = (56, 72)
_DIGIT_SHARES = (0.72, 0.94)
# darkness from which a pixel belongs to the digit's box
_INK = 64
_IS_INK = [255 * (darkness >= _INK) for darkness in range(256)]
_PAPER = [255 - darkness for darkness in range(256)]


@dataclass
class Strip:
    """An RGB picture of one to four digits, in reading order, and their boxes in pixels."""

    image: Image.Image
    digits: list[int]
    boxes: list[tuple[int, int, int, int]]


def make_strip(
    rng: random.Random, split: str, num_digits: int, labels_differ: bool = False, in_one_row: bool = False
) -> Strip:
    """Draw a strip: cells of 56..72 pixels in one row or two, a digit somewhere in each.

    Digits of the train split are distorted as well; the other splits' only vary in size and place. With
    `labels_differ` no digit occurs twice.
    """
    candidates = originals(split)
    chosen: list[tuple[Image.Image, int]] = []
    while len(chosen) < num_digits:
        candidate = rng.choice(candidates)
        if not (labels_differ and candidate[1] in [label for _, label in chosen]):
            chosen.append(candidate)
    num_rows = 2 if not in_one_row and num_digits > 1 and rng.random() < 0.3 else 1
    num_columns = math.ceil(num_digits / num_rows)
    cell = rng.randint(*_CELL_SIDES)
    canvas = Image.new("L", (num_columns * cell, num_rows * cell))
    boxes = []
    for position, (original, _) in enumerate(chosen):
        row, column = divmod(position, num_columns)
        side = int(cell * rng.uniform(*_DIGIT_SHARES))
        drawn = _draw(rng, original, side, distort=split == "train")
        left = column * cell + rng.randint(0, cell - side)
        top = row * cell + rng.randint(0, cell - side)
        canvas.paste(drawn, (left, top))
        x1, y1, x2, y2 = drawn.point(_IS_INK).getbbox() or (0, 0, side, side)
        boxes.append((left + x1, top + y1, left + x2, top + y2))
    image = canvas.point(_PAPER).convert("RGB")
    return Strip(image, [label for _, label in chosen], boxes)


def _draw(rng: random.Random, original: Image.Image, side: int, distort: bool) -> Image.Image:
    """The original's 8 x 8 pixels as a square of `side` pixels; distorted, its corners are moved and turned."""
    low, high = MARGIN, MARGIN + SOURCE_SIDE
    if not distort:
        return original.resize((side, side), Image.Resampling.BICUBIC, (low, low, high, high))
    angle, middle = rng.uniform(-0.22, 0.22), MARGIN + SOURCE_SIDE / 2
    cosine, sine = math.cos(angle), math.sin(angle)
    corners = []
    for x, y in ((-1, -1), (-1, 1), (1, 1), (1, -1)):
        x = x * SOURCE_SIDE / 2 + rng.uniform(-0.9, 0.9)
        y = y * SOURCE_SIDE / 2 + rng.uniform(-0.9, 0.9)
        corners += [middle + x * cosine - y * sine, middle + x * sine + y * cosine]
    return original.transform((side, side), Image.Transform.QUAD, corners, Image.Resampling.BICUBIC)
