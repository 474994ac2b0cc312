"""What each `optim` keeps and how long its step takes, on the quarter-width 2B, and the states of the 9B.

Every optimizer is the one that a run with that `optim` makes, and takes a few steps on one fixed sample; a loss that
does not fall ends the benchmark. Bytes are those of the state tensors that exist after the steps. The 9B's are counted
in the same way, on tensors without data. The step's time is the least of all but the first.

    python benchmarks/optimizers.py [--steps 4] [--only muon ...] [--small] [--json out.json]
"""

import argparse
import gc
import importlib.util
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from train_step import make_sample, quarter_config
from transformers import TrainingArguments

from ovis25 import Ovis2_5, Ovis2_5_Config
from ovis25.constants import IGNORE_INDEX
from ovis25.data.collator import Collator
from ovis25.training.config import MUON
from ovis25.training.memory import released_config
from ovis25.training.modules import choose_trained, parse_train_modules
from ovis25.training.muon import layer_matrices
from ovis25.training.trainer import OvisTrainer

_EIGHT_BITS = "adamw_8bit"
# five rounds, of three products each, make a momentum orthogonal (torch.optim.Muon's ns_steps)
_ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """One line of the table; `rate` is a learning rate with which a few steps lower the loss."""

    name: str
    optim: str
    weights: torch.dtype = torch.float32
    rate: float = 3e-4


ROWS = (
    Row("adamw_torch_fused", "adamw_torch_fused"),
    Row("adamw_torch_fused, bfloat16 weights", "adamw_torch_fused", torch.bfloat16),
    Row(_EIGHT_BITS, _EIGHT_BITS),
    Row("adafactor", "adafactor"),
    Row(MUON, MUON),
    Row("sgd", "sgd", rate=0.1),
)


def make_optimizer(model: Ovis2_5, row: Row, is_meta: bool = False) -> torch.optim.Optimizer:
    """As a run makes it; on tensors without data, without fused kernels."""
    optim = "adamw_torch" if is_meta and row.optim == "adamw_torch_fused" else row.optim
    with tempfile.TemporaryDirectory() as folder:
        known = {} if optim == MUON else {"optim": optim}
        arguments = TrainingArguments(folder, learning_rate=row.rate, use_cpu=not torch.cuda.is_available(), **known)
        if optim == MUON:
            arguments.optim = MUON
    kind, settings = OvisTrainer.get_optimizer_cls_and_kwargs(arguments, model)
    if is_meta and optim == MUON:
        settings["fused"] = False
    return kind([{"params": [p for p in model.parameters() if p.requires_grad]}], **settings)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor that the optimizer keeps from step to step."""
    kept = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.numel() * value.element_size() for value in kept if isinstance(value, torch.Tensor))


def make_model(config: Ovis2_5_Config, dtype: torch.dtype) -> Ovis2_5:
    """Random weights, all that can be trained trained."""
    torch.manual_seed(0)
    model = Ovis2_5(config).to(dtype).train()
    choose_trained(model, parse_train_modules("all"))
    return model


def num_trained(model: Ovis2_5) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def bytes_of_9b(row: Row) -> int:
    with torch.device("meta"):
        model = make_model(released_config("9B"), row.weights)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    optimizer = make_optimizer(model, row, is_meta=True)
    optimizer.step()
    return state_bytes(optimizer)


def muon_flops(config: Ovis2_5_Config) -> tuple[float, float]:
    """FLOPs of making all momenta orthogonal once, and of the same parameters' passes for one token.

    A momentum of m x n, m <= n: m m n, m m m and m m n multiply-adds a round; a token: m n, three times.
    """
    with torch.device("meta"):
        matrices = layer_matrices(make_model(config, torch.float32))
    shapes = [sorted(matrix.shape) for matrix in matrices]
    orthogonal = sum(_ROUNDS * 2 * (2 * m * m * n + m**3) for m, n in shapes)
    return orthogonal, sum(3 * 2 * m * n for m, n in shapes)


def why_not(row: Row) -> str | None:
    """What this machine lacks for the row."""
    if row.optim == _EIGHT_BITS and not (torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes")):
        return "needs bitsandbytes and CUDA"
    return None


def measure(row: Row, num_steps: int, is_small: bool) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(quarter_config(is_small), row.weights).to(device)
    optimizer = make_optimizer(model, row)
    generator = np.random.default_rng(0)
    samples = [make_sample(generator, model.config.llm_config.vocab_size, 256) for _ in range(8)]
    shortest = min((s for s in samples if s["grid_thws"] is not None), key=lambda sample: len(sample["input_ids"]))
    batch = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in Collator(pad_token_id=0)([shortest]).items()
    }
    num_learned = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    losses, seconds = [], []
    for _ in range(num_steps):
        loss = model(**batch, num_items_in_batch=num_learned).loss
        loss.backward()
        losses.append(loss.item())
        start = time.perf_counter()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        optimizer.zero_grad()
    if not losses[-1] < losses[0]:
        raise SystemExit(f"{row.name} does not lower the loss: {losses}")
    return {
        "bytes_per_parameter": state_bytes(optimizer) / num_trained(model),
        "step_s": min(seconds[1:]),
        "losses": losses,
        "num_parameters": num_trained(model),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="steps of each optimizer, 2 at least")
    parser.add_argument("--only", nargs="+", help="these lines alone, such as: muon adafactor")
    parser.add_argument("--small", action="store_true", help="two layers: a quick look")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps must be at least 2: the first step makes the states, and its time does not count")
    results: dict[str, dict] = {}
    print(f"{'':<36}{'bytes/parameter':>16}{'step, s':>9}{'loss':>18}{'9B, GB':>9}")
    for row in ROWS:
        if arguments.only and row.name not in arguments.only:
            continue
        lacks = why_not(row)
        if lacks:
            results[row.name] = {"lacks": lacks}
            print(f"{row.name:<36}{lacks}", flush=True)
            continue
        found = results[row.name] = measure(row, arguments.steps, arguments.small)
        # the last row's model is gone by now, cycles included
        gc.collect()
        if row.optim != _EIGHT_BITS:
            found["states_of_9b_bytes"] = bytes_of_9b(row)
        losses = f"{found['losses'][0]:.3f} -> {found['losses'][-1]:.3f}"
        of_9b = f"{found['states_of_9b_bytes'] / 1e9:.2f}" if "states_of_9b_bytes" in found else "-"
        print(
            f"{row.name:<36}{found['bytes_per_parameter']:>16.3f}{found['step_s']:>9.3f}{losses:>18}{of_9b:>9}",
            flush=True,
        )
    for size in ("2B", "9B"):
        orthogonal, per_token = muon_flops(released_config(size))
        print(
            f"Muon's step on the {size}: {orthogonal / 1e12:,.0f} TFLOP, the matrices' passes of "
            f"{orthogonal / per_token:,.0f} tokens"
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
