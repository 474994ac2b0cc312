"""Video files through PyAV: counting and picking frames. The one file that knows PyAV."""

from collections.abc import Sequence
from pathlib import Path

import av
from PIL import Image


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
    """Decode the chosen frames of a video file as upright RGB images.

    Raises:
        ValueError: the file is missing, is no video, or holds no frame.
    """
    with _open(path) as container:
        num_frames = _count(container, path)
    frames = _decode(path, sample_indices(num_frames, min_frames, max_frames))
    if len(frames) < min(max(num_frames, min_frames), max_frames):
        # the header promised more frames than the stream holds
        num_frames = _count_by_decoding(path)
        frames = _decode(path, sample_indices(num_frames, min_frames, max_frames))
    return frames


def video_info(path: str | Path) -> tuple[int, int, int]:
    """(number of frames, height, width) without decoding pictures. Raises as `load_video`."""
    with _open(path) as container:
        context = container.streams.video[0].codec_context
        height, width = context.height, context.width
        if abs(_rotation(container)) in (90, 270):
            height, width = width, height
        return _count(container, path), height, width


def _open(path: str | Path):
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist")
    try:
        container = av.open(str(path))
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(f"{path} is no readable video: {error}") from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"{path} has no video stream")
    return container


def _count(container, path: str | Path) -> int:
    stream = container.streams.video[0]
    num_frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
    if num_frames < 1:
        raise ValueError(f"{path} holds no video frame")
    return num_frames


def _rotation(container) -> int:
    """Degrees counter-clockwise that make the picture upright, as the first frame tells (phones write it)."""
    try:
        rotation = next(container.decode(video=0)).rotation
    except (StopIteration, av.FFmpegError):
        rotation = 0
    container.seek(0)
    return rotation


def _decode(path: str | Path, indices: list[int]) -> list[Image.Image]:
    wanted, images = set(indices), {}
    try:
        with _open(path) as container:
            container.streams.video[0].thread_type = "AUTO"
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    images[index] = frame.to_image().rotate(frame.rotation, expand=True)
                if index >= indices[-1]:
                    break
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be decoded: {error}") from error
    return [images[index] for index in indices if index in images]


def _count_by_decoding(path: str | Path) -> int:
    try:
        with _open(path) as container:
            return sum(1 for _ in container.decode(video=0))
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be decoded: {error}") from error
