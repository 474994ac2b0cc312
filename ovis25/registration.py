"""Importing this registers the model with transformers' Auto classes; `auto_hook` imports it when they are there."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from ovis25.model import Ovis2_5, Ovis2_5_Config
from ovis25.processing import Ovis2_5Processor
from ovis25.processing.auto import register_processor

AutoConfig.register(Ovis2_5_Config.model_type, Ovis2_5_Config, exist_ok=True)
AutoModelForCausalLM.register(Ovis2_5_Config, Ovis2_5, exist_ok=True)
AutoModelForImageTextToText.register(Ovis2_5_Config, Ovis2_5, exist_ok=True)
AutoProcessor.register(Ovis2_5_Config, Ovis2_5Processor, exist_ok=True)
register_processor()
