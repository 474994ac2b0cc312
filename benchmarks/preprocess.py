"""How fast an encoded picture becomes patches, against the released preprocessing; its pixels are compared first.

The twin is what the released image processor does with one picture (transformers' slow Qwen2-VL processor), by
transformers' own functions. Pictures are noise, coloured like photographs.

    python benchmarks/preprocess.py [--seconds 2] [--json out.json]
"""

import argparse
import io
import json
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from transformers.image_transforms import normalize, rescale, resize, to_channel_dimension_format
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format, to_numpy_array

from ovis25.processing.image import open_image, patchify, patchify_bytes, smart_resize

SIZES = ((480, 640), (896, 896), (1080, 1920))
BUDGET = (448 * 448, 1792 * 1792)
FORMATS = {"JPEG": {"quality": 90}, "PNG": {}}


def released_patchify(image: Image.Image, min_pixels: int, max_pixels: int) -> torch.Tensor:
    """(N, 768) float32 by the released steps in their order."""
    # its conversion to RGB leaves an RGB picture as it is
    pixels = to_numpy_array(image)
    layout = infer_channel_dimension_format(pixels)
    height, width = smart_resize(*pixels.shape[:2], min_pixels, max_pixels)
    pixels = resize(pixels, (height, width), Image.Resampling.BILINEAR, input_data_format=layout)
    pixels = rescale(pixels, 0.00392156862745098, input_data_format=layout)
    pixels = normalize(pixels, [0.5] * 3, [0.5] * 3, input_data_format=layout)
    pixels = to_channel_dimension_format(pixels, ChannelDimension.FIRST, input_channel_dim=layout)
    # one picture is one frame: the released code stacks and repeats it for temporal patches of 1
    patches = np.tile(np.stack([pixels]), (1, 1, 1, 1))
    patches = patches.reshape(1, 1, 3, height // 32, 2, 16, width // 32, 2, 16).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return torch.tensor(patches.reshape(-1, 768))


def make_picture(height: int, width: int) -> Image.Image:
    """Noise that is weaker the finer it is, mostly grey: as large in JPEG (1.6 to 2.1 bits a pixel) as photographs."""
    generator, total = np.random.default_rng(0), np.zeros((height, width, 3))
    for octave in range(2, 12):
        side = 2**octave
        noise = generator.normal(size=(side, side, 1)) + 0.3 * generator.normal(size=(side, side, 3))
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel].astype(np.float32))
            total[..., channel] += np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC)) / side**0.5
    return Image.fromarray((128 + 50 * total / total.std()).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, file_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **FORMATS[file_format])
    return buffer.getvalue()


def medians_ms(functions: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each; they take turns, so that a busy moment of the machine strikes all of them."""
    times, start = {name: [] for name in functions}, time.perf_counter()
    while time.perf_counter() - start < seconds * len(functions):
        for name, function in functions.items():
            before = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - before)
    return {name: float(np.median(values)) * 1e3 for name, values in times.items()}


def measure(seconds: float) -> list[dict]:
    rows = []
    for size in SIZES:
        image = make_picture(*size)
        released, (patches, _) = released_patchify(image, *BUDGET), patchify_bytes([image], *BUDGET)
        assert np.array_equal(released.numpy(), patchify([image], *BUDGET)[0])
        functions = {
            "released_ms": lambda image=image: released_patchify(image, *BUDGET),
            "ours_ms": lambda image=image: patchify_bytes([image], *BUDGET),
            "ours_float32_ms": lambda image=image: patchify([image], *BUDGET),
        }
        row = {
            "size": "{} x {}".format(*size),
            "released_bytes": released.nbytes,
            "ours_bytes": patches.nbytes,
        }
        for name in FORMATS:
            file = encode(image, name)
            row[f"{name}_bits_per_pixel"] = 8 * len(file) / (size[0] * size[1])
            functions |= {
                f"{name}_decode_ms": lambda file=file: open_image(file),
                f"{name}_released_ms": lambda file=file: released_patchify(Image.open(io.BytesIO(file)), *BUDGET),
                f"{name}_ours_ms": lambda file=file: patchify_bytes([open_image(file)], *BUDGET),
            }
        rows.append({**row, **medians_ms(functions, seconds)})
    return rows


def report(rows: list[dict]) -> None:
    print("one core, milliseconds a picture; ours sends uint8, the released code float32\n")
    print(f"{'picture':>12} {'step':>16} {'released':>9} {'ours':>7} {'ratio':>6}")
    for row in rows:
        steps = {"pixels": ("released_ms", "ours_ms"), "pixels, float32": ("released_ms", "ours_float32_ms")}
        steps |= {f"{name} + pixels": (f"{name}_released_ms", f"{name}_ours_ms") for name in FORMATS}
        for step, (released, ours) in steps.items():
            ratio = row[released] / row[ours]
            print(f"{row['size']:>12} {step:>16} {row[released]:>9.2f} {row[ours]:>7.2f} {ratio:>6.2f}")
        decoding = ", ".join(
            f"{name} {row[f'{name}_decode_ms']:.2f} ({row[f'{name}_bits_per_pixel']:.1f} bits a pixel)"
            for name in FORMATS
        )
        print(f"{'':>12} decoding alone: {decoding}")
        print(f"{'':>12} bytes a picture: {row['released_bytes']:,} released, {row['ours_bytes']:,} ours\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time of each figure")
    parser.add_argument("--json", help="also write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.seconds)
    report(rows)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
