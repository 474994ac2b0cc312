"""How fast pictures become patches, against the released preprocessing's arithmetic; pixels are compared first.

python benchmarks/preprocess.py [--seconds 2] [--json out.json]
"""

import argparse
import json
import time

import numpy as np
import torch
from PIL import Image

from ovis25.processing.image import patchify, smart_resize

SIZES = ((480, 640), (896, 896), (1080, 1920))
BUDGET = (448 * 448, 1792 * 1792)


def released_patchify(image: Image.Image, min_pixels: int, max_pixels: int) -> np.ndarray:
    """The released steps in their order: resize, rescale in float64, normalise, then the patch transpose."""
    height, width = smart_resize(image.height, image.width, min_pixels, max_pixels)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    pixels = (pixels.astype(np.float64) * 0.00392156862745098).astype(np.float32)
    pixels = (pixels - np.float32(0.5)) / np.float32(0.5)
    patches = np.tile(pixels.transpose(2, 0, 1)[None], (1, 1, 1, 1))
    patches = patches.reshape(1, 1, 3, height // 32, 2, 16, width // 32, 2, 16).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return patches.reshape(-1, 768)


def images_per_second(function, seconds: float) -> float:
    function()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        function()
        count += 1
    return count / (time.perf_counter() - start)


def measure(seconds: float) -> list[dict]:
    rows = []
    generator = np.random.default_rng(0)
    for height, width in SIZES:
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        assert np.array_equal(patchify([image], *BUDGET)[0], released_patchify(image, *BUDGET))
        plain = images_per_second(lambda image=image: released_patchify(image, *BUDGET), seconds)
        ours = images_per_second(lambda image=image: patchify([image], *BUDGET), seconds)
        rows.append({"size": f"{height} x {width}", "released_per_s": plain, "ours_per_s": ours})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time of each figure")
    parser.add_argument("--json", help="also write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.seconds)
    print(
        f"{'image':>12} {'released /s':>12} {'ours /s':>9} {'ratio':>6}   (one core, resize and patches, no decoding)"
    )
    for row in rows:
        ratio = row["ours_per_s"] / row["released_per_s"]
        print(f"{row['size']:>12} {row['released_per_s']:>12.1f} {row['ours_per_s']:>9.1f} {ratio:>6.2f}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
