"""Next-token cross-entropy on the learned rows alone.

Shapes: B batch, T positions, H width, R learned rows.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ovis25.constants import IGNORE_INDEX


def next_token_loss(
    hidden_BTH: torch.Tensor,
    labels_BT: torch.Tensor,
    lm_head: nn.Module,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Mean cross-entropy in float32 over the positions whose next token has a label.

    `num_items_in_batch` replaces the divisor: the learned tokens of the whole optimizer step, over all
    micro-batches (and devices), so that the step's gradient is the mean over its tokens.
    Only the learned rows pass through `lm_head`. A batch without any gives zero, with every parameter still
    in the graph, so that data-parallel ranks stay in step.
    """
    rows_BT, targets_BT = hidden_BTH[:, :-1], labels_BT[:, 1:]
    learned_BT = targets_BT != IGNORE_INDEX
    rows_RH, targets_R = rows_BT[learned_BT], targets_BT[learned_BT]
    if targets_R.numel() == 0:
        return lm_head(hidden_BTH[:, -1]).float().sum() * 0.0
    logits = lm_head(rows_RH).float()
    total = F.cross_entropy(logits, targets_R, reduction="sum", label_smoothing=label_smoothing)
    if num_items_in_batch is None:
        return total / targets_R.numel()
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
