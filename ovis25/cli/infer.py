"""`ovis25 infer`: one question, one picture in which something is found, or a file of requests."""

import argparse
import sys
from pathlib import Path

from PIL import Image

from ovis25.cli.command import Command
from ovis25.cli.library_errors import LIBRARY_ERRORS
from ovis25.cli.models import add_model_arguments, generation_options, load_engine
from ovis25.cli.quiet import quieten
from ovis25.cli.terminal import named_file, print_stream, speak_utf8
from ovis25.inference import Ovis25Inference, RequestError
from ovis25.inference.grounding import COORDINATES, GROUNDING_PROMPTS
from ovis25.inference.request import make_request
from ovis25.inference.requests_file import answer_file, json_text, reply_record
from ovis25.text import escape_controls


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--prompt", help="the question")
    parser.add_argument("--image", action="append", default=[], help="a file, address or data: URL; may be repeated")
    parser.add_argument("--video", help="a file")
    parser.add_argument("--ground", choices=list(GROUNDING_PROMPTS), help="ask where it is, in the one --image")
    parser.add_argument("--coordinates", choices=COORDINATES, help="with --ground: the model's unit (default: shares)")
    parser.add_argument("--draw", metavar="PNG", help="with --ground: write the picture with what was found")
    parser.add_argument("--json", action="store_true", help="print the whole reply as one JSON object")
    parser.add_argument("--requests", metavar="JSONL", help="a file of requests instead of --prompt")
    parser.add_argument("--output", metavar="JSONL", help="with --requests: where the replies go")
    parser.add_argument(
        "--batch_size",
        type=int,
        default=8,
        help="with --requests: so many at once, at least 1 (default: 8)",
    )


def run(parsed: argparse.Namespace, words: list[str]) -> int:
    quieten()
    speak_utf8()
    options = generation_options(parsed, words)
    _check(parsed)
    # before the model is loaded: unknown names, wrong types and ranges
    make_request("a question" if parsed.requests else parsed.prompt, **options)
    engine = load_engine(parsed)
    if parsed.requests:
        return _answer_file(engine, parsed, options)
    if parsed.ground:
        _ground(engine, parsed, options)
    else:
        _ask(engine, parsed, options)
    return 0


def _check(parsed: argparse.Namespace) -> None:
    if bool(parsed.requests) == (parsed.prompt is not None):
        raise RequestError("give either --prompt or --requests")
    if bool(parsed.requests) != bool(parsed.output):
        raise RequestError("--requests and --output belong together")
    if parsed.requests and (parsed.image or parsed.video or parsed.ground or parsed.json):
        raise RequestError("with --requests, images, videos and prompts stand in the file; its replies are JSON")
    if parsed.ground and (len(parsed.image) != 1 or parsed.video):
        raise RequestError(f"--ground needs one --image; {len(parsed.image)} were given")
    if (parsed.draw or parsed.coordinates) and not parsed.ground:
        raise RequestError(f"--{'draw' if parsed.draw else 'coordinates'} needs --ground box or --ground point")
    if parsed.draw:
        _check_picture_name(Path(parsed.draw))
    if parsed.batch_size < 1:
        raise RequestError(f"--batch_size is {parsed.batch_size}; it must be at least 1")
    parsed.image = [named_file("image", name) for name in parsed.image]
    parsed.video = named_file("video", parsed.video) if parsed.video is not None else None


def _check_picture_name(path: Path) -> None:
    """Before anything is asked: a picture can be written there."""
    if path.suffix.lower() not in Image.registered_extensions():
        raise RequestError(f"--draw {path}: no picture format ends in {path.suffix or 'nothing'!r}; name it .png")
    if not path.parent.is_dir() or path.is_dir():
        raise RequestError(f"--draw {path}: {'it is a folder' if path.is_dir() else f'{path.parent} is no folder'}")


def _answer_file(engine: Ovis25Inference, parsed: argparse.Namespace, options: dict) -> int:
    num_right, num_wrong = answer_file(engine, parsed.requests, parsed.output, parsed.batch_size, **options)
    print(f"{num_right} answered, {num_wrong} failed: {parsed.output}")
    return 1 if num_wrong else 0


def _ask(engine: Ovis25Inference, parsed: argparse.Namespace, options: dict) -> None:
    stream = engine.stream(parsed.prompt, parsed.image, parsed.video, **options)
    if parsed.json:
        for _ in stream:
            pass
        print(json_text(reply_record(stream.reply)))
    else:
        print_stream(stream)


def _ground(engine: Ovis25Inference, parsed: argparse.Namespace, options: dict) -> None:
    found = engine.grounding_inference(
        parsed.image[0], parsed.prompt, parsed.ground, parse=True, coordinates=parsed.coordinates, **options
    )
    if parsed.draw:
        found.draw().save(parsed.draw)
    record = {"answer": found.answer, "boxes": found.boxes, "points": found.points, "problems": found.problems}
    print(json_text(record) if parsed.json else escape_controls(found.answer))
    for problem in found.problems:
        print(escape_controls(f"note: {problem}"), file=sys.stderr)


COMMAND = Command(
    add_arguments,
    run,
    "Ask a model. The answer goes to the standard output, thinking and tool calls to the standard\n"
    "error. Generation arguments of transformers are options too: --temperature 0 --top_p 0.9; and the\n"
    "engine's: --max_new_tokens N (default: 1024), --max_pixels N, --num_frames N (default: as trained).\n"
    "With --requests, a file of requests (JSON Lines: prompt, image, images, video, enable_thinking, ...) is\n"
    "answered in batches, a line's own generation arguments win; the same command goes on where it stopped.",
    lambda program: (
        "examples:\n"
        '  ovis25 infer output/tiny --image strip.png --prompt "Read the digits." --think --budget 64\n'
        "  ovis25 infer output/tiny --requests requests.jsonl --output replies.jsonl"
    ),
    interrupted="interrupted; with --requests the same command goes on where it stopped",
    user_errors=(ValueError, *LIBRARY_ERRORS),
)
