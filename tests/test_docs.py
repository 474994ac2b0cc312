"""What the documentation names exists and runs."""

import json
import re
import subprocess
import sys

import pytest

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


@pytest.mark.parametrize("name", ["loader.py", "optimizers.py", "preprocess.py", "train_step.py"])
def test_a_benchmark_explains_itself(name):
    command = [sys.executable, str(REPOSITORY_ROOT / "benchmarks" / name), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "usage" in result.stdout, result.stderr
