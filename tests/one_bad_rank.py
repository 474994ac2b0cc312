"""A run whose loss is NaN at step BAD_STEP, in rank 1 alone, for tests/test_distributed.py."""

import os
import sys

from transformers import TrainerCallback

from ovis25.training.config import load_config
from ovis25.training.run import train


class Poison(TrainerCallback):
    step = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.register_forward_hook(self.spoil)

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step + 1

    def spoil(self, model, inputs, outputs):
        if model.training and self.step == int(os.environ["BAD_STEP"]) and os.environ["RANK"] == "1":
            outputs.loss = outputs.loss * float("nan")
        return outputs


try:
    train(load_config(sys.argv[1], sys.argv[2:]), callbacks=[Poison()])
except FloatingPointError as error:
    if os.environ["RANK"] == "0":
        print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
