"""The model: configuration, vision encoder, visual tokenizer, the whole, the loss."""

from ovis25.model.config import Ovis2_5_Config, SiglipNavitConfig
from ovis25.model.ovis import Ovis2_5, Ovis2_5_Output

__all__ = ["Ovis2_5", "Ovis2_5_Config", "Ovis2_5_Output", "SiglipNavitConfig"]
