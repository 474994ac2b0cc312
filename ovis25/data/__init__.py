"""The documented data format: reading, checking, encoding, batching."""

from ovis25.data.collator import Collator
from ovis25.data.dataset import ConversationDataset, Statistics
from ovis25.data.errors import DataError

__all__ = ["Collator", "ConversationDataset", "DataError", "Statistics"]
