"""Pictures with more pixels than a limit: what is refused, and what a JPEG decoder makes smaller while it reads."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

_SCALES = (8, 4, 2)
# with so many times the pixels that are needed, the resize that follows does what it does with the whole picture
_SPARE = 4
_PILLOW = threading.RLock()


def reduction(image: Image.Image, max_megapixels: float, max_pixels: int) -> int:
    """By how much each side is divided while decoding: 1 up to the limit, above it 2, 4 or 8, for JPEG alone.

    `max_pixels` is what the picture is resized to at most: it is never reduced below that.

    Raises:
        ValueError: it has more pixels than the limit and cannot be reduced; says both cures.
    """
    num_pixels = image.width * image.height
    if num_pixels <= max_megapixels * 1e6:
        return 1
    # a progressive file is held whole as coefficients before the first pixel is there
    is_held = bool(image.info.get("progressive")) and num_pixels > 2 * max_megapixels * 1e6
    if isinstance(image, JpegImageFile) and not is_held:
        sizes = {scale: num_pixels / scale**2 for scale in _SCALES}
        fitting = [scale for scale in _SCALES if max_pixels <= sizes[scale] <= max_megapixels * 1e6]
        if fitting:
            return next((scale for scale in fitting if sizes[scale] >= _SPARE * max_pixels), fitting[-1])
    raise ValueError(
        f"it has {num_pixels / 1e6:,.1f} megapixels ({image.height:,} x {image.width:,}), more than "
        f"max_image_megapixels {max_megapixels:g}; raise max_image_megapixels, or give a smaller or a JPEG copy"
    )


def exceeds_pillows_limit(image: Image.Image) -> bool:
    return Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS


@contextmanager
def pillows_limit_lifted() -> Iterator[None]:
    """Pillow's own limit is a global of its module; ours stands in for it meanwhile."""
    with _PILLOW:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before
