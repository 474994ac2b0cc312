"""The exam of a trained tiny model: questions about strips of held-out digits, scored kind by kind."""

import re
from collections.abc import Callable, Iterable

from rich.console import Console
from rich.table import Table

from ovis25.constants import IMAGE_PLACEHOLDER, THINK_END
from ovis25.data.digits import KINDS, Question, questions

Box = tuple[float, float, float, float]

_BOX = re.compile(r"<box>\((\d\.\d+),(\d\.\d+)\),\((\d\.\d+),(\d\.\d+)\)</box>")
_LEAST_IOU = 0.5
# The longest right answer, a sum of four digits with thinking, takes 33 tokens.
_MAX_NEW_TOKENS = 64
_NUM_EXAMPLES = 1
_EXAM_SEED = 1
_GAINS = {"thinking_gain_points": ("sum_thinking", "sum"), "tool_gain_points": ("page_crop", "page")}


def run_exam(
    answer: Callable[[list[dict]], list[str]],
    num_per_kind: int = 200,
    seed: int = _EXAM_SEED,
    split: str = "test",
    asked_kinds: Iterable[str] = tuple(KINDS),
) -> dict:
    """Ask `num_per_kind` questions of every kind and score the answers.

    `answer` gets requests with `prompt`, `images` (PIL, possibly none), `enable_thinking`, `with_tools` and
    `max_new_tokens`, and returns a text each; what stands before `</think>` or a tool's `<image>` is not scored. A box
    counts with an IoU of 0.5 or more, any other answer if it is exactly the expected one. Sums with and without
    thinking are asked of the same strips, pages with and without the crop tool likewise.

    Returns:
        `kinds`: kind -> {"correct", "total", "accuracy"}; `thinking_gain_points` and `tool_gain_points`: how many
        percentage points more sums are right with thinking, and pages with the crop tool, than without (where asked);
        `examples`: list of {"kind", "prompt", "expected", "answered",
        "is_correct"}; and the arguments.

    Raises:
        ValueError: `answer` returned another number of texts than it was asked for.
    """
    kinds, examples = {}, []
    for kind in asked_kinds:
        asked = questions(split, kind, num_per_kind, seed)
        answers = answer([_request(question) for question in asked])
        if len(answers) != len(asked):
            raise ValueError(f"{len(asked)} questions were asked, but {len(answers)} answers came back")
        marks = [is_correct(question, text) for question, text in zip(asked, answers, strict=True)]
        kinds[kind] = {"correct": sum(marks), "total": len(marks), "accuracy": sum(marks) / len(marks)}
        rows = list(zip(asked, answers, marks, strict=True))[:_NUM_EXAMPLES]
        examples += [_example(*row) for row in rows]
    gains = {
        name: 100 * (kinds[better]["accuracy"] - kinds[plain]["accuracy"])
        for name, (better, plain) in _GAINS.items()
        if better in kinds and plain in kinds
    }
    return {
        "split": split,
        "seed": seed,
        "num_per_kind": num_per_kind,
        "kinds": kinds,
        **gains,
        "examples": examples,
    }


def _request(question: Question) -> dict:
    return {
        "prompt": question.prompt,
        "images": question.images,
        "enable_thinking": question.enable_thinking,
        "with_tools": question.with_tools,
        "max_new_tokens": _MAX_NEW_TOKENS,
    }


def _example(question: Question, answered: str, mark: bool) -> dict:
    return {
        "kind": question.kind,
        "prompt": question.prompt,
        "expected": question.answer,
        "answered": answered.strip(),
        "is_correct": mark,
    }


def is_correct(question: Question, answered: str) -> bool:
    """Whether a text answers the question, whatever it thought before."""
    given, expected = _final(answered), _final(question.answer)
    if question.kind != "grounding":
        return given == expected
    box = parse_box(given)
    return box is not None and iou(box, parse_box(expected)) >= _LEAST_IOU


def _final(text: str) -> str:
    """What follows the thinking and the last tool result."""
    return text.rpartition(THINK_END)[2].rpartition(IMAGE_PLACEHOLDER)[2].strip()


def parse_box(text: str) -> Box | None:
    """The box (x1, y1, x2, y2) that the whole text consists of, or None."""
    match = _BOX.fullmatch(text)
    return tuple(map(float, match.groups())) if match else None


def iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 where a box is empty or turned inside out."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (first, second)]
    return width * height / (sum(areas) - width * height)


def print_exam(results: dict, console: Console | None = None) -> None:
    """Print a result of `run_exam`: a table of the kinds, what thinking gains, and the examples."""
    console = console or Console()
    table = Table(title=f"Exam: {results['num_per_kind']} {results['split']} questions of each kind")
    table.add_column("kind")
    table.add_column("right", justify="right")
    table.add_column("share", justify="right")
    for kind, score in results["kinds"].items():
        table.add_row(kind, f"{score['correct']} of {score['total']}", f"{score['accuracy']:.1%}")
    console.print(table)
    if "thinking_gain_points" in results:
        console.print(f"Thinking makes the sums {results['thinking_gain_points']:+.1f} points better.")
    if "tool_gain_points" in results:
        console.print(f"The crop tool makes the pages {results['tool_gain_points']:+.1f} points better.")
    for example in results["examples"]:
        mark = "right" if example["is_correct"] else f"wrong, expected {example['expected']!r}"
        line = f"{example['kind']}: {example['prompt']} -> {example['answered']!r} ({mark})"
        console.print(line, markup=False, highlight=False)
