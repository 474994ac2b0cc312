"""Amounts of memory as text, number formats, and the ways to train that a plan compares."""

import re
from dataclasses import dataclass, field

import torch

_UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """`80GB` (10^9 each), `80GiB` (2^30 each) or a plain number, in bytes.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?i?B?)\s*", text, re.IGNORECASE)
    unit = match[2].upper() if match else None
    if unit not in _UNITS or match[1].count(".") > 1 or not match[1].strip(".") or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is no amount of memory; write it like 80GB or 79.2GiB")
    return int(float(match[1]) * _UNITS[unit])


def format_bytes(number: float) -> str:
    """`80.0 GB`, or `12.3 MB` below one GB (powers of ten)."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


@dataclass(frozen=True)
class NumberFormat:
    """Bytes a parameter; `master` is the optimizer's own copy of the weights under ZeRO 1 to 3.

    `autocast`: whole models are computed in bfloat16 all the same, from weights cast in each pass. (An adapter on
    bfloat16 weights always runs under autocast, DeepSpeed's models never do.)
    """

    dtype: torch.dtype
    weights: int
    gradients: int
    master: int
    moments: int
    master_always: bool
    autocast: bool = False


MIXED = NumberFormat(torch.bfloat16, 2, 2, 4, 8, master_always=True)
FLOAT32 = NumberFormat(torch.float32, 4, 4, 4, 8, master_always=False)
# what a run without DeepSpeed takes on a GPU: float32 weights, or with dtype bfloat16 everything in two bytes
FLOAT32_AUTOCAST = NumberFormat(torch.float32, 4, 4, 4, 8, master_always=False, autocast=True)
PURE_BFLOAT16 = NumberFormat(torch.bfloat16, 2, 2, 0, 4, master_always=False, autocast=True)


@dataclass(frozen=True)
class Strategy:
    """A way to train, and the settings that choose it."""

    name: str
    settings: dict = field(default_factory=dict, hash=False)
    stage: int = 0
    offload: bool = False
    lora: bool = False
    four_bit: bool = False


def _zero(stage: int, offload: bool = False) -> Strategy:
    file = f"scripts/zero_configs/zero{stage}{'_offload' if offload else ''}_cp.json"
    return Strategy(f"ZeRO-{stage}{' offload' if offload else ''}", {"deepspeed": file}, stage, offload)


def _adapter(name: str, four_bit: bool) -> Strategy:
    return Strategy(name, {"use_lora": True, "qlora": four_bit, "deepspeed": None}, lora=True, four_bit=four_bit)


# in the order in which they are preferred
STRATEGIES = (
    _zero(0), _zero(1), _zero(2), _zero(3), _zero(2, offload=True), _zero(3, offload=True),
    _adapter("LoRA", four_bit=False), _adapter("QLoRA", four_bit=True),
)  # fmt: skip
