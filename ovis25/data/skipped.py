"""Samples that are left out: each is counted and listed once, whichever worker, process or epoch met it."""

import fcntl
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from ovis25.data.checks import Defect


class BrokenSamples:
    """Which samples of a dataset broke while decoding; DataLoader workers share it with the process that made them."""

    def __init__(self, num_samples: int):
        self._is_broken = torch.zeros(num_samples, dtype=torch.bool).share_memory_()

    def note(self, index: int) -> bool:
        """Whether sample `index` was not noted before."""
        is_new = not self._is_broken[index]
        self._is_broken[index] = True
        return bool(is_new)

    def __len__(self) -> int:
        return int(self._is_broken.sum())

    @property
    def are_all(self) -> bool:
        return bool(self._is_broken.all())


def append_skipped(path: str | Path, source: str, defects: Iterable[Defect]) -> None:
    """Add a line for each defect that the file does not list yet; processes wait for each other."""
    # JSON's own way of writing the half characters that UTF-8 has none for
    with open(path, "a+", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        listed = "\n" + file.read()
        for defect in defects:
            line = json.dumps({"source": source, **asdict(defect)}, ensure_ascii=False)
            begin = json.dumps({"source": source, "index": defect.index}, ensure_ascii=False).rstrip("}") + ","
            if f"\n{begin}" not in listed:
                file.write(f"{line}\n")
                listed += f"{line}\n"
