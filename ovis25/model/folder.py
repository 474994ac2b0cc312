"""A whole model folder, looked through before anything is loaded from it."""

from pathlib import Path

from transformers import GenerationConfig

from ovis25.checkpoint import CheckpointError, check_file, cure_for, read_json
from ovis25.constants import MODEL_TYPE
from ovis25.model.config import Ovis2_5_Config
from ovis25.model.ovis import check_stored_weights, weight_shapes
from ovis25.tokenizer_files import check_template, check_tokenizer

# read where they are there
_OPTIONAL = (
    "added_tokens.json", "chat_template.json", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "special_tokens_map.json",
)  # fmt: skip
_GENERATION = "generation_config.json"
# more layers than any such model has: a number that is damaged, whose model would never be built
_MOST_LAYERS = 1000


def check_folder(folder: str | Path, with_weights: bool = True) -> None:
    """Whether a folder holds a whole Ovis2.5 model in the released layout; reads headers and small files alone.

    Config, weights (every tensor there, of the right shape, in files of the right length), tokenizer (there, whole, and
    of the size of the embedding), chat template, and the small files beside them; `with_weights=False` passes over the
    weights.

    Raises:
        CheckpointError: one line: which file, what is wrong with it, how to get it.
    """
    folder = Path(folder)
    config = read_config(folder)
    _check_shapes(folder, config)
    if with_weights:
        check_stored_weights(folder, config)
    check_tokenizer(folder, config.llm_config.vocab_size)
    check_template(folder)
    for name in _OPTIONAL:
        if (folder / name).exists() or (folder / name).is_symlink():
            read_json(folder, name)
    _check_generation(folder)


def _check_generation(folder: Path) -> None:
    """transformers takes the values of generation_config.json. Raises CheckpointError: it does not."""
    if not (folder / _GENERATION).exists():
        return
    try:
        GenerationConfig.from_pretrained(folder)
    except Exception as error:
        # whatever its checks raise, they raise because of a value
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder / _GENERATION} cannot be used: {reason[:300]}; {cure_for(folder, _GENERATION)}"
        ) from error


def read_config(folder: str | Path) -> Ovis2_5_Config:
    """The folder's configuration. Raises CheckpointError: it is missing, cut, or that of another model."""
    folder = Path(folder)
    check_file(folder, "config.json")
    content = read_json(folder, "config.json")
    if content.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is {content.get('model_type')!r}; this package computes "
            f"{MODEL_TYPE!r} checkpoints only, for example AIDC-AI/Ovis2.5-2B"
        )
    try:
        return Ovis2_5_Config.from_pretrained(folder)
    except CheckpointError:
        raise
    except Exception as error:
        # whatever the classes of a configuration raise, they raise because of its values
        raise _no_model(folder, error) from error


def _check_shapes(folder: Path, config: Ovis2_5_Config) -> None:
    """The model can be made of its config: without memory for its weights.

    Raises:
        CheckpointError: it cannot.
    """
    for part in ("llm_config", "vit_config"):
        num_layers = getattr(config, part).num_hidden_layers
        if not 0 < num_layers <= _MOST_LAYERS:
            reason = f"{part}.num_hidden_layers is {num_layers}; it must be at least 1 and at most {_MOST_LAYERS}"
            raise _no_model(folder, reason)
    try:
        weight_shapes(config)
    except Exception as error:
        # whatever a layer raises, it raises because of the values it is made of
        raise _no_model(folder, error) from error


def _no_model(folder: Path, reason: Exception | str) -> CheckpointError:
    text = " ".join(str(reason).split())
    return CheckpointError(
        f"{folder / 'config.json'} describes no Ovis2.5 model: {text[:300]}; {cure_for(folder, 'config.json')}"
    )
