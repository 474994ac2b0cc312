"""Video files through PyAV: counting and picking frames. The one file that knows PyAV."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import av
from av.sidedata.sidedata import Type as SideData
from PIL import Image

from ovis25.processing.sources import as_file, describe, naming
from ovis25.processing.video_display import turn_of, upright, upright_size
from ovis25.processing.video_extent import is_cut, is_fragmented, size_of

# a playlist must not open addresses
_OPTIONS = {"protocol_whitelist": "file"}


def sample_indices(num_frames: int, min_frames: int, max_frames: int) -> list[int]:
    """Which frames of a clip are shown: all of them, or the middles of equal strides.

    Ten frames with at most four give 1, 3, 6, 8; two frames with at least four give 0, 0, 1, 1.

    Raises:
        ValueError: the clip is empty or the limits are not 1 <= min_frames <= max_frames.
    """
    if num_frames < 1:
        raise ValueError("the clip has no frames")
    if not 1 <= min_frames <= max_frames:
        raise ValueError(f"min_frames {min_frames} must be at least 1 and at most max_frames {max_frames}")
    target = min(max(num_frames, min_frames), max_frames)
    if target == num_frames:
        return list(range(num_frames))
    stride = num_frames / target
    return [int(stride / 2 + stride * i) for i in range(target)]


def sample_frames(frames: Sequence, min_frames: int, max_frames: int) -> list:
    """The chosen frames of a list of frames."""
    return [frames[index] for index in sample_indices(len(frames), min_frames, max_frames)]


def load_video(path: str | Path, min_frames: int, max_frames: int) -> list[Image.Image]:
    """Decode the chosen frames of a video file (a path, an address, a `data:` URL, bytes) as upright RGB images.

    Raises:
        ValueError: the file is missing, is no video, is cut, or holds no frame that can be decoded.
    """
    path = as_file(path)
    num_frames = _num_frames(path)
    indices = sample_indices(num_frames, min_frames, max_frames)
    images, num_decoded = _decode(path, set(indices))
    if len(images) < len(set(indices)):
        # the stream holds fewer frames than it has packets: the end came first
        indices = sample_indices(num_decoded, min_frames, max_frames)
        images, _ = _decode(path, set(indices))
    return [images[index] for index in indices]


def video_info(path: str | Path) -> tuple[int, int, int]:
    """(number of frames, height, width), of which the first frame alone is decoded. Raises as `load_video`."""
    path = as_file(path)
    num_frames = _num_frames(path)
    with _opened(path) as container, naming(path, "cannot be decoded"):
        frame = next(container.decode(video=0), None)
        if frame is None:
            raise ValueError("none of its frames can be")
        return num_frames, *upright_size(frame.height, frame.width, _turn(frame))


@contextmanager
def _opened(path: Path | io.BytesIO) -> Iterator[av.container.InputContainer]:
    """The container, with a video stream whose codec is known."""
    with naming(path, "is no readable video"):
        if isinstance(path, io.BytesIO):
            path.seek(0)
        container = av.open(path if isinstance(path, io.BytesIO) else str(path), options=_OPTIONS)
    with container:
        if not container.streams.video:
            raise ValueError(f"{describe(path)} has no video stream")
        if container.streams.video[0].codec_context is None:
            raise ValueError(f"{describe(path)} is in a codec that FFmpeg does not decode here; convert it to H.264")
        yield container


def _num_frames(path: Path | io.BytesIO) -> int:
    """How many frames the clip has: what the header says where it can be trusted, else the packets.

    Raises:
        ValueError: there are none, or the file is shorter than its container says.
    """
    with _opened(path) as container:
        promised = container.streams.video[0].frames
        # not the object that FFmpeg reads from
        with open(path, "rb") if isinstance(path, Path) else io.BytesIO(path.getbuffer()) as file:
            if is_cut(file):
                raise ValueError(_cut_message(path, promised))
            if _is_trusted(container, file):
                return promised
        with naming(path, "cannot be read"):
            num_frames = _num_packets(container)
    if num_frames < 1:
        raise ValueError(f"{describe(path)} holds no video frame")
    return num_frames


def _is_trusted(container: av.container.InputContainer, file: BinaryIO) -> bool:
    """Whether the header counts frames and holds a table of just as many inside the file, as MP4's does where it has
    no fragments.
    """
    stream = container.streams.video[0]
    # older versions of PyAV do not show the table
    entries = getattr(stream, "index_entries", ())
    if not container.format.name.startswith("mov") or not 0 < stream.frames == len(entries) or is_fragmented(file):
        return False
    last = entries[len(entries) - 1]
    return last.pos + last.size <= size_of(file)


def _num_packets(container: av.container.InputContainer) -> int:
    return sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)


def _cut_message(path: Path | io.BytesIO, promised: int) -> str:
    """What a cut file still holds. It is decoded whole for that: this happens once."""
    num_decoded = 0
    try:
        with _opened(path) as container:
            for _ in container.decode(video=0):
                num_decoded += 1
    except (av.FFmpegError, ValueError):
        # where the cut is
        pass
    of = f"{num_decoded} of {promised} frames" if promised else f"{num_decoded} frames"
    return f"{describe(path)} is cut: {of} can be decoded before the file ends; copy or download it again"


def _decode(path: Path | io.BytesIO, wanted: set[int]) -> tuple[dict[int, Image.Image], int]:
    """The wanted frames by their index, and how many were decoded until the last of them, or until the end."""
    images, num_decoded, last = {}, 0, max(wanted)
    with _opened(path) as container, naming(path, "cannot be decoded"):
        container.streams.video[0].thread_type = "AUTO"
        for index, frame in enumerate(container.decode(video=0)):
            num_decoded += 1
            if index in wanted:
                images[index] = upright(frame.to_image(), _turn(frame))
            if index >= last:
                break
        if not num_decoded:
            raise ValueError("none of its frames can be")
    return images, num_decoded


def _turn(frame: av.VideoFrame) -> Image.Transpose | None:
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    return turn_of(None if matrix is None else bytes(matrix))
