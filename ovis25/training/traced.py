"""Which samples a batch is made of: batches carry their items' indices, so that a broken step can name them."""

from collections.abc import Callable, Iterable

import numpy as np
from torch.utils.data import Dataset

from ovis25.data.datainfo import ORIGIN_KEY
from ovis25.data.packed import PackedDataset

INDICES_KEY = "sample_indices"
_INDEX_KEY = "sample_index"


class TracedDataset(Dataset):
    """`dataset`, whose items also say which they are."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def lengths(self) -> np.ndarray:
        return self.dataset.lengths

    def __getitem__(self, index: int) -> dict:
        return {**self.dataset[index], _INDEX_KEY: index}


class TracedCollator:
    """`collator`, whose batches of traced items hold a list of their indices under INDICES_KEY."""

    def __init__(self, collator: Callable[[list[dict]], dict]):
        self.collator = collator

    def __call__(self, items: list[dict]) -> dict:
        return {**self.collator(items), INDICES_KEY: [item[_INDEX_KEY] for item in items if _INDEX_KEY in item]}


def untraced(dataset: Dataset) -> Dataset:
    """The dataset behind a TracedDataset; any other as it is."""
    return dataset.dataset if isinstance(dataset, TracedDataset) else dataset


def sample_names(dataset: Dataset, indices: Iterable[int]) -> list[str]:
    """File and index, and the id where there is one, of each sample: `train.json[3] (id "s3")`."""
    dataset = untraced(dataset)
    if isinstance(dataset, PackedDataset):
        members = [int(sample) for index in indices for sample in dataset.samples_of(index)]
        return sample_names(dataset.dataset, members)
    return [_name(dataset, int(index)) for index in indices]


def _name(dataset: Dataset, index: int) -> str:
    if not hasattr(dataset, "row_index"):
        return f"sample {index}"
    row_index = dataset.row_index(index)
    row = dataset.rows[row_index]
    place = row.get(ORIGIN_KEY) or f"{dataset.source}[{row_index}]"
    return place if row.get("id") is None else f'{place} (id "{row["id"]}")'
