"""AutoProcessor for the released folders, whose `preprocessor_config.json` names another processor."""

import json
from functools import wraps
from pathlib import Path

from transformers import AutoProcessor
from transformers.utils import cached_file

from ovis25.checkpoint import hub_arguments
from ovis25.constants import MODEL_TYPE
from ovis25.processing.processor import Ovis2_5Processor


def register_processor() -> None:
    """Make `AutoProcessor.from_pretrained` give an `Ovis2_5Processor` for every checkpoint in the released layout.

    `AutoProcessor.register` alone cannot: AutoProcessor first obeys the `processor_class` that
    `preprocessor_config.json` names, and the released one names SiglipProcessor, which resizes every picture
    to 512 x 512.
    """
    general = AutoProcessor.from_pretrained

    @wraps(general)
    def from_pretrained(pretrained_model_name_or_path, **kwargs):
        if _is_released_layout(pretrained_model_name_or_path, kwargs):
            return Ovis2_5Processor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return general(pretrained_model_name_or_path, **kwargs)

    AutoProcessor.from_pretrained = from_pretrained


def _is_released_layout(name_or_path, kwargs: dict) -> bool:
    try:
        file = cached_file(name_or_path, "config.json", **hub_arguments(kwargs))
    except OSError:
        # AutoProcessor says what is wrong
        file = None
    if file is None:
        return False
    config = json.loads(Path(file).read_text(encoding="utf-8"))
    return config.get("model_type") == MODEL_TYPE and "llm_config" in config
