"""From raw images, videos and conversations to tensors; needs no model."""

from ovis25.processing.limits import VisualLimits
from ovis25.processing.processor import Ovis2_5Processor

__all__ = ["Ovis2_5Processor", "VisualLimits"]
