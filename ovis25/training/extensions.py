"""Locks of torch's compiled extensions (DeepSpeed compiles some at its first start) that a killed process left."""

import os
import time
from pathlib import Path

import psutil
from filelock import FileLock
from torch.utils.cpp_extension import get_default_build_root

# another machine that shares the folder may be compiling, which nobody here can see
_SHARED_FOLDER_SECONDS = 600


def remove_stale_locks(is_only_machine: bool = True) -> list[Path]:
    """Remove the `lock` files of extensions whose compiling process is gone; returns their paths.

    torch waits for such a file without end. Whoever compiles keeps it open, so a lock that no process of this machine
    has open is left over; where other machines may share the folder it must also be ten minutes old.
    """
    root = _build_root()
    if not any(root.glob("**/lock")):
        return []
    # one process at a time: a lock seen as stale must not be a fresh one by the time it is removed
    with FileLock(root / "stale_locks.guard"):
        locks = [path for path in root.glob("**/lock") if path.is_file()]
        held = _open_files() if locks else set()
        stale = [path for path in locks if str(path.resolve()) not in held]
        if not is_only_machine:
            stale = [path for path in stale if _age_s(path) > _SHARED_FOLDER_SECONDS]
        for path in stale:
            path.unlink(missing_ok=True)
    return stale


def is_first_start() -> bool:
    """Whether no extension has been compiled here yet, so that DeepSpeed's first start takes about a minute."""
    return not any(_build_root().glob("**/*.so"))


def _build_root() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def _open_files() -> set[str]:
    """Files that any process of this machine has open, as far as this user may know."""
    paths = set()
    for process in psutil.process_iter():
        try:
            paths |= {file.path for file in process.open_files()}
        except psutil.Error:
            continue
    return paths


def _age_s(path: Path) -> float:
    return time.time() - path.stat().st_mtime
