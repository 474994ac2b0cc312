"""Training samples of digit strips without end, and the names of such data: `tiny:train:80000`."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from ovis25.constants import IMAGE_PLACEHOLDER
from ovis25.data.digits.kinds import CROP_KINDS, KINDS, Question, ask, ask_reading, check_kinds
from ovis25.data.digits.originals import digit_indices

# The curriculum: the first half of a training set is mostly reading, of strips that grow. Without it the model stays
# on a plateau: after 64,000 mixed samples it read 5 % of validation strips, with it 95 %.
_CURRICULUM_PART = 0.5
# the share of reading at its begin and at its end (the rest is the mix)
_READING_SHARES = (0.95, 0.6)
# the part of it in which strips have a single digit
_SINGLE_DIGIT_PART = 0.25
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
        check_kinds(self.kinds)

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
                return ask_reading(rng, self.split, (max(1, longest - 1), longest))
        kind = rng.choices(list(self.kinds), list(self.kinds.values()))[0]
        return ask(kind, rng, self.split)


def _sample(question: Question) -> dict:
    prompt = "\n".join([IMAGE_PLACEHOLDER] * len(question.images) + [question.prompt])
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": question.answer}]
    if not question.images:
        return {"conversations": turns}
    image = question.images[0] if len(question.images) == 1 else question.images
    return {"image": image, "conversations": turns}


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
