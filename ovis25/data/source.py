"""Reading data files: a JSON list, or JSON lines."""

import json
from pathlib import Path


class DataError(ValueError):
    """Data that cannot be trained on; the message lists what is wrong, where, and the cure."""


def read_rows(path: str | Path) -> list:
    """The rows of a .json file (a list of samples) or a .jsonl file (one sample a line).

    Raises:
        DataError: missing, empty, no UTF-8, no JSON (with line and column), or no list.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist; correct data_path or eval_data_path")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    rows = _read_lines(path, text) if path.suffix in (".jsonl", ".ndjson") else _read_list(path, text)
    if not rows:
        raise DataError(f"{path} holds no sample")
    return rows


def _read_lines(path: Path, text: str) -> list:
    rows = []
    # not splitlines(): JSON may hold other line separators inside its strings
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}, column {error.colno}: no valid JSON: {error.msg}") from error
    return rows


def _read_list(path: Path, text: str) -> list:
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        cure = "; is it JSON lines? Then name it .jsonl" if error.msg == "Extra data" else ""
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: no valid JSON: {error.msg}{cure}"
        ) from error
    if not isinstance(rows, list):
        raise DataError(f"{path} holds a {type(rows).__name__}; it must be a list of samples")
    return rows
