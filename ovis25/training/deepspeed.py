"""What is asked of DeepSpeed itself; transformers and accelerate do the rest. Loaded only when asked."""

import contextlib
import importlib
import io
import os
import shlex
import socket
import sys
from collections.abc import Iterable

import torch
from torch.utils import cpp_extension

from ovis25.ranks import is_main_process
from ovis25.training.extensions import is_first_start


def start() -> None:
    """Its process group, which building a model in shards needs, without its line on every process of what it built."""
    if not torch.cuda.is_available() and is_first_start() and is_main_process():
        print("DeepSpeed compiles its parts for the CPU, once; about a minute ...", file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(io.StringIO()):
        _deepspeed().init_distributed(auto_mpi_discovery=False)


def gathered(parameters: Iterable[torch.nn.Parameter]) -> contextlib.AbstractContextManager:
    """Under ZeRO-3: the parameters whole on every device, inside a `with`."""
    return _deepspeed().zero.GatheredParameters(list(parameters))


def check_zero(section: dict) -> None:
    """Read the `zero_optimization` section of a config. Raises ValueError (pydantic's) for what DeepSpeed refuses."""
    importlib.import_module("deepspeed.runtime.zero.config").DeepSpeedZeroConfig(**section)


def allow_blanks() -> None:
    """Let DeepSpeed compile where a path has blanks.

    It compiles its parts when they are first used, and torch gives the linker the path of its own libraries without
    quotes (2.13, `torch/utils/cpp_extension.py`).
    """
    if not cpp_extension.TORCH_LIB_PATH.startswith("'"):
        cpp_extension.TORCH_LIB_PATH = shlex.quote(cpp_extension.TORCH_LIB_PATH)


def be_the_only_process() -> None:
    """What torchrun tells its processes, for one started without it: DeepSpeed would look for MPI instead."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _deepspeed():
    return importlib.import_module("deepspeed")
