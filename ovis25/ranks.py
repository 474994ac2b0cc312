"""Which of the processes of a run this is, as torchrun's variables say."""

import os


def is_main_process() -> bool:
    """Whether this process speaks to the user and writes files (rank 0 under torchrun)."""
    return int(os.environ.get("RANK", "0")) == 0


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
