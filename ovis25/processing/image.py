"""From an image file to patches: opening, the target size, pixels.

The arithmetic is the released preprocessing's, bit for bit (remote code of AIDC-AI/Ovis2.5-9B).
"""

import io
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from ovis25.constants import (
    HIDDEN_STRIDE,
    MAX_IMAGE_MEGAPIXELS,
    PATCH_SIZE,
    PIXEL_TABLE,
    SINGLE_IMAGE_PIXELS,
    SIZE_FACTOR,
)
from ovis25.processing.colour import to_rgb
from ovis25.processing.large import exceeds_pillows_limit, pillows_limit_lifted, reduction
from ovis25.processing.png import has_text_behind_pixels, is_png, without_large_texts
from ovis25.processing.sources import ImageSource, as_file, naming
from ovis25.reduced import full_size, remember_full_size

Result = TypeVar("Result")

_MAX_ASPECT_RATIO = 200
_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
# formats whose header may say another size than the pixels have, or whose parts are chosen while loading
_SIZED_BY_DECODING = ("CUR", "EPS", "ICNS", "ICO", "WMF")


def open_image(
    source: ImageSource,
    max_megapixels: float = MAX_IMAGE_MEGAPIXELS,
    max_pixels: int = SINGLE_IMAGE_PIXELS[1],
) -> Image.Image:
    """Read a path, http(s) address, `data:` URL, bytes or PIL image as upright RGB.

    EXIF orientation is applied; transparency is laid on white; 16-bit grey is scaled to 8 bits, floats by their
    largest finite value; an animated file gives its first frame.

    A JPEG of more than `max_megapixels` is decoded at 1/2, 1/4 or 1/8 of its sides, but with no less than `max_pixels`
    (what it will be resized to at most); `full_size` tells its whole size. A PIL image is read whatever its size.

    Raises:
        ValueError: the file is missing, is no image that Pillow reads whole, or has more pixels than allowed.
    """
    return _read(source, partial(_upright_rgb, max_megapixels=max_megapixels, max_pixels=max_pixels))


def image_size(
    source: ImageSource,
    max_megapixels: float = MAX_IMAGE_MEGAPIXELS,
    max_pixels: int = SINGLE_IMAGE_PIXELS[1],
) -> tuple[int, int]:
    """Upright (height, width) of the whole picture, read from the header alone. Raises as `open_image`."""
    return _read(source, partial(_upright_size, max_megapixels=max_megapixels, max_pixels=max_pixels))


def _read(source: ImageSource, use: Callable[[Image.Image], Result]) -> Result:
    """What `use` makes of the opened picture."""
    if isinstance(source, Image.Image):
        with naming(source, "cannot be decoded"):
            return use(source, max_megapixels=math.inf)
    file = as_file(source)
    with naming(source, "is no readable image"):
        image = _open(file)
    limit = pillows_limit_lifted() if exceeds_pillows_limit(image) else nullcontext()
    with naming(source, "cannot be decoded"), limit:
        try:
            return use(image)
        except ValueError:
            if not isinstance(image, PngImageFile):
                raise
            # its texts may stand behind the pixels
            return use(Image.open(without_large_texts(file)))


def _open(file: Path | io.BytesIO) -> Image.Image:
    try:
        return Image.open(file)
    except Image.DecompressionBombError:
        # the limit is ours, and a JPEG may be larger
        with pillows_limit_lifted():
            return Image.open(file)
    except ValueError:
        if not is_png(file):
            raise
        return Image.open(without_large_texts(file))


def _upright_rgb(image: Image.Image, max_megapixels: float, max_pixels: int) -> Image.Image:
    scale = reduction(image, max_megapixels, max_pixels)
    height, width = image.height, image.width
    if scale > 1:
        image.draft(None, (width // scale, height // scale))
    image.load()
    # Pillow copies a picture that stands upright already
    orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    result = to_rgb(image if orientation == 1 else ImageOps.exif_transpose(image))
    if scale > 1:
        remember_full_size(result, *((width, height) if orientation in _SIDEWAYS else (height, width)))
    return result


def _upright_size(image: Image.Image, max_megapixels: float, max_pixels: int) -> tuple[int, int]:
    reduction(image, max_megapixels, max_pixels)
    if image.format in _SIZED_BY_DECODING:
        image.load()
    # Pillow decodes a whole PNG to look for EXIF data behind the pixels
    has_header = isinstance(image, PngImageFile) and image.fp and not has_text_behind_pixels(image.fp)
    exif = Image.Image.getexif(image) if has_header else image.getexif()
    height, width = full_size(image)
    if exif.get(_EXIF_ORIENTATION) not in _SIDEWAYS:
        return height, width
    if isinstance(image, TiffImageFile):
        # Pillow turns these while loading, and some versions tell the turned size before
        width, height = (int(image.tag_v2[tag]) for tag in (IMAGEWIDTH, IMAGELENGTH))
    return width, height


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The target (height, width): multiples of 32 whose product lies within the budget where the shape allows.

    Example: (480, 640) with 448^2..1792^2 gives (480, 640); (17, 31) gives (352, 608).

    Raises:
        ValueError: a side or a bound is not positive, or the minimum exceeds the maximum.
    """
    if height <= 0 or width <= 0:
        raise ValueError(f"an image of {height} x {width} pixels has nothing to show")
    if not 0 < min_pixels <= max_pixels:
        raise ValueError(f"pixel budget: min_pixels {min_pixels} must be positive and at most max_pixels {max_pixels}")
    if min(height, width) < SIZE_FACTOR:
        if height < width:
            height, width = SIZE_FACTOR, round(SIZE_FACTOR / height * width)
        else:
            height, width = round(SIZE_FACTOR / width * height), SIZE_FACTOR
    elif max(height, width) / min(height, width) > _MAX_ASPECT_RATIO:
        if height > width:
            height = _MAX_ASPECT_RATIO * width
        else:
            width = _MAX_ASPECT_RATIO * height
    target_height = round(height / SIZE_FACTOR) * SIZE_FACTOR
    target_width = round(width / SIZE_FACTOR) * SIZE_FACTOR
    if target_height * target_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        target_height = math.floor(height / scale / SIZE_FACTOR) * SIZE_FACTOR
        target_width = math.floor(width / scale / SIZE_FACTOR) * SIZE_FACTOR
    elif target_height * target_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        target_height = math.ceil(height * scale / SIZE_FACTOR) * SIZE_FACTOR
        target_width = math.ceil(width * scale / SIZE_FACTOR) * SIZE_FACTOR
    if target_height == 0 or target_width == 0:
        raise ValueError(
            f"{height} x {width} pixels are too long and thin for max_pixels {max_pixels}: a side would be 0; raise it"
        )
    return target_height, target_width


def grid_of(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in patches after resizing."""
    target_height, target_width = smart_resize(height, width, min_pixels, max_pixels)
    return target_height // PATCH_SIZE, target_width // PATCH_SIZE


def num_visual_tokens(grid_thw: tuple[int, int, int]) -> int:
    """Sequence positions that a visual input takes, its two indicators not counted: t*h*w/4."""
    frames, height, width = grid_thw
    return frames * height * width // HIDDEN_STRIDE**2


def patchify(frames: list[Image.Image], min_pixels: int, max_pixels: int) -> tuple[np.ndarray, tuple[int, int, int]]:
    """`patchify_bytes`, with the patches as (frames*h*w, 768) float32 in [-1, 1]."""
    patches, grid = patchify_bytes(frames, min_pixels, max_pixels)
    # no byte is out of range, and numpy is faster where it need not look
    return np.take(PIXEL_TABLE, patches, mode="clip"), grid


def patchify_bytes(
    frames: list[Image.Image], min_pixels: int, max_pixels: int
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Resize RGB frames to the size that fits the first one (the whole of a reduced one), and cut them into patches.

    Returns (frames*h*w, 768) uint8, which PIXEL_TABLE turns into the released pixels, and the grid (frames, h, w) in
    patches. Rows run in the order (frame, block row, block column, row in block, column in block), a block being 2 x 2
    patches; inside a row the order is (channel, pixel row, pixel column).
    """
    height, width = smart_resize(*full_size(frames[0]), min_pixels, max_pixels)
    rows, columns = height // SIZE_FACTOR, width // SIZE_FACTOR
    patches = np.empty(
        (len(frames), rows, columns, HIDDEN_STRIDE, HIDDEN_STRIDE, 3, PATCH_SIZE, PATCH_SIZE), dtype=np.uint8
    )
    for index, frame in enumerate(frames):
        if frame.size != (width, height):
            frame = frame.resize((width, height), Image.Resampling.BILINEAR)
        blocks = np.asarray(frame).reshape(rows, HIDDEN_STRIDE, PATCH_SIZE, columns, HIDDEN_STRIDE, PATCH_SIZE, 3)
        patches[index] = blocks.transpose(0, 3, 1, 4, 6, 2, 5)
    grid = (len(frames), height // PATCH_SIZE, width // PATCH_SIZE)
    return patches.reshape(-1, 3 * PATCH_SIZE * PATCH_SIZE), grid
