"""What the documentation names exists and runs."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from ovis25.cli import main
from ovis25.files import REPOSITORY_ROOT
from ovis25.training.config import OWN_KEYS, TRAINER_KEYS

PAGES = [
    "README.md",
    "src_theo/README.md",
    "CONTRIBUTING.md",
    "docs/benchmarks.md",
    "docs/inference.md",
    "docs/several_machines.md",
]


def page(name: str) -> str:
    return (REPOSITORY_ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_every_file_that_a_page_names_exists(name):
    named = set(
        re.findall(r"(?:ovis25|scripts|benchmarks|docs|tests|src_theo)/[\w./]*\.(?:py|sh|json|md)\b", page(name))
    )
    missing = [path for path in named if not (REPOSITORY_ROOT / path).is_file()]
    assert not missing
    local = set(re.findall(r"`(\w+\.(?:sh|py))", page(name))) if name == "src_theo/README.md" else set()
    assert all((REPOSITORY_ROOT / "src_theo" / path).is_file() for path in local)


def test_every_setting_in_the_readme_is_one():
    table = page("README.md").split("| key |")[1].split("\n\n")[0]
    keys = [key for row in table.splitlines()[2:] for key in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert len(keys) > 20 and all(key in OWN_KEYS or key in TRAINER_KEYS for key in keys)


def test_the_readmes_sample_is_json():
    sample = json.loads(page("README.md").split("```json\n")[1].split("```")[0])
    assert [turn["from"] for turn in sample["conversations"]] == ["human", "gpt"]


def test_the_readmes_exam_is_of_the_shipped_settings():
    config = json.loads(page("src_theo/train_config_tiny.json"))
    steps = int(config["data_path"].split(":")[2]) // config["per_device_train_batch_size"]
    assert f"all {steps} steps are done" in page("README.md")


@pytest.fixture(scope="module")
def zero_guide():
    """scripts/zero_guide.py as a module."""
    spec = importlib.util.spec_from_file_location("zero_guide", REPOSITORY_ROOT / "scripts" / "zero_guide.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_guide_to_zero_stages_holds_the_planners_figures(zero_guide):
    block = zero_guide.guide()
    for name in zero_guide.PAGES:
        assert zero_guide.with_guide(page(name), block) == page(name), "run python scripts/zero_guide.py"
    files = set(re.findall(r"`(zero\w+\.json)`", block))
    assert files == {path.name for path in (REPOSITORY_ROOT / "scripts" / "zero_configs").iterdir()}


def test_the_guide_says_which_stages_the_configs_hold(zero_guide):
    for name, stage in (("train_config.json", "ZeRO-2 for the 9B"), ("train_config_2b.json", "ZeRO-1")):
        config = json.loads(page(f"src_theo/{name}"))
        assert f"zero{stage[5]}_cp.json" in config["deepspeed"] and f"`{name}`" in zero_guide.guide()


@pytest.mark.parametrize("name", ["loader.py", "optimizers.py", "preprocess.py", "train_step.py"])
def test_a_benchmark_explains_itself(name):
    command = [sys.executable, str(REPOSITORY_ROOT / "benchmarks" / name), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "usage" in result.stdout, result.stderr


@pytest.mark.parametrize("command", ["train", "plan", "merge", "infer", "chat"])
def test_the_help_of_a_command_names_defaults_and_an_example(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "example" in text and "(default: " in text


def test_the_help_of_training_names_every_keys_default(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    lines = dict(re.findall(r"^  (\w+) +(.*)$", capsys.readouterr().out, re.MULTILINE))
    assert set(OWN_KEYS) <= set(lines)
    without = {name for name in OWN_KEYS if "default" not in lines[name]}
    # those that have none: they must be given, or there is nothing without them
    assert without == {"model_path", "data_path", "eval_data_path", "attn_implementation", "lora_modules_to_save"}
    shown = {name: lines[name].rpartition("(default: ")[2].rstrip(")") for name in ("logging_steps", "learning_rate")}
    assert shown == {"logging_steps": "10", "learning_rate": "5e-05"}
    assert all(f"(default: {OWN_KEYS[name].default})" in lines[name] for name in ("lora_r", "max_frames", "recipe"))
