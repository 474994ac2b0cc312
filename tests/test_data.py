"""The data layer: reading files, every defect by name, budgets that fit, lazy decoding, workers."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ovis25.constants import IGNORE_INDEX, PIXEL_TABLE
from ovis25.data import Collator, ConversationDataset, DataError
from ovis25.data.checks import fit_budget, grids_of
from ovis25.data.source import read_rows
from ovis25.files import REPOSITORY_ROOT
from ovis25.processing.image import num_visual_tokens

SAMPLE_DATA = REPOSITORY_ROOT / "src_theo" / "sample_data"
SMALL = {
    f"{kind}_{bound}_pixels": pixels
    for kind in ("single_image", "multiple_image", "video")
    for bound, pixels in (("min", 32 * 32), ("max", 128 * 128))
}


def turns(question="What is it?", answer="A picture.", **more) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer, **more}]


def picture(path, width=64, height=96, **options):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path.name


@pytest.fixture
def write(tmp_path):
    """Writes rows beside two pictures and a broken one; returns the data file."""
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", 80, 40)
    (tmp_path / "broken.png").write_bytes(b"this is no picture")

    def write_rows(rows, name="data.json"):
        path = tmp_path / name
        text = "\n".join(map(json.dumps, rows)) + "\n" if name.endswith("l") else json.dumps(rows)
        path.write_text(text, encoding="utf-8")
        return path

    return write_rows


def items_equal(first: dict, second: dict) -> bool:
    return all((a is None and b is None) or torch.equal(a, b) for a, b in ((first[key], second[key]) for key in first))


@pytest.mark.parametrize("name", ["data_example.json", "train_data.json", "eval_data.json"])
def test_the_sample_data_is_sound(processor, name):
    dataset = ConversationDataset(SAMPLE_DATA / name, processor)
    for index, length in enumerate(dataset.lengths):
        item = dataset[index]
        assert len(item["input_ids"]) == length, "the length known from headers is the true one"
        assert (item["labels"] != IGNORE_INDEX).any()
    if name == "train_data.json":
        assert all(dataset.statistics().kinds[kind] for kind in ("text", "single_image", "multiple_image", "video"))


def test_json_lines_hold_the_same_samples(processor, write):
    rows = [{"id": str(k), "image": "a.png", "conversations": turns(f"<image>\nNumber {k}?")} for k in range(3)]
    as_list = ConversationDataset(write(rows), processor, **SMALL)
    as_lines = ConversationDataset(write(rows, "data.jsonl"), processor, **SMALL)
    in_memory = ConversationDataset(rows, processor, as_list.folder, **SMALL)
    for other in (as_lines, in_memory):
        assert all(items_equal(as_list[k], other[k]) for k in range(3))


def test_messages_are_the_same_as_conversations(processor, write, tmp_path):
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]
    by_url = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    answer = {"role": "assistant", "content": "A picture."}
    rows = [
        {"image": "a.png", "conversations": turns("<image>\nWhat is it?")},
        {"messages": [{"role": "user", "content": parts}, answer]},
        {"messages": [{"role": "user", "content": by_url}, answer]},
        {"image": "a.png", "messages": [{"role": "user", "content": "<image>\nWhat is it?"}, answer]},
    ]
    dataset = ConversationDataset(write(rows), processor, **SMALL)
    assert all(items_equal(dataset[0], dataset[k]) for k in (1, 2, 3))


def test_image_folder_comes_before_the_data_files_folder(processor, write, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    picture(tmp_path / "elsewhere" / "c.png")
    path = write([{"image": "c.png", "conversations": turns("<image>\nWhat?")}])
    assert len(ConversationDataset(path, processor, tmp_path / "elsewhere", **SMALL)) == 1
    with pytest.raises(DataError, match=r"field image: c.png does not exist\. Looked in .*; set image_folder"):
        ConversationDataset(path, processor, **SMALL)
    with pytest.raises(DataError, match="image_folder .*nowhere is no folder"):
        ConversationDataset(path, processor, tmp_path / "nowhere", **SMALL)


IMAGE_TURNS = turns("<image>\nWhat?")
DEFECTS = {
    "no object": ("row", r"field \(row\): it is a str\. Write each sample as a JSON object"),
    "missing image": (
        {"image": "no.png", "conversations": IMAGE_TURNS},
        r"field image: no\.png does not exist\. Looked in .*; set image_folder or correct the path",
    ),
    "unreadable image": (
        {"image": "broken.png", "conversations": IMAGE_TURNS},
        r"field image: .*broken\.png.*\. Replace the file, or remove the sample",
    ),
    "too many placeholders": (
        {"image": "a.png", "conversations": turns("<image>\n<image>\nWhat?")},
        r"field image: the text has 2 <image>, but there are 1 images\. Write one <image>",
    ),
    "placeholder without image": (
        {"conversations": IMAGE_TURNS},
        r"field image: the text has 1 <image>, but there are 0 images\. Remove <image>, or name the file",
    ),
    "image without placeholder": (
        {"image": "a.png", "conversations": turns()},
        r"the text has 0 <image>, but there are 1 images",
    ),
    "unknown role": (
        {"conversations": [{"from": "humann", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        r"field conversations\[0\]\.from: unknown role 'humann'\. Did you mean human\? Roles are",
    ),
    "unknown message role": (
        {"messages": [{"role": "bot", "content": "Hi"}]},
        r"field messages\[0\]\.role: unknown role 'bot'\. Roles are system, user, assistant",
    ),
    "empty answer": (
        {"conversations": turns(answer="  ")},
        r"field conversations\[1\]\.value: the answer is empty\. Write the answer",
    ),
    "images and video": (
        {"image": "a.png", "video": "v.mp4", "conversations": turns("<image>\n<video>\nWhat?")},
        r"field image and video: a sample takes images or one video, not both",
    ),
    "no learned token": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "ignored_gpt", "value": "Ho"}]},
        r"field conversations: it has no learned token: no gpt turn\. Add an answer",
    ),
    "no conversations": ({"image": "a.png"}, r"field conversations: it is missing"),
    "no text": (
        {"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "Ho"}]},
        r"field conversations\[0\]\.value: it is a int\. It must be text",
    ),
    "web address": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "https://a.org/a.png"}]}]},
        r"field messages\[0\]\.content\[0\]: https://a\.org/a\.png lies on the web\. Download it first",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_named_with_file_index_id_field_and_cure(processor, write, name):
    row, message = DEFECTS[name]
    bad = {"id": "bad", **row} if isinstance(row, dict) else row
    path = write([{"conversations": turns()}, bad])
    with pytest.raises(DataError, match=message) as caught:
        ConversationDataset(path, processor, **SMALL)
    place = rf'{path}[1] (id "bad")' if isinstance(row, dict) else rf"{path}[1]"
    assert place in str(caught.value)
    assert "1 of 2 sample has a defect" in str(caught.value) and "set on_bad_sample to skip" in str(caught.value)


def test_all_defects_are_listed_up_to_twenty_with_a_total(processor, write):
    path = write([{"id": str(k), "image": f"no{k}.png", "conversations": IMAGE_TURNS} for k in range(23)])
    with pytest.raises(DataError) as caught:
        ConversationDataset(path, processor, **SMALL)
    message = str(caught.value)
    assert "23 of 23 samples have defects" in message and "... and 3 more" in message
    assert "no19.png" in message and "no20.png" not in message


def test_bad_samples_are_left_out_counted_and_listed_where_asked(processor, write, tmp_path):
    rows = [{"id": "good", "conversations": turns()}, {"id": "bad", "image": "no.png", "conversations": IMAGE_TURNS}]
    dataset = ConversationDataset(write(rows), processor, on_bad_sample="skip", **SMALL)
    assert len(dataset) == 1 and dataset.statistics().num_skipped == 1
    dataset.write_skipped(tmp_path / "skipped.jsonl")
    (listed,) = map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())
    assert (listed["index"], listed["id"], listed["field"]) == (1, "bad", "image")
    with pytest.raises(DataError, match="every sample is left out; the first: .*no.png does not exist"):
        ConversationDataset(write(rows[1:]), processor, on_bad_sample="skip", **SMALL)


def test_a_picture_that_breaks_while_decoding_is_an_error_or_is_listed(processor, write, tmp_path):
    whole = (tmp_path / "x.jpg").with_name(picture(tmp_path / "x.jpg", 640, 480, quality=90))
    whole.write_bytes(whole.read_bytes()[:4000])  # the header is sound, the pixels are cut
    rows = [{"id": "cut", "image": "x.jpg", "conversations": IMAGE_TURNS}, {"id": "ok", "conversations": turns()}]
    path = write(rows)
    with pytest.raises(DataError, match=r'\[0\] \(id "cut"\), field image: .*x\.jpg'):
        ConversationDataset(path, processor, **SMALL)[0]
    dataset = ConversationDataset(path, processor, on_bad_sample="skip", **SMALL)
    dataset.skipped_path = tmp_path / "skipped.jsonl"
    assert dataset[0]["labels"].eq(IGNORE_INDEX).all() and dataset[0]["pixel_values"] is None
    assert (dataset[1]["labels"] != IGNORE_INDEX).any() and dataset.num_broken == 1
    assert json.loads(dataset.skipped_path.read_text())["id"] == "cut"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.json", b"", "holds no sample"),
        ("data.json", b"{}", "holds a dict; it must be a list"),
        ("data.json", b'[{"a": 1},]', r"line 1, column \d+: no valid JSON"),
        ("data.json", b'{"a": 1}\n{"a": 2', r"line 2, column \d+: no valid JSON"),
        ("data.jsonl", b'{"a": 1}\n{"a": ', r"line 2, column \d+: no valid JSON"),
        ("data.json", "[\xe9]".encode("latin-1"), "is not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_data_says_where(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(path)
    with pytest.raises(DataError, match="does not exist; correct data_path"):
        read_rows(tmp_path / "none.json")


def test_a_long_sample_is_shrunk_until_it_fits_and_no_visual_token_is_cut(processor, write, tmp_path):
    picture(tmp_path / "big.png", 512, 384)
    path = write([{"id": "big", "image": "big.png", "conversations": IMAGE_TURNS}])
    budgets = SMALL | {"single_image_max_pixels": 512 * 512}
    whole = ConversationDataset(path, processor, **budgets)
    limit = int(whole.lengths[0]) - 100
    shrunk = ConversationDataset(path, processor, multimodal_max_length=limit, **budgets)
    item = shrunk[0]
    assert len(item["input_ids"]) == shrunk.lengths[0] <= limit
    num_visual = sum(num_visual_tokens(tuple(grid)) for grid in item["grid_thws"].tolist())
    assert len(whole[0]["input_ids"]) - len(item["input_ids"]) == 16 * 12 - num_visual, "the text is whole"
    assert item["pixel_values"].shape[0] == 4 * num_visual
    assert shrunk.statistics().num_shrunk == 1

    message = rf"has {limit + 100} tokens \(192 visual\), more than multimodal_max_length {limit}"
    with pytest.raises(DataError, match=message + r"\. .*set on_long_sample to shrink or skip"):
        ConversationDataset(path, processor, multimodal_max_length=limit, on_long_sample="error", **budgets)
    with pytest.raises(DataError, match="every sample is left out"):
        ConversationDataset(path, processor, multimodal_max_length=limit, on_long_sample="skip", **budgets)
    with pytest.raises(DataError, match="even with the smallest pictures"):
        ConversationDataset(path, processor, multimodal_max_length=8, **budgets)
    with pytest.raises(DataError, match=r"more than text_max_length 4\. Raise text_max_length"):
        ConversationDataset(write([{"conversations": turns()}]), processor, text_max_length=4)


def test_rows_that_were_not_checked_are_shrunk_as_well(processor, write, tmp_path):
    picture(tmp_path / "big.png", 512, 384)
    path = write([{"image": "big.png", "conversations": IMAGE_TURNS}])
    options = {"multimodal_max_length": 100, **SMALL, "single_image_max_pixels": 512 * 512}
    checked = ConversationDataset(path, processor, **options)
    assert items_equal(checked[0], ConversationDataset(path, processor, check=False, **options)[0])


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 17, 60, 200])
def test_the_fitted_budget_is_the_largest(max_tokens):
    sizes = [(1, 300, 500), (1, 640, 200)]

    def tokens(budget):
        try:
            return sum(map(num_visual_tokens, grids_of(sizes, budget)))
        except ValueError:  # too long and thin for so few pixels
            return None

    units = [u for u in range(1, 257) if (tokens((1024, u * 1024)) or 1000) <= max_tokens]
    fitted = fit_budget(sizes, (1024, 256 * 1024), max_tokens)
    if not units:
        assert fitted is None
    else:
        assert tokens(fitted) <= max_tokens
        # bisection finds a boundary; where the count is not monotonic another one may lie above it
        assert tokens((1024, fitted[1] + 1024)) > max_tokens or fitted[1] == 256 * 1024


def test_exif_orientation_decides_the_measured_size(processor, write, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture(tmp_path / "turned.jpg", 160, 64, exif=exif)
    dataset = ConversationDataset(write([{"image": "turned.jpg", "conversations": IMAGE_TURNS}]), processor, **SMALL)
    item = dataset[0]
    _, height, width = item["grid_thws"][0].tolist()
    assert height > width and len(item["input_ids"]) == dataset.lengths[0]


def test_nothing_is_decoded_before_it_is_asked_for(processor, write, monkeypatch):
    decoded = []
    import ovis25.data.dataset as module

    original = module.open_image
    monkeypatch.setattr(module, "open_image", lambda source: decoded.append(source) or original(source))
    dataset = ConversationDataset(write([{"image": "a.png", "conversations": IMAGE_TURNS}] * 3), processor, **SMALL)
    assert decoded == []
    dataset[1]
    assert len(decoded) == 1


def test_raw_pixels_are_the_same_pixels_in_bytes(processor, write):
    rows = [
        {"image": ["a.png", "b.png"], "conversations": turns("<image><image>\nWhat?")},
        {"video_frames": ["a.png", "b.png"], "conversations": turns("<video>\nWhat?")},
        {"conversations": turns()},
    ]
    path = write(rows)
    floats = ConversationDataset(path, processor, **SMALL)
    raw = ConversationDataset(path, processor, raw_pixels=True, **SMALL)
    for index in range(2):
        item = raw[index]
        assert item["pixel_values"].dtype == torch.uint8 and floats[index]["pixel_values"].dtype == torch.float32
        pixels = torch.from_numpy(PIXEL_TABLE)[item["pixel_values"].int()]
        assert items_equal(floats[index], {**item, "pixel_values": pixels})
    assert raw[2]["pixel_values"] is None
    batch = Collator(0)([raw[0], raw[2], raw[1]])
    assert batch["pixel_values"].dtype == torch.uint8


def test_workers_change_nothing(processor, write):
    rows = [{"image": ["a.png", "b.png"][k % 2], "conversations": turns(f"<image>\n{k}?")} for k in range(6)]
    dataset = ConversationDataset(write(rows), processor, **SMALL)
    collator = Collator(processor.tokenizer.pad_token_id)
    alone, helped = (
        list(DataLoader(dataset, batch_size=2, collate_fn=collator, num_workers=workers)) for workers in (0, 2)
    )
    assert all(items_equal(a, b) for a, b in zip(alone, helped, strict=True)) and len(alone) == 3


def test_a_batch_pads_on_the_right_and_joins_patches_in_order(processor, write):
    rows = [
        {"image": "a.png", "conversations": IMAGE_TURNS},
        {"conversations": turns()},
        {"image": ["b.png", "a.png"], "conversations": turns("<image>\n<image>\nWhich?")},
    ]
    dataset = ConversationDataset(write(rows), processor, **SMALL)
    items = [dataset[k] for k in range(3)]
    batch = Collator(processor.tokenizer.pad_token_id)(items)
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        assert batch["input_ids"][row, :length].equal(item["input_ids"])
        assert batch["attention_mask"][row].sum() == length == batch["attention_mask"][row, :length].sum()
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
    assert batch["grid_thws"].equal(torch.cat([items[0]["grid_thws"], items[2]["grid_thws"]]))
    assert batch["pixel_values"].equal(torch.cat([items[0]["pixel_values"], items[2]["pixel_values"]]))
    assert "pixel_values" not in Collator(0)([items[1]])


class Generated:
    """Rows made on demand, one of them with a defect."""

    def __init__(self, length, bad):
        self.length, self.bad, self.asked = length, bad, []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.asked.append(index)
        buffer = io.BytesIO()
        Image.new("RGB", (32 + 32 * (index * 4 // self.length), 32), "white").save(buffer, "PNG")
        image = buffer.getvalue() if index != self.bad else "no.png"
        return {"image": image, "conversations": turns("<image>\nWhat?")}


def test_rows_made_on_demand_are_spot_checked_all_along(processor):
    rows = Generated(1000, bad=998)
    dataset = ConversationDataset(rows, processor, **SMALL)
    assert 200 < len(set(rows.asked)) < 400
    statistics = dataset.statistics()
    assert statistics.is_estimate and statistics.num_samples == 1000
    assert statistics.visual_tokens == pytest.approx(2500, rel=0.02), "1 to 4 tokens, in equal parts"
    with pytest.raises(DataError, match=r"samples\[998\], field image: no.png does not exist"):
        dataset[998]
    with pytest.raises(DataError, match=r"samples\[3\].*no.png"):
        ConversationDataset(Generated(1000, bad=3), processor, **SMALL)
