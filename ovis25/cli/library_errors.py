"""What libraries raise for full disks and full devices: the user's to mend, in every command that loads a model."""

import torch
from safetensors import SafetensorError

LIBRARY_ERRORS = (SafetensorError, torch.OutOfMemoryError)
