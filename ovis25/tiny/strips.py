"""Questions about strips of real handwritten digits: training samples without end, and the exam's questions.

The digits are scikit-learn's `load_digits`: 1,797 images of 8 x 8 pixels with values 0..16, part of the package.
A fixed permutation deals them to three splits that share no image: 300 for `test`, 200 for `validation` and 1,297
for `train`. Sums of text questions are split as well: what one split asks, no other does.
"""

import functools
import importlib
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ovis25.constants import IMAGE_PLACEHOLDER, THINK_BEGIN, THINK_END, TOOL_CALL_BEGIN, TOOL_CALL_END

SPLITS = ("train", "validation", "test")
_SPLIT_STARTS = {"test": (0, 300), "validation": (300, 500), "train": (500, 1797)}

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

# The curriculum: the first half of a training set is mostly reading, of strips that grow. Without it the model stays
# on a plateau: after 64,000 mixed samples it read 5 % of validation strips, with it 95 %.
_CURRICULUM_PART = 0.5
# the share of reading at its begin and at its end (the rest is the mix)
_READING_SHARES = (0.95, 0.6)
# the part of it in which strips have a single digit
_SINGLE_DIGIT_PART = 0.25

READING_PROMPT = "Which digits are shown?"
SUM_PROMPT = "What is the sum of the digits?"
GROUNDING_PROMPT = "Where is <ref>digit {digit}</ref>? Please provide the bounding box coordinates."
CROP_PROMPT = "Crop the digits. Which digits are shown?"
COMPARISON_PROMPT = "Which image shows the larger number, first or second?"
ARITHMETIC_PROMPT = "What is {first}+{second}?"

_CELL_SIDES = (56, 72)
_DIGIT_SHARES = (0.72, 0.94)
_LARGEST_TERM = 20
# a page is cut into fields, one of which holds the strip
_FIELD_WIDTH, _FIELD_HEIGHT = 256, 128
_PAGE_COLUMNS, _PAGE_ROWS = 3, 6
# the source's 8 x 8 pixels, and a margin of paper around them that rotated corners may reach into
_SOURCE_SIDE, _MARGIN = 8, 2
# darkness from which a pixel belongs to the digit's box
_INK = 64
_IS_INK = [255 * (darkness >= _INK) for darkness in range(256)]
_PAPER = [255 - darkness for darkness in range(256)]


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


@dataclass
class Strip:
    """An RGB picture of one to four digits, in reading order, and their boxes in pixels."""

    image: Image.Image
    digits: list[int]
    boxes: list[tuple[int, int, int, int]]


@functools.cache
def digit_indices(split: str) -> list[int]:
    """Which of `load_digits`' images belong to a split.

    Raises:
        ValueError: an unknown split; names the three.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    order = list(range(1797))
    random.Random("load_digits").shuffle(order)
    return order[slice(*_SPLIT_STARTS[split])]


@functools.cache
def _digits(split: str) -> list[tuple[Image.Image, int]]:
    """(darkness image with margin, label) of each original of the split."""
    # scikit-learn takes a second to import, and only the embedded model's data needs it
    data = importlib.import_module("sklearn.datasets").load_digits()
    darkness = np.pad((data.images * (255 / 16)).round().astype(np.uint8), ((0, 0), *[(_MARGIN, _MARGIN)] * 2))
    return [(Image.fromarray(darkness[index]), int(data.target[index])) for index in digit_indices(split)]


def make_strip(
    rng: random.Random, split: str, num_digits: int, labels_differ: bool = False, in_one_row: bool = False
) -> Strip:
    """Draw a strip: cells of 56..72 pixels in one row or two, a digit somewhere in each.

    Digits of the train split are distorted as well; the other splits' only vary in size and place. With
    `labels_differ` no digit occurs twice.
    """
    originals = _digits(split)
    chosen: list[tuple[Image.Image, int]] = []
    while len(chosen) < num_digits:
        candidate = rng.choice(originals)
        if not (labels_differ and candidate[1] in [label for _, label in chosen]):
            chosen.append(candidate)
    num_rows = 2 if not in_one_row and num_digits > 1 and rng.random() < 0.3 else 1
    num_columns = math.ceil(num_digits / num_rows)
    cell = rng.randint(*_CELL_SIDES)
    canvas = Image.new("L", (num_columns * cell, num_rows * cell))
    boxes = []
    for position, (original, _) in enumerate(chosen):
        row, column = divmod(position, num_columns)
        side = int(cell * rng.uniform(*_DIGIT_SHARES))
        drawn = _draw(rng, original, side, distort=split == "train")
        left = column * cell + rng.randint(0, cell - side)
        top = row * cell + rng.randint(0, cell - side)
        canvas.paste(drawn, (left, top))
        x1, y1, x2, y2 = drawn.point(_IS_INK).getbbox() or (0, 0, side, side)
        boxes.append((left + x1, top + y1, left + x2, top + y2))
    image = canvas.point(_PAPER).convert("RGB")
    return Strip(image, [label for _, label in chosen], boxes)


def _draw(rng: random.Random, original: Image.Image, side: int, distort: bool) -> Image.Image:
    """The original's 8 x 8 pixels as a square of `side` pixels; distorted, its corners are moved and turned."""
    low, high = _MARGIN, _MARGIN + _SOURCE_SIDE
    if not distort:
        return original.resize((side, side), Image.Resampling.BICUBIC, (low, low, high, high))
    angle, middle = rng.uniform(-0.22, 0.22), _MARGIN + _SOURCE_SIDE / 2
    cosine, sine = math.cos(angle), math.sin(angle)
    corners = []
    for x, y in ((-1, -1), (-1, 1), (1, 1), (1, -1)):
        x = x * _SOURCE_SIDE / 2 + rng.uniform(-0.9, 0.9)
        y = y * _SOURCE_SIDE / 2 + rng.uniform(-0.9, 0.9)
        corners += [middle + x * cosine - y * sine, middle + x * sine + y * cosine]
    return original.transform((side, side), Image.Transform.QUAD, corners, Image.Resampling.BICUBIC)


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
_SOURCES = {"tiny": KINDS, "tiny-crop": CROP_KINDS}
SOURCE_PREFIXES = tuple(f"{name}:" for name in _SOURCES)


class DigitStrips(Sequence):
    """Training samples in the documented data format, made when asked for; sample i is always the same.

    Args:
        split: "train", "validation" or "test".
        num_samples: the length.
        seed: another seed gives other samples of the same split.
        kinds: name -> share; the default is the mix the tiny model learns from.
        curriculum: begin with reading, of one digit and then of more; samples are to be taken in order.

    Item i is {"id": str, "image": PIL image or list of them (none for text), "conversations": two turns}.

    Raises:
        ValueError: an unknown split or kind, or a number of samples that is not positive.
    """

    def __init__(
        self,
        split: str,
        num_samples: int,
        seed: int = 0,
        kinds: dict[str, float] | None = None,
        curriculum: bool = False,
    ):
        digit_indices(split)
        if num_samples < 1:
            raise ValueError(f"the number of samples is {num_samples}; it must be positive")
        self.split, self.num_samples, self.seed, self.curriculum = split, num_samples, seed, curriculum
        self.kinds = dict(KINDS if kinds is None else kinds)
        _check_kinds(self.kinds)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict:
        if not -self.num_samples <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        index %= self.num_samples
        sample = _sample(self.question(index))
        return {"id": f"{self.split}-{self.seed}-{index}", **sample}

    def question(self, index: int) -> Question:
        """What sample `index` asks."""
        rng = random.Random(f"{self.split} {self.seed} {index}")
        progress = index / self.num_samples / _CURRICULUM_PART
        if self.curriculum and progress < 1:
            first, last = _READING_SHARES
            longest = 1 if progress <= _SINGLE_DIGIT_PART else min(1 + int(3 * progress + rng.random()), 4)
            if rng.random() < first + (last - first) * progress:
                return _reading(rng, self.split, (max(1, longest - 1), longest))
        kind = rng.choices(list(self.kinds), list(self.kinds.values()))[0]
        return _MAKERS[kind](rng, self.split)


def _check_kinds(kinds) -> None:
    unknown = [kind for kind in kinds if kind not in _MAKERS]
    if unknown:
        raise ValueError(f"unknown kind {unknown[0]!r}; choose from {', '.join(_MAKERS)}")


def _sample(question: Question) -> dict:
    prompt = "\n".join([IMAGE_PLACEHOLDER] * len(question.images) + [question.prompt])
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": question.answer}]
    if not question.images:
        return {"conversations": turns}
    image = question.images[0] if len(question.images) == 1 else question.images
    return {"image": image, "conversations": turns}


def questions(split: str, kind: str, num: int, seed: int = 0) -> list[Question]:
    """`num` questions of one kind; "sum" and "sum_thinking" ask about the same strips, "page" and
    "page_crop" about the same pages.

    Raises:
        ValueError: an unknown split or kind.
    """
    digit_indices(split)
    _check_kinds([kind])
    topic = _TOPICS.get(kind, kind)
    return [_MAKERS[kind](random.Random(f"exam {split} {topic} {seed} {index}"), split) for index in range(num)]


def parse_source(source: str) -> DigitStrips:
    """`tiny:SPLIT:SAMPLES` or `tiny-crop:SPLIT:SAMPLES`; the train split follows the curriculum.

    Raises:
        ValueError: another form, an unknown split, or a number of samples that is not positive.
    """
    name, *parts = source.split(":")
    if name not in _SOURCES or len(parts) != 2:
        raise ValueError(f"{source!r} is not of the form tiny:SPLIT:SAMPLES, for example tiny:train:80000")
    split, number = parts
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"{source}: the number of samples is {number!r}; it must be a positive whole number")
    try:
        return DigitStrips(split, int(number), kinds=_SOURCES[name], curriculum=split == "train")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def write_samples(folder: str | Path, num_samples: int = 12, split: str = "train", seed: int = 0) -> Path:
    """Write samples as PNG files and one `samples.json` in the documented data format; returns its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for sample in DigitStrips(split, num_samples, seed):
        if "image" in sample:
            images = sample["image"] if isinstance(sample["image"], list) else [sample["image"]]
            names = [f"{sample['id']}-{number}.png" for number in range(len(images))]
            for image, name in zip(images, names, strict=True):
                image.save(folder / name)
            sample["image"] = names[0] if len(names) == 1 else names
        rows.append(sample)
    path = folder / "samples.json"
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return path
