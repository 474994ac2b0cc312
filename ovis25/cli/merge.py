"""`ovis25 merge`: an adapter and its base as one folder."""

import argparse

import torch

from ovis25.cli.command import Command
from ovis25.cli.library_errors import LIBRARY_ERRORS
from ovis25.cli.models import DTYPES, add_base_arguments
from ovis25.cli.quiet import quieten
from ovis25.merge import merge_adapter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter_path", required=True, metavar="A", help="the adapter's folder")
    parser.add_argument("--output_path", required=True, metavar="B", help="the merged folder; must not exist yet")
    add_base_arguments(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="of the merged weights (default: the base's)")


def run(parsed: argparse.Namespace, options: list[str]) -> int:
    quieten()
    dtype = getattr(torch, parsed.dtype) if parsed.dtype else None
    report = merge_adapter(parsed.adapter_path, parsed.output_path, parsed.base, dtype, not parsed.anyway)
    print(report.render())
    return 0


COMMAND = Command(
    add_arguments,
    run,
    "Merge a LoRA adapter into its base, check the result, and write a folder like a released one.",
    lambda program: (
        "example, in src_theo/lora/:\n"
        "  python merge_lora_adapters.py --adapter_path output/ovis2_5_lora --output_path output/merged"
    ),
    takes_options=False,
    interrupted="interrupted; nothing was merged, and nothing is left behind",
    user_errors=(ValueError, *LIBRARY_ERRORS),
)
