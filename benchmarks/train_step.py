"""Training steps of a proportional quarter of the 2B on ragged, real-shaped samples: the plain way, and every step up.

Widths and vocabularies are the 2B's divided by four, the depth is kept; weights are random. Samples mix images of
224 to 896 pixels a side, text alone and several images, with 64 to 700 learned tokens. `plain` does what the released
trainer does: padded batches, each image's attention by itself, every layer's output kept, logits of every position,
probabilities of all visual tokens at once. Each further line adds one thing to the line above it. All of them see the
same samples, and must find the same loss.

    python benchmarks/train_step.py [--samples 12] [--batch 4] [--dtype bfloat16] [--checkpointing] [--compile]
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm

from ovis25 import Ovis2_5, Ovis2_5_Config
from ovis25.constants import IGNORE_INDEX, IMAGE_BEGIN_ID, IMAGE_END_ID, PIXEL_TABLE, VISUAL_ATOM_ID
from ovis25.data.collator import Collator, PackedCollator, pack_item
from ovis25.data.packing.balance import pack
from ovis25.data.survey import SIZES
from ovis25.model import llm, vision, visual_tokenizer
from ovis25.training.cost import cost_weights

# what makes the fast way fast, in the order in which it is added to the plain one
STEPS = ("vision attention", "packed rows", "learned rows", "visual head", "fused parts", "bytes")
# losses of the same samples, summed in another order
SAME_LOSS = {torch.float32: 2e-5, torch.bfloat16: 5e-3}


def quarter_config(is_small: bool) -> Ovis2_5_Config:
    """The 2B with widths and vocabularies over four; `is_small` also cuts the depth, for a quick look."""
    return Ovis2_5_Config(
        visual_vocab_size=16384,
        llm_config={
            "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2 if is_small else 28,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 37984,
            "rope_theta": 1000000, "tie_word_embeddings": True,
        },
        vit_config={
            "hidden_size": 288, "intermediate_size": 1076, "num_hidden_layers": 2 if is_small else 27,
            "num_attention_heads": 4,
        },
    )  # fmt: skip


def make_sample(generator: np.random.Generator, vocab_size: int, max_side: int) -> dict:
    """One item as the dataset gives it to training, with random content."""
    num_images = generator.choice([0, 1, 1, 1, 1, 1, 2, 3])
    ids, grids = generator.integers(0, vocab_size, 40).tolist(), []
    for _ in range(num_images):
        height, width = (int(side) // 32 * 2 for side in generator.integers(224, max_side + 1, 2))
        ids += [IMAGE_BEGIN_ID, *[VISUAL_ATOM_ID] * (height * width // 4), IMAGE_END_ID]
        grids.append((1, height, width))
    answer = generator.integers(0, vocab_size, generator.integers(64, 701)).tolist()
    num_patches = sum(height * width for _, height, width in grids)
    patches = torch.from_numpy(generator.integers(0, 256, (num_patches, 768), dtype=np.uint8))
    return {
        "input_ids": torch.tensor(ids + answer),
        "labels": torch.tensor([IGNORE_INDEX] * len(ids) + answer),
        "pixel_values": patches if grids else None,
        "grid_thws": torch.tensor(grids) if grids else None,
    }


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a 2048^3 product on this machine, the best of five."""
    left, right = torch.randn(2048, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def sizes_of(items: list[dict]) -> np.ndarray:
    """What the cost of each sample depends on, (samples,) of dtype SIZES."""
    rows = []
    for item in items:
        grids = [] if item["grid_thws"] is None else item["grid_thws"].tolist()
        learned = int((item["labels"] != IGNORE_INDEX).sum())
        patches, pairs = (sum(t * (h * w) ** power for t, h, w in grids) for power in (1, 2))
        rows.append((len(item["input_ids"]), learned, patches // 4, pairs))
    return np.array(rows, SIZES)


def forward_flops(config: Ovis2_5_Config, item: dict) -> float:
    """Multiply-adds times two that one sample needs: no padding, the lm_head on learned rows alone."""
    return float(cost_weights(config).of(sizes_of([item]))[0])


# -- the plain way


def attend_image_by_image(query, key, value, frames: vision.Segments) -> torch.Tensor:
    offsets = frames.offsets.tolist()
    outputs = []
    for start, end in zip(offsets, offsets[1:], strict=False):
        one = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        outputs.append(F.scaled_dot_product_attention(*one)[0].transpose(0, 1))
    return torch.cat(outputs)


def encode_keeping_everything(self, hidden_ND, rotary, frames) -> torch.Tensor:
    outputs = [hidden_ND]
    for layer in self.layers:
        outputs.append(layer(outputs[-1], rotary, frames))
    # what the released code returns, of which only the last is used
    self.kept = tuple(outputs)
    return outputs[-1]


def mix_all_at_once(self, features_MF, words_VH) -> torch.Tensor:
    logits_MV = self[1](self[0](features_MF))
    probabilities = torch.softmax(logits_MV, dim=-1, dtype=torch.float32).to(logits_MV.dtype)
    padded = F.pad(probabilities, (0, 4))
    return padded @ F.pad(words_VH, (0, 0, 0, 4))


def rotate_in_steps(x, cos, sin) -> torch.Tensor:
    x, cos, sin = x.float(), torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def loss_of_every_row(model: Ovis2_5, batch: dict, num_learned: int) -> torch.Tensor:
    batch = dict(batch)
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / num_learned


def loss_of_learned_rows(model: Ovis2_5, batch: dict, num_learned: int) -> torch.Tensor:
    return model(**batch, num_items_in_batch=num_learned).loss


def make_plain(model: Ovis2_5, has: set[str], patches: ExitStack) -> None:
    """Take from the model what the variant does not have."""
    if "vision attention" not in has:
        patches.enter_context(patch.object(vision, "segment_attention", attend_image_by_image))
        patches.enter_context(patch.object(vision.Encoder, "forward", encode_keeping_everything))
    if "visual head" not in has:
        patches.enter_context(patch.object(visual_tokenizer.VisualHead, "forward", mix_all_at_once))
    if "fused parts" not in has:
        patches.enter_context(patch.object(vision, "rotate", rotate_in_steps))
        unfused = {llm.RMSNorm: Qwen3RMSNorm, llm.MLP: Qwen3MLP, llm.Attention: Qwen3Attention}
        for module in model.llm.modules():
            if type(module) in unfused:
                module.__class__ = unfused[type(module)]


# -- measuring


def batches_of(samples: list[dict], batch_size: int, config: Ovis2_5_Config, has: set[str]) -> list[dict]:
    """As many batches in every variant: padded in the samples' order, or packed by tokens and cost."""
    if "bytes" not in has:
        table = torch.from_numpy(PIXEL_TABLE)
        samples = [
            {**s, "pixel_values": None if s["pixel_values"] is None else table[s["pixel_values"].int()]}
            for s in samples
        ]
    if "packed rows" not in has:
        collate = Collator(pad_token_id=0)
        return [collate(samples[start : start + batch_size]) for start in range(0, len(samples), batch_size)]
    sizes, num_batches = sizes_of(samples), -(-len(samples) // batch_size)
    tokens, costs = sizes["tokens"], cost_weights(config).of(sizes)
    capacity = max(int(tokens.max()), -(-int(tokens.sum()) // num_batches))
    while len(rows := pack(tokens, costs, capacity)) > num_batches:
        capacity = int(capacity * 1.02)
    collate = PackedCollator()
    return [collate([pack_item(samples[index]) for index in row]) for row in rows]


def peak_bytes(reset: bool = False) -> int:
    """The most memory that this process has held since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return int(status.split()[0]) * 1024


def measure(has: set[str], arguments: argparse.Namespace, report: Callable[[dict], None]) -> None:
    """One variant: a pass to warm up, which also makes gradients and optimizer states, and a measured one."""
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    config = quarter_config(arguments.small)
    model = Ovis2_5(config).train()
    if arguments.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # a rate of 0: every step does its whole work, and every variant keeps the same weights
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    generator = np.random.default_rng(0)
    max_side = 320 if arguments.small else 896
    samples = [make_sample(generator, config.llm_config.vocab_size, max_side) for _ in range(arguments.samples)]
    batches = batches_of(samples, arguments.batch, config, has)
    learned = sum(int((sample["labels"] != IGNORE_INDEX).sum()) for sample in samples)
    loss_of = loss_of_learned_rows if "learned rows" in has else loss_of_every_row

    def step(batch: dict) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_of(model, batch, learned)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss.item()

    with ExitStack() as patches:
        make_plain(model, has, patches)
        if "compile" in has:
            model.compile_layers()
        for batch in batches if "compile" in has else batches[:1]:
            step(batch)
        # gradients and states lie in memory by now, and the last batch is gone
        before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
        peak_bytes(reset=True)
        rates = [matmul_rate(dtype)]
        start = time.perf_counter()
        losses = [step(batch) for batch in batches]
        seconds = time.perf_counter() - start
        rates.append(matmul_rate(dtype))
    flops = 3 * sum(forward_flops(config, sample) for sample in samples)
    report({
        "loss": sum(losses),
        "samples_per_s": len(samples) / seconds,
        "learned_tokens_per_s": learned / seconds,
        "useful_share_of_matmul_rate": flops / seconds / max(rates),
        "matmul_gflops": max(rates) / 1e9,
        "peak_gb_above_static": (peak_bytes() - before) / 1e9,
        "seconds": seconds,
    })  # fmt: skip


def variants(with_compile: bool) -> list[tuple[str, set[str]]]:
    named = [("plain", set())] + [(f"+ {name}", set(STEPS[: index + 1])) for index, name in enumerate(STEPS)]
    return [*named, *([("+ compile", {*STEPS, "compile"})] if with_compile else [])]


def measure_apart(has: set[str], arguments: argparse.Namespace) -> dict:
    """In a process of its own, whose memory nothing before it has touched."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_and_send, args=(has, arguments, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(f"the variant with {sorted(has)} failed, see above") from None
    finally:
        process.join()


def _measure_and_send(has, arguments, sender) -> None:
    measure(has, arguments, sender.send)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4, help="samples of a padded batch; rows hold as many on average")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 by autocast")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing of both towers")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile of every layer")
    parser.add_argument("--only", nargs="+", help="these lines alone, such as: plain '+ bytes'")
    parser.add_argument("--small", action="store_true", help="two layers and small images: a quick look")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    results: dict[str, dict] = {}
    print(f"{'':<20}{'samples/s':>10}{'learned/s':>11}{'useful':>8}{'peak GB':>9}{'speed':>8}{'memory':>8}{'loss':>12}")
    for name, has in variants(arguments.compile):
        if arguments.only and name not in arguments.only:
            continue
        found = results[name] = measure_apart(has, arguments)
        first = next(iter(results.values()))
        if abs(found["loss"] / first["loss"] - 1) > SAME_LOSS[getattr(torch, arguments.dtype)]:
            raise SystemExit(f"{name} found the loss {found['loss']}, the first line {first['loss']}")
        print(
            f"{name:<20}{found['samples_per_s']:>10.3f}{found['learned_tokens_per_s']:>11.1f}"
            f"{found['useful_share_of_matmul_rate']:>8.1%}{found['peak_gb_above_static']:>9.2f}"
            f"{found['samples_per_s'] / first['samples_per_s']:>7.2f}x"
            f"{found['peak_gb_above_static'] / first['peak_gb_above_static']:>7.2f}x{found['loss']:>12.6f}",
            flush=True,
        )
    print(
        "useful: FLOPs/s without padding and with learned rows alone in the lm_head, over the rate of a 2048^3 product"
    )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
