"""From what a user names to the folders that a model is loaded from: a whole model, or an adapter and its base."""

from dataclasses import dataclass
from pathlib import Path

from ovis25.checkpoint import CheckpointError, resolve_checkpoint
from ovis25.model.adapter import ADAPTER_CONFIG_NAME, adapter_base, check_adapter
from ovis25.model.adapter import check_base as check_adapter_base
from ovis25.model.folder import check_folder
from ovis25.tiny.build import resolve_model_path
from ovis25.tokenizer_files import CONFIG_NAME, check_tokenizer


@dataclass(frozen=True)
class ModelFolders:
    """Where the weights lie, the adapter that goes on them (or None), and where tokenizer and processor come from."""

    weights: Path
    adapter: Path | None
    processor: Path


def find_model(name: str | Path, base: str | Path | None = None, check_base: bool = True) -> ModelFolders:
    """The folders behind a folder, an adapter's folder, a hub name, or `tiny`; looked through, nothing is loaded.

    An adapter that PEFT alone has saved, without a tokenizer, takes its base's.

    Args:
        base: the base of an adapter, where its own name for it does not lead there.
        check_base: refuse a base with other weights than those that the adapter was trained on.

    Raises:
        FileNotFoundError: the folder, or the adapter's base, cannot be found.
        CheckpointError: a folder is not whole, or the base is not the adapter's.
    """
    path = Path(resolve_model_path(name)).expanduser()
    is_adapter = (path / ADAPTER_CONFIG_NAME).is_file()
    folder = path if is_adapter else resolve_checkpoint(resolve_model_path(name), _marker(path))
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        if base is not None:
            raise CheckpointError(f"base is {base}, but {folder} is a whole model and no adapter; leave base out")
        check_folder(folder)
        return ModelFolders(folder, None, folder)
    check_adapter(folder)
    weights = _base_folder(folder, base)
    check_folder(weights)
    if check_base:
        check_adapter_base(folder, weights)
    has_processor = (folder / CONFIG_NAME).exists()
    if has_processor:
        check_tokenizer(folder)
    return ModelFolders(weights, folder, folder if has_processor else weights)


def _marker(path: Path) -> str:
    """An adapter's folder has no config.json; one whose adapter_config.json is missing is named by that."""
    is_damaged_adapter = path.is_dir() and any(path.glob("adapter_model.*")) and not (path / "config.json").exists()
    return ADAPTER_CONFIG_NAME if is_damaged_adapter else "config.json"


def _base_folder(adapter: Path, base: str | Path | None) -> Path:
    named = base or adapter_base(adapter)
    try:
        return resolve_checkpoint(resolve_model_path(named))
    except FileNotFoundError as error:
        whose = "the base that was given for" if base else "the base that is named by"
        raise FileNotFoundError(
            f"{named} is {whose} the adapter {adapter}, and it cannot be found: {error}. If the base was moved, say "
            "where it lies now: --base PATH (base= in Python)"
        ) from error
