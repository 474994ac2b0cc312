"""The generation core: a reply is the same alone, in a batch, and joining later; rows leave, tools take their time."""

import threading

import pytest
import torch
from conftest import Scripted
from PIL import Image

from ovis25 import Ovis2_5, Ovis2_5Processor
from ovis25.generate import Engine, Prompt, RequestError, Writer
from ovis25.generate import GenerationOptions as Options
from ovis25.processing.chat import tokenize
from ovis25.tools import Toolbox

GREEDY = {"do_sample": False, "repetition_penalty": 1.0}
SAMPLED = {"do_sample": True, "temperature": 1.5, "repetition_penalty": 1.2, "top_p": 0.95}
NEW = 24


@pytest.fixture(scope="module")
def parts(tiny_folder):
    model = Ovis2_5.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    # an untrained model ends its turn at random: here only the length ends it
    model.generation_config.eos_token_id = [len(Ovis2_5Processor.from_pretrained(tiny_folder).tokenizer) + 5]
    return model, Ovis2_5Processor.from_pretrained(tiny_folder)


@pytest.fixture
def engine(parts) -> Engine:
    return Engine(*parts)


def prompt_of(processor, question: str, images=(), **template) -> Prompt:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, **template)
    pixels, grids = processor.preprocess(list(images), None, (32 * 32, 96 * 96))
    return Prompt(text, tokenize(processor.tokenizer, text, grids)[0], pixels, grids, list(images))


def cases(processor, sampling: dict) -> list[tuple[Prompt, Options]]:
    picture = Image.linear_gradient("L").resize((120, 90)).convert("RGB")
    return [
        (
            prompt_of(processor, "Read the digits.", [picture]),
            Options(max_new_tokens=NEW, sampling=sampling, seed=1),
        ),
        (prompt_of(processor, "Hello" * 9), Options(max_new_tokens=NEW // 2, sampling=sampling, seed=2)),
        (
            prompt_of(processor, "What is 3+4?", enable_thinking=True),
            Options(max_new_tokens=60, thinking_budget=5, sampling=sampling, seed=3),
        ),
        (
            prompt_of(processor, "And?", [picture, picture.rotate(90, expand=True)]),
            Options(NEW, 4, GREEDY, seed=4),
        ),
    ]


def ids_of(engine: Engine, chosen: list[tuple[Prompt, Options]], steps_between: int = 0) -> list[list[int]]:
    sequences = []
    for prompt, request in chosen:
        sequences.append(engine.add(prompt, request))
        for _ in range(steps_between):
            engine.step()
    engine.run(sequences)
    assert engine.is_idle
    return [sequence.ids for sequence in sequences]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_reply_does_not_depend_on_its_neighbours(parts, sampling):
    chosen = cases(parts[1], sampling)
    alone = [ids_of(Engine(*parts), [case])[0] for case in chosen]
    assert ids_of(Engine(*parts), chosen) == alone
    assert ids_of(Engine(*parts), chosen, steps_between=5) == alone
    # two places for four: each begins when another has left
    assert ids_of(Engine(*parts, max_rows=2), chosen) == alone
    assert ids_of(Engine(*parts), chosen[::-1], steps_between=1) == alone[::-1]


def test_greedy_is_transformers_generate(parts, engine):
    model, processor = parts
    prompt, request = cases(processor, {"do_sample": False, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3})[0]
    inputs = {"input_ids": torch.tensor([prompt.ids]), "pixel_values": torch.from_numpy(prompt.pixels[0])}
    plain = model.generate(
        **inputs, grid_thws=torch.tensor(prompt.grids), max_new_tokens=request.max_new_tokens, **request.sampling
    )
    assert ids_of(engine, [(prompt, request)])[0] == plain[0, len(prompt.ids) :].tolist()


def test_a_static_cache_gives_the_same(parts):
    chosen = cases(parts[1], GREEDY)
    assert ids_of(Engine(*parts, is_static=True), chosen) == ids_of(Engine(*parts), chosen)


def test_who_wrote_what_and_how_likely(parts, engine):
    model, processor = parts
    prompt, request = cases(processor, SAMPLED)[2]
    request.with_log_probabilities = True
    sequence = engine.add(prompt, request)
    engine.run([sequence])
    forced = [index for index, writer in enumerate(sequence.writers) if writer is Writer.FORCED]
    assert [sequence.ids[index] for index in forced] == engine.early_stop_ids
    assert forced[0] == request.thinking_budget and sequence.budget_forced
    assert len(sequence.log_probabilities) == len(sequence.writers) == len(sequence.ids) == sequence.num_new
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt.ids, *sequence.ids]])).logits[0, len(prompt.ids) - 1 : -1]
    expected = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(sequence.ids)[:, None])[:, 0]
    expected[forced] = 0.0
    assert torch.allclose(torch.tensor(sequence.log_probabilities), expected, atol=1e-4)


def test_a_sequence_can_be_given_up_at_any_time(parts):
    engine = Engine(*parts, max_rows=2)
    chosen = cases(parts[1], GREEDY)
    alone = ids_of(Engine(*parts), chosen[:1])[0]
    kept, given_up, waiting = (engine.add(*case) for case in chosen[:3])
    engine.step()
    engine.abort(waiting)
    engine.step()
    engine.abort(given_up)
    engine.run([kept])
    assert kept.ids == alone and given_up.stop_reason == waiting.stop_reason == "aborted"
    assert len(given_up.ids) == 2 and not waiting.ids and engine.is_idle
    # a reader that goes away
    stream = engine.stream(engine.add(*chosen[1]))
    next(stream)
    stream.close()
    assert engine.is_idle


class Slow:
    """A tool that waits until it is let go."""

    name, description, usage = "slow", "", "slow"

    def __init__(self):
        self.go, self.was_called = threading.Event(), threading.Event()

    def run(self, arguments, images):
        self.was_called.set()
        assert self.go.wait(60)
        return images[0].crop((0, 0, 60, 40)) if images else "done"


@pytest.mark.parametrize("with_picture", [True, False])
def test_a_slow_tool_stops_nobody_else(parts, engine, with_picture):
    processor = parts[1]
    picture = Image.linear_gradient("L").resize((120, 90)).convert("RGB")
    script = tokenize(processor.tokenizer, "<tool_call>slow</tool_call>It is 4.", [])[0]

    def caller(tool) -> tuple[Prompt, Options]:
        sampling = {**GREEDY, "logits_processor": [Scripted(script)]}
        prompt = prompt_of(processor, "Look.", [picture] if with_picture else ())
        return prompt, Options(len(script), sampling=sampling, tools=Toolbox([tool]), tool_pixels=(32 * 32, 96 * 96))

    quick = Slow()
    quick.go.set()
    alone = ids_of(engine, [caller(quick)])[0]
    slow, other = Slow(), cases(processor, GREEDY)[0]
    other_alone = ids_of(Engine(*parts), [other])[0]
    sequences = [engine.add(*caller(slow)), engine.add(*other)]
    while not slow.was_called.is_set():
        engine.step()
    engine.run(sequences[1:])
    assert sequences[1].ids == other_alone and not sequences[0].is_over
    slow.go.set()
    engine.run(sequences[:1])
    assert sequences[0].ids == alone and Writer.TOOL in sequences[0].writers
    assert len(sequences[0].tool_calls) == 1 and engine.is_idle


def test_arguments_are_checked_when_a_sequence_is_added(parts, engine):
    prompt, _ = cases(parts[1], GREEDY)[1]
    with pytest.raises(RequestError, match="generation arguments: .*temprature"):
        engine.add(prompt, Options(sampling={"temprature": 2}))
    assert engine.is_idle
