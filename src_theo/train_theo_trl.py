"""Training with TRL's SFTTrainer: python train_theo_trl.py CONFIG [--dry-run] [--key value ...]"""

import sys

from ovis25.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main(recipe="trl"))
