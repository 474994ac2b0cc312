"""Adapters and their bases: which base, folders of PEFT itself, and weights merged one by one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from ovis25 import Ovis2_5, Ovis25Inference, merge
from ovis25.checkpoint import CheckpointError
from ovis25.cli import main
from ovis25.merge import merge_adapter
from ovis25.model.adapter import (
    BASE_NOTE_NAME,
    AdapterOnShapes,
    AdapterSettings,
    add_adapter,
    load_adapter,
    write_base_note,
)
from ovis25.weights import stored_weights, weights_digest

INDEX = "model.safetensors.index.json"
VISION = {"target_modules": ("all-linear",)}
KINDS = {
    "plain": {},
    "vision": VISION,
    "rslora": {"use_rslora": True, **VISION},
    "dora": {"use_dora": True, **VISION},
    "saved modules": {"modules_to_save": ("vte", "visual_tokenizer.head")},
}


@pytest.fixture
def base(tiny_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "base"))


def train_a_little(adapted) -> None:
    """Weights that an adapter might have learned, without a run."""
    generator = torch.Generator().manual_seed(0)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)


def save_adapter(base: Path, folder: Path, note: bool = True, dtype: torch.dtype | None = None, **settings) -> Path:
    adapted = add_adapter(Ovis2_5.from_pretrained(base, dtype=dtype or "auto"), AdapterSettings(str(base), **settings))
    train_a_little(adapted)
    adapted.save_pretrained(folder)
    if note:
        write_base_note(adapted, folder)
    return folder


def saved_by_peft(base: Path, folder: Path, **settings) -> Path:
    model = Ovis2_5.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **settings))
    train_a_little(adapted)
    adapted.save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def answer(*args, **kwargs) -> str:
    return Ovis25Inference(*args, **kwargs).text_only_inference("What is 1 + 1?", do_sample=False, max_new_tokens=8)


# -- the merged weights


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = Ovis2_5.from_pretrained(base, dtype=torch.float32)
    return load_adapter(model, adapter).merge_and_unload().state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_each_weight_is_what_peft_makes_of_it_rounded_once(base, tmp_path, kind):
    half = tmp_path / "half"
    Ovis2_5.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half, max_shard_size="500KB")
    adapter = save_adapter(half, tmp_path / "adapter", dtype=torch.float32, **KINDS[kind])
    report = merge_adapter(adapter, tmp_path / "merged")
    expected, got = merged_by_peft(half, adapter), weights(tmp_path / "merged")
    assert set(got) == set(weights(half))
    for name, value in got.items():
        assert torch.equal(value, expected[name].bfloat16()), name
    assert report.dtype == torch.bfloat16 and report.compared_in == torch.float32
    assert report.relative_error < 2e-2


def test_the_merged_folder_has_the_bases_files(base, tmp_path):
    sharded = tmp_path / "sharded"
    Ovis2_5.from_pretrained(base).save_pretrained(sharded, max_shard_size="1MB")
    adapter = save_adapter(sharded, tmp_path / "adapter")
    merge_adapter(adapter, tmp_path / "merged")
    assert {file.name for file in (tmp_path / "merged").iterdir()} == {file.name for file in sharded.iterdir()}
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (sharded, tmp_path / "merged"))
    assert before["weight_map"] == after["weight_map"]
    assert before["metadata"]["total_size"] == after["metadata"]["total_size"]
    for name, tensor in stored_weights(sharded).items():
        merged = stored_weights(tmp_path / "merged")[name]
        place = (merged.file.name, merged.dtype, merged.shape, merged.begin, merged.end)
        assert place == (tensor.file.name, tensor.dtype, tensor.shape, tensor.begin, tensor.end), name
    _, info = Ovis2_5.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())


def test_a_base_that_repeats_its_tied_embedding_is_merged_without_the_copy(base, tmp_path):
    tensors = weights(base)
    tensors["llm.lm_head.weight"] = tensors["llm.model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    report = merge_adapter(save_adapter(base, tmp_path / "adapter"), tmp_path / "merged")
    assert "llm.lm_head.weight" not in weights(tmp_path / "merged") and report.relative_error < 1e-4


def test_with_little_memory_the_check_runs_in_the_weights_own_dtype(base, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "available_memory", lambda: 10**6)
    report = merge_adapter(save_adapter(base, tmp_path / "adapter"), tmp_path / "merged", dtype=torch.bfloat16)
    assert report.compared_in == torch.bfloat16 and "computed in bfloat16" in report.render()
    monkeypatch.setattr(merge, "available_memory", lambda: 10**12)
    report = merge_adapter(tmp_path / "adapter", tmp_path / "again", dtype=torch.bfloat16)
    assert report.compared_in == torch.float32 and "computed in float32" in report.render()


def test_a_base_in_memory_is_not_needed(base, tmp_path):
    """Stand-ins take no memory: the adapter over shapes alone holds its own weights only."""
    adapter = save_adapter(base, tmp_path / "adapter", **VISION)
    config = Ovis2_5.from_pretrained(base).config
    stored = weights(base)
    on_shapes = AdapterOnShapes(config, adapter)
    expected = merged_by_peft(base, adapter)
    assert len(on_shapes.names) == 3 * 13 + 1
    with torch.no_grad():
        for name in on_shapes.names:
            assert torch.equal(on_shapes.merged(name, stored.__getitem__), expected[name])


@pytest.mark.parametrize("place", ["link", "inside a link", "dots"])
def test_the_merged_folder_never_lies_over_its_inputs(base, tmp_path, place):
    adapter = save_adapter(base, tmp_path / "adapter")
    (tmp_path / "link").symlink_to(base)
    before = {file.name: file.stat().st_mtime_ns for file in base.iterdir()}
    output = {"link": tmp_path / "link", "inside a link": tmp_path / "link" / "out", "dots": adapter / ".." / "base"}
    with pytest.raises(ValueError, match="which is merged from"):
        merge_adapter(adapter, output[place])
    assert {file.name: file.stat().st_mtime_ns for file in base.iterdir()} == before


# -- which base


def test_a_base_that_has_moved_is_named_with_the_way_out(base, tmp_path, capsys):
    adapter = save_adapter(base, tmp_path / "adapter")
    expected = answer(adapter)
    moved = base.rename(tmp_path / "moved")
    for command in (["infer", str(adapter), "--prompt", "Hi"], ["chat", str(adapter)]):
        assert main(command) == 2
        printed = capsys.readouterr().err
        assert f"{base} is the base that is named by the adapter {adapter}" in printed and "--base PATH" in printed
    merging = ["merge", "--adapter_path", str(adapter), "--output_path", str(tmp_path / "merged")]
    assert main(merging) == 2
    assert "is the base that is named by the adapter" in capsys.readouterr().err
    assert answer(adapter, base=moved) == expected
    assert main([*merging, "--base", str(moved)]) == 0
    asking = ["infer", str(adapter), "--prompt", "Hi", "--max_new_tokens", "2", "--base"]
    assert main([*asking, str(moved)]) == 0
    capsys.readouterr()
    assert main([*asking, str(tmp_path / "nowhere")]) == 2
    assert "the base that was given for the adapter" in capsys.readouterr().err


def test_another_model_of_equal_shapes_is_refused(base, tmp_path, capsys):
    adapter = save_adapter(base, tmp_path / "adapter")
    other = tmp_path / "other"
    model = Ovis2_5.from_pretrained(base)
    model.llm.model.layers[1].mlp.up_proj.weight.data *= 1.01
    model.save_pretrained(other)
    merging = ["merge", "--adapter_path", str(adapter), "--output_path", str(tmp_path / "merged"), "--base", str(other)]
    assert main(merging) == 2
    printed = capsys.readouterr().err
    assert str(other) in printed and str(base) in printed and "--anyway" in printed and printed.count("\n") == 1
    assert weights_digest(base)[:12] in printed and weights_digest(other)[:12] in printed
    assert not (tmp_path / "merged").exists()
    with pytest.raises(CheckpointError, match="is not the base of the adapter"):
        Ovis25Inference(adapter, base=other)
    assert main(["infer", str(adapter), "--prompt", "Hi", "--base", str(other)]) == 2
    Ovis25Inference(adapter, base=other, check_base=False)
    assert main([*merging, "--anyway"]) == 0


def test_a_base_that_was_trained_over_is_noticed(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter")
    tensors = weights(base)
    tensors["vte.weight"][100:300] += 0.1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is not the base of the adapter"):
        Ovis25Inference(adapter)


def test_the_digest_is_of_the_model_not_of_its_files(base, tmp_path):
    digest = weights_digest(base)
    Ovis2_5.from_pretrained(base).save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
    assert weights_digest(tmp_path / "sharded") == digest
    Ovis2_5.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert weights_digest(tmp_path / "half") != digest


def test_an_adapter_without_a_note_is_told_of(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", note=False)
    with pytest.warns(UserWarning, match=f"holds no {BASE_NOTE_NAME}.*cannot be checked"):
        Ovis25Inference(adapter)


def test_a_base_for_a_whole_model_is_refused(base):
    with pytest.raises(CheckpointError, match="is a whole model and no adapter; leave base out"):
        Ovis25Inference(base, base=base)


# -- folders that PEFT has saved, and damaged ones


@pytest.mark.filterwarnings("ignore:.*holds no ovis25_base.json")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["fc1", "gate_proj"], "modules_to_save": ["vte"]},
    ],
    ids=str,
)
def test_a_folder_saved_by_peft_answers_and_merges(base, tmp_path, settings):
    adapter = saved_by_peft(base, tmp_path / "adapter", **settings)
    assert not (adapter / "tokenizer_config.json").exists()
    report = merge_adapter(adapter, tmp_path / "merged")
    assert report.relative_error < 1e-4
    assert answer(adapter) == answer(tmp_path / "merged")
    assert (tmp_path / "merged" / "vocab.json").read_bytes() == (base / "vocab.json").read_bytes()


def change(folder: Path, change_tensors) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change_tensors(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **values) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


DAMAGES = {
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "cut weights": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:5000]),
        "adapter_model.safetensors is cut",
    ),
    "pickled": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        r"pickled file alone \(adapter_model.bin\)",
    ),
    "cut config": (
        lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LO'),
        "adapter_config.json is no valid JSON",
    ),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    "another kind": (lambda f: edit_config(f, peft_type="IA3"), "peft_type is 'IA3'"),
    "no base": (lambda f: edit_config(f, base_model_name_or_path=None), "names no base_model_name_or_path"),
    "a weight less": (lambda f: change(f, lambda t: t.pop(sorted(t)[0])), "1 weights are missing"),
    "a weight more": (
        lambda f: change(f, lambda t: t.update({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)})),
        r"1 belong to no layer \(base_model.model.x",
    ),
    "another rank": (lambda f: edit_config(f, r=3), "does not fit its base"),
    "an empty file": (lambda f: change(f, lambda t: t.clear()), "adapter_model.safetensors holds no weights"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_adapter_is_named_in_one_line(base, tmp_path, name):
    adapter = save_adapter(base, tmp_path / "adapter")
    damage, message = DAMAGES[name]
    damage(adapter)
    for use in (Ovis25Inference, lambda folder: merge_adapter(folder, tmp_path / "merged")):
        with pytest.raises(FileNotFoundError, match=message) as caught:
            use(adapter)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_a_run_writes_the_note_into_every_adapter(write_config, tiny_folder, tmp_path):
    run(write_config(use_lora=True, max_steps=2, save_steps=1))
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1", tmp_path / "out" / "checkpoint-2"):
        note = json.loads((folder / BASE_NOTE_NAME).read_text())
        assert note["weights_sha256"] == weights_digest(tiny_folder) and note["folder"] == str(tiny_folder)
    assert answer(tmp_path / "out" / "checkpoint-1") is not None
