"""How long a training step waits for its batch: the real data set over JPEG files, read by workers.

The consumer sleeps for `--step-ms`, as a device would compute; what it then waits for the next batch is the loader's
share. The first batch, which nobody can have prepared, is told apart.

    python benchmarks/loader.py [--workers 2] [--batch 2] [--steps 40] [--step-ms 200] [--json out.json]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from preprocess import make_picture
from torch.utils.data import DataLoader

from ovis25 import Ovis2_5Processor
from ovis25.data import Collator, ConversationDataset
from ovis25.loading import resolve_model_path

SIZES = ((480, 640), (896, 896), (1080, 1920))


def write_samples(folder: Path, num_samples: int) -> Path:
    """A data file over `num_samples` JPEG files of all sizes in turn."""
    pictures = [make_picture(*size) for size in SIZES]
    rows = []
    for index in range(num_samples):
        # each its own file; what is in it does not matter to the loader
        pictures[index % len(pictures)].save(folder / f"{index}.jpg", quality=90)
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Noise. " * 64}]
        rows.append({"image": f"{index}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def waits_ms(dataset: ConversationDataset, num_workers: int, batch_size: int, step_ms: float) -> list[float]:
    """What the consumer waits for each batch of one epoch."""
    collate = Collator(dataset.processor.tokenizer.pad_token_id)
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate, num_workers=num_workers)
    batches, waits = iter(loader), []
    for _ in range(len(loader)):
        before = time.perf_counter()
        next(batches)
        waits.append((time.perf_counter() - before) * 1e3)
        time.sleep(step_ms / 1e3)
    return waits


def measure(arguments) -> list[dict]:
    processor = Ovis2_5Processor.from_pretrained(resolve_model_path("tiny"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = write_samples(Path(folder), arguments.batch * arguments.steps)
        for raw_pixels in (True, False):
            dataset = ConversationDataset(path, processor, raw_pixels=raw_pixels)
            first, *waits = waits_ms(dataset, arguments.workers, arguments.batch, arguments.step_ms)
            rows.append({
                "pixels": "uint8" if raw_pixels else "float32",
                "step_ms": arguments.step_ms,
                "first_wait_ms": first,
                "median_wait_ms": float(np.median(waits)),
                "longest_wait_ms": max(waits),
                "share_of_time_waiting": sum(waits) / (sum(waits) + len(waits) * arguments.step_ms),
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2, help="pictures a step")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--step-ms", type=float, default=200.0, help="what a step takes once its batch is there")
    parser.add_argument("--json", help="also write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments)
    for row in rows:
        print(
            f"{row['pixels']:>8}: waits {row['median_wait_ms']:.1f} ms a step (median), {row['longest_wait_ms']:.1f} "
            f"at most, {row['first_wait_ms']:.0f} for the first; {row['share_of_time_waiting']:.1%} of the time"
        )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
