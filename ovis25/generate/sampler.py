"""From logits to tokens: each row by its own arguments, its own history and its own random generator.

transformers checks the arguments and builds the logits processors and stopping criteria; rows that have the same
arguments and equally long histories go through them together.

Shapes: R rows, n tokens of the reply so far, V vocabulary.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import MaxLengthCriteria, StopStringCriteria

from ovis25.generate.request import Method, RequestError
from ovis25.generate.sequence import Sequence
from ovis25.model import Ovis2_5


@dataclass(frozen=True)
class Choice:
    """The token of one row, the model's own log-probability of it, and why the reply ends with it, if it does."""

    token: int
    log_probability: float
    stop_reason: str | None


class Sampler:
    """Args: `tokenizer` is what `stop_strings` are looked for with."""

    def __init__(self, model: Ovis2_5, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self._methods: dict[str, Method] = {}
        self._histories: dict[int, _History] = {}

    def method(self, arguments: dict, max_new_tokens: int) -> Method:
        """What transformers makes of generation arguments; equal ones share it.

        Raises:
            RequestError: transformers refuses them; the message is its own.
        """
        key = repr((max_new_tokens, sorted(arguments.items())))
        if key not in self._methods:
            try:
                self._methods[key] = self._prepare({**arguments, "max_new_tokens": max_new_tokens})
            except (ValueError, TypeError) as error:
                raise RequestError(f"generation arguments: {error}") from error
        return self._methods[key]

    def _prepare(self, arguments: dict) -> Method:
        given, criteria = dict(arguments), StoppingCriteriaList()
        if stop_strings := arguments.pop("stop_strings", None):
            criteria.append(StopStringCriteria(self.tokenizer, stop_strings))

        def prepared(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
            return logits_processor, stopping_criteria, generation_config

        nothing = torch.zeros(1, 1, self.model.config.hidden_size, device=self.model.device, dtype=self.model.dtype)
        mask = torch.ones(1, 1, dtype=torch.int64, device=self.model.device)
        criteria.extend(arguments.pop("stopping_criteria", None) or [])
        processors, found, config = self.model.generate(
            inputs_embeds=nothing,
            attention_mask=mask,
            custom_generate=prepared,
            stopping_criteria=criteria,
            **arguments,
        )
        stops = config.eos_token_id
        return Method(
            processors=processors,
            criteria=StoppingCriteriaList(c for c in found if not isinstance(c, MaxLengthCriteria)),
            do_sample=config.do_sample,
            stop_ids=frozenset([] if stops is None else stops if isinstance(stops, list) else [stops]),
            arguments=given,
        )

    @torch.no_grad()
    def choose(self, sequences: list[Sequence], logits_RV: torch.Tensor) -> list[Choice]:
        """A token for each row."""
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, sequence in enumerate(sequences):
            groups[id(sequence.method), len(sequence.ids)].append(index)
        logits_RV = logits_RV.float()
        tokens_R = torch.empty(len(sequences), dtype=torch.int64, device=logits_RV.device)
        stops = [False] * len(sequences)
        for indices in groups.values():
            rows = [sequences[index] for index in indices]
            whole = len(indices) == len(sequences)
            chosen, is_stop = self._choose(rows, logits_RV if whole else logits_RV[indices])
            tokens_R[indices] = chosen
            for index, stop in zip(indices, is_stop, strict=True):
                stops[index] = stop
        tokens = tokens_R.tolist()
        log_probabilities = _log_probabilities(sequences, logits_RV, tokens_R)
        return [
            Choice(token, log_probability, _stop_reason(sequence.method, token, stop))
            for sequence, token, log_probability, stop in zip(sequences, tokens, log_probabilities, stops, strict=True)
        ]

    def _choose(self, rows: list[Sequence], logits_RV: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
        method = rows[0].method
        needs_history = len(method.processors) or len(method.criteria)
        history_Rn = self._history(rows, logits_RV.device) if needs_history else None
        scores_RV = method.processors(history_Rn, logits_RV) if len(method.processors) else logits_RV
        if method.do_sample:
            tokens_R1 = _draw(rows, torch.softmax(scores_RV, dim=-1))
        else:
            tokens_R1 = scores_RV.argmax(dim=-1, keepdim=True)
        is_stop = [False] * len(rows)
        if len(method.criteria):
            is_stop = method.criteria(torch.cat([history_Rn, tokens_R1], dim=1), None).tolist()
        return tokens_R1[:, 0], is_stop

    def _history(self, rows: list[Sequence], device: torch.device) -> torch.Tensor:
        """(R, n) words of the replies so far, which are equally long."""
        histories = [self._histories.setdefault(row.number, _History(device)) for row in rows]
        return torch.stack([history.upto(row.ids) for history, row in zip(histories, rows, strict=True)])

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        self._histories.pop(sequence.number, None)


class _History:
    """The words of a reply on the device, which grow without being copied each time."""

    def __init__(self, device: torch.device):
        self._buffer, self._length = torch.empty(64, dtype=torch.int64, device=device), 0

    def upto(self, ids: list[int]) -> torch.Tensor:
        """(n,) the ids, those at visual positions replaced by the word before: logits processors take words alone."""
        new = ids[self._length :]
        if len(ids) > len(self._buffer):
            self._buffer = torch.cat([self._buffer, self._buffer.new_empty(len(ids))])
        if new:
            word, words = next((token for token in reversed(ids[: self._length]) if token >= 0), 0), []
            for token in new:
                word = token if token >= 0 else word
                words.append(word)
            self._buffer[self._length : len(ids)] = torch.tensor(words, device=self._buffer.device)
            self._length = len(ids)
        return self._buffer[: len(ids)]


def _draw(rows: list[Sequence], probabilities_RV: torch.Tensor) -> torch.Tensor:
    """(R, 1) tokens: each row with its own generator, those without one together, with torch's."""
    if all(row.generator is None for row in rows):
        return torch.multinomial(probabilities_RV, 1)
    return torch.cat([
        torch.multinomial(one[None], 1, generator=row.generator)
        for one, row in zip(probabilities_RV, rows, strict=True)
    ])  # fmt: skip


def _log_probabilities(sequences: list[Sequence], logits_RV: torch.Tensor, tokens_R: torch.Tensor) -> list[float]:
    """The model's own, before any logits processor; 0.0 where nobody asks."""
    if not any(sequence.options.with_log_probabilities for sequence in sequences):
        return [0.0] * len(sequences)
    return torch.log_softmax(logits_RV, dim=-1).gather(1, tokens_R[:, None])[:, 0].tolist()


def _stop_reason(method: Method, token: int, is_stop: bool) -> str | None:
    if token in method.stop_ids:
        return "stop"
    return "stop_string" if is_stop else None
