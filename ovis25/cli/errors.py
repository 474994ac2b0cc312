"""The one frame around every command: which errors are the user's, how they are shown, and what they end with.

| exit code | what happened |
|---|---|
| 0 | done |
| 1 | `infer --requests`: some requests failed; their replies say why |
| 2 | something that the user can mend: one message, `error: ...`, on the standard error |
| 3 | the model is saved, but its curves or its exam failed |
| 130 | interrupted |

Any other error is ours: Python shows its stack. With `OVIS25_DEBUG=1` the user's errors show theirs too.
"""

import errno
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ovis25.cli.command import Command
from ovis25.errors import UserError
from ovis25.ranks import is_main_process
from ovis25.text import escape_controls

# what the user, or the machine's owner, can mend
USER_ERRORS = (UserError, OSError, FloatingPointError, MemoryError)
_INTERRUPTED = 130
_CURES = {
    errno.ENOSPC: "free some space and give the same command again",
    errno.EDQUOT: "your quota there is used up; free some space and give the same command again",
    errno.EFBIG: "files may not grow so large there; raise the limit (ulimit -f), or choose another disk",
    errno.EACCES: "give yourself the right to it, or name another place",
    errno.EROFS: "name another place",
}


def exit_code_of(command: Command, run: Callable[[], int]) -> int:
    """Run, and turn what the user can mend into one message of the main process."""
    try:
        return run()
    except KeyboardInterrupt:
        # Ctrl-C reaches every process
        if is_main_process():
            print(f"\n{command.interrupted}", file=sys.stderr)
        return _INTERRUPTED
    except (*USER_ERRORS, *command.user_errors) as error:
        if os.environ.get("OVIS25_DEBUG"):
            raise
        _tell(f"error: {escape_controls(describe(error))}")
        return getattr(error, "exit_code", UserError.exit_code)


def _tell(message: str) -> None:
    """What ends all processes alike is said by the main one; what ends another alone, by that one."""
    # where torchrun looks; `ovis25.launch` reads it out if the main process has said nothing
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        record = {"message": message.removeprefix("error: "), "timestamp": int(time.time())}
        Path(path).write_text(json.dumps(record), encoding="utf-8")
    if is_main_process():
        print(message, file=sys.stderr)


def describe(error: Exception) -> str:
    """An error's own message; one of the operating system gets the file's name first, and a cure.

    Errors of torch and safetensors are known by their names: this file must not import either.
    """
    kind = type(error).__name__
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        first = (str(error).strip().splitlines() or ["out of memory"])[0]
        return f"{first}; lower per_device_train_batch_size or the pixel budgets (ovis25 plan CONFIG says what fits)"
    if kind == "SafetensorError":
        cure = _CURES[errno.ENOSPC] if "StorageFull" in str(error) else "look at its disk and your rights there"
        return f"weights could not be written or read ({' '.join(str(error).split())}); {cure}"
    if not isinstance(error, OSError) or error.errno is None or not error.strerror:
        return str(error)
    cure = _CURES.get(error.errno)
    place = f"{error.filename}: " if error.filename is not None else ""
    return f"{place}{error.strerror}{f'; {cure}' if cure else ''}"
