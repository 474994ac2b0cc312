"""Items to a batch: padded on the right, or packed into one row; visuals of all samples one after the other."""

import torch

from ovis25.constants import IGNORE_INDEX

_VISUAL_KEYS = ("pixel_values", "grid_thws", "visual_embeds")
_ROW_KEYS = ("input_ids", "labels", "position_ids")


class Collator:
    """Args: `pad_token_id` fills short rows; their attention mask is 0 and their labels are -100."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `attention_mask`, `labels` (B, T) int64; `pixel_values` and `grid_thws`, or cached
        `visual_embeds`, where any item has visuals, in the items' order.
        """
        ids = [item["input_ids"] for item in items]
        return {
            "input_ids": _pad(ids, self.pad_token_id),
            "attention_mask": _pad([torch.ones_like(row) for row in ids], 0),
            "labels": _pad([item["labels"] for item in items], IGNORE_INDEX),
            **_join_visuals(items),
        }


class PackedCollator:
    """Rows of a `PackedDataset` to one longer row, which needs neither padding nor a mask."""

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `labels`, `position_ids` (1, T) and `sequence_lengths` (S,) int64, and visuals as
        `Collator` does.
        """
        joined = join_packed(rows)
        return {name: value[None] if name in _ROW_KEYS else value for name, value in joined.items()}


def pack_item(item: dict) -> dict[str, torch.Tensor | None]:
    """A sample as a packed row of its own: `position_ids` from 0, `sequence_lengths` (1,), and a first label of -100,
    so that the sample before it predicts nothing of it.
    """
    length = len(item["input_ids"])
    labels = item["labels"].clone()
    labels[0] = IGNORE_INDEX
    return {
        **item, "labels": labels, "position_ids": torch.arange(length), "sequence_lengths": torch.tensor([length]),
    }  # fmt: skip


def join_packed(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Packed rows one after the other, as one row; keys of visuals only where any row has some."""
    joined = {name: torch.cat([row[name] for row in rows]) for name in (*_ROW_KEYS, "sequence_lengths")}
    return {**joined, **_join_visuals(rows)}


def _join_visuals(items: list[dict]) -> dict[str, torch.Tensor]:
    joined = {}
    for name in _VISUAL_KEYS:
        parts = [item[name] for item in items if item.get(name) is not None]
        if parts:
            joined[name] = torch.cat(parts)
    return joined


def _pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
