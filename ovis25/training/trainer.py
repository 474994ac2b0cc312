"""transformers' Trainer with what Ovis2.5 needs: module learning rates, an exact evaluation loss, safe checkpoints."""

import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer

from ovis25.compat import prepare_inputs
from ovis25.constants import IGNORE_INDEX
from ovis25.data import DataError
from ovis25.data.packing.rows import PackedDataset
from ovis25.data.sampler import LengthSampler, LengthView, RowSampler
from ovis25.files import follow_umask
from ovis25.model.adapter import write_base_note
from ovis25.training import checkpoints
from ovis25.training.config import MUON
from ovis25.training.finite import FiniteWatch, FirstBad, bad_weights, likely_cause, listed
from ovis25.training.modules import TrainedModule, parameter_groups
from ovis25.training.muon import MuonWithAdamW, layer_matrices
from ovis25.training.resume import Progress, RunRecord
from ovis25.training.traced import INDICES_KEY, sample_names, untraced


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

    Args: `chosen` maps parameter names to the `train_modules` entry that trains them; `z_loss` is the loss's;
    `skips_nonfinite` leaves steps out that are not finite, instead of ending the run; the rest is Trainer's.
    `save_dtype`, once set, is the dtype that weights are saved in; `run_record` is what checkpoints remember.
    """

    def __init__(
        self, *args, chosen: dict[str, TrainedModule], z_loss: float = 0.0, skips_nonfinite: bool = False, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.chosen, self.z_loss = chosen, z_loss
        self.save_dtype: torch.dtype | None = None
        self.token_counter = TokenCounter()
        self.watch = FiniteWatch(self.accelerator, self._train_names, not self.args.fp16, skips_nonfinite)
        self.run_record: RunRecord | None = None
        self._last_loss = torch.zeros((), device=self.args.device)
        self._started = time.monotonic()
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
        inputs = dict(inputs)
        indices = inputs.pop(INDICES_KEY, [])
        self.token_counter.add(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.watch.note_loss(loss, self.state.global_step + 1, indices)
        if self.watch.skips:
            # what is left out must not spoil the logged mean: the last good batch stands for it
            self._last_loss = loss = torch.where(torch.isfinite(loss), loss, self._last_loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """As Trainer's, between the backward pass and the optimizer's step, which is left out without gradients."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        step = self.state.global_step + 1
        self.watch.note_norm(grad_norm, step)
        found = self.watch.must_skip(step, self.state.max_steps)
        if found is None:
            return grad_norm
        if self.args.should_save:
            print(f"left out the update of step {step}: {found.describe()}", file=sys.stderr, flush=True)
        for parameter in model.parameters():
            parameter.grad = None
        return None

    def _train_names(self, indices) -> list[str]:
        return sample_names(self.train_dataset, indices)

    def check_finite(self) -> None:
        """Whether losses and gradient norms were finite so far. Every rank calls this.

        Raises:
            FloatingPointError: the first step that was not, the samples that it was taken on, and what to do.
        """
        if found := self.watch.find():
            cause = likely_cause(found.step, self.args.learning_rate, self._losses())
            raise FloatingPointError(f"{found.describe()}. {cause}; {self._what_is_left()}")

    def check_weights(self) -> None:
        """Whether the trained weights are finite. Every rank calls this.

        Raises:
            FloatingPointError: names them, and the samples of the last step.
        """
        names = bad_weights(self.accelerator.unwrap_model(self.model), only_trained=True)
        if names:
            step, samples = self.state.global_step, self.watch.last_step()
            on = f", taken on {listed(samples)}" if samples else ""
            raise FloatingPointError(
                f"weights became NaN or infinite ({listed(names)}) by the update of step {step}{on}. "
                f"{likely_cause(step, self.args.learning_rate, self._losses())}; {self._what_is_left()}"
            )

    def _losses(self) -> list[float]:
        return [entry["loss"] for entry in self.state.log_history if "loss" in entry]

    def _what_is_left(self) -> str:
        return f"nothing of it is saved, and the checkpoints in {self.args.output_dir} are from before"

    def progress(self) -> Progress:
        """What the run has done, over all of its starts. Every rank calls this."""
        before = self.run_record.progress if self.run_record else Progress()
        tokens = torch.tensor(self.token_counter.total(), device=self.args.device)
        return Progress(
            tokens=before.tokens + int(self.accelerator.reduce(tokens, "sum")),
            seconds=round(before.seconds + time.monotonic() - self._started, 1),
            skipped_steps=[*before.skipped_steps, *self.watch.skipped],
        )

    def start_clock(self) -> None:
        """From here on `progress` counts seconds."""
        self._started = time.monotonic()

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
        dataset = untraced(self.train_dataset if train_dataset is None else train_dataset)
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
        """As Trainer's, but the loss is the mean over all learned tokens of the set, on every rank.

        Raises:
            FloatingPointError: it is not finite; names the samples of the first such batch.
        """
        self._evaluated = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self._evaluated_indices: list[list[int]] = []
        self._bad_evaluation = FirstBad(self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss_sum, num_tokens = self.accelerator.reduce(self._evaluated, "sum").tolist()
        if num_tokens == 0:
            raise DataError("the evaluation set has no learned token, so it has no loss")
        if not math.isfinite(loss_sum):
            self._refuse_evaluation(loss_sum)
        output.metrics[f"{metric_key_prefix}_loss"] = loss_sum / num_tokens
        output.metrics[f"{metric_key_prefix}_tokens"] = int(num_tokens)
        return output

    def _refuse_evaluation(self, loss: float) -> None:
        step = self.state.global_step
        self.check_finite()
        self.check_weights()
        found = self._bad_evaluation.read()
        own = sample_names(self.eval_dataset, self._evaluated_indices[found[0]]) if found else []
        samples = gather_object(own)
        on = f", on {listed(samples)}" if samples else ""
        raise FloatingPointError(
            f"the evaluation loss became {loss:g} at step {step}{on}. The trained weights are finite, so look at these "
            f"samples first; {self._what_is_left()}"
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = dict(inputs)
        indices = inputs.pop(INDICES_KEY, [])
        inputs = prepare_inputs(self, inputs)
        num_tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, **self.loss_arguments(), num_items_in_batch=1, skip_logits=True)
        self.note_outputs(outputs)
        self._bad_evaluation.note(len(self._evaluated_indices), outputs.loss)
        self._evaluated_indices.append(indices)
        self._evaluated += torch.stack([outputs.loss.double(), num_tokens.double()])
        return outputs.loss / num_tokens.clamp(min=1), None, None

    def save_weights(self, output_dir: str, weights: dict[str, torch.Tensor]) -> None:
        """Write a model's folder with these weights, whole or not this process's to write."""
        self._save(output_dir, weights)

    def _save(self, output_dir=None, state_dict=None):
        """Sharded weights arrive here gathered, as `state_dict`; a whole model is its own."""
        if self.save_dtype is not None:
            state_dict = self.model.state_dict() if state_dict is None else state_dict
            if self.model.config.llm_config.tie_word_embeddings:
                state_dict.pop("llm.lm_head.weight", None)
            state_dict = {name: value.to(self.save_dtype) for name, value in state_dict.items()}
        super()._save(output_dir, state_dict)
        # under DeepSpeed and FSDP every process comes here
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            write_base_note(self.accelerator.unwrap_model(self.model), folder)
            follow_umask(*folder.glob("*.safetensors"))

    def _save_checkpoint(self, model, trial):
        """Only finite weights are saved, and older checkpoints are deleted once this one is on the disk and marked."""
        self.check_finite()
        self.check_weights()
        progress = asdict(self.progress())
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.unmark(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with checkpoints.writing(folder):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            record = self.run_record.to_dict() if self.run_record else {}
            checkpoints.mark_complete(folder, {**record, "progress": progress})
            checkpoints.rotate(self.args.output_dir, folder, self.state.best_model_checkpoint, limit)


class OvisTrainer(OvisTraining, Trainer):
    """The standard recipe."""
