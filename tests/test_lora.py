"""LoRA: which layers, the adapter's folder, resuming, and merging."""

import json
import random

import pytest
import torch
from conftest import losses_of, run
from safetensors.torch import load_file, save_file

from ovis25 import Ovis2_5, Ovis25Inference, merge
from ovis25.cli import main
from ovis25.merge import merge_adapter
from ovis25.model.adapter import AdapterSettings, add_adapter, target_layers
from ovis25.tiny.strips import READING_PROMPT, make_strip
from ovis25.training.config import ConfigError, load_config

GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.fixture
def tiny_model(tiny_folder) -> Ovis2_5:
    return Ovis2_5.from_pretrained(tiny_folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("targets", "with_vision", "number"),
    [
        (("llm",), False, 3 * 7),
        (("vision",), False, 3 * 6),
        (("llm",), True, 3 * 13),
        (("all-linear",), False, 3 * 13 + 1),
        (("q_proj", "v_proj"), False, 3 * 2),
        (("q_proj", "v_proj"), True, 3 * 4),
        (("layers.1.self_attn.q_proj",), False, 2),
        (("visual_tokenizer.head.0",), False, 1),
    ],
)
def test_targets_choose_layers(tiny_model, targets, with_vision, number):
    layers = target_layers(tiny_model, targets, with_vision)
    assert len(layers) == number and "llm.lm_head" not in layers


def test_a_target_that_is_none_suggests_the_nearest(tiny_model):
    with pytest.raises(ValueError, match="no linear layer is called 'q_pro'; did you mean q_proj"):
        target_layers(tiny_model, ("q_pro",))
    with pytest.raises(ValueError, match="lora_modules_to_save: the model has no module 'vtee'; near: vte"):
        add_adapter(tiny_model, AdapterSettings("base", modules_to_save=("vtee",)))


def test_a_fresh_adapter_changes_nothing_and_freezes_the_rest(tiny_model):
    ids = torch.tensor([[5, 6, 7, 8]])
    before = tiny_model(input_ids=ids).logits
    adapted = add_adapter(tiny_model, AdapterSettings("base", target_modules=("all-linear",)))
    assert torch.equal(adapted(input_ids=ids).logits, before)
    trained = [name for name, value in adapted.named_parameters() if value.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def adapter_config(write_config, data_dir, **values):
    return write_config(use_lora=True, eval_data_path=str(data_dir / "eval.json"), eval_steps=2, max_steps=4,
                        learning_rate=1e-2, **values)  # fmt: skip


def test_the_folder_is_peft_and_names_its_base(write_config, data_dir, tiny_folder, tmp_path, capsys):
    results = run(adapter_config(write_config, data_dir, lora_r=4, lora_target_modules="q_proj,v_proj"))
    out = tmp_path / "out"
    assert results["best_eval_loss"] is not None
    saved = json.loads((out / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tiny_folder) and saved["r"] == 4
    weights = load_file(out / "adapter_model.safetensors")
    assert len(weights) == 3 * 2 * 2 and any(value.abs().sum() > 0 for n, value in weights.items() if "lora_B" in n)
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "chat_template.json"):
        assert (out / name).is_file()
    assert not (out / "model.safetensors").exists()
    printed = capsys.readouterr().out
    assert "optimizer: lora, learning rate 0.01" in printed and "visual_tokenizer.vit   frozen" in printed
    assert "The adapter lies in" in printed


def test_an_interrupted_run_goes_on(write_config, data_dir, tmp_path):
    config = adapter_config(write_config, data_dir, save_total_limit=5)
    run(config)
    losses = losses_of(tmp_path / "out")
    before = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name in ("checkpoint-4/COMPLETE", "train_results.json", "adapter_model.safetensors"):
        (tmp_path / "out" / name).unlink()
    run(config)
    assert losses_of(tmp_path / "out") == losses
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "values",
    [
        {"apply_lora_to_vision": True, "gradient_checkpointing": True},
        {"use_dora": True, "use_rslora": True, "lora_modules_to_save": ["vte", "visual_tokenizer.head"]},
        {"recipe": "trl", "lora_target_modules": "all-linear", "gradient_checkpointing": True, "lora_dropout": 0.1},
    ],
)
def test_an_adapter_answers_as_its_merged_model(write_config, data_dir, tiny_folder, tmp_path, values, capsys):
    run(adapter_config(write_config, data_dir, **values))
    report = merge_adapter(tmp_path / "out", tmp_path / "merged")
    assert report.relative_error < 1e-4 and report.same_first_token
    strip = make_strip(random.Random(1), "train", 3)
    answers = [
        Ovis25Inference(folder).single_image_inference(strip.image, READING_PROMPT, **GREEDY)
        for folder in (tmp_path / "out", tmp_path / "merged")
    ]
    assert answers[0] == answers[1]
    model, info = Ovis2_5.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    base, merged = (load_file(folder / "model.safetensors") for folder in (tiny_folder, tmp_path / "merged"))
    assert {n: (v.shape, v.dtype) for n, v in base.items()} == {n: (v.shape, v.dtype) for n, v in merged.items()}
    assert any(not torch.equal(base[name], merged[name]) for name in base)
    untouched = {"tokenizer_config.json", "vocab.json", "generation_config.json"}
    assert all((tiny_folder / n).read_bytes() == (tmp_path / "merged" / n).read_bytes() for n in untouched)


@pytest.fixture
def adapter(write_config, data_dir, tmp_path):
    run(adapter_config(write_config, data_dir))
    return tmp_path / "out"


def test_the_merge_command(adapter, tiny_folder, tmp_path, capsys):
    arguments = ["merge", "--adapter_path", str(adapter), "--output_path", str(tmp_path / "half")]
    assert main([*arguments, "--dtype", "bfloat16", "--base", str(tiny_folder)]) == 0
    printed = capsys.readouterr().out
    assert "merged into" in printed and "relative error" in printed and "bfloat16" in printed
    assert {value.dtype for value in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert main(arguments) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_merging_refuses_its_inputs_and_what_is_no_adapter(adapter, tiny_folder, tmp_path):
    for folder in (adapter, adapter / "inside", tiny_folder):
        with pytest.raises(ValueError, match="which is merged from"):
            merge_adapter(adapter, folder)
    with pytest.raises(FileNotFoundError, match="holds no adapter_config.json"):
        merge_adapter(tiny_folder, tmp_path / "merged")
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        merge_adapter(adapter, tmp_path / "merged", base="nowhere")


def test_a_merge_that_fails_leaves_nothing(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "save_file", lambda tensors, path, **kwargs: path.write_text("x") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge_adapter(adapter, tmp_path / "merged")
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]


def test_a_merge_into_weights_that_were_broken_on_the_way_is_refused(adapter, tmp_path, monkeypatch):
    def save_broken(tensors, path, **kwargs):
        save_file(tensors | {"vte.weight": tensors["vte.weight"] * 1.5}, path, **kwargs)

    monkeypatch.setattr(merge, "save_file", save_broken)
    with pytest.raises(ValueError, match="the merged logits differ from the adapter's by"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is that of a machine without GPU")
def test_four_bits_need_a_gpu(write_config):
    with pytest.raises(ConfigError, match="qlora needs a CUDA GPU, and this machine has none"):
        run(write_config(use_lora=True, qlora=True))


def test_reentrant_checkpointing_is_refused(write_config):
    with pytest.raises(ConfigError, match="use_reentrant would drop the gradients"):
        run(write_config(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}))


def test_wrong_adapter_settings_are_refused(write_config):
    with pytest.raises(ConfigError, match="lora_r is 0"):
        load_config(write_config(use_lora=True, lora_r=0))
    with pytest.raises(ConfigError, match="did you mean q_proj"):
        run(write_config(use_lora=True, lora_target_modules="q_prj"))
    notes = load_config(write_config(use_lora=True, train_modules="llm")).notes
    assert notes == ["train_modules has no effect with LoRA: see lora_target_modules"]
