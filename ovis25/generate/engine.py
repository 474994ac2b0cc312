"""The loop: at every step sequences join, all rows are fed at once, each chooses a token, and some leave.

    engine = Engine(model, processor)
    first = engine.add(prompt, GenerationOptions(max_new_tokens=64))     # joins at the next step
    for ids in engine.stream(engine.add(second, GenerationOptions())): ...    # steps everybody
    engine.run([first])

A reply does not depend on its neighbours: a row sees its own positions alone, chooses by its own arguments, and draws
from its own random generator where it has a seed.

What a row did not choose (the end of its thinking when a budget is spent, the result of a tool) waits in its queue and
is fed like a token: beside the others where it is short, in one pass of its own where it is long. No prompt is
prefilled twice.
"""

from collections.abc import Iterable, Iterator

import torch

from ovis25.constants import THINK_END
from ovis25.generate.batch import Batch
from ovis25.generate.request import EARLY_STOP_TEXT, GenerationOptions, Method, Prompt
from ovis25.generate.sampler import Choice, Sampler
from ovis25.generate.scheduler import Scheduler
from ovis25.generate.sequence import Sequence
from ovis25.generate.tool_loop import Result, ToolLoop
from ovis25.model import Ovis2_5
from ovis25.processing import Ovis2_5Processor
from ovis25.processing.processor import visual_tensors

# a queue of so many ids is fed in one pass of its own, not one by one beside the others
_LONG_QUEUE = 32


class Engine:
    """Writes replies, up to `max_rows` at once.

    `is_static` keeps keys and values in a cache of fixed length (whose steps may be compiled on CUDA): then rows begin
    together, nobody joins or leaves, and there are no tools. One thread may use an engine.
    """

    def __init__(self, model: Ovis2_5, processor: Ovis2_5Processor, max_rows: int = 8, is_static: bool = False):
        self.model, self.processor, self.is_static = model, processor, is_static
        tokenizer = processor.tokenizer
        self.sampler, self.tools = Sampler(model, tokenizer), ToolLoop(processor)
        self.scheduler = Scheduler(max_rows)
        self.early_stop_ids: list[int] = tokenizer(EARLY_STOP_TEXT, add_special_tokens=False)["input_ids"]
        self.think_end_id: int = tokenizer.convert_tokens_to_ids(THINK_END)
        self._pad = tokenizer.pad_token_id
        self._batch: Batch | None = None
        # everybody who has begun and not ended, parked ones too
        self._live: list[Sequence] = []

    # -- sequences come and go

    def add(self, prompt: Prompt, options: GenerationOptions, keeps_cache: bool = False) -> Sequence:
        """A sequence that joins at the next step; its arguments are checked now.

        Raises:
            RequestError: transformers refuses the generation arguments.
        """
        room, method = self.check(options)
        generator = None
        if options.seed is not None:
            generator = torch.Generator(self.model.device).manual_seed(options.seed)
        sequence = Sequence(options, prompt, room, method, generator, keeps_cache)
        self.scheduler.waiting.append(sequence)
        return sequence

    def check(self, options: GenerationOptions) -> tuple[int, Method]:
        """How many new tokens a reply may have, and how they are chosen. Raises RequestError as `add`."""
        room = self.room(options)
        return room, self.sampler.method(options.sampling, room)

    def room(self, options: GenerationOptions) -> int:
        """How many new tokens a reply may have."""
        if options.thinking_budget is None:
            return options.max_new_tokens
        spent = options.thinking_budget + len(self.early_stop_ids)
        return options.max_new_tokens if options.max_new_tokens > spent else spent + options.max_new_tokens

    def abort(self, sequence: Sequence) -> None:
        """The sequence is given up; the others go on."""
        if sequence.is_over:
            return
        sequence.stop_reason = "aborted"
        if sequence in self.scheduler.waiting:
            self.scheduler.waiting.remove(sequence)
            sequence.cache = sequence.prompt.cache
        for future, batch in list(self.scheduler.parked.items()):
            if sequence in batch.sequences:
                self._leave(batch)
                del self.scheduler.parked[future]
        self._batch = self._without_ended(self._batch)

    @property
    def is_idle(self) -> bool:
        return self._batch is None and not self.scheduler.waiting and not self.scheduler.parked

    def run(self, sequences: Iterable[Sequence]) -> None:
        """Step until all of these have ended."""
        sequences = list(sequences)
        while not all(sequence.is_over for sequence in sequences):
            self.step()

    def stream(self, sequence: Sequence) -> Iterator[list[int]]:
        """The sequence's ids as they come; a reader that goes away aborts it."""
        num_read = 0
        try:
            while not sequence.is_over:
                self.step()
                if len(sequence.ids) > num_read:
                    new, num_read = sequence.ids[num_read:], len(sequence.ids)
                    yield new
        finally:
            self.abort(sequence)

    # -- one step

    def step(self) -> list[Sequence]:
        """Feed every row once and let those whose queue is empty choose; returns the sequences that were written.

        Where that fails or is interrupted, everybody who was being written is aborted: their caches are half fed.
        """
        try:
            return self._step()
        except BaseException:
            for sequence in self._live:
                sequence.stop_reason = "aborted"
                self.sampler.forget(sequence)
            self._live, self._batch = [], None
            self.scheduler.parked.clear()
            raise
        finally:
            self._live = [sequence for sequence in self._live if not sequence.is_over]

    @torch.no_grad()
    def _step(self) -> list[Sequence]:
        fed = self._feed_long_queues()
        if self._batch is not None:
            fed.append((self._batch, self._batch.feed(self._pad)))
        num_running = sum(len(batch.sequences) for batch, _ in fed)
        if not (self.is_static and num_running) and (joining := self.scheduler.admit(num_running)):
            self._live += joining
            fed.append(Batch.prefill(self.model, joining, self._pad, self.is_static))
        if not fed:
            return []
        batch, logits_RV = fed[0]
        for other, other_logits in fed[1:]:
            batch, logits_RV = batch.join(other), torch.cat([logits_RV, other_logits])
        ready = [i for i, s in enumerate(batch.sequences) if not s.queue_ids and not s.is_over]
        chosen = [batch.sequences[index] for index in ready]
        if chosen:
            logits_RV = logits_RV if len(ready) == len(batch.sequences) else logits_RV[ready]
            for sequence, choice in zip(chosen, self.sampler.choose(chosen, logits_RV), strict=True):
                self._take(sequence, choice)
        self._batch = self._run_tools(batch, chosen)
        return chosen

    def _feed_long_queues(self) -> list[tuple[Batch, torch.Tensor]]:
        """Rows that have much to be fed, fed apart from the others, which they rejoin: (batch, logits (1, V))."""
        batches = []
        for future, batch in self.scheduler.returned(may_wait=self._batch is None and not self.scheduler.waiting):
            self._append(batch.sequences[0], future.result())
            batches.append(batch)
        if self._batch is not None and not self.is_static and len(self._batch.sequences) > 1:
            queues = [len(sequence.queue_ids) for sequence in self._batch.sequences]
            long = [index for index, length in enumerate(queues) if length >= _LONG_QUEUE > min(queues)]
            if long:
                batches += [self._batch.split([index]) for index in long]
                self._batch = self._batch.split([index for index in range(len(queues)) if index not in long])
        return [(batch, batch.feed(self._pad)) for batch in batches]

    def _take(self, sequence: Sequence, choice: Choice) -> None:
        """Write the chosen token, and what follows from it."""
        sequence.write(choice.token, choice.log_probability)
        if choice.stop_reason:
            sequence.stop_reason = choice.stop_reason
        elif sequence.num_new >= sequence.max_new_tokens:
            sequence.stop_reason = "length"
        else:
            self._end_thinking(sequence, choice.token)
            self._check_room(sequence)

    def _end_thinking(self, sequence: Sequence, token: int) -> None:
        """Force the end of the thinking where the budget is spent and the model has not ended it itself."""
        sequence.thinking_ended |= token == self.think_end_id
        if sequence.num_new == sequence.options.thinking_budget and not sequence.thinking_ended:
            sequence.force(self.early_stop_ids)
            sequence.thinking_ended = sequence.budget_forced = True

    def _check_room(self, sequence: Sequence) -> None:
        if not sequence.is_over and sequence.num_positions >= self.model.config.llm_config.max_position_embeddings:
            sequence.stop_reason = "context"

    # -- tools

    def _run_tools(self, batch: Batch, written: list[Sequence]) -> Batch | None:
        """Run the calls that have just ended; rows whose tool takes its time wait apart."""
        callers = [s for s in written if not s.is_over and self.tools.is_call(s, s.ids[-1])]
        futures = {sequence: self.tools.start(sequence) for sequence in callers}
        slow = []
        for sequence, future in futures.items():
            if future is None:
                sequence.stop_reason = "tool_calls"
                continue
            is_alone = len(batch.sequences) == 1 and not self.scheduler.waiting and not self.scheduler.parked
            if (result := self.tools.wait(future, is_alone)) is not None:
                self._append(sequence, result)
            else:
                slow.append(sequence)
        for sequence in slow:
            self.scheduler.parked[futures[sequence]] = batch.split([batch.sequences.index(sequence)])
        if slow:
            rest = [index for index, sequence in enumerate(batch.sequences) if sequence not in slow]
            batch = batch.split(rest) if rest else None
        return self._without_ended(batch)

    def _append(self, sequence: Sequence, result: Result) -> None:
        self.tools.note(sequence, result)
        embeds = None
        if result.grid is not None:
            visuals = visual_tensors([result.pixels], [result.grid])
            visuals = {name: tensor.to(self.model.device) for name, tensor in visuals.items()}
            embeds = self.model.get_inputs_embeds(torch.tensor([result.ids], device=self.model.device), **visuals)[0]
        sequence.append_result(result.ids, embeds, self.model.get_input_embeddings())
        self._check_room(sequence)

    # -- rows leave

    def _without_ended(self, batch: Batch | None) -> Batch | None:
        """The batch without the rows that have ended, or None where all have."""
        if batch is None:
            return None
        live = [index for index, sequence in enumerate(batch.sequences) if not sequence.is_over]
        if len(live) == len(batch.sequences):
            return batch
        if not live or not self.is_static:
            self._leave(batch)
            return batch.split(live) if live else None
        return batch

    def _leave(self, batch: Batch) -> None:
        for index, sequence in enumerate(batch.sequences):
            if sequence.is_over:
                self.sampler.forget(sequence)
                if sequence.keeps_cache and not self.is_static:
                    sequence.cache = batch.split([index]).cache
