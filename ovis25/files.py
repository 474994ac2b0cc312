"""Finding input files: one rule for the paths of a config, one for the files that data and requests name."""

import base64
import contextlib
import errno
import json
import os
import re
import stat
import unicodedata
import urllib.parse
import uuid
from collections.abc import Iterator
from pathlib import Path

from ovis25.text import nearest, shorten

_FILE_ADDRESS = re.compile("file://", re.IGNORECASE)
# what `problem_of` says
IS_FILE, IS_MISSING = "is a file", "does not exist"
_URL_SAFE = str.maketrans("-_", "+/")
# a scheme has two letters at least: C:// is a drive
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
_OTHER_FILES = {
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
    b"\x1f\x8b": "a gzip file; unpack it",
    b"PK": "a zip file; unpack it",
    b"<": "a web page or XML (an error page in place of the download?)",
    b"version https://git-lfs": "a git-lfs pointer; run git lfs pull",
}
# what people write in place of JSON, at the places where JSON ends with an error
_NOT_JSON = {
    r"^\s*(//|#|/\*)": 'a comment, which JSON has not; remove it, or make it a key: "_note": "..."',
    r",\s*[}\]]": "a comma before a closing bracket; remove it",
    r"[\u2018\u2019\u201c\u201d]": 'typographic quotes; write "',
    r"^\s*'|[{:,\[]\s*'": 'single quotes; write "',
    r"[:,\[]\s*(True|False|None)\b": "Python's True, False or None; write true, false, null",
    r"\u00a0": "a no-break space; write a blank",
    r"^\s*\w+\s*:": 'a key without quotes (YAML?); write "key": value',
}

REPOSITORY_ROOT = Path(__file__).resolve().parent.parent


def resolve_input(path: str | Path, *folders: str | Path) -> Path:
    """The existing file or folder that `path` means, absolute.

    A relative path is looked for in `folders` (the config file's), then in the working directory, then in the
    repository root (documented configs mix these bases). `~`, `$NAME` and `file://` are understood.

    Raises:
        FileNotFoundError: it is nowhere; the message lists every place, and names the neighbour that was meant.
    """
    path = expanded(path)
    if path.is_absolute():
        candidates = [path]
    else:
        bases = [*folders, Path.cwd(), REPOSITORY_ROOT]
        candidates = list(dict.fromkeys((Path(base) / path).resolve() for base in bases))
    for candidate in candidates:
        if candidate.exists():
            return candidate.resolve()
    places = "\n".join(f"  {candidate}" for candidate in candidates)
    neighbour = next((found for candidate in candidates for found in _alike(candidate)), None)
    hint = f"; did you mean {neighbour}?" if neighbour else ""
    raise FileNotFoundError(f"{path} was not found. Looked for\n{places}{hint}")


def expanded(path: str | Path) -> Path:
    """A path of the user with `~`, the environment variables in it and `file://` replaced.

    Raises:
        FileNotFoundError: it is an address on the web, or a variable is not set.
    """
    text = from_file_address(os.fspath(path))
    if found := _ADDRESS.match(text):
        raise FileNotFoundError(f"{shorten(text)} lies on the web ({found[1]}); download it first and give its path")
    known = Path(os.path.expandvars(text)).expanduser()
    missing = [name for name in _VARIABLE.findall(text) if "".join(name) not in os.environ]
    if missing and not known.exists():
        raise FileNotFoundError(f"{shorten(text)}: the environment variable {''.join(missing[0])} is not set")
    return known


def _alike(path: Path) -> Iterator[Path]:
    """Existing neighbours of a path that does not: spelled otherwise, or with a name much like its own."""
    try:
        yield from _neighbours(str(path), path.parent)
        names = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        return
    # a name without its ending, then any other slip
    guess = next((name for name in names if Path(name).stem == path.name), None) or nearest(path.name, names, 0.8)
    if guess:
        yield path.parent / guess


def read_json_object(path: Path) -> dict:
    """A file that holds one JSON object.

    Raises:
        ValueError: it holds something else, or a key twice; says what. Keys that begin with `_` are comments, and may.
    """
    if not path.is_file():
        raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'no file of its own, but a device or pipe'}")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        content = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=without_doubles)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON: {_not_json(raw, getattr(error, 'pos', 0)) or error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object, not a {type(content).__name__}")
    return content


def _not_json(raw: bytes, place: int) -> str | None:
    """What a file that is no JSON looks like, and the cure; None where nothing familiar is seen. `place` is where
    reading it ended.
    """
    if not raw.strip():
        return "it is empty"
    for begin, what in _OTHER_FILES.items():
        if raw.startswith(begin):
            return f"it looks like {what}"
    if b"\0" in raw[:200]:
        return "it holds null bytes, as UTF-16 without a mark or a damaged file does; save it as UTF-8"
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f"byte {error.start:,} is no UTF-8; save the file as UTF-8"
    # that line and the one before it
    begin = text.rfind("\n", 0, max(text.rfind("\n", 0, place), 0)) + 1
    begin, end = max(begin, place - 200), min(len(text), place + 200)
    near = text[begin : end if "\n" not in text[place:end] else text.index("\n", place)]
    for pattern, what in _NOT_JSON.items():
        if found := re.search(pattern, near, re.MULTILINE):
            return f"line {text.count(chr(10), 0, begin + found.start()) + 1} has {what}"
    return None


class DoubleKeyError(ValueError):
    """One key of a JSON object stands twice, with two values: reading it would lose one of them."""


def without_doubles(pairs: list[tuple[str, object]]) -> dict:
    """An object of a JSON text, for `object_pairs_hook`. Raises DoubleKeyError where one key holds two things."""
    content = dict(pairs)
    if len(content) < len(pairs):
        # said twice is said once
        others = [key for key, value in pairs if value != content[key] and value == value]
        double = next((key for key in others if not key.startswith("_")), None)
        if double is not None:
            raise DoubleKeyError(f"the key {shorten(double)} stands in it twice, with two values; keep one")
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
    if _ADDRESS.match(text) and not _FILE_ADDRESS.match(text):
        raise FileNotFoundError(f"{shorten(text)} lies on the web; download it first and give its path")
    try:
        if "\0" in text:
            raise ValueError("it holds a null byte")
        path = folder / Path(from_file_address(text)).expanduser()
        if path.is_file():
            return path
        problem = problem_of(path)
    except (OSError, ValueError, RuntimeError) as error:
        # a name that no file system takes: too long, or with a null byte
        raise FileNotFoundError(f"{shorten(text)} is no name that a file can have ({_reason(error)})") from error
    neighbour = next(_neighbours(text, folder), None) if suggest else None
    hint = f"; did you mean {neighbour}?" if neighbour else ""
    raise FileNotFoundError(f"{shorten(text, 200)} {problem}{hint}")


def problem_of(path: Path) -> str:
    """Why a path is no file that can be read: IS_MISSING, or what it is instead; IS_FILE where it is one."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "is a link to nothing" if path.is_symlink() else IS_MISSING
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ELOOP:
            return "is a link that leads back to itself"
        is_missing = isinstance(error, NotADirectoryError)
        return IS_MISSING if is_missing else f"is no name that a file can have ({_reason(error)})"
    if stat.S_ISDIR(mode):
        return "is a folder, not a file"
    return IS_FILE if stat.S_ISREG(mode) else "is a pipe or a device, not a file"


def is_web_address(text: str) -> bool:
    """Whether it is an http(s) address, in any case."""
    return text[:8].lower().startswith(("http://", "https://"))


def is_data_url(text: str) -> bool:
    return text[:5].lower() == "data:"


def from_file_address(text: str) -> str:
    """The path behind a `file://` address; any other text as it is."""
    match = _FILE_ADDRESS.match(text)
    return urllib.parse.unquote(text[match.end() :].removeprefix("localhost")) if match else text


def data_url_bytes(text: str) -> bytes:
    """The content of a `data:` URL (RFC 2397), base64 or percent-encoded; wrapped and URL-safe base64 are read too.

    Raises:
        ValueError: it is cut or holds something else; the message shortens it.
    """
    head, comma, body = text.partition(",")
    if not comma:
        raise ValueError(f"{shorten(text)} is no data: URL: it has no comma")
    if not head.rstrip().lower().endswith(";base64"):
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
