"""How large pictures may become and how many frames are taken, under the names of the config file."""

from dataclasses import dataclass, fields

from ovis25.constants import MULTIPLE_IMAGE_PIXELS, SINGLE_IMAGE_PIXELS, VIDEO_PIXELS

KINDS = ("single_image", "multiple_image", "video")


@dataclass(frozen=True)
class VisualLimits:
    """Pixel budgets per kind of input, and frame numbers. The defaults are the released training's.

    Raises:
        ValueError: a minimum below 1 or above its maximum.
    """

    single_image_min_pixels: int = SINGLE_IMAGE_PIXELS[0]
    single_image_max_pixels: int = SINGLE_IMAGE_PIXELS[1]
    multiple_image_min_pixels: int = MULTIPLE_IMAGE_PIXELS[0]
    multiple_image_max_pixels: int = MULTIPLE_IMAGE_PIXELS[1]
    video_min_pixels: int = VIDEO_PIXELS[0]
    video_max_pixels: int = VIDEO_PIXELS[1]
    min_frames: int = 8
    max_frames: int = 8

    def __post_init__(self):
        for kind in KINDS:
            low, high = self.budget(kind)
            if not 1 <= low <= high:
                raise ValueError(f"{kind}_min_pixels {low} must be at least 1 and at most {kind}_max_pixels {high}")
        if not 1 <= self.min_frames <= self.max_frames:
            raise ValueError(
                f"min_frames {self.min_frames} must be at least 1 and at most max_frames {self.max_frames}"
            )

    def budget(self, kind: str) -> tuple[int, int]:
        """(min_pixels, max_pixels) of "single_image", "multiple_image" or "video"."""
        return getattr(self, f"{kind}_min_pixels"), getattr(self, f"{kind}_max_pixels")


LIMIT_NAMES = tuple(field.name for field in fields(VisualLimits))

# At inference the released code gives every kind of input the single image's budget.
INFERENCE_LIMITS = VisualLimits(
    multiple_image_max_pixels=SINGLE_IMAGE_PIXELS[1], video_max_pixels=SINGLE_IMAGE_PIXELS[1]
)
