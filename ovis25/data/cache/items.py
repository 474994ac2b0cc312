"""Samples whose visuals come from the cache: nothing is decoded any more."""

import torch

from ovis25.data.cache.store import CachedVisuals
from ovis25.data.dataset import SampleDataset, refuse
from ovis25.data.measure import measure
from ovis25.data.samples import Defect


class CachedDataset(SampleDataset):
    """The samples of `dataset`. Items carry `visual_embeds` (M, H), (0, H) for text, and no pixels: `pixel_values` and
    `grid_thws` are None.

    Raises:
        DataError: a sample has a defect that may not be skipped, or all have.
    """

    def __init__(self, dataset: SampleDataset, visuals: CachedVisuals):
        super().__init__(
            dataset.samples,
            dataset.survey,
            dataset.rules,
            on_bad_sample=dataset.on_bad_sample,
            skipped_path=dataset.skipped_path,
        )
        bad = sorted((row_index, found) for row_index, found in visuals.rows.items() if isinstance(found, Defect))
        if bad and (self.on_bad_sample == "error" or len(bad) == len(self)):
            refuse([found for _, found in bad], self.survey)
        self.visuals = visuals

    def neutral_item(self) -> dict[str, torch.Tensor | None]:
        return {**super().neutral_item(), "visual_embeds": self.visuals.cache.read(())[0]}

    def encode(self, row_index: int) -> dict[str, torch.Tensor | None]:
        sample = self.samples.parse(row_index)
        embeds, grids = self.visuals.read(row_index)
        item = {**self.rules.processor.encode_training(sample.conversations, grids=grids), "visual_embeds": embeds}
        if len(item["input_ids"]) > self.rules.lengths.of(sample)[1]:
            # text that was not checked beforehand; this raises what is wrong with it
            measure(sample, self.rules)
        return item
