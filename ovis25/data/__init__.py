"""The documented data format: reading, checking, encoding, batching."""

from ovis25.data.collator import Collator
from ovis25.data.dataset import ConversationDataset
from ovis25.data.errors import DataError
from ovis25.data.survey import Statistics, Survey

__all__ = ["Collator", "ConversationDataset", "DataError", "Statistics", "Survey"]
