"""Pictures that no file holds: what the calls in an answer make of the sample's other pictures."""

from collections.abc import Callable

from PIL import Image

from ovis25.data.errors import DefectKind, SampleError
from ovis25.data.schema import Sample, ToolImage
from ovis25.processing.image import ImageSource
from ovis25.text import shorten
from ovis25.tools import Toolbox, ToolError


def tool_images(sample: Sample, read: Callable[[ImageSource], Image.Image], tools: Toolbox) -> list[Image.Image]:
    """The sample's images in order: files as `read` reads them, and what the tools make of those.

    Raises:
        SampleError: a call fails; ValueError: as `read`.
    """
    images: list[Image.Image] = []
    for image in sample.images:
        if not isinstance(image, ToolImage):
            images.append(read(image))
            continue
        images.append(_run_tool(image, [images[index] for index in image.seen], tools))
    return images


def _run_tool(image: ToolImage, seen: list[Image.Image], tools: Toolbox) -> Image.Image:
    call = shorten(image.call, 200)
    try:
        result = tools.run_strictly(image.call, seen)
    except Exception as error:
        # a tool may be anybody's, and raise anything
        problem = str(error) if isinstance(error, ToolError) else f"{type(error).__name__}: {error}"
        cure = "Correct the call, or name the result's file among the images"
        raise SampleError(image.place, f"the call {call} fails: {problem}", cure, DefectKind.TOOL_CALL) from error
    if isinstance(result, str):
        cure = "Write it as <tool_response>..</tool_response>"
        raise SampleError(image.place, f"the call {call} gives a text, no image", cure, DefectKind.TOOL_CALL)
    if not isinstance(result, Image.Image):
        problem = f"the call {call} gives a {type(result).__name__}, no image"
        raise SampleError(image.place, problem, "Mend the tool", DefectKind.TOOL_CALL)
    return result
