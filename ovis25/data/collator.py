"""Items to a batch: text padded on the right, patches of all samples in one row."""

import torch

from ovis25.constants import IGNORE_INDEX


class Collator:
    """Args: `pad_token_id` fills short rows; their attention mask is 0 and their labels are -100."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `attention_mask`, `labels` (B, T) int64; `pixel_values` and `grid_thws` where any item
        has visuals, in the items' order; `visual_embeds` (M, H) where the items have them, (0, H) without visuals.
        """
        ids = [item["input_ids"] for item in items]
        batch = {
            "input_ids": _pad(ids, self.pad_token_id),
            "attention_mask": _pad([torch.ones_like(row) for row in ids], 0),
            "labels": _pad([item["labels"] for item in items], IGNORE_INDEX),
        }
        visual = [item for item in items if item["pixel_values"] is not None]
        if visual:
            for name in ("pixel_values", "grid_thws"):
                batch[name] = torch.cat([item[name] for item in visual])
        if "visual_embeds" in items[0]:
            batch["visual_embeds"] = torch.cat([item["visual_embeds"] for item in items])
        return batch


def _pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
