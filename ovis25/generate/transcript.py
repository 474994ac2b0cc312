"""What comes back: the reply's parts told apart, whole or piece by piece."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image

from ovis25.constants import (
    IMAGE_BEGIN_ID,
    IMAGE_END_ID,
    IMAGE_PLACEHOLDER,
    THINK_BEGIN,
    THINK_END,
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_RESPONSE_BEGIN,
    TOOL_RESPONSE_END,
)


@dataclass
class ToolCall:
    """A call as the model wrote it, and what the tool gave: an image, or a text."""

    call: str
    result: Image.Image | str


@dataclass
class Reply:
    """One whole reply.

    `answer` is what follows the thinking and the last tool result; `thinking` is None where there was none; `text` is
    everything, tags included, with `<image>` for a tool's image. Counts are in tokens; `new_tokens` is what the model
    wrote plus what the budget forced. `stop_reason`: see `Sequence`.
    """

    answer: str
    thinking: str | None
    text: str
    prompt_tokens: int
    thinking_tokens: int
    new_tokens: int
    stop_reason: str
    budget_forced: bool = False
    tool_calls: list[ToolCall] = field(default_factory=list)


class Piece(str):
    """A piece of streamed text; `kind` is "thinking", "answer", "tool_call" or "tool_result"."""

    kind: str

    def __new__(cls, text: str, kind: str):
        piece = super().__new__(cls, text)
        piece.kind = kind
        return piece


class ReplyStream:
    """An iterator of `Piece`s; `reply` is the whole `Reply` once it is exhausted.

    Whoever makes one sets `pieces`, an iterator that sets `reply` at its end. Nothing is computed before it is drawn
    from.
    """

    def __init__(self):
        self.pieces: Iterator[Piece] = iter(())
        self.reply: Reply | None = None

    def __iter__(self) -> Iterator[Piece]:
        yield from self.pieces


@dataclass
class _Segment:
    kind: str
    ids: list[int]


class Transcript:
    """Reads the ids of a reply as they come and tells thinking, answer, calls and results apart.

    Args:
        is_open: the prompt's end opened the thinking block, or a budget is set: the reply begins with thinking.
    """

    def __init__(self, tokenizer, is_open: bool):
        self._tokenizer = tokenizer
        names = (THINK_BEGIN, THINK_END, TOOL_CALL_BEGIN, TOOL_CALL_END, TOOL_RESPONSE_BEGIN, TOOL_RESPONSE_END)
        think, unthink, call, uncall, response, unresponse = tokenizer.convert_tokens_to_ids(list(names))
        self._opening = {think: "thinking", call: "tool_call", response: "tool_result", IMAGE_BEGIN_ID: "tool_result"}
        self._think, self._unthink = think, unthink
        self._closing = {unthink, uncall, unresponse, IMAGE_END_ID}
        self._special = set(tokenizer.all_special_ids)
        self._kind = self._outer = "thinking" if is_open else "answer"
        self._segments: list[_Segment] = []
        self._num_shown = 0

    def read(self, ids: list[int]) -> list[Piece]:
        """Take in the next ids; returns the text that is certain by now."""
        pieces = []
        for token in ids:
            if token in self._opening and self._kind in ("thinking", "answer"):
                pieces += self._show(is_last=True)
                self._kind = self._opening[token]
                if token == self._think:
                    self._outer = self._kind
                self._segments.append(_Segment(self._kind, []))
                if token == IMAGE_BEGIN_ID:
                    pieces.append(Piece(IMAGE_PLACEHOLDER, self._kind))
            elif token in self._closing and (self._kind != "answer" or token == self._unthink):
                pieces += self._show(is_last=True)
                if token == self._unthink:
                    # a block that the model closed without having opened it was thinking from its beginning
                    for segment in self._segments:
                        segment.kind = "thinking" if segment.kind == "answer" else segment.kind
                    self._outer = "answer"
                self._kind = self._outer
                self._segments.append(_Segment(self._kind, []))
            elif token >= 0 and token not in self._special:
                if not self._segments:
                    self._segments.append(_Segment(self._kind, []))
                self._segments[-1].ids.append(token)
        return pieces + self._show()

    def finish(self) -> list[Piece]:
        """What was held back."""
        return self._show(is_last=True)

    def _show(self, is_last: bool = False) -> list[Piece]:
        """The last segment's text beyond what was shown; blanks and unfinished characters wait for what follows."""
        if not self._segments:
            return []
        segment = self._segments[-1]
        text = self._tokenizer.decode(segment.ids).lstrip()
        text = text.rstrip() if is_last else text.rstrip().rstrip("\ufffd")
        new, self._num_shown = text[self._num_shown :], 0 if is_last else max(len(text), self._num_shown)
        return [Piece(new, segment.kind)] if new else []

    def _text(self, kind: str, segments: list[_Segment]) -> str:
        texts = (self._tokenizer.decode(segment.ids).strip() for segment in segments if segment.kind == kind)
        return "\n".join(text for text in texts if text)

    def answer(self) -> str:
        """The answer after the last tool result."""
        results = [index for index, segment in enumerate(self._segments) if segment.kind == "tool_result"]
        return self._text("answer", self._segments[results[-1] + 1 if results else 0 :])

    def thinking(self) -> str | None:
        """All thinking; None where there was no block at all."""
        if not any(segment.kind == "thinking" for segment in self._segments):
            return None
        return self._text("thinking", self._segments)

    def num_thinking_tokens(self) -> int:
        return sum(len(segment.ids) for segment in self._segments if segment.kind == "thinking")


def reply_text(tokenizer, ids: list[int]) -> str:
    """The whole reply as text, tags included, `<image>` for each visual run."""
    parts, start = [], 0
    for index, token in enumerate(ids):
        if token == IMAGE_BEGIN_ID:
            parts += [tokenizer.decode(ids[start:index], skip_special_tokens=True), IMAGE_PLACEHOLDER]
        elif token == IMAGE_END_ID:
            start = index + 1
    return "".join([*parts, tokenizer.decode(ids[start:], skip_special_tokens=True)])
