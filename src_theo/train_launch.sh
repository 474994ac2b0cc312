#!/usr/bin/env bash
# Trains as a config says, on one or several devices of this machine.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: train_launch.sh CONFIG [NUM] [standard|trl] [--key value ...]

  CONFIG    a JSON file; also found in src_theo/ and in the repository's root
  NUM       devices: GPUs, or processes on a machine without GPU (0 or none: all GPUs, one process without)
  standard  transformers' Trainer (the default)
  trl       TRL's SFTTrainer
  --key     overrides a setting of the config; --dry-run prints the plan and stops

examples:
  bash train_launch.sh train_config_tiny.json 1
  bash train_launch.sh train_config.json 4 standard --learning_rate 1e-5 --output_dir output/mine
TEXT
}

fail() {
  echo "error: $1" >&2
  usage >&2
  exit 2
}

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"

[[ "${1:-}" == "-h" || "${1:-}" == "--help" ]] && { usage; exit 0; }
[[ $# -ge 1 && "$1" != --* ]] || fail "CONFIG is missing"
config="$1"
shift

num=0
if [[ $# -ge 1 && "$1" != --* && "$1" != standard && "$1" != trl ]]; then
  [[ "$1" =~ ^[0-9]+$ ]] || fail "NUM must be a number of devices, not '$1'"
  num="$1"
  shift
fi
recipe=standard
if [[ $# -ge 1 && "$1" != --* ]]; then
  [[ "$1" == standard || "$1" == trl ]] || fail "the recipe must be standard or trl, not '$1'"
  recipe="$1"
  shift
fi
if [[ $# -ge 1 && "$1" != --* ]]; then
  fail "unexpected argument '$1'"
fi

script="$here/train_theo.py"
[[ "$recipe" == trl ]] && script="$here/train_theo_trl.py"
[[ -f "$script" ]] || fail "the $recipe recipe is not part of this release"

python="$(bash "$root/scripts/setup.sh")"
gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
if [[ "$num" -eq 0 ]]; then
  num=$((gpus > 0 ? gpus : 1))
elif [[ "$gpus" -gt 0 && "$num" -gt "$gpus" ]]; then
  fail "NUM is $num, but this machine has $gpus GPUs"
fi

if [[ "$num" -eq 1 ]]; then
  # one process drives one device
  if [[ "$gpus" -gt 1 ]]; then
    visible="${CUDA_VISIBLE_DEVICES:-0}"
    export CUDA_VISIBLE_DEVICES="${visible%%,*}"
  fi
  exec "$python" "$script" "$config" "$@"
fi
if [[ "$gpus" -eq 0 ]]; then
  cores="$("$python" -c 'import os; print(os.cpu_count())')"
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / num > 0 ? cores / num : 1))}"
fi
exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$num" "$script" "$config" "$@"
