"""From an image file to patches: opening, the target size, pixels.

The arithmetic is the released preprocessing's, bit for bit (remote code of AIDC-AI/Ovis2.5-9B).
"""

import io
import math
import struct
import time
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile

from ovis25.constants import HIDDEN_STRIDE, PATCH_SIZE, PIXEL_TABLE, SIZE_FACTOR

ImageSource = str | Path | bytes | Image.Image

_MAX_ASPECT_RATIO = 200
# of a picture from the net: how long it may take in all, and how large the file may be
DOWNLOAD_SECONDS = 30.0
DOWNLOAD_BYTES = 64 * 2**20
_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_PNG_TEXT = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")


def open_image(source: ImageSource) -> Image.Image:
    """Read a path, http(s) address, bytes or PIL image as upright RGB.

    EXIF orientation is applied; transparency is laid on white; 16-bit grey is scaled to 8 bits; an animated
    file gives its first frame.

    Raises:
        ValueError: the file is missing or is no image that Pillow reads whole.
    """
    image = _open_lazily(source)
    try:
        image.load()
        # Pillow copies a picture that stands upright already
        is_upright = image.getexif().get(_EXIF_ORIENTATION, 1) == 1
        return _to_rgb(image if is_upright else ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{_describe(source)} cannot be decoded: {error}") from error


def image_size(source: ImageSource) -> tuple[int, int]:
    """Upright (height, width), read from the header alone. Raises as `open_image`."""
    image = _open_lazily(source)
    width, height = image.size
    try:
        # Pillow decodes a whole PNG to look for EXIF data behind the pixels
        has_header = isinstance(image, PngImageFile) and image.fp and not _has_text_behind_pixels(image)
        exif = Image.Image.getexif(image) if has_header else image.getexif()
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{_describe(source)} cannot be decoded: {error}") from error
    return (width, height) if exif.get(_EXIF_ORIENTATION) in _SIDEWAYS else (height, width)


def _has_text_behind_pixels(image: PngImageFile) -> bool:
    """Whether a PNG file has chunks that may tell its orientation after its pixels; looks at chunk headers alone."""
    file, position = image.fp, image.fp.tell()
    seen_pixels = False
    # the eight bytes of the signature, then chunks of length, name, data and checksum
    file.seek(8)
    try:
        while len(header := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", header)
            if seen_pixels and name in _PNG_TEXT:
                return True
            seen_pixels = seen_pixels or name == b"IDAT"
            file.seek(length + 4, io.SEEK_CUR)
        return False
    finally:
        file.seek(position)


def _open_lazily(source: ImageSource) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        source = download(source)
    if isinstance(source, (str, Path)) and not Path(source).is_file():
        raise ValueError(f"{source} does not exist")
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{_describe(source)} is no readable image: {error}") from error


def download(address: str) -> bytes:
    """The file behind an http(s) address. Raises ValueError: unreachable, too slow, or too large."""
    deadline, chunks, size = time.monotonic() + DOWNLOAD_SECONDS, [], 0
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "ovis25"})
        with urllib.request.urlopen(request, timeout=DOWNLOAD_SECONDS) as response:
            while chunk := response.read(2**16):
                chunks.append(chunk)
                size += len(chunk)
                if size > DOWNLOAD_BYTES:
                    raise ValueError(f"{address} is larger than {DOWNLOAD_BYTES // 2**20} MiB")
                if time.monotonic() > deadline:
                    raise ValueError(f"{address} took longer than {DOWNLOAD_SECONDS:.0f} s ({size} bytes so far)")
    except OSError as error:
        # urllib's own errors and a socket's are all of this kind
        raise ValueError(f"{address} cannot be fetched: {error}") from error
    return b"".join(chunks)


def _describe(source: ImageSource) -> str:
    if isinstance(source, bytes):
        return f"an image of {len(source)} bytes"
    return "a PIL image" if isinstance(source, Image.Image) else str(source)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion clips at 255
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I") else max(values.max(initial=0.0), 1.0)
        return Image.fromarray((values / top * 255.0).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


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
    """Resize RGB frames to the size that fits the first one, and cut them into patches.

    Returns (frames*h*w, 768) uint8, which PIXEL_TABLE turns into the released pixels, and the grid (frames, h, w) in
    patches. Rows run in the order (frame, block row, block column, row in block, column in block), a block being 2 x 2
    patches; inside a row the order is (channel, pixel row, pixel column).
    """
    width, height = frames[0].size
    height, width = smart_resize(height, width, min_pixels, max_pixels)
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
