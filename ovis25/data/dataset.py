"""The training set: rows checked once, decoded lazily, one item a sample."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch.utils.data import Dataset

from ovis25.constants import IGNORE_INDEX, MAX_IMAGE_MEGAPIXELS, SINGLE_IMAGE_PIXELS
from ovis25.data.checks import Budget, Defect, Grid, LengthLimits, LongSampleError, locate, measure, tool_images
from ovis25.data.errors import DataError, SampleError, label
from ovis25.data.keys import ORIGIN_KEY
from ovis25.data.schema import Sample, parse_sample
from ovis25.data.skipped import BrokenSamples, append_skipped
from ovis25.data.source import read_rows
from ovis25.data.visual_cache import CachedVisuals
from ovis25.processing import Ovis2_5Processor, VisualLimits
from ovis25.processing.image import open_image, patchify, patchify_bytes

logger = logging.getLogger(__name__)

_MAX_LISTED = 20
_SPOT_CHECK = 256
# what is known of a sample beforehand; see `checks.Measure`
SIZES = np.dtype([("tokens", np.int32), ("learned", np.int32), ("visual", np.int32), ("patch_pairs", np.int64)])


@dataclass
class Statistics:
    """Counts over the samples that are used; `is_estimate` where they come from a spot check.

    `num_empty_thinking`: answers with an explicit empty `<think>` block; `num_placed`: visuals that no text names, put
    before the first question; `unused_keys`: keys of rows and turns that nothing reads, and how many samples have them.
    """

    num_samples: int
    num_skipped: int
    num_shrunk: int
    total_tokens: int
    learned_tokens: int
    visual_tokens: int
    longest: int
    is_estimate: bool
    kinds: dict[str, int] = field(default_factory=dict)
    num_empty_thinking: int = 0
    num_placed: int = 0
    unused_keys: dict[str, int] = field(default_factory=dict)


class ConversationDataset(Dataset):
    """Samples in the documented format as the model's training items.

    Item i is a dict of 1-D int64 `input_ids` and `labels`, and `pixel_values` (N, 768) float32 and `grid_thws`
    (k, 3) int64, both None for text. With `on_bad_sample` "skip" a sample that breaks while decoding is a neutral item:
    two tokens, no label, no visual, so that it counts in no loss and every rank takes its steps.

    Args:
        data_path: a data file (see `source.read_rows`), or a sequence of rows. A list is checked like a file; of any
            other sequence (rows made on demand) about 256 rows, evenly spread, are checked, and the statistics are
            estimates, unless `measure_all`.
        processor: of the checkpoint that is trained.
        image_folder: where relative paths start; by default the data file's folder.
        single_image_min_pixels, ..., max_frames: the fields of `VisualLimits`.
        multimodal_max_length, text_max_length: longest sequences, with and without visuals.
        on_bad_sample: "error" lists all defects, "skip" leaves such samples out (see `skipped`).
        on_long_sample: "shrink" lowers that sample's pixel budget until it fits, "skip", or "error".
        check: False trusts the data: nothing is read beforehand, lengths and statistics are not known.
        measure_all: check rows made on demand one by one too: packing and grouping by length need every length.
        show_progress: a progress bar on standard error while checking.
        raw_pixels: `pixel_values` as uint8 (a quarter of the traffic), which the model turns into the same float32.

    Raises:
        DataError: the data cannot be read or has defects.
    """

    def __init__(
        self,
        data_path: str | Path | Sequence,
        processor: Ovis2_5Processor,
        image_folder: str | Path | None = None,
        *,
        multimodal_max_length: int = 8192,
        text_max_length: int = 4096,
        on_bad_sample: str = "error",
        on_long_sample: str = "shrink",
        check: bool = True,
        measure_all: bool = False,
        show_progress: bool = False,
        raw_pixels: bool = False,
        **limits: int,
    ):
        is_file = isinstance(data_path, (str, Path))
        self.rows: Sequence = read_rows(data_path) if is_file else data_path
        self.source = str(data_path) if is_file else "samples"
        self.folder = Path(image_folder or (Path(data_path).parent if is_file else ".")).absolute()
        self.processor = processor
        self.limits = VisualLimits(**limits)
        self.length_limits = LengthLimits(multimodal_max_length, text_max_length, on_long_sample)
        self.on_bad_sample = on_bad_sample
        self.raw_pixels = raw_pixels
        self.is_generated = not isinstance(self.rows, list)
        self.skipped: list[Defect] = []
        # where a worker notes a picture that breaks while decoding; set by the trainer
        self.skipped_path: Path | None = None
        self._visuals: CachedVisuals | None = None
        self._checked = range(0)
        self._kept = np.arange(len(self.rows))
        self._sizes = np.zeros(0, SIZES)
        self._shrunk: dict[int, tuple[int, int]] = {}
        self._kinds: Counter = Counter()
        self._unused_keys: Counter = Counter()
        self._num_empty_thinking = self._num_placed = 0
        if image_folder is not None and not self.folder.is_dir():
            raise DataError(f"image_folder {image_folder} is no folder")
        if check:
            is_spot_check = self.is_generated and not measure_all
            step = max(1, len(self.rows) // _SPOT_CHECK) if is_spot_check else 1
            self._check(range(0, len(self.rows), step), show_progress)
        self._broken = BrokenSamples(len(self))

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | None]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        item = self.read(index)
        return self.neutral_item() if item is None else item

    def read(self, index: int) -> dict[str, torch.Tensor | None] | None:
        """Item `index`; None where it breaks while decoding and may be skipped, which is noted in `skipped_path`.

        Raises:
            DataError: it breaks and may not be skipped, or every sample has.
        """
        index %= len(self)
        row_index = self.row_index(index)
        try:
            return self._encode(row_index)
        except SampleError as error:
            defect = self.defect(row_index, error)
        except FileNotFoundError as error:
            # of the visual cache; a worker would wrap its stack around the message
            raise DataError(str(error)) from error
        if not self._may_skip(defect):
            raise DataError(defect.describe(self.source))
        if self._broken.note(index):
            self._note_skipped(defect)
        if self._broken.are_all:
            raise DataError(
                f"{self.source}: every sample breaks while decoding; one of them: {defect.describe(self.source)}"
            )
        return None

    def neutral_item(self) -> dict[str, torch.Tensor | None]:
        """What stands for a sample that broke: text without any label."""
        ids = torch.full((2,), self.processor.tokenizer.pad_token_id)
        item = {"input_ids": ids, "labels": torch.full_like(ids, IGNORE_INDEX), "pixel_values": None, "grid_thws": None}
        return item if self._visuals is None else {**item, "visual_embeds": self._visuals.cache.read(())[0]}

    @property
    def num_broken(self) -> int:
        """How many samples broke while decoding so far, in this process and its workers."""
        return len(self._broken)

    @property
    def sizes(self) -> np.ndarray:
        """(samples,) of dtype SIZES, in order; known after a check of every sample."""
        if len(self._sizes) != len(self):
            raise ValueError(
                f"the lengths of {len(self._sizes)} of {len(self)} samples are known; check every sample: "
                "check=True, and measure_all=True for rows made on demand"
            )
        return self._sizes

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, in order; known after a check of every sample."""
        return self.sizes["tokens"]

    def statistics(self) -> Statistics:
        """Counts for the plan; extrapolated from the spot check for rows made on demand."""
        share = len(self) / max(len(self._sizes), 1)
        totals = {name: round(int(self._sizes[name].sum(dtype=np.int64)) * share) for name in SIZES.names}
        return Statistics(
            num_samples=len(self),
            num_skipped=len(self.skipped),
            num_shrunk=round(len(self._shrunk) * share),
            total_tokens=totals["tokens"],
            learned_tokens=totals["learned"],
            visual_tokens=totals["visual"],
            longest=int(self._sizes["tokens"].max(initial=0)),
            is_estimate=len(self._sizes) != len(self),
            kinds={kind: round(count * share) for kind, count in self._kinds.items()},
            num_empty_thinking=round(self._num_empty_thinking * share),
            num_placed=round(self._num_placed * share),
            unused_keys={key: round(count * share) for key, count in self._unused_keys.most_common()},
        )

    def write_skipped(self, path: str | Path) -> None:
        """Append the samples left out as JSON lines, those that the file does not list yet."""
        if self.skipped:
            append_skipped(path, self.source, self.skipped)

    def row_index(self, index: int) -> int:
        """Which row sample `index` is; rows that are left out are not counted."""
        return int(self._kept[index])

    def sample_and_budget(self, row_index: int) -> tuple[Sample, Budget | None]:
        """A row, and the pixel budget that it is decoded with, None for text.

        Raises:
            SampleError: the row is malformed, or a file is missing.
        """
        sample = self._sample(row_index)
        if sample.kind == "text":
            return sample, None
        if row_index in self._checked:
            return sample, self._shrunk.get(row_index, self.limits.budget(sample.kind))
        return sample, measure(sample, self.processor, self.limits, self.length_limits).budget

    def use_cache(self, visuals: CachedVisuals) -> None:
        """From now on items carry `visual_embeds` (M, H), (0, H) for text, and nothing is decoded: `pixel_values` and
        `grid_thws` are None.

        Raises:
            DataError: a sample has a defect that may not be skipped, or all have.
        """
        bad = {row_index: found for row_index, found in visuals.rows.items() if isinstance(found, Defect)}
        if bad and (self.on_bad_sample == "error" or len(bad) == len(self)):
            self._raise(bad)
        self._visuals = visuals

    def _encode(self, row_index: int) -> dict[str, torch.Tensor | None]:
        """Decode and tokenize one row.

        Raises:
            SampleError: the row is malformed, or a picture cannot be decoded.
        """
        if self._visuals is not None:
            return self._encode_cached(row_index)
        sample = self._sample(row_index)
        budget = None
        if sample.kind != "text":
            budget = self._shrunk.get(row_index, self.limits.budget(sample.kind))
        item = self._encode_with(sample, budget)
        if len(item["input_ids"]) > self.length_limits.of(sample)[1]:
            # only a row that was not checked beforehand can be too long
            found = measure(sample, self.processor, self.limits, self.length_limits)
            item = self._encode_with(sample, found.budget)
        return item

    def _encode_cached(self, row_index: int) -> dict[str, torch.Tensor | None]:
        sample = parse_sample(self.rows[row_index])
        embeds, grids = self._visuals.read(row_index)
        item = {**self.processor.encode_training(sample.conversations, grids=grids), "visual_embeds": embeds}
        if len(item["input_ids"]) > self.length_limits.of(sample)[1]:
            # text that was not checked beforehand; this raises what is wrong with it
            measure(sample, self.processor, self.limits, self.length_limits)
        return item

    def _encode_with(self, sample: Sample, budget: Budget | None) -> dict[str, torch.Tensor | None]:
        patched = self.patches(sample, budget)
        pixels, grids = [pixels for pixels, _ in patched], [grid for _, grid in patched]
        return self.processor.encode_training(sample.conversations, pixels, grids)

    def patches(self, sample: Sample, budget: Budget | None) -> list[tuple[np.ndarray, Grid]]:
        """Patches and grid of each visual input, decoded.

        Raises:
            SampleError: a file cannot be decoded, or a tool call fails.
        """
        try:
            if sample.video is not None:
                inputs = [self.processor.load_frames(sample.video, self.limits)]
            else:
                inputs = [[image] for image in tool_images(sample, partial(open_image, **self._bounds(budget)))]
            cut = patchify_bytes if self.raw_pixels else patchify
            return [cut(frames, *budget) for frames in inputs]
        except SampleError:
            raise
        except (ArithmeticError, OSError, ValueError) as error:
            raise SampleError(sample.visual_field, str(error), "Replace the file, or remove the sample") from error

    def _bounds(self, budget: Budget | None) -> dict[str, float]:
        """What `open_image` is to know of the limits, where its defaults do not say it."""
        limit = self.limits.max_image_megapixels
        if budget is None or (limit == MAX_IMAGE_MEGAPIXELS and budget[1] <= SINGLE_IMAGE_PIXELS[1]):
            return {}
        return {"max_megapixels": limit, "max_pixels": budget[1]}

    def _sample(self, row_index: int, suggest: bool = True) -> Sample:
        return locate(parse_sample(self.rows[row_index]), self.folder, suggest)

    def _check(self, rows: range, show_progress: bool) -> None:
        """Form and files of every row first; then picture headers and lengths. Rows made on demand are made once."""
        self._checked = rows
        bad: dict[int, Defect] = {}
        for row_index in () if self.is_generated else rows:
            try:
                # looking for neighbours reads folders: only where the message is shown
                self._sample(row_index, suggest=len(bad) < _MAX_LISTED)
            except SampleError as error:
                bad[row_index] = self.defect(row_index, error)
        if bad and self.on_bad_sample == "error":
            self._raise(bad, " Picture headers and lengths are checked once these are mended.")

        console = Console(stderr=True)
        is_hidden = not (show_progress and console.is_terminal) or len(rows) < _SPOT_CHECK
        sizes, num_good = np.zeros(len(rows), SIZES), 0
        for row_index in track(rows, f"checking {Path(self.source).name}", console=console, disable=is_hidden):
            if row_index in bad:
                continue
            try:
                sizes[num_good] = self._measure(row_index)
                num_good += 1
            except SampleError as error:
                bad[row_index] = self.defect(row_index, error)
        self._sizes = sizes[:num_good]
        self._settle(bad)

    def _measure(self, row_index: int) -> tuple[int, int, int, int]:
        sample = self._sample(row_index)
        found = measure(sample, self.processor, self.limits, self.length_limits)
        self._kinds[sample.kind] += 1
        self._unused_keys.update(sample.unused_keys)
        self._num_empty_thinking += sample.num_empty_thinking
        self._num_placed += sample.num_placed
        if found.is_shrunk:
            self._shrunk[row_index] = found.budget
        return found.num_tokens, found.num_learned, found.num_visual, found.num_patch_pairs

    def _settle(self, bad: dict[int, Defect]) -> None:
        """Raise for defects that are errors, leave out those that may be skipped."""
        fatal = {index: defect for index, defect in bad.items() if not self._may_skip(defect)}
        if fatal:
            self._raise(fatal)
        self.skipped = [bad[index] for index in sorted(bad)]
        self._kept = np.setdiff1d(self._kept, list(bad))
        if not len(self):
            raise DataError(
                f"{self.source}: every sample is left out; the first: {self.skipped[0].describe(self.source)}"
            )

    def _may_skip(self, defect: Defect) -> bool:
        return self.on_bad_sample == "skip" or (defect.is_long and self.length_limits.on_long_sample == "skip")

    def _raise(self, bad: dict[int, Defect], more: str = "") -> None:
        listed = [f"  {bad[index].describe(self.source)}" for index in sorted(bad)[:_MAX_LISTED]]
        rest = f"\n  ... and {len(bad) - _MAX_LISTED} more" if len(bad) > _MAX_LISTED else ""
        noun = "sample has a defect" if len(bad) == 1 else "samples have defects"
        raise DataError(
            f"{len(bad)} of {len(self.rows)} {noun}:\n" + "\n".join(listed) + rest
            + f"\nMend them, or set on_bad_sample to skip.{more}"
        )  # fmt: skip

    def defect(self, row_index: int, error: SampleError) -> Defect:
        """The error as the record of a row that cannot be used."""
        row = self.rows[row_index]
        name, origin = (row.get("id"), row.get(ORIGIN_KEY)) if isinstance(row, dict) else (None, None)
        return Defect(
            index=row_index,
            id=_short_id(name),
            field=error.field,
            problem=error.problem,
            cure=error.cure,
            is_long=isinstance(error, LongSampleError),
            origin=origin if isinstance(origin, str) else None,
        )

    def _note_skipped(self, defect: Defect) -> None:
        logger.warning("left out while training: %s", defect.describe(self.source))
        if self.skipped_path is not None:
            append_skipped(self.skipped_path, self.source, [defect])


def _short_id(name) -> str | None:
    """A row's id for messages and records; other things than text and numbers are a defect of their own."""
    if not isinstance(name, (str, int, float)):
        return None
    return label(name)
