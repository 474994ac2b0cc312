"""Chunks of PNG files: texts that stand behind the pixels, and texts that are too large for Pillow.

A file is a signature of eight bytes, then chunks of length, name, data and checksum.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXT = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
_COMPRESSED = (b"iCCP", b"iTXt", b"zTXt")


def is_png(file: Path | io.BytesIO) -> bool:
    """Whether the file begins with PNG's signature; a file object is rewound."""
    if isinstance(file, Path):
        with open(file, "rb") as opened:
            return opened.read(len(SIGNATURE)) == SIGNATURE
    file.seek(0)
    return file.read(len(SIGNATURE)) == SIGNATURE


def has_text_behind_pixels(file: BinaryIO) -> bool:
    """Whether chunks that may tell the orientation come after the pixels; looks at chunk headers alone."""
    position, seen_pixels = file.tell(), False
    try:
        for name, _, _ in _chunks(file):
            if seen_pixels and name in _TEXT:
                return True
            seen_pixels = seen_pixels or name == b"IDAT"
        return False
    finally:
        file.seek(position)


def without_large_texts(file: Path | io.BytesIO) -> io.BytesIO:
    """A copy without the texts and profiles that Pillow refuses for their size; pixels need none of them."""
    content = file.read_bytes() if isinstance(file, Path) else file.getvalue()
    kept, total = io.BytesIO(), 0
    kept.write(SIGNATURE)
    for name, start, length in _chunks(io.BytesIO(content)):
        if name in _TEXT or name in _COMPRESSED:
            size = _text_size(name, content[start : start + length])
            total += size
            if size > PngImagePlugin.MAX_TEXT_CHUNK or total > PngImagePlugin.MAX_TEXT_MEMORY:
                total -= size
                continue
        kept.write(content[start - 8 : start + length + 4])
    kept.seek(0)
    return kept


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """(name, start of the data, its length) of each chunk."""
    position = len(SIGNATURE)
    file.seek(position)
    while len(header := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", header)
        yield name, position + 8, length
        position += length + 12
        file.seek(position)


def _text_size(name: bytes, data: bytes) -> int:
    """Bytes of a text or profile; of one beyond Pillow's limit only that it is beyond."""
    _, _, rest = data.partition(b"\0")
    if name == b"iTXt":
        # flag, method, language, translated keyword
        is_compressed, (*_, body) = rest[:1] == b"\1", rest[2:].split(b"\0", 2)
    else:
        is_compressed, body = name in _COMPRESSED, rest[1:]
    if not is_compressed:
        return len(data)
    try:
        return len(zlib.decompressobj().decompress(body, PngImagePlugin.MAX_TEXT_CHUNK + 1))
    except zlib.error:
        return len(data)
