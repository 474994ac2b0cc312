"""How large pictures may become and how many frames are taken, under the names of the config file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from ovis25.constants import MAX_IMAGE_MEGAPIXELS, MULTIPLE_IMAGE_PIXELS, SINGLE_IMAGE_PIXELS, VIDEO_PIXELS

KINDS = ("single_image", "multiple_image", "video")
_DEFAULT_MINIMA = {
    "single_image_min_pixels": SINGLE_IMAGE_PIXELS[0],
    "multiple_image_min_pixels": MULTIPLE_IMAGE_PIXELS[0],
    "video_min_pixels": VIDEO_PIXELS[0],
}


@dataclass(frozen=True)
class VisualLimits:
    """Pixel budgets per kind of input, frame numbers, and how large a picture may be at all. The defaults are the
    released training's.

    A minimum left at None is the default one, or the maximum where that is lower; `max_image_megapixels` is a bound for
    files, see `open_image`.

    Raises:
        ValueError: a minimum below 1 or above its maximum.
    """

    single_image_min_pixels: int | None = None
    single_image_max_pixels: int = SINGLE_IMAGE_PIXELS[1]
    multiple_image_min_pixels: int | None = None
    multiple_image_max_pixels: int = MULTIPLE_IMAGE_PIXELS[1]
    video_min_pixels: int | None = None
    video_max_pixels: int = VIDEO_PIXELS[1]
    min_frames: int = 8
    max_frames: int = 8
    max_image_megapixels: float = MAX_IMAGE_MEGAPIXELS

    def __post_init__(self):
        given = {name: value for name in LIMIT_NAMES if (value := getattr(self, name)) is not None}
        for name, minimum in following_minima(given).items():
            object.__setattr__(self, name, minimum)
        for kind in KINDS:
            low, high = self.budget(kind)
            if not 1 <= low <= high:
                raise ValueError(f"{kind}_min_pixels {low} must be at least 1 and at most {kind}_max_pixels {high}")
        if not 1 <= self.min_frames <= self.max_frames:
            raise ValueError(
                f"min_frames {self.min_frames} must be at least 1 and at most max_frames {self.max_frames}"
            )
        if not 0 < self.max_image_megapixels < math.inf:
            raise ValueError(f"max_image_megapixels {self.max_image_megapixels} must be a number above 0")

    def budget(self, kind: str) -> tuple[int, int]:
        """(min_pixels, max_pixels) of "single_image", "multiple_image" or "video"."""
        return getattr(self, f"{kind}_min_pixels"), getattr(self, f"{kind}_max_pixels")

    def changed(self, **changes) -> "VisualLimits":
        """A copy with other values; a minimum that is not among them follows a lower maximum that is."""
        minima = {f"{kind}_min_pixels": self.budget(kind)[0] for kind in KINDS}
        return replace(self, **{**changes, **following_minima(changes, minima)})


def following_minima(given: Mapping[str, int], minima: Mapping[str, int] = _DEFAULT_MINIMA) -> dict[str, int]:
    """The minimum of each kind that `given` does not name: the one of `minima`, or the given maximum where that is
    lower.
    """
    return {
        name: min(minimum, given.get(name.replace("_min_", "_max_"), minimum))
        for name, minimum in minima.items()
        if name not in given
    }


LIMIT_NAMES = tuple(field.name for field in fields(VisualLimits))

# At inference the released code gives every kind of input the single image's budget.
INFERENCE_LIMITS = VisualLimits(
    multiple_image_max_pixels=SINGLE_IMAGE_PIXELS[1], video_max_pixels=SINGLE_IMAGE_PIXELS[1]
)
