"""What follows a call that the model has written: the tool is run, and whatever comes of it is told to the model."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ovis25.inference.prompt import PICTURE_ERRORS, Prompt, visual_budget
from ovis25.inference.reply import ToolCall
from ovis25.processing import Ovis2_5Processor
from ovis25.processing.chat import harmless, tool_result_ids
from ovis25.processing.processor import Grid
from ovis25.tools import ToolError, tool_result

# longer texts are refused before they are tokenized; no model has room for them
_MAX_RESULT_CHARACTERS = 1_000_000


@dataclass
class ToolResult:
    """What is fed after a call: its ids, and the visuals of a picture."""

    ids: list[int]
    pixels: list[np.ndarray] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)


def written_call(tokenizer, ids: list[int], begin: int, end: int) -> str:
    """The text of the call that ends the ids; empty where it has no beginning."""
    start = len(ids) - 1
    while start and ids[start - 1] not in (begin, end) and ids[start - 1] >= 0:
        start -= 1
    is_open = start > 0 and ids[start - 1] == begin
    return tokenizer.decode(ids[start:-1]).strip() if is_open else ""


def answer_call(processor: Ovis2_5Processor, prompt: Prompt, trace: list[ToolCall], call: str) -> ToolResult:
    """Run a call and add it to the trace; whatever goes wrong becomes a text for the model."""
    request = prompt.request
    try:
        if len(trace) >= request.max_tool_calls:
            raise ToolError(f"the limit of {request.max_tool_calls} calls is reached; answer without further calls")
        images = [*prompt.images, *(c.result for c in trace if not isinstance(c.result, str))]
        result = tool_result("the tool", request.tools.run, call, images)
        fed = _encoded(processor, prompt, result)
    except ToolError as error:
        result = f"Error: {error}"
        fed = ToolResult(tool_result_ids(processor.tokenizer, harmless(processor.tokenizer, result)))
    trace.append(ToolCall(call, result))
    return fed


def _encoded(processor: Ovis2_5Processor, prompt: Prompt, result: Image.Image | str) -> ToolResult:
    if isinstance(result, str):
        if len(result) > _MAX_RESULT_CHARACTERS:
            raise ToolError(f"the result has {len(result):,} characters, which no prompt can hold; ask for less")
        return ToolResult(tool_result_ids(processor.tokenizer, harmless(processor.tokenizer, result)))
    try:
        # a crop is shown with the budget of the request's own images
        budget = visual_budget(processor, prompt.request)
        pixels, grids = processor.preprocess([result], None, budget, raw_pixels=True)
    except PICTURE_ERRORS as error:
        raise ToolError(f"the picture that the call gives cannot be shown: {error}") from error
    return ToolResult(tool_result_ids(processor.tokenizer, grids[0]), pixels, grids)
