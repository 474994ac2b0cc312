#!/usr/bin/env bash
# Tries the project as a stranger would: clones it into a folder with blanks and an umlaut in its name, sets it up there,
# types every command and snippet of README, src_theo/README.md and docs/ (long runs cut to a few steps), then a page of
# wrong uses, each of which must end in one clear line.
#
#   scripts/try_as_a_user.sh            everything, with an environment of its own (half an hour on two cores)
#   scripts/try_as_a_user.sh --short    a few of each kind
#   scripts/try_as_a_user.sh --only "merge|chat"   what matches
#
# OVIS25_PYTHON names an interpreter that has what ovis25 needs; then no environment is made.
set -euo pipefail
root="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
case "${1:-}" in
  -h | --help)
    sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac

place="$(mktemp -d "${TMPDIR:-/tmp}/ovis25 Übung XXXXXX")"
trap 'rm -rf "$place"' EXIT
clone="$place/mein Klon"
git clone --quiet "$root" "$clone"
if [[ -n "$(git -C "$root" status --porcelain)" ]]; then
  echo "note: changes that are not committed are not tried"
fi

unset VIRTUAL_ENV PYTHONPATH
if [[ -n "${OVIS25_PYTHON:-}" ]]; then
  # a stand-in for the environment that the launchers would make
  VIRTUAL_ENV="$(cd "$(dirname "$OVIS25_PYTHON")/.." && pwd)"
  export VIRTUAL_ENV PYTHONPATH="$clone"
fi
python="$(cd "$clone" && bash scripts/setup.sh)"
PATH="$(dirname "$python"):$PATH" "$python" "$clone/scripts/stranger.py" "$clone" "$@"
