"""In which order items are trained: a function of seed and epoch, so that a resumed run goes on where it was."""

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler


class RowSampler(Sampler):
    """Packed rows shuffled so that rows that run at the same time cost about the same.

    Rows are sorted by cost and cut into groups of `group_size`, the rows of all devices in one micro-step; groups come
    in random order, and so do the rows inside a group. Where the rows do not divide, those that form the last, smaller
    group are drawn at random.

    Example:
        Costs 1, 9, 2, 8 in groups of two: [1, 2] and [8, 9] in some order, each in some order, and never 1 beside 9,
        which would let one device wait for the other.

    Args:
        costs: (rows,).
        group_size: devices times rows of one device; Trainer gives each device `group_size / devices` neighbours.
        seed: of the shuffling, with the epoch.
    """

    def __init__(self, costs: np.ndarray, group_size: int, seed: int):
        self.costs, self.group_size, self.seed = np.asarray(costs), group_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.costs)

    def __iter__(self):
        generator = np.random.default_rng((self.seed, self.epoch))
        shuffled = generator.permutation(len(self.costs))
        num_whole = len(shuffled) // self.group_size * self.group_size
        whole, rest = shuffled[:num_whole], shuffled[num_whole:]
        groups = whole[np.argsort(self.costs[whole], kind="stable")].reshape(-1, self.group_size)
        groups = generator.permuted(generator.permutation(groups), axis=1)
        return iter([*groups.flatten().tolist(), *rest.tolist()])


class LengthSampler(LengthGroupedSampler):
    """transformers' grouping by length, from lengths that are known; the same seed and epoch give the same order."""

    def __init__(self, batch_size: int, lengths: np.ndarray, seed: int):
        super().__init__(batch_size, lengths=lengths.tolist())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer before each epoch."""
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class LengthView(Dataset):
    """A dataset whose items have the right length and nothing else, for a sampler that would decode every sample."""

    def __init__(self, dataset):
        self.lengths = dataset.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, range]:
        return {"input_ids": range(self.lengths[index])}
