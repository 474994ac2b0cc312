"""The generation core: from encoded prompts to replies, many at once, on the model's forward and a live KV cache.

It loads nothing and prints nothing. `Engine` is the door; `GenerationOptions` say how a reply may be written, and
`Sequence` is one reply from its prompt to its end.
"""

from ovis25.generate.engine import Engine
from ovis25.generate.request import GenerationOptions, Prompt, RequestError
from ovis25.generate.sequence import Sequence, Writer

__all__ = ["Engine", "Prompt", "GenerationOptions", "RequestError", "Sequence", "Writer"]
