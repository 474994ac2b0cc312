"""The rows that are written together: their KV cache, and one forward pass for all of them.

Rows of different lengths stand side by side with padding on the left, which the mask hides. Rows join by being padded
to the longest, and leave by being cut out; what a row's tokens see is the same before and after.

    length 5:   . . a b c d e        join        . . a b c d e
    length 7:   f g h i j k l      -------->     f g h i j k l      leave l: the two dots of the first go too

Shapes: R rows, L positions in the cache, T or n positions fed at once, H LLM width, K heads of keys and values, C head
size, V vocabulary, M visual tokens.
"""

from collections.abc import Sequence as Rows

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from ovis25.generate.sequence import Sequence
from ovis25.model import Ovis2_5
from ovis25.processing.processor import visual_tensors


class Batch:
    """Some sequences whose prompts, and all that was fed since, are in one KV cache.

    Args:
        mask_RL: 1 for real positions, or None where nothing is padded.
        is_static: a cache of fixed length, whose rows neither join nor leave; one-token steps may be compiled.
    """

    def __init__(
        self,
        model: Ovis2_5,
        sequences: list[Sequence],
        cache: Cache,
        mask_RL: torch.Tensor | None,
        is_static: bool = False,
    ):
        self.model, self.sequences, self.cache, self.mask_RL = model, sequences, cache, mask_RL
        self.is_static = is_static
        self._step = model
        if is_static and model.device.type == "cuda":
            # the compiled call pays where every step has the same shapes
            self._step = model.get_compiled_call(model.generation_config.compile_config)

    @classmethod
    def prefill(cls, model: Ovis2_5, sequences: list[Sequence], pad: int, is_static: bool = False):
        """A batch of new sequences, and the logits (R, V) after their prompts. One with a cache comes alone."""
        cache = sequences[0].prompt.cache
        if is_static:
            longest = max(len(s.prompt.ids) for s in sequences) + max(s.max_new_tokens for s in sequences)
            cache = StaticCache(config=model.llm.config, max_cache_len=longest)
        num_cached = 0 if cache is None else cache.get_seq_length()
        embeds_RTH, mask_RT = _embed(model, sequences, num_cached, pad)
        if mask_RT is not None:
            positions = (mask_RT.cumsum(dim=1) - 1).clamp(min=0)
        else:
            positions = torch.arange(num_cached, num_cached + embeds_RTH.shape[1], device=model.device)
            positions = positions.expand(len(sequences), -1)
        output = _forward(model, embeds_RTH, mask_RT, positions, cache)
        return cls(model, sequences, output.past_key_values, mask_RT, is_static), output.logits[:, -1]

    def feed(self, pad: int) -> torch.Tensor:
        """Feed what the rows' queues hold, as much as the shortest; returns the logits (R, V) after it."""
        waiting = [len(s.queue_ids) for s in self.sequences if not s.is_over]
        count = min(waiting)
        embedding, device = self.model.get_input_embeddings(), self.model.device
        rows = [([pad] * count, None) if s.is_over else s.take(count) for s in self.sequences]
        embeds_RnH = embedding(torch.tensor([ids for ids, _ in rows], device=device).clamp(min=0))
        for index, (_, embeds) in enumerate(rows):
            if embeds is not None:
                embeds_RnH[index] = embeds
        first = [s.num_positions - len(s.queue_ids) - count for s in self.sequences]
        positions = torch.tensor(first, device=device)[:, None] + torch.arange(count, device=device)
        if self.mask_RL is not None:
            self.mask_RL = torch.cat([self.mask_RL, self.mask_RL.new_ones(len(rows), count)], dim=1)
        step = self._step if count == 1 else self.model
        output = _forward(step, embeds_RnH, self.mask_RL, positions, self.cache)
        return output.logits[:, -1]

    def lengths(self) -> list[int]:
        """Real positions of each row in the cache."""
        if self.mask_RL is None:
            return [self.cache.get_seq_length()] * len(self.sequences)
        return self.mask_RL.sum(dim=1).tolist()

    def split(self, indices: Rows[int]) -> "Batch":
        """The rows at `indices` as a batch of their own; this one keeps its rows."""
        if list(indices) == list(range(len(self.sequences))):
            return self
        lengths = self.lengths()
        longest = max(lengths[index] for index in indices)
        chosen = torch.tensor(indices, device=self.model.device)
        start = self.cache.get_seq_length() - longest
        cache = _map_cache(self.cache, lambda states: states.index_select(0, chosen)[..., start:, :])
        mask = None
        if any(lengths[index] < longest for index in indices):
            mask = self.mask_RL.index_select(0, chosen)[:, start:]
        return Batch(self.model, [self.sequences[index] for index in indices], cache, mask)

    def join(self, other: "Batch") -> "Batch":
        """Both batches as one, this one's rows first."""
        lengths = [*self.lengths(), *other.lengths()]
        longest = max(self.cache.get_seq_length(), other.cache.get_seq_length())
        joined = DynamicCache()
        for index, (mine, theirs) in enumerate(zip(self.cache.layers, other.cache.layers, strict=True)):
            parts = [
                tuple(_pad_left(states, longest) for states in (layer.keys, layer.values)) for layer in (mine, theirs)
            ]
            joined.update(*(torch.cat(pair) for pair in zip(*parts, strict=True)), index)
        mask = None
        if min(lengths) < longest:
            columns = torch.arange(longest, device=self.model.device)
            mask = (columns >= longest - torch.tensor(lengths, device=columns.device)[:, None]).long()
        return Batch(self.model, [*self.sequences, *other.sequences], joined, mask)


@torch.no_grad()
def _forward(model, embeds, mask, positions, cache):
    return model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
        logits_to_keep=1,
    )  # fmt: skip


@torch.no_grad()
def _embed(model, sequences, num_cached: int, pad: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(R, T, H) embeddings of the prompts beyond the cache, left-padded, and the (R, T) mask where it is needed."""
    rows = [sequence.prompt.ids[num_cached:] for sequence in sequences]
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=model.device)
    known = [s.prompt.visual_embeds for s in sequences if s.prompt.visual_embeds is not None]
    if known:
        return model.get_inputs_embeds(ids, visual_embeds=torch.cat(known)), _mask(rows, longest, model.device)
    pixels = [values for s in sequences for values in s.prompt.pixels]
    grids = [grid for s in sequences for grid in s.prompt.grids]
    visuals = {name: tensor.to(model.device) for name, tensor in visual_tensors(pixels, grids).items()}
    return model.get_inputs_embeds(ids, **visuals), _mask(rows, longest, model.device)


def _mask(rows: list[list[int]], longest: int, device) -> torch.Tensor | None:
    if all(len(row) == longest for row in rows):
        return None
    return torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)


def _map_cache(cache: Cache, change) -> DynamicCache:
    """A cache whose keys and values (R, K, L, C) are what `change` makes of them."""
    changed = DynamicCache()
    for index, layer in enumerate(cache.layers):
        changed.update(change(layer.keys), change(layer.values), index)
    return changed


def _pad_left(states_RKLC: torch.Tensor, length: int) -> torch.Tensor:
    missing = length - states_RKLC.shape[-2]
    return torch.nn.functional.pad(states_RKLC, (0, 0, missing, 0)) if missing else states_RKLC
