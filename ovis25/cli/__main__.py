"""`python -m ovis25.cli COMMAND`."""

import sys

from ovis25.cli.dispatch import main

if __name__ == "__main__":
    sys.exit(main())
