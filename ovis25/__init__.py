"""Train and run Ovis2.5.

The names below are imported when they are first used, so that `import ovis25` loads neither torch nor transformers.
transformers' Auto classes know the model as soon as both packages are imported, in either order (`auto_hook`).
"""

import importlib
from typing import TYPE_CHECKING

from ovis25.auto_hook import register_with_transformers

if TYPE_CHECKING:
    from ovis25.inference import Ovis25Inference
    from ovis25.model import Ovis2_5, Ovis2_5_Config
    from ovis25.processing import Ovis2_5Processor

__version__ = "0.1.0"

__all__ = ["Ovis2_5", "Ovis2_5_Config", "Ovis2_5Processor", "Ovis25Inference"]

_HOMES = {
    "Ovis2_5": "ovis25.model",
    "Ovis2_5_Config": "ovis25.model",
    "Ovis2_5Processor": "ovis25.processing",
    "Ovis25Inference": "ovis25.inference",
}


def __getattr__(name: str):
    """A public name, from its home (PEP 562); the next use finds it here."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
