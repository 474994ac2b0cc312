"""The upstream-style script, run as a user runs it, and the datainfo files that it takes its data from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ovis25.data import ConversationDataset, DataError
from ovis25.data.datainfo import CAPTION_PROMPT, read_datainfo, resolve_source, split_source
from ovis25.files import REPOSITORY_ROOT

SCRIPT = REPOSITORY_ROOT / "scripts" / "run_ovis2_5_sft.sh"
SAMPLES = REPOSITORY_ROOT / "src_theo" / "sample_data"
DATAINFO = SAMPLES / "datainfo.json"
NAMES = "sample_conversations|sample_captions"
NUM_SAMPLES = sum(len(json.loads((SAMPLES / name).read_text())) for name in ("train_data.json", "captions.json"))

# every flag that the upstream script sets, with values for the tiny model
UPSTREAM_FLAGS = {
    "deepspeed": "none", "stage": "3", "data_type": "conversation", "data_seed": "5171", "accepts_loss_kwargs": "True",
    "ovis_pretrained_path": "tiny", "attn_implementation": "sdpa", "single_image_min_pixels": "1024",
    "single_image_max_pixels": "65536", "min_frames": "2", "max_frames": "2", "train_modules": "all",
    "multimodal_max_length": "6000", "text_max_length": "6000", "per_device_train_batch_size": "2",
    "gradient_accumulation_steps": "2", "num_train_epochs": "1", "eval_strategy": "no", "save_strategy": "steps",
    "save_steps": "0.4", "save_total_limit": "10", "learning_rate": "2e-5", "max_grad_norm": "1.0",
    "weight_decay": "0.", "warmup_ratio": "0.1", "lr_scheduler_type": "cosine", "logging_steps": "1", "tf32": "True",
    "bf16": "True",
    "dataloader_num_workers": "1", "dataloader_drop_last": "True", "dataloader_persistent_workers": "True",
    "gradient_checkpointing": "True", "report_to": "none", "run_name": "test",
}  # fmt: skip
SMALL = {
    f"{kind}_{bound}_pixels": pixels
    for kind in ("multiple_image", "video")
    for bound, pixels in (("min", "1024"), ("max", "65536"))
}


def run_script(*arguments, cwd=REPOSITORY_ROOT, **env) -> subprocess.CompletedProcess:
    # the tests' own environment is the active one, so the launcher sets nothing up
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix, **env}
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)


def as_flags(settings: dict[str, str]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", value)]


def test_every_upstream_flag_is_taken_and_the_named_data_is_trained_on(tmp_path):
    result = run_script(
        *as_flags({**UPSTREAM_FLAGS, **SMALL}), "--data_info_version", "src_theo/sample_data/datainfo",
        "--data_name", NAMES, "--max_steps", "2", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "all 2 steps are done" in result.stdout and "stage has no effect here" in result.stdout
    assert "data_name has no effect" not in result.stdout
    plan = json.loads((tmp_path / "out" / "train_plan.json").read_text())
    assert plan["data"]["num_samples"] == NUM_SAMPLES
    config = json.loads((tmp_path / "out" / "train_config.json").read_text())
    assert config["data_path"] == f"datainfo:{DATAINFO}:{NAMES}"


def test_it_runs_from_another_folder_on_several_devices(tmp_path):
    (tmp_path / "mine.json").write_text(
        json.dumps({"mine": {"meta_file": "rows.json", "image_dir": str(SAMPLES), "data_format": "caption"}})
    )
    rows = [{"image": "sample_small.png", "text": f"House {number}."} for number in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    result = run_script(
        "--ovis_pretrained_path", "tiny", "--data_info_version=mine.json", "--data_name=mine", "--max_steps", "2",
        "--single_image_min_pixels", "1024", "--single_image_max_pixels", "65536", "--output_dir", "out",
        "--gradient_accumulation_steps", "1", cwd=tmp_path, NUM_DEVICES="2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "1 per device x 2 devices x 1 accumulated = 2" in result.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["--data_name", NAMES], {}, "--data_info_version is missing"),
        (["--data_info_version", DATAINFO], {}, "--data_name is missing"),
        (["train_config.json", "4"], {}, "unexpected argument 'train_config.json': this script takes flags only"),
        (["--data_path", "tiny:train:8"], {"NUM_DEVICES": "all"}, "NUM_DEVICES must be a number of devices, not 'all'"),
    ],
)
def test_wrong_arguments_print_the_usage(arguments, variables, message):
    result = run_script(*arguments, **variables)
    assert result.returncode == 2
    assert message in result.stderr and "usage: run_ovis2_5_sft.sh" in result.stderr


def test_it_explains_itself():
    result = run_script("--help")
    assert result.returncode == 0 and "example:" in result.stdout and "--data_name" in result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_name", "sample_caption"], "has no data set 'sample_caption'; did you mean sample_captions?"),
        (["--data_name", NAMES, "--learning_rte", "1"], "unknown key 'learning_rte'; did you mean learning_rate?"),
        (["--data_name", NAMES, "--data_path", "tiny:train:8"], "data_path"),
    ],
)
def test_what_python_finds_wrong_is_one_message(flags, message, tmp_path):
    result = run_script("--ovis_pretrained_path", "tiny", "--data_info_version", DATAINFO, *flags,
                        "--output_dir", tmp_path / "out", NUM_DEVICES="1")  # fmt: skip
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr


@pytest.fixture
def write_datainfo(tmp_path):
    """Writes datainfo.json with one data set `d` whose rows lie in rows.json; returns its path."""

    def write(rows, **entry) -> Path:
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        values = {"meta_file": "rows.json", "image_dir": "images", "data_format": "conversation", **entry}
        path = tmp_path / "datainfo.json"
        path.write_text(json.dumps({"d": {key: value for key, value in values.items() if value is not None}}))
        return path

    return write


ANSWER = {"from": "gpt", "value": "Yes."}


def test_the_rows_of_the_named_sets_are_joined():
    rows = read_datainfo(DATAINFO, NAMES)
    assert len(rows) == NUM_SAMPLES
    own = json.loads((SAMPLES / "train_data.json").read_text())
    assert [row["id"] for row in rows[: len(own)]] == [row["id"] for row in own]
    turns = [(row["conversations"], mine["conversations"]) for row, mine in zip(rows, own, strict=False)
             if "conversations" in mine]  # fmt: skip
    assert turns and all(joined == mine for joined, mine in turns)
    caption = rows[len(own)]
    assert caption["image"] == [str(SAMPLES / "sample_small.png")]
    assert [turn["from"] for turn in caption["conversations"]] == ["human", "gpt"]
    assert caption["conversations"][0]["value"] == CAPTION_PROMPT
    assert caption["id"] == "caption-house" and caption["_origin"] == f"{SAMPLES / 'captions.json'}[0]"
    assert len(read_datainfo(DATAINFO, "sample_captions|sample_captions")) == 4


def test_visuals_of_every_form_become_absolute(write_datainfo, tmp_path):
    ask = {"from": "human", "value": "<video>\nIs it?"}
    part = {"type": "image", "image": "a.png"}
    rows = [
        {"video": "v.mp4", "conversations": [ask, ANSWER]},
        {"video_frames": ["0.png", "/f/1.png"], "conversations": [ask, ANSWER]},
        {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "Yes."}]},
        {"conversations": [{"from": "human", "value": "Is it?"}, ANSWER]},
    ]
    video, frames, messages, text = read_datainfo(write_datainfo(rows), "d")
    folder = tmp_path / "images"
    assert video["video"] == str(folder / "v.mp4")
    assert frames["video"] == [str(folder / "0.png"), "/f/1.png"]
    assert messages["image"] == [str(folder / "a.png")] and "messages" not in messages
    assert "image" not in text and "video" not in text


def test_a_caption_template_is_the_question(write_datainfo):
    rows = [{"image": "a.png", "caption": "A."}, {"image": "a.png", "caption": "B.", "caption_template": "B? <image>"}]
    path = write_datainfo(rows, data_format="caption", caption_template="<image> A?")
    assert [row["conversations"][0]["value"] for row in read_datainfo(path, "d")] == ["<image> A?", "B? <image>"]


def test_a_malformed_row_is_left_to_the_data_set(write_datainfo, processor):
    rows = [{"image": "a.png"}, {"conversations": [{"from": "human", "value": "Is it?"}, ANSWER]}]
    joined = read_datainfo(write_datainfo(rows), "d")
    with pytest.raises(DataError, match=r"rows.json\[0\], field conversations: it is missing"):
        ConversationDataset(joined, processor)
    assert len(ConversationDataset(joined, processor, on_bad_sample="skip")) == 1


@pytest.mark.parametrize(
    ("entry", "rows", "message"),
    [
        ({"meta_file": None}, [{}], "data set 'd': meta_file is missing; it needs meta_file, image_dir, data_format"),
        ({"data_format": "captions"}, [{}], "data_format is 'captions'; it must be conversation or caption"),
        ({"meta_file": "gone.json"}, [{}], "data set 'd', meta_file: gone.json was not found. Looked for"),
        ({"image_dir": "gone"}, [{}], "data set 'd', image_dir: gone was not found"),
        ({}, ["text"], "rows.json[0] is a str"),
        ({"data_format": "caption"}, [{"conversations": []}], "rows.json[0] is no caption row: it needs image"),
    ],
)
def test_what_is_wrong_with_a_data_set_is_told(write_datainfo, entry, rows, message):
    with pytest.raises(DataError) as raised:
        read_datainfo(write_datainfo(rows, **entry), "d")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        (None, "d", "the datainfo file"),
        ("{", "d", "is no valid JSON"),
        ("[]", "d", "must hold one JSON object, not a list"),
        ('{"photos": {}}', "photo", "has no data set 'photo'; did you mean photos?"),
        ('{"photos": {}}', "x", "has no data set 'x'; it has photos"),
        ('{"photos": 3}', "photos", "meta_file is missing"),
    ],
)
def test_what_is_wrong_with_a_datainfo_file_is_told(tmp_path, text, names, message):
    if text is not None:
        (tmp_path / "datainfo.json").write_text(text)
    with pytest.raises(DataError) as raised:
        read_datainfo(tmp_path / "datainfo.json", names)
    assert message in str(raised.value)


def test_a_source_names_a_file_and_its_data_sets(tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    assert split_source("datainfo:C:/mine.json:a|b") == ("C:/mine.json", "a|b")
    assert resolve_source("datainfo:mine:a|b", tmp_path) == f"datainfo:{tmp_path / 'mine.json'}:a|b"
    with pytest.raises(DataError, match="is not of the form datainfo:PATH:NAMES"):
        split_source("datainfo:mine.json")
    with pytest.raises(FileNotFoundError, match="Looked for"):
        resolve_source("datainfo:gone:a", tmp_path)
