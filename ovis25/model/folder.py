"""A whole model folder, looked through before anything is loaded from it."""

from pathlib import Path

from ovis25.checkpoint import CheckpointError, check_file, read_json
from ovis25.constants import MODEL_TYPE
from ovis25.model.config import Ovis2_5_Config
from ovis25.model.ovis import check_stored_weights
from ovis25.tokenizer_files import check_template, check_tokenizer

# read where they are there
_OPTIONAL = ("generation_config.json", "preprocessor_config.json", "processor_config.json", "special_tokens_map.json")


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
    if with_weights:
        check_stored_weights(folder, config)
    check_tokenizer(folder, config.llm_config.vocab_size)
    check_template(folder)
    for name in _OPTIONAL:
        if (folder / name).exists() or (folder / name).is_symlink():
            read_json(folder, name)


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
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder / 'config.json'} describes no Ovis2.5 model: {reason}") from error
