"""What can be known of a sample without decoding a pixel: its files, its sizes, its length, the budget that fits."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

from ovis25.constants import IGNORE_INDEX, MAX_IMAGE_MEGAPIXELS, SIZE_FACTOR
from ovis25.data.errors import SampleError, told
from ovis25.data.schema import Sample, ToolImage
from ovis25.data.sources import find_file
from ovis25.processing import Ovis2_5Processor, VisualLimits
from ovis25.processing.chat import tokenize, training_text
from ovis25.processing.image import ImageSource, grid_of, image_size, num_visual_tokens
from ovis25.processing.video import sample_indices, video_info
from ovis25.reduced import full_size, remember_full_size
from ovis25.text import shorten
from ovis25.tools import ToolError, toolbox

Budget = tuple[int, int]
Grid = tuple[int, int, int]


@dataclass
class Defect:
    """One sample that cannot be used as it is."""

    index: int
    id: str | None
    field: str
    problem: str
    cure: str
    is_long: bool = False
    # file and index, for a row of a set that was joined from several files
    origin: str | None = None

    def describe(self, source: str) -> str:
        name = f' (id "{self.id}")' if self.id is not None else ""
        place = self.origin or f"{source}[{self.index}]"
        return f"{place}{name}, {told(self.field, self.problem, self.cure)}"


@dataclass
class Measure:
    """A sample's length, and the pixel budget that it was measured with (None for text).

    `num_patch_pairs`: of patches that attend to each other in the vision encoder, (h*w)^2 summed over all frames.
    """

    num_tokens: int
    num_learned: int
    num_visual: int
    num_patch_pairs: int
    budget: Budget | None
    is_shrunk: bool = False


@dataclass(frozen=True)
class LengthLimits:
    """Longest sequences, and what happens to longer ones."""

    multimodal_max_length: int
    text_max_length: int
    on_long_sample: str

    def of(self, sample: Sample) -> tuple[str, int]:
        """(name, value) of the limit that holds for the sample."""
        name = "text_max_length" if sample.kind == "text" else "multimodal_max_length"
        return name, getattr(self, name)


_TOOLS = toolbox()
# no token of the vocabulary is longer
_MAX_TOKEN_CHARACTERS = 256


class LongSampleError(SampleError):
    """The sample is longer than its limit and is not to be shrunk, or cannot be."""


def locate(sample: Sample, folder: Path, suggest: bool = True) -> Sample:
    """The sample with its relative paths in `folder`.

    Raises:
        SampleError: a file does not exist; with `suggest` it names the neighbour that was meant.
    """

    def find(source: ImageSource | ToolImage) -> ImageSource | ToolImage:
        is_name = isinstance(source, (str, Path))
        return find_file(source, folder, sample.visual_field, suggest) if is_name else source

    if isinstance(sample.video, list):
        return replace(sample, video=[find(frame) for frame in sample.video])
    if sample.video is not None:
        return replace(sample, video=find(sample.video))
    return replace(sample, images=[find(image) for image in sample.images])


def tool_images(sample: Sample, read: Callable[[ImageSource], Image.Image]) -> list[Image.Image]:
    """The sample's images: files as `read` reads them, and what the tools make of those.

    Raises:
        SampleError: a call fails; ValueError: as `read`.
    """
    images: list[Image.Image] = []
    for image in sample.images:
        if not isinstance(image, ToolImage):
            images.append(read(image))
            continue
        images.append(_run_tool(image, [images[index] for index in image.seen]))
    return images


def _run_tool(image: ToolImage, seen: list[Image.Image]) -> Image.Image:
    call = shorten(image.call, 200)
    try:
        result = _TOOLS.run_strictly(image.call, seen)
    except Exception as error:
        # a tool may be anybody's, and raise anything
        problem = str(error) if isinstance(error, ToolError) else f"{type(error).__name__}: {error}"
        cure = "Correct the call, or name the result's file among the images"
        raise SampleError(image.place, f"the call {call} fails: {problem}", cure) from error
    if isinstance(result, str):
        cure = "Write it as <tool_response>..</tool_response>"
        raise SampleError(image.place, f"the call {call} gives a text, no image", cure)
    if not isinstance(result, Image.Image):
        raise SampleError(image.place, f"the call {call} gives a {type(result).__name__}, no image", "Mend the tool")
    return result


def visual_sizes(sample: Sample, limits: VisualLimits) -> list[tuple[int, int, int]]:
    """(frames, height, width) in pixels of each visual input, from headers alone.

    Raises:
        SampleError: a header cannot be read, or a tool call fails.
    """
    try:
        if sample.video is None:
            budget = limits.budget(sample.kind)
            size_of = partial(image_size, max_megapixels=limits.max_image_megapixels, max_pixels=budget[1])
            if not any(isinstance(image, ToolImage) for image in sample.images):
                return [(1, *size_of(image)) for image in sample.images]
            # a tool needs no pixels to tell how large its result will be
            blanks = tool_images(sample, lambda image: _blank(*size_of(image)))
            return [(1, *full_size(image)) for image in blanks]
        if isinstance(sample.video, list):
            num_frames = len(sample.video)
            height, width = image_size(sample.video[0], limits.max_image_megapixels, limits.video_max_pixels)
        else:
            num_frames, height, width = video_info(sample.video)
        return [(len(sample_indices(num_frames, limits.min_frames, limits.max_frames)), height, width)]
    except SampleError:
        raise
    except (ArithmeticError, OSError, ValueError) as error:
        raise SampleError(sample.visual_field, str(error), "Replace the file, or remove the sample") from error


def _blank(height: int, width: int) -> Image.Image:
    """A picture of this size without pixels; of a very large one a reduced one, as it is read."""
    scale = 1 if height * width <= MAX_IMAGE_MEGAPIXELS * 1e6 else 8
    blank = Image.new("1", (math.ceil(width / scale), math.ceil(height / scale)))
    return blank if scale == 1 else remember_full_size(blank, height, width)


def grids_of(sizes: list[tuple[int, int, int]], budget: Budget) -> list[Grid]:
    """The grids that pictures of these sizes get within the budget."""
    return [(frames, *grid_of(height, width, *budget)) for frames, height, width in sizes]


def measure(sample: Sample, processor: Ovis2_5Processor, limits: VisualLimits, lengths: LengthLimits) -> Measure:
    """Tokens, learned tokens and visual tokens of a sample; an over-long one gets the largest budget that fits.

    Raises:
        SampleError: unreadable headers.
        LongSampleError: it is too long, and shrinking is not wanted or does not help.
    """
    rendered = training_text(sample.conversations)
    limit_name, limit = lengths.of(sample)
    if len(rendered.text) > _MAX_TOKEN_CHARACTERS * limit:
        # far too long to be worth the tokenizer's memory
        problem = f"its text has {len(rendered.text):,} characters, far more than {limit_name} {limit} allows"
        raise LongSampleError("conversations", problem, f"Raise {limit_name}, or shorten the text")
    budget, grids, sizes = None, [], []
    if sample.kind != "text":
        budget, sizes = limits.budget(sample.kind), visual_sizes(sample, limits)
        grids = _grids_or_error(sample, sizes, budget)
    ids, labels = tokenize(processor.tokenizer, rendered.text, grids, rendered.learned_spans)
    num_learned = sum(label != IGNORE_INDEX for label in labels)
    num_visual = sum(num_visual_tokens(grid) for grid in grids)
    num_text = len(ids) - num_visual
    is_shrunk = len(ids) > limit
    if is_shrunk:
        place = sample.visual_field if sizes else "conversations"
        problem = f"it has {len(ids)} tokens ({num_visual} visual), more than {limit_name} {limit}"
        if not sizes:
            raise LongSampleError(place, problem, f"Raise {limit_name}, shorten the text, or set on_bad_sample to skip")
        if lengths.on_long_sample != "shrink":
            raise LongSampleError(place, problem, f"Raise {limit_name}, or set on_long_sample to shrink or skip")
        budget = fit_budget(sizes, budget, limit - num_text)
        if budget is None:
            raise LongSampleError(
                place,
                f"{problem}, even with the smallest pictures",
                f"Raise {limit_name}, or take fewer pictures or frames",
            )
        grids = grids_of(sizes, budget)
        num_visual = sum(num_visual_tokens(grid) for grid in grids)
    num_patch_pairs = sum(frames * (height * width) ** 2 for frames, height, width in grids)
    return Measure(num_text + num_visual, num_learned, num_visual, num_patch_pairs, budget, is_shrunk)


def _grids_or_error(sample: Sample, sizes, budget: Budget) -> list[Grid]:
    try:
        return grids_of(sizes, budget)
    except ValueError as error:
        raise SampleError(sample.visual_field, str(error), "Crop the picture, or raise the pixel budget") from error


def fit_budget(sizes: list[tuple[int, int, int]], budget: Budget, max_tokens: int) -> Budget | None:
    """The largest budget, below the given one, whose grids take at most `max_tokens`; None where none does.

    One visual token is 32 x 32 pixels, so budgets are tried in those units.
    """
    unit = SIZE_FACTOR**2

    def num_tokens(units: int) -> int:
        """0 where a picture is too long and thin for so small a budget."""
        try:
            grids = grids_of(sizes, (min(budget[0], units * unit), units * unit))
        except ValueError:
            return 0
        return sum(num_visual_tokens(grid) for grid in grids)

    # the number of tokens is not quite monotonic in the budget: the answer is checked, not assumed
    low, high = 1, max(budget[1] // unit, 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if num_tokens(middle) <= max_tokens else (low, middle - 1)
    return (min(budget[0], low * unit), low * unit) if 0 < num_tokens(low) <= max_tokens else None
