"""Running trained and released checkpoints."""

from ovis25.inference.engine import Ovis25Inference
from ovis25.inference.request import Request, RequestError

__all__ = ["Ovis25Inference", "Request", "RequestError"]
