"""Checkpoint folders: finding one by name, and the files that travel beside the weights."""

import shutil
from pathlib import Path

from huggingface_hub import constants as hub_constants
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

_SIDE_SUFFIXES = (".json", ".txt", ".jinja", ".py", ".model")
# what the model writes itself, or what belongs to one training run
_NOT_SIDE_FILES = (
    "config.json", "trainer_state.json", "train_config.json", "train_plan.json", "train_results.json",
    "eval_results.json", "all_results.json", "adapter_config.json",
)  # fmt: skip


def resolve_checkpoint(name_or_path: str | Path) -> Path:
    """The folder of a checkpoint: an existing one as it is, a hub name downloaded (or found in the cache) whole.

    Raises:
        FileNotFoundError: no such folder; a folder without `config.json`; a hub name that cannot be reached.
            The message says where it looked and what to do.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(f"{folder} holds no config.json, so it is no checkpoint folder (it holds {found})")
        return folder
    name = str(name_or_path)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(
            f"{name} is neither a folder here ({folder.absolute()}) nor a hub name like AIDC-AI/Ovis2.5-2B"
        )
    try:
        return Path(snapshot_download(name))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{name} is no folder here and could not be fetched from the hub ({type(error).__name__}). "
            f"Searched the cache {hub_constants.HF_HUB_CACHE}. Either connect to the hub once "
            f"(hf download {name}), or give the path of a downloaded folder, or try the framework without any "
            "download: bash src_theo/train_launch.sh src_theo/train_config_tiny.json 1"
        ) from error


def side_files(folder: str | Path) -> list[Path]:
    """The files of a checkpoint folder that are neither weights nor `config.json` nor records of a run."""
    return [
        entry
        for entry in sorted(Path(folder).iterdir())
        if entry.is_file()
        and (entry.suffix in _SIDE_SUFFIXES or entry.name.startswith(("LICENSE", "NOTICE")))
        and not entry.name.endswith(".index.json")
        and entry.name not in _NOT_SIDE_FILES
    ]


def copy_side_files(source: str | Path, target: str | Path) -> None:
    """Copy the side files byte for byte; folders that are the same are left alone."""
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    for file in side_files(source):
        shutil.copyfile(file, target / file.name)
