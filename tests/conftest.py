"""What the tests share: the golden data, a tiny model, a processor, and a folder laid out as released."""

import json
import os
import shutil
from functools import cached_property
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from safetensors.torch import load_file

from ovis25 import Ovis2_5, Ovis2_5Processor
from ovis25.processing.image import open_image, patchify

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
