"""Without the hub: a dry run of a released name prints the whole plan, with texts estimated and visuals exact."""

import json

import pytest

from ovis25 import Ovis2_5Processor
from ovis25.cli import main
from ovis25.data import ConversationDataset
from ovis25.files import REPOSITORY_ROOT
from ovis25.training.released import stand_in_tokenizer

SRC_THEO = REPOSITORY_ROOT / "src_theo"
# tokens of the shipped samples by the released tokenizer: all, learned, visual
MEASURED = {"train_data.json": (5985, 146, 5478), "eval_data.json": (2227, 38, 2101)}


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def dry_run(capsys, *arguments) -> str:
    assert main(["train", *map(str, arguments), "--deepspeed", "null", "--dry-run"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "arguments", "shown"),
    [
        ("train_config.json", [], ["8,190.74 M of 8,190.74 M"]),
        ("train_config_2b.json", [], ["1,720.57 M of 1,720.57 M", "visual_tokenizer, learning rate 5e-06"]),
        ("train_config.json", ["--recipe", "trl"], ["8,190.74 M of 8,190.74 M"]),
        ("train_config.json", ["--packing", "true"], ["13 samples in about 1 rows of up to 8,192 tokens"]),
        ("lora/train_config_lora.json", [], ["43.65 M of 8,234.38 M", "frozen"]),
        ("lora/train_config_lora.json", ["--cache_visual_embeddings", "true"], ["visual cache"]),
    ],
)
def test_a_dry_run_of_a_released_name_needs_no_hub(no_hub, tmp_path, capsys, config, arguments, shown):
    printed = dry_run(capsys, SRC_THEO / config, *arguments)
    assert "13 (about 5,98" in printed and "4 (about 2,22" in printed
    assert "text token counts are estimates" in printed and "the real run needs the hub" in printed
    assert all(part in printed for part in shown)
    assert not list(tmp_path.iterdir())


def test_the_real_run_and_other_names_still_need_the_hub(no_hub, capsys):
    assert main(["train", str(SRC_THEO / "train_config.json"), "--deepspeed", "null"]) == 2
    assert "AIDC-AI/Ovis2.5-9B is no folder here and could not be fetched" in capsys.readouterr().err
    for name in ("AIDC-AI/Ovis2.5-90B", "someone/Ovis2.5-9B"):
        arguments = [str(SRC_THEO / "train_config.json"), "--model_path", name, "--deepspeed", "null", "--dry-run"]
        assert main(["train", *arguments]) == 2
        assert f"{name} is no folder here and could not be fetched" in capsys.readouterr().err


def test_a_tokenizer_at_hand_is_used(no_hub, capsys):
    printed = dry_run(capsys, SRC_THEO / "train_config.json", "--model_path", "tiny")
    assert "about" not in printed and "estimates" not in printed


def test_defects_found_by_an_estimate_say_so(no_hub, tmp_path, capsys):
    turns = [{"from": "human", "value": "word " * 50}, {"from": "gpt", "value": "Yes."}]
    (tmp_path / "long.json").write_text(json.dumps([{"conversations": turns}]))
    arguments = [str(SRC_THEO / "train_config.json"), "--data_path", "long.json", "--text_max_length", "40"]
    assert main(["train", *arguments, "--deepspeed", "null", "--dry-run"]) == 2
    message = capsys.readouterr().err
    assert "more than text_max_length 40" in message and "note: text token counts are estimates" in message


@pytest.mark.parametrize("name", MEASURED)
def test_the_samples_counts_are_close_and_their_visual_tokens_exact(name):
    processor = Ovis2_5Processor(stand_in_tokenizer())
    counts = ConversationDataset(SRC_THEO / "sample_data" / name, processor).statistics()
    tokens, learned, visual = MEASURED[name]
    assert counts.visual_tokens == visual
    assert abs(counts.total_tokens - tokens) <= 0.01 * tokens and abs(counts.learned_tokens - learned) <= 0.05 * learned


# the counts are the released tokenizer's
@pytest.mark.parametrize(
    ("text", "measured", "least"),
    [
        ("The Supreme Court ruled yesterday that the agreement between both parties remains in force, although several "
         "conditions have not been fulfilled.", 23, 0.9),
        ("Der Bundesgerichtshof entschied gestern, dass die Kündigungsfrist für Mietverträge einzuhalten sei.",
         29, 0.65),
        ("Le gouvernement a annoncé hier une série de mesures destinées à soutenir les entreprises touchées par la "
         "crise.", 27, 0.9),
        ("请描述这张图片中的内容，并说明有多少个人在里面。图中显示的是一座红色屋顶的房子，旁边有一棵树。", 25, 0.85),
        ("대한민국의 수도는 서울입니다. 어제 친구와 함께 영화를 보러 갔습니다.", 25, 0.7),
        ("Правительство объявило вчера о новых мерах поддержки предприятий, пострадавших от кризиса.", 33, 0.9),
        ("In 2024 there were 1234567 visitors, 3.75 % more than in 2023 (1189910).", 41, 1),
        ("def area(width: float, height: float) -> float:\n    return width * height  # in square metres\n", 24, 0.9),
        ("<|im_start|>user\n<tool_call>Crop [0.5, 0, 1, 1]</tool_call><|im_end|>", 21, 1),
    ],
)  # fmt: skip
def test_texts_of_many_kinds_are_estimated(text, measured, least):
    encoding = stand_in_tokenizer()(text, return_offsets_mapping=True)
    assert least * measured <= len(encoding["input_ids"]) <= 1.15 * measured
    assert "".join(text[start:end] for start, end in encoding["offset_mapping"]) == text
