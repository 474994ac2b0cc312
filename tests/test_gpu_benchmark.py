"""The GPU benchmark runs on a CPU with tiny shapes: every section, and checks that compared real numbers."""

import importlib
import json
import subprocess
import sys

import pytest
import torch

from ovis25.files import REPOSITORY_ROOT

SCRIPT = REPOSITORY_ROOT / "benchmarks" / "gpu.py"
SECTIONS = ["checks", "kernels", "train-2b", "lora-9b", "train-9b", "decode"]


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *arguments]
    # from nowhere near the package: it must find its own repository
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd="/")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("gpu") / "out.json"
    result = run_benchmark("--small", "--device", "cpu", "--json", str(path))
    assert result.returncode == 0, result.stderr[-3000:]
    assert all(f"\n{name}\n" in result.stdout for name in SECTIONS)
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_file_says_where_and_when(results):
    assert results["is_small"] and results["device"] == "CPU" and results["date"] and results["torch"]
    assert results["matmul_tflops"] > 0 and results["peak_tflops"] is None
    assert list(results["sections"]) == SECTIONS


def test_what_did_not_run_needs_cuda(results):
    statuses = {row["status"] for rows in results["sections"].values() for row in rows}
    assert statuses == {"ok", "skipped: needs CUDA"}


def test_the_checks_compared_numbers(results):
    compared = [row for row in results["sections"]["checks"] if row["status"] == "ok"]
    assert {"the model's", "next_token_loss", "get_visual_embeddings", "sequence_lengths"} <= {
        row["path"] for row in compared
    }
    for row in compared:
        errors = [value for name, value in row.items() if name.endswith("error")]
        # bfloat16 against float32: equal numbers would mean that nothing was compared
        assert errors and 0 < max(errors) <= row["bound"], row


def test_kernels_have_times(results):
    timed = [row for row in results["sections"]["kernels"] if row["status"] == "ok"]
    assert {row["case"].split()[0] for row in timed} == {"ViT", "LLM"}
    assert all(row["both_ms"] > row["forward_ms"] > 0 and row["both_tflops"] > 0 for row in timed)


@pytest.mark.parametrize("section", ["train-2b", "lora-9b", "train-9b"])
def test_steps_have_parts_and_shares(results, section):
    steps = [row for row in results["sections"][section] if row.get("loss")]
    assert len(steps) >= 4
    for row in steps:
        parts = row["forward_ms"] + row["backward_ms"] + row["optimizer_ms"]
        assert row["step_ms"] == pytest.approx(parts, rel=0.01) and 0 < row["of_matmul"] < 5
        assert 7 < row["loss"] < 10  # the logarithm of 4,096 words is 8.3
        # forward and backward of both towers, or nothing
        assert row["graphs"] >= 2 if row["layers"] == "compiled" else row["graphs"] == 0
    assert {row["layers"] for row in steps} == {"eager", "compiled"}


def test_a_step_is_taken_apart(results):
    kernels = [row for row in results["sections"]["train-2b"] if "kernel" in row]
    assert len(kernels) == 15 and 0.1 < sum(row["share"] for row in kernels) <= 1.0


def test_decoding_has_rates(results):
    rows = {row["case"]: row for row in results["sections"]["decode"]}
    assert rows["batch 8, dynamic cache"]["decode_tokens_per_s"] > 0
    assert rows["batch 1, static cache"]["prefill_tokens_per_s"] > 0
    assert rows["thinking budget"]["speedup"] > 0


def module(name: str):
    """A file of the benchmarks, which are run as scripts from their folder."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(SCRIPT.parent))


def test_a_row_that_cannot_be_measured_says_why():
    run = module("gpu_run").Run(torch.device("cpu"), is_small=True, minutes=1, json_path=None)

    def fails(error: Exception):
        raise error

    run.is_small = False
    statuses = [
        run.measure({"case": "none"}, dict, needs_s=600),
        run.measure({"case": "none"}, lambda: fails(torch.OutOfMemoryError("all of it")), needs_s=0),
        run.measure({"case": "none"}, lambda: fails(RuntimeError("no such kernel\nat all")), needs_s=0),
        run.measure({"case": "none"}, lambda: {"ms": 1.0}, needs_s=0),
    ]
    assert [row["status"] for row in statuses] == [
        "skipped: time",
        "out of memory",
        "failed: RuntimeError: no such kernel",
        "ok",
    ]


def test_useful_work_is_counted_as_documented():
    training = module("gpu_training")
    config = training.released_config("2B")
    items, row = training.packed_row(config, num_samples=8, side=56, num_text=238, device="cpu")
    assert row["input_ids"].shape == (1, 8192) and row["sequence_lengths"].tolist() == [1024] * 8
    # 65.1 TFLOP with the lm_head on all rows; here it is on the learned ones alone
    lm_head = 2 * 2048 * 151936 * (8192 - 8 * 238) / 1e12
    assert training.useful_tflop(config, items, is_lora=False) == pytest.approx(3 * (65.1 - lm_head), rel=0.01)
    assert training.useful_tflop(config, items, is_lora=True) < training.useful_tflop(config, items, is_lora=False) / 2


def test_a_wrong_path_is_an_error():
    code = (
        "import sys; sys.argv = ['gpu.py', '--small', '--device', 'cpu', '--only', 'checks'];"
        "import gpu, gpu_checks, torch;"
        "gpu_checks.next_token_loss = lambda hidden, labels, head: (head(hidden).float().logsumexp(-1).mean(), None);"
        "gpu.main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPT.parent, timeout=300
    )
    assert result.returncode == 1 and "loss, next_token_loss: out of bounds" in result.stderr


def test_an_unknown_section_is_named():
    result = run_benchmark("--only", "kernel")
    assert result.returncode == 2 and "unknown section kernel; choose from checks, kernels" in result.stderr
