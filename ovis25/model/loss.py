"""Next-token cross-entropy on the learned rows alone.

Shapes: B batch, T positions, H width, R learned rows, V vocabulary.
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
    loss_type: str = "nll",
    with_metrics: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean cross-entropy in float32 over the positions whose next token has a label; with it, on request, metrics.

    The metrics are float32 (3,), without gradient: over the learned rows the summed entropy (nats), how many have
    their label on top, and their number.

    `num_items_in_batch` replaces the divisor: the learned tokens of the whole optimizer step, over all
    micro-batches (and devices), so that the step's gradient is the mean over its tokens.
    Only the learned rows pass through `lm_head`. A batch without any gives zero, with every parameter still
    in the graph, so that data-parallel ranks stay in step.
    `loss_type` "dft" weights each token by its own probability (Dynamic Fine-Tuning, arXiv 2508.05629).
    """
    rows_BT, targets_BT = hidden_BTH[:, :-1], labels_BT[:, 1:]
    learned_BT = targets_BT != IGNORE_INDEX
    rows_RH, targets_R = rows_BT[learned_BT], targets_BT[learned_BT]
    if targets_R.numel() == 0:
        nothing = hidden_BTH.new_zeros(3, dtype=torch.float32) if with_metrics else None
        return lm_head(hidden_BTH[:, -1]).float().sum() * 0.0, nothing
    logits_RV = lm_head(rows_RH).float()
    losses_R = F.cross_entropy(logits_RV, targets_R, reduction="none", label_smoothing=label_smoothing)
    if loss_type == "dft":
        losses_R = losses_R * torch.exp(-losses_R.detach())
    if num_items_in_batch is None:
        num_items_in_batch = targets_R.numel()
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(losses_R.device)
    metrics = _token_metrics(logits_RV.detach(), targets_R) if with_metrics else None
    return losses_R.sum() / num_items_in_batch, metrics


def _token_metrics(logits_RV: torch.Tensor, targets_R: torch.Tensor) -> torch.Tensor:
    log_probs_RV = torch.log_softmax(logits_RV, dim=-1)
    entropy = -(log_probs_RV.exp() * log_probs_RV).sum()
    num_right = (logits_RV.argmax(dim=-1) == targets_R).sum()
    return torch.stack([entropy, num_right.float(), entropy.new_tensor(len(targets_R))])
