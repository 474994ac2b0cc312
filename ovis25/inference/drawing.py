"""Boxes, points and labels on a picture, in sizes that fit it and inside its edges."""

from dataclasses import dataclass

from PIL import Image, ImageDraw

from ovis25.inference import fonts
from ovis25.text import escape_controls

_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")
_SMALLEST_LETTERS = 7
_LONGEST_LABEL = 200
_ELLIPSIS = "..."

Box = tuple[float, float, float, float]
Point = tuple[float, float]


@dataclass
class _Label:
    """Text that fits: its pieces, each with a font, and its size."""

    pieces: list[tuple[object, str]]
    width: int
    height: int
    ascent: int
    margin: int


def draw_regions(
    image: Image.Image, boxes: list[tuple[Box, str | None]], points: list[tuple[Point, str | None]]
) -> tuple[Image.Image, list[str]]:
    """A copy of the image with what was found, and what could not be drawn as it is written."""
    picture = image.convert("RGB").copy()
    draw, (width, height) = ImageDraw.Draw(picture), picture.size
    line = max(1 if min(picture.size) < 100 else 2, round(min(picture.size) / 200))
    labels, missing = [], []
    for index, (box, label) in enumerate(boxes):
        colour = _COLOURS[index % len(_COLOURS)]
        left, right = sorted(_inside(value, width) for value in (box[0], box[2]))
        top, bottom = sorted(_inside(value, height) for value in (box[1], box[3]))
        draw.rectangle((left, top, right, bottom), outline=colour, width=line)
        labels.append((left, top, label, colour))
    for index, ((x, y), label) in enumerate(points):
        colour, radius = _COLOURS[index % len(_COLOURS)], 3 * line
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=line)
        labels.append((x + radius, y + radius, label, colour))
    # after all lines, so that none crosses a label
    for x, y, label, colour in labels:
        if label and label.strip():
            missing += _write(draw, (x, y), label, colour, picture.size)
    return picture, [_missing_letters(missing)] if missing else []


def _inside(value: float, size: int) -> float:
    return min(max(value, 0), size - 1)


def _write(
    draw: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, colour: str, size: tuple[int, int]
) -> list[str]:
    """A label above the corner where there is room, else below it; returns the letters that no font has."""
    width, height = size
    text = " ".join(escape_controls(text).split())
    pieces, missing = fonts.runs(text[:_LONGEST_LABEL] + (_ELLIPSIS if len(text) > _LONGEST_LABEL else ""))
    label = _fitted(pieces, width, height)
    x, y = corner
    left = max(min(x, width - label.width), 0)
    top = y - label.height if y >= label.height else y
    top = max(min(top, height - label.height), 0)
    draw.rectangle((left, top, left + label.width - 1, top + label.height - 1), fill=colour)
    x = left + label.margin
    for font, piece in label.pieces:
        draw.text((x, top + label.ascent), piece, fill="white", font=font, anchor="ls")
        x += font.getlength(piece)
    return missing


def _fitted(pieces: list[tuple[object, str]], width: int, height: int) -> _Label:
    """The label in letters that suit the picture, smaller where it is too wide, cut where that is not enough."""
    size = max(min(round(min(width, height) / 28), 160), 11)
    label = _measured(pieces, size)
    while size > _SMALLEST_LETTERS and (label.width > width or label.height > height / 3):
        size = max(_SMALLEST_LETTERS, min(size - 1, int(size * width / label.width)))
        label = _measured(pieces, size)
    while label.width > width and sum(len(piece) for _, piece in pieces) > 1:
        pieces = _shortened(pieces)
        label = _measured([*pieces, (pieces[-1][0], _ELLIPSIS)], size)
    return label


def _shortened(pieces: list[tuple[object, str]]) -> list[tuple[object, str]]:
    *rest, (file, text) = pieces
    return [*rest, (file, text[:-1])] if len(text) > 1 or not rest else rest


def _measured(pieces: list[tuple[object, str]], size: int) -> _Label:
    loaded = [(fonts.load(file, size) or fonts.load(None, size), text) for file, text in pieces]
    metrics = [font.getmetrics() for font, _ in loaded]
    ascent, descent = max(a for a, _ in metrics), max(d for _, d in metrics)
    margin = max(1, round(size / 8))
    width = round(sum(font.getlength(text) for font, text in loaded)) + 2 * margin + 1
    return _Label(loaded, width, ascent + descent + 2, ascent + 1, margin)


def _missing_letters(letters: list[str]) -> str:
    unique = list(dict.fromkeys(letters))
    shown = ", ".join(f"{letter} (U+{ord(letter):04X})" for letter in unique[:5])
    more = f" and {len(unique) - 5} more letters" if len(unique) > 5 else ""
    return f"no installed font has {shown}{more}: drawn as code points; install one, such as Noto Sans CJK"
