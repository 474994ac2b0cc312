"""A request, encoded: what it takes is known from sizes before a pixel is made."""

from dataclasses import dataclass

from PIL import Image

from ovis25.constants import PATCH_SIZE, SINGLE_IMAGE_PIXELS
from ovis25.files import is_web_address
from ovis25.generate.request import PICTURE_ERRORS, Prompt
from ovis25.inference.checks import RequestError
from ovis25.inference.request import Request
from ovis25.processing import Ovis2_5Processor
from ovis25.processing.chat import tokenize
from ovis25.processing.image import ImageSource, image_size, num_visual_tokens, smart_resize
from ovis25.processing.video import video_info
from ovis25.text import shorten

# a text with more characters per position than any language has is looked at by its beginning first
_CHARACTERS_PER_TOKEN = 16
# some libraries repeat what they were given
_LONGEST_REASON = 1000


@dataclass
class Question(Prompt):
    """A request, encoded."""

    request: Request | None = None

    @property
    def is_thinking(self) -> bool:
        """The reply begins inside a thinking block: the template opened it, or a budget will close it."""
        return self.request.thinking_budget is not None or super().is_thinking


def encode_request(processor: Ovis2_5Processor, request: Request, longest: int) -> Question:
    """Read the visuals and tokenize; what does not fit into `longest` positions is refused before it is read.

    Raises:
        RequestError: names the field.
    """
    request.check()
    text = processor.apply_chat_template(
        request.messages(), add_generation_prompt=True, enable_thinking=request.enable_thinking
    )
    _check_text_length(processor.tokenizer, text, longest)
    kind = "video" if request.video is not None else "image"
    try:
        sources = [opened(processor, image) if _is_address(image) else image for image in request.images]
        num_positions = _num_visual_positions(processor, request, sources)
    except PICTURE_ERRORS as error:
        raise _named(kind, error) from error
    check_length(num_positions, longest, request)
    low, high = visual_budget(processor, request, is_video=request.video is not None)
    images = [opened(processor, image, high) for image in sources]
    try:
        pixels, grids = processor.preprocess(images, request.video, (low, high), request.num_frames, raw_pixels=True)
    except PICTURE_ERRORS as error:
        raise _named(kind, error) from error
    ids = tokenize(processor.tokenizer, text, grids)[0]
    check_length(len(ids), longest, request)
    return Question(text, ids, pixels, grids, images if request.tools else [], request=request)


def opened(processor: Ovis2_5Processor, image: ImageSource, max_pixels: int = SINGLE_IMAGE_PIXELS[1]) -> Image.Image:
    """The upright picture, to be shown with at most `max_pixels`. Raises RequestError."""
    try:
        return processor.open_image(image, max_pixels)
    except PICTURE_ERRORS as error:
        raise _named("image", error) from error


def visual_budget(processor: Ovis2_5Processor, request: Request, is_video: bool = False) -> tuple[int, int]:
    """(min_pixels, max_pixels) of a request's images and of what tools cut out of them, or of its video.

    A bound that is given alone takes the other one along where they would cross.
    """
    kind = "multiple_image" if len(request.images) > 1 else "single_image"
    low, high = processor.limits.budget("video" if is_video else kind)
    if request.min_pixels:
        low, high = request.min_pixels, request.max_pixels or max(high, request.min_pixels)
    if request.max_pixels:
        low, high = min(low, request.max_pixels), request.max_pixels
    return low, high


def check_length(length: int, longest: int, request: Request | None = None) -> None:
    """Raises RequestError where a prompt of so many positions leaves no room in the model."""
    if length < longest:
        return
    cures = ["shorten it", "lower max_pixels"]
    if request is not None:
        cures += [f"lower {name}" for name in ("min_pixels", "num_frames") if getattr(request, name)]
    raise RequestError(f"the prompt takes {length} positions, the model has {longest}; {', or '.join(cures)}")


def _check_text_length(tokenizer, text: str, longest: int) -> None:
    limit = longest * _CHARACTERS_PER_TOKEN
    if len(text) > limit and len(tokenizer(text[:limit], add_special_tokens=False)["input_ids"]) > longest:
        raise RequestError(f"the prompt has {len(text):,} characters, the model {longest} positions; shorten it")


def _num_visual_positions(processor: Ovis2_5Processor, request: Request, images: list[ImageSource]) -> int:
    """How many positions the visuals take, from the headers of the files alone."""
    low, high = visual_budget(processor, request, is_video=request.video is not None)
    if request.video is not None:
        return _num_positions(*_clip_size(processor, request), low, high)
    return sum(
        _num_positions(1, *image_size(image, processor.max_image_megapixels, high), low, high) for image in images
    )


def _num_positions(frames: int, height: int, width: int, low: int, high: int) -> int:
    height, width = smart_resize(height, width, low, high)
    return num_visual_tokens((frames, height // PATCH_SIZE, width // PATCH_SIZE)) + 2


def _clip_size(processor: Ovis2_5Processor, request: Request) -> tuple[int, int, int]:
    """(frames that will be shown, height, width)."""
    limits = processor.limits
    fewest, most = (request.num_frames or n for n in (limits.min_frames, limits.max_frames))
    if isinstance(request.video, (list, tuple)):
        count = len(request.video)
        shown = min(max(count, fewest), most)
        # the first of the shown frames decides on the size of all
        first = request.video[0 if shown == count else int(count / shown / 2)]
        return shown, *image_size(
            opened(processor, first) if _is_address(first) else first, limits.max_image_megapixels
        )
    count, height, width = video_info(request.video)
    return min(max(count, fewest), most), height, width


def _is_address(source) -> bool:
    return isinstance(source, str) and is_web_address(source)


def _named(kind: str, error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    said = str(error)
    return RequestError(f"{kind}: {said if len(said) <= _LONGEST_REASON else shorten(said, _LONGEST_REASON)}")
