"""The training set: samples that were looked at once, decoded lazily, one item a sample."""

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from ovis25.constants import IGNORE_INDEX, MAX_IMAGE_MEGAPIXELS, SINGLE_IMAGE_PIXELS
from ovis25.data.errors import DataError, SampleError
from ovis25.data.measure import Budget, Grid, LengthLimits, Rules, measure, unreadable
from ovis25.data.samples import Defect, Samples
from ovis25.data.schema import Sample, ToolImage
from ovis25.data.skipped import BrokenSamples, append_skipped
from ovis25.data.survey import Statistics, Survey, make_survey
from ovis25.data.survey_text import defects_text
from ovis25.data.tool_images import tool_images
from ovis25.processing import Ovis2_5Processor, VisualLimits
from ovis25.processing.image import open_image, patchify, patchify_bytes
from ovis25.tools import Tool, Toolbox, as_toolbox

logger = logging.getLogger(__name__)

Item = dict[str, torch.Tensor | None]


class SampleDataset(Dataset):
    """The samples that a survey keeps, as the model's training items.

    Item i is a dict of 1-D int64 `input_ids` and `labels`, and `pixel_values` (N, 768) float32 and `grid_thws`
    (k, 3) int64, both None for text. With `on_bad_sample` "skip" a sample that breaks while decoding is a neutral item:
    two tokens, no label, no visual, so that it counts in no loss and every rank takes its steps.

    Args:
        samples, survey, rules: the rows, what was found of them, and what they are encoded with.
        on_bad_sample: "error" lists all defects, "skip" leaves such samples out (see `skipped`).
        raw_pixels: `pixel_values` as uint8 (a quarter of the traffic), which the model turns into the same float32.
        skipped_path: where a sample that breaks while decoding is noted; None notes it nowhere.

    Raises:
        DataError: the survey has defects that may not be skipped, leaves nothing, or is of other rows or rules.
    """

    def __init__(
        self,
        samples: Samples,
        survey: Survey,
        rules: Rules,
        *,
        on_bad_sample: str = "error",
        raw_pixels: bool = False,
        skipped_path: str | Path | None = None,
    ):
        survey.check_fits(samples, rules)
        self.samples, self.survey, self.rules = samples, survey, rules
        self.rows, self.source, self.folder = samples.rows, samples.source, samples.folder
        self.processor, self.limits, self.length_limits = rules.processor, rules.limits, rules.lengths
        # left out before the first item was made
        self.skipped = list(survey.defects)
        self.on_bad_sample, self.raw_pixels, self.skipped_path = on_bad_sample, raw_pixels, skipped_path
        self._check_usable()
        self._broken = BrokenSamples(len(self))

    def __len__(self) -> int:
        return len(self.survey.kept)

    def __getitem__(self, index: int) -> Item:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        item = self.read(index)
        return self.neutral_item() if item is None else item

    def read(self, index: int) -> Item | None:
        """Item `index`; None where it breaks while decoding and may be skipped, which is noted in `skipped_path`.

        Raises:
            DataError: it breaks and may not be skipped, or every sample has.
        """
        index %= len(self)
        row_index = self.row_index(index)
        try:
            return self.encode(row_index)
        except SampleError as error:
            defect = self.samples.defect(row_index, error)
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

    def neutral_item(self) -> Item:
        """What stands for a sample that broke: text without any label."""
        ids = torch.full((2,), self.processor.tokenizer.pad_token_id)
        labels = torch.full_like(ids, IGNORE_INDEX)
        return {"input_ids": ids, "labels": labels, "pixel_values": None, "grid_thws": None}

    @property
    def num_broken(self) -> int:
        """How many samples broke while decoding so far, in this process and its workers."""
        return len(self._broken)

    @property
    def sizes(self) -> np.ndarray:
        """(samples,) of dtype `survey.SIZES`, in order; known after a check of every sample."""
        if len(self.survey.sizes) != len(self):
            raise ValueError(
                f"the lengths of {len(self.survey.sizes)} of {len(self)} samples are known; check every sample: "
                "check=True, and measure_all=True for rows made on demand"
            )
        return self.survey.sizes

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, in order; known after a check of every sample."""
        return self.sizes["tokens"]

    def statistics(self) -> Statistics:
        """Counts for the plan; extrapolated from the spot check for rows made on demand."""
        return self.survey.statistics()

    def write_skipped(self, path: str | Path) -> None:
        """Append the samples left out as JSON lines, those that the file does not list yet."""
        if self.skipped:
            append_skipped(path, self.source, self.skipped)

    def row_index(self, index: int) -> int:
        """Which row sample `index` is; rows that are left out are not counted."""
        return int(self.survey.kept[index])

    def sample_and_budget(self, row_index: int) -> tuple[Sample, Budget | None]:
        """A row, and the pixel budget that it is decoded with, None for text.

        Raises:
            SampleError: the row is malformed, or a file is missing.
        """
        sample = self.samples[row_index]
        if sample.kind == "text":
            return sample, None
        if row_index in self.survey.checked:
            return sample, self._known_budget(row_index, sample)
        return sample, measure(sample, self.rules).budget

    def encode(self, row_index: int) -> Item:
        """Decode and tokenize one row.

        Raises:
            SampleError: the row is malformed, or a picture cannot be decoded.
        """
        sample = self.samples[row_index]
        item = self._encode_with(sample, self._known_budget(row_index, sample))
        if len(item["input_ids"]) > self.rules.lengths.of(sample)[1]:
            # only a row that was not checked beforehand can be too long
            item = self._encode_with(sample, measure(sample, self.rules).budget)
        return item

    def patches(self, sample: Sample, budget: Budget | None) -> list[tuple[np.ndarray, Grid]]:
        """Patches and grid of each visual input, decoded.

        Raises:
            SampleError: a file cannot be decoded, or a tool call fails.
        """
        try:
            if sample.video is not None:
                inputs = [self.processor.load_frames(sample.video, self.limits)]
            else:
                read = partial(open_image, **self._bounds(budget))
                # one at a time where no tool needs the others: a row may name many large pictures
                has_calls = any(isinstance(image, ToolImage) for image in sample.images)
                images = tool_images(sample, read, self.rules.tools) if has_calls else map(read, sample.images)
                inputs = ([image] for image in images)
            cut = patchify_bytes if self.raw_pixels else patchify
            return [cut(frames, *budget) for frames in inputs]
        except SampleError:
            raise
        except (ArithmeticError, OSError, ValueError) as error:
            raise unreadable(sample, error) from error

    def _known_budget(self, row_index: int, sample: Sample) -> Budget | None:
        if sample.kind == "text":
            return None
        return self.survey.shrunk.get(row_index) or self.limits.budget(sample.kind)

    def _encode_with(self, sample: Sample, budget: Budget | None) -> Item:
        patched = self.patches(sample, budget)
        pixels, grids = [pixels for pixels, _ in patched], [grid for _, grid in patched]
        return self.processor.encode_training(sample.conversations, pixels, grids)

    def _bounds(self, budget: Budget | None) -> dict[str, float]:
        """What `open_image` is to know of the limits, where its defaults do not say it."""
        limit = self.limits.max_image_megapixels
        if budget is None or (limit == MAX_IMAGE_MEGAPIXELS and budget[1] <= SINGLE_IMAGE_PIXELS[1]):
            return {}
        return {"max_megapixels": limit, "max_pixels": budget[1]}

    def _check_usable(self) -> None:
        """Refuse defects that may not be skipped, a survey that ended early, and one that leaves nothing."""
        survey = self.survey
        fatal = [defect for defect in survey.defects if not survey.is_whole or not self._may_skip(defect)]
        if fatal:
            refuse(fatal, survey)
        if survey.defects and not len(self):
            raise DataError(
                f"{self.source}: every sample is left out; the first: {survey.defects[0].describe(self.source)}"
            )

    def _may_skip(self, defect: Defect) -> bool:
        return self.on_bad_sample == "skip" or (defect.is_long and self.rules.lengths.on_long_sample == "skip")

    def _note_skipped(self, defect: Defect) -> None:
        logger.warning("left out while training: %s", defect.describe(self.source))
        if self.skipped_path is not None:
            append_skipped(self.skipped_path, self.source, [defect])


def refuse(defects: Sequence[Defect], survey: Survey) -> None:
    """Raise DataError: the rows have these defects."""
    note = "" if survey.is_whole else " Picture headers and lengths are checked once these are mended."
    raise DataError(defects_text(defects, survey.num_rows, survey.source, note))


class ConversationDataset(SampleDataset):
    """Samples in the documented format, read, looked at and encoded: the whole way from a file to items.

    Args:
        data_path: a data file (see `source.read_rows`), or a sequence of rows. A list is checked like a file; of any
            other sequence (rows made on demand) about 256 rows, evenly spread, are checked, and the statistics are
            estimates, unless `measure_all`.
        processor: of the checkpoint that is trained.
        image_folder: where relative paths start; by default the data file's folder.
        multimodal_max_length, text_max_length: longest sequences, with and without visuals.
        on_long_sample: "shrink" lowers that sample's pixel budget until it fits, "skip", or "error".
        check: False trusts the data: nothing is read beforehand, lengths and statistics are not known.
        measure_all: check rows made on demand one by one too: packing and grouping by length need every length.
        show_progress: a progress bar on standard error while checking.
        tools: that make the pictures which answers' calls show: a `Toolbox`, or tools; by default the built-in ones.
        survey: one that was made before, of the same rows and settings (`Survey.load`): nothing is checked again.
        on_bad_sample, raw_pixels, skipped_path: as in `SampleDataset`.
        single_image_min_pixels, ..., max_frames: the fields of `VisualLimits`.

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
        tools: Toolbox | Iterable[Tool] | None = None,
        survey: Survey | None = None,
        skipped_path: str | Path | None = None,
        **limits: int,
    ):
        samples = Samples.of(data_path, image_folder)
        lengths = LengthLimits(multimodal_max_length, text_max_length, on_long_sample)
        rules = Rules(processor, VisualLimits(**limits), lengths, as_toolbox(tools))
        if survey is None and check:
            stops_at_form = on_bad_sample == "error"
            survey = make_survey(
                samples, rules, stops_at_form=stops_at_form, measure_all=measure_all, show_progress=show_progress
            )
        survey = survey or Survey(samples.source, len(samples))
        taken = {"on_bad_sample": on_bad_sample, "raw_pixels": raw_pixels, "skipped_path": skipped_path}
        super().__init__(samples, survey, rules, **taken)
