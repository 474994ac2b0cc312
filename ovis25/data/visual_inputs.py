"""What a pass over the visual inputs reads: the keys of every sample, then the pixels of what no file holds yet.

Both are datasets for a DataLoader, so that workers hash and decode.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import Dataset

from ovis25.data.checks import Budget, Defect, Grid, grids_of, tool_images, visual_sizes
from ovis25.data.dataset import ConversationDataset
from ovis25.data.schema import Sample, SampleError, ToolImage
from ovis25.data.visual_cache import VisualCache, content_digest
from ovis25.processing import VisualLimits
from ovis25.processing.image import ImageSource, num_visual_tokens, open_image
from ovis25.processing.video import sample_frames


class SampleKeys(Dataset):
    """Item i: (row index, [(key, number of visual tokens), ...] or a `Defect`) of the dataset's sample i.

    Files are read, but no picture is decoded, unless a tool makes another one of it.
    """

    def __init__(self, dataset: ConversationDataset, cache: VisualCache):
        self.dataset, self.cache = dataset, cache
        self._digests: dict[Path, str] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, list[tuple[str, int]] | Defect]:
        row_index = self.dataset.row_index(index)
        try:
            sample, budget = self.dataset.sample_and_budget(row_index)
            return row_index, [] if budget is None else self._keys(sample, budget, self.dataset.limits)
        except SampleError as error:
            return row_index, self.dataset.defect(row_index, error)

    def _keys(self, sample: Sample, budget: Budget, limits: VisualLimits) -> list[tuple[str, int]]:
        try:
            grids = grids_of(visual_sizes(sample, limits), budget)
            if sample.video is None:
                keys = [self.cache.key("image", [digest], budget, None) for digest in self._image_digests(sample)]
            elif isinstance(sample.video, list):
                frames = sample_frames(sample.video, limits.min_frames, limits.max_frames)
                keys = [self.cache.key("video", [self._digest(frame) for frame in frames], budget, None)]
            else:
                frame_limits = (limits.min_frames, limits.max_frames)
                keys = [self.cache.key("video", [self._digest(sample.video)], budget, frame_limits)]
        except SampleError:
            raise
        except (OSError, ValueError) as error:
            raise SampleError(sample.visual_field, str(error), "Replace the file, or remove the sample") from error
        return [(key, num_visual_tokens(grid)) for key, grid in zip(keys, grids, strict=True)]

    def _image_digests(self, sample: Sample) -> list[str]:
        if not any(isinstance(image, ToolImage) for image in sample.images):
            return [self._digest(image) for image in sample.images]
        made = tool_images(sample, partial(open_image, max_megapixels=self.dataset.limits.max_image_megapixels))
        return [
            content_digest(picture) if isinstance(image, ToolImage) else self._digest(image)
            for image, picture in zip(sample.images, made, strict=True)
        ]

    def _digest(self, source: ImageSource) -> str:
        if not isinstance(source, Path):
            return content_digest(source)
        if source not in self._digests:
            self._digests[source] = content_digest(source)
        return self._digests[source]


@dataclass(frozen=True)
class Unit:
    """Visual inputs of one sample that are to be computed: the keys at some of its positions."""

    dataset: int
    row_index: int
    keys: dict[int, str]


class Patches(Dataset):
    """Item i: [(key, (N, 768) pixels, grid), ...] of unit i, decoded, or the `Defect` that prevents it."""

    def __init__(self, datasets: list[ConversationDataset], units: list[Unit]):
        self.datasets, self.units = datasets, units

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, index: int) -> list[tuple[str, torch.Tensor, Grid]] | Defect:
        unit = self.units[index]
        dataset = self.datasets[unit.dataset]
        try:
            visuals = dataset.patches(*dataset.sample_and_budget(unit.row_index))
        except SampleError as error:
            return dataset.defect(unit.row_index, error)
        return [(key, torch.from_numpy(visuals[place][0]), visuals[place][1]) for place, key in unit.keys.items()]
