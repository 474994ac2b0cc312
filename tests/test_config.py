"""The training config: keys, types, old names, overrides, paths; each message says what to do."""

import functools
import gzip
import json
from pathlib import Path

import pytest

from ovis25.cli import main
from ovis25.files import REPOSITORY_ROOT, resolve_input
from ovis25.training.config import OWN_KEYS, ConfigError, load_config, parse_overrides

# the same bytes in every process: tests are named after them
zipped = functools.partial(gzip.compress, mtime=0)


@pytest.fixture
def write_config(tmp_path):
    (tmp_path / "train.json").write_text("[]")
    (tmp_path / "eval.json").write_text("[]")

    def write(**values) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"model_path": "tiny", "data_path": "train.json", **values}))
        return path

    return write


def test_every_documented_key_is_known(write_config):
    documented = {
        "eval_data_path": "eval.json", "output_dir": "out", "num_train_epochs": 2, "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 4, "learning_rate": 2e-5, "train_modules": "llm", "image_folder": ".",
        "multimodal_max_length": 100, "text_max_length": 50, "single_image_min_pixels": 1024,
        "single_image_max_pixels": 2048, "multiple_image_min_pixels": 1024, "multiple_image_max_pixels": 2048,
        "video_min_pixels": 1024, "video_max_pixels": 2048, "min_frames": 2, "max_frames": 4,
        "freeze_vision_tower": True, "freeze_llm": False, "early_stopping_patience": 5,
        "early_stopping_threshold": 0.1, "on_bad_sample": "skip", "on_long_sample": "error",
    }  # fmt: skip
    config = load_config(write_config(**documented))
    assert config.trainer == {
        "num_train_epochs": 2.0,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 4,
        "learning_rate": 2e-5,
    }
    for name in documented.keys() & OWN_KEYS.keys() - {"eval_data_path", "output_dir", "image_folder"}:
        assert getattr(config, name) == documented[name]


def test_shipped_configs_load():
    for path in sorted((REPOSITORY_ROOT / "src_theo").glob("train_config*.json")):
        assert load_config(path).data_path


def test_a_config_is_found_by_name_in_src_theo(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load_config("train_config_2b.json").model_path == "AIDC-AI/Ovis2.5-2B"


def test_the_main_configuration_is_the_documented_one():
    config = load_config("train_config.json")
    assert (config.model_path, config.train_modules) == ("AIDC-AI/Ovis2.5-9B", "all")
    assert config.data_path == str(REPOSITORY_ROOT / "src_theo" / "sample_data" / "train_data.json")
    assert config.eval_data_path == str(REPOSITORY_ROOT / "src_theo" / "sample_data" / "eval_data.json")
    assert config.trainer["deepspeed"] == str(REPOSITORY_ROOT / "scripts" / "zero_configs" / "zero2_cp.json")
    documented = {"num_train_epochs": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16}
    assert {name: config.trainer[name] for name in documented} == documented
    assert config.trainer["learning_rate"] == 2e-5
    assert (config.multimodal_max_length, config.single_image_max_pixels) == (8192, 3211264)
    assert json.loads((REPOSITORY_ROOT / "src_theo" / "train_config.json").read_text())["output_dir"] == (
        "./checkpoints/ovis25_finetune"
    )


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("learning_rat", "did you mean learning_rate?"), ("multimodal_max_len", "did you mean multimodal_max_length?")],
)
def test_an_unknown_key_suggests_the_nearest(write_config, key, suggestion):
    with pytest.raises(ConfigError, match=f"unknown key '{key}'") as error:
        load_config(write_config(**{key: 1}))
    assert suggestion in str(error.value)


def test_a_hopeless_key_points_to_the_help(write_config):
    with pytest.raises(ConfigError, match="see ovis25 train --help"):
        load_config(write_config(zzzz=1))


def test_keys_with_an_underscore_in_front_are_comments(write_config):
    assert load_config(write_config(_why="because")).trainer == {}


@pytest.mark.parametrize(
    ("old", "value", "new"),
    [
        ("warmup_ratio", 0.1, "warmup_steps"),
        ("evaluation_strategy", "steps", "eval_strategy"),
        ("no_cuda", True, "use_cpu"),
    ],
)
def test_old_trainer_names_are_translated(write_config, old, value, new):
    config = load_config(write_config(**{old: value}))
    assert config.trainer == {new: value}
    assert config.notes == [f"{old} is {new} now: translated"]


def test_old_own_names_are_translated(tmp_path):
    (tmp_path / "train.json").write_text("[]")
    path = tmp_path / "old.json"
    path.write_text(
        json.dumps({"ovis_pretrained_path": "tiny", "data_path": "train.json", "torch_dtype": "float32",
                    "overwrite_output_dir": True})
    )  # fmt: skip
    config = load_config(path)
    assert (config.model_path, config.dtype, config.overwrite_output_dir) == ("tiny", "float32", True)


@pytest.mark.parametrize("name", ["stage", "data_name", "data_type", "visual_vocab_size"])
def test_names_without_effect_are_reported(write_config, name):
    config = load_config(write_config(**{name: "x"}))
    assert len(config.notes) == 1 and config.notes[0].startswith(f"{name} has no effect here: ")


def test_an_old_and_a_new_name_that_disagree_are_refused(write_config):
    with pytest.raises(ConfigError, match="two values"):
        load_config(write_config(evaluation_strategy="steps", eval_strategy="epoch"))


def test_overrides_win_and_take_every_form(write_config):
    config = load_config(
        write_config(max_steps=9),
        ["--max_steps", "4", "--learning-rate=3e-5", "--freeze_llm", "--lr_scheduler_type", "cosine", "--seed", "7"],
    )
    assert config.trainer == {"max_steps": 4, "learning_rate": 3e-5, "lr_scheduler_type": "cosine", "seed": 7}
    assert config.freeze_llm is True


def test_overrides_read_json_values():
    assert parse_overrides(["--a", "-1", "--b", "[1, 2]", "--c", "None", "--d", "False", "--e", "text"]) == {
        "a": -1, "b": [1, 2], "c": None, "d": False, "e": "text",
    }  # fmt: skip


def test_a_stray_argument_is_refused(write_config):
    with pytest.raises(ConfigError, match="unexpected argument 'fast': overrides are written --key value"):
        load_config(write_config(), ["fast"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_steps", "many", "max_steps is 'many', but it must be int"),
        ("max_steps", 1.5, "max_steps is 1.5, but it must be int"),
        ("learning_rate", "fast", "learning_rate is 'fast', but it must be float"),
        ("learning_rate", True, "learning_rate is True, but it must be float"),
        ("freeze_llm", "maybe", "freeze_llm is 'maybe', but it must be bool"),
        ("on_bad_sample", "ignore", "on_bad_sample is 'ignore'; choose one of error, skip"),
        ("multimodal_max_length", 0, "multimodal_max_length is 0; it must be at least 1"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(write_config, key, value, message):
    with pytest.raises(ConfigError) as error:
        load_config(write_config(**{key: value}))
    assert message in str(error.value)


def test_numbers_written_as_text_are_numbers(write_config):
    config = load_config(write_config(learning_rate="1e-5", max_steps="10", freeze_llm="true"))
    assert config.trainer == {"learning_rate": 1e-5, "max_steps": 10} and config.freeze_llm is True


def test_missing_required_keys_are_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_path": "tiny"}')
    with pytest.raises(ConfigError, match="data_path is missing"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no valid JSON"),
        ("[]", "must hold one JSON object"),
        ("", "it is empty"),
        ("{}".encode("utf-16"), "it looks like UTF-16; save it as UTF-8"),
        ("{}".encode("utf-16-le"), "it holds null bytes"),
        ('{"output_dir": "ö"}'.encode("latin-1"), "byte 16 is no UTF-8"),
        (zipped(b"{}"), "a gzip file; unpack it"),
        ("<!DOCTYPE html>", "a web page"),
        ('// mine\n{"seed": 1}', "line 1 has a comment"),
        ('{"seed": 1} # mine', "is no valid JSON"),
        ('{"seed": 1,\n}', "has a comma before a closing bracket"),
        ("{'seed': 1}", "line 1 has single quotes"),
        ('{"bf16":\n True}', "has Python's True"),
        ("seed: 1\n", "a key without quotes"),
        ("{\u201cseed\u201d: 1}", "typographic quotes"),
        ('{\u00a0"seed": 1}', "a no-break space"),
        ('{"a": "// it\'s, }", "seed": 1 "b": 2}', "Expecting ',' delimiter"),
        ('{"training": {"seed": 1}}', "'training' holds settings .seed.; a config is flat"),
        ('{"MAX_STEPS": 1}', "did you mean max_steps?"),
    ],
)
def test_a_broken_config_file_is_named(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("http://example.com/x.json", "lies on the web"),
        ("s3://bucket/x.json", "lies on the web"),
        ("$NOWHERE/x.json", "the environment variable NOWHERE is not set"),
        ("Train.JSON", "did you mean .*train.json"),
        ("train.jsn", "did you mean .*train.json"),
    ],
)
def test_a_path_that_leads_nowhere_says_what_was_meant(write_config, data_dir, monkeypatch, value, message):
    monkeypatch.chdir(data_dir)
    with pytest.raises(ConfigError, match=message):
        load_config(write_config(data_path=value))


def test_paths_know_variables_and_file_addresses(write_config, data_dir, monkeypatch):
    monkeypatch.setenv("DATA", str(data_dir))
    train = data_dir / "train.json"
    for value in ("$DATA/train.json", "${DATA}/train.json", train.as_uri()):
        assert load_config(write_config(data_path=value)).data_path == str(train.resolve())
    assert load_config(write_config(output_dir="$DATA/out")).output_dir == str(data_dir / "out")
    with pytest.raises(ConfigError, match="output_dir is .*control characters"):
        load_config(write_config(output_dir="/tmp/\x1b[31m"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a command is missing"),
        (["trian", "x.json"], "there is no command 'trian'; did you mean train?"),
        (["Train", "x.json"], "did you mean train?"),
        (["train"], "CONFIG is missing"),
        (["train", "--config", "x.json"], "'x.json' stands behind --config; the config's name comes first"),
        (["plan", "--devices", "x", "y.json"], "invalid int value: 'x'"),
        (["plan", "x.json", "--kinds", "txt"], "--kinds cannot be 'txt'; choose one of"),
        (["merge", "--adapter_path", "a"], "--output_path is missing"),
        (["merge", "--adapter_path", "a", "--output_path", "b", "--bas", "c"], "did you mean --base?"),
        (["infer", "tiny", "--dtype", "float8", "--prompt", "a"], "--dtype cannot be 'float8'"),
    ],
)  # fmt: skip
def test_a_command_line_that_cannot_be_is_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert message in error


def test_options_may_be_written_with_either_dash_but_not_shortened(write_config, capsys):
    assert main(["plan", str(write_config()), "--device_memory", "1KB"]) == 2
    assert "--device-memory is '1KB', which is less than any device has" in capsys.readouterr().err
    assert main(["plan", str(write_config()), "--device-mem", "80GB"]) == 2
    assert "unknown key 'device_mem'" in capsys.readouterr().err
    assert main(["plan", str(write_config()), "--per_device_train_batch_size", "1000000"]) == 2
    assert "tokens is more than any device holds" in capsys.readouterr().err


def test_a_missing_data_file_lists_every_place(write_config):
    path = write_config(data_path="nowhere.json")
    with pytest.raises(FileNotFoundError) as error:
        load_config(path)
    message = str(error.value)
    assert "data_path: nowhere.json was not found" in message
    for place in (path.parent, Path.cwd(), REPOSITORY_ROOT):
        assert str(place / "nowhere.json") in message


def test_a_path_is_found_beside_the_config_then_here_then_in_the_root(tmp_path, monkeypatch):
    config_dir, here = tmp_path / "configs", tmp_path / "here"
    config_dir.mkdir(), here.mkdir()
    monkeypatch.chdir(here)
    assert resolve_input("README.md", config_dir) == REPOSITORY_ROOT / "README.md"
    (here / "README.md").touch()
    assert resolve_input("README.md", config_dir) == here / "README.md"
    (config_dir / "README.md").touch()
    assert resolve_input("README.md", config_dir) == config_dir / "README.md"


def test_the_saved_config_can_be_read_again(write_config, tmp_path):
    config = load_config(write_config(max_steps=3, train_modules="llm|vte:1e-4"))
    again = tmp_path / "again.json"
    again.write_text(json.dumps(config.to_dict()))
    assert load_config(again).to_dict() == config.to_dict()
