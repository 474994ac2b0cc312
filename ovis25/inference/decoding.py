"""The decoding loop: one prefill, then every row of the batch goes on from the live KV cache until it stops.

transformers prepares and checks (generation config, logits processors, stopping criteria, static cache) through
`generate(custom_generate=...)`; the loop is ours, because rows here may be given tokens that they did not choose:
the end of their thinking when a budget is spent, the result of a tool. Such tokens wait in the row's queue and are
fed in one piece where all rows have some, else one by one beside the rows that write: no second prefill.

Shapes: B rows, T prompt positions, n positions fed at once, H LLM width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from transformers import StaticCache, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation.stopping_criteria import MaxLengthCriteria, StopStringCriteria

from ovis25.model import Ovis2_5

# what is forced into the reply when the thinking budget is spent (remote code of AIDC-AI/Ovis2.5-9B)
EARLY_STOP_TEXT = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>\n\n"
)

# token ids and their embeddings (n, H), or None where they are words
Appended = tuple[list[int], torch.Tensor | None]


@dataclass
class Row:
    """One reply while it is written.

    `ids` holds everything after the prompt: what the model wrote, what was forced, and tool results (negative markers
    at visual positions). `num_new` counts what was written or forced; tool results do not count.
    `stop_reason`: "stop" (end of turn), "stop_string", "length" (max_new_tokens), "context" (the model's longest
    sequence), "tool_calls" (asked for more tools than allowed), or None while it goes on.
    """

    max_new_tokens: int
    thinking_budget: int | None = None
    ids: list[int] = field(default_factory=list)
    num_new: int = 0
    thinking_ended: bool = False
    budget_forced: bool = False
    stop_reason: str | None = None
    queue_ids: list[int] = field(default_factory=list)
    queue_embeds: torch.Tensor | None = None

    def write(self, token: int) -> None:
        self.ids.append(token)
        self.num_new += 1
        self.queue_ids = [token]


@dataclass(frozen=True)
class BudgetTokens:
    """The ids of `</think>` and of the forced text."""

    think_end: int
    early_stop: list[int]


def start_decoding(
    model: Ovis2_5,
    tokenizer,
    rows: list[Row],
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    budget_tokens: BudgetTokens,
    on_token: Callable[[int, torch.Tensor], Appended | None],
    cache: Cache | None = None,
    seed: int | None = None,
    **generation,
) -> Iterator[None]:
    """Check and prepare everything; returns an iterator that decodes as it is drawn from, and fills `rows`.

    Args:
        inputs_embeds: (B, T, H), left-padded; with `cache` only what comes after it.
        attention_mask: (B, T), or None where nothing is padded. A given `cache` needs None.
        on_token: called with the row's index after each token it chose; may return what to append.
        cache: a dynamic cache with the beginning of the only row; it is extended.
        seed: makes sampling repeatable; without it torch's own random numbers are drawn.
        generation: arguments of transformers' `generate`.
    """
    random = None if seed is None else torch.Generator(inputs_embeds.device).manual_seed(seed)
    if stop_strings := generation.pop("stop_strings", None):
        criteria = generation.setdefault("stopping_criteria", StoppingCriteriaList())
        criteria.append(StopStringCriteria(tokenizer, stop_strings))

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        kept = StoppingCriteriaList(c for c in stopping_criteria if not isinstance(c, MaxLengthCriteria))
        memory = model_kwargs.get("past_key_values") if cache is None else cache
        return _decode(
            model, rows, inputs_embeds, attention_mask, memory, logits_processor, kept, generation_config,
            budget_tokens, on_token, random,
        )  # fmt: skip

    mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.int64, device=inputs_embeds.device)
    return model.generate(
        inputs_embeds=inputs_embeds,
        attention_mask=mask if attention_mask is None else attention_mask,
        custom_generate=loop,
        # a row may be allowed more than the model is long; no memory is taken for that
        max_new_tokens=min(max(row.max_new_tokens for row in rows), _longest(model)),
        **generation,
    )


@torch.no_grad()
def _decode(
    model, rows, inputs_embeds, attention_mask, cache, logits_processor, criteria, config, budget_tokens, on_token,
    random,
) -> Iterator[None]:  # fmt: skip
    device = inputs_embeds.device
    embedding, pad = model.get_input_embeddings(), int(config._pad_token_tensor or 0)
    stop_ids = set(_as_list(config.eos_token_id))
    longest = _longest(model)
    history = torch.empty(len(rows), 0, dtype=torch.int64, device=device)
    fed, positions = inputs_embeds, _prompt_positions(inputs_embeds, attention_mask, cache)
    # the compiled call pays where every step has the same shapes
    decode = model
    if isinstance(cache, StaticCache) and device.type == "cuda":
        decode = model.get_compiled_call(config.compile_config)
    step = model

    while True:
        output = step(
            inputs_embeds=fed,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        scores = logits_processor(history, output.logits[:, -1].float())
        if config.do_sample:
            tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1, generator=random)
        else:
            tokens = scores.argmax(dim=-1, keepdim=True)
        is_stop = criteria(torch.cat([history, tokens], dim=1), None).tolist() if criteria else [False] * len(rows)
        lengths = (positions[:, -1] + 1).tolist()
        for index, (row, token) in enumerate(zip(rows, tokens[:, 0].tolist(), strict=True)):
            if row.stop_reason or row.queue_ids:
                continue
            row.write(token)
            if token in stop_ids or is_stop[index]:
                row.stop_reason = "stop" if token in stop_ids else "stop_string"
            elif row.num_new >= row.max_new_tokens:
                row.stop_reason = "length"
            else:
                _end_thinking(row, token, budget_tokens)
                if (appended := on_token(index, token)) is not None:
                    _append(row, appended, embedding)
                if lengths[index] + len(row.queue_ids) >= longest:
                    row.stop_reason = "context"
        yield
        live = [row for row in rows if row.stop_reason is None]
        if not live:
            return

        num_fed = min(len(row.queue_ids) for row in live)
        ids = torch.tensor([_take_ids(row, num_fed, pad) for row in rows], device=device)
        fed = embedding(ids.clamp(min=0))
        for index, row in enumerate(rows):
            if row.queue_embeds is not None:
                fed[index], row.queue_embeds = row.queue_embeds[:num_fed], row.queue_embeds[num_fed:]
                row.queue_embeds = row.queue_embeds if len(row.queue_embeds) else None
        last_words = torch.tensor([[_last_word(row)] for row in rows], device=device)
        history = torch.cat([history, ids.where(ids >= 0, last_words)], dim=1)
        positions = positions[:, -1:] + 1 + torch.arange(num_fed, device=device)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), num_fed)], dim=1)
        step = decode if num_fed == 1 else model


def _longest(model: Ovis2_5) -> int:
    return model.config.llm_config.max_position_embeddings


def _prompt_positions(inputs_embeds, attention_mask, cache) -> torch.Tensor:
    if attention_mask is not None:
        return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    start = cache.get_seq_length() if cache is not None else 0
    return (start + torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)).expand(len(inputs_embeds), -1)


def _end_thinking(row: Row, token: int, budget_tokens: BudgetTokens) -> None:
    """Force the end of the thinking where the budget is spent and the model has not ended it itself."""
    row.thinking_ended |= token == budget_tokens.think_end
    if row.num_new == row.thinking_budget and not row.thinking_ended:
        row.ids += budget_tokens.early_stop
        row.num_new += len(budget_tokens.early_stop)
        row.queue_ids += budget_tokens.early_stop
        row.thinking_ended = row.budget_forced = True


def _append(row: Row, appended: Appended, embedding) -> None:
    ids, embeds = appended
    row.ids += ids
    if embeds is not None:
        words = embedding(torch.tensor(row.queue_ids, device=embeds.device))
        row.queue_embeds = torch.cat([words, embeds])
    row.queue_ids += ids


def _take_ids(row: Row, count: int, pad: int) -> list[int]:
    if row.stop_reason:
        # what a finished row is fed matters to no other
        return [pad] * count
    taken, row.queue_ids = row.queue_ids[:count], row.queue_ids[count:]
    return taken


def _last_word(row: Row) -> int:
    """Stands for visual positions in what the logits processors see: a token that they have seen already."""
    return next(token for token in reversed(row.ids) if token >= 0)


def _as_list(value) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]
