"""`python -m ovis25.launch`: torchrun, whose own stack and table do not bury what a process said.

Takes torchrun's arguments. Its exit code is that of the process that failed first. What another process than the main
one said alone is read out here, and so is the signal that ended a process.
"""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import main as torchrun

# a process that ended with one of these has said why (`ovis25.cli.errors`)
_TOLD = (2, 3, 130)
_SIGNAL_BASE = 128
_NOISE = ("api", "errors.error_handler")


def main(arguments: list[str] | None = None) -> int:
    # which process was sent which signal, and a table of them: every failure, in torchrun's words
    for name in _NOISE:
        logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}").setLevel(logging.CRITICAL)
    try:
        torchrun(arguments)
        return 0
    except ChildFailedError as error:
        return _tell(error.failures)


def _tell(failures: dict[int, ProcessFailure]) -> int:
    """Say what no process has said; returns the exit code."""
    # a process that was ended because another had failed is no reason
    reasons = {rank: failure for rank, failure in failures.items() if failure.exitcode != -signal.SIGTERM} or failures
    rank = min(reasons, key=lambda rank: (reasons[rank].timestamp, rank))
    failure = reasons[rank]
    # the main process may have been ended while it was leaving
    is_told = 0 in failures and (failures[0].exitcode in _TOLD or "timestamp" in failures[0].error_file_data)
    if not is_told:
        print(f"error: process {rank} {_ending(failure)}", file=sys.stderr)
    return failure.exitcode if failure.exitcode > 0 else _SIGNAL_BASE - failure.exitcode


def _ending(failure: ProcessFailure) -> str:
    if failure.exitcode in _TOLD and isinstance(failure.message, str):
        return f"failed: {failure.message}"
    if failure.exitcode >= 0:
        return f"ended with exit code {failure.exitcode}; what it said stands above"
    name = signal.Signals(-failure.exitcode).name
    cause = "; often the machine was out of memory" if name == "SIGKILL" else ""
    return f"was ended by {name}{cause}. The same command goes on from the last complete checkpoint"


if __name__ == "__main__":
    sys.exit(main())
