"""The documented import: from inference_ovis25 import Ovis25Inference"""

from ovis25 import Ovis25Inference

__all__ = ["Ovis25Inference"]
