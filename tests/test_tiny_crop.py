"""The crop demo in short: its pages, its training rows, its exam with and without the tool."""

import json
from pathlib import Path

import pytest

from ovis25.cli.exam import hold_exam
from ovis25.constants import IMAGE_PLACEHOLDER
from ovis25.data import ConversationDataset
from ovis25.data.digits import CROP_KINDS, parse_source, questions
from ovis25.evaluate import digits as exam
from ovis25.evaluate.digits import run_exam
from ovis25.processing import Ovis2_5Processor
from ovis25.tools import toolbox

CONFIG = Path(__file__).parents[1] / "src_theo" / "train_config_tiny_crop.json"


def test_the_crop_shows_every_digit_of_the_page():
    pairs = zip(questions("test", "page_crop", 20), questions("test", "page", 20), strict=True)
    for with_tool, at_once in pairs:
        page = with_tool.images[0]
        assert page.tobytes() == at_once.images[0].tobytes() and with_tool.answer.endswith(at_once.answer)
        call = with_tool.answer.split("<tool_call>")[1].split("</tool_call>")[0]
        crop = toolbox().run(call, [page])
        x1, y1, x2, y2 = json.loads(call.removeprefix("Crop "))
        assert crop.size == (x2 - x1, y2 - y1) == (256, 128)
        assert all(x1 <= a and y1 <= b and c <= x2 and d <= y2 for a, b, c, d in with_tool.boxes[0])


def test_rows_train_the_call_and_the_answer(tiny_folder):
    rows = parse_source("tiny-crop:validation:40")
    assert rows.kinds == CROP_KINDS
    budget = json.loads(CONFIG.read_text(encoding="utf-8"))["single_image_max_pixels"]
    processor = Ovis2_5Processor.from_pretrained(tiny_folder)
    dataset = ConversationDataset(rows, processor, single_image_min_pixels=1024, single_image_max_pixels=budget)
    item = next(item for index, item in enumerate(dataset) if rows.question(index).with_tools)
    page, crop = item["grid_thws"].tolist()
    # the page is shown at an eighth of its size, the crop at about half
    assert page == [1, 6, 6] and crop == [1, 4, 8]
    learned = processor.decode(item["labels"][item["labels"] >= 0])
    assert learned.startswith("<tool_call>Crop [") and IMAGE_PLACEHOLDER not in learned


def test_the_exam_asks_both_ways(tiny_folder, monkeypatch, capsys):
    with pytest.raises(ValueError, match="unknown kind"):
        run_exam(lambda requests: [""] * len(requests), 1, asked_kinds=["pages"])
    right = run_exam(lambda requests: ["<tool_call>x</tool_call><image>7"] * len(requests), 50, asked_kinds=CROP_KINDS)
    # what stands behind the crop is marked
    assert 0 < right["kinds"]["page_crop"]["correct"] < 50 and right["tool_gain_points"] == 0
    monkeypatch.setattr(exam.run_exam, "__defaults__", (2, *exam.run_exam.__defaults__[1:]))
    results = hold_exam(str(tiny_folder), CROP_KINDS)
    assert set(results["kinds"]) == set(CROP_KINDS)
    assert "The crop tool makes the pages" in capsys.readouterr().out
