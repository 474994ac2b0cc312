"""Checkpoint folders: finding one by name, and the files that travel beside the weights."""

import hashlib
import shutil
from pathlib import Path

from huggingface_hub import constants as hub_constants
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

PROCESSOR_CONFIG_NAME = "processor_config.json"

_SIDE_SUFFIXES = (".json", ".txt", ".jinja", ".py", ".model")
# what the model writes itself, or what belongs to one training run
_NOT_SIDE_FILES = (
    "config.json", "trainer_state.json", "train_config.json", "train_plan.json", "train_results.json",
    "train_run.json", "eval_results.json", "all_results.json", "adapter_config.json",
)  # fmt: skip
_NUM_BLOCKS, _BLOCK_BYTES = 64, 4096
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def hub_arguments(kwargs: dict) -> dict:
    """Those of `from_pretrained`'s keyword arguments that say what to fetch from the hub, and how."""
    return {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}


def resolve_checkpoint(name_or_path: str | Path, marker: str = "config.json", **hub_kwargs) -> Path:
    """The folder of a checkpoint: an existing one as it is, a hub name downloaded (or found in the cache) whole.

    `marker` is the file that tells a checkpoint from any other folder. `hub_kwargs` (`revision`, `cache_dir`, ...) go
    to huggingface_hub's `snapshot_download`.

    Raises:
        FileNotFoundError: no such folder; a folder without the marker; a hub name that cannot be reached.
            The message says where it looked and what to do.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / marker).is_file():
            found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(f"{folder} holds no {marker}, so it is no checkpoint folder (it holds {found})")
        return folder
    name = str(name_or_path)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(
            f"{name} is neither a folder here ({folder.absolute()}) nor a hub name like AIDC-AI/Ovis2.5-2B"
        )
    cache = hub_kwargs.get("cache_dir", hub_constants.HF_HUB_CACHE)
    try:
        return Path(snapshot_download(name, **hub_kwargs))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{name} is no folder here and could not be fetched from the hub ({type(error).__name__}). "
            f"Searched the cache {cache}. Either connect to the hub once "
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
    """Copy the side files byte for byte; folders that are the same are left alone.

    A processor's limits that the target already holds are kept: the run that saves there wrote them.
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    for file in side_files(source):
        if file.name == PROCESSOR_CONFIG_NAME and (target / file.name).exists():
            continue
        shutil.copyfile(file, target / file.name)


def weights_digest(folder: str | Path) -> str:
    """SHA-256, as 64 hex digits, over every safetensors file of a folder, in the order of names: its name, its size,
    its header, and 64 blocks of 4 KiB evenly spread over it.

    It tells models and files apart in milliseconds; it does not find a single flipped bit.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            # the format: the header's length in 8 bytes, little-endian, then the header
            length = file.read(8)
            digest.update(length + file.read(min(int.from_bytes(length, "little"), path.stat().st_size)))
        digest.update(sampled_digest(path).encode())
    return digest.hexdigest()


def sampled_digest(path: str | Path) -> str:
    """SHA-256 over a file's size and 64 blocks of 4 KiB, evenly spread from its first to its last byte; of a file that
    is not longer than that, over all of it.
    """
    size = Path(path).stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= _NUM_BLOCKS * _BLOCK_BYTES:
            digest.update(file.read())
        else:
            for block in range(_NUM_BLOCKS):
                file.seek(block * (size - _BLOCK_BYTES) // (_NUM_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()
