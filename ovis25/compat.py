"""Every private name of a dependency that the package cannot do without: what for, and when it may go.

Private names change without notice. Those that we use stand here and nowhere else, behind a public function, or, where
a class of ours takes the place of a method, in OVERRIDDEN. `tests/test_compat.py` says what is missing when a
dependency changes. Versions are those of `constraints.txt`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

# torch has no public name for the two modes that the planner counts memory with; its documentation names these modules
# (https://docs.pytorch.org/docs/stable/notes/extending.html). They may go when `torch` exports them.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, TrainingArguments

__all__ = [
    "LEAF_MODULE",
    "OVERRIDDEN",
    "FakeTensorMode",
    "Overridden",
    "TorchDispatchMode",
    "attention_of",
    "drive_one_device",
    "metrics_of",
    "prepare_inputs",
    "restore_callbacks",
    "set_attention",
    "storage_key",
]


# the attribute of a module class that DeepSpeed's ZeRO-3 gathers as a whole. Its public `set_z3_leaf_modules` marks
# instances, and must be called anew for every model that is made.
LEAF_MODULE = "_z3_leaf"


def storage_key(storage: torch.UntypedStorage) -> int:
    """A number that tells storages apart, also those without data.

    `data_ptr()` is 0 for all that have none, and `id()` is that of a wrapper made anew by each call.
    """
    return storage._cdata


def attention_of(config: "PreTrainedConfig") -> str | None:
    """The attention function that a model with this config takes.

    transformers 5 has a public way to set it on a model (`set_attn_implementation`), none to ask for it.
    """
    return config._attn_implementation


def set_attention(config: "PreTrainedConfig", name: str) -> None:
    """From now on its models take this one.

    The public `set_attn_implementation` looks through all modules and may ask the hub; this stands in every forward.
    """
    config._attn_implementation = name


def drive_one_device(arguments: "TrainingArguments") -> None:
    """Keep Trainer from spreading each batch over all GPUs that it sees (`nn.DataParallel`).

    `TrainingArguments.n_gpu` can only be read, and CUDA_VISIBLE_DEVICES is too late once torch has looked.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)


def restore_callbacks(trainer) -> None:
    """Give a Trainer's callbacks the states that its `state` holds, as it does itself when `train` resumes.

    May go when Trainer can be brought to a checkpoint's state without training.
    """
    trainer._load_callback_state()


def prepare_inputs(trainer, inputs: Mapping) -> dict:
    """A batch on the trainer's device, in its format; what a `prediction_step` of one's own has to begin with."""
    return trainer._prepare_inputs(inputs)


def metrics_of(trainer, mode: str) -> dict[str, list[float]]:
    """What TRL's SFTTrainer adds to its next log, as lists to be averaged; `mode` is train or eval.

    SFTTrainer counts them in its own `compute_loss`, which our loss replaces. May go when it takes them from outside.
    """
    return trainer._metrics[mode]


@dataclass(frozen=True)
class Overridden:
    """A private method or attribute of `owner` (module:class) that `ours` replaces, with the parameters counted on."""

    owner: str
    name: str
    ours: str
    why: str
    parameters: tuple[str, ...] | None = None


def _trainer(name: str, why: str, *parameters: str) -> Overridden:
    return Overridden("transformers:Trainer", name, "ovis25.training.trainer:OvisTraining", why, ("self", *parameters))


def _model(name: str, why: str, parameters: tuple[str, ...] | None = None) -> Overridden:
    return Overridden("transformers:PreTrainedModel", name, "ovis25.model:Ovis2_5", why, parameters)


_SAID_SO = "a model class tells transformers so: its documentation of models names these attributes"
OVERRIDDEN = (
    _trainer("_get_grad_norm", "between backward and step: bad updates are left out", "model", "grad_norm"),
    _trainer("_run_epoch", "samplers are told the epoch, also when a run resumes", "epoch", "train_dataloader"),
    _trainer("_get_train_sampler", "packed rows are shuffled by cost, lengths are known", "train_dataset"),
    _trainer("_get_eval_sampler", "as for training", "eval_dataset"),
    _trainer("_save", "the base's dtype, the note on the base, access rights", "output_dir", "state_dict"),
    _trainer("_save_checkpoint", "complete or not at all; the newest is marked before others go", "model", "trial"),
    _model("_init_weights", _SAID_SO, ("self", "module")),
    _model("_no_split_modules", _SAID_SO),
    _model("_skip_keys_device_placement", _SAID_SO),
    _model("_supports_sdpa", _SAID_SO),
    _model("_supports_flash_attn", _SAID_SO),
    _model("_supports_flex_attn", _SAID_SO),
    _model("_set_gradient_checkpointing", "one tower alone may recompute"),
    Overridden(
        "transformers:PreTrainedConfig",
        "_remove_keys_not_serialized",
        "ovis25.model:Ovis2_5_Config",
        "what was read of the file is no setting",
        ("self", "d"),
    ),
)
