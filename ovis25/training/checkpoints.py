"""Checkpoints that survive a power cut, and the question whether a run may be continued."""

import json
import os
import re
import shutil
from pathlib import Path

from ovis25.training.config import ConfigError

CONFIG_NAME = "train_config.json"
RESULTS_NAME = "train_results.json"
_MARKER = "COMPLETE"
_FOLDER = re.compile(r"checkpoint-(\d+)")

# a run may be continued with other values of these
_HARMLESS = {
    "overwrite_output_dir", "resume_from_checkpoint", "exam", "logging_steps", "logging_strategy", "logging_first_step",
    "log_level", "disable_tqdm", "report_to", "run_name", "save_total_limit", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers", "ddp_timeout",
    "early_stopping_patience", "early_stopping_threshold", "per_device_eval_batch_size", "output_dir",
    "cache_visual_embeddings", "visual_cache_dir",
}  # fmt: skip


def mark_complete(folder: str | Path) -> None:
    """Flush every file of a checkpoint to the disk, then mark it: only a marked checkpoint is resumed from."""
    folder = Path(folder)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            _flush(file)
    (folder / _MARKER).touch()
    _flush(folder / _MARKER)
    _flush(folder)
    _flush(folder.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_checkpoints(output_dir: str | Path) -> tuple[list[Path], list[Path]]:
    """(complete, incomplete) checkpoint folders of a run, oldest first."""
    folders = [f for f in Path(output_dir).glob("checkpoint-*") if f.is_dir() and _FOLDER.fullmatch(f.name)]
    folders.sort(key=lambda folder: int(_FOLDER.fullmatch(folder.name)[1]))
    return [f for f in folders if (f / _MARKER).is_file()], [f for f in folders if not (f / _MARKER).is_file()]


def delete_run(output_dir: str | Path) -> None:
    """Delete the checkpoints and results of an earlier run; other files stay."""
    for folder in sum(find_checkpoints(output_dir), []):
        shutil.rmtree(folder)
    for name in (CONFIG_NAME, RESULTS_NAME):
        (Path(output_dir) / name).unlink(missing_ok=True)


def read_results(output_dir: str | Path) -> dict | None:
    """The results of a run that ended, or None."""
    path = Path(output_dir) / RESULTS_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def check_same_run(output_dir: str | Path, settings: dict) -> None:
    """Refuse to continue a run with settings that would make it another run.

    Raises:
        ConfigError: names each setting with both values, and the ways out.
    """
    path = Path(output_dir) / CONFIG_NAME
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(settings))
    differing = [
        f"  {name}: {before.get(name)!r} there, {now.get(name)!r} now"
        for name in sorted(before.keys() | now.keys())
        if name not in _HARMLESS and before.get(name) != now.get(name)
    ]
    if differing:
        raise ConfigError(
            f"{output_dir} holds a run with other settings:\n" + "\n".join(differing) + "\n"
            "Give this run another --output_dir, or delete that run with --overwrite_output_dir true, "
            "or continue it all the same with --resume_from_checkpoint true"
        )


def resume_checkpoint(output_dir: str | Path, wish: str | bool | None) -> Path | None:
    """The checkpoint to continue from: the wished one, or the last complete one; None to begin anew.

    Raises:
        ConfigError: the wished checkpoint does not exist or was not written to its end.
    """
    complete, _ = find_checkpoints(output_dir)
    if isinstance(wish, str):
        if not (Path(wish) / _MARKER).is_file():
            names = ", ".join(folder.name for folder in complete) or "none"
            raise ConfigError(f"resume_from_checkpoint: {wish} is no complete checkpoint; {output_dir} has: {names}")
        return Path(wish)
    if wish is False or not complete:
        return None
    return complete[-1]


def read_state(checkpoint: Path) -> dict:
    """The trainer's state as the checkpoint holds it."""
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def write_json(path: Path, content: dict) -> None:
    """Write whole or not at all: to a neighbour first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _flush(temporary)
    temporary.replace(path)
