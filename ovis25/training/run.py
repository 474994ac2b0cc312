"""One training run from config to final folder. Read `train` first: it is the whole flow."""

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainerState, set_seed
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ovis25.data import ConversationDataset, DataError
from ovis25.data.collator import Collator, PackedCollator
from ovis25.data.packed import PackedDataset
from ovis25.model import Ovis2_5
from ovis25.training import build, checkpoints, muon, visual_pass
from ovis25.training.callbacks import EarlyStopping, FiniteLoss, ProgressLine
from ovis25.training.config import MUON, TrainConfig
from ovis25.training.modules import (
    TrainedModule,
    choose_adapter,
    choose_trained,
    count_parameters,
    parameter_groups,
    parse_train_modules,
)
from ovis25.training.output import check_output_dir
from ovis25.training.plan import Plan, optimizer_groups
from ovis25.training.released import Base, find_base
from ovis25.training.report import draw_curves
from ovis25.training.trainer import OvisTrainer, OvisTraining

PLAN_NAME = "train_plan.json"
CURVES_NAME = "loss_curve.png"
SKIPPED_NAME = "skipped_samples.jsonl"


@dataclass
class Datasets:
    """The samples, and with packing the rows made of them, which the trainer then takes."""

    train: ConversationDataset
    evaluation: ConversationDataset | None
    train_rows: PackedDataset | None = None
    eval_rows: PackedDataset | None = None

    def pack(self, config: TrainConfig, folder: Path) -> None:
        self.train_rows = build.pack_dataset(config, self.train, folder, is_training=True)
        if self.evaluation:
            self.eval_rows = build.pack_dataset(config, self.evaluation, folder, is_training=False)


def train(config: TrainConfig, dry_run: bool = False, callbacks: Sequence[TrainerCallback] = ()) -> dict | None:
    """Run a config to its end, or on from where it was interrupted; `callbacks` are Trainer's.

    Returns the results that are also saved (`finished`, `stop_reason`, `best_eval_loss`, ...), or None after a
    dry run, which prints the plan, loads no weights and writes nothing.

    Raises:
        ConfigError, DataError, FileNotFoundError: what the user can mend; the message says how.
    """
    # 1. can it work, and is there anything to do?
    build.check_before_loading(config)
    check_output_dir(config.output_dir, config.model_path)
    wish = config.value("resume_from_checkpoint")
    if isinstance(wish, str):
        checkpoints.resume_checkpoint(config.output_dir, wish)
    if not dry_run and config.overwrite_output_dir and build.is_main_process():
        checkpoints.delete_run(config.output_dir)
    if not config.overwrite_output_dir and not wish:
        checkpoints.check_same_run(config.output_dir, config.to_dict())
        finished = checkpoints.read_results(config.output_dir)
        if finished and not dry_run:
            say(f"{config.output_dir} holds this run, finished ({finished['stop_reason']}); nothing to train")
            return finished

    # 2. the data, checked and counted by the processor alone
    base = find_base(config.model_path, dry_run)
    folder, processor = base.folder, base.processor
    processor.limits = build.visual_limits(config)
    build.check_vocabulary(config, processor)
    # its shapes alone: names of layers and modules that the model does not have are found now
    prepare_model(config, folder, torch.float32, without_weights=True)
    data = load_data(config, base)
    if config.packing:
        data.pack(config, folder)

    # 3. the settings
    steps = build.steps_of(config, len(data.train_rows or data.train))
    precision = build.choose_precision(config)
    arguments = build.training_arguments(config, precision, steps)
    # one process drives one device
    arguments._n_gpu = min(arguments.n_gpu, 1)
    set_seed(arguments.seed)

    # 4. the model, and which of it is trained
    model, chosen = prepare_model(config, folder, precision.weights, without_weights=dry_run)
    build.choose_towers(config, model)
    plan = make_plan(config, data, steps, precision, arguments, model)
    if dry_run:
        plan.mark_estimates(base.note)
        groups = parameter_groups(model, chosen, set(), arguments.learning_rate, arguments.weight_decay)
        plan.optimizer_groups = optimizer_groups(groups)
        say(plan.render())
        return None

    # 5. the trainer
    checkpoint = checkpoints.resume_checkpoint(config.output_dir, wish)
    trainer_class = build.trl_recipe().OvisSFTTrainer if config.recipe == "trl" else OvisTrainer
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=data.train_rows or data.train,
        eval_dataset=data.eval_rows or data.evaluation,
        data_collator=PackedCollator() if config.packing else Collator(processor.tokenizer.pad_token_id),
        processing_class=processor,
        chosen=chosen,
        z_loss=config.z_loss,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(PlanAnnouncement(plan, config, data, checkpoint))
    trainer.add_callback(ProgressLine(trainer.token_counter))
    trainer.add_callback(FiniteLoss())
    if patience := build.early_stopping_patience(config, arguments):
        trainer.add_callback(EarlyStopping(patience, config.early_stopping_threshold))

    # 6. training, unless only the final save was missing
    started = time.monotonic()
    if checkpoint and is_over(checkpoint, steps.total) and not trainer.is_deepspeed_enabled:
        load_ended(trainer, checkpoint)
    else:
        if config.cache_visual_embeddings:
            sets = [dataset for dataset in (data.train, data.evaluation) if dataset is not None]
            plan.visual_cache = str(visual_pass.fill(trainer, sets, visual_pass.folder_of(config)))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    # 7. the final folder, complete and readable by everyone who reads a released one
    save_final(trainer)
    results = collect_results(trainer, config, time.monotonic() - started)
    if build.is_main_process():
        title = f"{Path(config.output_dir).name}: {results['stop_reason'].split(':')[0]}"
        draw_curves(trainer.state.log_history, Path(config.output_dir) / CURVES_NAME, title)
        checkpoints.write_json(Path(config.output_dir) / checkpoints.RESULTS_NAME, results)
    kind = "adapter" if config.use_lora else "model"
    say(f"\n{results['stop_reason']}\nThe {kind} lies in {config.output_dir} (curves: {CURVES_NAME})")
    PartialState().wait_for_everyone()
    return results


def prepare_model(
    config: TrainConfig, folder: Path, dtype: torch.dtype, without_weights: bool
) -> tuple[PreTrainedModel, dict[str, TrainedModule]]:
    """The model, or its shapes alone, and what of it is trained by which entry of `train_modules`.

    Raises:
        ConfigError: nothing is trained, layers that it does not have, or what is trained and another setting disagree.
    """
    model = build.build_model(config, folder, dtype, without_weights)
    if config.use_lora:
        model = build.build_adapter(config, model, folder)
        chosen = choose_adapter(model)
    else:
        modules = parse_train_modules(config.train_modules)
        chosen = choose_trained(model, modules, config.freeze_vision_tower, config.freeze_llm)
    if config.cache_visual_embeddings:
        visual_pass.check_frozen(chosen)
    if config.value("optim") == MUON:
        muon.layer_matrices(model)
    return model, chosen


def say(text: str) -> None:
    if build.is_main_process():
        print(text, flush=True)


def load_data(config: TrainConfig, base: Base) -> Datasets:
    try:
        train_set = build.build_dataset(config, "data_path", base.processor)
        evaluation = build.build_dataset(config, "eval_data_path", base.processor) if config.eval_data_path else None
    except DataError as error:
        # a text may be too long by an estimate alone
        if base.note:
            raise DataError(f"{error}\nnote: {base.note}") from error
        raise
    for dataset in (train_set, evaluation):
        if dataset is not None:
            # pictures that break while decoding are listed with those that were left out before
            dataset.skipped_path = Path(config.output_dir) / SKIPPED_NAME
    return Datasets(train_set, evaluation)


def make_plan(config, data: Datasets, steps, precision, arguments, model) -> Plan:
    """What this run will do; the optimizer's groups are filled in from the optimizer that runs."""
    stopping = build.early_stopping_patience(config, arguments)
    train_counts = data.train.statistics()
    eval_counts = data.evaluation.statistics() if data.evaluation else None
    return Plan(
        model=config.model_path,
        output_dir=config.output_dir,
        device=precision.device,
        num_devices=arguments.world_size,
        precision=precision.description,
        data=dataclasses.asdict(train_counts),
        eval_data=dataclasses.asdict(eval_counts) if eval_counts else None,
        per_device_batch=arguments.per_device_train_batch_size,
        gradient_accumulation=arguments.gradient_accumulation_steps,
        effective_batch=steps.effective_batch,
        num_epochs=arguments.num_train_epochs,
        steps_per_epoch=steps.per_epoch,
        total_steps=steps.total,
        warmup_steps=arguments.get_warmup_steps(steps.total),
        schedule=f"{SchedulerType(arguments.lr_scheduler_type).value} schedule",
        optimizer=muon.describe(model) if arguments.optim == MUON else OptimizerNames(arguments.optim).value,
        evaluates=_rhythm_text(arguments.eval_strategy, arguments.eval_steps, steps, "never"),
        saves=_rhythm_text(arguments.save_strategy, arguments.save_steps, steps, "only at the end")
        + (f", keeps {arguments.save_total_limit}" if arguments.save_total_limit else ""),
        early_stopping=f"after {stopping} evaluations without improvement" if stopping else "no",
        modules={
            part: {"trained": trained, "total": total} for part, (trained, total) in count_parameters(model).items()
        },
        optimizer_groups=[],
        packing=dataclasses.asdict(data.train_rows.summary()) if data.train_rows else None,
        eval_packing=dataclasses.asdict(data.eval_rows.summary()) if data.eval_rows else None,
        visual_cache=visual_pass.forecast(config, [train_counts, eval_counts], precision, model.config.hidden_size)
        if config.cache_visual_embeddings
        else None,
        notes=[*config.notes, *([precision.note] if precision.note else [])],
    )


def _rhythm_text(strategy: str, every: float | None, steps, never: str) -> str:
    if strategy == "no":
        return never
    if strategy == "epoch":
        return f"every epoch ({steps.per_epoch} steps)"
    if strategy == "best":
        return "when the evaluation is the best so far"
    every = math.ceil(every * steps.total) if every < 1 else int(every)
    return f"every {every} steps ({steps.total // every} times)"


class PlanAnnouncement(TrainerCallback):
    """Prints and saves the plan once the optimizer exists, with the learning rates that it really holds."""

    def __init__(self, plan: Plan, config: TrainConfig, data: Datasets, checkpoint: Path | None):
        self.plan, self.config, self.data, self.checkpoint = plan, config, data, checkpoint

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        if not state.is_world_process_zero:
            return
        self.plan.total_steps = state.max_steps
        self.plan.optimizer_groups = optimizer_groups(optimizer.param_groups)
        if self.checkpoint:
            self.plan.resumes_from = f"{self.checkpoint.name} (step {state.global_step} of {state.max_steps})"
        output_dir = Path(self.config.output_dir)
        say(self.plan.render())
        _, incomplete = checkpoints.find_checkpoints(output_dir)
        for folder in incomplete:
            say(f"  note: {folder.name} was not written to its end and is passed over")
        checkpoints.write_json(output_dir / checkpoints.CONFIG_NAME, self.config.to_dict())
        checkpoints.write_json(output_dir / PLAN_NAME, self.plan.to_dict())
        for dataset in (self.data.train, self.data.evaluation):
            if dataset is not None:
                dataset.write_skipped(output_dir / SKIPPED_NAME)


def is_over(checkpoint: Path, total_steps: int) -> bool:
    """Whether the interrupted run had taken its last step: Trainer would take one more."""
    state = checkpoints.read_state(checkpoint)
    stopping = state["stateful_callbacks"].get("EarlyStopping")
    return state["global_step"] >= total_steps or bool(stopping and stopping["attributes"]["reason"])


def load_ended(trainer: OvisTraining, checkpoint: Path) -> None:
    """The weights and the state that the interrupted run ended with."""
    say(f"{checkpoint.name} is the end of this run; only the final folder is missing")
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    trainer._load_callback_state()
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    trainer._load_from_checkpoint(best or str(checkpoint))


def save_final(trainer: OvisTraining) -> None:
    """Save in the base checkpoint's dtype: float32 training of a bfloat16 model gives a bfloat16 model.

    An adapter keeps its own.
    """
    if isinstance(trainer.accelerator.unwrap_model(trainer.model), Ovis2_5):
        trainer.save_dtype = getattr(torch, trainer.model.config._base_dict.get("torch_dtype", "float32"))
    trainer.save_model()


def collect_results(trainer: OvisTraining, config: TrainConfig, seconds: float) -> dict:
    """What train_results.json holds."""
    state = trainer.state
    stopping = next((c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStopping)), None)
    reason = stopping.reason if stopping else None
    best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else None
    return {
        "finished": True,
        "stop_reason": reason or f"all {state.global_step} steps are done ({state.epoch:.2f} epochs)",
        "global_step": state.global_step,
        "last_train_loss": next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None),
        "best_eval_loss": state.best_metric,
        "best_checkpoint": best,
        "train_seconds": round(seconds, 1),
        "train_tokens": trainer.token_counter.total() * trainer.args.world_size,
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "model_path": config.model_path,
    }
