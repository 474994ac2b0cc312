"""Merging an adapter into its base: a folder like a released one, checked before it gets its name.

The base is read tensor by tensor and written shard by shard, so that no whole model is in memory until the check.
"""

import ctypes
import gc
import json
import random
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ovis25.checkpoint import copy_side_files, lies_in, side_files
from ovis25.files import follow_umask
from ovis25.loading import ModelFolders, find_model
from ovis25.model import Ovis2_5, Ovis2_5_Config
from ovis25.model.adapter import ADAPTER_CONFIG_NAME, AdapterOnShapes, load_adapter
from ovis25.model.ovis import weight_shapes
from ovis25.processing import Ovis2_5Processor
from ovis25.tiny.strips import READING_PROMPT, make_strip
from ovis25.weights import INDEX_NAME, StoredTensor, stored_weights

# relative error of the logits that rounding explains, by the merged weights' dtype
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# how safetensors writes the dtypes that a base may have
_STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# of the weights' size in float32, for the adapter and the activations of one picture
_ROOM, _ROOM_BYTES = 1.1, 500_000_000
_CGROUP = Path("/sys/fs/cgroup")


@dataclass
class MergeReport:
    """What was checked: logits of the merged folder, loaded again, against base and adapter side by side.

    `dtype` is that of the merged weights, `compared_in` that in which both sides were computed.
    """

    output_path: Path
    dtype: torch.dtype
    relative_error: float
    largest_difference: float
    same_first_token: bool
    num_files: int
    compared_in: torch.dtype = torch.float32

    def render(self) -> str:
        dtype, compared_in = (str(kind).removeprefix("torch.") for kind in (self.dtype, self.compared_in))
        return (
            f"merged into {self.output_path} ({dtype}, {self.num_files} files)\n"
            f"  logits on a picture of digits: relative error {self.relative_error:.1e} "
            f"(at most {TOLERANCES[self.dtype]:g} for {dtype}), largest difference {self.largest_difference:.1e}, "
            f"computed in {compared_in}\n"
            f"  most likely next token: {'the same' if self.same_first_token else 'another one (a near tie)'}\n"
            "  file set complete, prompts rendered as by the base"
        )


@torch.no_grad()
def merge_adapter(
    adapter_path: str | Path,
    output_path: str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    check_base: bool = True,
) -> MergeReport:
    """Merge and verify; `base` replaces the one that the adapter names, `dtype` the base's own.

    Each merged weight is computed in float32 and rounded once. The check compares in float32 where the memory
    allows, else in the merged weights' dtype. `check_base=False` takes a base with other weights than those that the
    adapter was trained on.

    Raises:
        FileNotFoundError: no adapter there, or its base cannot be found.
        CheckpointError: one of both is not whole, or the base is not the adapter's.
        ValueError: `output_path` is in use, or the merged folder failed a check. Nothing is left behind then.
    """
    adapter, output = Path(adapter_path).expanduser(), Path(output_path).expanduser().absolute()
    if not (adapter / ADAPTER_CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{adapter} holds no {ADAPTER_CONFIG_NAME}, so it is no adapter folder")
    found = find_model(adapter, base, check_base)
    _check_output(output, adapter, found.weights)
    stored = stored_weights(found.weights)
    dtype = dtype or _dtype_of(found.weights, stored)
    if dtype not in TOLERANCES:
        raise ValueError(f"dtype {dtype} cannot be merged into; choose float32, bfloat16 or float16")
    processor = Ovis2_5Processor.from_pretrained(found.processor)

    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        processor.save_pretrained(unfinished)
        copy_side_files(found.weights, unfinished)
        write_merged(found, stored, unfinished, dtype)
        report = _verify(unfinished, output, dtype, processor, found)
        follow_umask(unfinished, *unfinished.iterdir())
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return report


def _check_output(output: Path, *inputs: Path) -> None:
    for folder in inputs:
        if lies_in(output, folder):
            raise ValueError(f"output_path {output} lies in {folder}, which is merged from; choose another folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output_path {output} exists and is not empty; choose another folder or remove it")


def _dtype_of(base: Path, stored: dict[str, StoredTensor]) -> torch.dtype:
    """The base's own: what its config says, or else its weights."""
    return Ovis2_5_Config.from_pretrained(base).dtype or _STORED[next(iter(stored.values())).dtype]


def write_merged(found: ModelFolders, stored: dict[str, StoredTensor], folder: Path, dtype: torch.dtype) -> None:
    """Write config and weights of the merged model into `folder`, in files that hold the same tensors as the base's.

    Takes the memory of one file beside the adapter.
    """
    config = Ovis2_5_Config.from_pretrained(found.weights)
    adapter, places = AdapterOnShapes(config, found.adapter), {}
    # a tied output layer, which a file may repeat, is left out, as the model saves itself
    names = weight_shapes(config).keys()
    for file in sorted({tensor.file for tensor in stored.values()}):
        places |= {name: file.name for name, tensor in stored.items() if tensor.file == file and name in names}
        tensors = {
            name: (
                adapter.merged(name, lambda key: _read(stored, key)) if name in adapter.names else _read(stored, name)
            )
            .to(dtype)
            .contiguous()
            for name, place in places.items()
            if place == file.name
        }
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
        tensors.clear()
        _release_memory()
    if len(set(places.values())) > 1:
        size = dtype.itemsize * sum(torch.Size(stored[name].shape).numel() for name in places)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config.dtype = dtype
    config.save_pretrained(folder)


def _read(stored: dict[str, StoredTensor], name: str) -> torch.Tensor:
    with safe_open(stored[name].file, "pt") as file:
        return file.get_tensor(name)


def _compared_in(found: ModelFolders, dtype: torch.dtype) -> torch.dtype:
    """float32 where there is memory for the model in it: only one of the two that are compared is there at a time."""
    shapes = weight_shapes(Ovis2_5_Config.from_pretrained(found.weights)).values()
    needed = _ROOM * sum(torch.Size(shape).numel() for shape in shapes) * torch.float32.itemsize + _ROOM_BYTES
    return torch.float32 if needed <= available_memory() else dtype


def _release_memory() -> None:
    """Give freed memory back to the system: glibc keeps what lay in blocks of less than 32 MB, as most weights do."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def available_memory() -> int:
    """Bytes that this process may still take: the machine's, or what a container is allowed."""
    available = psutil.virtual_memory().available
    try:
        limit, current = ((_CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return min(available, int(limit) - int(current))
    except (OSError, ValueError):
        # no container, or one without a limit ("max")
        return available


def _prompts(processor: Ovis2_5Processor) -> list[str]:
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": READING_PROMPT}]}
    return [
        processor.apply_chat_template([message], add_generation_prompt=True, enable_thinking=thinking)
        for thinking in (False, True)
    ]


def _logits(model: Ovis2_5, processor: Ovis2_5Processor) -> torch.Tensor:
    strip = make_strip(random.Random(0), "test", num_digits=3)
    return model(**processor(strip.image, _prompts(processor)[0])).logits[0].float()


def _verify(
    folder: Path, output: Path, dtype: torch.dtype, processor: Ovis2_5Processor, found: ModelFolders
) -> MergeReport:
    missing = {file.name for file in side_files(found.weights)} - {file.name for file in folder.iterdir()}
    if missing:
        raise ValueError(f"the merged folder lacks {', '.join(sorted(missing))} of {found.weights}")
    again = Ovis2_5Processor.from_pretrained(folder)
    if _prompts(again) != _prompts(Ovis2_5Processor.from_pretrained(found.weights)):
        raise ValueError(f"the merged folder renders prompts otherwise than {found.weights}")
    compared_in = _compared_in(found, dtype)
    expected = _expected(found, compared_in, processor)
    _release_memory()
    got = _logits(Ovis2_5.from_pretrained(folder, dtype=compared_in).eval(), again)
    error = float((got - expected).norm() / expected.norm())
    if not error <= TOLERANCES[dtype]:
        raise ValueError(
            f"the merged logits differ from the adapter's by {error:.1e}, more than {TOLERANCES[dtype]:g}, which "
            f"rounding to {dtype} explains; is {found.weights} the adapter's base?"
        )
    return MergeReport(
        output_path=output,
        dtype=dtype,
        relative_error=error,
        largest_difference=float((got - expected).abs().max()),
        same_first_token=bool(got[-1].argmax() == expected[-1].argmax()),
        num_files=len(list(folder.iterdir())),
        compared_in=compared_in,
    )


def _expected(found: ModelFolders, dtype: torch.dtype, processor: Ovis2_5Processor) -> torch.Tensor:
    """What base and adapter answer; both are gone from memory afterwards."""
    model = Ovis2_5.from_pretrained(found.weights, dtype=dtype)
    load_adapter(model, found.adapter)
    return _logits(model.eval(), processor)
