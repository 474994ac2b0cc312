"""Inference against plain twins, same inputs and the same replies, in one run.

A proportional quarter of the 2B with random weights (see train_step.py), greedy. Compared are
  budget   a thinking budget from the live cache, with generating twice (what the released code does)
  chat     the second turn about a picture, with a fresh run of the whole conversation
  batch    eight questions at once, with one after the other

    python benchmarks/decode.py [--side 896] [--new 48] [--small] [--json out.json]
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from train_step import quarter_config

from ovis25 import Ovis2_5, Ovis2_5Processor, Ovis25Inference
from ovis25.loading import resolve_model_path

GREEDY = {"do_sample": False, "repetition_penalty": 1.0}
BUDGET, ANSWER, BATCH = 8, 8, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=896, help="of the picture, in pixels")
    parser.add_argument("--new", type=int, default=48, help="tokens per reply of the batch")
    parser.add_argument("--small", action="store_true", help="two layers and a small picture: does it run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    side = 128 if arguments.small else arguments.side
    torch.manual_seed(0)
    model = Ovis2_5(quarter_config(arguments.small)).to(arguments.device)
    # random weights end no reply: every run has the tokens it was asked for
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    engine = Ovis25Inference.from_parts(model, Ovis2_5Processor.from_pretrained(resolve_model_path("tiny")))
    # the picture as it is, whatever the processor's own budget
    engine.processor.limits = replace(engine.processor.limits, single_image_max_pixels=side * side)
    engine.text_only_inference("warm", max_new_tokens=2, **GREEDY)
    picture = Image.radial_gradient("L").resize((side, side)).convert("RGB")
    results = {
        "prefill and decode": rates(engine, picture, arguments.new),
        "budget": budget(engine, picture),
        "chat": chat(engine, picture),
        "batch": batch(engine, arguments.new),
    }
    for name, result in results.items():
        print(f"{name:<20}" + "  ".join(f"{key} {value:.2f}" for key, value in result.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def timed(function):
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def compared(fast, plain) -> dict[str, float]:
    """Seconds of both; their results must be equal."""
    (first, seconds), (second, plain_seconds) = timed(fast), timed(plain)
    if first != second:
        raise SystemExit(f"the replies differ:\n{first}\n{second}")
    return {"s": seconds, "plain_s": plain_seconds, "speedup": plain_seconds / seconds}


def rates(engine, picture, num_new: int) -> dict[str, float]:
    prompt = engine.encode(engine.request("Read.", [picture])[0])
    _, prefill = timed(lambda: engine.replies([{"prompt": "Read.", "image": picture, "max_new_tokens": 1}], **GREEDY))
    request = {"prompt": "Read.", "image": picture, "max_new_tokens": 1 + num_new}
    _, whole = timed(lambda: engine.replies([request], **GREEDY))
    return {"prompt_tokens": len(prompt.ids), "prefill_tokens_per_s": len(prompt.ids) / prefill,
            "decode_tokens_per_s": num_new / (whole - prefill)}  # fmt: skip


def budget(engine, picture) -> dict[str, float]:
    forced = engine.core.early_stop_ids
    request, _ = engine.request(
        "Read.", [picture], enable_thinking=True, thinking_budget=BUDGET, max_new_tokens=BUDGET + len(forced) + ANSWER
    )

    def two_passes() -> str:
        prompt = engine.encode(request)
        ids = []
        for limit in (BUDGET, ANSWER):
            embeds, _ = engine.embed([prompt])
            mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
            new = engine.model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=limit, **GREEDY)
            ids += [*new[0].tolist(), *(forced if not ids else [])]
            prompt.ids = prompt.ids + ids
        return engine.processor.tokenizer.decode(ids, skip_special_tokens=True)

    return compared(lambda: engine.reply_to([engine.encode(request)], GREEDY)[0].text, two_passes)


def chat(engine, picture) -> dict[str, float]:
    kept, fresh = (engine.chat(max_new_tokens=ANSWER, **GREEDY) for _ in range(2))
    for conversation in (kept, fresh):
        conversation.send("Read.", [picture])

    def from_nothing() -> str:
        fresh.forget()
        return fresh.send("And the second digit?")

    return compared(lambda: kept.send("And the second digit?"), from_nothing)


def batch(engine, num_new: int) -> dict[str, float]:
    requests = [
        {"prompt": f"What is {n} + {n + 1}?" + " Explain." * n, "max_new_tokens": num_new} for n in range(BATCH)
    ]
    return compared(
        lambda: engine.batch_inference(requests, batch_size=BATCH, **GREEDY),
        lambda: [answer for request in requests for answer in engine.batch_inference([request], **GREEDY)],
    )


if __name__ == "__main__":
    main()
