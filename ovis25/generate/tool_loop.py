"""Running the calls that replies make: in threads, so that a slow tool stops no other reply."""

from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ovis25.constants import TOOL_CALL_BEGIN, TOOL_CALL_END
from ovis25.generate.request import PICTURE_ERRORS, GenerationOptions, Grid
from ovis25.generate.sequence import Sequence
from ovis25.generate.transcript import ToolCall
from ovis25.processing import Ovis2_5Processor
from ovis25.processing.chat import harmless, tool_result_ids
from ovis25.tools import ToolError, tool_result

# a crop takes a millisecond: for so long it is cheaper to wait than to take the row out of its batch
_PATIENCE_SECONDS = 0.05
_NUM_THREADS = 4
# longer texts are refused before they are tokenized; no model has room for them
_MAX_RESULT_CHARACTERS = 1_000_000


@dataclass
class Result:
    """What a call gave: a text or an image, the ids it takes in the reply, and an image's pixels and grid."""

    call: str
    value: Image.Image | str
    ids: list[int]
    pixels: np.ndarray | None = None
    grid: Grid | None = None


class ToolLoop:
    """Finds calls in replies and runs them."""

    def __init__(self, processor: Ovis2_5Processor):
        self.processor = processor
        self._begin, self._end = processor.tokenizer.convert_tokens_to_ids([TOOL_CALL_BEGIN, TOOL_CALL_END])
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="ovis25-tool")

    def is_call(self, sequence: Sequence, token: int) -> bool:
        """Whether the token ends a call that is to be run."""
        return token == self._end and sequence.options.tools is not None

    def start(self, sequence: Sequence) -> Future | None:
        """Run the call that the reply has just ended; None where it may make no more calls at all."""
        if len(sequence.tool_calls) > sequence.options.max_tool_calls:
            return None
        call = self._written_call(sequence.ids)
        images = [*sequence.prompt.images, *(c.result for c in sequence.tool_calls if not isinstance(c.result, str))]
        may_run = len(sequence.tool_calls) < sequence.options.max_tool_calls
        return self._threads.submit(self._run, sequence.options, call, images, may_run)

    def _written_call(self, ids: list[int]) -> str:
        """The text of the call that ends the ids; empty where it has no beginning."""
        start = len(ids) - 1
        while start and ids[start - 1] not in (self._begin, self._end) and ids[start - 1] >= 0:
            start -= 1
        is_open = start > 0 and ids[start - 1] == self._begin
        return self.processor.tokenizer.decode(ids[start:-1]).strip() if is_open else ""

    def _run(self, options: GenerationOptions, call: str, images: list[Image.Image], may_run: bool) -> Result:
        """Run a call; whatever goes wrong becomes a text for the model."""
        try:
            if not may_run:
                raise ToolError(f"the limit of {options.max_tool_calls} calls is reached; answer without further calls")
            value = tool_result("the tool", options.tools.run, call, images)
            return self._result(call, value, options.tool_pixels)
        except ToolError as error:
            return self._text_result(call, f"Error: {error}")

    def _result(self, call: str, value: Image.Image | str, budget: tuple[int, int] | None) -> Result:
        if isinstance(value, str):
            if len(value) > _MAX_RESULT_CHARACTERS:
                raise ToolError(f"the result has {len(value):,} characters, which no prompt can hold; ask for less")
            return self._text_result(call, value)
        try:
            pixels, grids = self.processor.preprocess([value], None, budget or (None, None), raw_pixels=True)
        except PICTURE_ERRORS as error:
            raise ToolError(f"the picture that the call gives cannot be shown: {error}") from error
        return Result(call, value, tool_result_ids(self.processor.tokenizer, grids[0]), pixels[0], grids[0])

    def _text_result(self, call: str, text: str) -> Result:
        tokenizer = self.processor.tokenizer
        return Result(call, text, tool_result_ids(tokenizer, harmless(tokenizer, text)))

    @staticmethod
    def wait(future: Future, is_alone: bool) -> Result | None:
        """The result; None where it takes longer than others should wait."""
        try:
            return future.result(None if is_alone else _PATIENCE_SECONDS)
        except TimeoutError:
            return None

    @staticmethod
    def note(sequence: Sequence, result: Result) -> None:
        sequence.tool_calls.append(ToolCall(result.call, result.value))
