"""The documented door, with an exam of one question of each kind, for tests/test_distributed.py."""

import functools
import sys

from ovis25 import cli

cli.run_exam = functools.partial(cli.run_exam, num_per_kind=1)
sys.exit(cli.train_main())
