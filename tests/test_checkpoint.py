"""Checkpoint folders: the released layout loads, comes back as it was, and other layouts are refused."""

import json
import logging
import shutil

import pytest
import torch
from conftest import GOLDEN
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from ovis25 import Ovis2_5, Ovis2_5_Config, Ovis2_5Processor
from ovis25.checkpoint import resolve_checkpoint, side_files

TINY = GOLDEN / "tiny_checkpoint"
LM_HEAD, EMBEDDING = "llm.lm_head.weight", "llm.model.embed_tokens.weight"
MAX_GOLDEN_BYTES = 3_000_000


def read_config(folder) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def change_config(folder, **changes) -> None:
    """Set keys; `llm_config__rope_theta` is a key of a section."""
    config = read_config(folder)
    for name, value in changes.items():
        *section, key = name.split("__")
        (config[section[0]] if section else config)[key] = value
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_loads_cleanly(folder, **kwargs) -> Ovis2_5:
    model, info = Ovis2_5.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


def same_logits(first, second, golden) -> bool:
    inputs = golden.inputs("multi_image")
    return first(**inputs).logits.equal(second(**inputs).logits)


@pytest.fixture
def tied_folder(released_folder):
    """Like the 2B: the embedding is the output layer too, and the file does not repeat it."""
    change_config(released_folder, llm_config__tie_word_embeddings=True)
    tensors = load_file(TINY / "model.safetensors")
    del tensors[LM_HEAD]
    save_file(tensors, released_folder / "model.safetensors", metadata={"format": "pt"})
    return released_folder


def test_the_golden_copy_is_small():
    assert sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file()) < MAX_GOLDEN_BYTES


def test_the_released_layout_loads_with_no_missing_and_no_unexpected_key(released_folder):
    model = assert_loads_cleanly(released_folder)
    assert set(model.state_dict()) == set(load_file(TINY / "model.safetensors"))
    assert not model.training


def test_saving_writes_the_same_weights_config_and_side_files(released_folder, tmp_path):
    saved = tmp_path / "saved"
    Ovis2_5.from_pretrained(released_folder).save_pretrained(saved)
    before, after = weights(released_folder), weights(saved)
    assert set(before) == set(after)
    assert all(before[name].equal(after[name]) and before[name].dtype == after[name].dtype for name in before)
    expected = read_config(released_folder)
    expected.pop("_name_or_path")  # a machine's path in the golden file, in no released one
    assert read_config(saved) == expected
    names = {file.name for file in released_folder.iterdir()}
    assert {file.name for file in saved.iterdir()} == names
    for name in names - {"config.json", "model.safetensors"}:
        assert (saved / name).read_bytes() == (released_folder / name).read_bytes(), name
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_saved_model_gives_bit_equal_logits(released_folder, tmp_path, golden):
    model = Ovis2_5.from_pretrained(released_folder)
    model.save_pretrained(tmp_path / "saved")
    assert same_logits(model, assert_loads_cleanly(tmp_path / "saved"), golden)
    Ovis2_5Processor.from_pretrained(tmp_path / "saved")


def test_bf16_stays_bf16(released_folder, tmp_path, golden):
    change_config(released_folder, torch_dtype="bfloat16")
    tensors = {name: value.bfloat16() for name, value in load_file(TINY / "model.safetensors").items()}
    save_file(tensors, released_folder / "model.safetensors", metadata={"format": "pt"})
    model = assert_loads_cleanly(released_folder)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved")
    assert {value.dtype for value in weights(tmp_path / "saved").values()} == {torch.bfloat16}
    assert read_config(tmp_path / "saved")["torch_dtype"] == "bfloat16"
    assert same_logits(model, Ovis2_5.from_pretrained(tmp_path / "saved"), golden)


def test_float32_training_of_a_bf16_checkpoint_is_saved_as_asked(released_folder, tmp_path):
    change_config(released_folder, torch_dtype="bfloat16")
    model = Ovis2_5.from_pretrained(released_folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "float32")
    assert read_config(tmp_path / "float32")["torch_dtype"] == "float32"
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert read_config(tmp_path / "bf16")["torch_dtype"] == "bfloat16"
    assert {value.dtype for value in weights(tmp_path / "bf16").values()} == {torch.bfloat16}


def test_sharded_weights_load_and_are_written(released_folder, tmp_path, golden):
    model = Ovis2_5.from_pretrained(released_folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="500KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    loaded = assert_loads_cleanly(tmp_path / "sharded")
    assert same_logits(model, loaded, golden)
    loaded.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole" / "model.safetensors.index.json").exists()
    assert set(weights(tmp_path / "whole")) == set(weights(released_folder))


def test_a_tied_checkpoint_loads_and_writes_no_lm_head(tied_folder, tmp_path, golden):
    model = assert_loads_cleanly(tied_folder)
    assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "saved")
    assert LM_HEAD not in weights(tmp_path / "saved")
    assert set(weights(tmp_path / "saved")) == set(weights(tied_folder))
    assert read_config(tmp_path / "saved")["llm_config"]["tie_word_embeddings"] is True
    assert same_logits(model, assert_loads_cleanly(tmp_path / "saved"), golden)


def test_a_tied_checkpoint_that_repeats_the_embedding_loads_cleanly_too(tied_folder, tmp_path):
    tensors = load_file(tied_folder / "model.safetensors")
    tensors[LM_HEAD] = tensors[EMBEDDING].clone()
    save_file(tensors, tied_folder / "model.safetensors", metadata={"format": "pt"})
    model = assert_loads_cleanly(tied_folder)
    assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "saved")
    assert LM_HEAD not in weights(tmp_path / "saved")


def test_the_9b_config_comes_back_key_for_key(golden, tmp_path):
    config = Ovis2_5_Config.from_pretrained(golden.tokenizer_folder)
    config.save_pretrained(tmp_path)
    assert read_config(tmp_path) == read_config(golden.tokenizer_folder)
    llm, vit = config.llm_config, config.vit_config
    assert (llm.hidden_size, llm.num_hidden_layers, llm.vocab_size, llm.head_dim) == (4096, 36, 151936, 128)
    assert (vit.hidden_size, vit.num_hidden_layers, vit.image_size) == (1152, 27, 512)
    assert llm.rope_parameters["rope_theta"] == 1000000 and not llm.tie_word_embeddings


def test_changed_values_are_written_under_the_released_names(golden, tmp_path):
    config = Ovis2_5_Config.from_pretrained(golden.tokenizer_folder)
    config.llm_config.rope_parameters = {"rope_type": "yarn", "rope_theta": 5e6, "factor": 4.0}
    config.llm_config.tie_word_embeddings = True
    config.vit_config.layer_norm_eps = 1e-5
    config.dtype = torch.float32
    config.save_pretrained(tmp_path)
    expected = read_config(golden.tokenizer_folder)
    expected["llm_config"] |= {
        "rope_theta": 5e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "tie_word_embeddings": True
    }  # fmt: skip
    expected["vit_config"]["layer_norm_eps"] = 1e-5
    expected["torch_dtype"] = "float32"
    assert read_config(tmp_path) == expected
    again = Ovis2_5_Config.from_pretrained(tmp_path)
    rope = again.llm_config.rope_parameters
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("yarn", 5e6, 4.0)


def test_values_changed_while_loading_are_written(golden, tmp_path):
    Ovis2_5_Config.from_pretrained(golden.tokenizer_folder, visual_vocab_size=300).save_pretrained(tmp_path)
    assert read_config(tmp_path) == {**read_config(golden.tokenizer_folder), "visual_vocab_size": 300}


def test_a_config_made_from_scratch_has_the_released_keys(tmp_path):
    tiny = read_config(TINY)
    Ovis2_5_Config(llm_config=tiny["llm_config"], vit_config=tiny["vit_config"], visual_vocab_size=260).save_pretrained(
        tmp_path
    )
    saved = read_config(tmp_path)
    assert set(tiny) - {"_name_or_path", "torch_dtype"} <= set(saved)
    assert saved["llm_config"]["rope_theta"] == 1000000 and "rope_parameters" not in saved["llm_config"]
    assert set(tiny["vit_config"]) == set(saved["vit_config"])
    assert saved["auto_map"] == tiny["auto_map"] and saved["architectures"] == ["Ovis2_5"]


def test_resized_embeddings_are_written_to_the_config(released_folder, tmp_path):
    model = Ovis2_5.from_pretrained(released_folder)
    model.resize_token_embeddings(600)
    model.save_pretrained(tmp_path / "saved")
    assert read_config(tmp_path / "saved")["llm_config"]["vocab_size"] == 600
    assert assert_loads_cleanly(tmp_path / "saved").llm.lm_head.out_features == 600


# -- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vit_config__fullatt_block_indexes": [1, 2]}, r"fullatt_block_indexes is \[1, 2\].*windowed attention"),
        ({"model_type": "qwen3"}, "'qwen3'.*'ovis2_5'"),
        ({"llm_config__model_type": "llama"}, "llm_config.model_type is 'llama'.*'qwen3'"),
        ({"vit_config__model_type": "siglip"}, "vit_config.model_type is 'siglip'"),
        ({"vit_config__use_rope": False}, "use_rope=False"),
        ({"vit_config__temporal_patch_size": 2}, "temporal_patch_size=2"),
        ({"hidden_size": 65}, "hidden_size 65 differs from llm_config.hidden_size 64"),
        ({"visual_vocab_size": 4}, "visual_vocab_size 4 must exceed"),
        ({"vit_config__num_attention_heads": 24}, "multiple of 4"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused(released_folder, changes, message):
    change_config(released_folder, **changes)
    with pytest.raises(ValueError, match=message):
        Ovis2_5.from_pretrained(released_folder)


def test_the_layout_of_the_port_under_review_is_refused(released_folder):
    config = read_config(released_folder)
    config["text_config"], config["vision_config"] = config.pop("llm_config"), config.pop("vit_config")
    (released_folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for load in (Ovis2_5.from_pretrained, Ovis2_5_Config.from_pretrained, AutoModelForImageTextToText.from_pretrained):
        with pytest.raises(ValueError, match="text_config and vision_config.*weights have other names"):
            load(released_folder)


def test_weights_under_other_names_are_refused(released_folder):
    """A released config over the other port's weights: nothing is left at random values unnoticed."""
    tensors = load_file(released_folder / "model.safetensors")
    renamed = {name.replace("llm.model.", "model.language_model."): value for name, value in tensors.items()}
    save_file(renamed, released_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="llm.model.embed_tokens.weight"):
        Ovis2_5.from_pretrained(released_folder)


def test_a_folder_without_weights_or_config_is_named(released_folder, tmp_path):
    (released_folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        Ovis2_5.from_pretrained(released_folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        Ovis2_5.from_pretrained(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="neither a folder here"):
        resolve_checkpoint(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="Searched the cache"):
        resolve_checkpoint("nobody/no-such-model", local_files_only=True)


# -- transformers' Auto classes


def test_auto_classes_load_the_released_layout(released_folder, golden):
    assert type(AutoConfig.from_pretrained(released_folder)) is Ovis2_5_Config
    direct = Ovis2_5.from_pretrained(released_folder)
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        model = auto.from_pretrained(released_folder)
        assert type(model) is Ovis2_5 and same_logits(model, direct, golden)
    tokenizer = AutoTokenizer.from_pretrained(released_folder)
    assert tokenizer("Hi there")["input_ids"] == [13048, 1052]


def test_auto_processor_knows_the_released_layout(released_folder, tmp_path, golden):
    """Although its preprocessor_config.json names SiglipProcessor."""
    assert (
        json.loads((released_folder / "preprocessor_config.json").read_text())["processor_class"] == "SiglipProcessor"
    )
    processor = AutoProcessor.from_pretrained(released_folder)
    assert type(processor) is Ovis2_5Processor
    assert AutoProcessor.from_pretrained(released_folder, max_frames=20).limits.max_frames == 20
    processor.save_pretrained(tmp_path / "saved")
    assert type(AutoProcessor.from_pretrained(tmp_path / "saved")) is Ovis2_5Processor


def test_auto_processor_leaves_other_models_alone(released_folder):
    change_config(released_folder, model_type="siglip")
    assert type(AutoProcessor.from_pretrained(released_folder)).__name__ == "SiglipProcessor"


# -- side files


def test_side_files_are_neither_weights_nor_records_of_a_run(released_folder):
    for name in ("trainer_state.json", "model.safetensors.index.json", "optimizer.pt", "train_config.json"):
        (released_folder / name).write_text("{}")
    names = {file.name for file in side_files(released_folder)}
    assert {"modeling_ovis2_5.py", "vocab.json", "merges.txt", "preprocessor_config.json", "LICENSE"} <= names
    assert not names & {"config.json", "trainer_state.json", "optimizer.pt", "train_config.json", "model.safetensors"}
    assert "model.safetensors.index.json" not in names


def test_the_processor_of_a_run_is_not_overwritten_by_the_base(released_folder, tmp_path):
    processor = Ovis2_5Processor.from_pretrained(released_folder, max_frames=12)
    processor.save_pretrained(tmp_path / "base")
    shutil.copyfile(released_folder / "config.json", tmp_path / "base" / "config.json")
    shutil.copyfile(released_folder / "model.safetensors", tmp_path / "base" / "model.safetensors")
    model = Ovis2_5.from_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "plain")
    assert Ovis2_5Processor.from_pretrained(tmp_path / "plain").limits.max_frames == 12
    Ovis2_5Processor.from_pretrained(released_folder, max_frames=16).save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "own")
    assert Ovis2_5Processor.from_pretrained(tmp_path / "own").limits.max_frames == 16


def test_loading_and_saving_is_quiet(released_folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        Ovis2_5.from_pretrained(released_folder).save_pretrained(tmp_path / "saved")
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("transformers")]
