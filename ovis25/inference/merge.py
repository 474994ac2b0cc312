"""Merging an adapter into its base: a folder like a released one, checked before it gets its name."""

import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ovis25.checkpoint import resolve_checkpoint, side_files
from ovis25.model import Ovis2_5
from ovis25.model.adapter import ADAPTER_CONFIG_NAME, adapter_base, load_adapter
from ovis25.processing import Ovis2_5Processor
from ovis25.tiny.build import resolve_model_path
from ovis25.tiny.strips import READING_PROMPT, make_strip

# relative error of the logits that rounding explains, by the merged weights' dtype
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass
class MergeReport:
    """What was checked: logits of the merged folder, loaded again, against base and adapter side by side."""

    output_path: Path
    dtype: torch.dtype
    relative_error: float
    largest_difference: float
    same_first_token: bool
    num_files: int

    def render(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"merged into {self.output_path} ({dtype}, {self.num_files} files)\n"
            f"  logits on a picture of digits: relative error {self.relative_error:.1e} "
            f"(at most {TOLERANCES[self.dtype]:g} for {dtype}), largest difference {self.largest_difference:.1e}\n"
            f"  most likely next token: {'the same' if self.same_first_token else 'another one (a near tie)'}\n"
            "  file set complete, prompts rendered as by the base"
        )


@torch.no_grad()
def merge_adapter(
    adapter_path: str | Path, output_path: str | Path, base: str | Path | None = None, dtype: torch.dtype | None = None
) -> MergeReport:
    """Merge and verify; `base` replaces the one that the adapter names, `dtype` the base's own.

    Raises:
        FileNotFoundError: no adapter there, or its base cannot be found.
        ValueError: `output_path` is in use, or the merged folder failed a check. Nothing is left behind then.
    """
    adapter, output = Path(adapter_path).expanduser(), Path(output_path).expanduser().absolute()
    if not (adapter / ADAPTER_CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{adapter} holds no {ADAPTER_CONFIG_NAME}, so it is no adapter folder")
    base_folder = resolve_checkpoint(resolve_model_path(base or adapter_base(adapter)))
    _check_output(output, adapter, base_folder)

    model = Ovis2_5.from_pretrained(base_folder, dtype=dtype or "auto").eval()
    if model.dtype not in TOLERANCES:
        raise ValueError(f"dtype {model.dtype} cannot be merged into; choose float32, bfloat16 or float16")
    adapted = load_adapter(model, adapter).eval()
    processor = Ovis2_5Processor.from_pretrained(adapter)
    expected = _logits(model, processor)
    merged = adapted.merge_and_unload()

    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        processor.save_pretrained(unfinished)
        merged.save_pretrained(unfinished)
        report = _verify(unfinished, output, expected, processor, base_folder)
        unfinished.chmod(0o755)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return report


def _check_output(output: Path, *inputs: Path) -> None:
    for folder in inputs:
        if output == folder.resolve() or folder.resolve() in output.parents:
            raise ValueError(f"output_path {output} lies in {folder}, which is merged from; choose another folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output_path {output} exists and is not empty; choose another folder or remove it")


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
    folder: Path, output: Path, expected: torch.Tensor, processor: Ovis2_5Processor, base_folder: Path
) -> MergeReport:
    missing = {file.name for file in side_files(base_folder)} - {file.name for file in folder.iterdir()}
    if missing:
        raise ValueError(f"the merged folder lacks {', '.join(sorted(missing))} of {base_folder}")
    model = Ovis2_5.from_pretrained(folder).eval()
    again = Ovis2_5Processor.from_pretrained(folder)
    if _prompts(again) != _prompts(Ovis2_5Processor.from_pretrained(base_folder)):
        raise ValueError(f"the merged folder renders prompts otherwise than {base_folder}")
    got = _logits(model, again)
    error = float((got - expected).norm() / expected.norm())
    if not error <= TOLERANCES[model.dtype]:
        raise ValueError(
            f"the merged logits differ from the adapter's by {error:.1e}, more than {TOLERANCES[model.dtype]:g}, which "
            f"rounding to {model.dtype} explains; is {base_folder} the adapter's base?"
        )
    return MergeReport(
        output_path=output,
        dtype=model.dtype,
        relative_error=error,
        largest_difference=float((got - expected).abs().max()),
        same_first_token=bool(got[-1].argmax() == expected[-1].argmax()),
        num_files=len(list(folder.iterdir())),
    )
