"""What a picture or video may be given as, and one class of errors for whatever its reader raises."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ovis25.files import data_url_bytes, is_data_url, is_web_address, locate_file
from ovis25.processing.download import download
from ovis25.signatures import signature
from ovis25.text import shorten

ImageSource = str | Path | bytes | Image.Image

# a longer "name" is no path that somebody mistyped
_LONGEST_NAME = 255


def as_file(source: str | Path | bytes) -> Path | io.BytesIO:
    """The file behind a path or `file://`, or the bytes behind an http(s) address or a `data:` URL.

    Raises:
        ValueError: it is missing, unreachable, cut, or of another type; one line that shortens what was given.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if not isinstance(source, (str, Path)):
        kind = type(source).__name__
        raise ValueError(f"{shorten(source)} ({kind}) is no picture: give a path, an address, bytes or a PIL image")
    text = str(source)
    if is_data_url(text):
        return io.BytesIO(data_url_bytes(text))
    if is_web_address(text):
        return io.BytesIO(download(text))
    try:
        return locate_file(source, "")
    except FileNotFoundError as error:
        if len(text) > _LONGEST_NAME:
            raise ValueError(f"{error}; base64 belongs behind data:image/png;base64,") from error
        # a name of common length needs no quotes
        raise ValueError(str(error).replace(repr(text), text, 1)) from error


@contextmanager
def naming(source, problem: str) -> Iterator[None]:
    """Turns every error of a reader (damaged files make them raise nearly any class) into a ValueError in one line:
    the source, the problem, and what the reader said.
    """
    try:
        yield
    except Exception as error:
        hint = _looks_instead(source) if problem.endswith("video") else ""
        raise ValueError(f"{describe(source)} {problem}: {_reason(error, source)}{hint}") from error


def _unidentified(source) -> str:
    """Why Pillow takes it for no picture, by its first bytes."""
    start = _first_bytes(source)
    if not start:
        return "it is empty"
    what = signature(start)
    if what is None:
        return "it begins like no image format that Pillow reads"
    if "HEIC" in what[0]:
        return "it looks like a HEIC picture, which Pillow does not read; convert it to JPEG"
    if any(name in what[0] for name in ("PNG", "JPEG", "GIF", "WebP", "Photoshop")):
        return f"it begins like {what[0]} and is damaged"
    return f"it begins like no image format that Pillow reads: it looks like {what[0]}"


def _looks_instead(source) -> str:
    """What a file that is no video looks like, as the end of a message."""
    start = _first_bytes(source)
    if not start:
        return "; it is empty"
    what = signature(start)
    return f"; it looks like {what[0]}" if what and "video" not in what[0] and "AVI" not in what[0] else ""


def _first_bytes(source) -> bytes:
    try:
        file = source if isinstance(source, io.BytesIO) else as_file(source)
        if isinstance(file, io.BytesIO):
            return file.getvalue()[:512]
        with open(file, "rb") as opened:
            return opened.read(512)
    except (OSError, ValueError):
        return b"?"


def describe(source) -> str:
    """The source in a message: a path as it is, anything long shortened."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"an image of {len(source)} bytes"
    if isinstance(source, io.BytesIO):
        return f"a video of {source.getbuffer().nbytes} bytes"
    if isinstance(source, Image.Image):
        return "a PIL image"
    return str(source) if len(str(source)) <= _LONGEST_NAME else shorten(source)


def _reason(error: Exception, source) -> str:
    if isinstance(error, UnidentifiedImageError):
        return _unidentified(source)
    if isinstance(error, MemoryError):
        return "there is not enough memory for it, or its sizes are damaged"
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    # of a reader that stumbled over damaged bytes, the class says more than the message
    is_clear = isinstance(error, (OSError, ValueError, SyntaxError)) and text
    return text if is_clear else f"{type(error).__name__} {text}".strip()
