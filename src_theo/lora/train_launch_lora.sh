#!/usr/bin/env bash
# Trains a LoRA adapter as a config says, on one or several devices. Arguments as train_launch.sh has them.
set -euo pipefail
here="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
  cat <<'TEXT'
usage: train_launch_lora.sh CONFIG [NUM] [standard|trl] [--key value ...]

  as train_launch.sh, with a LoRA adapter in place of full fine-tuning

examples:
  ./train_launch_lora.sh ./train_config_lora.json 1
  ./train_launch_lora.sh ./train_config_lora.json 1 --model_path tiny --max_steps 2
TEXT
  exit 0
fi
exec bash "$here/../train_launch.sh" "$@" --use_lora true
