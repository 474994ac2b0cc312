"""Numbers that the released checkpoints fix and every layer of the package shares.

Source: remote code of AIDC-AI/Ovis2.5-9B (Apache-2.0).
"""

import numpy as np

MODEL_TYPE = "ovis2_5"

# Ids below zero mark visual positions inside `input_ids`; they are in no vocabulary, so text can never
# be mistaken for them. The four indicators own the last four rows of `vte.weight`, in this order.
VISUAL_ATOM_ID = -300
IMAGE_BEGIN_ID, IMAGE_END_ID, VIDEO_BEGIN_ID, VIDEO_END_ID = -301, -302, -303, -304
INDICATOR_IDS = (IMAGE_BEGIN_ID, IMAGE_END_ID, VIDEO_BEGIN_ID, VIDEO_END_ID)
NUM_INDICATORS = len(INDICATOR_IDS)

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"

# Positions with this label are not learned (PyTorch's default `ignore_index`).
IGNORE_INDEX = -100

TURN_BEGIN = "<|im_start|>"
TURN_END = "<|im_end|>"
THINK_BEGIN = "<think>"
THINK_END = "</think>"
TOOL_CALL_BEGIN, TOOL_CALL_END = "<tool_call>", "</tool_call>"
TOOL_RESPONSE_BEGIN, TOOL_RESPONSE_END = "<tool_response>", "</tool_response>"
EMPTY_THINK = "<think>\n\n</think>\n\n"

# Pixel budgets (min, max) per kind of visual input, and the factor every resized side is a multiple of.
SINGLE_IMAGE_PIXELS = (448 * 448, 1792 * 1792)
MULTIPLE_IMAGE_PIXELS = (448 * 448, 896 * 896)
VIDEO_PIXELS = (448 * 448, 896 * 896)
PATCH_SIZE = 16
HIDDEN_STRIDE = 2
SIZE_FACTOR = PATCH_SIZE * HIDDEN_STRIDE

# The float32 value of each byte of a picture: x / 255, minus 0.5, over 0.5, in the released order of roundings.
PIXEL_TABLE = (
    ((np.arange(256, dtype=np.float64) * 0.00392156862745098).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)
).astype(np.float32)

# Megapixels up to which a picture is decoded as it is. Pillow refuses larger ones by itself.
MAX_IMAGE_MEGAPIXELS = 178
