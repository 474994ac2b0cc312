"""The processor: texts with images or a video to a batch, chat messages, decoding, and its folder."""

import io
import json
import warnings
from itertools import pairwise

import pytest
import torch
from PIL import Image
from test_pixels import grey_clip
from transformers import ProcessorMixin

from ovis25 import Ovis2_5Processor
from ovis25.constants import IMAGE_BEGIN_ID, IMAGE_END_ID, VIDEO_BEGIN_ID, VIDEO_END_ID, VISUAL_ATOM_ID
from ovis25.processing import VisualLimits
from ovis25.processing.processor import INFERENCE_LIMITS

SMALL = {"min_pixels": 64 * 64, "max_pixels": 96 * 96}
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")


def picture(width=64, height=64, colour="red") -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def num_atoms(ids: torch.Tensor) -> int:
    return int((ids == VISUAL_ATOM_ID).sum())


def test_one_image_as_path_picture_or_bytes(processor, tmp_path):
    assert isinstance(processor, ProcessorMixin)
    path, buffer = tmp_path / "a.png", io.BytesIO()
    picture().save(path)
    picture().save(buffer, "PNG")
    batches = [
        processor(images=source, text="<image>\nWhat?", **SMALL)
        for source in (path, str(path), picture(), buffer.getvalue(), [path])
    ]
    first = batches[0]
    assert first["grid_thws"].tolist() == [[1, 4, 4]] and first["pixel_values"].shape == (16, 768)
    assert first["pixel_values"].dtype == torch.float32
    assert first["input_ids"][0, :6].tolist() == [IMAGE_BEGIN_ID, *[VISUAL_ATOM_ID] * 4, IMAGE_END_ID]
    for batch in batches[1:]:
        assert all(batch[name].equal(first[name]) for name in first)


def test_several_images_keep_their_order(processor):
    batch = processor(images=[picture(64, 64), picture(96, 64)], text="<image> and <image>", **SMALL)
    assert batch["grid_thws"].tolist() == [[1, 4, 4], [1, 4, 6]]
    assert num_atoms(batch["input_ids"]) == 4 + 6


def test_a_video_as_file_or_frames(processor, tmp_path):
    grey_clip(tmp_path / "clip.mp4", 16)
    from_file = processor(videos=tmp_path / "clip.mp4", text="<video> What?", **SMALL)
    assert from_file["grid_thws"].tolist() == [[8, 4, 4]]
    ids = from_file["input_ids"][0].tolist()
    assert ids[:2] == [VIDEO_BEGIN_ID, VISUAL_ATOM_ID] and ids[8 * 4 + 1] == VIDEO_END_ID
    frames = [picture(64, 48, (i, i, i)) for i in range(8)]
    from_frames = processor(videos=frames, text="<video> What?", **SMALL)
    assert from_frames["input_ids"].equal(from_file["input_ids"])


def test_text_alone_has_no_pixels(processor):
    assert set(processor(text="Hi there")) == {"input_ids", "attention_mask"}
    assert processor(text="")["input_ids"].shape == (1, 0)


def test_a_batch_is_padded_on_the_left(processor):
    texts = ["<image>\nWhat?", "Hi", "<image><image>"]
    batch = processor(images=[picture(), None, [picture(), picture(96, 64)]], text=texts, **SMALL)
    assert batch["grid_thws"].tolist() == [[1, 4, 4], [1, 4, 4], [1, 4, 6]]
    for text, images, row, mask in zip(
        texts,
        [[picture()], None, [picture(), picture(96, 64)]],
        batch["input_ids"],
        batch["attention_mask"],
        strict=True,
    ):
        alone = processor(images=images, text=text, **SMALL)["input_ids"][0]
        assert row[mask.bool()].equal(alone)
        assert all(left <= right for left, right in pairwise(mask.tolist()))
        assert set(row[~mask.bool()].tolist()) <= {processor.tokenizer.pad_token_id}


def test_each_kind_has_its_pixel_budget(golden):
    limits = {
        "single_image_min_pixels": 32 * 32, "single_image_max_pixels": 64 * 64,
        "multiple_image_min_pixels": 32 * 32, "multiple_image_max_pixels": 32 * 32,
        "video_min_pixels": 128 * 128, "video_max_pixels": 128 * 128, "min_frames": 2, "max_frames": 3,
    }  # fmt: skip
    processor = Ovis2_5Processor.from_pretrained(golden.tokenizer_folder, **limits)
    assert processor(images=picture(500, 500), text="<image>")["grid_thws"].tolist() == [[1, 4, 4]]
    two = processor(images=[picture(500, 500)] * 2, text="<image><image>")
    assert two["grid_thws"].tolist() == [[1, 2, 2]] * 2
    assert processor(videos=[picture()] * 9, text="<video>")["grid_thws"].tolist() == [[3, 8, 8]]
    assert processor(videos=[picture()], text="<video>")["grid_thws"].tolist() == [[2, 8, 8]]
    own = processor(images=picture(500, 500), text="<image>", min_pixels=1024, max_pixels=96 * 96)
    assert own["grid_thws"].tolist() == [[1, 6, 6]]


def test_without_limits_the_released_inference_budget_holds(processor):
    assert processor.limits == INFERENCE_LIMITS
    for kind in ("single_image", "multiple_image", "video"):
        assert INFERENCE_LIMITS.budget(kind) == (448 * 448, 1792 * 1792)
    released_training = VisualLimits()
    assert released_training.budget("multiple_image") == released_training.budget("video") == (448**2, 896**2)


def test_impossible_limits_are_refused(golden):
    with pytest.raises(ValueError, match="video_min_pixels 10 .* video_max_pixels 5"):
        Ovis2_5Processor.from_pretrained(golden.tokenizer_folder, video_min_pixels=10, video_max_pixels=5)
    with pytest.raises(ValueError, match="min_frames 9 .* max_frames 8"):
        Ovis2_5Processor.from_pretrained(golden.tokenizer_folder, min_frames=9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "no placeholder", "images": [picture()]}, "0 <image> and 0 <video>, but 1 images and 0 videos"),
        ({"text": "<image>"}, "1 <image> and 0 <video>, but 0 images"),
        ({"text": "<video>", "images": [picture()]}, "0 <image> and 1 <video>, but 1 images and 0 videos"),
        ({"text": "<image><video>", "images": [picture()], "videos": [picture()]}, "not both"),
        ({"text": ["a", "b"], "images": [picture()]}, "2 texts but 1 entries"),
        ({"images": [picture()]}, "text is missing"),
    ],
)
def test_visuals_that_fit_no_placeholder_are_refused(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments, **SMALL)


def test_arguments_that_are_not_used_are_told(processor):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor(text="Hi", return_tensors="pt", padding=True)
    with pytest.warns(UserWarning, match="max_length=3"):
        processor(text="Hi there", max_length=3)


def test_chat_messages_become_a_batch(processor):
    messages = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    direct = processor(images=picture(), text=text, **SMALL)
    options = {"add_generation_prompt": True, "enable_thinking": False, "tokenize": True, **SMALL}
    batch = processor.apply_chat_template(messages, **options)
    assert all(batch[name].equal(direct[name]) for name in direct)
    assert processor.apply_chat_template(messages, return_dict=False, **options).equal(direct["input_ids"])
    two = processor.apply_chat_template([messages, [{"role": "user", "content": "Hi"}]], **options)
    assert two["input_ids"].shape == direct["input_ids"].expand(2, -1).shape
    assert two["grid_thws"].tolist() == [[1, 4, 4]]


def test_a_video_message_becomes_a_batch(processor, tmp_path):
    grey_clip(tmp_path / "clip.mp4", 16)
    content = [{"type": "video", "path": str(tmp_path / "clip.mp4")}, {"type": "text", "text": "What?"}]
    batch = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, **SMALL)
    assert batch["grid_thws"].tolist() == [[8, 4, 4]]
    with pytest.raises(ValueError, match="2 videos"):
        processor.apply_chat_template([{"role": "user", "content": content[:1] * 2}], tokenize=True)
    with pytest.raises(ValueError, match='"type": "video"'):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=True)


def test_decoding_passes_over_markers(processor):
    batch = processor(images=picture(), text="<image>\nHi there<|im_end|>", **SMALL)
    assert processor.decode(batch["input_ids"][0]) == "\nHi there<|im_end|>"
    assert processor.decode(batch["input_ids"][0].tolist(), skip_special_tokens=True) == "\nHi there"
    assert processor.batch_decode(batch["input_ids"]) == ["\nHi there<|im_end|>"]
    assert processor.decode(batch["input_ids"]) == ["\nHi there<|im_end|>"]


def test_a_saved_processor_loads_with_its_limits_and_the_same_tokenizer(golden, tmp_path):
    processor = Ovis2_5Processor.from_pretrained(golden.tokenizer_folder, max_frames=16, video_max_pixels=300_000)
    processor.save_pretrained(tmp_path)
    for name in (*TOKENIZER_FILES, "preprocessor_config.json", "chat_template.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (golden.tokenizer_folder / name).read_bytes()
    assert not (tmp_path / "tokenizer.json").exists()
    loaded = Ovis2_5Processor.from_pretrained(tmp_path)
    assert loaded.limits == processor.limits
    assert (loaded.limits.max_frames, loaded.limits.video_max_pixels) == (16, 300_000)
    assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"] == "Ovis2_5Processor"
    assert Ovis2_5Processor.from_pretrained(tmp_path, max_frames=20).limits.max_frames == 20


def test_a_changed_template_and_added_tokens_are_saved(golden, tmp_path):
    processor = Ovis2_5Processor.from_pretrained(golden.tokenizer_folder)
    processor.chat_template = "{{ messages[0].content }}!"
    processor.save_pretrained(tmp_path / "template")
    loaded = Ovis2_5Processor.from_pretrained(tmp_path / "template")
    assert loaded.apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi!"
    processor = Ovis2_5Processor.from_pretrained(golden.tokenizer_folder)
    processor.tokenizer.add_tokens(["<answer>"])
    processor.save_pretrained(tmp_path / "tokens")
    loaded = Ovis2_5Processor.from_pretrained(tmp_path / "tokens")
    assert len(loaded.tokenizer("<answer>")["input_ids"]) == 1
    assert loaded.tokenizer("Hi there")["input_ids"] == processor.tokenizer("Hi there")["input_ids"]


def test_it_describes_itself(processor):
    assert "single_image_max_pixels" in repr(processor)
