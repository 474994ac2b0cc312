#!/usr/bin/env bash
# The whole check of the project: style, then every test. Sets up the environment where there is none.
# Further arguments go to pytest:  bash scripts/test.sh tests/test_parity.py -x
set -euo pipefail
root="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
python="$(bash "$root/scripts/setup.sh")"
cd "$root"
"$python" -m ruff check .
"$python" -m ruff format --check .
# all of it: a file at a time on each core, one thread each
if [[ $# -eq 0 ]]; then
  export OMP_NUM_THREADS=1
  set -- -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
fi
exec "$python" -m pytest "$@"
