"""The memory estimate against what is really allocated on a CPU."""

import copy
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from conftest import PIXELS
from transformers import AutoConfig

from ovis25 import Ovis2_5
from ovis25.cli import main
from ovis25.files import REPOSITORY_ROOT
from ovis25.model.adapter import AdapterSettings, add_adapter
from ovis25.model.recompute import chunk_size, device_memory
from ovis25.training import memory
from ovis25.training.config import load_config
from ovis25.training.memory import FLOAT32, MIXED, STRATEGIES, Choice, Pass, Workload, activations
from ovis25.training.memory.activations import TOWERS
from ovis25.training.memory.ways import smaller_data

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
@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in range(3)), 3])
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


WAYS = {
    "whole": (Choice(), Pass()),
    "whole, checkpointed": (Choice(), Pass(checkpointed=TOWERS)),
    "llm alone": (Choice(train_modules="llm"), Pass(checkpointed=("llm",))),
    "vision alone": (Choice(train_modules="visual_tokenizer"), Pass(device_memory=10**6)),
    "adapter": (Choice(lora_r=4), Pass(adapter=True)),
    "adapter, checkpointed": (Choice(lora_r=4), Pass(adapter=True, checkpointed=TOWERS, device_memory=2 * 10**6)),
    "adapters everywhere": (Choice(lora_target_modules=("all-linear",)), Pass(adapter=True, checkpointed=("vision",))),
    "small chunks": (Choice(), Pass(checkpointed=TOWERS, device_memory=10**5)),
    "metrics": (Choice(), Pass(loss=(("with_metrics", True), ("z_loss", 1e-4)))),
}


def allocated_peak(run) -> tuple[object, int]:
    """What `run` gives, and the most bytes that torch's allocator had handed out to it at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    steps = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    steps.sort(key=lambda event: event.start_ns())
    return result, max(accumulate(event.nbytes() for event in steps))


@pytest.mark.parametrize("name", WAYS)
def test_the_peak_is_what_a_step_really_allocates(tiny_folder, name):
    """The count has seen one and two layers without data; here all three run, forward and backward with the loss.

    It is compared with the storages that live and, from outside, with what torch's allocator handed out.
    """
    choice, how = WAYS[name]
    workload = Workload(num_samples=2, num_tokens=200, num_patches=64)
    model = Ovis2_5.from_pretrained(tiny_folder, dtype=torch.float32)
    shapes = copy.deepcopy(model.config)
    if how.adapter:
        add_adapter(model, choice.adapter)
    else:
        choice.apply(model)
    model.train()
    if how.checkpointed:
        model.checkpointed_towers = how.checkpointed
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.llm.lm_head.planned_memory = model.visual_tokenizer.head.planned_memory = how.device_memory
    for value in model.parameters():
        value.grad = torch.zeros_like(value) if value.requires_grad else None
    embeds = torch.randn(2, 200, shapes.hidden_size)
    embeds.requires_grad_(not how.adapter and choice.train_modules != "llm")
    if how.adapter:
        embeds.requires_grad_("all-linear" in choice.lora_target_modules)
    targets, pixels = torch.randint(0, 50, (workload.num_learned,)), torch.randn(2 * 64, 768)
    runs = {
        "llm": lambda: activations.count_llm(model, embeds, targets, False, dict(how.loss)),
        "vision": lambda: activations.count_vision(model, pixels, [(1, 8, 8)] * 2, False),
    }
    for tower, run in runs.items():
        run()  # tables that are made once
        seen, allocated = allocated_peak(run)
        assert seen.peak > 0
        assert memory.tower_bytes(tower, shapes, choice, workload, FLOAT32, how) == seen, tower
        # inside kernels lives a little more: attention's scratch, the sums of norms. (The profiler may miss what was
        # handed out while it started, so that it shows no lower bound; the equality above does.)
        assert 0 < allocated <= 1.1 * seen.peak + 2**18, tower


def test_a_frozen_vision_side_keeps_nothing():
    vision, _ = (
        memory.tower_bytes(tower, memory.released_config("2B"), Choice(), Workload(1, 4096, 12544), MIXED, Pass(True))
        for tower in TOWERS
    )
    assert vision.kept == 0
    assert 0 < vision.peak < 1e9


def test_checkpointing_keeps_less(tiny_folder):
    shapes = AutoConfig.from_pretrained(tiny_folder)
    for choice in (Choice(), Choice(train_modules="llm")):
        workload = Workload(num_samples=1, num_tokens=400, num_patches=256)
        whole, llm, both = (
            memory.activation_peak(shapes, choice, workload, FLOAT32, Pass(checkpointed=towers))
            for towers in ((), ("llm",), TOWERS)
        )
        assert both <= llm < whole


def test_more_devices_and_stages_never_take_more():
    config = memory.released_config("2B")
    few, many = (memory.estimate_all(config, Choice(), Workload(1, 8192, 12544), number) for number in (2, 8))
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


LORA = REPOSITORY_ROOT / "src_theo" / "lora" / "train_config_lora.json"
SMALL_LORA = LORA.with_name("train_config_lora_24gb.json")
FULL = REPOSITORY_ROOT / "src_theo" / "train_config.json"
MODELS = {size: f"--model_path=AIDC-AI/Ovis2.5-{size}" for size in ("2B", "9B")}


def plan(capsys, *arguments) -> str:
    assert main(["plan", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def plan_data(capsys, *arguments) -> dict:
    return json.loads(plan(capsys, *arguments, "--json"))


@pytest.mark.slow
def test_the_command_recommends_what_fits(capsys):
    roomy = plan(capsys, FULL, MODELS["2B"], "--device-memory", "140GB")
    assert 'recommended: "deepspeed": "scripts/zero_configs/zero0_cp.json", "gradient_checkpointing": false' in roomy
    less = plan(capsys, FULL, MODELS["2B"], "--device-memory", "80GB")
    assert 'recommended: "deepspeed": "scripts/zero_configs/zero0_cp.json", "gradient_checkpointing": true' in less
    assert "33% more compute: layers run forward twice" in less
    small = plan(capsys, FULL, MODELS["2B"], "--device-memory", "1GB")
    assert "nothing fits into 1.0 GB; the least is ZeRO-3 offload with checkpointing" in small
    lora = plan(capsys, LORA, "--device-memory", "24GB")
    assert 'recommended: "use_lora": true, "qlora": true' in lora
    assert "LoRA with checkpointing, 24.7 GB per device: does not fit" in lora
    assert '"multimodal_max_length": 4096, "text_max_length": 4096, "single_image_max_pixels": 1605632\n' in lora
    assert "ZeRO" not in lora


@pytest.mark.slow
def test_host_memory_that_few_have_is_no_first_choice(capsys):
    arguments = (FULL, MODELS["9B"], "--device-memory", "24GB")
    usual = plan_data(capsys, *arguments)["recommendation"]
    assert [way["strategy"] for way in usual["ways"]] == ["QLoRA", "LoRA"]
    assert usual["least_full"]["strategy"] == "ZeRO-3 offload"
    assert usual["least_full"]["host_bytes"] > 128e9
    text = plan(capsys, *arguments)
    assert "full fine-tuning needs at least" in text
    assert "QLoRA fits:" in text
    large = plan_data(capsys, *arguments, "--host-memory", "256GB")["recommendation"]
    assert large["ways"][0]["strategy"] == "ZeRO-3 offload"
    assert large["ways"][0]["transferred"] > 0
    # eight times the device's own: nobody's first choice, even of a machine that has it
    tiny_card = plan_data(capsys, FULL, MODELS["9B"], "--device-memory", "16GB", "--host-memory", "1TB")
    assert all(way["host_bytes"] <= 8 * 16e9 for way in tiny_card["recommendation"]["ways"])


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        (LORA, ("--device-memory=24GB",)),
        (FULL, (MODELS["2B"], "--device-memory=24GB", "--gradient_checkpointing_towers=llm")),
        (FULL, (MODELS["9B"], "--devices=4", "--device-memory=80GB", "--per_device_train_batch_size=4")),
        (FULL, (MODELS["9B"], "--device-memory=24GB", "--optim=muon", "--deepspeed=null")),
    ],
)
def test_recommended_settings_are_complete(config, arguments, tmp_path, capsys):
    """Written into the config, they make it the run that was promised."""
    found = plan_data(capsys, config, *arguments)
    ways = found["recommendation"]["ways"]
    assert len(ways) == 2
    machine = [text for text in arguments if text.startswith("--device")]
    own = dict(text[2:].split("=") for text in arguments if text not in machine)
    given = json.loads(config.read_text()) | own
    data = {"data_path": "tiny:train:4", "eval_data_path": "tiny:validation:4"}
    for way in ways:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**given, **data, **way["settings"]}))
        configured = plan_data(capsys, path, *machine)["configured"]
        assert configured["fits"]
        assert configured["strategy"] == way["strategy"]
        assert configured["device_bytes"] == pytest.approx(way["device_bytes"])


def test_lora_on_the_9b_fits_24_gb(capsys):
    """The shipped config, in bfloat16, with the plan's own reserve free; it differs in nothing but sizes."""
    for memory_text, number in (("24GB", 24 * 10**9), ("24GiB", 24 * 2**30)):
        found = plan_data(capsys, SMALL_LORA, "--device-memory", memory_text)
        assert found["machine"]["device_memory"] == number
        assert found["number_format"] == "bfloat16"
        assert found["configured"]["strategy"] == "LoRA"
        assert found["configured"]["fits"]
        assert 18.35e9 < found["configured"]["device_bytes"] <= 0.94 * number
        assert found["chunks"] == {"loss_rows": 256, "visual_tokens": 512}
    small, usual = (json.loads(path.read_text()) for path in (SMALL_LORA, LORA))
    differing = {name for name in usual if small[name] != usual[name]}
    assert small.keys() == usual.keys()
    assert differing == {"output_dir", "multimodal_max_length", "single_image_max_pixels"}


def test_a_large_batch_is_divided_before_samples_are_shrunk():
    config = dataclasses.replace(load_config(FULL, []), multimodal_max_length=2048)
    first, second, *_ = smaller_data(config, batch_size=4, accumulation=2)
    assert first == {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    assert second.items() >= first.items()
    assert second["multimodal_max_length"] == 1536


def test_the_command_takes_own_models_and_refuses_nonsense(tiny_folder, tmp_path, capsys):
    path = tmp_path / "config.json"
    settings = {"model_path": str(tiny_folder), "data_path": "tiny:train:4", "multimodal_max_length": 256}
    path.write_text(json.dumps(settings))
    arguments = [f"--{name}={value}" for name, value in PIXELS.items()]
    assert "MB per device" in plan(capsys, path, "--float32", *arguments)
    wrongs = (
        ("--devices=0", "--devices is 0"),
        ("--device-memory=1XB", "is no amount of memory"),
        ("--host-memory=none", "is no amount of memory"),
        ("--single_image_max_pixels=3", "single_image_max_pixels is 3; it must be at least 1,024"),
    )
    for wrong, message in wrongs:
        assert main(["plan", str(path), wrong]) == 2
        assert message in capsys.readouterr().err


def test_the_readmes_tables_are_the_commands(capsys):
    page = (REPOSITORY_ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n\$ ovis25 plan (.*?)\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    for command, printed in blocks:
        assert plan(capsys, *command.split()).strip() == printed.strip()


def workload(**settings) -> Workload:
    return memory.largest_workload(dataclasses.replace(load_config(FULL, []), **settings), 1)


def test_a_micro_batch_is_the_largest_that_the_config_allows():
    config = load_config(FULL, [])
    for kind, patches in (("image", 12544), ("images", 31360), ("video", 25088), ("text", 0)):
        assert memory.largest_workload(config, 1, (kind,)).num_patches == patches
    # an image of 1792 x 1792; ten of 896 x 896 with their indicators; eight frames of 896 x 896
    assert workload() == Workload(1, 8192, 31360, 7996)
    assert workload(min_frames=16, max_frames=16).num_patches == 32768
    assert workload(text_max_length=16384) == Workload(1, 16384, 31360, 16384)
    text_only = memory.largest_workload(config, 3, ("text",))
    assert (text_only.num_tokens, text_only.num_learned) == (4096, 3 * 4096)
    assert workload(cache_visual_embeddings=True).num_patches == 0


def test_a_packed_row_holds_many_images():
    config = dataclasses.replace(load_config(FULL, []), single_image_max_pixels=896 * 896)
    for is_packed, patches in ((False, 3136), (True, 31360)):
        config = dataclasses.replace(config, packing=is_packed)
        assert memory.largest_workload(config, 1, ("image",)).num_patches == patches
    # two clips of eight frames do not fit; of four frames, two do
    assert memory.largest_workload(config, 1, ("video",)).num_patches == 25088
    config = dataclasses.replace(config, min_frames=4, max_frames=4)
    assert memory.largest_workload(config, 1, ("video",)).num_patches == 2 * 12544


@pytest.mark.parametrize(
    ("gigabytes", "rows", "tokens"),
    [(141, 1024, 1024), (80, 1024, 1024), (48, 512, 1024), (24, 256, 512), (16, 128, 256)],
)
def test_chunks_follow_the_card(gigabytes, rows, tokens):
    assert chunk_size(1024, 151936, gigabytes * 10**9) == rows
    assert chunk_size(1024, 65532, gigabytes * 10**9) == tokens
    assert chunk_size(1024, 151936, gigabytes * 2**30) == rows
    assert chunk_size(1024, 151936, None) == 1024
    assert chunk_size(1024, 151936, 1) == 1


def test_a_cards_memory_is_asked_for_once_and_in_all(monkeypatch):
    asked = []

    def properties(device):
        asked.append(device)
        return SimpleNamespace(total_memory=24 * 10**9)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    device_memory.cache_clear()
    assert [device_memory(torch.device("cuda", 1)) for _ in range(3)] == [24 * 10**9] * 3
    assert device_memory(torch.device("cpu")) is None
    device_memory.cache_clear()
    assert len(asked) == 1
