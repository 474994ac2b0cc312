"""The pass before training that computes each distinct visual input once, where the vision side is frozen."""

import contextlib
import hashlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from ovis25.constants import HIDDEN_STRIDE, PATCH_SIZE
from ovis25.data import Statistics
from ovis25.data.cache.inputs import Patches, SampleKeys, Unit
from ovis25.data.cache.items import CachedDataset
from ovis25.data.cache.store import CachedVisuals, VisualCache
from ovis25.data.dataset import SampleDataset
from ovis25.data.measure import Grid
from ovis25.data.samples import Defect
from ovis25.model import Ovis2_5
from ovis25.training import deepspeed
from ovis25.training.build import Precision
from ovis25.training.config import ConfigError, TrainConfig
from ovis25.training.memory import format_bytes
from ovis25.training.modules import TrainedModule, part_of
from ovis25.training.trainer import OvisTraining

FOLDER_NAME = "visual_cache"
# patches of one forward pass of the encoder, unless a single input has more
_MAX_PATCHES = 16384
Rows = dict[int, list[tuple[str, int]] | Defect]


@dataclass
class Summary:
    """What the cache holds for this run."""

    num_inputs: int
    num_computed: int
    num_bytes: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.num_inputs:,} images and clips, {format_bytes(self.num_bytes)} in {self.folder}"


def folder_of(config: TrainConfig) -> Path:
    return Path(config.visual_cache_dir or Path(config.output_dir) / FOLDER_NAME)


def check_frozen(chosen: dict[str, TrainedModule]) -> None:
    """Refuse to cache what training changes; `chosen` holds the trained parameters' names.

    Raises:
        ConfigError: names the vision modules that are trained.
    """
    trained = dict.fromkeys(part for part in map(part_of, chosen) if part != "llm")
    if trained:
        raise ConfigError(
            f"cache_visual_embeddings needs a frozen vision side, but this run trains {', '.join(trained)}: its output "
            "changes with every step. Set train_modules to llm, or with LoRA keep lora_target_modules, "
            "lora_modules_to_save and apply_lora_to_vision to the LLM, or set cache_visual_embeddings to false"
        )


def forecast(config: TrainConfig, counts: list[Statistics | None], precision: Precision, hidden_size: int) -> str:
    """What the plan says before anything is read: pictures that samples share are counted each time."""
    tokens = sum(part.visual_tokens for part in counts if part is not None)
    token_bytes = hidden_size * (2 if precision.bf16 or precision.fp16 else precision.weights.itemsize)
    return f"at most {format_bytes(tokens * token_bytes)} ({tokens:,} visual tokens) in {folder_of(config)}"


def fill(
    trainer: OvisTraining, sets: dict[str, SampleDataset], folder: Path
) -> tuple[Summary, dict[str, CachedDataset]]:
    """Compute what the folder lacks, each rank its share; returns what it holds, and the sets as they read from it.

    Embeddings are what training would compute: same weights, same formats. Every rank calls this.

    Raises:
        ConfigError: FSDP; the disk is too small; ranks see different folders.
        DataError: samples whose visuals cannot be decoded, unless they may be skipped.
    """
    if trainer.is_fsdp_enabled:
        raise ConfigError(
            "cache_visual_embeddings does not work under FSDP, which shards the vision weights; use DeepSpeed or plain "
            "data-parallel, or set it to false"
        )
    datasets = list(sets.values())
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad(), _whole_vision(trainer, model), trainer.accelerator.autocast():
        model.eval()
        cache = _open_cache(trainer, model, folder)
        tables = [_keys(trainer, dataset, cache) for dataset in datasets]
        tokens = {
            key: num for rows in tables for found in rows.values() if isinstance(found, list) for key, num in found
        }
        missing = _missing(trainer, cache, list(tokens))
        _announce(trainer, cache, tokens, missing)
        units = _units(tables, missing)
        failures = _compute(trainer, model, cache, datasets, units)
    _check_shared(trainer, cache, [key for key in tokens if key not in failures])
    cached = {
        name: CachedDataset(dataset, CachedVisuals(cache, _settled(dataset, rows, failures)))
        for (name, dataset), rows in zip(sets.items(), tables, strict=True)
    }
    return Summary(len(tokens), len(missing), sum(tokens.values()) * cache.token_bytes, folder), cached


@contextlib.contextmanager
def _whole_vision(trainer: OvisTraining, model: Ovis2_5) -> Iterator[None]:
    """The vision side on the device, in the format it computes in while training; ZeRO-3's shards are gathered."""
    modules = torch.nn.ModuleList([model.visual_tokenizer, model.vte])
    if not trainer.is_deepspeed_enabled:
        modules.to(trainer.args.device)
        yield
        return
    settings = trainer.args.hf_deepspeed_config
    if not settings.is_zero3():
        # as DeepSpeed will do with the whole model
        modules.to(trainer.args.device, settings.dtype())
        yield
        return
    with deepspeed.gathered(modules.parameters()):
        yield


def _open_cache(trainer: OvisTraining, model: Ovis2_5, folder: Path) -> VisualCache:
    """The cache of this model's vision weights; which format they compute in is tried out on one block."""
    pixels = torch.zeros(HIDDEN_STRIDE**2, 3 * PATCH_SIZE**2, dtype=torch.uint8, device=trainer.args.device)
    block = model.get_visual_embeddings(pixels, torch.tensor([[1, HIDDEN_STRIDE, HIDDEN_STRIDE]]))
    found = [fingerprint(model, block.dtype, trainer.args.device)] if trainer.args.process_index == 0 else []
    return VisualCache(folder, gather_object(found)[0], block.shape[1], block.dtype)


def fingerprint(model: Ovis2_5, dtype: torch.dtype, device: torch.device) -> str:
    """SHA-256 of the vision weights (names, formats, bytes), of their config and of how they compute."""
    digest = hashlib.sha256(f"{dtype} on {device.type}, {model.config.vit_config.to_json_string()}".encode())
    for part in ("visual_tokenizer", "vte"):
        for name, value in getattr(model, part).named_parameters():
            digest.update(f"{part}.{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _keys(trainer: OvisTraining, dataset: SampleDataset, cache: VisualCache) -> Rows:
    """Row index -> its visual inputs, or its defect; each rank hashes its share."""
    keyed = SampleKeys(dataset, cache)
    share = torch.utils.data.Subset(keyed, range(trainer.args.process_index, len(keyed), trainer.args.world_size))
    rows = gather_object(list(_read(trainer, share, "reading pictures")))
    return {row_index: found for row_index, found in rows if found}


def _missing(trainer: OvisTraining, cache: VisualCache, keys: list[str]) -> set[str]:
    share = keys[trainer.args.process_index :: trainer.args.world_size]
    return set(gather_object([key for key in share if not cache.has(key)]))


def _announce(trainer: OvisTraining, cache: VisualCache, tokens: dict[str, int], missing: set[str]) -> None:
    """Say what will be computed. Raises ConfigError where the disk is too small."""
    needed = sum(tokens[key] for key in missing) * cache.token_bytes
    cache.folder.mkdir(parents=True, exist_ok=True)
    free = min(gather_object([shutil.disk_usage(cache.folder).free]))
    if needed > free:
        raise ConfigError(
            f"visual_cache_dir {cache.folder} needs {format_bytes(needed)}, but its disk has {format_bytes(free)} "
            "free; name a folder on a larger disk, or lower the pixel budgets"
        )
    if trainer.args.process_index == 0:
        print(
            f"visual cache {cache.folder}: {len(missing):,} of {len(tokens):,} images and clips to compute, "
            f"{format_bytes(needed)}",
            flush=True,
        )


def _units(tables: list[Rows], missing: set[str]) -> list[Unit]:
    """Each missing key once, at the first sample that shows it."""
    units, left = [], set(missing)
    for number, rows in enumerate(tables):
        for row_index, found in rows.items():
            if isinstance(found, Defect):
                continue
            places = {}
            for place, (key, _) in enumerate(found):
                if key in left:
                    left.remove(key)
                    places[place] = key
            if places:
                units.append(Unit(number, row_index, places))
    return units


def _compute(trainer, model: Ovis2_5, cache: VisualCache, datasets, units: list[Unit]) -> dict[str, Defect]:
    """Write the units' embeddings; returns the keys that could not be decoded, of all ranks."""
    share = units[trainer.args.process_index :: trainer.args.world_size]
    failures: list[tuple[str, Defect]] = []
    batch: list[tuple[str, torch.Tensor, Grid]] = []
    for unit, found in zip(share, _read(trainer, Patches(datasets, share), "computing embeddings"), strict=True):
        if isinstance(found, Defect):
            failures += [(key, found) for key in unit.keys.values()]
            continue
        for visual in found:
            if batch and sum(len(pixels) for _, pixels, _ in batch) + len(visual[1]) > _MAX_PATCHES:
                _embed(model, cache, batch)
                batch = []
            batch.append(visual)
    if batch:
        _embed(model, cache, batch)
    # also waits until every rank has written its share
    return dict(gather_object(failures))


def _check_shared(trainer: OvisTraining, cache: VisualCache, keys: list[str]) -> None:
    """Raises ConfigError on every rank where one of them does not see all files."""
    lost = gather_object([sum(not cache.path(key).exists() for key in keys)])
    if any(lost):
        raise ConfigError(
            f"rank {lost.index(max(lost))} misses {max(lost)} of {len(keys)} files of the visual cache {cache.folder}, "
            "which other ranks see; set visual_cache_dir to a folder that all machines share"
        )


def _embed(model: Ovis2_5, cache: VisualCache, batch: list[tuple[str, torch.Tensor, Grid]]) -> None:
    device = model.vte.weight.device
    pixels = torch.cat([pixels for _, pixels, _ in batch]).to(device, non_blocking=True)
    embeds = model.get_visual_embeddings(pixels, torch.tensor([grid for _, _, grid in batch])).cpu()
    parts = embeds.split([len(pixels) // HIDDEN_STRIDE**2 for _, pixels, _ in batch])
    for (key, _, grid), part in zip(batch, parts, strict=True):
        cache.write(key, part.clone(), grid)


def _settled(dataset: SampleDataset, rows: Rows, failures: dict[str, Defect]) -> dict[int, tuple[str, ...] | Defect]:
    """The dataset's table, in which a sample with an input that cannot be decoded is a defect."""
    settled = {}
    for row_index, found in rows.items():
        if isinstance(found, Defect):
            settled[row_index] = found
            continue
        settled[row_index] = keys = tuple(key for key, _ in found)
        for broken in (failures[key] for key in keys if key in failures):
            # noted at the first sample that shows the input, which may be another one
            settled[row_index] = dataset.samples.defect(row_index, broken.error())
    return settled


def _read(trainer: OvisTraining, dataset: Dataset, what: str) -> Iterable:
    """The dataset's items in order, made by as many workers as training has; the bar is rank 0's."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=trainer.args.dataloader_num_workers,
        # training draws the same random numbers as without the pass
        generator=torch.Generator(),
    )
    console = Console(stderr=True)
    is_hidden = trainer.args.process_index != 0 or not console.is_terminal
    return track(loader, what, total=len(dataset), console=console, disable=is_hidden)


def _as_it_is(item):
    return item
