"""A file of requests to a file of replies: in batches, resumable, one bad request does not stop the rest."""

import codecs
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ovis25.files import IS_FILE, IS_MISSING, is_data_url, is_web_address, locate_file, problem_of, without_doubles
from ovis25.generate.transcript import Reply
from ovis25.inference.batches import batches
from ovis25.inference.checks import check_whole, refuse, shown
from ovis25.inference.engine import Ovis25Inference
from ovis25.inference.prompt import Question
from ovis25.inference.request import RequestError, as_request, make_request, split_options
from ovis25.signatures import decoded_by_mark, looks_binary, signature
from ovis25.text import escape_controls, shorten

# lines that are decoded differently do not share a batch: so many batches of lines are looked at before one is full
_LOOK_AHEAD = 4
# a longer number of digits is no count of anything; Python itself refuses to read 4300 of them
_LONGEST_WHOLE_NUMBER = 30
# a longer name is no path that somebody mistyped
_LONGEST_NAME = 255
# how a file of replies begins
_FIRST_BYTES = b'{"index": 0,'


def reply_record(reply: Reply) -> dict:
    """A reply as JSON; a tool's image becomes its size."""
    record = asdict(reply)
    record["tool_calls"] = [
        {
            "call": c.call,
            "result": c.result if isinstance(c.result, str) else f"image {c.result.width}x{c.result.height}",
        }
        for c in reply.tool_calls
    ]
    return record


def json_text(record: dict) -> str:
    """One line of JSON that no terminal obeys and no reader tears: control characters are escaped."""
    return escape_controls(json.dumps(record, ensure_ascii=False), r"\u{:04x}")


def answer_file(
    engine: Ovis25Inference, requests_path: str, output_path: str, batch_size: int = 8, **options
) -> tuple[int, int]:
    """Answer each line of a JSON Lines file; the output has a line per request, in order, with its `index`.

    A line holds the fields of `Request` (`image` for one image), generation arguments of its own, and an optional
    `id`, which is passed through; file names count from the file's folder. Lines that are in the output already are
    not asked again; a torn last line is. What cannot be answered gets a line with `error`.

    Returns:
        How many were answered, and how many failed, in the whole output.

    Raises:
        RequestError: the output belongs to other requests; the files or the options for all are wrong.
    """
    source, target = Path(requests_path), Path(output_path)
    check_whole("batch_size", batch_size, 1)
    defaults, generation = split_options(options)
    make_request("all", **generation)
    lines = _read_lines(source, target)
    done = _read_done(target, lines)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    _make_writable(target)
    read = LineReader(engine, source.parent, defaults, generation)
    with (
        Progress(*columns, transient=True) as bar,
        # a half character, which no check let through, is written as the escape that JSON has for it
        target.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as output,
    ):
        task = bar.add_task("answering", total=len(lines), completed=len(done))
        for records in read.windows(lines, len(done), batch_size):
            output.writelines(json_text(record) + "\n" for record in records)
            output.flush()
            done += records
            bar.update(task, completed=len(done))
    num_failed = sum("error" in record for record in done)
    return len(done) - num_failed, num_failed


def _read_lines(source: Path, target: Path) -> list[str]:
    """The lines that are not blank, as training data are read: only a newline ends one."""
    if (problem := problem_of(source)) != IS_FILE:
        raise RequestError(f"{shorten(str(source), 200)} {problem}; give a JSON Lines file")
    # a pipe would be waited for without end
    problem = problem_of(target)
    if problem == IS_FILE and target.samefile(source):
        problem = "is the file of requests itself"
    if problem not in (IS_FILE, IS_MISSING):
        raise RequestError(f"the output {shorten(str(target), 200)} {problem}; give another --output")
    content = source.read_bytes()
    try:
        # a byte that is no UTF-8 is found in its own line
        text = None if content.startswith(codecs.BOM_UTF8) else decoded_by_mark(content)
    except UnicodeDecodeError as error:
        name = "UTF-32" if error.encoding.startswith("utf-32") else "UTF-16"
        raise RequestError(f"{source} begins like {name} but is not ({error.reason}); save it as UTF-8") from error
    if text is None:
        known = signature(content)
        if what := known[0] if known else looks_binary(content):
            raise RequestError(f"{source} looks like {what}; give a JSON Lines file in UTF-8")
        text = content.decode("utf-8", errors="surrogateescape")
    lines = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n") if line.strip()]
    if lines and lines[0].lstrip().startswith("[") and len(lines) > 1 and lines[-1].rstrip().endswith("]"):
        _refuse_list(source, text)
    return lines


def _make_writable(target: Path) -> None:
    """The output's folder exists, and a file can be opened in it, before anything is asked."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.open("a").close()
    except OSError as error:
        cure = "give another --output"
        raise RequestError(
            f"the output {shorten(str(target), 200)} cannot be written ({error.strerror}); {cure}"
        ) from error


def _refuse_list(source: Path, text: str) -> None:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        # the lines will say what is wrong with each
        return
    raise RequestError(f"{source} holds one JSON list of {len(rows)} requests; write one object a line")


def _read_done(target: Path, lines: list[str]) -> list[dict]:
    """The complete lines of an earlier run; a torn one is cut off."""
    if not target.is_file():
        return []
    content = target.read_bytes()
    size = content.rfind(b"\n") + 1
    text = content[:size].removeprefix(codecs.BOM_UTF8).decode("utf-8", errors="replace")
    done = []
    for index, line in enumerate(text.split("\n")[:-1]):
        where, cure = f"{target}, line {index + 1}", "give another --output, or delete it"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where} is no reply of ours ({error}); {cure}") from error
        answers = isinstance(record, dict) and index < len(lines) and record.get("index") == index
        if not answers or record.get("request") != _printable(lines[index]):
            raise RequestError(f"{where} answers another request than line {index + 1} of the requests; {cure}")
        done.append(record)
    if size < len(content):
        if not done and not content.startswith(_FIRST_BYTES) and not _FIRST_BYTES.startswith(content):
            raise RequestError(f"{target} holds something else than replies; give another --output, or delete it")
        # only now: what is not ours stays as it is
        os.truncate(target, size)
    return done


def _printable(line: str) -> str:
    """The line as the output holds it: bytes that are no UTF-8 are written as escapes."""
    return line.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="backslashreplace")


@dataclass
class LineReader:
    """Answers lines window by window; what is wrong with one is its own error."""

    engine: Ovis25Inference
    folder: Path
    defaults: dict
    generation: dict

    def windows(self, lines: list[str], start: int, batch_size: int) -> Iterator[list[dict]]:
        """The records of the lines from `start` on, each time as many as fill a batch."""
        records: list[dict] = []
        asked: list[tuple[dict, Question]] = []
        for index in range(start, len(lines)):
            record = {"index": index, "request": _printable(lines[index])}
            records.append(record)
            try:
                asked.append((record, self.encode(lines[index], record)))
            except RequestError as error:
                record["error"] = str(error)
            if self._is_full(asked, len(records), batch_size):
                yield self._answered(records, asked, batch_size)
                records, asked = [], []
        if records:
            yield self._answered(records, asked, batch_size)

    def encode(self, line: str, record: dict) -> Question:
        """The request of a line, encoded; its `id` goes into the record. Raises RequestError."""
        try:
            fields = _parse(line)
            if "id" in fields:
                record["id"] = _checked_id(fields.pop("id"))
            request = as_request(_located(fields, self.folder), self.defaults)
            return self.engine.encode(request, self.generation)
        except RecursionError as error:
            raise RequestError("the line is nested too deeply") from error

    @staticmethod
    def _is_full(asked: list, num_lines: int, batch_size: int) -> bool:
        prompts = [prompt for _, prompt in asked]
        largest = max(map(len, batches(prompts, batch_size)), default=0)
        return largest >= batch_size or num_lines >= _LOOK_AHEAD * batch_size

    def _answered(self, records: list[dict], asked: list[tuple[dict, Question]], batch_size: int) -> list[dict]:
        for indices in batches([prompt for _, prompt in asked], batch_size):
            group = [asked[index] for index in indices]
            try:
                replies = self.engine.reply_to([prompt for _, prompt in group], self.generation)
            except RequestError as error:
                if not group[0][1].request.generation:
                    # the options for all are at fault, not these lines
                    raise
                for record, _ in group:
                    record["error"] = str(error)
                continue
            for (record, _), reply in zip(group, replies, strict=True):
                record |= reply_record(reply)
        return records


def _parse(line: str) -> dict:
    try:
        line.encode("utf-8")
        fields = json.loads(line, parse_int=_whole_number, object_pairs_hook=without_doubles)
    except UnicodeEncodeError as error:
        place = f"byte {line[error.start].encode('utf-8', errors='surrogateescape')!r} at place {error.start}"
        raise RequestError(f"the line is no UTF-8 text ({place}); save the file as UTF-8") from error
    except ValueError as error:
        raise RequestError(f"the line is no JSON object: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError(f"the line must be an object, not {shown(fields)}")
    return fields


def _whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_WHOLE_NUMBER else float(digits)


def _checked_id(value):
    """Anything that can be written again."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except ValueError as error:
        raise refuse("id", value, "a text or a number that UTF-8 and JSON can hold") from error
    return value


def _located(fields: dict, folder: Path) -> dict:
    """The fields with their file names found; other types are left to the request's own checks."""
    for key in ("image", "video"):
        if isinstance(fields.get(key), str):
            fields[key] = _located_file(key, fields[key], folder)
    for key in ("images", "video"):
        if isinstance(fields.get(key), list):
            fields[key] = [_located_file(f"{key}[{index}]", name, folder) for index, name in enumerate(fields[key])]
    return fields


def _located_file(key: str, name, folder: Path):
    if not isinstance(name, str) or not name or is_web_address(name) or is_data_url(name):
        return name
    try:
        return str(locate_file(name, folder))
    except FileNotFoundError as error:
        hint = "; base64 belongs behind data:image/png;base64," if len(name) > _LONGEST_NAME else ""
        raise RequestError(f"{key}: {error}{hint}") from error
