"""What a GPU does with this code, in one command: kernels, training steps and decoding at the released shapes.

Random weights, made on the device in bfloat16; nothing is downloaded. Fast paths are compared with plain float32
arithmetic first, and a result out of bounds is exit status 1. Every section keeps to its part of the time; what a
device cannot run is said in its row.

    python benchmarks/gpu.py [--only kernels,train-2b,lora-9b,train-9b,decode] [--small] [--json out.json] [--minutes 9]
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import gpu_checks
import gpu_decoding
import gpu_kernels
import gpu_training
import torch
from gpu_run import Run

# name -> (function, its part of the time)
SECTIONS = {
    "checks": (gpu_checks.check, 60),
    "kernels": (gpu_kernels.measure_kernels, 110),
    "train-2b": (partial(gpu_training.measure_training, section="train-2b"), 170),
    "lora-9b": (partial(gpu_training.measure_training, section="lora-9b"), 80),
    "train-9b": (partial(gpu_training.measure_training, section="train-9b"), 90),
    "decode": (gpu_decoding.measure_decoding, 100),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in SECTIONS if name != "checks"]
    parser.add_argument("--only", type=_section_names, default=names, help=f"of {','.join(names)}, in this order")
    parser.add_argument("--small", action="store_true", help="tiny shapes on any device: does it run")
    parser.add_argument("--json", type=Path, help="also write every figure to this file, as they come")
    parser.add_argument("--minutes", type=float, default=9.0, help="in which to end, imports included")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.small:
        raise SystemExit("the released shapes need a CUDA device; --small runs tiny ones on a CPU")
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    run = Run(torch.device(arguments.device), arguments.small, arguments.minutes, arguments.json)
    print(", ".join(f"{name} {value}" for name, value in run.results.items() if name != "sections"), flush=True)
    run_sections(run, list(dict.fromkeys(["checks", *arguments.only])))
    if failed := gpu_checks.failures(run):
        sys.exit("checks failed:\n" + "\n".join(failed))


def _section_names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"unknown section {', '.join(unknown)}; choose from {', '.join(SECTIONS)}")
    return names


def run_sections(run: Run, names: list[str]) -> None:
    """Each may take its part of the time that is left; what one does not use, the later ones share."""
    for index, name in enumerate(names):
        function, part = SECTIONS[name]
        run.section(name, function, part / sum(SECTIONS[later][1] for later in names[index:]))


if __name__ == "__main__":
    main()
