"""Several processes: every ZeRO stage, FSDP2 and plain data-parallel give what one process gives, and resume.

The runs go through the documented launchers. Batches of two are spread over two ranks so that one rank holds pictures
while the other holds text alone; a watchdog turns a hang into a failure.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PIXELS, losses_of, run
from safetensors import safe_open
from safetensors.torch import load_file
from sharded_chunks import LEARNING_RATE, sample

from ovis25 import Ovis2_5
from ovis25.files import REPOSITORY_ROOT

ZERO = REPOSITORY_ROOT / "scripts" / "zero_configs"
STAGES = ("zero0_cp", "zero1_cp", "zero2_cp", "zero3_cp")
# a recipe -> its launcher, and the launcher's word for it
RECIPES = {
    "standard": ("src_theo/train_launch.sh", "standard", {}),
    "trl": ("src_theo/train_launch.sh", "trl", {"recipe": "trl"}),
    "lora": ("src_theo/lora/train_launch_lora.sh", "standard", {"use_lora": True}),
}
# every stage and every recipe is tested without these too
SLOW = {(stage, recipe) for stage in STAGES[:3] for recipe in ("trl", "lora")} | {
    (stage, "standard") for stage in STAGES[:2]
}
SAME = 1e-4
TIMEOUT_S = 240

has_deepspeed = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not has_deepspeed, reason="DeepSpeed is not installed")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its CPU optimizer")


def watched(command: list, expected: int = 0, **env) -> str:
    """What it said. Run to the expected exit code, or fail with its end; a hang is killed with all its children."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    started = subprocess.Popen(
        [str(part) for part in command], start_new_session=True, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix, **env},
    )  # fmt: skip
    try:
        said, _ = started.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        pytest.fail(f"the processes hang: {command}")
    assert started.returncode == expected, said[-3000:]
    return said


@pytest.fixture(scope="session")
def config(tiny_folder, data_dir, tmp_path_factory) -> Path:
    """Ten steps in the file's order: sample 0 is text, 1 has a picture, 2 has two, and so on."""
    folder = tmp_path_factory.mktemp("distributed")
    path = folder / "config.json"
    path.write_text(json.dumps({
        "model_path": str(tiny_folder), "data_path": str(data_dir / "train.json"),
        "eval_data_path": str(data_dir / "eval.json"), "train_sampling_strategy": "sequential", "max_steps": 10,
        "eval_steps": 5, "save_total_limit": 5, "logging_steps": 1, "learning_rate": 1e-3, "dataloader_num_workers": 0,
        "early_stopping_patience": 0, "max_grad_norm": 1.0, "train_modules": "visual_tokenizer:5e-4|llm|vte", **PIXELS,
    }))  # fmt: skip
    return path


@pytest.fixture(scope="session")
def single(config):
    """recipe -> the folder of the same run in one process."""
    folders = {}

    def folder_of(recipe: str) -> Path:
        if recipe not in folders:
            folders[recipe] = config.parent / f"single-{recipe}"
            settings = [f"--{name}={value}" for name, value in RECIPES[recipe][2].items()]
            run(config, "--per_device_train_batch_size", 2, "--output_dir", folders[recipe], *settings)
        return folders[recipe]

    return folder_of


def launch(config: Path, recipe: str, output_dir: Path, *arguments) -> None:
    launcher, word, _ = RECIPES[recipe]
    watched(["bash", REPOSITORY_ROOT / launcher, config, 2, word, "--per_device_train_batch_size", 1,
             "--output_dir", output_dir, *arguments])  # fmt: skip


def evaluations(output_dir: Path) -> list[float]:
    history = json.loads((output_dir / "checkpoint-10" / "trainer_state.json").read_text())["log_history"]
    return [entry["eval_loss"] for entry in history if "eval_loss" in entry]


def weights(output_dir: Path) -> dict:
    """Name -> shape and dtype of everything that the final folder's safetensors hold."""
    (file,) = output_dir.glob("*.safetensors")
    with safe_open(file, "pt") as content:
        slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118
    return {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}


def assert_same_run(got: Path, expected: Path) -> None:
    assert losses_of(got).keys() == set(range(1, 11))
    assert losses_of(got) == pytest.approx(losses_of(expected), rel=SAME)
    assert evaluations(got) == pytest.approx(evaluations(expected), rel=SAME)
    assert weights(got) == weights(expected)
    files = [{path.name for path in folder.iterdir() if path.is_file()} for folder in (got, expected)]
    assert files[0] == files[1]
    assert json.loads((got / "train_results.json").read_text())["finished"]


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "recipe"),
    [
        pytest.param(stage, recipe, marks=pytest.mark.slow if (stage, recipe) in SLOW else [])
        for stage in STAGES
        for recipe in RECIPES
    ],
)
def test_every_stage_trains_as_one_process_does(stage, recipe, config, single, tmp_path):
    launch(config, recipe, tmp_path / "two", "--deepspeed", ZERO / f"{stage}.json")
    assert_same_run(tmp_path / "two", single(recipe))
    if recipe != "standard":
        return
    # and goes on from its middle, as after an interruption
    for path in (tmp_path / "two" / "checkpoint-10" / "COMPLETE", tmp_path / "two" / "train_results.json"):
        path.unlink()
    launch(config, recipe, tmp_path / "two", "--deepspeed", ZERO / f"{stage}.json")
    assert_same_run(tmp_path / "two", single(recipe))
    assert "checkpoint-5" in json.loads((tmp_path / "two" / "train_plan.json").read_text())["resumes_from"]


@needs_deepspeed
@pytest.mark.parametrize("stage", ["none", "zero3_cp"])
def test_ranks_fill_and_share_a_visual_cache(stage, config, single, tmp_path):
    """Each computes its share, ZeRO-3 of gathered weights; the losses are those of one process without a cache."""
    settings = [] if stage == "none" else ["--deepspeed", ZERO / f"{stage}.json"]
    settings += ["--cache_visual_embeddings", "true", "--visual_cache_dir", tmp_path / "cache"]
    launch(config, "lora", tmp_path / "two", *settings)
    assert_same_run(tmp_path / "two", single("lora"))
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(files) == 16 and {path.suffix for path in files} == {".safetensors"}


@needs_deepspeed
def test_adapters_in_a_frozen_vision_encoder_are_trained_under_checkpointing(config, tmp_path):
    """TRL would checkpoint reentrantly here, and such an adapter would stay as it was."""
    settings = ["--gradient_checkpointing", "true", "--use_lora", "true", "--apply_lora_to_vision", "true"]
    run(config, "--per_device_train_batch_size", 2, "--output_dir", tmp_path / "one", *settings)
    launch(config, "trl", tmp_path / "two", "--deepspeed", ZERO / "zero3_cp.json", *settings)
    assert_same_run(tmp_path / "two", tmp_path / "one")
    adapter = load_file(tmp_path / "two" / "adapter_model.safetensors")
    changed = [name for name, value in adapter.items() if "lora_B" in name and value.abs().sum() > 0]
    assert any(".vit." in name for name in changed) and any(".llm." in name for name in changed)


@needs_deepspeed
@needs_compiler
@pytest.mark.parametrize("stage", [pytest.param("zero2_offload_cp", marks=pytest.mark.slow), "zero3_offload_cp"])
def test_offloading_changes_nothing(stage, config, single, tmp_path):
    launch(config, "standard", tmp_path / "two", "--deepspeed", ZERO / f"{stage}.json")
    assert_same_run(tmp_path / "two", single("standard"))


def test_plain_data_parallel_trains_as_one_process_does(config, single, tmp_path):
    launch(config, "standard", tmp_path / "two")
    assert_same_run(tmp_path / "two", single("standard"))


@pytest.mark.parametrize("recipe", ["standard", pytest.param("lora", marks=pytest.mark.slow)])
def test_fsdp2_trains_as_one_process_does(recipe, config, single, tmp_path):
    settings = [f"--{name}={value}" for name, value in RECIPES[recipe][2].items()]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", REPOSITORY_ROOT / "scripts" / "fsdp2.yaml",
        "--num_processes", 2, REPOSITORY_ROOT / "src_theo" / "train_theo.py", config, "--per_device_train_batch_size",
        1, "--output_dir", tmp_path / "two", *settings,
    ]  # fmt: skip
    watched(command, OMP_NUM_THREADS="1")
    assert_same_run(tmp_path / "two", single(recipe))
    for path in (tmp_path / "two" / "checkpoint-10" / "COMPLETE", tmp_path / "two" / "train_results.json"):
        path.unlink()
    watched(command, OMP_NUM_THREADS="1")
    assert_same_run(tmp_path / "two", single(recipe))
    assert "checkpoint-5" in json.loads((tmp_path / "two" / "train_plan.json").read_text())["resumes_from"]


def torchrun(script: str, config: Path, output_dir: Path, *arguments, expected: int = 0, **env) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               REPOSITORY_ROOT / "tests" / script, config, "--per_device_train_batch_size", 1, "--output_dir",
               output_dir, *arguments]  # fmt: skip
    return watched(command, expected, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", **env)


def stage_settings(stage: str) -> list:
    return [] if stage == "none" else ["--deepspeed", ZERO / f"{stage}.json"]


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "recipe"),
    [
        ("zero3_cp", "standard"),
        *(pytest.param(stage, "standard", marks=pytest.mark.slow) for stage in ("none", *STAGES[:3])),
        *(pytest.param("zero3_cp", recipe, marks=pytest.mark.slow) for recipe in ("trl", "lora")),
    ],
)
def test_after_its_last_step_a_run_only_saves_and_holds_its_exam(stage, recipe, config, tmp_path):
    """As a run that was killed before its final save; the exam needs a model of its own in the same process."""
    settings = [f"--{name}={value}" for name, value in RECIPES[recipe][2].items()]
    settings += ["--data_path", "tiny:train:16", "--exam", "true", "--max_steps", 3, "--eval_steps", 1,
                 "--learning_rate", 1e-2, *stage_settings(stage)]  # fmt: skip
    out = tmp_path / "out"
    said = torchrun("short_exam.py", config, out, *settings)
    assert said.count("Exam: 1 test questions") == 1 and "all 3 steps are done" in said
    (file,) = out.glob("*.safetensors")
    saved, results = file.read_bytes(), json.loads((out / "train_results.json").read_text())
    for path in (file, out / "train_results.json"):
        path.unlink()
    said = torchrun("short_exam.py", config, out, *settings)
    assert said.count("checkpoint-3 is the end of this run") == 1 and said.count("Exam: 1 test questions") == 1
    assert file.read_bytes() == saved
    again = json.loads((out / "train_results.json").read_text())
    assert {**again, "train_seconds": None} == {**results, "train_seconds": None}


@needs_deepspeed
@pytest.mark.parametrize("stage", ["none", pytest.param("zero2_cp", marks=pytest.mark.slow), "zero3_cp"])
def test_a_loss_that_is_no_number_on_one_rank_ends_all_of_them(stage, config, tmp_path):
    """The samples of that rank are named, once."""
    settings = ["--max_steps", 4, "--eval_steps", 2, "--logging_steps", 50, *stage_settings(stage)]
    said = torchrun("one_bad_rank.py", config, tmp_path / "out", *settings, expected=1, BAD_STEP="3")
    assert said.count("error: the training loss became nan at step 3, on ") == 1
    assert '[5] (id "s5")' in said and '(id "s4")' not in said
    assert [folder.name for folder in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "out" / "model.safetensors").exists()


@needs_deepspeed
@pytest.mark.slow
def test_broken_base_weights_are_seen_in_every_shard(config, tiny_folder, tmp_path):
    model = Ovis2_5.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.no_grad():
        model.vte.weight[-1, -1] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    settings = ["--model_path", tmp_path / "broken", *stage_settings("zero3_cp")]
    said = torchrun("short_exam.py", config, tmp_path / "out", *settings, expected=1)
    assert said.count("hold NaN or infinity: vte.weight. ") == 1


def test_every_zero_config_is_tested():
    named = {path.stem for path in ZERO.glob("*.json")}
    assert named == {*STAGES, "zero2_offload_cp", "zero3_offload_cp"}


@needs_deepspeed
def test_ranks_may_differ_in_their_chunks(tiny_folder, tmp_path):
    """Loss and visual head gather sharded weights once, however many chunks a rank's rows take."""
    script = REPOSITORY_ROOT / "tests" / "sharded_chunks.py"
    said = watched(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, tiny_folder],
        OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    got = [
        [float(number) for number in re.search(rf"losses of rank {rank}: (\S+) (\S+)", said).groups()]
        for rank in (0, 1)
    ]
    model = Ovis2_5.from_pretrained(tiny_folder, dtype=torch.float32).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for step in range(2):
        losses = [model(**sample(rank)).loss for rank in (0, 1)]
        (sum(losses) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert [row[step] for row in got] == pytest.approx([value.item() for value in losses], rel=SAME)
