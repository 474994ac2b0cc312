"""Inference in a terminal: replies as they are written, and a chat."""

import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ovis25.inference.chat import Chat
from ovis25.inference.engine import RequestError
from ovis25.inference.reply import ReplyStream

HELP = """\
/image PATH     show a picture (path or address) with the next message; may be repeated
/video PATH     show a video with the next message
/think on|off   think before answering
/budget N|off   end the thinking after N tokens
/reset          forget the conversation
/help           these lines
/exit           leave (or Ctrl-D)"""


def print_stream(stream: ReplyStream) -> None:
    """The answer on the standard output; thinking and tools on the standard error, dimmed."""
    aside, kind = Console(stderr=True, highlight=False, soft_wrap=True), None
    for piece in stream:
        if kind not in (None, piece.kind):
            (sys.stdout if kind == "answer" else sys.stderr).write("\n")
        kind = piece.kind
        if kind == "answer":
            print(piece, end="", flush=True)
        else:
            aside.print(f"[dim]{escape(piece)}[/dim]", end="")
    print(flush=True)


def run_chat(chat: Chat, read: Callable[[str], str] = input) -> None:
    """Read messages and commands until /exit or the end of the input. What fails is told; the chat goes on."""
    print("Write a message, or /help.")
    images: list[str] = []
    video: str | None = None
    while True:
        try:
            line = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, value = line.partition(" ")
        value = value.strip()
        if not line:
            continue
        if command == "/exit":
            return
        if command == "/help":
            print(HELP)
        elif command in ("/image", "/video"):
            if not value.startswith(("http://", "https://")) and not Path(value).expanduser().is_file():
                print(f"{value or 'no path'}: no such file")
                continue
            value = value if "://" in value else str(Path(value).expanduser())
            if command == "/image":
                images.append(value)
            else:
                video = value
            print(f"{value} goes with the next message")
        elif command == "/think" and value in ("on", "off"):
            chat.options["enable_thinking"] = value == "on"
            if value == "off":
                chat.options.pop("thinking_budget", None)
        elif command == "/budget" and (value == "off" or value.isdigit() and int(value) > 0):
            chat.options["thinking_budget"] = None if value == "off" else int(value)
            chat.options["enable_thinking"] = value != "off" or chat.options.get("enable_thinking", False)
        elif command == "/reset":
            chat.reset()
            images, video = [], None
        elif command.startswith("/"):
            print(f"{line}: no such command; /help lists them")
        else:
            try:
                print_stream(chat.stream(line, images, video))
                images, video = [], None
            except RequestError as error:
                # the pictures may be what is wrong: they do not stay
                images, video = [], None
                print(f"error: {error}")
            except KeyboardInterrupt:
                print("\n(given up; the conversation is as before)")
