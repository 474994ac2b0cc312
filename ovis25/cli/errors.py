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

import os
import sys
from collections.abc import Callable

from ovis25.cli.command import Command
from ovis25.errors import UserError
from ovis25.ranks import is_main_process
from ovis25.text import escape_controls

USER_ERRORS = (UserError, FileNotFoundError, FloatingPointError)
_INTERRUPTED = 130


def exit_code_of(command: Command, run: Callable[[], int]) -> int:
    """Run, and turn what the user can mend into one message of the main process."""
    try:
        return run()
    except KeyboardInterrupt:
        _tell(f"\n{command.interrupted}")
        return _INTERRUPTED
    except (*USER_ERRORS, *command.user_errors) as error:
        if os.environ.get("OVIS25_DEBUG"):
            raise
        _tell(f"error: {escape_controls(str(error))}")
        return getattr(error, "exit_code", UserError.exit_code)


def _tell(message: str) -> None:
    if is_main_process():
        print(message, file=sys.stderr)
