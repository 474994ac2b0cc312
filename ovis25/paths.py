"""Where input files are looked for: one rule for every path of a config."""

import json
from pathlib import Path

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
        ValueError: it holds something else; says what.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object, not a {type(content).__name__}")
    return content
