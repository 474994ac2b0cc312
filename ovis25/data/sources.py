"""What a row or a part of a message names as a picture or a video."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ovis25.data.errors import SampleError, label
from ovis25.files import data_url_bytes, locate_file
from ovis25.processing.image import ImageSource
from ovis25.text import lone_surrogate, shorten

IMAGE_KEYS = ("image", "images")
VIDEO_KEYS = ("video", "videos", "video_frames")
VISUAL_KEYS = (*IMAGE_KEYS, *VIDEO_KEYS)
# what is surely no path: a picture as text, without the `data:` before it
_BARE_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{200,}={0,2}\s*")
_ONE_VIDEO = "A sample takes one video"


@dataclass
class Visuals:
    """Images, or a video: a file or a list of frames."""

    images: list[ImageSource] = field(default_factory=list)
    video: str | Path | list[ImageSource] | None = None

    def __bool__(self) -> bool:
        return bool(self.images) or self.video is not None


def given(value) -> bool:
    """Whether a key holds anything; null, and empty texts and lists, count as nothing."""
    return value is not None and not (isinstance(value, (str, bytes, list, tuple, dict)) and len(value) == 0)


def kind_of(value) -> str:
    """A value's type, for messages: "a list", "an int"."""
    name = "null" if value is None else type(value).__name__
    return name if value is None else f"a {name}"


def row_visuals(row: dict) -> tuple[Visuals, str]:
    """The visuals that the row itself names, and the key that they stand under."""
    named = {key: row[key] for key in VISUAL_KEYS if given(row.get(key))}
    if not named:
        return Visuals(), "image"
    if any(key in IMAGE_KEYS for key in named) and any(key in VIDEO_KEYS for key in named):
        cure = "Keep one of them, or make two samples"
        raise SampleError(" and ".join(named), "a sample takes images or one video, not both", cure)
    read = {key: _visuals_of(key, value) for key, value in named.items()}
    key, first = next(iter(read.items()))
    if any(other != first for other in read.values()):
        raise SampleError(" and ".join(named), "they disagree", "Keep one of them")
    return first, key


def _visuals_of(key: str, value) -> Visuals:
    if key in IMAGE_KEYS:
        return Visuals(_sources(value, key))
    if key == "videos":
        videos = list(value) if isinstance(value, (list, tuple)) else [value]
        if len(videos) != 1:
            raise SampleError(key, f"it names {len(videos)} videos", _ONE_VIDEO)
        value = videos[0]
    if key == "video_frames" or isinstance(value, (list, tuple)):
        return Visuals(video=_sources(value, key))
    return Visuals(video=source_of(value, key, "video"))


def _sources(value, key: str) -> list[ImageSource]:
    return [source_of(source, key, "image") for source in (value if isinstance(value, (list, tuple)) else [value])]


def source_of(value, place: str, kind: str):
    """What a value names: a path, bytes or a picture; of a video a path or a list of frames.

    Dicts are those of Hugging Face datasets and OpenAI: `bytes`, `path`, `url`. A `data:` URL becomes its bytes.

    Raises:
        SampleError: it names nothing, lies on the web, or cannot be read.
    """
    if isinstance(value, dict):
        keys = ("bytes", "path", "url", kind)
        value = next((value[key] for key in keys if given(value.get(key))), None)
    if kind == "video" and isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [source_of(frame, place, "image") for frame in value]
    kinds = (str, Path, bytes, Image.Image) if kind == "image" else (str, Path)
    if not isinstance(value, kinds) or (isinstance(value, str) and not value.strip()):
        what = shorten(value) if isinstance(value, (str, int, float)) else kind_of(value)
        raise SampleError(place, f"{what} is no path", "Give a path, or a list of paths")
    return _source_of_text(value, place, kind) if isinstance(value, str) else value


def _source_of_text(text: str, place: str, kind: str) -> str | bytes:
    if text.startswith(("http://", "https://")):
        raise SampleError(place, f"{label(text)} lies on the web", "Download it first and give its path")
    if text.startswith("data:"):
        if kind == "video":
            raise SampleError(place, "a video stands in a data: URL", "Write it to a file and give its path")
        try:
            return data_url_bytes(text)
        except ValueError as error:
            raise SampleError(place, f"its data: URL cannot be read: {error}", "Encode it anew") from error
    if lone_surrogate(text) is not None:
        raise SampleError(place, f"{shorten(text)} holds half a character", "Correct the path")
    return text


def find_file(name: str | Path, folder: Path, place: str, suggest: bool = True) -> Path:
    """The file that a row names, relative to `folder`.

    Raises:
        SampleError: there is none; names the neighbour that was meant, if any (looked for with `suggest`).
    """
    try:
        return locate_file(name, folder, suggest)
    except FileNotFoundError as error:
        text, problem = str(name), str(error)
        # a plain name is readable without quotes
        if text == label(text) and problem.startswith(repr(text)):
            problem = text + problem[len(repr(text)) :]
        cure = f"Looked in {folder}; set image_folder or correct the path"
        if Path(text).is_absolute():
            cure = "Correct the path"
        if _BARE_BASE64.fullmatch(text):
            cure = "It looks like base64: write data:image/png;base64, before it"
        raise SampleError(place, problem, cure) from error
