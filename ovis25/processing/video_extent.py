"""Whether a video file ends before its container says: the outermost boxes of MP4, AVI and Matroska tell their sizes.

A file whose outermost box reaches beyond its end was cut, by a broken download or a full disk. Other containers do not
tell how long they are.
"""

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO

# boxes that hold pictures or their index; what follows the last of them may be anything
_MP4_BOXES = (
    b"ftyp",
    b"moov",
    b"moof",
    b"mdat",
    b"free",
    b"skip",
    b"wide",
    b"sidx",
    b"styp",
    b"uuid",
    b"mfra",
    b"udta",
)
_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067


def size_of(file: BinaryIO) -> int:
    """Bytes of the file."""
    return file.seek(0, io.SEEK_END)


def is_cut(file: BinaryIO) -> bool:
    """Whether the file is shorter than its outermost boxes say."""
    return _end(file) > size_of(file)


def is_fragmented(file: BinaryIO) -> bool:
    """Whether it is an MP4 file in fragments, whose header counts the frames of none, of one, or of all of them."""
    return _is_mp4(file) and any(name == b"moof" for name, _ in _mp4_boxes(file))


def _end(file: BinaryIO) -> int:
    """Where the outermost boxes end; 0 where the container does not tell."""
    file.seek(0)
    head = file.read(12)
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return max(_riff_ends(file), default=0)
    if int.from_bytes(head[:4], "big") == _EBML:
        return _matroska_end(file)
    if _is_mp4(file):
        return max((end for name, end in _mp4_boxes(file) if name in (b"mdat", b"moof", b"moov")), default=0)
    return 0


def _is_mp4(file: BinaryIO) -> bool:
    file.seek(4)
    return file.read(4) in _MP4_BOXES


def _mp4_boxes(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """(name, end) of the outermost boxes, up to the first that is none."""
    position = 0
    while True:
        file.seek(position)
        head = file.read(16)
        if len(head) < 8 or head[4:8] not in _MP4_BOXES:
            return
        size, name = struct.unpack(">I4s", head[:8])
        if size == 1 and len(head) == 16:
            size = int.from_bytes(head[8:], "big")
        if size < 8:
            # 0: to the end of the file
            return
        yield name, position + size
        position += size


def _riff_ends(file: BinaryIO) -> Iterator[int]:
    """The ends of the outermost chunks: a large AVI has several."""
    position = 0
    while True:
        file.seek(position)
        head = file.read(12)
        if len(head) < 12 or head[:4] != b"RIFF":
            return
        size = int.from_bytes(head[4:8], "little")
        if size in (0, 2**32 - 1):
            # written to a stream, where nobody went back to note it
            return
        yield position + 8 + size
        position += 8 + size + size % 2


def _matroska_end(file: BinaryIO) -> int:
    """The end of the segment, which follows the header."""
    file.seek(4)
    header_size = _ebml_size(file)
    if header_size is None:
        return 0
    file.seek(header_size, 1)
    if int.from_bytes(file.read(4), "big") != _SEGMENT:
        return 0
    size = _ebml_size(file)
    return 0 if size is None else file.tell() + size


def _ebml_size(file: BinaryIO) -> int | None:
    """A number whose first byte tells its length; None where it stands for an unknown size."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    mask = (1 << (7 * length)) - 1
    value = int.from_bytes(first + file.read(length - 1), "big") & mask
    return None if value == mask else value
