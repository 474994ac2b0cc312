"""The crop tool and the registry."""

import numpy as np
import pytest
from conftest import Scripted
from PIL import Image

from ovis25 import Ovis25Inference
from ovis25.data import ConversationDataset, DataError
from ovis25.processing.chat import tokenize
from ovis25.tools import CropTool, Toolbox, toolbox

WIDTH, HEIGHT = 200, 100


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """Every pixel tells where it is."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH].astype(np.uint8)
    return Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], axis=-1))


@pytest.mark.parametrize(
    ("call", "box"),
    [
        ("Crop [10, 20, 60, 90]", (10, 20, 60, 90)),
        ("Crop [10.5,20.9 , 59.2,89.1]", (10, 20, 60, 90)),
        ("Crop [0.25, 0.5, 1, 1]", (50, 50, 200, 100)),
        ("Crop [0, 0, 1, 1]", (0, 0, 200, 100)),
        ("Crop [-30, -5, 1e9, 50]", (0, 0, 200, 50)),
        ("Crop [0, 0, 2, 2] image 1", (0, 0, 2, 2)),
    ],
)
def test_crop_cuts_the_original(image, call, box):
    cut = toolbox().run(call, [image])
    assert cut.size == (box[2] - box[0], box[3] - box[1])
    assert cut.getpixel((0, 0)) == (box[0], box[1], 0)


def test_crop_chooses_the_image(image):
    assert toolbox().run("Crop [0, 0, 1, 1] image 2", [image, image.resize((7, 9))]).size == (7, 9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("Crop [60, 20, 10, 90]", "holds nothing of the image, which is 200 wide and 100 high"),
        ("Crop [300, 20, 400, 90]", "holds nothing of the image"),
        ("Crop [10, 20, 10, 90]", "holds nothing of the image"),
        ("Crop [nan, 0, 1, 1]", "is no box; write Crop"),
        ("Crop 1 2 3 4", "is no box; write Crop"),
        ("Crop", "is no box; write Crop"),
        ("Crop [0, 0, 9, 9] image 3", "there is no image 3; there are 1"),
        ("Zoom [0, 0, 9, 9]", "there is no tool 'Zoom'; the tools are Crop"),
        ("", "there is no tool ''"),
    ],
)
def test_bad_calls_are_told_to_the_model(image, call, message):
    result = toolbox().run(call, [image])
    assert result.startswith("Error: ") and message in result


def test_registry():
    with pytest.raises(ValueError, match="two tools are named Crop"):
        Toolbox([CropTool(), CropTool()])
    with pytest.raises(ValueError, match="there is no tool Zoom; the built-in tools are Crop"):
        toolbox(["Zoom"])
    assert "<tool_call>Crop [x1, y1, x2, y2]</tool_call>" in toolbox().describe()


@pytest.fixture(scope="module")
def tool_engine(tiny_folder) -> Ovis25Inference:
    return Ovis25Inference(tiny_folder)


def tool_row(image_files: list[str]) -> dict:
    value = (
        "<think>look closer</think>\n\n<tool_call>Crop [0.5, 0, 1, 1]</tool_call><image>"
        "<tool_call>Crop [90, 0, 10, 9] image 2</tool_call><tool_response>Error: no</tool_response>It is 4."
    )
    turns = [{"from": "human", "value": "<image>\nRead it."}, {"from": "gpt", "value": value}]
    return {"id": "a", "image": image_files, "conversations": turns}


def test_training_sequence_is_the_one_at_inference(tool_engine, image, tmp_path):
    """The same ids as a reply whose calls were run, and labels on what the model writes alone."""
    image.save(tmp_path / "a.png")
    small = {"single_image_min_pixels": 1024, "single_image_max_pixels": 9216}
    dataset = ConversationDataset([tool_row(["a.png"])], tool_engine.processor, tmp_path, **small)
    item = dataset[0]
    assert dataset.lengths.tolist() == [len(item["input_ids"])]

    class Fixed(Toolbox):
        def run(self, call, images):
            return super().run(call, images) if "image 2" not in call else "Error: no"

    tokenizer = tool_engine.processor.tokenizer
    parts = ["<think>look closer</think>\n\n<tool_call>Crop [0.5, 0, 1, 1]</tool_call>",
             "<tool_call>Crop [90, 0, 10, 9] image 2</tool_call>", "It is 4.<|im_end|>"]  # fmt: skip
    written = [token for part in parts for token in tokenize(tokenizer, part, [])[0]]
    request, _ = tool_engine.request(
        "Read it.", [tmp_path / "a.png"], tools=Fixed([CropTool()]), enable_thinking=True, min_pixels=1024,
        max_pixels=9216,
    )  # fmt: skip
    prompt = tool_engine.encode(request)
    script = {"logits_processor": [Scripted(written)], "do_sample": False, "repetition_penalty": 1.0}
    ended = []
    pieces = list(tool_engine.stream_prompt(prompt, script, on_end=ended.append))
    assert pieces and item["input_ids"].tolist() == prompt.ids + ended[0].ids
    assert item["labels"][item["labels"] >= 0].tolist() == written
    assert len(item["grid_thws"]) == 2


def test_tool_images_from_files(tool_engine, image, tmp_path):
    image.save(tmp_path / "a.png")
    image.crop((100, 0, 200, 100)).save(tmp_path / "b.png")
    made = ConversationDataset([tool_row(["a.png"])], tool_engine.processor, tmp_path)[0]
    given = ConversationDataset([tool_row(["a.png", "b.png"])], tool_engine.processor, tmp_path)[0]
    assert all((made[name] == given[name]).all() for name in made)


def test_bad_training_call_names_row_and_turn(tool_engine, image, tmp_path):
    image.save(tmp_path / "a.png")
    row = tool_row(["a.png"])
    row["conversations"][1]["value"] = "<tool_call>Crop [9, 9, 1, 1]</tool_call><image>4"
    with pytest.raises(DataError, match=r"(?s)a.*conversations\[1\].*the call 'Crop \[9, 9, 1, 1\]' fails"):
        ConversationDataset([row], tool_engine.processor, tmp_path)
