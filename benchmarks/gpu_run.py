"""What the sections of gpu.py share: the time limit, timing, memory, tables and the JSON file.

Imported before ovis25 by each of them, so that a bare measuring machine does: one that has neither this package
installed nor PyAV, which reads videos and nothing else.
"""

import gc
import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))
if importlib.util.find_spec("av") is None:
    sys.modules["av"] = types.ModuleType("av")

DTYPE = torch.bfloat16
# dense bfloat16 TFLOP/s of NVIDIA's data sheets; the first name that the device's name holds
PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H200 NVL": 835, "H100": 989, "H200": 989, "B200": 2250,
    "A100": 312, "L40S": 362,
}  # fmt: skip
# what the imports and the start of the device have taken before the clock starts
_BEFORE_S = 20


class Mark:
    """A point in the device's stream of work."""

    def __init__(self, device: torch.device):
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self.time = time.perf_counter()
        if self.event is not None:
            self.event.record()

    def ms_since(self, earlier: "Mark") -> float:
        """Milliseconds between the two; on CUDA once `torch.cuda.synchronize` has been called after both."""
        return earlier.event.elapsed_time(self.event) if self.event is not None else (self.time - earlier.time) * 1e3


class Run:
    """The machine, the time that is left, and what has been measured; `results` is what the JSON file holds."""

    def __init__(self, device: torch.device, is_small: bool, minutes: float, json_path: Path | None):
        self.device, self.is_small, self.json_path = device, is_small, json_path
        self.end = self.section_end = time.monotonic() + 60 * minutes - _BEFORE_S
        self.rows: list[dict] = []
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self.results = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": name,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "is_small": is_small,
            "memory_gb": self.memory_gb,
            "peak_tflops": next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None),
            "matmul_tflops": self._matmul_tflops(),
            "sections": {},
        }

    @property
    def memory_gb(self) -> float | None:
        """Of the device, in 10^9 bytes."""
        is_cuda = self.device.type == "cuda"
        return torch.cuda.get_device_properties(self.device).total_memory / 1e9 if is_cuda else None

    def _matmul_tflops(self) -> float:
        side = 512 if self.is_small else 8192
        left, right = (torch.randn(side, side, device=self.device, dtype=DTYPE) for _ in range(2))
        return 2 * side**3 / self.milliseconds(lambda: left @ right, repeats=20) / 1e9

    def milliseconds(self, function: Callable[[], object], repeats: int = 10, warm_up: int = 3) -> float:
        """The median time of one call."""
        if self.is_small:
            repeats, warm_up = 2, 1
        for _ in range(warm_up):
            function()
        marks = [Mark(self.device)]
        for _ in range(repeats):
            function()
            marks.append(Mark(self.device))
        self.synchronize()
        return statistics.median(later.ms_since(earlier) for earlier, later in zip(marks, marks[1:], strict=False))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def clear(self) -> None:
        """Forget compiled code and cached memory, and start counting the peak of memory anew."""
        gc.collect()
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float | None:
        """The most memory in use since `clear`, in 10^9 bytes."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None

    def shares(self, tflop: float, ms: float) -> dict[str, float | None]:
        """Useful work over what the device could have done: by its data sheet, and by the matmul rate measured here."""
        rate, peak = tflop / ms * 1e3, self.results["peak_tflops"]
        return {"mfu": rate / peak if peak else None, "of_matmul": rate / self.results["matmul_tflops"]}

    def section(self, name: str, function: Callable[["Run"], None], share: float) -> None:
        """Let `function` add its rows in that share of the time left, then print them."""
        self.section_end = time.monotonic() + share * (self.end - time.monotonic())
        self.rows = self.results["sections"].setdefault(name, [])
        print(f"{name}: {self.section_end - time.monotonic():.0f} s at most", file=sys.stderr, flush=True)
        row = {"status": "ok"}
        self._attempt(row, lambda: function(self) or {})
        if row["status"] != "ok":
            self.rows.append(row)
        self.clear()
        self.save()
        print_table(name, self.rows)

    def measure(
        self,
        labels: dict,
        function: Callable[[], dict],
        needs_s: float = 5,
        needs_gb: float = 0,
        needs_cuda: bool = False,
        obstacle: str | None = None,
    ) -> dict:
        """Add one row: `labels`, then the figures that `function` returns or `status` saying why there are none.

        `needs_s`: what it takes at worst on a device; a row that would end after the section's time is left out.
        `needs_gb`: 10^9 bytes below which it cannot run. `obstacle`: another reason, known before, not to run it.
        """
        row = {**labels, "status": "ok"}
        start = time.monotonic()
        if needs_cuda and self.device.type != "cuda":
            obstacle = "needs CUDA"
        elif self.memory_gb is not None and needs_gb > self.memory_gb:
            obstacle = f"needs at least {needs_gb:.0f} GB"
        elif not self.is_small and start + needs_s > self.section_end:
            obstacle = "time"
        if obstacle:
            row["status"] = f"skipped: {obstacle}"
        else:
            self._attempt(row, function)
            row["seconds"] = time.monotonic() - start
        self.rows.append(row)
        name = ", ".join(value for value in labels.values() if isinstance(value, str))
        print(f"  {name}: {row['status']}", file=sys.stderr, flush=True)
        self.save()
        return row

    def _attempt(self, row: dict, function: Callable[[], dict]) -> None:
        try:
            row |= function()
            self.synchronize()
        except torch.OutOfMemoryError:
            row["status"] = "out of memory"
        except Exception as error:  # one kernel that this device lacks must not end the run
            first_line = next(iter(str(error).strip().splitlines()), "")
            row["status"] = f"failed: {type(error).__name__}: {first_line[:160]}"
        if row["status"] != "ok":
            self.clear()

    def save(self) -> None:
        """Write the file after every row: a run that is cut off keeps what it has."""
        if self.json_path:
            self.json_path.write_text(json.dumps(self.results, indent=2) + "\n", encoding="utf-8")


def print_table(title: str, rows: list[dict]) -> None:
    """One table for each kind of row; rows of a kind begin with the same name."""
    for first in dict.fromkeys(next(iter(row)) for row in rows):
        kind = [row for row in rows if next(iter(row)) == first]
        names = list(dict.fromkeys(name for row in kind for name in row if name not in ("status", "seconds")))
        table = [[name.replace("_", " ") for name in names] + ["status"]]
        table += [[_cell(row.get(name)) for name in names] + [row["status"]] for row in kind]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        print(f"\n{title}")
        for cells in table:
            print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip(), flush=True)


def _cell(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)
