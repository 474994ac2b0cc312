"""One reply from its prompt to its end: ids, who wrote each, and what is fed next.

Shapes: M visual tokens, n positions fed at once, H LLM width.
"""

import itertools
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from transformers.cache_utils import Cache

from ovis25.generate.request import GenerationOptions, Method, Prompt
from ovis25.generate.transcript import Reply, ToolCall, Transcript, reply_text

_numbers = itertools.count()


class Writer(IntEnum):
    """Who wrote a token of the reply: the model chose it, a spent budget forced it, or a tool gave it."""

    MODEL = 0
    FORCED = 1
    TOOL = 2


@dataclass(eq=False)
class Sequence:
    """One reply while it is written.

    `ids` holds everything after the prompt (negative markers at visual positions), `writers` who wrote each, and
    `log_probabilities`, where the options ask for them, the model's own log-probability of each (0.0 where it did not
    choose). `num_new` counts what was written or forced; tool results do not count.

    `stop_reason`: "stop" (end of turn), "stop_string", "length" (max_new_tokens), "context" (the model's longest
    sequence), "tool_calls" (asked for more tools than allowed), "aborted", or None while it goes on.

    `method` is how its tokens are chosen, with draws from its own `generator`.
    `cache` is the reply's KV cache once it has ended, where `keeps_cache` asks for it.
    """

    options: GenerationOptions
    prompt: Prompt
    max_new_tokens: int = 0
    method: Method | None = None
    generator: torch.Generator | None = None
    keeps_cache: bool = False
    number: int = field(default_factory=lambda: next(_numbers))
    ids: list[int] = field(default_factory=list)
    writers: list[Writer] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    num_new: int = 0
    thinking_ended: bool = False
    budget_forced: bool = False
    stop_reason: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)
    cache: Cache | None = None
    # what is not in the KV cache yet, and the embeddings (n, H) of it where they are not all words
    queue_ids: list[int] = field(default_factory=list)
    queue_embeds: torch.Tensor | None = None

    @property
    def is_over(self) -> bool:
        return self.stop_reason is not None

    @property
    def num_positions(self) -> int:
        """Positions that prompt and reply take so far."""
        return len(self.prompt.ids) + len(self.ids)

    def write(self, token: int, log_probability: float = 0.0) -> None:
        """Take the token that the model chose; it is fed next."""
        self._add([token], Writer.MODEL, log_probability)
        self.queue_ids = [token]

    def force(self, ids: list[int]) -> None:
        """Put words in the model's mouth: they count as new tokens, and are fed after what waits already."""
        self._add(ids, Writer.FORCED)
        self.queue_ids = [*self.queue_ids, *ids]

    def append_result(self, ids: list[int], embeds: torch.Tensor | None, embedding: torch.nn.Module) -> None:
        """Take a tool's result: words, or the embeddings (n, H) of an image with its two indicators."""
        self.ids += ids
        self._note(len(ids), Writer.TOOL, 0.0)
        if embeds is not None:
            words = embedding(torch.tensor(self.queue_ids, device=embeds.device))
            self.queue_embeds = torch.cat([words, embeds])
        self.queue_ids = [*self.queue_ids, *ids]

    def take(self, count: int) -> tuple[list[int], torch.Tensor | None]:
        """The next ids of the queue, and their embeddings where they are not all words."""
        ids, self.queue_ids = self.queue_ids[:count], self.queue_ids[count:]
        embeds = None
        if self.queue_embeds is not None:
            embeds, rest = self.queue_embeds[:count], self.queue_embeds[count:]
            self.queue_embeds = rest if len(rest) else None
        return ids, embeds

    def _add(self, ids: list[int], writer: Writer, log_probability: float = 0.0) -> None:
        self.ids += ids
        self.num_new += len(ids)
        self._note(len(ids), writer, log_probability)

    def _note(self, count: int, writer: Writer, log_probability: float) -> None:
        self.writers += [writer] * count
        if self.options.with_log_probabilities:
            self.log_probabilities += [log_probability] * count

    def reply(self, tokenizer) -> Reply:
        """The whole reply, its parts told apart."""
        transcript = Transcript(tokenizer, self.prompt.is_thinking)
        transcript.read(self.ids)
        return Reply(
            answer=transcript.answer(),
            thinking=transcript.thinking(),
            text=reply_text(tokenizer, self.ids),
            prompt_tokens=len(self.prompt.ids),
            thinking_tokens=transcript.num_thinking_tokens(),
            new_tokens=self.num_new,
            stop_reason=self.stop_reason,
            budget_forced=self.budget_forced,
            tool_calls=self.tool_calls,
        )
