"""What is asked: the fields of a request, and how keywords, dicts and lines of a file become one."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

from PIL import Image

from ovis25.constants import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from ovis25.inference.checks import (
    RequestError,
    check_flag,
    check_list,
    check_picture,
    check_text,
    check_whole,
    refuse,
    shown,
)
from ovis25.inference.generation import GENERATION_NAMES, ITEM_NAMES, check_generation
from ovis25.processing.image import ImageSource
from ovis25.processing.processor import VideoSource
from ovis25.text import nearest, shorten
from ovis25.tools import Toolbox, toolbox

DEFAULT_THINKING_BUDGET = 2048


@dataclass
class Request:
    """One question with its visuals: images or one video, or neither.

    `thinking_budget` (new tokens) ends the thinking when they are spent; it needs `enable_thinking`.
    `max_new_tokens` counts everything written, thinking and forced text included; where a budget would leave no room
    for an answer, it counts from the end of the thinking instead (raised by budget and forced text).
    Pixel budgets and `num_frames` default to those the model was trained with, else the released ones.
    `tools`: a `Toolbox` (in a dict also names of built-in tools), whose calls are run, `max_tool_calls` of them; tool
    results do not count as new tokens.
    `generation`: this request's own generation arguments (`generation.ITEM_NAMES`), over those of the call.
    """

    prompt: str
    images: list[ImageSource] = field(default_factory=list)
    video: VideoSource | None = None
    enable_thinking: bool = False
    thinking_budget: int | None = None
    max_new_tokens: int = 1024
    min_pixels: int | None = None
    max_pixels: int | None = None
    num_frames: int | None = None
    system: str | None = None
    tools: Toolbox | None = None
    max_tool_calls: int = 8
    generation: dict = field(default_factory=dict)

    def check(self) -> None:
        """Raises RequestError, naming the argument."""
        self._check_texts()
        self._check_visuals()
        check_flag("enable_thinking", self.enable_thinking)
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        for name in ("thinking_budget", "min_pixels", "max_pixels", "num_frames"):
            if (value := getattr(self, name)) is not None:
                check_whole(name, value, 1)
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise RequestError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
        check_whole("max_tool_calls", self.max_tool_calls, 0)
        if self.thinking_budget is not None and not self.enable_thinking:
            raise RequestError("a thinking budget needs enable_thinking=True")
        if self.tools is not None and not callable(getattr(self.tools, "run", None)):
            raise refuse("tools", self.tools, "a Toolbox, or a list of names of built-in tools")
        self._check_generation()

    def _check_texts(self) -> None:
        check_text("prompt", self.prompt)
        if not self.prompt.strip():
            raise RequestError("prompt is empty")
        if self.system is not None:
            check_text("system", self.system)
        for name, text in (("prompt", self.prompt), ("system", self.system or "")):
            for placeholder in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER):
                if placeholder in text:
                    raise RequestError(
                        f"{name} holds {placeholder}; leave it out, images and video go before the prompt"
                    )

    def _check_visuals(self) -> None:
        check_list("images", self.images, "pictures")
        for index, image in enumerate(self.images):
            check_picture("image" if len(self.images) == 1 else f"images[{index}]", image)
        if self.video is None:
            return
        if self.images:
            raise RequestError(f"{len(self.images)} images and a video were given; a request takes one or the other")
        if isinstance(self.video, (list, tuple)) and self.video:
            for index, frame in enumerate(self.video):
                check_picture(f"video[{index}]", frame)
        elif not isinstance(self.video, (str, Path)) or not str(self.video):
            raise refuse("video", self.video, "a path, or a list of pictures (its frames)")

    def _check_generation(self) -> None:
        if not isinstance(self.generation, dict):
            raise refuse("generation", self.generation, "an object of generation arguments")
        for name in self.generation:
            if name not in ITEM_NAMES:
                raise RequestError(unknown_name("generation argument", name, ITEM_NAMES))
        check_generation(self.generation)

    def messages(self) -> list[dict]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        return [*messages, user_message(self.prompt, self.images, self.video)]


REQUEST_NAMES = tuple(f.name for f in fields(Request))


def is_field(name: str) -> bool:
    return name in REQUEST_NAMES or name in ("image", "enable_thinking_budget")


def unknown_name(kind: str, name, known: Iterable[str]) -> str:
    """Says that a name is unknown, and the known one that it looks like, or all."""
    known = list(known)
    said = name if isinstance(name, str) and name.isidentifier() and len(name) <= 60 else shown(name)
    near = nearest(name[:60], known) if isinstance(name, str) else None
    return f"unknown {kind} {said}; " + (f"did you mean {near}?" if near else f"there are {', '.join(known)}")


def make_request(
    prompt: str, images: Iterable[ImageSource] = (), video: VideoSource | None = None, **options
) -> tuple[Request, dict]:
    """A checked `Request` and the options that are none of its fields (generation arguments, checked too).

    `enable_thinking_budget=True` sets the budget to `thinking_budget`, 2048 by default; False takes it away.
    """
    if (with_budget := options.pop("enable_thinking_budget", None)) is not None:
        check_flag("enable_thinking_budget", with_budget)
        budget = options.get("thinking_budget")
        options["thinking_budget"] = (DEFAULT_THINKING_BUDGET if budget is None else budget) if with_budget else None
    if isinstance(options.get("tools"), (list, tuple)):
        options["tools"] = _named_tools(options["tools"])
    own = {name: options.pop(name) for name in REQUEST_NAMES if name in options}
    for name in options:
        if name not in GENERATION_NAMES:
            raise RequestError(unknown_name("option", name, [*REQUEST_NAMES, *GENERATION_NAMES]))
    check_generation(options)
    request = Request(prompt, _listed(images), video, **own)
    request.check()
    return request, options


def as_request(request: Request | dict, defaults: dict) -> Request:
    """A dict's fields over the defaults; generation arguments among them become the request's own.

    Raises:
        RequestError: an unknown field (names the nearest), or a value that cannot be.
    """
    if isinstance(request, Request):
        return request
    if not isinstance(request, dict):
        raise RequestError(f"it is {shown(request)}; a request is a dict of fields, or a Request")
    given = {**defaults, **request}
    known = ["image", "enable_thinking_budget", *REQUEST_NAMES, *ITEM_NAMES]
    for name in given:
        if name not in known:
            raise RequestError(unknown_name("field", name, known))
    if "image" in given:
        check_picture("image", given["image"])
        given["images"] = [given.pop("image"), *_listed(given.get("images", ()))]
    own = {name: given.pop(name) for name in ITEM_NAMES if name in given}
    if own:
        nested = given.get("generation", {})
        given["generation"] = {**(nested if isinstance(nested, dict) else {"generation": nested}), **own}
    return make_request(given.pop("prompt", ""), **given)[0]


def split_options(options: dict) -> tuple[dict, dict]:
    """The options that are fields of a request, and the others (generation arguments)."""
    fields_given = {name: value for name, value in options.items() if is_field(name)}
    return fields_given, {name: value for name, value in options.items() if name not in fields_given}


def user_message(prompt: str, images: Iterable[ImageSource], video: VideoSource | None) -> dict:
    visuals = [{"type": "image", "image": image} for image in images]
    if video is not None:
        visuals.append({"type": "video", "video": video})
    return {"role": "user", "content": [*visuals, {"type": "text", "text": prompt}]}


def _listed(images) -> list:
    """The pictures as a list; one picture where a list belongs is an error, not a list of its letters."""
    is_one = isinstance(images, (str, bytes, Path, Image.Image, dict)) or hasattr(images, "__array__")
    if is_one or not isinstance(images, Iterable):
        raise refuse("images", images, "a list of pictures")
    return list(images)


def _named_tools(names: list | tuple) -> Toolbox:
    for name in names:
        if not isinstance(name, str):
            raise RequestError(f"tools holds {shorten(name)}; it must be a list of names of built-in tools")
    try:
        return toolbox(names)
    except ValueError as error:
        raise RequestError(f"tools: {error}") from error
