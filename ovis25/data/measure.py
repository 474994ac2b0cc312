"""What can be known of a sample without decoding a pixel: its sizes, its length, the pixel budget that fits."""

import math
from dataclasses import dataclass, field
from functools import partial

from PIL import Image

from ovis25.constants import IGNORE_INDEX, MAX_IMAGE_MEGAPIXELS, SIZE_FACTOR
from ovis25.data.errors import DefectKind, SampleError
from ovis25.data.schema import Sample, ToolImage
from ovis25.data.tool_images import tool_images
from ovis25.processing import Ovis2_5Processor, VisualLimits
from ovis25.processing.chat import tokenize, training_text
from ovis25.processing.image import grid_of, image_size, num_visual_tokens
from ovis25.processing.video import sample_indices, video_info
from ovis25.reduced import full_size, remember_full_size
from ovis25.tools import Toolbox, toolbox

Budget = tuple[int, int]
Grid = tuple[int, int, int]
# (frames, height, width) in pixels
Size = tuple[int, int, int]

# no token of the vocabulary is longer
_MAX_TOKEN_CHARACTERS = 256


@dataclass(frozen=True)
class LengthLimits:
    """Longest sequences in tokens, and what happens to longer ones: "shrink", "skip" or "error"."""

    multimodal_max_length: int = 8192
    text_max_length: int = 4096
    on_long_sample: str = "shrink"

    def of(self, sample: Sample) -> tuple[str, int]:
        """(name, value) of the limit that holds for the sample."""
        name = "text_max_length" if sample.kind == "text" else "multimodal_max_length"
        return name, getattr(self, name)


@dataclass(frozen=True)
class Rules:
    """What decides how a sample is encoded, beside the sample: the processor, the limits, and the tools whose pictures
    stand in answers.
    """

    processor: Ovis2_5Processor
    limits: VisualLimits = field(default_factory=VisualLimits)
    lengths: LengthLimits = field(default_factory=LengthLimits)
    tools: Toolbox = field(default_factory=toolbox)


@dataclass(frozen=True)
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


def visual_sizes(sample: Sample, limits: VisualLimits, tools: Toolbox) -> list[Size]:
    """The size of each visual input, from headers alone.

    Raises:
        SampleError: a header cannot be read, or a tool call fails.
    """
    try:
        return _image_sizes(sample, limits, tools) if sample.video is None else [_video_size(sample.video, limits)]
    except SampleError:
        raise
    except (ArithmeticError, OSError, ValueError) as error:
        raise unreadable(sample, error) from error


def unreadable(sample: Sample, error: Exception) -> SampleError:
    """Whatever a reader of files raised, as what is wrong with the sample."""
    cure = "Replace the file, or remove the sample"
    return SampleError(sample.visual_field, str(error), cure, DefectKind.UNREADABLE_FILE)


def _image_sizes(sample: Sample, limits: VisualLimits, tools: Toolbox) -> list[Size]:
    max_pixels = limits.budget(sample.kind)[1]
    size_of = partial(image_size, max_megapixels=limits.max_image_megapixels, max_pixels=max_pixels)
    if not any(isinstance(image, ToolImage) for image in sample.images):
        return [(1, *size_of(image)) for image in sample.images]
    # a tool needs no pixels to tell how large its result will be
    blanks = tool_images(sample, lambda image: _blank(*size_of(image)), tools)
    return [(1, *full_size(image)) for image in blanks]


def _blank(height: int, width: int) -> Image.Image:
    """A picture of this size without pixels; of a very large one a reduced one, as it is read."""
    scale = 1 if height * width <= MAX_IMAGE_MEGAPIXELS * 1e6 else 8
    blank = Image.new("1", (math.ceil(width / scale), math.ceil(height / scale)))
    return blank if scale == 1 else remember_full_size(blank, height, width)


def _video_size(video, limits: VisualLimits) -> Size:
    if isinstance(video, list):
        num_frames = len(video)
        height, width = image_size(video[0], limits.max_image_megapixels, limits.video_max_pixels)
    else:
        num_frames, height, width = video_info(video)
    return len(sample_indices(num_frames, limits.min_frames, limits.max_frames)), height, width


def grids_of(sizes: list[Size], budget: Budget) -> list[Grid]:
    """The grids that pictures of these sizes get within the budget. Raises ValueError where one does not fit it."""
    return [(frames, *grid_of(height, width, *budget)) for frames, height, width in sizes]


def measure(sample: Sample, rules: Rules) -> Measure:
    """Tokens, learned tokens and visual tokens of a sample; an over-long one gets the largest budget that fits.

    Raises:
        SampleError: unreadable headers; or, of kind TOO_LONG, it is longer than its limit, and shrinking is not wanted
            or does not help.
    """
    rendered = training_text(sample.conversations)
    limit_name, limit = rules.lengths.of(sample)
    if len(rendered.text) > _MAX_TOKEN_CHARACTERS * limit:
        # far too long to be worth the tokenizer's memory
        problem = f"its text has {len(rendered.text):,} characters, far more than {limit_name} {limit} allows"
        raise _too_long("conversations", problem, f"Raise {limit_name}, or shorten the text")
    budget, sizes, grids = None, [], []
    if sample.kind != "text":
        budget, sizes = rules.limits.budget(sample.kind), visual_sizes(sample, rules.limits, rules.tools)
        grids = _grids_or_error(sample, sizes, budget)
    ids, labels = tokenize(rules.processor.tokenizer, rendered.text, grids, rendered.learned_spans)
    num_text = len(ids) - _num_visual(grids)
    is_shrunk = len(ids) > limit
    if is_shrunk:
        budget = _shrunk_budget(sample, rules.lengths, sizes, budget, num_text, len(ids))
        grids = grids_of(sizes, budget)
    num_learned = sum(label != IGNORE_INDEX for label in labels)
    num_visual = _num_visual(grids)
    num_patch_pairs = sum(frames * (height * width) ** 2 for frames, height, width in grids)
    return Measure(num_text + num_visual, num_learned, num_visual, num_patch_pairs, budget, is_shrunk)


def _num_visual(grids: list[Grid]) -> int:
    return sum(map(num_visual_tokens, grids))


def _too_long(place: str, problem: str, cure: str) -> SampleError:
    return SampleError(place, problem, cure, DefectKind.TOO_LONG)


def _grids_or_error(sample: Sample, sizes: list[Size], budget: Budget) -> list[Grid]:
    try:
        return grids_of(sizes, budget)
    except ValueError as error:
        cure = "Crop the picture, or raise the pixel budget"
        raise SampleError(sample.visual_field, str(error), cure, DefectKind.UNFIT_SIZE) from error


def _shrunk_budget(
    sample: Sample, lengths: LengthLimits, sizes: list[Size], budget: Budget | None, num_text: int, num_tokens: int
) -> Budget:
    """The budget with which the sample, `num_tokens` long of which `num_text` are text, keeps its limit."""
    name, limit = lengths.of(sample)
    problem = f"it has {num_tokens} tokens ({num_tokens - num_text} visual), more than {name} {limit}"
    if not sizes:
        cure = f"Raise {name}, shorten the text, or set on_bad_sample to skip"
        raise _too_long("conversations", problem, cure)
    if lengths.on_long_sample != "shrink":
        raise _too_long(sample.visual_field, problem, f"Raise {name}, or set on_long_sample to shrink or skip")
    fitted = fit_budget(sizes, budget, limit - num_text)
    if fitted is None:
        cure = f"Raise {name}, or take fewer pictures or frames"
        raise _too_long(sample.visual_field, f"{problem}, even with the smallest pictures", cure)
    return fitted


def fit_budget(sizes: list[Size], budget: Budget, max_tokens: int) -> Budget | None:
    """The largest budget, below the given one, whose grids take at most `max_tokens`; None where none does.

    One visual token is 32 x 32 pixels, so budgets are tried in those units.
    """
    unit = SIZE_FACTOR**2

    def num_tokens(units: int) -> int:
        """0 where a picture is too long and thin for so small a budget."""
        try:
            return _num_visual(grids_of(sizes, (min(budget[0], units * unit), units * unit)))
        except ValueError:
            return 0

    # the number of tokens is not quite monotonic in the budget: the answer is checked, not assumed
    low, high = 1, max(budget[1] // unit, 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if num_tokens(middle) <= max_tokens else (low, middle - 1)
    return (min(budget[0], low * unit), low * unit) if 0 < num_tokens(low) <= max_tokens else None
