"""Several data sets by name: `datainfo:PATH:a|b` joins what a datainfo file says of a and b.

A datainfo file is a JSON object, name -> {"meta_file": samples, "image_dir": folder, "data_format": "conversation" or
"caption"}, as the upstream project has them. Paths in it start at its own folder, else at the working directory.
"""

import difflib
from pathlib import Path

from ovis25.data.errors import DataError, SampleError
from ovis25.data.forms import ROW_KEYS
from ovis25.data.keys import ORIGIN_KEY
from ovis25.data.schema import ToolImage, parse_sample
from ovis25.data.source import read_rows
from ovis25.data.spellings import REASONING_KEYS
from ovis25.files import from_file_address, read_json_object, resolve_input

PREFIX = "datainfo:"
CAPTION_PROMPT = "<image>\nDescribe the image."
_ENTRY_KEYS = ("meta_file", "image_dir", "data_format")


def split_source(source: str) -> tuple[str, str]:
    """`datainfo:PATH:a|b` -> (PATH, "a|b").

    Raises:
        DataError: another form.
    """
    path, _, names = source.removeprefix(PREFIX).rpartition(":")
    if not path or not names:
        raise DataError(f"{source!r} is not of the form datainfo:PATH:NAMES, for example datainfo:datainfo.json:a|b")
    return path, names


def resolve_source(source: str, config_dir: str | Path) -> str:
    """`datainfo:PATH:a|b` with an absolute PATH; PATH may lack its .json.

    Raises:
        DataError: another form.
        FileNotFoundError: PATH is nowhere; lists where it looked.
    """
    path, names = split_source(source)
    path = path if path.endswith(".json") else f"{path}.json"
    return f"{PREFIX}{resolve_input(path, config_dir)}:{names}"


def read_datainfo(path: str | Path, names: str) -> list[dict]:
    """The rows of the data sets `a|b`, one after the other, in the documented sample format.

    Image and video paths become absolute. A caption row becomes a question and its answer; the question is the row's
    or the entry's `caption_template`, else CAPTION_PROMPT. A row keeps its other keys, and gains ORIGIN_KEY. A
    malformed conversation row stays as it is: `ConversationDataset` reports it, or skips it.

    Raises:
        DataError: a file is missing or unreadable, a name is unknown, an entry lacks a key or has an unknown
            data_format, a row is no object or no caption row.
    """
    path = Path(path)
    entries = _read_entries(path)
    rows: list[dict] = []
    for name in names.split("|"):
        entry = _entry(path, entries, name.strip())
        meta_file = _find(path, name, entry, "meta_file")
        image_dir = _find(path, name, entry, "image_dir")
        for index, row in enumerate(read_rows(meta_file)):
            origin = f"{meta_file}[{index}]"
            if not isinstance(row, dict):
                raise DataError(f"{origin} is a {type(row).__name__}; write each sample as a JSON object")
            if entry["data_format"] == "caption":
                row = _from_caption(row, origin, entry.get("caption_template", CAPTION_PROMPT))
            rows.append({**_with_absolute_paths(row, image_dir), ORIGIN_KEY: origin})
    return rows


def _read_entries(path: Path) -> dict:
    if not path.is_file():
        raise DataError(f"the datainfo file {path} does not exist; correct data_info_version, or PATH in {PREFIX}PATH")
    try:
        return read_json_object(path)
    except ValueError as error:
        raise DataError(str(error)) from error


def _entry(path: Path, entries: dict, name: str) -> dict:
    if name not in entries:
        nearest = difflib.get_close_matches(name, entries, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"it has {', '.join(entries) or 'none'}"
        raise DataError(f"{path} has no data set {name!r}; {hint}")
    entry = entries[name]
    missing = [key for key in _ENTRY_KEYS if not isinstance(entry, dict) or not isinstance(entry.get(key), str)]
    if missing:
        raise DataError(f"{path}, data set {name!r}: {missing[0]} is missing; it needs {', '.join(_ENTRY_KEYS)}")
    if entry["data_format"] not in ("conversation", "caption"):
        raise DataError(
            f"{path}, data set {name!r}: data_format is {entry['data_format']!r}; it must be conversation or caption"
        )
    return entry


def _find(path: Path, name: str, entry: dict, key: str) -> Path:
    try:
        return resolve_input(entry[key], path.absolute().parent)
    except FileNotFoundError as error:
        raise DataError(f"{path}, data set {name!r}, {key}: {error}") from error


def _from_caption(row: dict, origin: str, template: str) -> dict:
    text_key = next((key for key in ("caption", "text") if key in row), None)
    if text_key is None or "image" not in row:
        raise DataError(
            f"{origin} is no caption row: it needs image, and caption or text; "
            "if it holds conversations, set its data_format to conversation"
        )
    question = row.get("caption_template", template)
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": row[text_key]}]
    others = {key: value for key, value in row.items() if key not in (text_key, "caption_template")}
    return {**others, "conversations": turns}


def _with_absolute_paths(row: dict, image_dir: Path) -> dict:
    """The row as turns, with its visuals under `image` or `video`, whatever form it had."""
    try:
        sample = parse_sample(row)
    except SampleError:
        return row
    others = {key: value for key, value in row.items() if key not in (*ROW_KEYS, *REASONING_KEYS)}
    files = [image for image in sample.images if not isinstance(image, ToolImage)]
    visuals = {"image": files} if files else {"video": sample.video} if sample.video else {}
    return {
        **others,
        "conversations": sample.conversations,
        **{key: _absolute(value, image_dir) for key, value in visuals.items()},
    }


def _absolute(source, image_dir: Path):
    if isinstance(source, list):
        return [_absolute(part, image_dir) for part in source]
    # bytes are a picture, not a path
    return str(image_dir / Path(from_file_address(source)).expanduser()) if isinstance(source, str) else source
