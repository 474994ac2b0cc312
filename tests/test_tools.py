"""The crop tool and the registry."""

import numpy as np
import pytest
from PIL import Image

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
