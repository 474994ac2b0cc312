"""Where a run may write: never over the model that it starts from."""

from pathlib import Path

from ovis25.checkpoint import lies_in, local_place
from ovis25.model.adapter import adapter_base
from ovis25.tiny.build import resolve_model_path
from ovis25.training.config import ConfigError


def check_output_dir(output_dir: str | Path, model_path: str | Path) -> None:
    """Refuse an output folder that is, lies in, or holds the model's folder, or that of an adapter's base.

    Links, `..` and other spellings of the same folder are seen through.

    Raises:
        ConfigError: names both folders.
    """
    folder = local_place(resolve_model_path(model_path))
    folders = {"the model's folder": folder}
    if base := adapter_base(folder):
        folders["the folder of the adapter's base"] = local_place(resolve_model_path(base))
    cure = "give another --output_dir, so that the run cannot overwrite what it starts from"
    for what, place in folders.items():
        if lies_in(output_dir, place):
            relation = "is" if lies_in(place, output_dir) else "lies in"
            raise ConfigError(f"output_dir {output_dir} {relation} {what} ({place}); {cure}")
        if lies_in(place, output_dir):
            raise ConfigError(f"output_dir {output_dir} holds {what} ({place}); {cure}")
