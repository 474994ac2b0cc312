"""The trl recipe: TRL's SFTTrainer around this package's data, masks and loss. The one file that knows TRL."""

import copy
import dataclasses

import torch
from datasets import Dataset
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from ovis25.compat import metrics_of
from ovis25.training.trainer import OvisTraining

# TRL prepares nothing: samples arrive encoded, cut to no length, padded by our collator
_OURS = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
_CHECKPOINTING = [
    name
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
    if name in {field.name for field in dataclasses.fields(SFTConfig)}
]


def sft_config(**values) -> SFTConfig:
    """TrainingArguments' values as an SFTConfig."""
    return SFTConfig(**{**values, **_OURS})


class OvisSFTTrainer(OvisTraining, SFTTrainer):
    """SFTTrainer with what it brings (metrics, DFT loss, activation offloading, NEFTune), trained by our loss.

    TRL computes its loss through `model.base_model` and a fused head of its own, and refuses our lazy data. Here the
    model's forward stays the model's, and TRL's checks of the data see one stand-in row.
    """

    def __init__(self, *, model, train_dataset, eval_dataset=None, **kwargs):
        stand_in = Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]})
        evaluated = stand_in if eval_dataset is not None else None
        arguments = kwargs["args"]
        checkpointing = {name: copy.copy(getattr(arguments, name, None)) for name in _CHECKPOINTING}
        super().__init__(model=model, train_dataset=stand_in, eval_dataset=evaluated, **kwargs)
        # TRL makes adapters under ZeRO-3 checkpoint reentrantly, which drops the gradients of those in a frozen ViT
        for name, value in checkpointing.items():
            setattr(arguments, name, value)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        # TRL's patch of forward stands on the instance, before the class's
        whole = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        whole.__dict__.pop("forward", None)
        self._seen = {mode: torch.zeros(3, device=self.args.device) for mode in ("train", "eval")}

    def loss_arguments(self) -> dict:
        return {**super().loss_arguments(), "loss_type": self.args.loss_type, "with_token_metrics": True}

    def note_outputs(self, outputs) -> None:
        self._seen["train" if self.model.training else "eval"] += outputs.token_metrics

    def evaluate(self, *args, **kwargs):
        # SFTTrainer's would prepare the set
        return Trainer.evaluate(self, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds TRL's metrics, as means over the learned tokens of all devices since the last log."""
        mode = "train" if self.model.training else "eval"
        entropy, num_right, num_tokens = self.accelerator.reduce(self._seen[mode], "sum").tolist()
        self._seen[mode].zero_()
        metrics = metrics_of(self, mode)
        if num_tokens:
            metrics["entropy"] = [entropy / num_tokens]
            metrics["mean_token_accuracy"] = [num_right / num_tokens]
        seen = torch.tensor(self.token_counter.total(), device=self.args.device)
        metrics["num_tokens"] = [int(self.accelerator.reduce(seen, "sum"))]
        super().log(logs, start_time)
