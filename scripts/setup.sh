#!/usr/bin/env bash
# Makes .venv with the tested versions of everything, or finds an environment that already has ovis25.
# Prints the Python to use as its only line on standard output; everything else goes to standard error.
#
#   PYTHON=$(bash scripts/setup.sh)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# ready PYTHON: it has this clone's ovis25 (or an installed one) and what that needs, found without importing
ready() {
  "$1" -P - "$root" 2>/dev/null <<'PY'
import importlib.util, pathlib, sys
spec = importlib.util.find_spec("ovis25")
home = pathlib.Path(spec.origin).resolve()
ours = pathlib.Path(sys.argv[1]).resolve() in home.parents or "site-packages" in home.parts
needs = ("torch", "transformers", "accelerate", "peft", "safetensors", "av", "rich", "matplotlib", "sklearn", "pytest", "xdist", "ruff")
sys.exit(not (ours and all(importlib.util.find_spec(name) for name in needs)))
PY
}

for python in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "$(command -v python3 || true)" "$root/.venv/bin/python"; do
  if [[ -n "$python" && -x "$python" ]] && ready "$python"; then
    echo "$python"
    exit 0
  fi
done

base=""
for candidate in python3.12 python3.11 python3; do
  if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))'; then
    base="$candidate"
    break
  fi
done
if [[ -z "$base" ]]; then
  echo "error: ovis25 needs Python 3.11 or newer; found $(python3 --version 2>&1 || echo none)" >&2
  exit 1
fi

echo "Setting up $root/.venv (once; a few minutes) ..." >&2
python="$root/.venv/bin/python"
{
  [[ -x "$python" ]] || "$base" -m venv "$root/.venv"
  "$python" -m pip install -q --disable-pip-version-check -c "$root/constraints.txt" -e "$root[test]"
  # optional: ZeRO and the trl recipe need them, everything else does not
  for extra in deepspeed trl; do
    "$python" -m pip install -q --disable-pip-version-check -c "$root/constraints.txt" -e "$root[$extra]" ||
      echo "note: $extra could not be installed; what needs it will say so" >&2
  done
} >&2
if ! ready "$python"; then
  echo "error: the set-up of $root/.venv did not finish; remove the folder and run scripts/setup.sh again" >&2
  exit 1
fi
echo "$python"
