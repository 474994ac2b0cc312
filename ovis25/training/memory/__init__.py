"""Bytes per device of every way to train a model: what `ovis25 plan` answers.

Static part (weights, gradients, optimizer states), in bytes a parameter, with N devices:

| | weights | gradients | optimizer |
|---|---|---|---|
| bfloat16 with a float32 master copy and Adam | 2 | 2 | 4 + 8 |
| float32 | 4 | 4 | 8, and under ZeRO 1 to 3 a master copy of 4 |

ZeRO-1 shares the optimizer's part among the devices, ZeRO-2 the gradients too, ZeRO-3 the weights too (Rajbhandari et
al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC'20, section 3: 4 + 12/N, 2 + 14/N, 16/N
with bfloat16). Offloading moves the optimizer's share and the gradients to the host (Ren et al., "ZeRO-Offload",
USENIX ATC'21), under ZeRO-3 the weights too. Frozen parameters have weights alone. A LoRA adapter is float32: 16 bytes
a parameter. QLoRA keeps the LLM's linear layers in 4.127 bits: NormalFloat with doubly quantised constants (Dettmers
et al., arXiv 2305.14314, section 3).

What a micro-batch adds at its worst moment is counted: see `activations`. To it come the largest weight that ZeRO-3
gathers, and the one that QLoRA unpacks. Where DeepSpeed's step takes more, with its float32 copy of the gradients,
that stands instead.

Not counted: communication buckets, the allocator's fragmentation, buffers inside kernels, CUDA's own context (about
1 GB). 6 % of each device are left free for them.
"""

from ovis25.training.memory.activations import Pass, activation_peak, tower_bytes
from ovis25.training.memory.advice import TYPICAL_HOST, Machine, Recommendation, Run, recommend
from ovis25.training.memory.counts import Choice, Counts, count, released_config, static_bytes
from ovis25.training.memory.estimate import USABLE, Estimate, Setup, estimate_all
from ovis25.training.memory.formats import (
    FLOAT32,
    MIXED,
    STRATEGIES,
    NumberFormat,
    Strategy,
    format_bytes,
    parse_bytes,
)
from ovis25.training.memory.plan import MemoryPlan, plan_memory
from ovis25.training.memory.text import render
from ovis25.training.memory.ways import Way
from ovis25.training.memory.workload import KINDS, Workload, largest_workload

__all__ = [
    "FLOAT32", "KINDS", "MIXED", "STRATEGIES", "TYPICAL_HOST", "USABLE", "Choice", "Counts", "Estimate", "Machine",
    "MemoryPlan", "NumberFormat", "Pass", "Recommendation", "Run", "Setup", "Strategy", "Way", "Workload",
    "activation_peak", "count", "estimate_all", "format_bytes", "largest_workload", "parse_bytes", "plan_memory",
    "recommend", "released_config", "render", "static_bytes", "tower_bytes",
]  # fmt: skip
