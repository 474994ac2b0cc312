"""Train and run Ovis2.5."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from ovis25.inference import Ovis25Inference
from ovis25.model import Ovis2_5, Ovis2_5_Config
from ovis25.processing import Ovis2_5Processor

__version__ = "0.1.0"

AutoConfig.register(Ovis2_5_Config.model_type, Ovis2_5_Config, exist_ok=True)
AutoModelForCausalLM.register(Ovis2_5_Config, Ovis2_5, exist_ok=True)
AutoModelForImageTextToText.register(Ovis2_5_Config, Ovis2_5, exist_ok=True)
AutoProcessor.register(Ovis2_5_Config, Ovis2_5Processor, exist_ok=True)

__all__ = ["Ovis2_5", "Ovis2_5_Config", "Ovis2_5Processor", "Ovis25Inference"]
