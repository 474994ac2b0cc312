"""Conversations to ids: training text with its learned parts, and the placeholders' expansion.

Training text is built here and not by the chat template, which would delete the thinking of earlier turns.
"""

import re
from dataclasses import dataclass, field

import numpy as np

from ovis25.constants import (
    EMPTY_THINK,
    IGNORE_INDEX,
    IMAGE_BEGIN_ID,
    IMAGE_END_ID,
    IMAGE_PLACEHOLDER,
    THINK_BEGIN,
    THINK_END,
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_RESPONSE_BEGIN,
    TOOL_RESPONSE_END,
    TURN_BEGIN,
    TURN_END,
    VIDEO_BEGIN_ID,
    VIDEO_END_ID,
    VIDEO_PLACEHOLDER,
    VISUAL_ATOM_ID,
)
from ovis25.processing.image import num_visual_tokens

# who speaks, as the data names it, and as the model reads it
ROLES = {"system": "system", "human": "user", "gpt": "assistant", "ignored_gpt": "assistant"}
LEARNED_ROLE = "gpt"

_PLACEHOLDERS = re.compile(f"({IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER})")
# thinking that is empty, whatever blanks it holds: the way of saying that there is none
_EMPTY_BLOCK = re.compile(rf"\s*{THINK_BEGIN}\s*{THINK_END}\s*")
# what a tool gave, right after its call; read, never learned (an image's positions are not learned anyway)
_TOOL_RESPONSE = re.compile(f"(?<={TOOL_CALL_END}){TOOL_RESPONSE_BEGIN}.*?{TOOL_RESPONSE_END}", re.DOTALL)
# a call, and the image that it gave
TOOL_IMAGE = re.compile(f"{TOOL_CALL_BEGIN}([^<]*){TOOL_CALL_END}{IMAGE_PLACEHOLDER}")
_INDICATORS = {
    IMAGE_PLACEHOLDER: (IMAGE_BEGIN_ID, IMAGE_END_ID),
    VIDEO_PLACEHOLDER: (VIDEO_BEGIN_ID, VIDEO_END_ID),
}


@dataclass
class TrainingText:
    """A conversation as one text, and the character spans of it that are learned."""

    text: str = ""
    learned_spans: list[tuple[int, int]] = field(default_factory=list)

    def add(self, text: str, learned: bool = False) -> None:
        if learned:
            self.learned_spans.append((len(self.text), len(self.text) + len(text)))
        self.text += text


def training_text(conversations: list[dict[str, str]]) -> TrainingText:
    """Render turns with `from` (system, human, gpt, ignored_gpt) and `value`.

    A gpt turn without a `<think>..</think>` of its own gets the empty block in front, which is not learned; neither is
    an empty block that stands there already, which gives the same tokens.
    Its value and `<|im_end|>` are learned; headers, other turns and newlines between turns are not. In a value, a
    `<tool_response>..</tool_response>` right after `</tool_call>` is not learned: the tool writes it.
    The last newline is dropped.
    """
    rendered = TrainingText()
    for index, turn in enumerate(conversations):
        role, value = turn["from"], turn["value"]
        rendered.add(f"{TURN_BEGIN}{ROLES[role]}\n")
        if role == LEARNED_ROLE:
            explicit = empty_thinking(value)
            value = value if explicit is None else value[explicit:]
            if explicit is not None or not (THINK_BEGIN in value and THINK_END in value):
                rendered.add(EMPTY_THINK)
        is_learned, start = role == LEARNED_ROLE, 0
        for response in _TOOL_RESPONSE.finditer(value):
            rendered.add(value[start : response.start()], learned=is_learned)
            rendered.add(response.group())
            start = response.end()
        rendered.add(value[start:] + TURN_END, learned=is_learned)
        if index < len(conversations) - 1:
            rendered.add("\n")
    return rendered


def empty_thinking(value: str) -> int | None:
    """Where an answer goes on behind the empty `<think>..</think>` that it begins with; None where there is none."""
    found = _EMPTY_BLOCK.match(value)
    return found.end() if found else None


def count_placeholders(text: str) -> tuple[int, int]:
    """How often `<image>` and `<video>` stand in the text."""
    return text.count(IMAGE_PLACEHOLDER), text.count(VIDEO_PLACEHOLDER)


def tokenize(
    tokenizer, text: str, grids: list[tuple[int, int, int]], learned_spans: list[tuple[int, int]] = ()
) -> tuple[list[int], list[int]]:
    """Tokenize chunk by chunk around the placeholders; returns ids and labels of equal length.

    Placeholder k becomes [begin] + [atom] * (t*h*w/4) + [end] for `grids[k]`. A token is learned where it
    begins inside a learned span; visual positions never are.

    Raises:
        ValueError: the placeholders and the grids differ in number.
    """
    chunks = _PLACEHOLDERS.split(text)
    if len(chunks) // 2 != len(grids):
        raise ValueError(f"{len(chunks) // 2} placeholders in the text, but {len(grids)} visual inputs")
    ids: list[int] = []
    labels: list[int] = []
    position = 0
    remaining = iter(grids)
    for chunk in chunks:
        if chunk in _INDICATORS:
            begin, end = _INDICATORS[chunk]
            visual = [begin, *[VISUAL_ATOM_ID] * num_visual_tokens(next(remaining)), end]
            ids += visual
            labels += [IGNORE_INDEX] * len(visual)
        elif chunk:
            encoding = tokenizer(chunk, add_special_tokens=False, return_offsets_mapping=bool(learned_spans))
            ids += encoding["input_ids"]
            labels += _labels(encoding, position, learned_spans)
        position += len(chunk)
    return ids, labels


def _labels(encoding, position: int, learned_spans: list[tuple[int, int]]) -> list[int]:
    if not learned_spans:
        return [IGNORE_INDEX] * len(encoding["input_ids"])
    starts, ends = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2).T + position
    learned = np.zeros(len(starts), dtype=bool)
    for span_start, span_end in learned_spans:
        learned |= (starts >= span_start) & (starts < span_end) & (ends > span_start)
    return np.where(learned, encoding["input_ids"], IGNORE_INDEX).tolist()


def tool_result_ids(tokenizer, result: str | tuple[int, int, int]) -> list[int]:
    """What follows `</tool_call>`: a text in its tags, or the visual positions of an image's grid."""
    if isinstance(result, str):
        text = f"{TOOL_RESPONSE_BEGIN}{result}{TOOL_RESPONSE_END}"
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return [IMAGE_BEGIN_ID, *[VISUAL_ATOM_ID] * num_visual_tokens(result), IMAGE_END_ID]


def harmless(tokenizer, text: str) -> str:
    """A text in which no control token is left: `<|im_end|>` becomes `&lt;|im_end|>`, so for tags and placeholders.

    What a tool gives is somebody else's text; it must not end its own tags, or begin a turn.
    """
    controls = [*tokenizer.get_added_vocab(), IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER]
    pattern = "|".join(re.escape(control[1:]) for control in controls if control[0] == "<")
    return re.sub(f"<(?={pattern})", "&lt;", text)
