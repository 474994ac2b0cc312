"""Next-token cross-entropy on the learned rows alone, in chunks: the logits of a whole row never exist.

Shapes: B batch, T positions, H width, R learned rows, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ovis25.constants import IGNORE_INDEX
from ovis25.model.recompute import chunk_size, device_memory, in_chunks

# learned rows whose logits exist at once (1024 x 151936 in float32: 622 MB); fewer on small devices
CHUNK_ROWS = 1024


class LmHead(nn.Linear):
    """The LLM's output layer, which also computes its loss: one call of the module, whatever the number of chunks.

    Sharded weights (ZeRO-3, FSDP) are gathered once per call, so ranks may differ in their number of learned rows.
    """

    # the memory that chunks are made for, where it is not that of the device the rows are on
    planned_memory: int | None = None

    def forward(
        self,
        hidden: torch.Tensor,
        targets_R: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        loss_type: str = "nll",
        with_metrics: bool = False,
    ) -> torch.Tensor:
        """(..., V) logits of `hidden` (..., H); with `targets_R` per row of `hidden` (R, H) the loss in float32.

        The loss is (R, 1), or (R, 3) with metrics: loss, entropy in nats and whether the target is on top.
        """
        if targets_R is None:
            return super().forward(hidden)

        def row_losses(hidden_RH: torch.Tensor, targets_R: torch.Tensor) -> torch.Tensor:
            logits_RV = F.linear(hidden_RH, self.weight, self.bias).float()
            losses_R = F.cross_entropy(logits_RV, targets_R, reduction="none", label_smoothing=label_smoothing)
            if loss_type == "dft":
                losses_R = losses_R * torch.exp(-losses_R.detach())
            if z_loss:
                losses_R = losses_R + z_loss * torch.logsumexp(logits_RV, dim=-1) ** 2
            if not with_metrics:
                return losses_R[:, None]
            return torch.stack([losses_R, *_row_metrics(logits_RV.detach(), targets_R)], dim=1)

        size = chunk_size(CHUNK_ROWS, self.out_features, self.planned_memory or device_memory(hidden.device))
        return in_chunks(row_losses, hidden, targets_R, size=size)


def next_token_loss(
    hidden_BTH: torch.Tensor,
    labels_BT: torch.Tensor,
    lm_head: nn.Module,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_type: str = "nll",
    with_metrics: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean cross-entropy in float32 over the positions whose next token has a label; with it, on request, metrics.

    The metrics are float32 (3,), without gradient: over the learned rows the summed entropy (nats), how many have
    their label on top, and their number.

    `num_items_in_batch` replaces the divisor: the learned tokens of the whole optimizer step, over all
    micro-batches (and devices), so that the step's gradient is the mean over its tokens.
    Only the learned rows pass through `lm_head`, an `LmHead`. A batch without any gives zero, with every parameter
    still in the graph, so that data-parallel ranks stay in step.
    `z_loss` adds z_loss * (log of the sum of exponentials of the logits)^2 to each token's loss.
    `loss_type` "dft" weights each token by its own probability (Dynamic Fine-Tuning, arXiv 2508.05629).
    """
    targets_BT = labels_BT[:, 1:]
    learned_BT = targets_BT != IGNORE_INDEX
    rows_RH, targets_R = hidden_BTH[:, :-1][learned_BT], targets_BT[learned_BT]
    if targets_R.numel() == 0:
        nothing = hidden_BTH.new_zeros(3, dtype=torch.float32) if with_metrics else None
        return lm_head(hidden_BTH[:, -1]).float().sum() * 0.0, nothing
    rows = lm_head(rows_RH, targets_R, label_smoothing, z_loss, loss_type, with_metrics)
    if num_items_in_batch is None:
        num_items_in_batch = targets_R.numel()
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(rows.device)
    metrics = None
    if with_metrics:
        entropy, num_right = rows[:, 1:].detach().sum(dim=0)
        metrics = torch.stack([entropy, num_right, entropy.new_tensor(len(targets_R))])
    return rows[:, 0].sum() / num_items_in_batch, metrics


def _row_metrics(logits_RV: torch.Tensor, targets_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_probs_RV = torch.log_softmax(logits_RV, dim=-1)
    entropy_R = -(log_probs_RV.exp() * log_probs_RV).sum(dim=-1)
    return entropy_R, (logits_RV.argmax(dim=-1) == targets_R).float()
