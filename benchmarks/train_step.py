"""Training steps per second of a proportional quarter of the 2B on ragged, real-shaped samples.

Widths and vocabularies are the 2B's divided by four, the depth is kept; weights are random. Samples mix images of
224 to 896 pixels a side, text alone and several images, with 64 to 700 learned tokens.

    python benchmarks/train_step.py [--steps 4] [--batch 2] [--small] [--dtype bfloat16] [--json out.json]
"""

import argparse
import json
import resource
import time

import numpy as np
import torch

from ovis25 import Ovis2_5, Ovis2_5_Config
from ovis25.constants import IGNORE_INDEX, IMAGE_BEGIN_ID, IMAGE_END_ID, VISUAL_ATOM_ID
from ovis25.data.collator import Collator


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
    """One item as the dataset gives it, with random content."""
    num_images = generator.choice([0, 1, 1, 1, 1, 1, 2, 3])
    ids, grids = generator.integers(0, vocab_size, 40).tolist(), []
    for _ in range(num_images):
        height, width = (int(side) // 32 * 2 for side in generator.integers(224, max_side + 1, 2))
        ids += [IMAGE_BEGIN_ID, *[VISUAL_ATOM_ID] * (height * width // 4), IMAGE_END_ID]
        grids.append((1, height, width))
    answer = generator.integers(0, vocab_size, generator.integers(64, 701)).tolist()
    num_patches = sum(height * width for _, height, width in grids)
    return {
        "input_ids": torch.tensor(ids + answer),
        "labels": torch.tensor([IGNORE_INDEX] * len(ids) + answer),
        "pixel_values": torch.from_numpy(generator.uniform(-1, 1, (num_patches, 768)).astype(np.float32))
        if grids
        else None,
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


def forward_flops(config: Ovis2_5_Config, item: dict) -> float:
    """Multiply-adds times two that one sample needs: no padding, the lm_head on learned rows alone."""
    llm, vit = config.llm_config, config.vit_config
    tokens, learned = len(item["input_ids"]), int((item["labels"] != IGNORE_INDEX).sum())
    grids = [] if item["grid_thws"] is None else item["grid_thws"].tolist()
    attention_width = llm.num_attention_heads * llm.head_dim
    key_width = llm.num_key_value_heads * llm.head_dim
    llm_layer = llm.hidden_size * (2 * attention_width + 2 * key_width + 3 * llm.intermediate_size)
    vit_layer = vit.hidden_size * (4 * vit.hidden_size + 2 * vit.intermediate_size)
    patches = sum(h * w for _, h, w in grids)
    visual = (config.visual_vocab_size - 4) * (4 * vit.hidden_size + llm.hidden_size) * patches / 4
    return 2 * (
        llm.num_hidden_layers * (tokens * llm_layer + tokens**2 * attention_width)  # causal: half of 2 n^2
        + learned * llm.hidden_size * llm.vocab_size
        + vit.num_hidden_layers * (patches * vit_layer + sum(2 * (h * w) ** 2 for _, h, w in grids) * vit.hidden_size)
        + patches * 768 * vit.hidden_size
        + visual
    )


def measure(num_steps: int, batch_size: int, is_small: bool, dtype: torch.dtype) -> dict:
    torch.manual_seed(0)
    config = quarter_config(is_small)
    model = Ovis2_5(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    generator = np.random.default_rng(0)
    max_side = 320 if is_small else 896
    samples = [make_sample(generator, config.llm_config.vocab_size, max_side) for _ in range(num_steps * batch_size)]
    collate = Collator(pad_token_id=0)

    def step(items: list[dict]) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(**collate(items)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    step(samples[:batch_size])
    start = time.perf_counter()
    losses = [step(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size)]
    seconds = time.perf_counter() - start
    flops = 3 * sum(forward_flops(config, item) for item in samples)
    learned = sum(int((item["labels"] != IGNORE_INDEX).sum()) for item in samples)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "samples_per_s": len(samples) / seconds,
        "tokens_per_s": sum(len(item["input_ids"]) for item in samples) / seconds,
        "learned_tokens_per_s": learned / seconds,
        "useful_share_of_matmul_rate": flops / seconds / matmul_rate(dtype),
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "num_parameters": model.num_parameters(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="two layers and small images: a quick look")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    figures = measure(arguments.steps, arguments.batch, arguments.small, getattr(torch, arguments.dtype))
    for name, value in figures.items():
        print(f"{name:<28} {value:,.3f}" if isinstance(value, float) else f"{name:<28} {value}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
