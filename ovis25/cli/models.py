"""What the commands that load a model share: naming it, loading it, and the options of its generation."""

import argparse

import torch

from ovis25.inference import Ovis25Inference, RequestError
from ovis25.inference.checks import check_whole
from ovis25.options import read_options
from ovis25.tools import BUILT_IN, toolbox

DTYPES = ("float32", "bfloat16", "float16")


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", help="an adapter's base, where the adapter's own name for it does not lead there")
    parser.add_argument(
        "--anyway", action="store_true", help="take a base with other weights than those the adapter was trained on"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder, an adapter's folder, a hub name, or tiny")
    parser.add_argument("--think", action="store_true", help="think before answering")
    parser.add_argument("--budget", type=int, metavar="N", help="end the thinking after N tokens; implies --think")
    parser.add_argument("--tools", nargs="*", metavar="NAME", help=f"tools it may call, of {', '.join(BUILT_IN)}")
    parser.add_argument("--system", help="a system prompt (default: none)")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable (default: none)")
    parser.add_argument("--device", help="cuda, cpu, ... (default: the GPU where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: bfloat16, on a CPU float32)")
    add_base_arguments(parser)


def generation_options(parsed: argparse.Namespace, words: list[str]) -> dict:
    """Options of every request. Raises RequestError for words that are none, ValueError for a tool that is none."""
    options = {"system": parsed.system} if parsed.system else {}
    if parsed.think or parsed.budget is not None:
        options["enable_thinking"] = True
    if parsed.budget is not None:
        options["thinking_budget"] = parsed.budget
    if parsed.tools is not None:
        options["tools"] = toolbox(parsed.tools or BUILT_IN)
    return options | read_options(words, RequestError, lacking="--{0}: options are written --name value")


def load_engine(parsed: argparse.Namespace) -> Ovis25Inference:
    """The engine for the model that is named; --seed holds from now on."""
    if parsed.seed is not None:
        check_whole("--seed", parsed.seed, 0, 2**63 - 1)
        torch.manual_seed(parsed.seed)
    dtype = getattr(torch, parsed.dtype) if parsed.dtype else None
    return Ovis25Inference(parsed.model, parsed.device, dtype, base=parsed.base, check_base=not parsed.anyway)
