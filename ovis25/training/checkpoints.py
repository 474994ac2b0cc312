"""Checkpoints that survive a power cut: written whole, marked with what they hold, checked before they are used."""

import json
import os
import re
import shutil
from pathlib import Path

from ovis25.checkpoint import sampled_digest
from ovis25.files import read_json_object
from ovis25.training.config import ConfigError

CONFIG_NAME = "train_config.json"
RESULTS_NAME = "train_results.json"
RUN_NAME = "train_run.json"
_MARKER = "COMPLETE"
_FOLDER = re.compile(r"checkpoint-(\d+)")
_EARLIER = "earlier_run-{}"


def unmark(folder: str | Path) -> None:
    """Before a checkpoint is written again: without its mark, half of it can never be taken for the whole."""
    folder = Path(folder)
    if folder.is_dir():
        (folder / _MARKER).unlink(missing_ok=True)
        _flush(folder)
        shutil.rmtree(folder)


def mark_complete(folder: str | Path, record: dict) -> None:
    """Flush every file of a checkpoint to the disk, then mark it: only a marked checkpoint is resumed from.

    The mark holds `record` and, under "files", size and sampled digest of each file.
    """
    folder = Path(folder)
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != _MARKER:
            _flush(file)
            files[str(file.relative_to(folder))] = [file.stat().st_size, sampled_digest(file)]
    write_json(folder / _MARKER, {**record, "step": number_of(folder), "files": files})
    _flush(folder)
    _flush(folder.parent)


def read_mark(folder: str | Path) -> dict:
    """What the mark says.

    Raises:
        ValueError: it holds no record; says what.
    """
    mark = read_json_object(Path(folder) / _MARKER)
    if not isinstance(mark.get("files"), dict):
        raise ValueError(f"its mark {_MARKER} lists no files")
    return mark


def damage_of(folder: str | Path) -> str | None:
    """What is wrong with a marked checkpoint: a file that is missing, cut or changed; None where all is well."""
    folder = Path(folder)
    try:
        mark = read_mark(folder)
    except ValueError as error:
        return str(error)
    if mark.get("step") != number_of(folder):
        return f"it was written as step {mark.get('step')}"
    for name, (size, digest) in mark["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes, not {size:,}"
        if sampled_digest(file) != digest:
            return f"{name} has changed since it was written"
    return None


def number_of(folder: str | Path) -> int:
    """The step in a checkpoint folder's name; -1 for another name."""
    found = _FOLDER.fullmatch(Path(folder).name)
    return int(found[1]) if found else -1


def flush_files(folder: str | Path) -> None:
    """The files of a folder, not those below it, and the folder itself to the disk."""
    for file in Path(folder).iterdir():
        if file.is_file():
            _flush(file)
    _flush(Path(folder))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_marked(folder: str | Path) -> bool:
    return (Path(folder) / _MARKER).is_file()


def find_checkpoints(output_dir: str | Path) -> tuple[list[Path], list[Path]]:
    """(complete, incomplete) checkpoint folders of a run, oldest first."""
    folders = [f for f in Path(output_dir).glob("checkpoint-*") if f.is_dir() and number_of(f) >= 0]
    folders.sort(key=number_of)
    return [f for f in folders if is_marked(f)], [f for f in folders if not is_marked(f)]


def rotate(output_dir: str | Path, newest: Path, best: str | None, limit: int | None) -> None:
    """Delete checkpoints until `limit` are left; the newest and the best always stay.

    First go those of a higher step, which an earlier start left and this one will write again, and those that were not
    written to their end.
    """
    complete, incomplete = find_checkpoints(output_dir)
    kept = {newest.name, *([Path(best).name] if best else [])}
    others = [folder for folder in complete + incomplete if folder.name not in kept]
    others.sort(key=lambda f: (is_marked(f) and number_of(f) < number_of(newest), number_of(f)))
    if limit is not None and limit > 0:
        for folder in others[: max(len(others) + len(kept) - max(limit, len(kept)), 0)]:
            unmark(folder)


def delete_run(output_dir: str | Path) -> None:
    """Delete the checkpoints and results of an earlier run; other files stay."""
    for folder in sum(find_checkpoints(output_dir), []):
        unmark(folder)
    for name in (CONFIG_NAME, RESULTS_NAME, RUN_NAME):
        (Path(output_dir) / name).unlink(missing_ok=True)


def set_aside(output_dir: str | Path) -> Path | None:
    """Move complete checkpoints and records of an earlier run into a folder of their own; None where there are none."""
    output_dir = Path(output_dir)
    found, _ = find_checkpoints(output_dir)
    if not found:
        return None
    number = next(n for n in range(1, 1_000_000) if not (output_dir / _EARLIER.format(n)).exists())
    target = output_dir / _EARLIER.format(number)
    target.mkdir()
    for path in [*found, *(output_dir / name for name in (RESULTS_NAME, RUN_NAME, CONFIG_NAME))]:
        if path.exists():
            path.replace(target / path.name)
    _flush(output_dir)
    return target


def read_record(path: Path) -> dict | None:
    """A JSON record of a run, or None where there is none.

    Raises:
        ConfigError: it cannot be read; says which file to delete.
    """
    if not path.is_file():
        return None
    try:
        return read_json_object(path)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{error}; a run keeps its record there. Restore the file, or delete it and give the same command with "
            "--resume_from_checkpoint true to go on from the last checkpoint, or give another --output_dir"
        ) from error


def read_results(output_dir: str | Path) -> dict | None:
    """The results of a run that ended, or None."""
    return read_record(Path(output_dir) / RESULTS_NAME)


def read_state(checkpoint: Path) -> dict:
    """The trainer's state as the checkpoint holds it."""
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def write_json(path: Path, content: dict) -> None:
    """Write whole or not at all: to a neighbour first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _flush(temporary)
    temporary.replace(path)
