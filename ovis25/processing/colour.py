"""Pictures of every mode as 8-bit RGB, in strips: what is made on the way is never as large as the picture."""

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

_STRIP_PIXELS = 2**20
_SIXTEEN_BITS = 65535.0


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB: transparency on white; 16 bits scaled to 8; floats scaled so that the largest (at least 1) is 255.

    Of floats the finite ones set the scale: infinity is white, minus infinity and NaN are black.

    Raises:
        ValueError: no value of a float picture is finite.
    """
    if image.mode.startswith("I"):
        return _in_strips(image, lambda strip: _scaled(strip, _SIXTEEN_BITS))
    if image.mode == "F":
        top = _largest(image)
        return _in_strips(image, lambda strip: _scaled(strip, top))
    if image.has_transparency_data:
        return _in_strips(image, _on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    if image.width * image.height <= _STRIP_PIXELS:
        return convert(image)
    result = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        result.paste(convert(strip), (0, top))
    return result


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """(first row, its rows) from top to bottom."""
    rows = max(1, _STRIP_PIXELS // max(image.width, 1))
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _scaled(image: Image.Image, top: float) -> Image.Image:
    # Pillow's own conversion clips at 255
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
    return Image.fromarray((values / top * 255.0).clip(0, 255).round().astype(np.uint8)).convert("RGB")


def _largest(image: Image.Image) -> float:
    """The largest finite value, at least 1."""
    largest = []
    for _, strip in _strips(image):
        values = np.asarray(strip)
        finite = values[np.isfinite(values)]
        largest += [float(finite.max())] if finite.size else []
    if not largest and image.width * image.height:
        raise ValueError("each of its values is NaN or infinite, so it has no brightness; write it anew")
    return max([*largest, 1.0])


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
