"""transformers' Trainer with what Ovis2.5 needs: module learning rates, an exact evaluation loss, safe checkpoints."""

from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from ovis25.constants import IGNORE_INDEX
from ovis25.training.checkpoints import mark_complete
from ovis25.training.modules import TrainedModule, parameter_groups


class TokenCounter:
    """Counts tokens on the device, so that counting costs no synchronisation."""

    def __init__(self):
        self._total: torch.Tensor | int = 0

    def add(self, attention_mask: torch.Tensor) -> None:
        self._total = self._total + attention_mask.sum()

    def total(self) -> int:
        return int(self._total)


class EvenDataset(Dataset):
    """A dataset lengthened to a multiple of `multiple` by samples that have no label.

    Every rank then takes the same number of batches, and no sample counts twice in the evaluation loss.
    """

    def __init__(self, dataset: Dataset, multiple: int):
        self.dataset = dataset
        self.length = -(-len(dataset) // multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if index < len(self.dataset):
            return self.dataset[index]
        item = dict(self.dataset[0])
        return {**item, "labels": torch.full_like(item["labels"], IGNORE_INDEX)}


class OvisTrainer(Trainer):
    """Args: `chosen` maps parameter names to the `train_modules` entry that trains them; the rest is Trainer's."""

    def __init__(self, *args, chosen: dict[str, TrainedModule], **kwargs):
        super().__init__(*args, **kwargs)
        self.chosen = chosen
        self.token_counter = TokenCounter()
        # the model smooths its own loss, without the logits of whole rows
        self.label_smoother = None

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            groups = parameter_groups(model, self.chosen, decayed, self.args.learning_rate, self.args.weight_decay)
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
            if {"params", "model", "optimizer_dict"} & arguments.keys():
                return super().create_optimizer(model)
            self.optimizer = optimizer_class(groups, **arguments)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, "label_smoothing": self.args.label_smoothing_factor}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.token_counter.add(inputs["attention_mask"])
        return super().training_step(model, inputs, num_items_in_batch)

    def get_eval_dataloader(self, eval_dataset=None):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.args.world_size > 1:
            dataset = EvenDataset(dataset, self.args.world_size * self.args.eval_batch_size)
        return super().get_eval_dataloader(dataset)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """As Trainer's, but the loss is the mean over all learned tokens of the set, on every rank."""
        self._evaluated = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss_sum, num_tokens = self.accelerator.reduce(self._evaluated, "sum").tolist()
        if num_tokens == 0:
            raise ValueError("the evaluation set has no learned token, so it has no loss")
        output.metrics[f"{metric_key_prefix}_loss"] = loss_sum / num_tokens
        output.metrics[f"{metric_key_prefix}_tokens"] = int(num_tokens)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        num_tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        with torch.no_grad(), self.compute_loss_context_manager():
            smoothing = self.args.label_smoothing_factor
            loss_sum = model(**inputs, num_items_in_batch=1, label_smoothing=smoothing, skip_logits=True).loss
        self._evaluated += torch.stack([loss_sum.double(), num_tokens.double()])
        return loss_sum / num_tokens.clamp(min=1), None, None

    def _save_checkpoint(self, model, trial):
        """Older checkpoints are deleted only once this one is on the disk, whole and marked."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint)
