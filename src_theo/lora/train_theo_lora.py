"""Training a LoRA adapter: python train_theo_lora.py CONFIG [--dry-run] [--key value ...]"""

import sys

from ovis25.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main(use_lora=True))
