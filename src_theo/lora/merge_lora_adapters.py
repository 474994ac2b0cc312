"""Merging an adapter into its base: python merge_lora_adapters.py --adapter_path A --output_path B"""

import sys

from ovis25.cli import merge_main

if __name__ == "__main__":
    sys.exit(merge_main())
