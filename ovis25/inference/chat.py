"""A conversation of several turns; what earlier turns computed is kept.

The template leaves the thinking of earlier turns out, so a new turn's sequence equals the last one only up to the last
reply. The KV cache is cut back to where they part, and only the rest is prefilled; images are encoded once.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from transformers import DynamicCache

from ovis25.constants import VISUAL_ATOM_ID
from ovis25.generate import Sequence
from ovis25.generate.transcript import Piece, Reply, ReplyStream
from ovis25.inference.checks import check_flag
from ovis25.inference.prompt import Question
from ovis25.inference.request import Request
from ovis25.model import Ovis2_5
from ovis25.processing import Ovis2_5Processor
from ovis25.processing.chat import tokenize
from ovis25.processing.image import ImageSource
from ovis25.processing.processor import Grid, VideoSource, visual_tensors


class Answers(Protocol):
    """What a chat needs of the engine that made it, `Ovis25Inference`."""

    model: Ovis2_5
    processor: Ovis2_5Processor
    device: torch.device

    def request(self, prompt: str, images=(), video=None, **options) -> tuple[Request, dict]: ...

    def encode(self, request: Request, generation: dict | None = None) -> Question: ...

    def check_length(self, length: int) -> None: ...

    def stream_prompt(self, prompt: Question, generation: dict, on_end=None) -> ReplyStream: ...


class Chat:
    """Made by `Ovis25Inference.chat(**options)`; the options hold for every turn and can be changed for one.
    What is wrong with them is a RequestError at once.

    Every picture keeps the pixel budget it was sent with (the single image's by default), so that later pictures do
    not change earlier ones. Earlier thinking and tool calls are not shown to the model again, as the released template
    has it.

    `messages` is the history; `num_reused` is how many positions of the last turn came from the cache.
    """

    def __init__(self, engine: Answers, **options):
        # what is wrong with the options is said now, not at the first turn
        engine.request("a first turn", **options)
        self._engine, self.options = engine, options
        self.reset()

    def reset(self) -> None:
        """Forget everything but the options."""
        self.messages: list[dict] = []
        self.num_reused = 0
        self._grids: list[Grid] = []
        self._embeds: list[torch.Tensor] = []
        self._images: list = []
        self._pixels: list = []
        self._cache, self._cached_ids = DynamicCache(), []

    def forget(self) -> None:
        """Keep the history, but nothing that was computed for it: the next turn is a fresh run."""
        self._cache, self._cached_ids = DynamicCache(), []
        self._embeds = self._visual_embeds(self._pixels, self._grids)

    def send(
        self, prompt: str, images: Iterable[ImageSource] = (), video: VideoSource | None = None,
        return_thinking: bool = False, **options,
    ) -> str | Reply:  # fmt: skip
        """The next turn's answer."""
        check_flag("return_thinking", return_thinking)
        stream = self.stream(prompt, images, video, **options)
        for _ in stream:
            pass
        return stream.reply if return_thinking else stream.reply.answer

    def stream(
        self, prompt: str, images: Iterable[ImageSource] = (), video: VideoSource | None = None, **options
    ) -> ReplyStream:
        """The next turn, piece by piece. A turn that fails or is given up leaves the history as it was."""
        stream = ReplyStream()
        stream.pieces = self._turn(stream, prompt, images, video, {**self.options, **options})
        return stream

    def _turn(self, stream: ReplyStream, prompt, images, video, options) -> Iterator[Piece]:
        engine = self._engine
        request, generation = engine.request(prompt, images, video, **options)
        new = engine.encode(request, generation)
        *system, question = request.messages()
        messages = [*(self.messages or system), question]
        new.text = engine.processor.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=request.enable_thinking
        )
        grids, embeds = [*self._grids, *new.grids], [*self._embeds, *self._visual_embeds(new.pixels, new.grids)]
        new.ids = tokenize(engine.processor.tokenizer, new.text, grids)[0]
        new.images = [*self._images, *new.images]
        engine.check_length(len(new.ids))
        start = _common_length(self._cached_ids, new.ids[:-1])
        _cut(self._cache, start)
        new.cache, new.visual_embeds = self._cache, _of_last_atoms(embeds, new.ids[start:])
        # until it comes back whole: an interrupted step leaves it half fed
        self._cache, self._cached_ids = DynamicCache(), []
        written = engine.stream_prompt(new, generation, on_end=self._keep)
        yield from written
        reply = stream.reply = written.reply
        answer = {"role": "assistant", "content": [{"type": "text", "text": reply.answer}]}
        self.messages = [*messages, answer]
        self._grids, self._embeds, self._images, self.num_reused = grids, embeds, new.images, start
        self._pixels += new.pixels

    def _keep(self, sequence: Sequence) -> None:
        """Take the cache of a turn that has ended, also where the reader gave up: it says how far it came."""
        if sequence.cache is not None:
            self._cache = sequence.cache
            self._cached_ids = [*sequence.prompt.ids, *sequence.ids][: self._cache.get_seq_length()]

    @torch.no_grad()
    def _visual_embeds(self, all_pixels: list, grids: list[Grid]) -> list[torch.Tensor]:
        engine = self._engine
        embeds = []
        for pixels, grid in zip(all_pixels, grids, strict=True):
            visuals = visual_tensors([pixels], [grid])
            embeds.append(
                engine.model.get_visual_embeddings(
                    visuals["pixel_values"].to(engine.device), visuals["grid_thws"].to(engine.device)
                )
            )
        return embeds


def _of_last_atoms(embeds: list[torch.Tensor], ids: list[int]) -> torch.Tensor | None:
    """Of all visual embeddings, in order, those of the last ids' visual positions; None where they have none."""
    num_atoms = ids.count(VISUAL_ATOM_ID)
    return torch.cat(embeds)[-num_atoms:] if num_atoms else None


def _common_length(first: list[int], second: list[int]) -> int:
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length


def _cut(cache: DynamicCache, length: int) -> None:
    """Keep the first positions (transformers' own `crop` changed its meaning between versions)."""
    for layer in cache.layers:
        if layer.get_seq_length() > length:
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
