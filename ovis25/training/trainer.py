"""transformers' Trainer with what Ovis2.5 needs: module learning rates, an exact evaluation loss, safe checkpoints."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from ovis25.constants import IGNORE_INDEX
from ovis25.data import DataError
from ovis25.data.packed import PackedDataset
from ovis25.data.sampler import LengthSampler, LengthView, RowSampler
from ovis25.training.checkpoints import mark_complete
from ovis25.training.config import MUON
from ovis25.training.modules import TrainedModule, parameter_groups
from ovis25.training.muon import MuonWithAdamW, layer_matrices


class TokenCounter:
    """Counts tokens on the device, so that counting costs no synchronisation."""

    def __init__(self):
        self._total: torch.Tensor | int = 0

    def add(self, batch: dict[str, torch.Tensor]) -> None:
        mask = batch.get("attention_mask")
        # a packed row has no mask: all of it is tokens
        self._total = self._total + (batch["input_ids"].numel() if mask is None else mask.sum())

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

    @property
    def lengths(self) -> np.ndarray:
        lengths = self.dataset.lengths
        return np.concatenate([lengths, np.full(self.length - len(lengths), lengths[0])])

    def __getitem__(self, index: int) -> dict:
        if index < len(self.dataset):
            return self.dataset[index]
        item = dict(self.dataset[0])
        return {**item, "labels": torch.full_like(item["labels"], IGNORE_INDEX)}


class OvisTraining:
    """What every recipe adds to its Trainer class, which stands behind it in the bases.

    Args: `chosen` maps parameter names to the `train_modules` entry that trains them; `z_loss` is the loss's; the rest
    is Trainer's. `save_dtype`, once set, is the dtype that weights are saved in.
    """

    def __init__(self, *args, chosen: dict[str, TrainedModule], z_loss: float = 0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.chosen, self.z_loss = chosen, z_loss
        self.save_dtype: torch.dtype | None = None
        self.token_counter = TokenCounter()
        # tokens that were learned so far, counted on the device
        self._num_learned: torch.Tensor | None = None
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

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        if args.optim != MUON:
            return Trainer.get_optimizer_cls_and_kwargs(args, model)
        return MuonWithAdamW, {
            "matrices": layer_matrices(model),
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
        }

    def loss_arguments(self) -> dict:
        """What the model's loss is asked for beside the mean."""
        return {"label_smoothing": self.args.label_smoothing_factor, "z_loss": self.z_loss}

    def note_outputs(self, outputs) -> None:
        """Called with the outputs of every forward pass with labels."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, **self.loss_arguments()}
        # the model's own loss, in every recipe
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        self.note_outputs(outputs)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.token_counter.add(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def _run_epoch(self, *, epoch, train_dataloader, **arguments):
        # a run that resumes on several devices skips batches, and through that accelerate tells no sampler the epoch
        train_dataloader.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **arguments)
        is_whole = not arguments.get("steps_trained_in_current_epoch")
        if is_whole and self._num_learned is not None and int(self._num_learned) == 0:
            raise DataError("nothing was learned: every sample so far broke while decoding; see skipped_samples.jsonl")

    def get_batch_samples(self, *args, **kwargs):
        """As Trainer's; counts the learned tokens, of all devices: a set whose every sample breaks has none."""
        batches, num_learned = super().get_batch_samples(*args, **kwargs)
        if num_learned is not None:
            self._num_learned = num_learned if self._num_learned is None else self._num_learned + num_learned
        return batches, num_learned

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        """As Trainer's, but packed rows are shuffled by their cost, and lengths are those known: nothing is decoded."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        strategy, batch_size = self.args.train_sampling_strategy, self.args.train_batch_size
        if strategy != "sequential" and isinstance(dataset, PackedDataset):
            return RowSampler(dataset.costs, batch_size * self.args.world_size, self._data_seed)
        if strategy == "group_by_length":
            batch_size *= self.args.gradient_accumulation_steps
            return LengthSampler(batch_size, dataset.lengths, self._data_seed)
        return super()._get_train_sampler(LengthView(dataset) if strategy == "batch_rebalance" else dataset)

    def _get_eval_sampler(self, eval_dataset) -> Sampler:
        if self.args.train_sampling_strategy == "group_by_length" and hasattr(eval_dataset, "lengths"):
            return LengthSampler(self.args.eval_batch_size, eval_dataset.lengths, self._data_seed)
        return SequentialSampler(eval_dataset)

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

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
            raise DataError("the evaluation set has no learned token, so it has no loss")
        output.metrics[f"{metric_key_prefix}_loss"] = loss_sum / num_tokens
        output.metrics[f"{metric_key_prefix}_tokens"] = int(num_tokens)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        num_tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, **self.loss_arguments(), num_items_in_batch=1, skip_logits=True)
        self.note_outputs(outputs)
        self._evaluated += torch.stack([outputs.loss.double(), num_tokens.double()])
        return outputs.loss / num_tokens.clamp(min=1), None, None

    def _save(self, output_dir=None, state_dict=None):
        """Sharded weights arrive here gathered, as `state_dict`; a whole model is its own."""
        if self.save_dtype is not None:
            state_dict = self.model.state_dict() if state_dict is None else state_dict
            if self.model.config.llm_config.tie_word_embeddings:
                state_dict.pop("llm.lm_head.weight", None)
            state_dict = {name: value.to(self.save_dtype) for name, value in state_dict.items()}
        super()._save(output_dir, state_dict)

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


class OvisTrainer(OvisTraining, Trainer):
    """The standard recipe."""
