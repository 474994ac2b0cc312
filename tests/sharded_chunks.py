"""Two ranks under ZeRO-3 whose rows take different numbers of chunks; run by test_distributed.py.

Rank 0 has one chunk of visual tokens and of learned rows, rank 1 has many. Prints the losses of two steps.
"""

import os
import sys

import torch

from ovis25 import Ovis2_5
from ovis25.constants import IGNORE_INDEX, IMAGE_BEGIN_ID, IMAGE_END_ID, VISUAL_ATOM_ID

LEARNING_RATE = 0.1


def sample(rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    side, num_learned = ((2, 1), (8, 20))[rank]
    ids = [IMAGE_BEGIN_ID, *[VISUAL_ATOM_ID] * (side * side // 4), IMAGE_END_ID]
    words = torch.randint(0, 300, (num_learned + 1,), generator=generator).tolist()
    return {
        "input_ids": torch.tensor([ids + words]),
        "labels": torch.tensor([[IGNORE_INDEX] * (len(ids) + 1) + words[1:]]),
        "pixel_values": torch.randn(side * side, 768, generator=generator),
        "grid_thws": torch.tensor([[1, side, side]]),
    }


def main(folder: str) -> None:
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    from ovis25.model import loss, visual_tokenizer

    loss.CHUNK_ROWS, visual_tokenizer.CHUNK_TOKENS = 3, 2
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed clips at 1 where nothing is said
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    sharded = HfDeepSpeedConfig(settings)  # while it lives, models are made in shards
    model = Ovis2_5.from_pretrained(folder, dtype=torch.float32).train()
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)
    engine = deepspeed.initialize(model=model, model_parameters=parameters, optimizer=optimizer, config=sharded.config)[
        0
    ]
    rank = int(os.environ["RANK"])
    losses = []
    for _ in range(2):
        value = engine(**sample(rank)).loss
        engine.backward(value)
        engine.step()
        losses.append(value.item())
    print(f"losses of rank {rank}:", *losses, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
