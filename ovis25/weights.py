"""Weights files as they lie in a checkpoint folder: what is in them, whether they are whole, which base they are.

Headers alone are read (a safetensors file begins with the length of a JSON header, which names each tensor's dtype,
shape and place), so that 18 GB are looked through in a moment.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ovis25.checkpoint import CheckpointError, check_file, cure_for, read_json, unfinished_downloads

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_FLOATS = ("F64", "F32", "F16", "BF16")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000
# of the digest: so many blocks of so many bytes, evenly spread over each tensor
_NUM_BLOCKS, _BLOCK_BYTES = 8, 4096
# how the parts are called in the port that transformers is to get
_PORT_PREFIXES = ("model.language_model.", "model.visual", "model.vision", "model.vte", "language_model.")
_SHAPE_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weights file: `dtype` as safetensors writes it ("BF16"), bytes `begin` to `end` of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path, folder: Path | None = None) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file; `folder` is the checkpoint that it belongs to.

    Raises:
        CheckpointError: it is missing, empty, cut, a git-lfs pointer, or no safetensors file.
    """
    folder = folder or path.parent
    check_file(folder, path.name)
    size, cure = path.stat().st_size, cure_for(folder, path.name)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > _MOST_HEADER_BYTES:
            raise CheckpointError(f"{path} is no safetensors file (its first bytes are others); {cure}")
        if length > size - _LENGTH_BYTES:
            raise CheckpointError(f"{path} is cut: it ends within its header after {size:,} bytes; {cure}")
        text = file.read(length)
    start = _LENGTH_BYTES + length
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), *(start + n for n in entry["data_offsets"]))
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no safetensors file: its header is damaged; {cure}") from error
    needed = max((tensor.end for tensor in tensors.values()), default=start)
    if needed != size:
        what = "is cut" if size < needed else "is damaged"
        raise CheckpointError(f"{path} {what}: it has {size:,} bytes, its header describes {needed:,}; {cure}")
    return tensors


def stored_weights(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder, by its name: of one file, or of all shards that the index names.

    Raises:
        CheckpointError: no weights, pickled ones alone, or files that are missing, damaged or contradict the index.
    """
    folder = Path(folder)
    # as transformers does: the one file goes before an index
    if _lies_there(folder / WEIGHTS_NAME):
        return read_header(folder / WEIGHTS_NAME)
    if not _lies_there(folder / INDEX_NAME):
        raise CheckpointError(_no_weights(folder))
    places = read_json(folder, INDEX_NAME).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise CheckpointError(
            f"{folder / INDEX_NAME} names no weights (its weight_map is empty); {cure_for(folder, INDEX_NAME)}"
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{folder / INDEX_NAME} names {shard!r}, which is no file of its own folder")
        found = read_header(folder / shard)
        named = {name for name, place in places.items() if place == shard}
        if lost := sorted(named - found.keys()):
            raise CheckpointError(
                f"{folder / shard} lacks {_some(lost)}, which {INDEX_NAME} looks for there; file and index are not of "
                f"the same model; {cure_for(folder, shard)}"
            )
        tensors |= {name: found[name] for name in named}
    return tensors


def check_weights(folder: str | Path, expected: Mapping[str, tuple[int, ...]], may_have: tuple[str, ...] = ()) -> None:
    """Compare names and shapes of a folder's weights with those that the model has; `may_have` are allowed too.

    Raises:
        CheckpointError: as `stored_weights`; missing, unexpected and wrongly shaped tensors, and whole numbers where
            weights belong.
    """
    folder = Path(folder)
    found = stored_weights(folder)
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys() - set(may_have))
    if any(name.startswith(_PORT_PREFIXES) for name in unexpected):
        raise CheckpointError(
            f"{folder} holds weights in the layout of transformers' own port of Ovis2.5 ({unexpected[0]}), which has "
            f"other names than the released one ({missing[0] if missing else 'llm...'}); use a folder in the released "
            "layout, for example AIDC-AI/Ovis2.5-2B"
        )
    if missing or unexpected:
        kinds = (("lacks", missing), ("holds weights that the model does not have:", unexpected))
        parts = [f"{verb} {_some(names)}" for verb, names in kinds if names]
        raise CheckpointError(
            f"{folder} {' and '.join(parts)}; the weights are not of the model that config.json describes; "
            + cure_for(folder, "*.safetensors")
        )
    for name, shape in expected.items():
        if found[name].shape != tuple(shape):
            raise CheckpointError(
                f"{found[name].file}: {name} has the shape {_sizes(found[name].shape)}, config.json wants "
                f"{_sizes(shape)}; weights and config.json are not of the same model"
            )
        if found[name].dtype not in _FLOATS:
            raise CheckpointError(
                f"{found[name].file}: {name} holds {found[name].dtype} numbers, which need a quantization_config in "
                f"config.json; weights are one of {', '.join(_FLOATS)}"
            )


def weights_digest(folder: str | Path) -> str:
    """What tells one model from another of equal shapes: SHA-256 of sizes, names, dtypes and samples of the weights.

    Independent of how the weights are cut into files. A sample is 8 blocks of 4,096 bytes of each tensor: any training
    of a tensor shows, a single changed number may not.
    """
    folder = Path(folder)
    config = read_json(folder, "config.json")
    llm = config.get("llm_config") or {}
    digest = hashlib.sha256(json.dumps([llm.get(key) for key in _SHAPE_KEYS]).encode())
    tensors = stored_weights(folder)
    if llm.get("tie_word_embeddings"):
        # may or may not repeat the embedding
        tensors.pop("llm.lm_head.weight", None)
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        for block in _sampled(tensor):
            digest.update(block)
    return digest.hexdigest()


def _sampled(tensor: StoredTensor) -> Iterator[bytes]:
    size = tensor.end - tensor.begin
    with open(tensor.file, "rb") as file:
        if size <= _NUM_BLOCKS * _BLOCK_BYTES:
            file.seek(tensor.begin)
            yield file.read(size)
            return
        for number in range(_NUM_BLOCKS):
            file.seek(tensor.begin + number * (size - _BLOCK_BYTES) // (_NUM_BLOCKS - 1))
            yield file.read(_BLOCK_BYTES)


def _lies_there(path: Path) -> bool:
    """Also a link to nothing, as an unfinished download leaves it in the hub's cache."""
    return path.exists() or path.is_symlink()


def _no_weights(folder: Path) -> str:
    shards = sorted(file.name for file in folder.glob("model*.safetensors"))
    if shards:
        return f"{folder} holds {_some(shards)}, but not {INDEX_NAME}, which says what lies in which file; " + cure_for(
            folder, INDEX_NAME
        )
    pickles = sorted(
        file.name
        for pattern in _PICKLES
        for file in folder.glob(pattern)
        if file.name not in _NOT_WEIGHTS and not file.name.startswith("rng_state")
    )
    if pickles:
        return (
            f"{folder} holds its weights as pickled files alone ({_some(pickles)}), which can run any program when "
            "they are opened, so they are not read; get the .safetensors files (the released Ovis2.5 has them), or "
            "convert the weights with safetensors in a place where you trust them"
        )
    return (
        f"{folder} holds no weights: neither {WEIGHTS_NAME} nor {INDEX_NAME} with its files"
        f"{unfinished_downloads(folder)}; {cure_for(folder, '*.safetensors*')}"
    )


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{side:,}" for side in shape) if math.prod(shape) or shape else "()"
