"""How a video's frames stand upright: the display matrix that cameras, phones and editors write beside the pixels."""

import struct

from PIL import Image

# where the matrix sends (right, down): a, b and c, d of its first two rows
_TURNS = {
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
)  # fmt: skip


def turn_of(matrix: bytes | None) -> Image.Transpose | None:
    """What makes a stored frame upright, of FFmpeg's display matrix (nine int32); None where nothing is to be done.

    The matrix sends a stored pixel (x, y) to (a*x + c*y, b*x + d*y). Turns by other than right angles count as the
    nearest right angle; a matrix without a direction counts as upright.
    """
    if matrix is None or len(matrix) < 36:
        return None
    a, b, _, c, d = struct.unpack("=9i", matrix[:36])[:5]
    if abs(a) + abs(d) >= abs(b) + abs(c):
        signs = (_sign(a), 0, 0, _sign(d))
    else:
        signs = (0, _sign(b), _sign(c), 0)
    return _TURNS.get(signs)


def upright(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)


def upright_size(height: int, width: int, turn: Image.Transpose | None) -> tuple[int, int]:
    """(height, width) after the turn."""
    return (width, height) if turn in _SIDEWAYS else (height, width)


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)
