"""One training run from config to final folder. Read `train` first: it is the whole flow."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ovis25.data import ConversationDataset, DataError
from ovis25.data.collator import Collator, PackedCollator
from ovis25.data.packed import PackedDataset
from ovis25.training import build, checkpoints, finish, muon, resume, visual_pass
from ovis25.training.callbacks import EarlyStopping, FiniteLoss, ProgressLine
from ovis25.training.config import MUON, TrainConfig
from ovis25.training.finite import SKIP, bad_weights, check_policy, listed
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
from ovis25.training.traced import TracedCollator, TracedDataset
from ovis25.training.trainer import OvisTrainer, OvisTraining

PLAN_NAME = "train_plan.json"
SKIPPED_NAME = "skipped_samples.jsonl"


@dataclass
class Datasets:
    """The samples, and with packing the rows made of them, which the trainer then takes."""

    train: ConversationDataset
    evaluation: ConversationDataset | None
    train_rows: PackedDataset | None = None
    eval_rows: PackedDataset | None = None

    def named(self) -> dict[str, ConversationDataset]:
        """The sets that there are, by the setting that names them."""
        sets = {"data_path": self.train, "eval_data_path": self.evaluation}
        return {key: dataset for key, dataset in sets.items() if dataset is not None}

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
    # 1. can it work, is there anything to do, and where does it begin?
    build.check_before_loading(config)
    check_output_dir(config.output_dir, config.model_path)
    wish = config.value("resume_from_checkpoint")
    resume.check_wish(config)
    if isinstance(wish, str):
        resume.choose(config)
    if not dry_run and config.overwrite_output_dir and build.is_main_process():
        checkpoints.delete_run(config.output_dir)
    if not config.overwrite_output_dir and not wish:
        resume.check_same_run(config)
        finished = checkpoints.read_results(config.output_dir)
        if finished and not dry_run:
            run = checkpoints.read_record(Path(config.output_dir) / checkpoints.RUN_NAME) or {}
            resume.check_same_sources(config, run.get("sources", {}), resume.data_sources(config))
            say(f"{config.output_dir} holds this run, finished ({finished['stop_reason']}); nothing to train")
            return finished
    start = resume.choose(config)

    # 2. the data, checked and counted by the processor alone
    base = find_base(config.model_path, dry_run)
    folder, processor = base.folder, base.processor
    sources = resume.sources_of(config, folder, build.num_processes())
    config.notes += resume.check_same_sources(config, start.sources, sources)
    processor.limits = build.visual_limits(config)
    build.check_vocabulary(config, processor)
    # its shapes alone: names of layers and modules that the model does not have are found now
    prepare_model(config, folder, torch.float32, without_weights=True)
    data = load_data(config, base)
    found = {f"samples of {key}": resume.samples_source(part) for key, part in data.named().items()}
    config.notes += [*start.notes, *resume.check_same_sources(config, start.sources, found)]
    if config.packing:
        data.pack(config, folder)

    # 3. the settings
    steps = build.steps_of(config, len(data.train_rows or data.train))
    precision = build.choose_precision(config)
    arguments = build.training_arguments(config, precision, steps)
    # one process drives one device
    arguments._n_gpu = min(arguments.n_gpu, 1)
    check_policy(config.on_nonfinite, arguments)
    checkpoint = start.checkpoint
    is_ended = checkpoint is not None and finish.is_over(checkpoint, steps.total)
    if checkpoint and not is_ended:
        resume.check_can_go_on(checkpoint)
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
    trainer_class = build.trl_recipe().OvisSFTTrainer if config.recipe == "trl" else OvisTrainer
    collator = PackedCollator() if config.packing else Collator(processor.tokenizer.pad_token_id)
    evaluated = data.eval_rows or data.evaluation
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=TracedDataset(data.train_rows or data.train),
        eval_dataset=TracedDataset(evaluated) if evaluated else None,
        data_collator=TracedCollator(collator),
        processing_class=processor,
        chosen=chosen,
        z_loss=config.z_loss,
        skips_nonfinite=config.on_nonfinite == SKIP,
        callbacks=list(callbacks),
    )
    trainer.run_record = start.record(config, {**sources, **found})
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(PlanAnnouncement(plan, config, data, trainer, checkpoint))
    progress = ProgressLine(trainer.token_counter)
    trainer.add_callback(progress)
    trainer.add_callback(FiniteLoss(trainer.check_finite))
    if patience := build.early_stopping_patience(config, arguments):
        trainer.add_callback(EarlyStopping(patience, config.early_stopping_threshold))

    # 6. training, unless only the final save was missing
    if is_ended:
        say("\n".join([*start.notes, f"{checkpoint.name} is the end of this run; only the final folder is missing"]))
        finish.save_ended(trainer, checkpoint)
    else:
        check_base(trainer, folder)
        begin(trainer, config, checkpoint)
        if config.cache_visual_embeddings:
            sets = list(data.named().values())
            plan.visual_cache = str(visual_pass.fill(trainer, sets, visual_pass.folder_of(config)))
        trainer.start_clock()
        with contextlib.closing(progress):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finish.save_final(trainer)

    # 7. the final folder is complete, and readable by everyone who reads a released one
    results = finish.collect_results(trainer, config)
    if build.is_main_process():
        finish.write_results(config.output_dir, results)
    PartialState().wait_for_everyone()
    if build.is_main_process():
        finish.draw(trainer, config.output_dir, results)
    kind = "adapter" if config.use_lora else "model"
    say(f"\n{results['stop_reason']}\nThe {kind} lies in {config.output_dir} (curves: {finish.CURVES_NAME})")
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


def check_base(trainer: OvisTraining, folder: Path) -> None:
    """Look at the weights once, as they were loaded. Every rank calls this.

    Raises:
        FloatingPointError: names those that hold NaN or infinity.
    """
    if names := bad_weights(trainer.model):
        raise FloatingPointError(
            f"the base weights in {folder} hold NaN or infinity: {listed(names)}. Nothing can be trained from them; "
            "get the checkpoint again, or give another model_path"
        )


def begin(trainer: OvisTraining, config: TrainConfig, checkpoint: Path | None) -> None:
    """A run that begins anew sets what an earlier one left in its folder aside, and never goes on from it."""
    PartialState().wait_for_everyone()
    is_new = checkpoint is None and build.is_main_process()
    if is_new and (target := checkpoints.set_aside(config.output_dir)):
        say(f"an earlier run's checkpoints were moved to {target}")
    PartialState().wait_for_everyone()


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

    def __init__(self, plan: Plan, config: TrainConfig, data: Datasets, trainer: OvisTraining, checkpoint: Path | None):
        self.plan, self.config, self.data, self.trainer, self.checkpoint = plan, config, data, trainer, checkpoint

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
        finish.write_run(self.config.output_dir, self.trainer)
        checkpoints.write_json(output_dir / checkpoints.CONFIG_NAME, self.config.to_dict())
        checkpoints.write_json(output_dir / PLAN_NAME, self.plan.to_dict())
        for dataset in self.data.named().values():
            dataset.write_skipped(output_dir / SKIPPED_NAME)
