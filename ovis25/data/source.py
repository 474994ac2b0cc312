"""Reading data files: a JSON list, JSON lines or Parquet, also compressed with gzip; what else it is, is said."""

import codecs
import csv
import gzip
import importlib
import io
import json
import zlib
from pathlib import Path

from ovis25.data.errors import DataError

__all__ = ["DataError", "read_rows"]

# the longest first: UTF-32's mark begins as UTF-16's does
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
# what a file's first bytes say that it is, and the cure
_OTHERS = (
    (b"PK\x03\x04", "a zip archive or an Excel sheet", "unpack it, or save the sheet as JSON lines"),
    (b"BZh", "compressed with bzip2", "decompress it (bunzip2), or use gzip"),
    (b"\xfd7zXZ", "compressed with xz", "decompress it (unxz), or use gzip"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "decompress it (unzstd), or use gzip"),
    (b"ARROW1", "an Arrow file", "save it as Parquet or JSON lines: dataset.to_json(PATH)"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "save it as Parquet or JSON lines: dataset.to_json(PATH)"),
    (b"\x89PNG", "a PNG picture", "name the file with the samples"),
    (b"\xff\xd8\xff", "a JPEG picture", "name the file with the samples"),
    (b"SQLite", "an SQLite database", "export its rows as JSON lines"),
    (b"\x80\x04", "a Python pickle", "write its rows as JSON lines"),
    (b"\x80\x05", "a Python pickle", "write its rows as JSON lines"),
    (b"version https://git-lfs", "a pointer of git-lfs, without the data", "fetch it: git lfs pull"),
    (b"<", "XML or HTML, maybe the page of a failed download", "download it again, or convert it to JSON lines"),
)
_LINE_ENDINGS = (".jsonl", ".ndjson")


def read_rows(path: str | Path) -> list:
    """The rows of a data file: a JSON list of samples, one sample a line, or Parquet; gzip around it is fine.

    What the file holds decides, not its name. Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark.

    Raises:
        DataError: missing, empty, or something else (says what it looks like, and the cure); no JSON (with line and
            column); no list.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(_folder_problem(path))
    if not path.is_file():
        raise DataError(f"{path} does not exist; correct data_path or eval_data_path")
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP):
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is compressed with gzip, and broken: {error}; fetch it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    rows = _read_parquet(path, content) if content.startswith(_PARQUET) else _parse(path, _decode(path, content))
    if not rows:
        raise DataError(f"{path} holds no sample")
    return rows


def _folder_problem(path: Path) -> str:
    endings = (".json", *_LINE_ENDINGS, ".parquet", ".gz")
    found = sorted(entry.name for entry in path.iterdir() if entry.name.lower().endswith(endings))
    holds = f"it holds {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}" if found else "it holds no data file"
    return f"{path} is a folder, not a data file; {holds}"


def _decode(path: Path, content: bytes) -> str:
    for begin, what, cure in _OTHERS:
        if content.lstrip().startswith(begin):
            raise DataError(f"{path} is no JSON: it looks like {what}; {cure}")
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise DataError(f"{path} begins as {encoding} and is broken: {error}; write it as UTF-8") from error
        raise DataError(f"{path} is not UTF-8 text: {error}; {_looks_encoded(path, content)}") from error


def _looks_encoded(path: Path, content: bytes) -> str:
    """Which encoding it probably is, and the command that changes it."""
    start = content[: 2**16]
    if start.count(0) > len(start) // 4:
        name = "UTF-16LE" if start[1:2] == b"\0" else "UTF-16BE"
    else:
        high = bytes(byte for byte in start if byte >= 0x80)
        # in GBK a character takes two bytes, most of them both above 0x80; in Latin-1 such letters stand alone
        pairs = sum(a >= 0x81 and b >= 0x40 for a, b in zip(start[::1], start[1::1], strict=False))
        name = "GBK" if _can_decode(start, "gbk") and pairs > 0.75 * max(len(high), 1) and len(high) > 3 else "CP1252"
    return f"it looks like {name}; change it: iconv -f {name} -t UTF-8 {path.name} > utf8_{path.name}"


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
    inner = [key for key, value in rows.items() if isinstance(value, list)] if isinstance(rows, dict) else []
    hint = f"; its key {inner[0]!r} holds one: write that alone" if inner else ""
    raise DataError(f"{path} holds a {type(rows).__name__}; it must be a list of samples{hint}")


def _load(path: Path, text: str, line: int | None = None):
    """JSON of the whole file, or of one line of it."""
    where = f"{path}, line {line}" if line else str(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}, line {line or error.lineno}, column {error.colno}"
        raise DataError(f"{place}: no valid JSON: {error.msg}") from error
    except RecursionError as error:
        raise DataError(f"{where}: its lists and objects are nested too deep") from error
    except ValueError as error:
        # a number of thousands of digits
        raise DataError(f"{where}: no valid JSON: {error}") from error


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
    try:
        return parquet.read_table(io.BytesIO(content)).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is a Parquet file that cannot be read: {error}") from error
