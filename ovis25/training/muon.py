"""`optim: muon`: Muon for the weight matrices of both towers' layers, AdamW for everything else.

Muon (K. Jordan et al., https://kellerjordan.github.io/posts/muon/) keeps one momentum where AdamW keeps two moments,
and is meant for matrices between hidden states: embeddings, lm_head, vte, the visual head, the patch embedding, norms
and biases stay with AdamW. Updates have AdamW's root mean square (J. Liu et al., "Muon is Scalable for LLM Training",
arXiv 2502.16982, section 2.2), so that its learning rates and weight decay keep their meaning.
"""

import re
from collections.abc import Collection

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from ovis25.training.config import MUON, ConfigError

_LAYERS = re.compile(r"(llm\.model|visual_tokenizer\.vit\.vision_model\.encoder)\.layers\.\d+\.")


def layer_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained matrices of both towers' layers.

    Raises:
        ConfigError: there is none.
    """
    matrices = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.ndim == 2 and _LAYERS.match(name)
    ]
    if not matrices:
        raise ConfigError(
            f"optim {MUON} is for the weight matrices of the towers' layers, and train_modules and the freezing leave "
            'none of them trained; use "optim": "adamw_torch_fused"'
        )
    return matrices


def describe(model: nn.Module) -> str:
    """What the plan says: who steps how many parameters."""
    by_muon = sum(parameter.numel() for parameter in layer_matrices(model))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return (
        f"{MUON} for the layers' matrices ({by_muon / 1e6:,.2f} M parameters), AdamW for the rest "
        f"({(trained - by_muon) / 1e6:,.2f} M)"
    )


class MuonWithAdamW(Optimizer):
    """torch.optim.Muon on `matrices` and torch.optim.AdamW on all other parameters, as one optimizer.

    A group of `params` becomes two where it holds both kinds, told apart by `algorithm` (muon or adamw); other keys,
    `lr` and `weight_decay` among them, go into both. There is one `state`, which both algorithms fill, so that
    schedulers, accelerate and checkpoints see an ordinary optimizer.

    Args: `lr` is for groups without their own, `betas` and `eps` are AdamW's, `fused` too (no data, no fused kernel).
    """

    def __init__(
        self,
        params: list[dict],
        matrices: Collection[torch.Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fused: bool = True,
    ):
        self._matrix_ids = {id(matrix) for matrix in matrices}
        self._algorithms = {
            "muon": Muon([{"params": []}], adjust_lr_fn="match_rms_adamw"),
            "adamw": AdamW([{"params": []}], betas=betas, eps=eps, fused=fused),
        }
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    def add_param_group(self, param_group: dict) -> None:
        parameters = list(param_group["params"])
        for name, algorithm in self._algorithms.items():
            own = [value for value in parameters if (id(value) in self._matrix_ids) == (name == "muon")]
            if own:
                settings = {**algorithm.defaults, **self.defaults, **param_group}
                super().add_param_group({**settings, "params": own, "algorithm": name})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, algorithm in self._algorithms.items():
            # loading a checkpoint replaces both
            algorithm.state = self.state
            algorithm.param_groups = [group for group in self.param_groups if group["algorithm"] == name]
            algorithm.step()
        return loss
