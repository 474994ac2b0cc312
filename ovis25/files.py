"""Finding input files: one rule for the paths of a config, one for the files that data and requests name."""

import base64
import contextlib
import json
import os
import re
import stat
import unicodedata
import urllib.parse
import uuid
from collections.abc import Iterator
from pathlib import Path

from ovis25.text import shorten

_URL_SAFE = str.maketrans("-_", "+/")

REPOSITORY_ROOT = Path(__file__).resolve().parent.parent


def resolve_input(path: str | Path, *folders: str | Path) -> Path:
    """The existing file or folder that `path` means, absolute.

    A relative path is looked for in `folders` (the config file's), then in the working directory, then in the
    repository root (documented configs mix these bases).

    Raises:
        FileNotFoundError: it is nowhere; the message lists every place.
    """
    path = Path(path).expanduser()
    if path.is_absolute():
        candidates = [path]
    else:
        bases = [*folders, Path.cwd(), REPOSITORY_ROOT]
        candidates = list(dict.fromkeys((Path(base) / path).resolve() for base in bases))
    for candidate in candidates:
        if candidate.exists():
            return candidate.resolve()
    places = "\n".join(f"  {candidate}" for candidate in candidates)
    raise FileNotFoundError(f"{path} was not found. Looked for\n{places}")


def read_json_object(path: Path) -> dict:
    """A file that holds one JSON object.

    Raises:
        ValueError: it holds something else, or a key twice; says what. Keys that begin with `_` are comments, and may.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object, not a {type(content).__name__}")
    return content


def _without_doubles(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        double = next((key for key in keys if keys.count(key) > 1 and not key.startswith("_")), None)
        if double is not None:
            raise ValueError(f"the key {shorten(double)} stands in it twice; keep one")
    return content


def follow_umask(*paths: str | Path) -> None:
    """Give files and folders the access rights that the process's umask gives to new ones.

    safetensors and temporary folders are made for their owner alone, whatever the umask: others who may read the folder
    could not read what we saved.
    """
    for path in map(Path, paths):
        rights = _rights_of_new_files(path.parent)
        if path.is_dir():
            # who may read a folder may look into it; a folder's group is handed down as it was
            rights |= (rights & 0o444) >> 2 | path.stat().st_mode & 0o7000
        if stat.S_IMODE(path.stat().st_mode) != rights:
            # not ours, or a file system without access rights: as it is
            with contextlib.suppress(PermissionError):
                path.chmod(rights)


def _rights_of_new_files(folder: Path) -> int:
    """Seen on a file that is made and deleted: the umask itself can only be read by setting it, for all threads."""
    probe = folder / f".{uuid.uuid4().hex}"
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        probe.unlink()


def locate_file(name: str | Path, folder: str | Path, suggest: bool = True) -> Path:
    """The existing file that data, a request or a chat names; a relative name counts from `folder`.

    `~` and `file://` are understood. Any other spelling that is not exact is an error, never a guess: the message
    names the neighbour that does exist, unless `suggest` is false (looking for it reads whole folders).

    Raises:
        FileNotFoundError: there is no such file; one line that says what is there instead.
    """
    folder = Path(folder)
    text = str(name)
    if text.startswith(("http://", "https://")):
        raise FileNotFoundError(f"{shorten(text)} lies on the web; download it first and give its path")
    try:
        if "\0" in text:
            raise ValueError("it holds a null byte")
        path = folder / Path(from_file_address(text)).expanduser()
        if path.is_file():
            return path
        problem = "is a folder, not a file" if path.is_dir() else "does not exist"
    except (OSError, ValueError, RuntimeError) as error:
        # a name that no file system takes: too long, or with a null byte
        raise FileNotFoundError(f"{shorten(text)} is no name that a file can have ({_reason(error)})") from error
    neighbour = next(_neighbours(text, folder), None) if suggest else None
    hint = f"; did you mean {neighbour}?" if neighbour else ""
    raise FileNotFoundError(f"{shorten(text, 200)} {problem}{hint}")


def from_file_address(text: str) -> str:
    """The path behind a `file://` address; any other text as it is."""
    if not text.startswith("file://"):
        return text
    return urllib.parse.unquote(text.removeprefix("file://").removeprefix("localhost"))


def data_url_bytes(text: str) -> bytes:
    """The content of a `data:` URL (RFC 2397), base64 or percent-encoded; wrapped and URL-safe base64 are read too.

    Raises:
        ValueError: it is cut or holds something else; the message shortens it.
    """
    head, comma, body = text.partition(",")
    if not comma:
        raise ValueError(f"{shorten(text)} is no data: URL: it has no comma")
    if not head.endswith(";base64"):
        return urllib.parse.unquote_to_bytes(body)
    body = re.sub(r"\s", "", urllib.parse.unquote(body)).translate(_URL_SAFE).rstrip("=")
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except ValueError as error:
        raise ValueError(f"{shorten(text)} holds no base64 ({error}); encode it anew") from error


def unquoted_path(text: str) -> str:
    """A path as people paste it into a terminal, without its quotes and backslash escapes.

    `'my cat.jpg'`, `"my cat.jpg"` and `my\\ cat.jpg` all give `my cat.jpg`.
    """
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return re.sub(r"\\(?=[ '\"()\[\]&;\\])", "", text)


def _neighbours(text: str, folder: Path) -> Iterator[Path]:
    """Existing files that `text` may have meant, likeliest first."""
    plain = unquoted_path(text)
    spellings = [plain, urllib.parse.unquote(plain)]
    slashed = [re.sub(r"^[A-Za-z]:", "", spelling.replace("\\", "/")) for spelling in spellings]
    for spelling in dict.fromkeys([*spellings, *slashed]):
        for form in ("NFC", "NFD"):
            parts = Path(unicodedata.normalize(form, spelling)).parts
            # a path of another machine: its last parts may lie here
            for start in range(len(parts)):
                found = _ignoring_case(folder, parts[start:])
                if found is not None and found.is_file():
                    yield found


def _ignoring_case(folder: Path, parts: tuple[str, ...]) -> Path | None:
    """The path below `folder` (or from the root) whose names equal `parts` but for case and Unicode form."""
    here = folder
    try:
        for part in parts:
            exact = here / part
            if exact.exists():
                here = exact
                continue
            wanted = _folded(part)
            match = next((entry for entry in sorted(here.iterdir()) if _folded(entry.name) == wanted), None)
            if match is None:
                return None
            here = match
    except (OSError, ValueError):
        return None
    return here if parts else None


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip().casefold()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
