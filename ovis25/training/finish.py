"""What a run does after its last step: the final folder, the results, the curves, and the way out of its processes."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import TrainerState
from transformers.integrations import unset_hf_deepspeed_config

from ovis25.model import Ovis2_5
from ovis25.training import checkpoints
from ovis25.training.callbacks import EarlyStopping
from ovis25.training.config import ConfigError, TrainConfig
from ovis25.training.report import draw_curves
from ovis25.training.trainer import OvisTraining

CURVES_NAME = "loss_curve.png"
# what a checkpoint holds beside the folder that it would be as a final one
_STATE_FILES = (
    "optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json", "COMPLETE*", "latest", "zero_to_fp32.py",
    "pytorch_model_fsdp*",
)  # fmt: skip


class FinishError(RuntimeError):
    """The model is saved, and something after that failed; the message says both."""


def is_over(checkpoint: Path, total_steps: int) -> bool:
    """Whether the interrupted run had taken its last step: Trainer would take one more."""
    state = checkpoints.read_state(checkpoint)
    stopping = state["stateful_callbacks"].get("EarlyStopping")
    return state["global_step"] >= total_steps or bool(stopping and stopping["attributes"]["reason"])


def save_ended(trainer: OvisTraining, checkpoint: Path) -> None:
    """The final folder of a run that ended with `checkpoint`, from the weights that lie there, or in the best one.

    They are whole in every checkpoint, under every ZeRO stage and FSDP, so no engine is needed.

    Raises:
        ConfigError: the best checkpoint is gone or damaged, or a checkpoint has no whole weights.
    """
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    trainer._load_callback_state()
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    # beside this one, wherever the run's folder has moved to
    source = checkpoint.parent / Path(best).name if best else checkpoint
    _check_source(source)
    if not trainer.args.should_save:
        return
    if isinstance(trainer.accelerator.unwrap_model(trainer.model), Ovis2_5):
        trainer.save_dtype = _base_dtype(trainer)
        weights = {}
        for file in sorted(source.glob("model*.safetensors")):
            weights |= load_file(file)
        trainer._save(trainer.args.output_dir, weights)
    else:
        _copy_final_files(source, Path(trainer.args.output_dir))


def _check_source(source: Path) -> None:
    problem = checkpoints.damage_of(source) if source.is_dir() else "it is gone"
    if problem is None and not any(source.glob("*model*.safetensors")):
        problem = "it holds no whole weights; set stage3_gather_16bit_weights_on_model_save in the ZeRO config"
    if problem:
        raise ConfigError(
            f"{source}, whose weights this run ends with, cannot be used: {problem}. Restore it, or take the last "
            "weights with --load_best_model_at_end false --resume_anyway true"
        )


def _copy_final_files(source: Path, target: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in _STATE_FILES):
            shutil.copyfile(file, target / file.name)


def save_final(trainer: OvisTraining) -> None:
    """Save in the base checkpoint's dtype: float32 training of a bfloat16 model gives a bfloat16 model.

    An adapter keeps its own.

    Raises:
        FloatingPointError: the weights are not finite.
    """
    trainer.check_weights()
    if isinstance(trainer.accelerator.unwrap_model(trainer.model), Ovis2_5):
        trainer.save_dtype = _base_dtype(trainer)
    trainer.save_model()


def _base_dtype(trainer: OvisTraining) -> torch.dtype:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return getattr(torch, model.config._base_dict.get("torch_dtype", "float32"))


def collect_results(trainer: OvisTraining, config: TrainConfig) -> dict:
    """What train_results.json holds. Every rank calls this."""
    state, progress = trainer.state, trainer.progress()
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
        "train_seconds": progress.seconds,
        "train_tokens": progress.tokens,
        "skipped_steps": progress.skipped_steps,
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "model_path": config.model_path,
        "run_id": trainer.run_record.run_id,
    }


def write_results(output_dir: str, results: dict) -> None:
    """Everything of the folder is on the disk before it says that the run is finished."""
    checkpoints.flush_files(output_dir)
    checkpoints.write_json(Path(output_dir) / checkpoints.RESULTS_NAME, results)


def write_run(output_dir: str, trainer: OvisTraining) -> None:
    """The run's identity, without the settings, which lie beside it."""
    record = asdict(trainer.run_record)
    checkpoints.write_json(
        Path(output_dir) / checkpoints.RUN_NAME, {name: record[name] for name in ("run_id", "sources")}
    )


def draw(trainer: OvisTraining, output_dir: str, results: dict) -> None:
    """The curves. Raises FinishError."""
    with after_saving("drawing of the curves", output_dir):
        title = f"{Path(output_dir).name}: {results['stop_reason'].split(':')[0]}"
        draw_curves(trainer.state.log_history, Path(output_dir) / CURVES_NAME, title)


@contextlib.contextmanager
def after_saving(what: str, output_dir: str) -> Iterator[None]:
    """Turns any error of what is done with a saved model into one line that says that it is saved."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        raise FinishError(
            f"the model is saved in {output_dir}, but the {what} failed: {type(error).__name__}: {reason[0]}"
        ) from error


def leave_processes() -> None:
    """End what binds this process to the others and to DeepSpeed, so that a model can be built here as anywhere.

    transformers builds every model in shards while it knows of a ZeRO-3 config, and generates in step with all ranks
    while they are connected. Every rank calls this after training.
    """
    unset_hf_deepspeed_config()
    if torch.distributed.is_initialized():
        PartialState().wait_for_everyone()
        # its threads must not outlive the interpreter: a process may abort at its very end
        torch.distributed.destroy_process_group()
