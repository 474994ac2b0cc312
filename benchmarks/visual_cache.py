"""What the frozen vision cache saves: a LoRA run of the quarter-width 2B, with and without it.

The whole training path runs: JPEG files of one size, Trainer, an evaluation after every epoch. All runs have the same
seed, so their losses can be compared; the third finds the cache filled.

    python benchmarks/visual_cache.py [--samples 4] [--epochs 3] [--small] [--json out.json]
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from preprocess import make_picture
from train_step import quarter_config
from transformers import TrainerCallback

from ovis25 import Ovis2_5
from ovis25.checkpoint import copy_side_files
from ovis25.loading import resolve_model_path
from ovis25.training import released
from ovis25.training.checkpoints import find_checkpoints, read_state
from ovis25.training.config import load_config
from ovis25.training.run import train


class Stopwatch(TrainerCallback):
    """Seconds from the start to the first epoch, of each epoch's steps, and of each evaluation."""

    def __init__(self):
        self.start, self.before_s = time.perf_counter(), 0.0
        self.epochs_s: list[float] = []
        self.evaluations_s: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.before_s = time.perf_counter() - self.start

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epoch_start = time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.epochs_s.append(time.perf_counter() - self.epoch_start)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.evaluations_s.append(metrics["eval_runtime"])


def write_run(folder: Path, num_samples: int, num_epochs: int, is_small: bool) -> Path:
    """A model, as many pictures for training as for evaluation with 64 learned words each, and a config over them."""
    torch.manual_seed(0)
    Ovis2_5(quarter_config(is_small)).save_pretrained(folder / "model")
    copy_side_files(resolve_model_path("tiny"), folder / "model")
    side = 224 if is_small else 896
    picture, words = make_picture(side, side), random.Random(0)
    for name in ("train", "eval"):
        rows = []
        for index in range(num_samples):
            file = f"{name}{index}.jpg"
            picture.rotate(words.uniform(-40, 40)).save(folder / file, quality=90)
            answer = " ".join(str(words.randint(10, 99)) for _ in range(64))
            turns = [{"from": "human", "value": "<image>\nWhich numbers?"}, {"from": "gpt", "value": answer}]
            rows.append({"image": file, "conversations": turns})
        (folder / f"{name}.json").write_text(json.dumps(rows))
    settings = {
        "model_path": "model", "data_path": "train.json", "eval_data_path": "eval.json", "use_lora": True,
        "per_device_train_batch_size": 2, "num_train_epochs": num_epochs, "eval_strategy": "epoch",
        "early_stopping_patience": 0, "learning_rate": 1e-3, "logging_steps": 1, "dataloader_num_workers": 0,
        "single_image_min_pixels": side * side, "single_image_max_pixels": side * side, "seed": 3,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    return folder / "config.json"


def losses_of(output_dir: Path) -> list[float]:
    """Every training and evaluation loss, in order."""
    history = read_state(find_checkpoints(output_dir)[0][-1])["log_history"]
    return [entry[name] for entry in history for name in ("loss", "eval_loss") if name in entry]


def measure(num_samples: int, num_epochs: int, is_small: bool) -> dict:
    figures, losses = {}, {}
    with tempfile.TemporaryDirectory() as name:
        path = write_run(Path(name), num_samples, num_epochs, is_small)
        for kind in ("plain", "cached", "again"):
            output_dir = path.parent / kind
            overrides = ["--output_dir", str(output_dir), "--visual_cache_dir", str(path.parent / "cache")]
            watch = Stopwatch()
            # the real vocabulary's shapes with the tiny tokenizer: what a run would refuse
            with patch.object(released, "check_folder"):
                arguments = [*overrides, "--cache_visual_embeddings", str(kind != "plain")]
                train(load_config(path, arguments), callbacks=[watch])
            losses[kind] = losses_of(output_dir)
            figures[kind] = {
                "before_s": watch.before_s,
                "epochs_s": watch.epochs_s,
                "evaluations_s": watch.evaluations_s,
            }
        num_bytes = sum(file.stat().st_size for file in (path.parent / "cache").rglob("*.safetensors"))
    plain, cached = figures["plain"], figures["cached"]
    pairs = zip(losses["plain"], losses["cached"], strict=True)
    return {
        "num_samples": num_samples,
        "cache_bytes": num_bytes,
        "runs": figures,
        "epoch_ratio": min(plain["epochs_s"][1:]) / min(cached["epochs_s"][1:]),
        "evaluation_ratio": min(plain["evaluations_s"]) / min(cached["evaluations_s"]),
        "pass_s": figures["cached"]["before_s"] - figures["again"]["before_s"],
        "losses": losses,
        "largest_loss_difference": max(abs(one - other) / one for one, other in pairs),
    }


def report(figures: dict) -> None:
    print(f"\n{'run':>8} {'before':>8}  seconds of each epoch, then of each evaluation")
    for name, run in figures["runs"].items():
        times = ["  ".join(f"{value:.2f}" for value in run[key]) for key in ("epochs_s", "evaluations_s")]
        print(f"{name:>8} {run['before_s']:>8.1f}  {times[0]}   |   {times[1]}")
    print(
        f"from the second epoch on {figures['epoch_ratio']:.2f} times as fast, "
        f"evaluation {figures['evaluation_ratio']:.2f} times\n"
        f"the pass takes {figures['pass_s']:.1f} s and {figures['cache_bytes'] / 1e6:.1f} MB; "
        f"losses differ by {figures['largest_loss_difference']:.1e} (relative) at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4, help="pictures to train on, and as many to evaluate on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="two layers and pictures of 224 pixels: a quick look")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    if arguments.epochs < 2:
        parser.error("--epochs must be at least 2: the second one is compared")
    figures = measure(arguments.samples, arguments.epochs, arguments.small)
    report(figures)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
