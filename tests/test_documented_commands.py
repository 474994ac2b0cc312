"""The documented commands, as a user types them: every script starts by its name, every shipped config runs."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ovis25.files import REPOSITORY_ROOT

SRC_THEO = REPOSITORY_ROOT / "src_theo"
LORA = SRC_THEO / "lora"


def environment(**more: str) -> dict[str, str]:
    """The tests' own environment as the active one, so that nothing is set up."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix, **more}


def type_in(command: str, cwd: Path, *more, **env: str) -> subprocess.CompletedProcess:
    """Run a line as a shell in `cwd` does, with `more` arguments behind."""
    line = f"{command} {shlex.join(map(str, more))}"
    variables = environment(**env)
    return subprocess.run(
        ["bash", "-c", line], cwd=cwd, env=variables, capture_output=True, text=True, timeout=600, errors="replace"
    )


def started_files() -> dict[str, str]:
    """Path -> mode in git, of every file that is meant to be started: *.sh, and what begins with #!."""
    command = ["git", "-C", str(REPOSITORY_ROOT), "ls-files", "-s", "-z"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("there is no git here")
    if result.returncode:
        pytest.skip("this is no git clone")
    modes = {}
    for entry in filter(None, result.stdout.split("\0")):
        description, _, path = entry.partition("\t")
        file = REPOSITORY_ROOT / path
        if file.is_file() and (path.endswith(".sh") or file.read_bytes()[:2] == b"#!"):
            modes[path] = description.split()[0]
    return modes


def test_every_script_has_its_run_bit():
    modes = started_files()
    assert {"src_theo/train_launch.sh", "scripts/run_ovis2_5_sft.sh", ".ci/run"} <= modes.keys()
    assert [path for path, mode in modes.items() if mode != "100755"] == []
    assert all(os.access(REPOSITORY_ROOT / path, os.X_OK) for path in modes)


TINY = ("--model_path", "tiny", "--max_steps", "2")


@pytest.mark.parametrize(
    ("command", "cwd", "num_devices"),
    [
        ("./train_launch.sh ./train_config.json 1", SRC_THEO, 1),
        ("./train_launch.sh ./train_config.json 2 trl", SRC_THEO, 2),
        ("./train_launch_lora.sh ./train_config_lora.json 1", LORA, 1),
        ("scripts/run_ovis2_5_sft.sh", REPOSITORY_ROOT, 1),
        ("./train_launch.sh ./train_config.json 4", SRC_THEO, 4),
        pytest.param("./train_launch.sh ./train_config_2b.json 2", SRC_THEO, 2, marks=pytest.mark.slow),
        pytest.param("./train_launch_lora.sh ./train_config_lora.json 2 trl", LORA, 2, marks=pytest.mark.slow),
        pytest.param("NUM_DEVICES=2 ./scripts/run_ovis2_5_sft.sh", REPOSITORY_ROOT, 2, marks=pytest.mark.slow),
    ],
)
def test_a_documented_command_runs_on_the_tiny_model(command, cwd, num_devices, tmp_path):
    result = type_in(command, cwd, *TINY, "--output_dir", tmp_path / "ü out")
    assert result.returncode == 0, result.stderr
    assert f"x {num_devices} devices x" in result.stdout and "all 2 steps are done" in result.stdout
    saved = "adapter_model.safetensors" if "lora" in command else "model.safetensors"
    assert (tmp_path / "ü out" / saved).is_file()
    # nothing of other libraries around our own lines
    assert result.stdout.startswith("The plan")
    assert "[transformers]" not in result.stderr and "mismatch" not in result.stderr


def test_the_plan_of_the_documented_command_needs_neither_hub_nor_devices(tmp_path):
    result = type_in("./train_launch.sh ./train_config.json 1 --dry-run", SRC_THEO, "--output_dir", tmp_path / "o",
                     HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "cache"))  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "AIDC-AI/Ovis2.5-9B" in result.stdout and "text token counts are estimates" in result.stdout
    assert not (tmp_path / "o").exists()


def test_the_checkpoints_of_the_main_configuration_are_ignored_by_git():
    if not (REPOSITORY_ROOT / ".git").exists():
        pytest.skip("this is no git clone")
    for place in ("checkpoints", "src_theo/checkpoints", "src_theo/lora/checkpoints"):
        command = ["git", "check-ignore", "-q", f"{place}/ovis25_finetune/model.safetensors"]
        assert subprocess.run(command, cwd=REPOSITORY_ROOT, timeout=60).returncode == 0, place
