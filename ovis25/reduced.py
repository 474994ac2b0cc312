"""Pictures that were reduced while decoding: they remember how large the whole one is."""

from PIL import Image

_KEY = "ovis25_full_size"


def full_size(image: Image.Image) -> tuple[int, int]:
    """(height, width), of a picture that was reduced while decoding those of the whole one."""
    height, width, *seen = image.info.get(_KEY, (0, 0, 0, 0))
    # a part of it inherits `info`, but has another size
    return (height, width) if tuple(seen) == image.size[::-1] else image.size[::-1]


def remember_full_size(image: Image.Image, height: int, width: int) -> Image.Image:
    """The picture itself, which now knows how large the whole is of which it is a reduced one."""
    image.info = {**image.info, _KEY: (height, width, image.height, image.width)}
    return image
