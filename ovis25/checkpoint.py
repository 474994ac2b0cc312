"""Checkpoint folders: finding one by name, whether a file of it is whole, and the files beside the weights."""

import hashlib
import os
import re
import shutil
import warnings
from pathlib import Path

from huggingface_hub import constants as hub_constants
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from ovis25.files import read_json_object

PROCESSOR_CONFIG_NAME = "processor_config.json"

_SIDE_SUFFIXES = (".json", ".txt", ".jinja", ".py", ".model")
# what the model writes itself, or what belongs to one training run
_NOT_SIDE_FILES = (
    "config.json", "trainer_state.json", "train_config.json", "train_plan.json", "train_results.json",
    "train_run.json", "eval_results.json", "all_results.json", "adapter_config.json", "ovis25_base.json",
)  # fmt: skip
_NUM_BLOCKS, _BLOCK_BYTES = 64, 4096
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# a folder of the hub's cache: models--OWNER--NAME/snapshots/REVISION, whose files are links into models--.../blobs
_CACHE_FOLDER = re.compile(r"models--([^-].*?)--(.+)")
_LFS_POINTER = b"version https://git-lfs"
_UNFINISHED = ("*.incomplete", "*.part", "*.crdownload", "*.aria2")


class CheckpointError(FileNotFoundError, ValueError):
    """A model's folder that cannot be used as it is: which file, what is wrong with it, how to get it. One line."""


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
            "download: src_theo/train_launch.sh src_theo/train_config_tiny.json 1"
        ) from error


def hub_name(folder: str | Path) -> str | None:
    """The hub's name of the model in a folder, where its place in the hub's cache or its `config.json` tells it."""
    folder = Path(folder)
    for part in (folder.name, folder.parent.parent.name):
        if found := _CACHE_FOLDER.fullmatch(part):
            return f"{found[1]}/{found[2]}"
    try:
        name = read_json_object(folder / "config.json").get("_name_or_path")
    except (OSError, ValueError):
        return None
    # a path of the same form, as transformers writes for a model that was loaded from a folder, is no hub name
    return name if isinstance(name, str) and _HUB_NAME.fullmatch(name) and not Path(name).exists() else None


def cure_for(folder: str | Path, file: str) -> str:
    """How to get a file of a model's folder again."""
    name = hub_name(folder)
    if name is None:
        return f"copy {file} again from where this folder came from (or download the model anew)"
    is_cache = Path(folder).parent.name == "snapshots"
    place = " --force-download" if is_cache else f" --local-dir {folder}"
    quoted = f"'{file}'" if "*" in file else file
    return f"get it with: hf download {name} --include {quoted}{place}"


def unfinished_downloads(folder: str | Path) -> str:
    """What downloads that were not finished left in a folder, for a message; empty where there is nothing."""
    folder = Path(folder)
    places = (folder, folder / ".cache" / "huggingface" / "download")
    found = sorted(file.name for place in places for pattern in _UNFINISHED for file in place.glob(pattern))
    return f" (a download was not finished: {', '.join(found[:3])})" if found else ""


def check_file(folder: str | Path, name: str) -> Path:
    """A file of a model's folder that is there and holds something.

    Raises:
        CheckpointError: it is missing, a folder, empty, or a git-lfs pointer; says how to get it.
    """
    path, cure = Path(folder) / name, cure_for(folder, name)
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path} is a link to {os.readlink(path)}, which does not exist; {cure}")
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "is missing"
        raise CheckpointError(f"{path} {what}{unfinished_downloads(folder)}; {cure}")
    with open(path, "rb") as file:
        begin = file.read(len(_LFS_POINTER))
    if not begin:
        raise CheckpointError(f"{path} is empty (0 bytes){unfinished_downloads(folder)}; {cure}")
    if begin == _LFS_POINTER:
        raise CheckpointError(
            f"{path} is a git-lfs pointer, a note in place of the real file; run git lfs pull in {folder}, or {cure}"
        )
    return path


def read_json(folder: str | Path, name: str) -> dict:
    """A JSON object of a model's folder. Raises CheckpointError: as `check_file`, or it is cut or no JSON object."""
    path = check_file(folder, name)
    try:
        return read_json_object(path)
    except ValueError as error:
        raise CheckpointError(f"{error}; it is cut or damaged; {cure_for(folder, name)}") from error


def lies_in(inner: str | Path, outer: str | Path) -> bool:
    """Whether `inner`, which need not exist, is `outer` or lies somewhere in it, through links and other spellings."""
    outer = Path(outer).expanduser()
    if not outer.exists():
        return False
    inner = Path(inner).expanduser().resolve()
    return any(place.exists() and place.samefile(outer) for place in (inner, *inner.parents))


def local_place(name_or_path: str | Path) -> Path:
    """Where a model lies on this machine: its folder, or for a hub name the model's part of the hub's cache."""
    folder = Path(name_or_path).expanduser()
    if folder.is_dir() or not _HUB_NAME.fullmatch(str(name_or_path)):
        return folder
    return Path(hub_constants.HF_HUB_CACHE) / f"models--{str(name_or_path).replace('/', '--')}"


def side_files(folder: str | Path) -> list[Path]:
    """The files of a checkpoint folder that are neither weights nor `config.json` nor records of a run.

    Links that lead out of the folder are none of them.
    """
    return [entry for entry in _side_entries(Path(folder)) if _is_own(entry)]


def _side_entries(folder: Path) -> list[Path]:
    return [
        entry
        for entry in sorted(folder.iterdir())
        if entry.is_file()
        and (entry.suffix in _SIDE_SUFFIXES or entry.name.startswith(("LICENSE", "NOTICE")))
        and not entry.name.endswith(".index.json")
        and entry.name not in _NOT_SIDE_FILES
    ]


def _is_own(file: Path) -> bool:
    """Whether a file lies in its folder; in the hub's cache, whose files are links, in the model's part of it."""
    if not file.is_symlink():
        return True
    folder = file.parent.resolve()
    is_cache = folder.parent.name == "snapshots" and _CACHE_FOLDER.fullmatch(folder.parent.parent.name)
    home = folder.parent.parent if is_cache else folder
    return file.resolve().is_relative_to(home)


def copy_side_files(source: str | Path, target: str | Path) -> None:
    """Copy the side files byte for byte; folders that are the same are left alone.

    A processor's limits that the target already holds are kept: the run that saves there wrote them. A link that leads
    out of the source is not followed, and said so: what it shows may be nobody's to hand on.
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    for file in _side_entries(source):
        if not _is_own(file):
            warnings.warn(
                f"{file} is a link out of its folder, to {file.resolve()}, and was not copied into {target}; put a "
                "copy in its place if it belongs to the model",
                stacklevel=2,
            )
            continue
        if file.name == PROCESSOR_CONFIG_NAME and (target / file.name).exists():
            continue
        if (target / file.name).is_symlink():
            # never written through
            (target / file.name).unlink()
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
