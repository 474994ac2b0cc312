"""Our own lines instead of other libraries' bars and notices."""

import logging
import os
import warnings

import torch
from huggingface_hub.utils import enable_progress_bars
from transformers.utils import logging as transformers_logging

from ovis25.ranks import is_main_process
from ovis25.text import escape_controls


def quieten() -> None:
    """Silence notices and bars, unless OVIS25_DEBUG is set; errors stay."""
    if not os.environ.get("OVIS25_DEBUG"):
        # one line, without the place in our code
        warnings.formatwarning = lambda message, *place: f"note: {escape_controls(' '.join(str(message).split()))}\n"
        # what other libraries will have to change one day
        warnings.filterwarnings("ignore", category=FutureWarning)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        if not torch.accelerator.is_available():
            # so that DeepSpeed, which PEFT imports, does not warn that it found no GPU
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # accelerate would warn that DeepSpeed's accumulation, which is the config's, wins
        logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
        if is_main_process():
            # a download takes long: its bars stay
            enable_progress_bars()
