#!/usr/bin/env bash
# Makes .venv with the tested versions of everything, or finds an environment that already has ovis25.
# Prints the Python to use as its only line on standard output; everything else goes to standard error.
#
#   PYTHON=$(bash scripts/setup.sh)
set -euo pipefail
root="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"

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

# new_enough PYTHON: it starts and is 3.11 or newer; a name that only looks like one (a version manager's shim) is silent
new_enough() {
  command -v "$1" >/dev/null && "$1" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' >/dev/null 2>&1
}

fail() {
  echo "error: $1" >&2
  exit 1
}

for python in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "$(command -v python3 || true)" "$venv/bin/python"; do
  if [[ -n "$python" && -x "$python" ]] && ready "$python"; then
    echo "$python"
    exit 0
  fi
done

python="$venv/bin/python"
if ! "$python" -c "" >/dev/null 2>&1; then
  base=""
  for candidate in python3.12 python3.11 python3; do
    if new_enough "$candidate"; then
      base="$candidate"
      break
    fi
  done
  if [[ -z "$base" ]]; then
    found="$(python3 -c 'import platform; print("python3 is", platform.python_version())' 2>/dev/null || true)"
    fail "ovis25 needs Python 3.11 or newer; tried python3.12, python3.11 and python3 (${found:-none of them starts})"
  fi
  echo "Setting up $venv (once; a few minutes) ..." >&2
  "$base" -m venv --clear "$venv" >&2 ||
    fail "$base could not make $venv (see above); on Debian and Ubuntu: sudo apt install python3-venv"
else
  echo "Completing $venv (a few minutes) ..." >&2
  # an environment that was broken off, or made by another tool, may lack pip
  "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null ||
    fail "$venv has no pip and none could be put there; remove the folder and run scripts/setup.sh again"
fi

# install WHAT PACKAGES: with the versions of constraints.txt
install() {
  echo "  $1" >&2
  "$python" -m pip install -q --disable-pip-version-check -c "$root/constraints.txt" -e "$root[$2]" >&2
}
install "torch, transformers and the tests' tools" test ||
  fail "the packages could not be installed (see above): is the package index reachable, and the disk not full? The same command goes on"
# optional: ZeRO and the trl recipe need them, everything else does not
for extra in deepspeed trl; do
  install "$extra" "$extra" || echo "note: $extra could not be installed; what needs it will say so" >&2
done
ready "$python" || fail "the set-up of $venv did not finish; remove the folder and run scripts/setup.sh again"
echo "$python"
