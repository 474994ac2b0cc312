#!/usr/bin/env bash
# The whole check of the project: style, then every test. Sets up the environment where there is none.
# Further arguments go to pytest:  bash scripts/test.sh tests/test_parity.py -x
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$(bash "$root/scripts/setup.sh")"
cd "$root"
"$python" -m ruff check .
"$python" -m ruff format --check .
exec "$python" -m pytest "$@"
