"""Several machines: launchers that meet as torchrun's nodes train as one launcher with as many processes does."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ovis25.files import REPOSITORY_ROOT

LAUNCHER = ["bash", str(REPOSITORY_ROOT / "src_theo" / "train_launch.sh")]
TIMEOUT_S = 240
STEPS = 3
SETTINGS = ["standard", "--data_path", "tiny:train:64", "--per_device_train_batch_size", "2", "--max_steps", STEPS,
            "--logging_steps", "1", "--exam", "false", "--eval_data_path", "none", "--save_steps", STEPS,
            "--warmup_steps", "0", "--early_stopping_patience", "0"]  # fmt: skip


def environment(**variables) -> dict[str, str]:
    # the tests' own environment is the active one, so the launcher sets nothing up
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "NNODES", "NODE_"))
    }
    # a fixed number of threads: sums are then taken in the same order
    return {**inherited, "PATH": path, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", **variables}


def launch_all(launches: list[dict[str, str]], num: int, output_dir: Path) -> list[str]:
    """Run the launcher once for each set of variables, at the same time; returns what each printed.

    Whatever happens, no process outlives the call: members that do not meet would wait for each other.
    """
    command = [*LAUNCHER, "train_config_tiny.json", num, *SETTINGS, "--output_dir", output_dir]
    members = [
        subprocess.Popen(
            [str(part) for part in command], env=environment(**variables), cwd=REPOSITORY_ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )
        for variables in launches
    ]  # fmt: skip
    try:
        printed = [member.communicate(timeout=TIMEOUT_S)[0] for member in members]
    finally:
        for member in members:
            if member.poll() is None:
                os.killpg(member.pid, signal.SIGKILL)
                member.wait()
    assert [member.returncode for member in members] == [0] * len(members), "\n".join(printed)
    return printed


def losses(output_dir: Path) -> list[float]:
    state = json.loads((output_dir / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_two_machines_train_as_one_with_two_processes(tmp_path):
    shared = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    first, second = launch_all([{**shared, "NODE_RANK": rank} for rank in "01"], 1, tmp_path / "two")
    assert "2 per device x 2 devices x 1 accumulated = 4" in first
    assert "The plan" not in second
    launch_all([{}], 2, tmp_path / "one")
    expected = losses(tmp_path / "one")
    assert len(expected) == STEPS and losses(tmp_path / "two") == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NNODES": "two"}, "NNODES must be a number of machines, not 'two'"),
        ({"NNODES": "2", "MASTER_ADDR": "node0"}, "NODE_RANK is missing: number the machines 0 to 1"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "node0"}, "NODE_RANK must be a number from 0 to 1, not '2'"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is missing: give the address of machine 0"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "node0", "MASTER_PORT": "http"},
         "MASTER_PORT must be a port number, not 'http'"),
    ],
)  # fmt: skip
def test_a_variable_that_is_missing_or_wrong_is_an_error(variables, message):
    command = [*LAUNCHER, "train_config_tiny.json", "1"]
    result = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert message in result.stderr and "usage: train_launch.sh" in result.stderr


def test_the_slurm_script_of_the_docs_starts_a_launcher_on_each_machine(tmp_path):
    """With commands that stand for SLURM's and a launcher that prints what it was given."""
    page = (REPOSITORY_ROOT / "docs" / "several_machines.md").read_text(encoding="utf-8")
    script = next(block for block in page.split("```bash\n") if "#SBATCH" in block).split("```")[0]
    stand_ins = {
        "bin/scontrol": 'printf "nodeA\\nnodeB\\n"',
        "bin/srun": '[[ "$1" == --kill-on-bad-exit=1 ]]; shift; for i in 0 1; do SLURM_NODEID=$i "$@"; done',
        "src_theo/train_launch.sh": 'echo "$NNODES $NODE_RANK $MASTER_ADDR $MASTER_PORT $1"',
        "job.sh": script,
    }
    for name, text in stand_ins.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text if text.startswith("#!") else f"#!/usr/bin/env bash\nset -eu\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = environment(SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="node[A-B]", SLURM_JOB_ID="7012345")
    variables["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{variables['PATH']}"
    result = subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60)
    config = "src_theo/train_config.json"
    assert result.stdout.splitlines() == [f"2 {rank} nodeA 22345 {config}" for rank in (0, 1)], result.stderr
