"""One row of a data file, in any form that is read (see `forms`), checked and read into a `Sample`."""

from dataclasses import dataclass, field
from pathlib import Path

from ovis25.constants import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from ovis25.data.errors import SampleError
from ovis25.data.forms import read_row
from ovis25.data.keys import unused_keys
from ovis25.data.sources import kind_of
from ovis25.data.turns import ANSWER_ROLES, Turn, check_turns, num_empty_thinking
from ovis25.processing.chat import TOOL_IMAGE, count_placeholders
from ovis25.processing.image import ImageSource
from ovis25.text import lone_surrogate, shorten


@dataclass(frozen=True)
class ToolImage:
    """An image that has no file: the call makes it from the sample's images `seen` when the sample is read."""

    call: str
    seen: tuple[int, ...]
    place: str


@dataclass
class Sample:
    """A sample that is well formed; whether its files can be read is another question.

    `conversations` holds turns with `from` and `value`; `visual_field` names the row's key that `images` or
    `video` came from. `video` is a file, or a list of frames. `num_empty_thinking`: answers that begin with an explicit
    empty block; `num_placed`: visuals that stand before the first question because no text names them; `unused_keys`:
    keys that nothing reads.
    """

    conversations: list[dict[str, str]]
    images: list[ImageSource | ToolImage] = field(default_factory=list)
    video: str | Path | list[ImageSource] | None = None
    visual_field: str = "image"
    num_tool_images: int = 0
    num_empty_thinking: int = 0
    num_placed: int = 0
    unused_keys: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """text, single_image, multiple_image or video: what decides budget and length limit.

        Images that tools gave do not count: at inference nobody knows beforehand how many there will be.
        """
        if self.video is not None:
            return "video"
        if not self.images:
            return "text"
        return "multiple_image" if len(self.images) - self.num_tool_images > 1 else "single_image"


def parse_sample(row) -> Sample:
    """Check the form of a row and read it.

    Raises:
        SampleError: the first defect, with its field and cure.
    """
    try:
        return _parse(row)
    except RecursionError as error:
        raise SampleError("(row)", "its lists and objects are nested too deep", "Write texts and flat lists") from error


def _parse(row) -> Sample:
    if not isinstance(row, dict):
        raise SampleError("(row)", f"it is {kind_of(row)}", "Write each sample as a JSON object")
    _check_id(row.get("id"))
    reading = read_row(row)
    unused = [*reading.unused, *unused_keys(row, reading.own_keys, reading.visuals)]
    check_turns(reading.turns, reading.field_name)
    sample = Sample(
        conversations=[{"from": turn.role, "value": turn.value} for turn in reading.turns],
        images=list(reading.visuals.images),
        video=reading.visuals.video,
        visual_field=reading.visual_field,
        num_empty_thinking=num_empty_thinking(reading.turns),
        num_placed=reading.num_placed,
        unused_keys=tuple(dict.fromkeys(unused)),
    )
    _place_tool_images(sample, reading.turns)
    _check_placeholders(sample)
    return sample


def _check_id(name) -> None:
    if name is not None and not isinstance(name, (str, int, float)):
        raise SampleError("id", f"it is {kind_of(name)}", "Write text or a number, or leave it out")
    if isinstance(name, str) and lone_surrogate(name) is not None:
        raise SampleError("id", f"{shorten(name)} holds half a character", "Write the whole character, or remove it")


def _place_tool_images(sample: Sample, turns: list[Turn]) -> None:
    """Find the images that tools gave; where only the others have files, those are made by running the calls.

    As at inference, a call sees the images before it: the user's, then what the same reply's calls gave.
    """
    shown: list[ToolImage | None] = []
    for turn in turns:
        calls: dict[int, str] = {}
        if turn.role in ANSWER_ROLES:
            calls = {match.end(): match.group(1) for match in TOOL_IMAGE.finditer(turn.value)}
        seen = [number for number, image in enumerate(shown) if image is None]
        start = 0
        while (start := turn.value.find(IMAGE_PLACEHOLDER, start)) >= 0:
            start += len(IMAGE_PLACEHOLDER)
            is_call = start in calls
            shown.append(ToolImage(calls[start].strip(), tuple(seen), turn.place) if is_call else None)
            seen.append(len(shown) - 1)
    sample.num_tool_images = sum(image is not None for image in shown)
    if sample.num_tool_images and len(sample.images) == len(shown) - sample.num_tool_images:
        files = iter(sample.images)
        sample.images = [next(files) if image is None else image for image in shown]


def _check_placeholders(sample: Sample) -> None:
    counts = [count_placeholders(turn["value"]) for turn in sample.conversations]
    num_images, num_videos = (sum(column) for column in zip(*counts, strict=True))
    for placeholder, found, expected in (
        (IMAGE_PLACEHOLDER, num_images, len(sample.images)),
        (VIDEO_PLACEHOLDER, num_videos, int(sample.video is not None)),
    ):
        if found != expected:
            kind = "images" if placeholder == IMAGE_PLACEHOLDER else "videos"
            cure = (
                f"Write one {placeholder} in the text for each"
                if expected
                else f"Remove {placeholder}, or name the file"
            )
            raise SampleError(
                sample.visual_field, f"the text has {found} {placeholder}, but there are {expected} {kind}", cure
            )
