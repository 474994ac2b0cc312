"""Which samples share a row: few rows, none over the capacity, and nearly equal work in each.

Why two goals: rows that are full waste no memory and no launch, but full rows do not cost the same. Attention costs the
square of a sample's length and pictures cost the encoder, so one sample of 8,000 tokens is dearer than eighty of 100.
Devices wait for the dearest row of a step; even rows are what makes them all work.

1. `_best_fit` decides how many rows there are, by tokens alone: samples by falling length, each into the fullest row
   that has room. `_split_rows` adds the few that make their number a multiple.
2. `_even_out` lets samples change places between dear and cheap rows until the rows cost about the same. A little free
   room in each row (`_SLACK`) gives it something to move.

Only numbers are looked at, so a million samples take seconds.
"""

from dataclasses import dataclass

import numpy as np

# the share of a row that may stay free so that samples can change places, where that costs no more rows
_SLACK = 0.01
# rows whose costs differ by less, as a share of the mean, are even enough
_EVEN = 0.01
# what is tried at most: rounds of exchanges, and samples of either row in one exchange
_MAX_ROUNDS = 40
_NUM_TRIED = 12
# rounds that may gain next to nothing before it ends: each round tries other exchanges
_NUM_STALLS = 3
# pairs of rows looked at together, which bounds the memory
_CHUNK = 1024
# where the samples' order is kept: rows that are packed at a time, more in sets of more than so many windows
_WINDOW_ROWS, _NUM_WINDOWS = 64, 256
# costs are rounded to this share of the highest: sums are then exact, and the same on every machine
_COST_STEPS = 2**20


@dataclass(frozen=True)
class CostWeights:
    """What one unit of a sample costs, in any unit of work; training takes FLOPs from the model's shapes."""

    token: float
    token_pair: float
    learned: float
    visual: float
    patch_pair: float

    def of(self, sizes: np.ndarray) -> np.ndarray:
        """(samples,) of dtype `survey.SIZES` -> (samples,) float64; the LLM's attention costs tokens squared."""
        tokens, learned, visual, patch_pairs = (sizes[name].astype(np.float64) for name in sizes.dtype.names)
        return (
            self.token * tokens
            + self.token_pair * tokens**2
            + self.learned * learned
            + self.visual * visual
            + self.patch_pair * patch_pairs
        )


def pack(
    tokens: np.ndarray,
    costs: np.ndarray,
    capacity: int,
    seed: int = 0,
    multiple: int = 1,
    keep_order: bool = False,
) -> list[np.ndarray]:
    """Rows of sample indices, each sample in exactly one; the same arguments give the same rows.

    Args:
        tokens: (N,) positive integers.
        costs: (N,) positive numbers, such as `CostWeights.of` gives.
        capacity: tokens of a row, at most.
        seed: decides between samples of equal length, and which exchanges are tried.
        multiple: the number of rows becomes a multiple of it where there are samples enough: so many devices then all
            have a row in the last step.
        keep_order: rows follow the samples' order as far as packing allows: only near neighbours share a row.

    Returns:
        Arrays of ascending indices; the most expensive row first, or with `keep_order` the row of the first sample.

    Example:
        Tokens 6, 6, 4, 4 that cost 9, 1, 9, 1, capacity 10. Best fit makes two full rows, maybe [0, 2] and [1, 3] of
        costs 18 and 2. Sample 2 for sample 3, and the rows [0, 3] and [1, 2] cost 10 each.

    Raises:
        ValueError: a sample is empty, or longer than the capacity.
    """
    tokens, costs = np.asarray(tokens, dtype=np.int64), np.asarray(costs, dtype=np.float64)
    is_wrong = (tokens < 1) | (tokens > capacity)
    if is_wrong.any():
        index = int(is_wrong.argmax())
        raise ValueError(
            f"sample {index} has {tokens[index]} tokens, but a row takes samples of 1 to {capacity}; raise the capacity"
        )
    costs = np.rint(costs / costs.max(initial=1e-30) * _COST_STEPS).clip(min=1)
    generator = np.random.default_rng(seed)
    if not keep_order:
        return _pack(tokens, costs, capacity, generator, multiple)
    # packing inside windows of neighbours keeps the order: a sample leaves its place by one window at most. Small sets
    # have windows of 64 rows, large ones 256 windows, for each window wastes half a row on average
    window_tokens = max(_WINDOW_ROWS * capacity, int(tokens.sum()) // _NUM_WINDOWS)
    # capacity 10, windows of 20 tokens: tokens 8, 8, 8, 8 end at 8, 16, 24, 32 and are in windows 0, 0, 1, 1
    window_of = (np.cumsum(tokens) - 1) // window_tokens
    windows = np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(window_of)) + 1)
    rows: list[np.ndarray] = []
    for number, window in enumerate(windows, start=1):
        is_last = number == len(windows)
        packed = _pack(tokens[window], costs[window], capacity, generator, multiple if is_last else 1, len(rows))
        rows += sorted((window[row] for row in packed), key=lambda row: row[0])
    return rows


def _pack(tokens, costs, capacity, generator, multiple, num_before=0) -> list[np.ndarray]:
    """As `pack`; `num_before` rows exist already and count for the multiple."""
    if not len(tokens):
        return []
    # equal lengths in random order: else the same neighbours would share a row whatever the seed
    order = generator.permutation(len(tokens))
    order = order[np.argsort(-tokens[order], kind="stable")]
    row_of, num_rows = _best_fit(tokens, order, capacity)
    # a second try with rows a little shorter than they are; where that costs next to no rows more, the free room lets
    # samples change places. A sample longer than the short row counts as exactly filling it
    loose_capacity = max(int(capacity * (1 - _SLACK)), 1)
    loose_row_of, num_loose_rows = _best_fit(np.minimum(tokens, loose_capacity), order, loose_capacity)
    # up to the next multiple: 5 rows for 4 devices become 8, 3 of them cut out of others
    num_wished, num_loose_wished = (
        -(-(num_before + number) // multiple) * multiple - num_before for number in (num_rows, num_loose_rows)
    )
    if num_loose_wished <= num_wished * (1 + 2 * _SLACK):
        row_of, num_rows, num_wished = loose_row_of, num_loose_rows, num_loose_wished
    if num_rows < num_wished <= len(tokens):
        _split_rows(row_of, costs, num_rows, num_wished)
        num_rows = num_wished
    _even_out(row_of, num_rows, tokens, costs, capacity, generator)
    by_row = np.argsort(row_of, kind="stable")
    rows = np.split(by_row, np.cumsum(np.bincount(row_of))[:-1])
    dearest_first = np.argsort(-np.bincount(row_of, costs), kind="stable")
    return [rows[row] for row in dearest_first]


def _best_fit(tokens: np.ndarray, order: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Each sample, in the given order, into the fullest row that has room: (row of each sample, number of rows).

    Example:
        Tokens 6, 5, 4, 3 in this order, capacity 10. 6 opens row 0 (4 free); 5 opens row 1 (5 free); 4 fits both and
        goes where 4 are free, row 0 (0 free); 3 goes into row 1. In the bits of `free_bits`, before the 4: 110000
        (bits 4 and 5); shifted by 4 it is 11, whose lowest bit, 0, says that the fullest row with room has 4 + 0 free.
    """
    # rows_with[f]: the rows that have f tokens free
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]
    # bit f is set while some row has f tokens free: shifting finds the fullest row with room without a search
    free_bits = 0
    num_rows = 0
    row_of = np.empty(len(tokens), dtype=np.int64)
    for sample, size in zip(order.tolist(), tokens[order].tolist(), strict=True):
        with_room = free_bits >> size
        if with_room:
            # `x & -x` keeps the lowest bit alone
            free = size + (with_room & -with_room).bit_length() - 1
            row = rows_with[free].pop()
            if not rows_with[free]:
                free_bits ^= 1 << free
        else:
            row, free = num_rows, capacity
            num_rows += 1
        rows_with[free - size].append(row)
        free_bits |= 1 << (free - size)
        row_of[sample] = row
    return row_of, num_rows


def _split_rows(row_of: np.ndarray, costs: np.ndarray, num_rows: int, num_wished: int) -> None:
    """More rows: each takes every other sample of the dearest row that has several."""
    for new_row in range(num_rows, num_wished):
        is_divisible = np.bincount(row_of) > 1
        dearest = np.where(is_divisible, np.bincount(row_of, costs), 0).argmax()
        members = np.flatnonzero(row_of == dearest)
        row_of[members[np.argsort(-costs[members], kind="stable")][::2]] = new_row


def _even_out(row_of: np.ndarray, num_rows: int, tokens, costs, capacity: int, generator) -> None:
    """Let samples change places between rows until the rows' costs are even, written into `row_of`.

    In each round every row of the dearer half meets one of the cheaper half, drawn at random, and the two make the
    exchange that brings their costs closest together and overfills neither. Pairs are drawn at random: a
    pair without a good exchange is not tried again in every round.
    """
    mean_cost = costs.sum() / num_rows
    num_stalls = 0
    for _ in range(_MAX_ROUNDS):
        used, cost = (np.bincount(row_of, values) for values in (tokens, costs))
        by_cost = np.argsort(cost, kind="stable")
        cheap, dear = generator.permutation(by_cost[: num_rows // 2]), by_cost[::-1][: num_rows // 2]
        is_uneven = cost[dear] - cost[cheap] > _EVEN * mean_cost
        if not is_uneven.any():
            return
        cheap, dear = cheap[is_uneven], dear[is_uneven]
        shuffled = generator.permutation(len(row_of))
        # samples row after row, in random order inside each: other ones come first in the next round
        by_row = shuffled[np.argsort(row_of[shuffled], kind="stable")]
        starts = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
        gain = 0.0
        for first in range(0, len(dear), _CHUNK):
            pair = slice(first, first + _CHUNK)
            gain += _exchange(row_of, dear[pair], cheap[pair], by_row, starts, used, cost, tokens, costs, capacity)
        num_stalls = num_stalls + 1 if gain < _EVEN * mean_cost * len(dear) / 10 else 0
        if num_stalls == _NUM_STALLS:
            return


def _exchange(row_of, dear, cheap, by_row, starts, used, cost, tokens, costs, capacity) -> float:
    """The best exchange of each of P pairs of rows; returns by how much it shrinks the gaps in cost, summed.

    Each row's samples stand in random order in `by_row`, from its `starts` on. The first a of the dear row go to the
    cheap one and the first b of that come back, for all a and b up to _NUM_TRIED (dimensions A and B, with 0).

    Example:
        The dear row holds costs 9, 9 (18 in all), the cheap one 1, 1 (2), so the gap is 16. a = 1, b = 1 moves
        9 - 1 = 8, which the dear row loses and the cheap one gains: the new gap is |16 - 2 * 8| = 0, the best of the
        nine. a = b = 0 moves nothing and keeps the gap of 16: an exchange never makes it worse.
    """
    (dear_PA, *dear_sums), (cheap_PB, *cheap_sums) = (
        _first_samples(rows, by_row, starts, tokens, costs) for rows in (dear, cheap)
    )
    moved_tokens_PAB, moved_cost_PAB = (
        going[:, :, None] - coming[:, None, :] for going, coming in zip(dear_sums, cheap_sums, strict=True)
    )
    gap_P = cost[dear] - cost[cheap]
    # what one row loses the other gains: the gap shrinks by twice what is moved
    new_gap_PAB = np.abs(gap_P[:, None, None] - 2 * moved_cost_PAB)
    # the dear row may take in what it has free (less than nothing moves out), the cheap one likewise
    least_P, most_P = used[dear] - capacity, capacity - used[cheap]
    new_gap_PAB[(moved_tokens_PAB < least_P[:, None, None]) | (moved_tokens_PAB > most_P[:, None, None])] = np.inf
    best_P = np.nanargmin(new_gap_PAB.reshape(len(dear), -1), axis=1)
    gain_P = gap_P - np.take_along_axis(new_gap_PAB.reshape(len(dear), -1), best_P[:, None], 1)[:, 0]
    # place in the flattened (A, B) -> (a, b); nothing moves where nothing is gained
    num_going, num_coming = np.where(gain_P > 0, np.divmod(best_P, new_gap_PAB.shape[2]), 0)
    for samples, counts, to_rows in ((dear_PA, num_going, cheap), (cheap_PB, num_coming, dear)):
        is_moved = np.arange(samples.shape[1]) < counts[:, None]
        row_of[samples[is_moved]] = to_rows.repeat(counts)
    return float(gain_P.clip(min=0).sum())


def _first_samples(rows, by_row, starts, tokens, costs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(P, A - 1) samples that come first in each row, and the (P, A) tokens and costs of the first 0, 1, 2, ... of
    them; where a row has fewer, the sums go on as not a number.
    """
    sizes = starts[rows + 1] - starts[rows]
    places = np.arange(min(_NUM_TRIED, int(sizes.max())))
    samples = by_row[np.minimum(starts[rows][:, None] + places, len(by_row) - 1)]
    is_missing = places >= sizes[:, None]
    sums = []
    for values in (tokens, costs):
        summed = np.zeros((len(rows), len(places) + 1))
        np.cumsum(np.where(is_missing, np.nan, values[samples]), axis=1, out=summed[:, 1:])
        sums.append(summed)
    return samples, *sums
