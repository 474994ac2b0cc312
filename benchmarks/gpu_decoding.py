"""Answers of the 2B with random weights: prefill and decode rates, and a thinking budget against two passes.

Greedy, one picture in each prompt, and no reply ends by itself. Prefill counts the picture's encoder.
"""

import time
from dataclasses import replace
from functools import partial

import torch
from gpu_run import Run
from gpu_training import build_model
from PIL import Image

from ovis25 import Ovis2_5Processor, Ovis25Inference
from ovis25.loading import resolve_model_path

GREEDY = {"do_sample": False, "repetition_penalty": 1.0}
STATIC = {"cache_implementation": "static"}


def measure_decoding(run: Run) -> None:
    """Dynamic caches, the budget, then static caches, whose step is compiled on CUDA."""
    engine = make_engine(run)
    # of the pictures, and new tokens of a reply
    side, num_new = (64, 4) if run.is_small else (896, 64)
    prompt = {batch: [_prompt(engine, side)] * batch for batch in (1, 8)}
    for batch, prompts in prompt.items():
        run.clear()
        labels = {"case": f"batch {batch}, dynamic cache"}
        run.measure(labels, partial(_rates, run, engine, prompts, num_new, {}), needs_s=15)
    run.clear()
    budget_side = 64 if run.is_small else 1792
    run.measure({"case": "thinking budget"}, partial(_budget, run, engine, budget_side, num_new), needs_s=30)
    for batch, prompts in prompt.items():
        run.clear()
        labels = {"case": f"batch {batch}, static cache"}
        run.measure(labels, partial(_rates, run, engine, prompts, num_new, STATIC), needs_s=75)


def make_engine(run: Run) -> Ovis25Inference:
    model = build_model(run, "2B")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    engine = Ovis25Inference.from_parts(model, Ovis2_5Processor.from_pretrained(resolve_model_path("tiny")))
    # pictures as they are, whatever the processor's own budget
    engine.processor.limits = replace(engine.processor.limits, single_image_max_pixels=1792 * 1792)
    return engine


def _prompt(engine: Ovis25Inference, side: int, **options):
    picture = Image.radial_gradient("L").resize((side, side)).convert("RGB")
    return engine.encode(engine.request("Read.", [picture], **options)[0])


def _seconds(run: Run, function) -> float:
    run.synchronize()
    start = time.perf_counter()
    function()
    run.synchronize()
    return time.perf_counter() - start


def _replies(engine: Ovis25Inference, prompts: list, num_new: int, generation: dict) -> None:
    limited = [replace(prompt, request=replace(prompt.request, max_new_tokens=num_new)) for prompt in prompts]
    replies = engine.reply_to(limited, GREEDY | generation)
    if any(reply.new_tokens != num_new for reply in replies):
        raise ValueError(f"replies of {[reply.new_tokens for reply in replies]} tokens instead of {num_new}")


def _rates(run: Run, engine: Ovis25Inference, prompts: list, num_new: int, generation: dict) -> dict:
    # the longest first: a static cache that is large enough is used again, and with it what was compiled
    warm_up_s = _seconds(run, lambda: _replies(engine, prompts, 1 + num_new, generation))
    whole = _seconds(run, lambda: _replies(engine, prompts, 1 + num_new, generation))
    prefill = min(_seconds(run, lambda: _replies(engine, prompts, 1, generation)) for _ in range(2))
    num_prompt = sum(len(prompt.ids) for prompt in prompts)
    return {
        "prompt_tokens": num_prompt, "prefill_ms": 1e3 * prefill, "prefill_tokens_per_s": num_prompt / prefill,
        "decode_tokens_per_s": len(prompts) * num_new / (whole - prefill),
        "step_ms": 1e3 * (whole - prefill) / num_new, "peak_gb": run.peak_gb(), "warm_up_s": warm_up_s,
    }  # fmt: skip


def _budget(run: Run, engine: Ovis25Inference, side: int, num_tokens: int) -> dict:
    """`num_tokens` of thinking, the forced sentence and as many of answer, against generating twice."""
    forced = engine.core.early_stop_ids
    prompt = _prompt(
        engine, side, enable_thinking=True, thinking_budget=num_tokens, max_new_tokens=2 * num_tokens + len(forced)
    )

    @torch.no_grad()
    def two_passes() -> None:
        again = replace(prompt)
        for tail in (forced, []):
            embeds, _ = engine.embed([again])
            mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=run.device)
            new = engine.model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=num_tokens, **GREEDY)
            again = replace(again, ids=again.ids + new[0].tolist() + tail)

    def live_cache() -> None:
        engine.reply_to([prompt], GREEDY)

    live_cache()
    ours, plain = _seconds(run, live_cache), _seconds(run, two_passes)
    return {"prompt_tokens": len(prompt.ids), "s": ours, "two_passes_s": plain, "speedup": plain / ours}
