"""The digits that strips are drawn from: 1,797 images of 8 x 8 pixels with values 0..16, in `digits.npz`.

README.md beside it says where they come from. A fixed permutation deals them to three splits that share no image:
300 for `test`, 200 for `validation` and 1,297 for `train`.
"""

import functools
import random
from pathlib import Path

import numpy as np
from PIL import Image

SPLITS = ("train", "validation", "test")
# the source's 8 x 8 pixels, and a margin of paper around them that rotated corners may reach into
SOURCE_SIDE, MARGIN = 8, 2

_FILE = Path(__file__).with_name("digits.npz")
_NUM_DIGITS, _LARGEST = 1797, 16
_SPLIT_STARTS = {"test": (0, 300), "validation": (300, 500), "train": (500, _NUM_DIGITS)}


@functools.cache
def digit_indices(split: str) -> list[int]:
    """Which of the images belong to a split.

    Raises:
        ValueError: an unknown split; names the three.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    order = list(range(_NUM_DIGITS))
    random.Random("load_digits").shuffle(order)
    return order[slice(*_SPLIT_STARTS[split])]


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """(pixels, uint8 of (1797, 8, 8) with values 0..16, from paper to ink; labels, uint8 of (1797,))."""
    with np.load(_FILE) as file:
        return file["pixels"], file["labels"]


@functools.cache
def originals(split: str) -> list[tuple[Image.Image, int]]:
    """(darkness image with margin, label) of each digit of the split."""
    pixels, labels = read_digits()
    darkness = np.pad((pixels * (255 / _LARGEST)).round().astype(np.uint8), ((0, 0), *[(MARGIN, MARGIN)] * 2))
    return [(Image.fromarray(darkness[index]), int(labels[index])) for index in digit_indices(split)]
