"""May this run go on, from where, and if not, why not."""

import hashlib
import json
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ovis25.checkpoint import weights_digest
from ovis25.data import ConversationDataset, datainfo
from ovis25.files import read_json_object, resolve_input
from ovis25.tiny.strips import SOURCE_PREFIXES
from ovis25.training import checkpoints
from ovis25.training.config import ConfigError, TrainConfig

_SHORT = 12
# a run may be continued with other values of these
_HARMLESS = {
    "overwrite_output_dir", "resume_from_checkpoint", "resume_anyway", "exam", "logging_steps", "logging_strategy",
    "logging_first_step", "log_level", "disable_tqdm", "report_to", "run_name", "save_total_limit",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers",
    "ddp_timeout", "early_stopping_patience", "early_stopping_threshold", "per_device_eval_batch_size", "output_dir",
    "cache_visual_embeddings", "visual_cache_dir", "on_nonfinite",
}  # fmt: skip
_WAYS_OUT = (
    "Give this run another --output_dir, or delete that run with --overwrite_output_dir true, or continue it all the "
    "same with --resume_anyway true (or --resume_from_checkpoint true)"
)


@dataclass
class Progress:
    """What a run has done up to a checkpoint, counted over all of its starts and all processes."""

    tokens: int = 0
    seconds: float = 0.0
    skipped_steps: list[dict] = field(default_factory=list)


@dataclass
class Source:
    """Something a run is made of that its settings do not show: what it is, and a digest of its content."""

    what: str
    digest: str

    def __str__(self) -> str:
        return f"{self.what} ({self.digest})"


@dataclass
class RunRecord:
    """Which run this is: what each of its checkpoints and `train_run.json` remember.

    `sources`: the data files, the samples found in them, the base weights, the number of processes.
    """

    run_id: str
    sources: dict[str, Source]
    settings: dict
    progress: Progress = field(default_factory=Progress)

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass
class Start:
    """Where a run begins: from `checkpoint`, whose `mark` says what it holds, or anew; `notes` are for the user."""

    checkpoint: Path | None = None
    mark: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def progress(self) -> Progress:
        return Progress(**self.mark.get("progress", {}))

    @property
    def sources(self) -> dict[str, dict]:
        return self.mark.get("sources", {})

    def record(self, config: TrainConfig, sources: dict[str, Source]) -> RunRecord:
        run_id = self.mark.get("run_id") or uuid.uuid4().hex
        return RunRecord(run_id, sources, json.loads(json.dumps(config.to_dict())), self.progress)


def choose(config: TrainConfig) -> Start:
    """The checkpoint to go on from: the wished one, or the last complete one of this run that is whole.

    A damaged one is passed over with a note. Every process calls this before this run changes a file.

    Raises:
        ConfigError: the wished checkpoint does not exist, was not written to its end or is damaged; all are damaged.
    """
    wish = config.trainer.get("resume_from_checkpoint")
    if isinstance(wish, str):
        return _wished(config.output_dir, Path(wish))
    complete, _ = checkpoints.find_checkpoints(config.output_dir)
    # what is to be overwritten may be half deleted already, by rank 0
    if wish is False or config.overwrite_output_dir or not complete:
        return Start()
    run = checkpoints.read_record(Path(config.output_dir) / checkpoints.RUN_NAME) or {}
    return _last_whole(config.output_dir, complete, run.get("run_id"))


def check_wish(config: TrainConfig) -> None:
    """Refuse to go on from a checkpoint that is to be deleted first. Raises ConfigError."""
    wish = config.trainer.get("resume_from_checkpoint")
    is_lost = config.overwrite_output_dir and isinstance(wish, str)
    if is_lost and Path(wish).resolve().is_relative_to(Path(config.output_dir).resolve()):
        raise ConfigError(
            f"resume_from_checkpoint: {wish} lies in the folder that overwrite_output_dir would delete; "
            "remove one of the two settings"
        )


def _wished(output_dir: str, folder: Path) -> Start:
    if not checkpoints.is_marked(folder):
        names = ", ".join(f.name for f in checkpoints.find_checkpoints(output_dir)[0]) or "none"
        raise ConfigError(f"resume_from_checkpoint: {folder} is no complete checkpoint; {output_dir} has: {names}")
    if damage := checkpoints.damage_of(folder):
        raise ConfigError(f"resume_from_checkpoint: {folder} is damaged ({damage}); choose an earlier one")
    return Start(folder, checkpoints.read_mark(folder))


def _last_whole(output_dir: str, complete: list[Path], run_id: str | None) -> Start:
    """Without a record of the run, it is that of the last checkpoint that can be read."""
    notes, damaged = [], []
    for folder in reversed(complete):
        if damage := checkpoints.damage_of(folder):
            damaged.append(f"{folder.name} is damaged ({damage})")
            continue
        mark = checkpoints.read_mark(folder)
        run_id = run_id or mark.get("run_id")
        if mark.get("run_id") != run_id:
            notes.append(f"{folder.name} belongs to another run and is passed over")
            continue
        return Start(folder, mark, [f"{text} and is passed over" for text in damaged] + notes)
    if damaged:
        raise ConfigError(
            f"{output_dir} has no checkpoint that this run could go on from: {'; '.join(damaged)}. Restore one, or "
            "begin anew with --resume_from_checkpoint false or another --output_dir"
        )
    return Start(notes=notes)


def sources_of(config: TrainConfig, folder: Path, num_processes: int) -> dict[str, Source]:
    """The data files, the base model and the number of processes, known before anything is loaded."""
    shapes = (folder / "config.json").read_bytes() if (folder / "config.json").is_file() else b""
    base = Source(str(folder), _digest(shapes + weights_digest(folder).encode()))
    processes = Source(str(num_processes), _digest(str(num_processes).encode()))
    return {**data_sources(config), "model_path": base, "number of processes": processes}


def data_sources(config: TrainConfig) -> dict[str, Source]:
    """The files of each data set; generated data are what their source says."""
    given = {name: getattr(config, name) for name in ("data_path", "eval_data_path")}
    return {name: data_source(source) for name, source in given.items() if source}


def data_source(source: str | list[str]) -> Source:
    """A data set by the content of its files."""
    files = [path for part in ([source] if isinstance(source, str) else source) for path in _files(str(part))]
    digests = [_file_digest(path) for path in files]
    return Source(str(source), digests[0] if len(digests) == 1 else _digest("".join(digests or [str(source)]).encode()))


def _files(source: str) -> list[Path]:
    if source.startswith(SOURCE_PREFIXES):
        return []
    if not source.startswith(datainfo.PREFIX):
        return [path for path in [Path(source)] if path.is_file()]
    path, names = datainfo.split_source(source)
    files = [Path(path)]
    try:
        entries = read_json_object(Path(path))
        files += [resolve_input(entries[name.strip()]["meta_file"], Path(path).parent) for name in names.split("|")]
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        # what is wrong with it is said where it is read
        pass
    return [file for file in files if file.is_file()]


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_SHORT]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_SHORT]


def samples_source(dataset: ConversationDataset) -> Source:
    """What the check of a data set found, its pictures' sizes and the samples left out among it."""
    counts = dataset.statistics()
    sizes = b"" if counts.is_estimate else dataset.sizes.tobytes()
    left_out = json.dumps([defect.index for defect in dataset.skipped]).encode()
    what = f"{counts.num_samples:,} samples, {counts.total_tokens:,} tokens"
    return Source(what, _digest(what.encode() + sizes + left_out))


def check_same_sources(config: TrainConfig, before: dict[str, dict], now: dict[str, Source]) -> list[str]:
    """Refuse to go on with other data or another base than a record's `before`; returns what differs as notes, where
    the user wants it all the same.

    Raises:
        ConfigError: names each with both values, and the ways out.
    """
    pairs = {name: (Source(**before[name]), source) for name, source in now.items() if name in before}
    lines = [f"{name}: {old} there, {new} now" for name, (old, new) in pairs.items() if old.digest != new.digest]
    if not lines:
        return []
    if config.resume_anyway or config.trainer.get("resume_from_checkpoint"):
        return [f"goes on all the same with another {line}" for line in lines]
    what = "\n".join(f"  {line}" for line in lines)
    raise ConfigError(f"{config.output_dir} holds a run that began otherwise:\n{what}\n{_WAYS_OUT}")


def check_same_run(config: TrainConfig) -> None:
    """Refuse to continue a run with settings that would make it another run.

    Raises:
        ConfigError: names each setting with both values, and the ways out; a record cannot be read.
    """
    before = checkpoints.read_record(Path(config.output_dir) / checkpoints.CONFIG_NAME)
    if before is None or config.resume_anyway:
        return
    now = json.loads(json.dumps(config.to_dict()))
    differing = [
        f"  {name}: {before.get(name)!r} there, {now.get(name)!r} now"
        for name in sorted(before.keys() | now.keys())
        if name not in _HARMLESS and before.get(name) != now.get(name)
    ]
    if differing:
        raise ConfigError(
            f"{config.output_dir} holds a run with other settings:\n" + "\n".join(differing) + f"\n{_WAYS_OUT}"
        )


def check_can_go_on(checkpoint: Path) -> None:
    """Refuse a checkpoint of weights alone: optimizer and schedule would start anew.

    Raises:
        ConfigError: says how to use its weights.
    """
    names = ("optimizer*", "global_step*")
    if not any(found for name in names for found in checkpoint.glob(name)):
        raise ConfigError(
            f"{checkpoint} holds weights alone (save_only_model), no optimizer state, so the run cannot go on from it. "
            f"Start anew from its weights with --model_path {checkpoint} and another --output_dir, or from the "
            "beginning with --overwrite_output_dir true"
        )
