"""Every mode of inference, the thinking budget, chat, tools and streaming, on small random models."""

import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from conftest import Scripted
from PIL import Image

from ovis25 import Ovis2_5, Ovis2_5Processor, Ovis25Inference
from ovis25.generate.request import EARLY_STOP_TEXT
from ovis25.generate.transcript import Transcript
from ovis25.inference import RequestError
from ovis25.inference.grounding import parse_grounding
from ovis25.processing.chat import tokenize
from ovis25.processing.download import ALLOW_PRIVATE

GREEDY = {"do_sample": False, "repetition_penalty": 1.0}
SMALL = {"min_pixels": 32 * 32, "max_pixels": 96 * 96}
BUDGET = 5


@pytest.fixture(scope="module")
def engine(tiny_folder) -> Ovis25Inference:
    return Ovis25Inference(tiny_folder)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.linear_gradient("L").resize((120, 90)).convert("RGB")


def generated(engine, request, **changes) -> list[int]:
    """The ids of a greedy reply through transformers' own generate: the plain twin."""
    prompt = engine.encode(engine.request(**request)[0])
    embeds, _ = engine.embed([prompt])
    mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
    return engine.model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY, **changes)[0].tolist()


def test_budget_is_the_released_one(whole_golden):
    folder = whole_golden.folder / "tiny_real_vocab_checkpoint"
    model = Ovis2_5.from_pretrained(folder, dtype=torch.float32)
    engine = Ovis25Inference.from_parts(model, Ovis2_5Processor.from_pretrained(whole_golden.tokenizer_folder))
    golden = whole_golden.json("thinking_budget")
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = golden["eos_token_id"]
    assert golden["early_stop_text"] == EARLY_STOP_TEXT
    prompts, expected = [], []
    for case in golden["cases"]:
        images = [whole_golden.folder / "images" / case["image"]] if case["image"] else []
        request, _ = engine.request(
            case["prompt"], images, enable_thinking=True, thinking_budget=case["thinking_budget"],
            max_new_tokens=case["max_new_tokens"], min_pixels=case["min_pixels"], max_pixels=case["max_pixels"],
        )  # fmt: skip
        prompts.append(engine.encode(request))
        assert prompts[-1].ids == case["input_ids"]
        expected.append(case["output_ids"])
    for batch in [prompts, *([prompt] for prompt in prompts)]:
        written = decoded(engine, batch)
        assert [row.ids for row in written] == (expected if len(batch) > 1 else [expected[prompts.index(batch[0])]])
    assert sum(row.budget_forced for row in decoded(engine, prompts)) == 4


def decoded(engine, prompts):
    sequences = [engine.core.add(prompt, engine._options(prompt.request, dict(GREEDY))) for prompt in prompts]
    engine.core.run(sequences)
    return sequences


def test_loop_is_transformers_loop(engine, picture):
    request = {"prompt": "Read it.", "images": [picture], **SMALL}
    for changes in ({}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}):
        arguments = {**GREEDY, **changes}
        prompt = engine.encode(engine.request(**request)[0])
        plain = engine.model.generate(
            inputs_embeds=engine.embed([prompt])[0], max_new_tokens=12, **arguments,
            attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.int64),
        )[0].tolist()  # fmt: skip
        reply = engine.replies([{**request, "max_new_tokens": 12}], **arguments)[0]
        assert reply.text == engine.processor.tokenizer.decode(plain, skip_special_tokens=True)
        assert reply.new_tokens == len(plain)
    assert engine.replies([request], max_new_tokens=4, num_beams=2)[0].new_tokens <= 4
    torch.manual_seed(0)
    sampled = engine.replies([request], max_new_tokens=12, do_sample=True, temperature=2.0)[0].text
    torch.manual_seed(0)
    assert sampled == engine.replies([request], max_new_tokens=12, do_sample=True, temperature=2.0)[0].text
    static = engine.replies([request], max_new_tokens=12, cache_implementation="static", **GREEDY)[0]
    assert static.text == engine.replies([request], max_new_tokens=12, **GREEDY)[0].text


def test_batch_rows_are_single_runs(engine, picture):
    other = picture.rotate(90, expand=True)
    requests = [
        {"prompt": "Read the digits.", "image": picture},
        {"prompt": "Which is larger?", "images": [picture, other], "enable_thinking": True},
        {"prompt": "What happens?", "video": [picture, other, picture], "num_frames": 2},
        {"prompt": "What is 3 + 4?", "enable_thinking": True, "thinking_budget": BUDGET},
        {
            "prompt": "Add.",
            "image": other,
            "enable_thinking": True,
            "enable_thinking_budget": True,
            "thinking_budget": 3,
        },
        {"prompt": "Hello", "max_new_tokens": 2},
    ]
    arguments = {"max_new_tokens": 40, **SMALL, **GREEDY}
    batch = engine.replies(requests, batch_size=6, **arguments)
    single = [engine.replies([request], **arguments)[0] for request in requests]
    assert batch == single
    assert batch[5].new_tokens <= 2
    assert engine.batch_inference(requests[:1], **arguments) == [batch[0].answer]


@pytest.mark.parametrize("sampling", [GREEDY, {"do_sample": True, "temperature": 1.5}])
def test_budget_ends_the_thinking(engine, sampling, monkeypatch):
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", [len(engine.processor.tokenizer) + 5])
    # what an untrained model never says by itself within five tokens, it is forced to say
    think_end = engine.core.think_end_id
    reply = engine.text_only_inference(
        "Why?", enable_thinking=True, thinking_budget=BUDGET, max_new_tokens=3, return_thinking=True,
        bad_words_ids=[[think_end]], **sampling,
    )  # fmt: skip
    assert reply.budget_forced and reply.stop_reason == "length"
    # raised, so that the answer has its three tokens
    assert reply.new_tokens == BUDGET + len(engine.core.early_stop_ids) + 3
    assert reply.thinking.endswith(EARLY_STOP_TEXT.split("\n</think>")[0].strip())
    assert EARLY_STOP_TEXT in reply.text


def test_stream_is_the_reply(engine, picture):
    options = {"enable_thinking": True, "thinking_budget": BUDGET, "max_new_tokens": 60, **SMALL, **GREEDY}
    tags = ["<think>", "<tool_call>", "<tool_response>"]
    options["suppress_tokens"] = engine.processor.tokenizer.convert_tokens_to_ids(tags)
    stream = engine.single_image_inference_streaming(picture, "Read it.", **options)
    pieces = list(stream)
    whole = engine.single_image_inference(picture, "Read it.", return_thinking=True, **options)
    assert stream.reply == whole
    assert "".join(p for p in pieces if p.kind == "thinking") == whole.thinking
    assert "".join(p for p in pieces if p.kind == "answer") == whole.answer


@pytest.mark.parametrize(
    ("text", "is_open", "thinking", "answer"),
    [
        ("<think>a b</think>\n\n7", False, "a b", "7"),  # the model opened it
        ("a b\n</think>\n\n7", True, "a b", "7"),  # the template did
        ("a b</think>7", False, "a b", "7"),  # nobody did
        ("<think>a b", False, "a b", ""),  # it never closes
        ("7", False, None, "7"),
    ],
)
def test_thinking_and_answer(engine, text, is_open, thinking, answer):
    transcript = Transcript(engine.processor.tokenizer, is_open)
    pieces = [p for token in tokenize(engine.processor.tokenizer, text, [])[0] for p in transcript.read([token])]
    pieces += transcript.finish()
    assert (transcript.thinking(), transcript.answer()) == (thinking, answer)
    assert "".join(pieces) == (thinking or "") + answer


def test_chat_equals_fresh_runs(engine, picture):
    options = {"max_new_tokens": 8, **SMALL, **GREEDY}
    chat = engine.chat(system="Be brief.", **options)
    turns = [("Read it.", [picture]), ("And this one?", [picture.rotate(90, expand=True)]), ("Sum?", [])]
    answers = [chat.send(prompt, images) for prompt, images in turns]
    assert chat.num_reused > 9
    fresh = []
    for count in range(1, 4):
        other = engine.chat(system="Be brief.", **options)
        for prompt, images in turns[: count - 1]:
            other.send(prompt, images)
        other.forget()
        fresh.append(other.send(*turns[count - 1]))
        assert other.num_reused == 0
    assert answers == fresh
    # giving a turn up leaves no trace
    before = list(chat.messages)
    next(iter(chat.stream("And now?", enable_thinking=True)), None)
    assert chat.messages[: len(before)] == before


class Halves:
    """A tool: the left half, or the size as text."""

    def run(self, call: str, images: list[Image.Image]) -> Image.Image | str:
        if call == "size":
            return f"{images[0].size}"
        return images[0].crop((0, 0, images[0].width // 2, images[0].height))


def test_tools_go_on_from_the_live_cache(engine, picture):
    tokenizer = engine.processor.tokenizer
    parts = ["<tool_call>left</tool_call>", "<tool_call>size</tool_call>", "It is 4.<|im_end|>"]
    written = [token for part in parts for token in tokenize(tokenizer, part, [])[0]]
    logits = []

    class Recorded(Scripted):
        def __call__(self, history, scores):
            logits.append(scores[0].clone())
            return super().__call__(history, scores)

    options = {"tools": Halves(), "return_thinking": True, "max_new_tokens": 40, **SMALL, **GREEDY}
    reply = engine.single_image_inference(picture, "Read it.", logits_processor=[Recorded(written)], **options)
    assert [call.call for call in reply.tool_calls] == ["left", "size"]
    assert reply.tool_calls[0].result.size == (60, 90) and reply.tool_calls[1].result == "(120, 90)"
    assert reply.answer == "It is 4." and reply.stop_reason == "stop" and reply.new_tokens == len(written)
    assert reply.text == (
        "<tool_call>left</tool_call><image><tool_call>size</tool_call><tool_response>(120, 90)</tool_response>It is 4."
    )
    # the same sequence in one fresh pass gives the same scores for the last token
    prompt = engine.encode(engine.request("Read it.", [picture], **SMALL)[0])
    half = engine.encode(engine.request("x", [Halves().run("", [picture])], **SMALL)[0])
    text = prompt.text + reply.text
    ids = tokenize(tokenizer, text, [*prompt.grids, *half.grids])[0]
    prompt.ids, prompt.pixels, prompt.grids = ids, prompt.pixels + half.pixels, prompt.grids + half.grids
    with torch.no_grad():
        fresh = engine.model(inputs_embeds=engine.embed([prompt])[0]).logits[0, -1]
    torch.testing.assert_close(logits[-1], fresh, rtol=1e-4, atol=1e-4)

    stream = engine.stream("Read it.", [picture], logits_processor=[Scripted(written)],
                           **{k: v for k, v in options.items() if k != "return_thinking"})  # fmt: skip
    kinds = [piece.kind for piece in stream]
    assert {"tool_call", "tool_result", "answer"} == set(kinds) and stream.reply.text == reply.text
    limited = engine.single_image_inference(
        picture, "Read it.", logits_processor=[Scripted(written)], max_tool_calls=1, **options
    )
    assert limited.tool_calls[1].result.startswith("Error: the limit of 1 calls")


def test_stop_strings_and_limits(engine):
    tokenizer = engine.processor.tokenizer
    script = tokenize(tokenizer, "one two three", [])[0]
    options = {"return_thinking": True, "max_new_tokens": 40, "stop_strings": ["two"], **GREEDY}
    reply = engine.text_only_inference("Count.", logits_processor=[Scripted(script)], **options)
    assert reply.stop_reason == "stop_string" and reply.text == "one two"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "See <image>"}, "prompt holds <image>"),
        ({"images": ["a.png"], "video": "b.mp4"}, "1 images and a video"),
        ({"images": ["nowhere.png"]}, "image: nowhere.png does not exist"),
        ({"images": [b"no picture"]}, "no readable image"),
        ({"video": "nowhere.mp4"}, "video: nowhere.mp4 does not exist"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"thinking_budget": 4}, "needs enable_thinking=True"),
        ({"min_pixels": 5000, "max_pixels": 4000}, "min_pixels 5000 is above max_pixels 4000"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
    ],
)
def test_bad_input_names_the_argument(engine, changes, message):
    with pytest.raises(RequestError, match=message):
        engine._ask(**{"prompt": "Hello", **changes})


def test_bad_request_in_a_batch_is_named(engine):
    with pytest.raises(RequestError, match="request 1: unknown field imgae"):
        engine.batch_inference([{"prompt": "a"}, {"prompt": "b", "imgae": "x"}])


def test_grounding(engine, picture):
    answer = "<ref>a cat</ref><box>(0.1,0.2),(0.5,1.2)</box> and <point>( .5, 0.25)</point><box>(x)</box>"
    found = parse_grounding(answer, picture)
    assert found.boxes == [pytest.approx((12.0, 18.0, 60.0, 90.0))] and found.box_labels == ["a cat"]
    assert found.points == [(60.0, 22.5)]
    drawn = found.draw()
    assert drawn.size == picture.size and drawn.tobytes() != picture.tobytes()
    asked = engine.grounding_inference(picture, "the cat", "point", parse=True, max_new_tokens=2, **SMALL)
    assert asked.image.size == picture.size
    with pytest.raises(RequestError, match="request_type is 'circle'"):
        engine.grounding_inference(picture, "the cat", "circle")


def test_pictures_from_the_net(engine, picture, monkeypatch):
    file = io.BytesIO()
    picture.save(file, "PNG")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(file.getvalue() if self.path == "/a.png" else b"")

        def log_message(self, *arguments): ...

    monkeypatch.setenv(ALLOW_PRIVATE, "1")
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    options = {"max_new_tokens": 4, **SMALL, **GREEDY}
    assert engine.single_image_inference(f"{address}/a.png", "Read.", **options) == engine.single_image_inference(
        file.getvalue(), "Read.", **options
    )
    with pytest.raises(RequestError, match="cannot be fetched: HTTP Error 404"):
        engine.single_image_inference(f"{address}/b.png", "Read.")
    monkeypatch.setattr("ovis25.processing.download.DOWNLOAD_BYTES", 10)
    with pytest.raises(RequestError, match="is larger than"):
        engine.single_image_inference(f"{address}/a.png", "Read.")
    server.shutdown()
