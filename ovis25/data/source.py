"""Reading data files: a JSON list, JSON lines or Parquet, also compressed with gzip; what else it is, is said."""

import codecs
import csv
import gzip
import importlib
import io
import json
import os
import re
import zlib
from pathlib import Path

from ovis25.data.errors import DataError
from ovis25.data.forms import ROW_NAMES
from ovis25.files import DoubleKeyError, locate_file, without_doubles
from ovis25.signatures import decoded_by_mark, looks_binary, signature

__all__ = ["DataError", "read_rows"]

_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
# text in a few hundred times its size is a bomb; what is small may be
_MAX_RATIO, _SMALL = 200, 32 * 2**20
_PARQUET_BATCH = 256
_BETWEEN = re.compile(r"[\s,]*")
_LINE_ENDINGS = (".jsonl", ".ndjson")


def read_rows(path: str | Path) -> list:
    """The rows of a data file: a JSON list of samples, one sample a line, or Parquet; gzip around it is fine.

    What the file holds decides, not its name. Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark.

    Raises:
        DataError: missing, empty, or something else (says what it looks like, and the cure); no JSON (with line and
            column); no list.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise DataError(_folder_problem(path))
    try:
        path = locate_file(path, "")
    except FileNotFoundError as error:
        # a plain name needs no quotes
        said = str(error).replace(repr(str(path)), str(path), 1)
        raise DataError(f"{said}{'' if said.endswith('?') else ';'} correct data_path or eval_data_path") from error
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP):
            content = _unzipped(path, content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is compressed with gzip, and broken: {error}; fetch it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    rows = _read_parquet(path, content) if content.startswith(_PARQUET) else _parse(path, _decode(path, content))
    if not rows:
        raise DataError(f"{path} holds no sample")
    return rows


def _unzipped(path: Path, content: bytes) -> bytes:
    most = max(_MAX_RATIO * len(content), _SMALL)
    with gzip.open(io.BytesIO(content)) as file:
        unzipped = file.read(most + 1)
    if len(unzipped) > most:
        raise DataError(_bomb(path, content))
    return unzipped


def _folder_problem(path: Path) -> str:
    endings = (".json", *_LINE_ENDINGS, ".parquet", ".gz")
    found = sorted(entry.name for entry in path.iterdir() if entry.name.lower().endswith(endings))
    holds = f"it holds {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}" if found else "it holds no data file"
    return f"{path} is a folder, not a data file; {holds}"


def _decode(path: Path, content: bytes) -> str:
    if known := signature(content):
        raise DataError(f"{path} is no JSON: it looks like {known[0]}; {known[1]}")
    try:
        text = decoded_by_mark(content)
    except UnicodeDecodeError as error:
        name = error.encoding.removesuffix("-le").removesuffix("-be")
        raise DataError(f"{path} begins as {name} and is broken: {error}; write it as UTF-8") from error
    if text is not None:
        return text
    if what := looks_binary(content):
        cure = _recode(path, what) if what.startswith("UTF") else "name the file with the samples"
        raise DataError(f"{path} is no UTF-8 text: it looks like {what}; {cure}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}; {_looks_encoded(path, content)}") from error


def _looks_encoded(path: Path, content: bytes) -> str:
    """Which encoding it probably is, and the command that changes it."""
    start = content[: 2**16]
    high = bytes(byte for byte in start if byte >= 0x80)
    if 2 * len(high) > len(start) and not _can_decode(start, "gbk"):
        return "it looks like binary data; name the file with the samples"
    # in GBK a character takes two bytes, most of them both above 0x80; in Latin-1 such letters stand alone
    pairs = sum(a >= 0x81 and b >= 0x40 for a, b in zip(start[::1], start[1::1], strict=False))
    name = "GBK" if _can_decode(start, "gbk") and pairs > 0.75 * max(len(high), 1) and len(high) > 3 else "CP1252"
    return f"it looks like {name}; {_recode(path, name)}"


def _recode(path: Path, name: str) -> str:
    return f"change it: iconv -f {name} -t UTF-8 {path.name} > utf8_{path.name}"


def _can_decode(content: bytes, encoding: str) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)().decode(content)
        return True
    except UnicodeDecodeError:
        return False


def _parse(path: Path, text: str) -> list:
    first = text.lstrip()[:1]
    if not first:
        return []
    if first == "[":
        return _read_list(path, text)
    if first != "{":
        raise DataError(_text_problem(path, text))
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    names_lines = any(ending in _LINE_ENDINGS for ending in (suffix.lower() for suffix in path.suffixes))
    if names_lines or (len(lines) > 1 and _is_json(lines[0][1])):
        return [_load(path, line, number) for number, line in lines]
    return _read_list(path, text)


def _read_list(path: Path, text: str) -> list:
    rows = _load(path, text)
    if isinstance(rows, list):
        return rows
    if isinstance(rows, dict) and any(name in rows for name in ROW_NAMES):
        # one sample a line, of which there is one
        return [rows]
    inner = [key for key, value in rows.items() if isinstance(value, list)] if isinstance(rows, dict) else []
    hint = f"; its key {inner[0]!r} holds one: write that alone" if inner else ""
    raise DataError(f"{path} holds a {type(rows).__name__}; it must be a list of samples{hint}")


def _load(path: Path, text: str, line: int | None = None):
    """JSON of the whole file, or of one line of it."""
    where = f"{path}, line {line}" if line else str(path)
    try:
        return json.loads(text, object_pairs_hook=without_doubles)
    except json.JSONDecodeError as error:
        place = f"{path}, line {line or error.lineno}, column {error.colno}"
        is_second = error.msg == "Extra data" and text[error.pos :].lstrip(" ,\r")[:1] == "{"
        hint = "; write one sample a line, or all in one list" if is_second else ""
        raise DataError(f"{place}: no valid JSON: {error.msg}{hint}") from error
    except RecursionError as error:
        raise DataError(f"{where}: its lists and objects are nested too deep") from error
    except DoubleKeyError as error:
        place = where if line else f"{path}[{_row_with_double(text)}]"
        raise DataError(f"{place}: {error}") from error
    except ValueError as error:
        # a number of thousands of digits
        raise DataError(f"{where}: no valid JSON: {error}") from error


def _row_with_double(text: str) -> int:
    """Which row of a list has a key twice; the parser does not tell."""
    decoder = json.JSONDecoder(object_pairs_hook=without_doubles)
    position, index = text.find("[") + 1, 0
    try:
        while position:
            _, position = decoder.raw_decode(text, _BETWEEN.match(text, position).end())
            index += 1
    except ValueError:
        pass
    return index


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _text_problem(path: Path, text: str) -> str:
    lines = text.lstrip().split("\n", 3)[:3]
    try:
        dialect = csv.Sniffer().sniff("\n".join(lines)[:4096], ",;\t") if len(lines) > 1 else None
    except csv.Error:
        dialect = None
    if dialect is not None or path.suffix.lower() in (".csv", ".tsv"):
        return (
            f"{path} looks like a table (CSV); convert it: python -c \"import pandas; pandas.read_csv('{path.name}')"
            f".to_json('{path.stem}.jsonl', orient='records', lines=True)\""
        )
    number = text[: len(text) - len(text.lstrip())].count("\n") + 1
    return (
        f"{path}, line {number}, column 1: no valid JSON: it begins with {lines[0][:40]!r}; write a list of samples "
        "([...]), or one sample ({...}) a line"
    )


def _read_parquet(path: Path, content: bytes) -> list:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(f"{path} is a Parquet file; to read it: pip install pyarrow") from error
    most, size, rows = max(_MAX_RATIO * len(content), _SMALL), 0, []
    try:
        for batch in parquet.ParquetFile(io.BytesIO(content)).iter_batches(_PARQUET_BATCH):
            # a text that stands in a dictionary counts as often as it is used
            plain = (getattr(column, "dictionary_decode", lambda column=column: column)() for column in batch.columns)
            size += sum(column.nbytes for column in plain)
            if size > most:
                break
            rows += batch.to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is a Parquet file that cannot be read: {error}") from error
    if size > most:
        raise DataError(_bomb(path, content))
    return rows


def _bomb(path: Path, content: bytes) -> str:
    return (
        f"{path} has {len(content):,} bytes and unpacks to more than {_MAX_RATIO} times as many: no real data do; "
        "if it is meant, unpack it to JSON lines first"
    )
