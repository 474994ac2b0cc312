"""What the tests share: the golden data, a tiny model, a processor, and a folder laid out as released."""

import json
import os
import shutil
from functools import cached_property
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ovis25 import Ovis2_5, Ovis2_5Processor
from ovis25.processing.image import open_image, patchify
from ovis25.tiny.build import build_tiny
from ovis25.training.checkpoints import find_checkpoints
from ovis25.training.config import load_config
from ovis25.training.extensions import remove_stale_locks
from ovis25.training.run import train

# a run of the tests that was killed while DeepSpeed compiled must not hang the next one
remove_stale_locks()

GOLDEN = Path(__file__).parent / "golden"
# The whole set, where it is at hand: a folder that holds golden/ and tokenizer_9b/.
WHOLE = Path(os.environ.get("OVIS25_GOLDEN") or Path(__file__).parents[2] / "shared")
CASES = ("single_image", "multi_image", "video", "text_only", "padded_batch")
VISUAL_CASES = tuple(case for case in CASES if case != "text_only")
CASE_IMAGES = {
    "single_image": ["0.png"],
    "generate": ["0.png"],
    "multi_image": ["0.png", "1.png", "2.png"],
    "padded_batch": ["1.png", "2.png", "0.png"],
    "video": ["frame0.png", "frame1.png", "frame2.png", "frame3.png"],
}


class Golden:
    """One copy of the golden data: the small one in the repository, or the whole set."""

    def __init__(self, folder: Path, tokenizer_folder: Path):
        self.folder, self.tokenizer_folder = folder, tokenizer_folder

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "tensors.safetensors")

    def json(self, name: str):
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))

    def images(self, case: str) -> list:
        return [open_image(self.folder / "images" / name) for name in CASE_IMAGES[case]]

    def pixels(self, case: str) -> torch.Tensor | None:
        """The case's `pixel_values`, made from its images (a test shows that they are bit-equal to the golden ones)."""
        if case not in CASE_IMAGES:
            return None
        budget = self.json("meta")["preprocess"]
        images = self.images(case)
        inputs = [images] if case == "video" else [[image] for image in images]
        return torch.cat(
            [torch.from_numpy(patchify(frames, budget["min_pixels"], budget["max_pixels"])[0]) for frames in inputs]
        )

    def inputs(self, case: str) -> dict[str, torch.Tensor]:
        """The arguments of `Ovis2_5.forward`; copies, so that a test may change them."""
        names = ("input_ids", "attention_mask", "labels", "grid_thws")
        inputs = {name: self.tensors[f"{case}/{name}"].clone() for name in names if f"{case}/{name}" in self.tensors}
        pixels = self.pixels(case)
        return inputs if pixels is None else {**inputs, "pixel_values": pixels}


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden(GOLDEN, GOLDEN / "tokenizer")


@pytest.fixture(scope="session")
def whole_golden() -> Golden:
    if not (WHOLE / "golden").is_dir():
        pytest.skip(f"no whole golden set in {WHOLE} (set OVIS25_GOLDEN to the folder that holds golden/)")
    return Golden(WHOLE / "golden", WHOLE / "tokenizer_9b")


@pytest.fixture(scope="session", params=["golden", "whole_golden"])
def any_golden(request) -> Golden:
    """The small copy, then the whole set where it is at hand."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def model() -> Ovis2_5:
    """The golden tiny checkpoint in float32, in eval mode."""
    return Ovis2_5.from_pretrained(GOLDEN / "tiny_checkpoint", dtype=torch.float32)


@pytest.fixture(scope="session")
def processor() -> Ovis2_5Processor:
    return Ovis2_5Processor.from_pretrained(GOLDEN / "tokenizer")


@pytest.fixture
def released_folder(tmp_path) -> Path:
    """A tiny checkpoint with every file of the released layout; the tokenizer's ids exceed the tiny vocabulary."""
    folder = tmp_path / "released"
    shutil.copytree(GOLDEN / "tokenizer", folder)
    for file in (GOLDEN / "tiny_checkpoint").iterdir():
        shutil.copyfile(file, folder / file.name)
    for module in ("configuration_ovis2_5.py", "modeling_ovis2_5.py"):
        (folder / module).write_text(f'"""Stands for the released {module}."""\n', encoding="utf-8")
    (folder / "LICENSE").write_text("Apache-2.0\n", encoding="utf-8")
    return folder


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    got, expected = got.detach().double().cpu(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


# -- training runs on files

PIXELS = {
    f"{kind}_{bound}_pixels": pixels
    for kind in ("single_image", "multiple_image", "video")
    for bound, pixels in (("min", 32 * 32), ("max", 96 * 96))
}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    build_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Twelve training and five evaluation samples: pictures of several sizes, two pictures, text."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    samples = []
    for index in range(17):
        num_images = index % 3
        names = [f"{index}_{k}.png" for k in range(num_images)]
        for name in names:
            height, width = generator.integers(32, 100, 2)
            Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
        question = "<image>\n" * num_images + f"What is {index} + 1?"
        answer = f"<think>\n{index} and 1\n</think>\n\n{index + 1}" if index % 2 else f"It is {index + 1}."
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        samples.append({"id": f"s{index}", "conversations": turns, **({"image": names} if names else {})})
    (folder / "train.json").write_text(json.dumps(samples[:12]))
    (folder / "eval.json").write_text(json.dumps(samples[12:]))
    return folder


@pytest.fixture
def write_config(tiny_folder, data_dir, tmp_path):
    """A config over the files: batch 2, six steps an epoch, learning fast enough to see a difference."""

    def write(**values) -> Path:
        settings = {
            "model_path": str(tiny_folder), "data_path": str(data_dir / "train.json"),
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 2, "learning_rate": 1e-3,
            "num_train_epochs": 1, "logging_steps": 1, "dataloader_num_workers": 0, "seed": 3, **PIXELS, **values,
        }  # fmt: skip
        path = tmp_path / "config.json"
        path.write_text(json.dumps(settings))
        return path

    return write


def run(path: Path, *overrides: str) -> dict:
    return train(load_config(path, [str(part) for part in overrides]))


def losses_of(output_dir: Path) -> dict[int, float]:
    checkpoint = find_checkpoints(output_dir)[0][-1]
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


class Scripted:
    """Makes a model write given ids, whatever its weights say: a logits processor."""

    def __init__(self, ids: list[int]):
        self.ids, self.position = ids, 0

    def __call__(self, history, scores):
        token = self.ids[min(self.position, len(self.ids) - 1)]
        self.position += 1
        forced = torch.full_like(scores, -torch.inf)
        forced[:, token] = 0.0
        return forced
