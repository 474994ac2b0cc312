"""The most that a config lets into one micro-batch."""

from dataclasses import dataclass

from ovis25.constants import HIDDEN_STRIDE, PATCH_SIZE
from ovis25.training.config import TrainConfig

KINDS = ("image", "images", "video", "text")
_PIXELS_OF_TOKEN = (PATCH_SIZE * HIDDEN_STRIDE) ** 2


@dataclass(frozen=True)
class Workload:
    """One micro-batch on one device: `num_samples` of so many tokens and patches each.

    At least `min_learned` tokens of each are learned, or all that are not visual.
    """

    num_samples: int
    num_tokens: int
    num_patches: int
    min_learned: int = 0

    @property
    def num_learned(self) -> int:
        return self.num_samples * max(self.num_tokens - self.num_patches // HIDDEN_STRIDE**2, self.min_learned, 0)


def patches_of(config: TrainConfig, kind: str) -> int:
    """Patches of the largest sample, or packed row, of an "image", "images", "video" or "text".

    Several images are as many of full size as multimodal_max_length holds, each between its two indicators; so are the
    samples of a packed row. A sample that is longer would be shrunk.
    """
    longest = config.multimodal_max_length
    pixels, frames, repeats = {
        "image": (config.single_image_max_pixels, 1, config.packing),
        "images": (config.multiple_image_max_pixels, 1, True),
        "video": (config.video_max_pixels, config.max_frames, config.packing),
        "text": (0, 0, False),
    }[kind]
    tokens = min(frames * (pixels // _PIXELS_OF_TOKEN), longest)
    return HIDDEN_STRIDE**2 * tokens * (max(longest // (tokens + 2), 1) if repeats and tokens else 1)


def largest_workload(config: TrainConfig, num_samples: int, kinds: tuple[str, ...] = KINDS) -> Workload:
    """No micro-batch of these kinds has more tokens, patches or learned tokens than this one, in which all meet."""
    visual = [kind for kind in kinds if kind != "text"]
    longest = config.multimodal_max_length if visual or config.packing else 0
    text = 0
    if "text" in kinds:
        text = longest if config.packing else config.text_max_length
    smallest = [getattr(config, f"{name}_min_pixels") // _PIXELS_OF_TOKEN for name in ("single_image", "video")]
    learned = max(longest - min(smallest), 0) if visual else 0
    patches = max((patches_of(config, kind) for kind in visual), default=0)
    if config.cache_visual_embeddings:
        patches = 0  # read, not computed
    return Workload(num_samples, max(longest, text), patches, max(learned, text))
