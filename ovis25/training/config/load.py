"""Reading a config: the file, the command line over it, old names, types, and the files that it names."""

import json
from pathlib import Path

from ovis25.data import datainfo
from ovis25.data.source import DataError
from ovis25.files import REPOSITORY_ROOT, read_json_object, resolve_input
from ovis25.processing.limits import following_minima
from ovis25.text import nearest, shorten
from ovis25.tiny.strips import SOURCE_PREFIXES, parse_source
from ovis25.training.config import trl_keys
from ovis25.training.config.check import check, check_deepspeed, note_idle
from ovis25.training.config.fields import KINDS, OWN_KEYS, TrainConfig
from ovis25.training.config.kinds import ConfigError
from ovis25.training.config.legacy import RENAMED, WITHOUT_EFFECT, translate
from ovis25.training.config.trainer_keys import TRAINER_KEYS

# settings that hold a JSON file's name, or the object itself
_JSON_FILES = ("deepspeed", "fsdp_config", "accelerator_config")


def load_config(path: str | Path, overrides: list[str] = ()) -> TrainConfig:
    """Read a config file and apply `--key value` overrides; the file may also lie in `src_theo/`.

    Every value is read here, once; the values are checked one by one and together.

    Raises:
        ConfigError: unreadable JSON, a key given twice, an unknown key (the nearest name is suggested), a value of the
            wrong type or out of its range, settings that exclude each other.
        MissingFileError: the config, or a file that it names, is nowhere; lists where it looked.
    """
    config_path = _find_config(path)
    try:
        in_file, notes, written_as = translate(_read(config_path))
        given, more_notes, overridden_as = translate(parse_overrides(overrides))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{config_path.name}: {error}") from error
    values, notes, written_as = {**in_file, **given}, [*notes, *more_notes], {**written_as, **overridden_as}
    own, trainer, trl = {}, {}, {}
    for name, value in values.items():
        if name in trl_keys.WITHOUT_EFFECT:
            notes.append(f"{name} has no effect here: {trl_keys.WITHOUT_EFFECT[name]}")
            continue
        if name not in KINDS:
            raise ConfigError(f"{config_path.name}: {_unknown_key(name)}")
        kind_of_key = own if name in OWN_KEYS else trainer if name in TRAINER_KEYS else trl
        kind_of_key[name] = KINDS[name].read(written_as.get(name, name), value)
    # null means the default
    own = {name: value for name, value in own.items() if value is not None}
    own |= following_minima(own)
    config = TrainConfig(
        **own, trainer=trainer, trl=trl, config_dir=str(config_path.parent), notes=notes, spelled=written_as
    )
    for name in ("model_path", "data_path"):
        if not getattr(config, name):
            raise ConfigError(f"{config_path.name}: {name} is missing")
    if config.packing:
        # a row is many samples already
        config.trainer.setdefault("per_device_train_batch_size", 1)
    check(config)
    note_idle(config, own)
    _resolve_paths(config)
    deepspeed = config.trainer.get("deepspeed")
    if isinstance(deepspeed, str):
        check_deepspeed(config, read_json_object(Path(deepspeed)), f"deepspeed {deepspeed}")
    elif deepspeed is not None:
        check_deepspeed(config, deepspeed, "deepspeed")
    return config


def parse_overrides(arguments: list[str]) -> dict:
    """`["--max_steps", "4", "--bf16", "--lr_scheduler_type=cosine"]` as a dict; a lone flag is true.

    Raises:
        ConfigError: a stray word, a key with two values, a key without one that is no switch.
    """
    values: dict = {}
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise ConfigError(f"unexpected argument {argument!r}: overrides are written --key value")
        spelled, has_value, text = argument[2:].partition("=")
        name = spelled.replace("-", "_")
        if not has_value:
            is_flag = not remaining or remaining[0].startswith("--")
            text = "true" if is_flag and _is_switch(name) else "" if is_flag else remaining.pop(0)
        if not text.strip():
            raise ConfigError(f"--{spelled} has no value; write --{spelled} VALUE, or null for the default")
        value = _parse_value(text)
        if name in values and values[name] != value:
            raise ConfigError(f"--{name} is given twice, as {shorten(values[name])} and {shorten(value)}; keep one")
        values[name] = value
    return values


def _is_switch(name: str) -> bool:
    """Whether a key may stand alone; an unknown one is refused by its name later."""
    kind = KINDS.get(RENAMED.get(name, name))
    return kind is None or bool in kind.types


def _parse_value(text: str):
    if text.lower() in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(text.lower())
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return text
    except ValueError as error:
        # a number of thousands of digits
        raise ConfigError(f"{shorten(text)} is no usable number: {error}") from error


def _find_config(path: str | Path) -> Path:
    try:
        found = resolve_input(path, REPOSITORY_ROOT / "src_theo", REPOSITORY_ROOT / "src_theo" / "lora")
    except FileNotFoundError as error:
        raise MissingFileError(_one_line(error)) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{shorten(str(path))} is no name that a config file can have: {error}") from error
    if not found.is_file():
        raise ConfigError(f"{found} is a folder, not a config file; name the JSON file in it")
    return found


def _read(path: Path) -> dict:
    try:
        values = read_json_object(path)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    # keys that begin with an underscore are the user's comments
    return {name: value for name, value in values.items() if not name.startswith("_")}


def _unknown_key(name: str) -> str:
    guess = nearest(name, [*KINDS, *trl_keys.WITHOUT_EFFECT, *RENAMED, *WITHOUT_EFFECT])
    hint = f"did you mean {guess}?" if guess else "see ovis25 train --help for the keys"
    return f"unknown key {shorten(name)}; {hint}"


def _resolve_paths(config: TrainConfig) -> None:
    """Make every input path absolute; names that are no paths (tiny, hub names) stay."""
    for name in ("data_path", "eval_data_path"):
        if getattr(config, name):
            setattr(config, name, _resolve_data(name, getattr(config, name), config.config_dir))
    if config.image_folder:
        folder = _resolve("image_folder", config.image_folder, config.config_dir)
        if not folder.is_dir():
            raise ConfigError(f"image_folder is {folder}, which is a file; name the folder where image paths start")
        config.image_folder = str(folder)
    for name in _JSON_FILES:
        value = config.trainer.get(name)
        if isinstance(value, str):
            config.trainer[name] = str(_resolve_json(name, value, config.config_dir))
    if config.trl.get("chat_template_path"):
        config.trl["chat_template_path"] = _resolve_template(config.trl["chat_template_path"], config.config_dir)
    try:
        config.model_path = str(_resolve("model_path", config.model_path, config.config_dir))
    except FileNotFoundError:
        if config.model_path.startswith((".", "/", "~")):
            raise
    for name in ("output_dir", "visual_cache_dir"):
        if getattr(config, name):
            setattr(config, name, _absolute(name, getattr(config, name)))


def _resolve_data(name: str, value: str, config_dir: str) -> str:
    try:
        if value.startswith(datainfo.PREFIX):
            return datainfo.resolve_source(value, config_dir)
        if value.startswith(SOURCE_PREFIXES):
            parse_source(value)
            return value
    except FileNotFoundError as error:
        raise MissingFileError(f"{name}: {_one_line(error)}") from error
    except (DataError, ValueError, OSError) as error:
        raise ConfigError(f"{name}: {_one_line(error)}") from error
    path = _resolve(name, value, config_dir)
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
        hint = f", for example {inside[0]}" if inside else ""
        raise ConfigError(f"{name} is {path}, which is a folder; name the file of samples in it{hint}")
    return str(path)


def _resolve_json(name: str, value: str, config_dir: str) -> Path:
    path = _resolve(name, value, config_dir)
    if path.is_dir():
        raise ConfigError(f"{name} is {path}, which is a folder; name the JSON file in it")
    if path.suffix != ".yaml":
        try:
            read_json_object(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{name}: {error}") from error
    return path


def _resolve_template(value: str, config_dir: str) -> str:
    """A file of ours, absolute; the name of a model whose template is taken stays."""
    is_file = value.endswith((".jinja", ".j2"))
    if not is_file and not value.startswith((".", "/", "~")):
        return value
    path = _resolve("chat_template_path", value, config_dir)
    if path.is_file() != is_file:
        raise ConfigError(f"chat_template_path is {path}; name a .jinja file, or a folder with a tokenizer")
    return str(path)


def _resolve(name: str, value: str, config_dir: str) -> Path:
    try:
        return resolve_input(value, config_dir)
    except FileNotFoundError as error:
        raise MissingFileError(f"{name}: {_one_line(error)}") from error
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{name} is {shorten(value)}, which is no name that a file can have: {reason}") from error


def _absolute(name: str, value: str) -> str:
    try:
        return str(Path(value).expanduser().absolute())
    except RuntimeError as error:
        raise ConfigError(f"{name} is {shorten(value)}: {error}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class MissingFileError(ConfigError, FileNotFoundError):
    """A setting names a file that is nowhere; the message lists where it was looked for."""
