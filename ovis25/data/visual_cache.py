"""Visual embeddings on the disk: where a frozen vision side makes them, they are computed once and read ever after.

One safetensors file per visual input (an image, or a whole video), named by a key: the SHA-256 of the input's content
and of everything that decides what the model makes of it. Files are written whole or not at all and never changed, so
any number of processes and runs may share a folder. Shapes: M visual tokens, H LLM width.
"""

import hashlib
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ovis25.data.checks import Budget, Defect, Grid
from ovis25.data.schema import SampleError
from ovis25.files import follow_umask
from ovis25.processing.image import ImageSource, open_image

# part of every key: raise it when the same input would give other embeddings
_FORMAT = 1
_READ_BYTES = 2**20


class VisualCache:
    """A folder of embeddings.

    Args:
        folder: made where it is missing.
        fingerprint: of the vision weights and of how they compute; part of every key.
        hidden_size, dtype: of the embeddings.
    """

    def __init__(self, folder: str | Path, fingerprint: str, hidden_size: int, dtype: torch.dtype):
        self.folder = Path(folder)
        self.fingerprint, self.hidden_size, self.dtype = fingerprint, hidden_size, dtype

    @property
    def token_bytes(self) -> int:
        """What one visual token takes."""
        return self.hidden_size * self.dtype.itemsize

    def key(self, kind: str, contents: list[str], budget: Budget, frame_limits: tuple[int, int] | None) -> str:
        """Of an "image" or a "video" with the given content digests; `frame_limits` of a video file."""
        parts = [_FORMAT, kind, contents, budget, frame_limits, self.fingerprint]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def path(self, key: str) -> Path:
        # folders of hundreds of thousands of files are slow
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether the key's file is there, whole and of this model's width; any other counts as absent."""
        try:
            with safe_open(self.path(key), "pt") as file:
                return file.get_slice("embeds").get_shape()[1] == self.hidden_size
        except (OSError, SafetensorError):
            return False

    def write(self, key: str, embeds_MH: torch.Tensor, grid: Grid) -> None:
        """Write whole or not at all: to a name of this process's own first, then renamed."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{key}.{os.getpid()}-{uuid.uuid4().hex}.tmp")
        save_file({"embeds": embeds_MH.contiguous(), "grid": torch.tensor(grid)}, temporary)
        follow_umask(temporary)
        temporary.replace(path)

    def read(self, keys: tuple[str, ...]) -> tuple[torch.Tensor, list[Grid]]:
        """(M, H) embeddings of all keys, one after the other, and their grids; the files are mapped, not loaded.

        Raises:
            FileNotFoundError: a file is gone.
        """
        embeds = [torch.zeros(0, self.hidden_size, dtype=self.dtype)]
        grids: list[Grid] = []
        for key in keys:
            try:
                with safe_open(self.path(key), "pt") as file:
                    embeds.append(file.get_tensor("embeds"))
                    grids.append(tuple(file.get_tensor("grid").tolist()))
            except OSError as error:
                raise FileNotFoundError(
                    f"the visual cache {self.folder} has lost {self.path(key).name}: start the run again, which "
                    "computes what is missing and goes on from its last checkpoint"
                ) from error
        return torch.cat(embeds), grids


@dataclass
class CachedVisuals:
    """What a dataset needs to take its visuals from a cache: the keys of each row with visuals, or its defect."""

    cache: VisualCache
    rows: dict[int, tuple[str, ...] | Defect]

    def read(self, row_index: int) -> tuple[torch.Tensor, list[Grid]]:
        """Embeddings and grids of a row, (0, H) and none for text.

        Raises:
            SampleError: its visuals could not be decoded.
        """
        found = self.rows.get(row_index, ())
        if isinstance(found, Defect):
            raise SampleError(found.field, found.problem, found.cure)
        return self.cache.read(found)


def content_digest(source: ImageSource) -> str:
    """SHA-256 of a file's bytes, or of the pixels of a picture that has no file."""
    digest = hashlib.sha256()
    if isinstance(source, (str, Path)):
        with open(source, "rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    elif isinstance(source, bytes):
        digest.update(source)
    else:
        image = open_image(source)
        digest.update(f"RGB pixels {image.size}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()
