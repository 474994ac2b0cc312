"""What is asked of strips of digits: the kinds of questions, their prompts and right answers.

Sums of text questions are split as the digits are: what one split asks, no other does.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from PIL import Image

from ovis25.constants import IMAGE_PLACEHOLDER, THINK_BEGIN, THINK_END, TOOL_CALL_BEGIN, TOOL_CALL_END
from ovis25.data.digits.originals import digit_indices
from ovis25.data.digits.strips import make_strip

# kind -> its share of a mixed set
KINDS = {
    "reading": 0.34,
    "sum_thinking": 0.34,
    "sum": 0.10,
    "grounding": 0.08,
    "comparison": 0.07,
    "arithmetic": 0.07,
}

# The mix for the crop tool: strips in a corner of a large page, which the pixel budget makes too small to read.
# "page" asks for the digits at once, "page_crop" for a look through the tool first.
CROP_KINDS = {"page_crop": 0.5, "page": 0.15, "reading": 0.35}

READING_PROMPT = "Which digits are shown?"
SUM_PROMPT = "What is the sum of the digits?"
GROUNDING_PROMPT = "Where is <ref>digit {digit}</ref>? Please provide the bounding box coordinates."
CROP_PROMPT = "Crop the digits. Which digits are shown?"
COMPARISON_PROMPT = "Which image shows the larger number, first or second?"
ARITHMETIC_PROMPT = "What is {first}+{second}?"

_LARGEST_TERM = 20
# a page is cut into fields, one of which holds the strip
_FIELD_WIDTH, _FIELD_HEIGHT = 256, 128
_PAGE_COLUMNS, _PAGE_ROWS = 3, 6


@dataclass
class Question:
    """What is asked, and the value a perfect model answers with.

    `answer` is the whole answer, its `<think>` part included where `enable_thinking`, its tool calls where
    `with_tools` (`<image>` stands for what they give); `boxes` holds for every image
    the digits' boxes (left, top, right, bottom) in pixels, in reading order.
    """

    kind: str
    prompt: str
    answer: str
    images: list[Image.Image] = field(default_factory=list)
    enable_thinking: bool = False
    with_tools: bool = False
    boxes: list[list[tuple[int, int, int, int]]] = field(default_factory=list)


def _reading(rng: random.Random, split: str, num_digits: tuple[int, int] = (1, 4)) -> Question:
    strip = make_strip(rng, split, rng.randint(*num_digits))
    return Question("reading", READING_PROMPT, _join(strip.digits), [strip.image], boxes=[strip.boxes])


def _join(digits: list[int]) -> str:
    return "".join(map(str, digits))


def _sum(rng: random.Random, split: str) -> Question:
    strip = make_strip(rng, split, rng.randint(2, 4))
    return Question("sum", SUM_PROMPT, str(sum(strip.digits)), [strip.image], boxes=[strip.boxes])


def _sum_thinking(rng: random.Random, split: str) -> Question:
    """The same strip as `_sum` draws from the same random state."""
    strip = make_strip(rng, split, rng.randint(2, 4))
    answer = sum_with_thinking(strip.digits)
    return Question("sum_thinking", SUM_PROMPT, answer, [strip.image], enable_thinking=True, boxes=[strip.boxes])


def sum_with_thinking(digits: list[int]) -> str:
    """Reads, adds from left to right, answers: "<think>\\n381\\n3+8=11\\n11+1=12\\n</think>\\n\\n12"."""
    lines, total = [_join(digits)], digits[0]
    for digit in digits[1:]:
        lines.append(f"{total}+{digit}={total + digit}")
        total += digit
    return "\n".join([THINK_BEGIN, *lines, THINK_END]) + f"\n\n{total}"


def _grounding(rng: random.Random, split: str) -> Question:
    strip = make_strip(rng, split, rng.randint(1, 4), labels_differ=True)
    index = rng.randrange(len(strip.digits))
    prompt = GROUNDING_PROMPT.format(digit=strip.digits[index])
    answer = format_box(strip.boxes[index], strip.image.size)
    return Question("grounding", prompt, answer, [strip.image], boxes=[strip.boxes])


def format_box(box: tuple[int, int, int, int], image_size: tuple[int, int]) -> str:
    """A box in pixels of an image of (width, height) as `<box>(x1,y1),(x2,y2)</box>` with parts in [0, 1)."""
    width, height = image_size
    parts = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
    x1, y1, x2, y2 = (f"{min(part, 0.99):.2f}" for part in parts)
    return f"<box>({x1},{y1}),({x2},{y2})</box>"


def _comparison(rng: random.Random, split: str) -> Question:
    num_digits = rng.randint(1, 2)
    first = make_strip(rng, split, num_digits)
    second = make_strip(rng, split, num_digits)
    while second.digits == first.digits:
        second = make_strip(rng, split, num_digits)
    answer = "first" if first.digits > second.digits else "second"
    images, boxes = [first.image, second.image], [first.boxes, second.boxes]
    return Question("comparison", COMPARISON_PROMPT, answer, images, boxes=boxes)


def _arithmetic(rng: random.Random, split: str) -> Question:
    while True:
        first, second = rng.randint(0, _LARGEST_TERM), rng.randint(0, _LARGEST_TERM)
        if split_of_sum(first, second) == split:
            return Question("arithmetic", ARITHMETIC_PROMPT.format(first=first, second=second), str(first + second))


def split_of_sum(first: int, second: int) -> str:
    """The one split that asks for first + second: a tenth of the pairs for validation, a tenth for test."""
    number = random.Random(f"{first}+{second}").randrange(10)
    return {0: "validation", 1: "test"}.get(number, "train")


def _page(rng: random.Random, split: str) -> Question:
    """A strip of one to three digits somewhere in a field of a blank page, asked for at once."""
    return _asked_of_page(rng, split, with_tools=False)


def _page_crop(rng: random.Random, split: str) -> Question:
    """The same page as `_page` draws from the same random state; the answer first crops the field."""
    return _asked_of_page(rng, split, with_tools=True)


def _asked_of_page(rng: random.Random, split: str, with_tools: bool) -> Question:
    strip = make_strip(rng, split, rng.randint(1, 3), in_one_row=True)
    column, row = rng.randrange(_PAGE_COLUMNS), rng.randrange(_PAGE_ROWS)
    left = column * _FIELD_WIDTH + rng.randint(0, _FIELD_WIDTH - strip.image.width)
    top = row * _FIELD_HEIGHT + rng.randint(0, _FIELD_HEIGHT - strip.image.height)
    page = Image.new("RGB", (_PAGE_COLUMNS * _FIELD_WIDTH, _PAGE_ROWS * _FIELD_HEIGHT), "white")
    page.paste(strip.image, (left, top))
    boxes = [[(x1 + left, y1 + top, x2 + left, y2 + top) for x1, y1, x2, y2 in strip.boxes]]
    digits = _join(strip.digits)
    if not with_tools:
        return Question("page", READING_PROMPT, digits, [page], boxes=boxes)
    x1, y1 = column * _FIELD_WIDTH, row * _FIELD_HEIGHT
    call = f"{TOOL_CALL_BEGIN}Crop [{x1}, {y1}, {x1 + _FIELD_WIDTH}, {y1 + _FIELD_HEIGHT}]{TOOL_CALL_END}"
    answer = f"{call}{IMAGE_PLACEHOLDER}{digits}"
    return Question("page_crop", CROP_PROMPT, answer, [page], with_tools=True, boxes=boxes)


_MAKERS: dict[str, Callable[[random.Random, str], Question]] = {
    "reading": _reading,
    "sum_thinking": _sum_thinking,
    "sum": _sum,
    "grounding": _grounding,
    "comparison": _comparison,
    "arithmetic": _arithmetic,
    "page": _page,
    "page_crop": _page_crop,
}
# these ask about the same pictures
_TOPICS = {"sum_thinking": "sum", "page_crop": "page"}


def ask(kind: str, rng: random.Random, split: str) -> Question:
    """One question of a kind; the same random state asks the same."""
    return _MAKERS[kind](rng, split)


def ask_reading(rng: random.Random, split: str, num_digits: tuple[int, int]) -> Question:
    """Which digits a strip of `num_digits` (fewest, most) shows."""
    return _reading(rng, split, num_digits)


def check_kinds(kinds: Iterable[str]) -> None:
    """Raises ValueError: an unknown kind; names them all."""
    unknown = [kind for kind in kinds if kind not in _MAKERS]
    if unknown:
        raise ValueError(f"unknown kind {unknown[0]!r}; choose from {', '.join(_MAKERS)}")


def questions(split: str, kind: str, num: int, seed: int = 0) -> list[Question]:
    """`num` questions of one kind; "sum" and "sum_thinking" ask about the same strips, "page" and
    "page_crop" about the same pages.

    Raises:
        ValueError: an unknown split or kind.
    """
    digit_indices(split)
    check_kinds([kind])
    topic = _TOPICS.get(kind, kind)
    return [_MAKERS[kind](random.Random(f"exam {split} {topic} {seed} {index}"), split) for index in range(num)]
