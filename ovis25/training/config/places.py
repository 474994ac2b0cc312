"""Can the folders of a run be written to? Asked before anything is loaded; nothing stays behind."""

import errno
import os
import tempfile
from pathlib import Path

from ovis25.text import shorten
from ovis25.training.config.fields import TrainConfig
from ovis25.training.config.kinds import ConfigError

_CURES = {
    errno.ENOSPC: "its disk is full; free some space",
    errno.EDQUOT: "your quota there is used up; free some space",
    errno.EROFS: "it is read-only",
    errno.EACCES: "you may not write there",
    errno.ENOENT: "no file can be made there",
    errno.EPERM: "you may not write there",
}


def check_places(config: TrainConfig) -> None:
    """`output_dir`, and `visual_cache_dir` where it is used, can be made and written to.

    Raises:
        ConfigError: the key, the folder, what stands in the way.
    """
    check_folder("output_dir", config.output_dir)
    if config.visual_cache_dir and config.cache_visual_embeddings:
        check_folder("visual_cache_dir", config.visual_cache_dir)


def check_folder(key: str, folder: str | Path) -> None:
    """The folder can be made and written to; an unnamed file in the nearest one that exists shows it.

    Raises:
        ConfigError: what stands in the way; one line.
    """
    folder = Path(folder)
    try:
        existing = _nearest_existing(folder)
        if not existing.is_dir():
            _refuse(key, folder, "it is a file" if existing == folder else f"it lies below {existing}, which is a file")
        _check_names(key, folder, existing)
        if not os.access(existing, os.W_OK | os.X_OK):
            _refuse(key, folder, f"you may not write to {existing}")
        _try_to_write(existing)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = _CURES.get(getattr(error, "errno", None)) or getattr(error, "strerror", None) or str(error)
        _refuse(key, folder, reason, error)


def _refuse(key: str, folder: Path, reason: str, cause: Exception | None = None) -> None:
    text = f"{key} is {shorten(str(folder), 200)}, which cannot be written to: {reason}; name another folder"
    raise ConfigError(text) from cause


def _nearest_existing(folder: Path) -> Path:
    # a link that leads nowhere is in the way too
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def _check_names(key: str, folder: Path, existing: Path) -> None:
    """Names that are yet to be made: the file system may take no such long ones."""
    longest_path, longest = os.pathconf(existing, "PC_PATH_MAX"), os.statvfs(existing).f_namemax
    if len(os.fsencode(folder)) > longest_path - longest:
        _refuse(
            key, folder, f"a path of {len(os.fsencode(folder))} bytes; its disk takes {longest_path} with the files"
        )
    for name in folder.relative_to(existing).parts:
        if len(os.fsencode(name)) > longest:
            _refuse(key, folder, f"a name of {len(os.fsencode(name))} bytes; its disk takes {longest}")


def _try_to_write(folder: Path) -> None:
    """A block in a file that has no name where the system can do that, and is gone at once elsewhere."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0" * 4096)
        file.flush()
