"""The documented doors, run as a user runs them: from the root and from src_theo/, with right and wrong arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ovis25.files import REPOSITORY_ROOT

SRC_THEO = REPOSITORY_ROOT / "src_theo"
FAST = ["--max_steps", "2", "--eval_steps", "2", "--exam", "false", "--eval_data_path", "tiny:validation:4",
        "--data_path", "tiny:train:64", "--per_device_train_batch_size", "4"]  # fmt: skip


def run(*command, cwd=REPOSITORY_ROOT, **env) -> subprocess.CompletedProcess:
    # the tests' own environment is the active one, so the launcher sets nothing up
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix, **env}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=variables, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("cwd", "launcher", "config"),
    [
        (REPOSITORY_ROOT, "src_theo/train_launch.sh", "src_theo/train_config_tiny.json"),
        (SRC_THEO, "train_launch.sh", "train_config_tiny.json"),
    ],
)
def test_the_launcher_trains_from_the_root_and_from_src_theo(cwd, launcher, config, tmp_path):
    result = run("bash", launcher, config, 1, "standard", *FAST, "--output_dir", tmp_path / "out", cwd=cwd)
    assert result.returncode == 0, result.stderr
    assert "The plan" in result.stdout and "all 2 steps are done" in result.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()


LORA = SRC_THEO / "lora"


@pytest.mark.parametrize(
    ("cwd", "folder", "config"),
    [
        pytest.param(REPOSITORY_ROOT, "src_theo/lora/", "src_theo/lora/train_config_lora.json", marks=pytest.mark.slow),
        (LORA, "", "train_config_lora.json"),
    ],
)
def test_an_adapter_is_trained_and_merged_from_the_root_and_from_lora(cwd, folder, config, tmp_path):
    result = run("bash", f"{folder}train_launch_lora.sh", config, 1, "--model_path", "tiny", "--max_steps", 1,
                 "--gradient_accumulation_steps", 1, "--output_dir", tmp_path / "a", cwd=cwd)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "The adapter lies in" in result.stdout and (tmp_path / "a" / "adapter_model.safetensors").is_file()
    merge = (sys.executable, f"{folder}merge_lora_adapters.py", "--adapter_path", tmp_path / "a")
    result = run(*merge, "--output_path", tmp_path / "b", cwd=cwd)
    assert result.returncode == 0 and "relative error" in result.stdout, result.stderr
    assert "WARNING" not in result.stderr
    assert (tmp_path / "b" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_lora_and_trl_scripts_run_by_themselves(tmp_path):
    for door, cwd in (("train_theo_lora.py", LORA), ("train_theo_trl.py", SRC_THEO)):
        result = run(sys.executable, door, "train_config_tiny.json", *FAST, "--output_dir", tmp_path / door, cwd=cwd)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "train_theo_lora.py" / "adapter_config.json").is_file()
    assert (tmp_path / "train_theo_trl.py" / "model.safetensors").is_file()


def test_what_several_processes_find_wrong_is_one_line(tmp_path):
    result = run("bash", "src_theo/train_launch.sh", "train_config_tiny.json", 2, "--learning_rate", "fast",
                 "--output_dir", tmp_path / "out")  # fmt: skip
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2 and len(errors) == 1 and "learning_rate is 'fast'" in errors[0]
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) < 5


@pytest.mark.slow
def test_the_launcher_runs_several_processes_on_a_machine_without_gpu(tmp_path):
    result = run("bash", "src_theo/train_launch.sh", "train_config_tiny.json", 2, *FAST, "--output_dir", tmp_path / "o")
    assert result.returncode == 0, result.stderr
    assert "4 per device x 2 devices x 1 accumulated = 8" in result.stdout
    assert result.stdout.count("The plan") == 1


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    result = run(sys.executable, "train_theo.py", "train_config_tiny.json", "--dry-run", "--output_dir", tmp_path / "o",
                 cwd=SRC_THEO)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "The plan" in result.stdout and "learning rate" in result.stdout
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "CONFIG is missing"),
        (["train_config_tiny.json", "two"], "NUM must be a number of devices, not 'two'"),
        (["train_config_tiny.json", "1", "fast"], "the recipe must be standard or trl, not 'fast'"),
        (["train_config_tiny.json", "1", "standard", "extra"], "unexpected argument 'extra'"),
    ],
)
def test_wrong_arguments_print_the_usage(arguments, message):
    result = run("bash", "src_theo/train_launch.sh", *arguments)
    assert result.returncode == 2
    assert message in result.stderr and "usage: train_launch.sh CONFIG [NUM]" in result.stderr


def test_the_launcher_and_the_script_explain_themselves():
    launcher = run("bash", "src_theo/train_launch.sh", "--help")
    assert launcher.returncode == 0 and "examples:" in launcher.stdout
    script = run(sys.executable, "src_theo/train_theo.py", "--help")
    assert script.returncode == 0
    assert "example:" in script.stdout and "multimodal_max_length" in script.stdout
    for command in ("train", "plan", "merge"):
        result = run(sys.executable, "-m", "ovis25.cli", command, "--help")
        assert result.returncode == 0 and "example" in result.stdout, command
    lora = run("bash", "src_theo/lora/train_launch_lora.sh", "--help")
    assert lora.returncode == 0 and "examples:" in lora.stdout


def test_a_model_out_of_reach_says_so_and_points_to_the_tiny_one(tmp_path):
    result = run(
        sys.executable, "src_theo/train_theo.py", "train_config.json", "--output_dir", tmp_path / "out",
        HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    assert result.returncode == 2
    assert "AIDC-AI/Ovis2.5-9B is no folder here and could not be fetched from the hub" in result.stderr
    assert str(tmp_path / "cache") in result.stderr
    assert "train_config_tiny.json" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_evaluation_file_is_an_error_not_a_skip(tmp_path):
    result = run(sys.executable, "src_theo/train_theo.py", "train_config_tiny.json", "--eval_data_path", "gone.json",
                 "--output_dir", tmp_path / "out")  # fmt: skip
    assert result.returncode == 2
    assert "eval_data_path: gone.json was not found" in result.stderr


def test_the_documented_import_works_from_src_theo():
    code = "from inference_ovis25 import Ovis25Inference as A; from tools.crop_tool import CropTool as B; print(A, B)"
    result = run(sys.executable, "-c", code, cwd=SRC_THEO)
    assert "Ovis25Inference" in result.stdout and "CropTool" in result.stdout, result.stderr


FAILS_ALONE = """
import os, sys, time
from ovis25.cli.command import Command
from ovis25.cli.errors import exit_code_of
from ovis25.errors import UserError

def run():
    if os.environ["RANK"] == "1":
        raise UserError("a broken sample")
    time.sleep(60)
    return 0

sys.exit(exit_code_of(Command(None, None, "", None), run))
"""


def test_what_one_process_alone_finds_wrong_is_read_out(tmp_path):
    (tmp_path / "alone.py").write_text(FAILS_ALONE)
    result = run(sys.executable, "-m", "ovis25.launch", "--standalone", "--nproc_per_node=2", tmp_path / "alone.py")
    assert result.returncode == 2 and result.stderr == "error: process 1 failed: a broken sample\n"
