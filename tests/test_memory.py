"""The memory estimate against what is really allocated on a CPU."""

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import PIXELS
from transformers import AutoConfig

from ovis25 import Ovis2_5
from ovis25.cli import main
from ovis25.files import REPOSITORY_ROOT
from ovis25.model.adapter import AdapterSettings, add_adapter
from ovis25.training import memory
from ovis25.training.memory import FLOAT32, MIXED, STRATEGIES, Choice, Workload

ZERO = {strategy.name: strategy for strategy in STRATEGIES}

# Prints, as multiples of the parameters' number, the bytes that tensors hold: after DeepSpeed took the model, after a
# backward pass, and after the step. DeepSpeed's own buckets are made too small to count.
ALLOCATIONS = """
import gc, os, sys, torch, deepspeed
from ovis25 import Ovis2_5

def held():
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    inner = [getattr(t, name, None) for t in tensors for name in ("ds_tensor", "grad")]
    tensors += [t for t in inner if t is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

stage, folder = int(sys.argv[1]), sys.argv[2]
deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
before = held()
model = Ovis2_5.from_pretrained(folder, dtype=torch.float32).train()
parameters = [p for p in model.parameters() if p.requires_grad]
size = sum(p.numel() for p in parameters)
zero = {"stage": stage, "overlap_comm": False, "contiguous_gradients": stage > 1, "reduce_bucket_size": 1000,
        "allgather_bucket_size": 1000, "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
engine = deepspeed.initialize(model=model, model_parameters=parameters, optimizer=torch.optim.AdamW(parameters),
                              config=settings)[0]
seen = [held() - before]
ids = torch.tensor([[5, 6, 7, 8]])
engine.backward(engine(input_ids=ids, labels=ids).loss)
seen.append(held() - before)
engine.step()
seen.append(held() - before)
if os.environ["RANK"] == "0":
    print("held", *(value / size for value in seen), flush=True)
"""


def test_the_released_shapes_have_the_released_sizes():
    assert memory.count(memory.released_config("2B"), Choice()).total == 2_570_429_672
    assert memory.count(memory.released_config("9B"), Choice()).total == 9_174_807_784


def test_the_9b_takes_what_the_zero_paper_says():
    counts = memory.count(memory.released_config("9B"), Choice())
    for stage, expected in enumerate((16, 4 + 12 / 8, 2 + 14 / 8, 16 / 8)):
        total = sum(memory.static_bytes(counts, ZERO[f"ZeRO-{stage}"], 8, MIXED))
        assert total / counts.total == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", range(4))
def test_the_static_part_is_what_deepspeed_allocates(stage, tiny_folder, tmp_path):
    script = tmp_path / "allocations.py"
    script.write_text(ALLOCATIONS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        [*command, str(stage), str(tiny_folder)], env=environment, capture_output=True, text=True, timeout=200
    )
    line = re.search(r"^held (.*)$", result.stdout, re.MULTILINE)
    assert line, result.stderr[-2000:]
    at_begin, after_backward, after_step = map(float, line[1].split())
    counts = memory.count(AutoConfig.from_pretrained(tiny_folder), Choice())
    parts = memory.static_bytes(counts, ZERO[f"ZeRO-{stage}"], 2, FLOAT32)
    weights, gradients, optimizer, _ = (part / counts.trained for part in parts)
    # stage 3 keeps its share of the gradients in a buffer of its own; the others free them after a step
    kept = gradients if stage == 3 else 0
    # buckets and alignment are not estimated: 2.4 % of this small model
    assert after_step == pytest.approx(weights + optimizer + kept, rel=0.03)
    if stage in (0, 2):
        # stage 2 keeps a few per cent more, for alignment; stage 1 has whole gradients only while it runs backward
        assert after_backward - at_begin == pytest.approx(gradients, rel=0.05)


def test_an_adapter_has_the_counted_parameters(tiny_folder):
    for targets, with_vision in ((("llm",), False), (("q_proj", "v_proj"), True), (("all-linear",), False)):
        model = Ovis2_5.from_pretrained(tiny_folder, dtype=torch.float32)
        counts = memory.count(model.config, Choice(lora_r=4, lora_target_modules=targets,
                                                   apply_lora_to_vision=with_vision))  # fmt: skip
        settings = AdapterSettings("base", r=4, target_modules=targets, apply_to_vision=with_vision)
        adapted = add_adapter(model, settings)
        assert counts.adapter == sum(value.numel() for value in adapted.parameters() if value.requires_grad)


@pytest.mark.parametrize("choice", [Choice(), Choice(train_modules="llm"), Choice(train_modules="visual_tokenizer")])
def test_activations_are_what_autograd_keeps(tiny_folder, choice):
    """The estimate has seen one and two layers without data; here all three run."""
    model = Ovis2_5.from_pretrained(tiny_folder, dtype=torch.float32).train()
    choice.apply(model, lora=False)
    workload = Workload(num_samples=2, num_tokens=96, num_patches=64)
    pixels, embeds = torch.randn(2 * 64, 768), torch.randn(2, 96, model.config.hidden_size, requires_grad=True)
    own = list(model.parameters())
    kept = memory.kept_bytes(own, lambda: model.visual_tokenizer(pixels, [(1, 8, 8)] * 2, model.vte(None)))
    kept += memory.kept_bytes(own, lambda: model.llm.model(inputs_embeds=embeds, use_cache=False).last_hidden_state)
    estimate, _ = memory.activation_bytes(copy.deepcopy(model.config), choice, workload, FLOAT32)
    assert estimate == kept


def test_checkpointing_keeps_what_the_estimate_says(tiny_folder):
    """Layer inputs and what lies outside the layers are kept; the estimate adds one layer, whole."""
    model = Ovis2_5.from_pretrained(tiny_folder, dtype=torch.float32).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    workload = Workload(num_samples=1, num_tokens=200, num_patches=64)
    pixels, embeds = torch.randn(64, 768), torch.randn(1, 200, model.config.hidden_size, requires_grad=True)
    own = list(model.parameters())
    kept = memory.kept_bytes(own, lambda: model.visual_tokenizer(pixels, [(1, 8, 8)], model.vte(None)))
    kept += memory.kept_bytes(own, lambda: model.llm.model(inputs_embeds=embeds, use_cache=False).last_hidden_state)
    full, checkpointed = memory.activation_bytes(copy.deepcopy(model.config), Choice(), workload, FLOAT32)
    assert kept < checkpointed < full


def test_more_devices_and_stages_never_take_more():
    config = memory.released_config("2B")
    few, many = (memory.estimate_all(config, Choice(), Workload(1, 2048, 1024), number) for number in (2, 8))
    assert all(more.static <= less.static for less, more in zip(few, many, strict=True))
    totals = [estimate.total(True) for estimate in many[:4]]
    assert totals == sorted(totals, reverse=True)
    assert all(estimate.total(True) < estimate.total(False) for estimate in many)


@pytest.mark.parametrize(
    ("text", "number"), [("80GB", 80 * 10**9), ("79.5 GiB", int(79.5 * 2**30)), ("512mb", 512 * 10**6), ("7", 7)]
)
def test_amounts_of_memory(text, number):
    assert memory.parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "80XB", "-1GB", "0GB", "1.2.3GB", "lots"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(ValueError, match="is no amount of memory; write it like 80GB"):
        memory.parse_bytes(text)


def plan(capsys, *arguments) -> str:
    assert main(["plan", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_the_command_recommends_what_fits(capsys):
    config = REPOSITORY_ROOT / "src_theo" / "train_config_2b.json"
    assert '"scripts/zero_configs/zero0_cp.json", "gradient_checkpointing": false' in plan(capsys, config)
    less = plan(capsys, config, "--device-memory", "64GB")
    assert '"scripts/zero_configs/zero0_cp.json", "gradient_checkpointing": true' in less
    assert "zero3_cp.json" in plan(capsys, config.with_name("train_config.json"), "--devices", 8)
    small = plan(capsys, config, "--device-memory", "1GB")
    assert "nothing fits into 1.0 GB; the least is ZeRO-3 offload with checkpointing" in small
    lora = REPOSITORY_ROOT / "src_theo" / "lora" / "train_config_lora.json"
    assert 'recommended: "use_lora": true, "qlora": true' in plan(capsys, lora, "--device-memory", "24GB")


def test_the_command_takes_own_models_and_refuses_nonsense(tiny_folder, tmp_path, capsys):
    path = tmp_path / "config.json"
    settings = {"model_path": str(tiny_folder), "data_path": "tiny:train:4", "multimodal_max_length": 256}
    path.write_text(json.dumps(settings))
    arguments = [f"--{name}={value}" for name, value in PIXELS.items()]
    assert "MB per device" in plan(capsys, path, "--float32", *arguments)
    for wrong, message in (("--devices=0", "--devices is 0"), ("--device-memory=1XB", "is no amount of memory")):
        assert main(["plan", str(path), wrong]) == 2
        assert message in capsys.readouterr().err


def test_the_readmes_tables_are_the_commands(capsys):
    page = (REPOSITORY_ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n\$ ovis25 plan (.*?)\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for command, printed in blocks:
        assert plan(capsys, *command.split()).strip() == printed.strip()


def test_a_packed_row_holds_many_images(capsys):
    config = REPOSITORY_ROOT / "src_theo" / "train_config.json"
    arguments = ["--single_image_max_pixels", 896 * 896, "--per_device_train_batch_size", 1]
    assert "1 x (8,192 tokens, 3,136 patches, 7,408 learned)" in plan(capsys, config, *arguments)
    packed = plan(capsys, config, *arguments, "--packing", "true")
    assert "1 x (8,192 tokens, 31,360 patches, 352 learned)" in packed
