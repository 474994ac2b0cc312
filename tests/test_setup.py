"""Setting up: quiet where nothing is wrong, loud where something is, one path on standard output."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ovis25.files import REPOSITORY_ROOT

BROKEN_SHIM = '#!/bin/sh\necho "pyenv: ${0##*/}: command not found" >&2\nexit 127\n'
OLD_PYTHON = "#!/bin/sh\nexit 1\n"
# answers what setup.sh asks of a Python: is it new enough, make an environment, install, is all there
WORKING = """#!/bin/sh
case "$*" in
  "-c "*) exit 0 ;;
  "-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python"; exit 0 ;;
  "-m pip"*) echo "pip speaks"; exit ${PIP_EXIT:-0} ;;
  "-P -"*) case "$0" in */.venv/bin/python) exit 0 ;; esac; exit 1 ;;
esac
exit 1
"""


@pytest.fixture
def clone(tmp_path) -> Path:
    """The set-up script alone, in a folder with a blank and an umlaut, without an environment."""
    folder = tmp_path / "ü clone"
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(REPOSITORY_ROOT / "scripts" / "setup.sh", folder / "scripts")
    return folder


def set_up(script: Path, shims: dict[str, str], folder: Path, cwd=None, **env) -> subprocess.CompletedProcess:
    """Run it with these commands as the only Pythons."""
    shim_dir = folder / "shims"
    shim_dir.mkdir()
    for name in ("bash", "dirname", "mkdir", "cp", "cat"):
        (shim_dir / name).symlink_to(shutil.which(name))
    for name, text in shims.items():
        (shim_dir / name).write_text(text)
        (shim_dir / name).chmod(0o755)
    variables = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    variables |= {"PATH": str(shim_dir), **env}
    return subprocess.run(["bash", str(script)], cwd=cwd, env=variables, capture_output=True, text=True, timeout=60)


ALL_BROKEN = dict.fromkeys(("python3.12", "python3.11", "python3"), BROKEN_SHIM)


def test_with_a_ready_environment_nothing_but_its_path_is_said(tmp_path):
    script = REPOSITORY_ROOT / "scripts" / "setup.sh"
    result = set_up(script, ALL_BROKEN, tmp_path, VIRTUAL_ENV=sys.prefix, PYTHONPATH=str(REPOSITORY_ROOT))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{sys.prefix}/bin/python\n"


@pytest.mark.parametrize("broken", [("python3.12",), ("python3.12", "python3.11"), ("python3.11",)])
def test_interpreters_that_were_only_tried_are_silent(clone, tmp_path, broken):
    shims = {**dict.fromkeys(("python3.12", "python3.11", "python3"), WORKING), **dict.fromkeys(broken, BROKEN_SHIM)}
    result = set_up(clone / "scripts" / "setup.sh", shims, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{clone}/.venv/bin/python\n"
    assert "pyenv" not in result.stderr and result.stderr.startswith(f"Setting up {clone}/.venv")


def test_an_old_python_is_passed_over(clone, tmp_path):
    shims = {"python3.12": BROKEN_SHIM, "python3.11": OLD_PYTHON, "python3": WORKING}
    result = set_up(clone / "scripts" / "setup.sh", shims, tmp_path)
    assert result.returncode == 0 and "pyenv" not in result.stderr


@pytest.mark.parametrize("shims", [ALL_BROKEN, {}, {"python3": OLD_PYTHON}])
def test_without_a_python_that_fits_the_error_names_what_was_tried(clone, tmp_path, shims):
    result = set_up(clone / "scripts" / "setup.sh", shims, tmp_path)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr.startswith("error: ovis25 needs Python 3.11 or newer; tried python3.12, python3.11 and")
    assert "pyenv" not in result.stderr


def test_a_failed_installation_is_told_with_what_pip_said(clone, tmp_path):
    result = set_up(clone / "scripts" / "setup.sh", {"python3": WORKING}, tmp_path, PIP_EXIT="1")
    assert result.returncode == 1 and not result.stdout
    assert "pip speaks" in result.stderr and "error: the packages could not be installed (see above)" in result.stderr


def test_an_environment_that_cannot_be_made_is_told_with_the_cure(clone, tmp_path):
    no_venv = WORKING.replace('"-m venv"*)', '"-m venv"*) echo "ensurepip is not available"; exit 1;')
    result = set_up(clone / "scripts" / "setup.sh", {"python3": no_venv}, tmp_path)
    assert result.returncode == 1 and not result.stdout
    assert "ensurepip is not available" in result.stderr and "apt install python3-venv" in result.stderr


def test_a_search_path_for_folders_leads_no_script_astray(clone, tmp_path):
    (tmp_path / "elsewhere" / "scripts").mkdir(parents=True)
    result = set_up(Path("scripts/setup.sh"), {"python3": WORKING}, tmp_path, cwd=clone, CDPATH=f"{tmp_path}/elsewhere")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{clone}/.venv/bin/python\n"
    scripts = [*REPOSITORY_ROOT.glob("scripts/*.sh"), *REPOSITORY_ROOT.glob("src_theo/**/*.sh")]
    assert len(scripts) >= 5
    for script in scripts:
        assert 'CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")' in script.read_text(encoding="utf-8"), script
