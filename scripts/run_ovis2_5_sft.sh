#!/usr/bin/env bash
# Supervised fine-tuning by flags alone, named as the upstream project names them.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: run_ovis2_5_sft.sh [--data_info_version DATAINFO --data_name 'A|B'] [--key value ...]

  --data_info_version  a datainfo file, with or without its .json: name -> meta_file, image_dir, data_format
  --data_name          the data sets of it to train on, joined with |
                       (without both, the samples of src_theo/sample_data: to see that everything works)
  --key                any other flag of the upstream script, and any setting of a config (ovis25 train --help);
                       --dry-run prints the plan and stops
  Settings without a flag are those of run_ovis2_5_sft.json, beside this script.

  NUM_DEVICES          devices of this machine (all GPUs; one process without GPU)
  NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
                       several machines: see docs/several_machines.md

example:
  NUM_DEVICES=4 scripts/run_ovis2_5_sft.sh \
    --ovis_pretrained_path AIDC-AI/Ovis2.5-2B --deepspeed scripts/zero_configs/zero1_cp.json \
    --data_info_version src_theo/sample_data/datainfo.json --data_name 'sample_conversations|sample_captions' \
    --train_modules 'visual_tokenizer:5e-6|llm|vte' --single_image_max_pixels 802816 --output_dir output/mine
TEXT
}

fail() {
  echo "error: $1" >&2
  usage >&2
  exit 2
}

root="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

[[ "${1:-}" == "-h" || "${1:-}" == "--help" ]] && { usage; exit 0; }
[[ $# -eq 0 || "$1" == --* ]] || fail "unexpected argument '$1': this script takes flags only (train_launch.sh takes a config)"
# the names stand in one word or in two: --key=value, --key value
given=" ${*%%=*} "
is_given() { [[ "$given" == *" --$1 "* ]]; }
if is_given data_info_version && ! is_given data_name; then fail "--data_name is missing: which data sets of that file?"; fi
if is_given data_name && ! is_given data_info_version; then fail "--data_info_version is missing: the file of those names"; fi
is_given data_name || is_given data_path ||
  echo "no --data_info_version and --data_name: this run takes the samples of src_theo/sample_data" >&2
num="${NUM_DEVICES:-0}"
[[ "$num" =~ ^[0-9]+$ ]] || fail "NUM_DEVICES must be a number of devices, not '$num'"

exec bash "$root/src_theo/train_launch.sh" "$root/scripts/run_ovis2_5_sft.json" "$num" standard "$@"
