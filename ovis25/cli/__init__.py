"""The command line: `ovis25 COMMAND`; the scripts in `src_theo/` call the same functions."""

from ovis25.cli.dispatch import main, merge_main, train_main

__all__ = ["main", "merge_main", "train_main"]
