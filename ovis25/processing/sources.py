"""What a picture or video may be given as, and one class of errors for whatever its reader raises."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ovis25.files import data_url_bytes, locate_file
from ovis25.processing.download import download
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
    if text[:5].lower() == "data:":
        return io.BytesIO(data_url_bytes(text))
    if text.startswith(("http://", "https://")):
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
        raise ValueError(f"{describe(source)} {problem}: {_reason(error)}") from error


def describe(source) -> str:
    """The source in a message: a path as it is, anything long shortened."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"an image of {len(source)} bytes"
    if isinstance(source, io.BytesIO):
        return f"a video of {source.getbuffer().nbytes} bytes"
    if isinstance(source, Image.Image):
        return "a PIL image"
    return str(source) if len(str(source)) <= _LONGEST_NAME else shorten(source)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it begins like no image format that Pillow reads"
    if isinstance(error, MemoryError):
        return "there is not enough memory for it, or its sizes are damaged"
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    # of a reader that stumbled over damaged bytes, the class says more than the message
    is_clear = isinstance(error, (OSError, ValueError, SyntaxError)) and text
    return text if is_clear else f"{type(error).__name__} {text}".strip()
