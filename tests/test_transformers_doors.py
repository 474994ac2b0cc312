"""The model behind transformers' own doors: Auto classes, generate, and the image-text-to-text pipeline."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

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
