"""The model behind transformers' own doors: Auto classes, generate, and the image-text-to-text pipeline."""

import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import ovis25
from ovis25 import Ovis2_5, Ovis2_5Processor, Ovis25Inference

GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def asked(tiny_folder):
    """(model, processor, picture, messages, the engine's text)."""
    picture = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    engine = Ovis25Inference(tiny_folder)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Read it."}]}
    ]
    text = engine.replies([{"prompt": "Read it.", "image": picture, "enable_thinking": True}], **GREEDY)[0].text
    model = AutoModelForImageTextToText.from_pretrained(tiny_folder, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(tiny_folder), picture, messages, text


def test_auto_classes_and_generate(asked):
    model, processor, _, messages, text = asked
    assert isinstance(model, Ovis2_5) and isinstance(processor, Ovis2_5Processor)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, **GREEDY)
    new = output[:, inputs["input_ids"].shape[1] :]
    assert processor.batch_decode(new, skip_special_tokens=True) == [text]


def test_pipeline(asked):
    model, processor, picture, messages, text = asked
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    found = ask(text=messages, generate_kwargs=GREEDY, return_full_text=False)
    assert found[0]["generated_text"] == text
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    found = ask(images=picture, text=prompt, generate_kwargs=GREEDY, return_full_text=False)
    assert found[0]["generated_text"] == text


DOORS = """
config = AutoConfig.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder)
print(*(type(part).__name__ for part in (config, processor, model)))
print("waiting", [finder for finder in sys.meta_path if "ovis25" in type(finder).__module__])
"""
AUTO = "from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor\n"
LOADED = "print('loaded', [name for name in {} if name in sys.modules])\n"
UNWANTED = (
    "peft",
    "matplotlib",
    "trl",
    "deepspeed",
    "sklearn",
    "ovis25.inference",
    "ovis25.loading",
    "ovis25.training",
)


@pytest.mark.parametrize(
    "code",
    [
        # nothing is loaded before it is asked for
        "import ovis25\n" + LOADED.format(("torch", "transformers", "ovis25.model")) + AUTO,
        AUTO + "import ovis25\n" + LOADED.format(UNWANTED),
        # modules that half of the Auto classes' imports need themselves, then ours
        "import ovis25.data\n" + LOADED.format(UNWANTED) + "from transformers import PreTrainedModel, Trainer\n" + AUTO,
    ],
    ids=["ovis25 first", "transformers first", "the data first"],
)
def test_both_orders_of_import_open_the_doors(code, tiny_folder):
    script = f"import sys\nfolder = sys.argv[1]\n{code}{DOORS}"
    command = [sys.executable, "-c", script, str(tiny_folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["loaded []", "Ovis2_5_Config Ovis2_5Processor Ovis2_5", "waiting []"]


def test_the_public_names_are_all_there():
    assert set(ovis25.__all__) <= set(dir(ovis25)) and "__version__" in dir(ovis25)
    assert all(getattr(ovis25, name).__name__ == name for name in ovis25.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Ovis3'"):
        ovis25.Ovis3  # noqa: B018
