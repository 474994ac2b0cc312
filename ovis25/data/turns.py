"""Rules that hold for every conversation, whatever form its row has: who speaks when, thinking, control tokens."""

import re
from dataclasses import dataclass

from ovis25.constants import IMAGE_PLACEHOLDER, THINK_BEGIN, THINK_END, TOOL_CALL_END, VIDEO_PLACEHOLDER
from ovis25.data.errors import SampleError
from ovis25.processing.chat import LEARNED_ROLE, empty_thinking
from ovis25.text import lone_surrogate

ANSWER_ROLES = (LEARNED_ROLE, "ignored_gpt")
# one id each in the tokenizer: inside a text they would begin and end turns, or stand for pictures
CONTROL_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>",
)  # fmt: skip
_CONTROL = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))
_VISUAL = re.compile(f"{IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER}")


@dataclass
class Turn:
    """`role` is system, human, gpt or ignored_gpt; `place` is where the row has the text, for messages."""

    role: str
    value: str
    place: str


def check_turns(turns: list[Turn], field_name: str) -> None:
    """Raise SampleError for the first turn that would train on something else than was meant."""
    for turn in turns:
        check_text(turn.value, turn.place)
        _check_filled(turn)
        if turn.role in ANSWER_ROLES:
            _check_visuals(turn)
        if turn.role == LEARNED_ROLE:
            _check_thinking(turn)
    if all(turn.role != LEARNED_ROLE for turn in turns):
        raise SampleError(field_name, "it has no learned token: no gpt turn", "Add an answer, or remove the sample")
    _check_order(turns, field_name)


def check_text(text: str, place: str) -> None:
    """Raise SampleError for half characters and control tokens."""
    position = lone_surrogate(text)
    if position is not None:
        raise SampleError(
            place,
            f"character {position} is half a character (\\u{ord(text[position]):04x}), cut out of an emoji",
            "Write the whole character, or remove it",
        )
    found = list(dict.fromkeys(_CONTROL.findall(text)))
    if found:
        raise SampleError(
            place,
            f"it holds the control token {', '.join(found)}",
            "Remove it: turns and pictures get their tokens here (<image> and <video> stand for visuals)",
        )


def _check_filled(turn: Turn) -> None:
    if turn.value.strip():
        return
    what, cure = {
        "system": ("the system turn is empty", "Write it, or remove the turn"),
        "human": ("the question is empty", "Write the question, or remove the turn and its answer"),
    }.get(turn.role, ("the answer is empty", "Write the answer, or remove the turn"))
    raise SampleError(turn.place, what, cure)


def _check_visuals(turn: Turn) -> None:
    """A model writes no pictures: in an answer they are what a tool gave, right behind its call."""
    for match in _VISUAL.finditer(turn.value):
        is_result = match.group() == IMAGE_PLACEHOLDER and turn.value.endswith(TOOL_CALL_END, 0, match.start())
        if not is_result:
            raise SampleError(
                turn.place,
                f"{match.group()} stands in an answer, where no picture can be shown",
                "Move it into the question; in an answer it may only follow </tool_call>",
            )


def _check_thinking(turn: Turn) -> None:
    value, num_begins, num_ends = turn.value, turn.value.count(THINK_BEGIN), turn.value.count(THINK_END)
    if not num_begins and not num_ends:
        return
    begin, end = value.find(THINK_BEGIN), value.find(THINK_END)
    if not num_begins:
        problem, cure = "it has </think> without <think>", "Write <think> in front of the thinking"
    elif not num_ends:
        problem, cure = "its <think> is never closed", "Write </think> behind the thinking"
    elif end < begin:
        problem, cure = "</think> stands before <think>", "Write <think>thinking</think> and then the answer"
    elif num_begins > 1 or num_ends > 1:
        problem = f"it has {num_begins} <think> and {num_ends} </think>"
        cure = "An answer has one block; join them, or make several turns"
    elif value[:begin].strip():
        problem, cure = "there is text before <think>", "The thinking comes first; move the text behind </think>"
    elif not value[end + len(THINK_END) :].strip():
        problem, cure = "there is thinking, but no answer behind </think>", "Write the answer, or remove the turn"
    else:
        return
    raise SampleError(turn.place, problem, cure)


def _check_order(turns: list[Turn], field_name: str) -> None:
    """A system turn or none, then questions and answers by turns, an answer last."""
    previous = None
    for turn in turns:
        speaker = "gpt" if turn.role in ANSWER_ROLES else turn.role
        problem = None
        if speaker == "system" and previous is not None:
            problem, cure = "the system turn is not the first", "Move it to the front, or join several into one"
        elif speaker == "gpt" and previous in (None, "system"):
            problem, cure = "the conversation begins with an answer", "Write the question before it, or remove it"
        elif speaker == previous:
            kind = "questions" if speaker == "human" else "answers"
            problem, cure = f"two {kind} stand in a row", "Join them, or add what is missing between them"
        if problem:
            raise SampleError(turn.place, problem, cure)
        previous = speaker
    if previous != "gpt":
        raise SampleError(turns[-1].place, "the last question has no answer", "Add the answer, or remove the question")


def num_empty_thinking(turns: list[Turn]) -> int:
    """How many learned answers begin with an explicit empty block, which is not learned."""
    return sum(turn.role == LEARNED_ROLE and empty_thinking(turn.value) is not None for turn in turns)
