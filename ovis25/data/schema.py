"""One row of a data file, in the documented format or as OpenAI-style messages, read into a `Sample`."""

import base64
import binascii
import difflib
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ovis25.constants import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from ovis25.processing.chat import LEARNED_ROLE, ROLES, TOOL_IMAGE, count_placeholders
from ovis25.processing.image import ImageSource

_MESSAGE_ROLES = {"system": "system", "user": "human", "assistant": LEARNED_ROLE}
_PLACEHOLDERS = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}


class SampleError(ValueError):
    """What is wrong with one field of a sample, and the cure."""

    def __init__(self, field: str, problem: str, cure: str):
        super().__init__(f"field {field}: {problem}. {cure}")
        self.field, self.problem, self.cure = field, problem, cure


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
    `video` came from. `video` is a file, or a list of frames.
    """

    conversations: list[dict[str, str]]
    images: list[ImageSource | ToolImage] = field(default_factory=list)
    video: str | list[ImageSource] | None = None
    visual_field: str = "image"
    num_tool_images: int = 0

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
    if not isinstance(row, dict):
        raise SampleError("(row)", f"it is a {type(row).__name__}", "Write each sample as a JSON object")
    if "messages" in row and "conversations" not in row:
        sample = _from_messages(row)
    else:
        sample = _from_conversations(row)
    _check_turns(sample.conversations, "messages" if "conversations" not in row else "conversations")
    _place_tool_images(sample)
    _check_placeholders(sample)
    return sample


def _from_conversations(row: dict) -> Sample:
    turns = row.get("conversations")
    if turns is None:
        raise SampleError("conversations", "it is missing", 'Give a list of turns with "from" and "value"')
    images, video, visual_field = _row_visuals(row)
    return Sample(turns, images, video, visual_field)


def _row_visuals(row: dict) -> tuple[list[ImageSource], str | list[ImageSource] | None, str]:
    """Images, or a video, and the key they stand under; null and empty lists count as none."""
    named = {key: row[key] for key in ("image", "video", "video_frames") if row.get(key) not in (None, [], "")}
    if not named:
        return [], None, "image"
    if len(named) > 1:
        raise SampleError(
            " and ".join(named), "a sample takes images or one video, not both", "Keep one of them, or make two samples"
        )
    ((key, value),) = named.items()
    if key == "image":
        return _sources(value, key), None, key
    if key == "video" and isinstance(value, str):
        return [], value, key
    return [], _sources(value, key), key


def _sources(value, key: str) -> list[ImageSource]:
    sources = value if isinstance(value, list) else [value]
    for source in sources:
        if not isinstance(source, (str, Path, bytes, Image.Image)) or source == "":
            raise SampleError(key, f"{source!r} is no path", "Give a path, or a list of paths")
    return sources


def _from_messages(row: dict) -> Sample:
    if not isinstance(row["messages"], list):
        raise SampleError("messages", f"it is a {type(row['messages']).__name__}", "Give a list of messages")
    turns: list[dict] = []
    visuals: dict[str, list] = {"image": [], "video": []}
    for index, message in enumerate(row["messages"]):
        place = f"messages[{index}]"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise SampleError(place, "it lacks role or content", 'Write {"role": ..., "content": ...}')
        role = message["role"]
        if role not in _MESSAGE_ROLES:
            raise _unknown_role(f"{place}.role", role, _MESSAGE_ROLES)
        turns.append({"from": _MESSAGE_ROLES[role], "value": _message_text(message["content"], place, visuals)})
    images, video, visual_field = _row_visuals(row)
    if not images and video is None:
        images, visual_field = visuals["image"], "messages"
        if len(visuals["video"]) > 1:
            raise SampleError("messages", f"it holds {len(visuals['video'])} videos", "A sample takes one video")
        if visuals["video"] and images:
            raise SampleError("messages", "a sample takes images or one video, not both", "Make two samples of it")
        video = visuals["video"][0] if visuals["video"] else None
    return Sample(turns, images, video, visual_field)


def _message_text(content, place: str, visuals: dict[str, list]) -> str:
    """The text of a message's content; visual parts become placeholders and are collected."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise SampleError(f"{place}.content", f"it is a {type(content).__name__}", "Give text or a list of parts")
    lines = []
    for number, part in enumerate(content):
        part_place = f"{place}.content[{number}]"
        part_type = part.get("type") if isinstance(part, dict) else None
        if part_type == "text" and isinstance(part.get("text"), str):
            lines.append(part["text"])
            continue
        kind = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}.get(part_type)
        if kind is None:
            raise SampleError(part_place, f"unknown part {part!r}", "Parts are text, image, image_url or video")
        lines.append(_PLACEHOLDERS[kind])
        visuals[kind].append(_part_source(part, part_type, kind, part_place))
    # the chat template joins parts so
    return "\n".join(lines)


def _part_source(part: dict, part_type: str, kind: str, place: str):
    source = next((part[key] for key in (part_type, kind, "path", "url") if part.get(key)), None)
    if isinstance(source, dict):
        source = source.get("url")
    if not source:
        raise SampleError(place, f"it names no {kind}", f'Add "{part_type}": a path')
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise SampleError(place, f"{source} lies on the web", "Download it first and give its path")
    if isinstance(source, str) and source.startswith("data:"):
        try:
            return base64.b64decode(source.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise SampleError(place, f"its data: URL is no base64 ({error})", "Encode it anew") from error
    return source.removeprefix("file://") if isinstance(source, str) else source


def _check_turns(turns, field_name: str) -> None:
    if not isinstance(turns, list) or not turns:
        what = "it is empty" if turns == [] else f"it is a {type(turns).__name__}"
        raise SampleError(field_name, what, 'Give a list of turns with "from" and "value"')
    for index, turn in enumerate(turns):
        place = f"{field_name}[{index}]"
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise SampleError(place, "it lacks from or value", 'Write {"from": "human", "value": "..."}')
        if turn["from"] not in ROLES:
            raise _unknown_role(f"{place}.from", turn["from"], ROLES)
        if not isinstance(turn["value"], str):
            raise SampleError(f"{place}.value", f"it is a {type(turn['value']).__name__}", "It must be text")
        if turn["from"] == LEARNED_ROLE and not turn["value"].strip():
            raise SampleError(f"{place}.value", "the answer is empty", "Write the answer, or remove the turn")
    if all(turn["from"] != LEARNED_ROLE for turn in turns):
        raise SampleError(field_name, "it has no learned token: no gpt turn", "Add an answer, or remove the sample")


def _unknown_role(place: str, role, known: dict) -> SampleError:
    nearest = difflib.get_close_matches(str(role), known, n=1)
    hint = f"Did you mean {nearest[0]}? " if nearest else ""
    return SampleError(place, f"unknown role {role!r}", f"{hint}Roles are {', '.join(known)}")


def _place_tool_images(sample: Sample) -> None:
    """Find the images that tools gave; where only the others have files, those are made by running the calls.

    As at inference, a call sees the images before it: the user's, then what the same reply's calls gave.
    """
    shown: list[ToolImage | None] = []
    for index, turn in enumerate(sample.conversations):
        calls: dict[int, str] = {}
        if turn["from"] == LEARNED_ROLE:
            calls = {match.end(): match.group(1) for match in TOOL_IMAGE.finditer(turn["value"])}
        seen = [number for number, image in enumerate(shown) if image is None]
        start = 0
        while (start := turn["value"].find(IMAGE_PLACEHOLDER, start)) >= 0:
            start += len(IMAGE_PLACEHOLDER)
            is_call = start in calls
            shown.append(ToolImage(calls[start].strip(), tuple(seen), f"conversations[{index}]") if is_call else None)
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
