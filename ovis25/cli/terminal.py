"""What a person sees in a terminal: replies as they are written, and a chat."""

import io
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from ovis25.files import is_data_url, is_web_address, locate_file, unquoted_path
from ovis25.generate.transcript import ReplyStream
from ovis25.inference.chat import Chat
from ovis25.inference.prompt import PICTURE_ERRORS
from ovis25.inference.request import RequestError
from ovis25.processing.image import image_size
from ovis25.processing.video import video_info
from ovis25.text import escape_controls, lone_surrogate, nearest, shorten

HELP = """\
/image PATH     show a picture (path or address) with the next message; may be repeated
/video PATH     show a video with the next message
/image none     show none of those that were named, also after one that could not be read
/think on|off   think before answering
/budget N|off   end the thinking after N tokens
/reset          forget the conversation
/help           these lines
/exit           leave (or Ctrl-D)"""
_USES = {"/think": "/think on, or /think off", "/budget": "/budget N (a whole number above 0), or /budget off"}


def speak_utf8() -> None:
    """Bytes that are no UTF-8 come in as half characters that checks can name, and no output ends for its encoding."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def named_file(field_name: str, name: str) -> str:
    """The path, address or data: URL that an argument names. Raises RequestError: names the neighbour."""
    if _is_remote(name):
        return name
    try:
        return str(locate_file(name, Path.cwd()))
    except FileNotFoundError as error:
        # a name without blanks needs no quotes
        said = str(error) if " " in name else str(error).replace(repr(name), name, 1)
        raise RequestError(f"{field_name}: {said}") from error


def print_stream(stream: ReplyStream) -> None:
    """The answer on the standard output; thinking and tools on the standard error, dimmed.

    Control characters of a model's text are shown, not obeyed.
    """
    aside, kind = Console(stderr=True, highlight=False, soft_wrap=True), None
    for piece in stream:
        if kind not in (None, piece.kind):
            (sys.stdout if kind == "answer" else sys.stderr).write("\n")
        kind = piece.kind
        if kind == "answer":
            print(escape_controls(piece), end="", flush=True)
        else:
            aside.print(f"[dim]{escape(escape_controls(piece))}[/dim]", end="")
    print(flush=True)


def run_chat(chat: Chat, read: Callable[[str], str] = input) -> None:
    """Read messages and commands until /exit or the end of the input. What fails is told; the chat goes on."""
    print("Write a message, or /help.")
    session = _Session(chat)
    while True:
        try:
            # a byte order mark that a pipe or a paste brings along
            line = read("> ").strip().removeprefix("\ufeff")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError as error:
            print(f"that was no UTF-8 text ({error.reason}) and was not sent; write it again")
            continue
        if line.lower() in ("/exit", "/quit"):
            return
        if (place := lone_surrogate(line)) is not None:
            print(f"{line[place]!a} at place {place} is no character of UTF-8; the line was not sent, write it again")
        elif line:
            session.take(line)


@dataclass
class _Session:
    """What a chat in the terminal has in hand: the visuals that go with the next message, and one that failed."""

    chat: Chat
    images: list[str] = field(default_factory=list)
    video: str | None = None
    failed: str | None = None

    def take(self, line: str) -> None:
        """One line that is not empty."""
        command, value = _split(line)
        options = self.chat.options
        if command == "/help":
            print(HELP)
        elif command in ("/image", "/video") and value == "none":
            self.drop_visuals()
            print("no picture goes with the next message")
        elif command in ("/image", "/video"):
            self.attach(command[1:], unquoted_path(value))
        elif command == "/think" and value.lower() in ("on", "off"):
            value = value.lower()
            options["enable_thinking"] = value == "on"
            if value == "off":
                options.pop("thinking_budget", None)
        elif command == "/budget" and (value == "off" or _is_count(value)):
            options["thinking_budget"] = None if value == "off" else int(value)
            options["enable_thinking"] = value != "off" or options.get("enable_thinking", False)
        elif command == "/reset":
            self.chat.reset()
            self.drop_visuals()
        elif command.startswith("/"):
            self.refuse(command, line)
        elif self.failed is not None:
            print(f"not sent, because {self.failed} could not be read: name another with /image, or say /image none")
        else:
            self.send(line)

    def refuse(self, command: str, line: str) -> None:
        """Says what was meant; no question is asked without a picture that was to go with it."""
        said = escape_controls(line) if len(line) < 200 else shorten(line, 200)
        if command in _USES:
            print(f"{said}: write {_USES[command]}")
            return
        near = nearest(command, ("/image", "/video", "/think", "/budget", "/reset", "/help", "/exit"))
        print(f"{said}: no such command; {f'did you mean {near}? ' if near else ''}/help lists them")
        if near in ("/image", "/video"):
            self.failed = said
            print("messages wait until you name one with /image or /video, or say /image none")

    def drop_visuals(self) -> None:
        self.images, self.video, self.failed = [], None, None

    def attach(self, kind: str, name: str) -> None:
        """Find and look at a picture or video now, so that no question is asked without it."""
        shown = (escape_controls(name) if len(name) < 500 else shorten(name)) or "no path"
        try:
            path = name if _is_remote(name) else _found(name)
            if not _is_remote(name):
                image_size(path) if kind == "image" else video_info(path)
        except PICTURE_ERRORS as error:
            self.failed = shown
            print(f"{shown}: {escape_controls(str(error))}")
            print("messages wait until you name another with /image or /video, or say /image none")
            return
        self.failed = None
        if kind == "image":
            self.images.append(path)
        else:
            self.video = path
        print(f"{escape_controls(path) if len(path) < 500 else shorten(path)} goes with the next message")

    def send(self, line: str) -> None:
        """Ask; where that fails, the visuals stay for the next message."""
        visuals = len(self.images) + (self.video is not None)
        try:
            print_stream(self.chat.stream(line, self.images, self.video))
            self.images, self.video = [], None
        except (RequestError, torch.OutOfMemoryError) as error:
            print(f"error: {escape_controls(str(error))}")
            if visuals:
                print("what you named still goes with the next message; /image none drops it")
        except KeyboardInterrupt:
            kept = "; what you named still goes with the next message" if visuals else ""
            print(f"\n(given up; the conversation is as before{kept})")


def _is_remote(name: str) -> bool:
    """What is fetched or decoded only when it is sent."""
    return is_web_address(name) or is_data_url(name)


def _is_count(text: str) -> bool:
    return text.isdecimal() and len(text) < 10 and int(text) > 0


def _split(line: str) -> tuple[str, str]:
    """(command, value) of a line: `/Image=a.png` and a tab between them are understood."""
    command, *rest = re.split(r"[\s=]", line, maxsplit=1) if line.startswith("/") else [line]
    return command.lower(), "".join(rest).strip()


def _found(name: str) -> str:
    if not name:
        raise FileNotFoundError("a path belongs behind the command")
    try:
        return str(locate_file(name, Path.cwd()))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no such file ({error})") from error
