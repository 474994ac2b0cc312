"""What is asked for: a prompt, and how the reply may be written."""

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache

from ovis25.constants import THINK_BEGIN, THINK_END, TURN_BEGIN
from ovis25.errors import UserError
from ovis25.tools import Toolbox

Grid = tuple[int, int, int]
# what Pillow and its plugins raise for sources that cannot be read, closed pictures among them
PICTURE_ERRORS = (ValueError, OSError, AttributeError, TypeError, SyntaxError, Image.DecompressionBombError)
# what is forced into the reply when the thinking budget is spent (remote code of AIDC-AI/Ovis2.5-9B)
EARLY_STOP_TEXT = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>\n\n"
)


class RequestError(UserError, ValueError):
    """A request that cannot be answered as it stands: says which argument is wrong, and why."""


@dataclass
class GenerationOptions:
    """How one reply may be written.

    `thinking_budget` (new tokens) ends the thinking when they are spent.
    `max_new_tokens` counts everything written, thinking and forced text included; where a budget would leave no room
    for an answer, it counts from the end of the thinking instead (raised by budget and forced text).
    `sampling`: transformers' generation arguments; what is not given is the checkpoint's. `seed` makes the reply's own
    random generator; without one it draws from torch's, beside its neighbours. `tools` are run where the model calls
    them, up to `max_tool_calls` times; their images get the pixel budget `tool_pixels`. `with_log_probabilities` notes
    the model's own log-probability of every token that it chose.
    """

    thinking_budget: int | None = None
    max_new_tokens: int = 1024
    sampling: dict = field(default_factory=dict)
    seed: int | None = None
    tools: Toolbox | None = None
    max_tool_calls: int = 8
    tool_pixels: tuple[int, int] | None = None
    with_log_probabilities: bool = False


@dataclass
class Prompt:
    """What stands before the reply.

    `text` is the rendered conversation, `ids` its tokens with the negative markers at visual positions; `pixels` and
    `grids` are the visuals, one each; or `visual_embeds` (M, H) are the embeddings of the last M visual positions,
    where they are known. `images` are what tools see. `cache` holds the keys and values of the first ids, as many as it
    is long; it is extended.
    """

    text: str
    ids: list[int]
    pixels: list[np.ndarray] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    visual_embeds: torch.Tensor | None = None
    cache: Cache | None = None

    @property
    def is_thinking(self) -> bool:
        """The template left a thinking block open: the reply begins inside it."""
        _, is_opened, tail = self.text.rpartition(TURN_BEGIN)[2].rpartition(THINK_BEGIN)
        return bool(is_opened) and THINK_END not in tail


@dataclass(frozen=True)
class Method:
    """How rows with the same generation arguments choose their tokens."""

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    do_sample: bool
    stop_ids: frozenset[int]
    arguments: dict
