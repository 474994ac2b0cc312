"""The crop tool: a part of an image, from its original resolution."""

import math
import re
from collections.abc import Sequence

from PIL import Image

from ovis25.reduced import full_size, remember_full_size
from ovis25.text import shorten
from ovis25.tools.base import ToolError

# every character can match in one way only: digits without end take no longer than they are
_NUMBER = r"\s*([-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)\s*"
_MAX_CHARACTERS = 200
_CALL = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]\s*(?:image\s+(\d+))?", re.IGNORECASE)


class CropTool:
    """`Crop [x1, y1, x2, y2]`: pixels of the original image, or shares of it where all four lie in [0, 1].

    `Crop [...] image 2` chooses among several; earlier crops count after the request's images.
    The box is clamped to the image and covers every pixel that it touches.
    """

    name = "Crop"
    description = "Shows a part of an image in its original resolution."
    usage = "Crop [x1, y1, x2, y2]"

    def run(self, arguments: str, images: Sequence[Image.Image]) -> Image.Image:
        match = _CALL.fullmatch(arguments.strip()) if len(arguments) <= _MAX_CHARACTERS else None
        if match is None:
            raise ToolError(f"{shorten(arguments)} is no box; write {self.usage}, or {self.usage} image 2")
        *numbers, number = match.groups()
        index = int(number or 1)
        if not 1 <= index <= len(images):
            raise ToolError(f"there is no image {index}; there are {len(images)}")
        image = images[index - 1]
        x1, y1, x2, y2 = map(float, numbers)
        height, width = full_size(image)
        if all(0 <= value <= 1 for value in (x1, y1, x2, y2)):
            x1, y1, x2, y2 = x1 * width, y1 * height, x2 * width, y2 * height
        # numbers may be infinite: they are brought into the image before they become whole
        left, right = math.floor(_within(x1, width)), math.ceil(_within(x2, width))
        top, bottom = math.floor(_within(y1, height)), math.ceil(_within(y2, height))
        if left >= right or top >= bottom:
            raise ToolError(
                f"the box {arguments.strip()} holds nothing of the image, which is {width} wide and {height} high; "
                "x1 < x2 and y1 < y2 must lie inside"
            )
        return _cropped(image, (left, top, right, bottom))


def _cropped(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """The part in `box`, which is in pixels of the whole picture where this is a reduced one."""
    height, width = full_size(image)
    if (width, height) == image.size:
        return image.crop(box)
    shares = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
    left, top = math.floor(shares[0] * image.width), math.floor(shares[1] * image.height)
    part = image.crop((left, top, math.ceil(shares[2] * image.width), math.ceil(shares[3] * image.height)))
    return remember_full_size(part, box[3] - box[1], box[2] - box[0])


def _within(value: float, size: int) -> float:
    return min(max(value, 0.0), float(size))
