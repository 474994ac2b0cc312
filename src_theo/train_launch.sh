#!/usr/bin/env bash
# Trains as a config says, on one or several devices of one or several machines.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: train_launch.sh CONFIG [NUM] [standard|trl] [--key value ...]

  CONFIG    a JSON file; also found in src_theo/ and in the repository's root
  NUM       devices of this machine: GPUs, or processes where there is no GPU (0 or none: all GPUs, one process without)
  standard  transformers' Trainer (the default)
  trl       TRL's SFTTrainer
  --key     overrides a setting of the config; --dry-run prints the plan and stops

several machines: the same command on each, with these variables (docs/several_machines.md has a SLURM script)
  NNODES       how many machines
  NODE_RANK    which of them this is: 0 to NNODES - 1
  MASTER_ADDR  the name or address of machine 0
  MASTER_PORT  a free port of machine 0 (default: 29500)

examples:
  ./train_launch.sh ./train_config_tiny.json 1
  ./train_launch.sh ./train_config.json 4 standard --learning_rate 1e-5 --output_dir output/mine
  NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 ./train_launch.sh ./train_config.json 8
TEXT
}

fail() {
  echo "error: $1" >&2
  usage >&2
  exit 2
}

here="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
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

rendezvous=(--standalone)
nodes="${NNODES:-1}"
[[ "$nodes" =~ ^[1-9][0-9]*$ ]] || fail "NNODES must be a number of machines, not '$nodes'"
if [[ "$nodes" -gt 1 ]]; then
  [[ -n "${NODE_RANK:-}" ]] || fail "NNODES is $nodes, but NODE_RANK is missing: number the machines 0 to $((nodes - 1))"
  [[ "$NODE_RANK" =~ ^[0-9]+$ && "$NODE_RANK" -lt "$nodes" ]] ||
    fail "NODE_RANK must be a number from 0 to $((nodes - 1)), not '$NODE_RANK'"
  [[ -n "${MASTER_ADDR:-}" ]] || fail "NNODES is $nodes, but MASTER_ADDR is missing: give the address of machine 0"
  port="${MASTER_PORT:-29500}"
  [[ "$port" =~ ^[1-9][0-9]*$ && "$port" -lt 65536 ]] || fail "MASTER_PORT must be a port number, not '$port'"
  rendezvous=(--nnodes="$nodes" --node_rank="$NODE_RANK" --master_addr="$MASTER_ADDR" --master_port="$port")
fi

python="$(bash "$root/scripts/setup.sh")"
gpus="$("$python" -P -c 'import torch; print(torch.cuda.device_count())')"
if [[ "$num" -eq 0 ]]; then
  num=$((gpus > 0 ? gpus : 1))
elif [[ "$gpus" -gt 0 && "$num" -gt "$gpus" ]]; then
  fail "NUM is $num, but this machine has $gpus GPUs"
fi

# so that DeepSpeed does not warn that it found no GPU
[[ "$gpus" -gt 0 ]] || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
if [[ "$num" -eq 1 && "$nodes" -eq 1 ]]; then
  # one process drives one device
  if [[ "$gpus" -gt 1 ]]; then
    visible="${CUDA_VISIBLE_DEVICES:-0}"
    export CUDA_VISIBLE_DEVICES="${visible%%,*}"
  fi
  exec "$python" "$script" "$config" "$@"
fi
if [[ "$gpus" -eq 0 ]]; then
  cores="$("$python" -P -c 'import os; print(os.cpu_count())')"
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / num > 0 ? cores / num : 1))}"
fi
exec "$python" -P -m ovis25.launch "${rendezvous[@]}" --nproc_per_node="$num" "$script" "$config" "$@"
