"""A file of requests to a file of replies: in batches, resumable, one bad request does not stop the rest."""

import json
from dataclasses import asdict
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ovis25.files import resolve_input
from ovis25.inference.engine import Ovis25Inference, Prompt, RequestError, as_request, is_field
from ovis25.inference.reply import Reply


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


def answer_file(
    engine: Ovis25Inference, requests_path: str, output_path: str, batch_size: int = 8, **options
) -> tuple[int, int]:
    """Answer each line of a JSON Lines file; the output has a line per request, in order, with its `index`.

    A line holds the fields of `Request` (`image` for one image) and an optional `id`, which is passed through; file
    names count from the file's folder. Lines that are in the output already are not asked again; a torn last line is.
    What cannot be answered gets a line with `error`.

    Returns:
        How many were answered, and how many failed, in the whole output.

    Raises:
        RequestError: the output belongs to other requests; the generation arguments are wrong.
    """
    source, target = Path(requests_path), Path(output_path)
    lines = [line for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    done = _read_done(target, lines)
    generation = {k: v for k, v in options.items() if not is_field(k)}
    defaults = {k: v for k, v in options.items() if is_field(k)}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    target.parent.mkdir(parents=True, exist_ok=True)
    with Progress(*columns, transient=True) as bar, target.open("a", encoding="utf-8") as output:
        task = bar.add_task("answering", total=len(lines), completed=len(done))
        for start in range(len(done), len(lines), batch_size):
            records = _answer(engine, lines[start : start + batch_size], start, source.parent, defaults, generation)
            output.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            output.flush()
            done += records
            bar.update(task, completed=len(done))
    num_failed = sum("error" in record for record in done)
    return len(done) - num_failed, num_failed


def _read_done(target: Path, lines: list[str]) -> list[dict]:
    """The complete lines of an earlier run; a torn one is cut off."""
    if not target.is_file():
        return []
    text = target.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        target.write_text(whole, encoding="utf-8")
    done = [json.loads(line) for line in whole.splitlines()]
    for index, record in enumerate(done):
        if index >= len(lines) or record.get("index") != index or record.get("request") != lines[index]:
            raise RequestError(
                f"{target}, line {index + 1} answers another request than line {index + 1} of the requests; "
                "give another --output, or delete it"
            )
    return done


def _answer(engine, lines: list[str], start: int, folder: Path, defaults: dict, generation: dict) -> list[dict]:
    records = [{"index": start + offset, "request": line} for offset, line in enumerate(lines)]
    prompts: list[tuple[dict, Prompt]] = []
    for record, line in zip(records, lines, strict=True):
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise RequestError(f"a line must be an object, not {type(fields).__name__}")
            record |= {"id": fields.pop("id")} if "id" in fields else {}
            prompts.append((record, engine.encode(as_request(_located(fields, folder), defaults))))
        except (ValueError, TypeError, FileNotFoundError) as error:
            record["error"] = str(error)
    if prompts:
        replies = engine.reply_to([prompt for _, prompt in prompts], generation)
        for (record, _), reply in zip(prompts, replies, strict=True):
            record |= reply_record(reply)
    return records


def _located(fields: dict, folder: Path) -> dict:
    def locate(name):
        is_here = not isinstance(name, str) or name.startswith(("http://", "https://"))
        return name if is_here else str(resolve_input(name, folder))

    for key in ("image", "video", "images"):
        if isinstance(value := fields.get(key), list):
            fields[key] = [locate(name) for name in value]
        elif value is not None:
            fields[key] = locate(value)
    return fields
