"""Packed rows as a dataset of their own: item i is made of whole samples, decoded lazily."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from ovis25.data.collator import join_packed, pack_item
from ovis25.data.dataset import ConversationDataset
from ovis25.data.packing import CostWeights, pack


@dataclass
class PackingSummary:
    """`fill` is the share of the rows' capacity that tokens take; `cost_spread` the standard deviation of the rows'
    estimated costs, as a share of their mean.
    """

    num_rows: int
    capacity: int
    fill: float
    cost_spread: float


class PackedDataset(Dataset):
    """Samples of a dataset, several to a row.

    Item i is a dict of 1-D int64 `input_ids`, `labels`, `position_ids` (from 0 in each sample; the first label of each
    is -100) and `sequence_lengths` (tokens of each sample), and the samples' visuals in order, as the dataset has them.

    A sample that breaks while decoding is left out of its row where the dataset may skip it. A row without any sample
    left is the dataset's neutral item, which nothing is learned from.

    Args:
        dataset: whose every sample is measured.
        rows: indices of the dataset, one array a row.
        costs: of each row; what `RowSampler` evens out.
        capacity: tokens that a row may hold.
    """

    def __init__(self, dataset: ConversationDataset, rows: list[np.ndarray], costs: np.ndarray, capacity: int):
        self.dataset, self.costs, self.capacity = dataset, costs, capacity
        # two arrays, not a list of a hundred thousand: workers share them
        self._members = np.concatenate(rows)
        self._ends = np.cumsum([len(row) for row in rows])

    @classmethod
    def of(
        cls, dataset: ConversationDataset, weights: CostWeights, capacity: int, seed: int, multiple: int, in_order: bool
    ) -> "PackedDataset":
        """The dataset packed; a sample longer than the capacity raises it to its own length. See `packing.pack`."""
        tokens, costs = dataset.lengths, weights.of(dataset.sizes)
        capacity = max(capacity, int(tokens.max()))
        rows = pack(tokens, costs, capacity, seed, multiple, in_order)
        return cls(dataset, rows, np.array([costs[row].sum() for row in rows]), capacity)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | None]:
        samples = self.samples_of(index).tolist()
        items = [item for item in map(self.dataset.read, samples) if item is not None]
        items = items or [self.dataset.neutral_item()]
        return join_packed([pack_item(item) for item in items])

    def samples_of(self, index: int) -> np.ndarray:
        """Indices of the row's samples in the dataset, in the order in which they stand in the row."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        return self._members[self._ends[index - 1] if index else 0 : self._ends[index]]

    def summary(self) -> PackingSummary:
        num_tokens = int(self.dataset.lengths.sum(dtype=np.int64))
        fill = num_tokens / (len(self) * self.capacity)
        return PackingSummary(len(self), self.capacity, fill, float(self.costs.std() / self.costs.mean()))
