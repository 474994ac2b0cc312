"""Running the calls that replies make: in threads, so that a slow tool stops no other reply."""

from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ovis25.constants import TOOL_CALL_BEGIN, TOOL_CALL_END
from ovis25.generate.request import Grid
from ovis25.generate.sequence import Sequence, ToolCall
from ovis25.processing import Ovis2_5Processor
from ovis25.processing.chat import tool_result_ids

# a crop takes a millisecond: for so long it is cheaper to wait than to take the row out of its batch
_PATIENCE_SECONDS = 0.05
_NUM_THREADS = 4


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
        return token == self._end and sequence.request.tools is not None

    def start(self, sequence: Sequence) -> Future | None:
        """Run the call that the reply has just ended; None where it may make no more calls at all."""
        if len(sequence.tool_calls) > sequence.request.max_tool_calls:
            return None
        begins = [index for index, token in enumerate(sequence.ids) if token == self._begin]
        written = sequence.ids[begins[-1] + 1 : -1] if begins else []
        call = self.processor.tokenizer.decode(written).strip()
        images = [*sequence.prompt.images, *(c.result for c in sequence.tool_calls if not isinstance(c.result, str))]
        may_run = len(sequence.tool_calls) < sequence.request.max_tool_calls
        return self._threads.submit(self._run, sequence, call, images, may_run)

    def _run(self, sequence: Sequence, call: str, images: list[Image.Image], may_run: bool) -> Result:
        limit = sequence.request.max_tool_calls
        value: Image.Image | str = f"Error: the limit of {limit} calls is reached; answer without further calls"
        if may_run:
            value = sequence.request.tools.run(call, images)
        if not isinstance(value, str):
            try:
                pixels, grids = self.processor.preprocess(
                    [value], None, sequence.request.tool_pixels or (None, None), raw_pixels=True
                )
                return Result(call, value, tool_result_ids(self.processor.tokenizer, grids[0]), pixels[0], grids[0])
            except ValueError as error:
                value = f"Error: {error}"
        return Result(call, value, tool_result_ids(self.processor.tokenizer, value))

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
